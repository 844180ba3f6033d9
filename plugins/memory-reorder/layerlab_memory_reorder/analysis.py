"""What the notebook shows: plans, measured peaks and times of a step against the peers, what fits, accuracies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from layerlab import Comparison, Estimate, build_model, measure
from layerlab_memory_reorder.method import plan as plans
from layerlab_memory_reorder.method.measuring import (
    ARMS,
    BOTH,
    FUSED,
    IMAGENET,
    NULL,
    OURS,
    PAPER,
    PARTS,
    PLAIN,
    STATES,
    Step,
    largest,
    largest_batch,
    largest_network,
    largest_planned_batch,
    measured_peak,
)
from layerlab_memory_reorder.method.trace import Network, trace

# Caffe's static allocation, figure 3.
PLAN = "conventional plan"
# All parts together are the method.
_LAST_PART = list(PARTS)[-1]


def caffe_alexnet(num_classes: int = 1000) -> nn.Sequential:
    """AlexNet as Caffe's `bvlc_alexnet` trains it, for images of 227 × 227: two groups, local response normalisation.

    The published prototxt's shapes; torchvision's `alexnet` has 64 first filters, no groups and no normalisation.
    """
    def norm() -> nn.Module:
        return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)

    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(3, 96, 11, 4), nn.ReLU(inplace=True), norm(), nn.MaxPool2d(3, 2),
            nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(inplace=True), norm(), nn.MaxPool2d(3, 2),
            nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        ),
        nn.Flatten(),
        nn.Sequential(
            nn.Linear(9216, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5),
            nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5),
            nn.Linear(4096, num_classes),
        ),
    )


def network(name: str, image_size: int = 224, **options: Any) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network without memory for its weights (meta device), and the shape of its images.

    Args:
        name: `caffe-alexnet` or any name of `layerlab.build_model`.
        image_size: pixels of a side; 227 for `caffe-alexnet`, whatever is given.
        options: for `build_model`.
    """
    with torch.device("meta"):
        if name == "caffe-alexnet":
            return caffe_alexnet(**options), (3, 227, 227)
        return build_model(name, **options), (3, image_size, image_size)


def worked_out(traced: Network) -> dict[str, float]:
    """The simplest accounting of section 4: every diff in its own data's memory, no lives, no masks.

    Returns:
        Bytes: `conventional`; `kept` (all weight diffs beside each other); `shared` (room for the largest alone).
    """
    data = sum(traced.activations.values())
    weights = sum(traced.weights.values())
    return {"conventional": 2 * weights + 2 * data - traced.activations[traced.input],
            "kept": 2 * weights + data, "shared": weights + max(traced.weights.values()) + data}


def planned_savings(networks: Sequence[str], batches: Sequence[int]) -> pd.DataFrame:
    """Section 4's claim, network by network and batch by batch; every plan is walked by the checker.

    Returns:
        One row a network and batch: `network`, `batch`, `conventional GB`, and in per cent of it saved: by the simplest
        accounting with weight diffs `kept (sums)` and `shared (sums)`; by the exact plans `kept`, `shared`, `slabs`,
        `forward reuse`; and `masks`, what their masks take.
    """
    rows = []
    for name in networks:
        model, shape = network(name)
        for batch in batches:
            traced = trace(model, shape, batch)
            base = plans.conventional(traced)
            sums = worked_out(traced)
            exact = {
                "kept": plans.reordered(traced, "kept", "weight-first"),
                "shared": plans.reordered(traced, "shared", "weight-first"),
                "slabs": plans.reordered(traced, "slabs"),
                "forward reuse": plans.reordered(traced, "slabs", forward_reuse=True),
            }
            for each in (base, *exact.values()):
                plans.check(each)
            masks = sum(block.bytes for block in exact["shared"].blocks if block.kind == "mask")
            rows.append({
                "network": name, "batch": batch, "conventional GB": base.total / 1e9,
                "kept (sums)": 100 * (1 - sums["kept"] / sums["conventional"]),
                "shared (sums)": 100 * (1 - sums["shared"] / sums["conventional"]),
                **{label: 100 * (1 - each.total / base.total) for label, each in exact.items()},
                "masks": 100 * masks / base.total,
            })
    return pd.DataFrame(rows)


def small_example() -> tuple[Network, dict[str, plans.Plan]]:
    """Figures 3 and 4's kind of network, small enough to read: convolutions with more data than weights, then linear
    layers with more weights than data; and its two plans."""
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(1, 16, 5, padding=2))
    model.add_module("pool1", nn.MaxPool2d(2))
    model.add_module("conv2", nn.Conv2d(16, 32, 5, padding=2))
    model.add_module("pool2", nn.MaxPool2d(2))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc1", nn.Linear(32 * 49, 256))
    model.add_module("fc2", nn.Linear(256, 10))
    traced = trace(model, (1, 28, 28), 8)
    return traced, {"conventional": plans.conventional(traced),
                    "reordered": plans.reordered(traced, "shared", "larger-first")}


def peaks(
    networks: Mapping[str, Sequence[int]], optimizer: str = "sgd", device: str = "meta", real_gb: float = 0.0
) -> pd.DataFrame:
    """Peaks of a step of each way and each part of the method beside the conventional plan; see `ways` and `parts`.

    Args:
        networks: name → batch sizes.
        optimizer, device: as for `Step`.
        real_gb: without a GPU, steps whose dry runs all need less (10⁹ bytes) are computed for real, too.

    Returns:
        One row for each network, batch and arm, `conventional plan` first: `network`, `batch`, `arm`; `peak GB`, of a
        real step where `real` is true, else of a dry run; `dry run GB`; and `saved`, in per cent of the conventional
        plan with the same optimizer state (the paper's own accounting has none; its 0.6 GB are without).
    """
    arms = [arm for arm in dict.fromkeys((*ARMS, *PARTS)) if arm != _LAST_PART]
    rows = []
    for name, batches in networks.items():
        model, shape = network(name)
        for batch in batches:
            base = plans.conventional(trace(model, shape, batch), STATES[optimizer]).total
            dry = {arm: measured_peak(model, shape, batch, arm, optimizer=optimizer) for arm in arms}
            where = device
            if device == "meta" and max(dry.values()) < real_gb * 1e9:
                where = "cpu"
            found = dry
            if where != "meta":
                found = {arm: measured_peak(model, shape, batch, arm, optimizer=optimizer, device=where)
                         for arm in arms}
            rows.append({"network": name, "batch": batch, "arm": PLAN, "peak GB": base / 1e9, "real": False,
                         "dry run GB": math.nan, "saved": 0.0})
            rows += [{"network": name, "batch": batch, "arm": arm, "peak GB": peak / 1e9, "real": where != "meta",
                      "dry run GB": dry[arm] / 1e9, "saved": 100 * (1 - peak / base)} for arm, peak in found.items()]
    return pd.DataFrame(rows)


def beyond_pytorch(need: float, of_pytorch: float) -> dict[str, float]:
    """What the claims' gates read: how much less an arm needs than PyTorch's optimizer in backward, in per cent.

    Plain PyTorch reaches most of what the paper saves over Caffe's static allocation; the method has to add to it.

    Args:
        need: memory of the arm; or, of what fits, the number that PyTorch fits.
        of_pytorch: memory of PyTorch; or the number that the arm fits.
    """
    return {"saved more than PyTorch": 100 * (1 - need / of_pytorch)}


def ways(measured: pd.DataFrame) -> pd.DataFrame:
    """The conventional plan and `ARMS`: of `peaks`, what a user chooses from."""
    return measured[measured["arm"].isin((PLAN, *ARMS))].reset_index(drop=True)


def parts(measured: pd.DataFrame) -> pd.DataFrame:
    """What each part of memory-reorder saves, one part after the other, from PyTorch's optimizer in backward on.

    Args:
        measured: of `peaks`.

    Returns:
        Its rows of `FUSED` and of `PARTS`, with `part saves`: what the arm saves more than the one before it, in per
        cent of the conventional plan.
    """
    order = {arm: place for place, arm in enumerate((FUSED, *PARTS))}
    frame = measured.replace({"arm": {OURS: _LAST_PART}})
    frame = frame[frame["arm"].isin(order)]
    groups: Any = frame.groupby(["network", "batch"], sort=False)
    frame = pd.concat([part.sort_values("arm", key=lambda arms: arms.map(order)) for _, part in groups])
    before = frame.groupby(["network", "batch"], sort=False)["saved"].shift()
    return frame.assign(**{"part saves": frame["saved"] - before}).reset_index(drop=True)


def timed(
    networks: Mapping[str, int], rounds: int, image_size: int = 224, device: str = "cpu", optimizer: str = "sgd"
) -> pd.DataFrame:
    """Peaks and seconds of all arms, computed for real, by turns in one process.

    Args:
        networks: name → batch size.
        rounds: timed rounds after one untimed.
        image_size: of all networks but `caffe-alexnet`.
        device: `cpu` or `cuda`.
        optimizer: as for `Step`.

    Returns:
        One row a network and arm: `network`, `batch`, `arm`, `peak MB` of real steps with their kernels' workspaces,
        `dry run MB` (the same step on the meta device, without), `seconds` (median), and `time` with `time low` and
        `time high`: median and quartiles of the ratio to PyTorch with its optimizer in backward, round by round.
    """
    rows = []
    for name, batch in networks.items():
        model, shape = network(name, image_size)
        steps = {}
        part: list[dict[str, Any]] = []
        for arm in ARMS:
            dry = measured_peak(model, shape, batch, arm, optimizer=optimizer)
            steps[arm] = Step(arm, model, shape, batch, optimizer, device)
            part.append({"network": name, "batch": batch, "arm": arm, "peak MB": steps[arm].peak() / 1e6,
                         "dry run MB": dry / 1e6})
        turns = measure.time_by_turns(steps, rounds, warmup=1, device=device)
        for row in part:
            turn = turns[row["arm"]]
            row["seconds"] = turn.median
            row["time"], row["time low"], row["time high"] = turn.ratio(turns[FUSED])
        for step in steps.values():
            step.close()
        rows += part
    return pd.DataFrame(rows)


def targets(measured: pd.DataFrame, times: pd.DataFrame) -> pd.DataFrame:
    """This project's own targets for the executor, computed from `ways` and `timed`.

    Returns:
        `target`, `where`, `wanted`, `measured`, `met`.
    """
    rows = []

    def note(target: str, where: str, wanted: str, value: float, met: bool) -> None:
        rows.append({"target": target, "where": where, "wanted": wanted, "measured": value, "met": met})

    groups: Any = measured.groupby(["network", "batch"], sort=False)
    for (name, batch), part in groups:
        peak: dict[str, float] = dict(zip(part["arm"], part["peak GB"], strict=True))
        others = min(value for arm, value in peak.items() if arm != BOTH)
        where = f"{name}, batch {batch}"
        if ("alexnet" in name and batch == 256) or (name == "vgg16" and batch >= 40):
            saved = 100 * (1 - peak[OURS] / peak[PLAN])
            note("below the conventional plan", where, "≥ 40 %", saved, saved >= 40)
        note("below the optimizer in backward", where, "> 0 %", 100 * (1 - peak[OURS] / peak[FUSED]),
             peak[OURS] < peak[FUSED])
        note("with checkpointing the lowest of all", where, "> 0 %",
             100 * (1 - peak[BOTH] / others), peak[BOTH] < others)
    for name, part in times.groupby("network", sort=False):
        row: Any = part.set_index("arm").loc[OURS]
        note("time against the optimizer in backward", f"{name}, batch {row['batch']}", "≤ 1.05 ×", row["time"],
             row["time"] <= 1.05)
    return pd.DataFrame(rows)


def what_fits(networks: Sequence[str], memory: int, optimizer: str = "sgd", device: str = "meta") -> pd.DataFrame:
    """The largest batch of each way of training in the same memory.

    Returns:
        One row a network and arm, `conventional plan` first: `network`, `arm`, `batch`, and `times`, relative to
        PyTorch with gradients freed first.
    """
    rows = []
    for name in networks:
        model, shape = network(name)
        found = {PLAN: largest_planned_batch(
            model, memory, shape, lambda traced: plans.conventional(traced, STATES[optimizer]))}
        for arm in ARMS:
            found[arm] = largest_batch(model, memory, shape, arm, optimizer=optimizer, device=device)
        rows += [{"network": name, "arm": arm, "batch": batch,
                  "times": batch / found[PLAIN] if found[PLAIN] else math.nan} for arm, batch in found.items()]
    return pd.DataFrame(rows)


def wide_vgg(width: int, num_classes: int = 1000) -> nn.Sequential:
    """VGG-16's layers with `width` sixty-fourths of its channels and neurons: a network whose size is one number."""
    layers: list[nn.Module] = []
    before = 3
    for channels, count in ((width, 2), (2 * width, 2), (4 * width, 3), (8 * width, 3), (8 * width, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
            before = channels
        layers.append(nn.MaxPool2d(2))
    hidden = 64 * width
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Sequential(
        nn.Linear(49 * before, hidden), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(hidden, num_classes)))


def deep_vgg(extra: int, num_classes: int = 1000) -> nn.Sequential:
    """VGG-16 with `extra` - 1 more convolutions in each of its five stages."""
    layers: list[nn.Module] = []
    before = 3
    for channels, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count + extra - 1):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Sequential(
        nn.Linear(25088, 4096), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
        nn.Dropout(), nn.Linear(4096, num_classes)))


def larger_networks(memory: int, batch_size: int, optimizer: str = "sgd", device: str = "meta") -> pd.DataFrame:
    """How much larger a VGG fits at the same batch and memory: more layers a stage, and more neurons a layer.

    Returns:
        One row a direction and arm, conventional plan first: `grown`, `arm`, `convolutions`, `parameters` (millions),
        `times`: the conventional plan's number of convolutions (deeper) or parameters (wider) into this one's.
    """
    rows = []
    for grown, build in (("deeper", deep_vgg), ("wider", wide_vgg)):
        def conventional(size: int, build: Callable[[int], nn.Module] = build) -> float:
            with torch.device("meta"):
                traced = trace(build(size), IMAGENET, batch_size)
            return plans.conventional(traced, STATES[optimizer]).total

        sizes = {PLAN: largest(conventional, memory)}
        for arm in (PLAIN, FUSED, NULL, PAPER, OURS):
            sizes[arm] = largest_network(build, memory, batch_size, IMAGENET, arm, optimizer=optimizer, device=device)
        part: list[dict[str, Any]] = []
        for arm, size in sizes.items():
            with torch.device("meta"):
                model = build(size)
            part.append({
                "grown": grown, "arm": arm,
                "convolutions": sum(isinstance(module, nn.Conv2d) for module in model.modules()),
                "parameters": sum(p.numel() for p in model.parameters()) / 1e6})
        key = "convolutions" if grown == "deeper" else "parameters"
        for row in part:
            row["times"] = row[key] / part[0][key]
        rows += part
    return pd.DataFrame(rows)


def gain(first: Comparison, baseline: str, second: Comparison, arm: str) -> Estimate:
    """Points of final top-1 that `arm` of one comparison has more than `baseline` of another with the same seeds."""
    pairs = zip(second.per_seed("top-1", arm), first.per_seed("top-1", baseline), strict=True)
    return Estimate(tuple(100 * (mine - theirs) for mine, theirs in pairs), "points")


def differing_weights(comparison: Comparison, baseline: str, arm: str) -> list[float]:
    """The largest difference of any weight after training, relative to its tensor's largest, for each seed."""
    found = []
    for mine, theirs in zip(comparison.of(arm), comparison.of(baseline), strict=True):
        a, b = theirs.model.state_dict(), mine.model.state_dict()
        found.append(max(((a[key] - b[key]).abs().max() / a[key].abs().max().clamp(min=1e-30)).item()
                         for key in a if a[key].is_floating_point()))
    return found


def accuracies(runs: Mapping[str, Comparison]) -> pd.DataFrame:
    """Final accuracy and peak of every arm: means with half-widths of 95 % intervals.

    Args:
        runs: title → comparison.
    """
    rows = []
    for title, comparison in runs.items():
        for arm in comparison.arms:
            row: dict[str, Any] = {"training": title, "arm": arm, "seeds": len(comparison.seeds)}
            row["top-1"], row["top-1 ±"] = comparison.estimate(lambda result: result.final["test/top1"], arm).interval
            row["peak MB"] = comparison.per_seed("peak MB", arm)[0]
            row["seconds"], row["seconds ±"] = comparison.estimate("seconds", arm).interval
            rows.append(row)
    return pd.DataFrame(rows)
