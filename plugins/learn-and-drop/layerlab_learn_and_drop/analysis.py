"""What the notebook shows: cuts and their cost, steps by turns, savings, accuracy lost, times to it, scores as maps."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from layerlab import Augment, Comparison, Dataset, Estimate, FitResult, build_model, explore, load_dataset, measure
from layerlab_learn_and_drop.method.cutting import Plan, make_plan, split
from layerlab_learn_and_drop.method.features import Making, Storage
from layerlab_learn_and_drop.strategy import NAME, LearnAndDrop

PLAIN, FROZEN, DROPPED = "plain", "freezing", "Learn&Drop"
# The paper's VGG has batch norm: its summary says so.
PUBLISHED = {"vgg11_bn": 17.83, "resnet152": 83.74}
CLAIMS = {"vgg11_bn": "flops-vgg11", "resnet152": "flops-resnet152"}
# Points of top-1 that count as no loss, and the ratios that are aimed at, by family of networks.
MARGIN = 0.5
# Per cent of the forward FLOPs that the claims' gates want saved.
LEAST = 30.0
# What training costs, features included.
ALL_FLOPS = ("cost/forward_flops", "cost/backward_flops")
TARGETS = {"resnet": 2.0, "vgg": 1.3}


def arms(strategy: LearnAndDrop) -> dict[str, Any]:
    """Plain training, Learn&Drop, and freezing the same layers in the same epochs."""
    return {PLAIN: (), DROPPED: strategy, FROZEN: strategy.same_layers_frozen()}


def threshold_arms(strategy: LearnAndDrop, tried: Mapping[str, Sequence[Any]]) -> dict[str, LearnAndDrop]:
    """The strategy with every combination of some settings' values, for `threshold_table`.

    Args:
        strategy: has the other settings.
        tried: setting → values, such as `{"settled": [0.5, 0.9], "flat": [0.25]}`.
    """
    arms = {}
    for values in itertools.product(*tried.values()):
        changed = dict(zip(tried, values, strict=True))
        name = ", ".join(f"{setting} {value}" for setting, value in changed.items())
        arms[name] = LearnAndDrop(**strategy.model_dump() | changed)
    return arms


def threshold_table(comparison: Comparison, tried: Sequence[str]) -> pd.DataFrame:
    """Which thresholds and score to take, from runs on held-out training images.

    Of those that save `LEAST` per cent of the forward FLOPs, the ones with the best top-1 once as many FLOPs are spent
    as the cheapest run took in all, features included; of equals the ones that save most. Where none saves that, of
    those that drop something; where none drops anything, of all.

    Args:
        comparison: the runs of `threshold_arms` on `Dataset.held_out`.
        tried: names of the settings.

    Returns:
        A row a combination: the settings, `forward FLOPs saved` (per cent), `top-1` and `top-1 at equal FLOPs` (means
        over seeds, shares), `chosen`.
    """
    spent = {key: sum(map(result.total, ALL_FLOPS)) for key, result in comparison.results.items()}
    budgets = [min(spent[arm, seed] for arm in comparison.given.arms) for seed in comparison.seeds]
    rows = []
    for arm in comparison.given.arms:
        results = comparison.of(arm)
        (strategy,) = results[0].strategies
        equal = [result.within(budget, ALL_FLOPS) for result, budget in zip(results, budgets, strict=True)]
        rows.append({
            **{setting: getattr(strategy, setting) for setting in tried},
            "forward FLOPs saved": Estimate(tuple(map(flop_reduction_alone, results))).mean,
            "top-1": comparison.estimate(lambda result: result.final["test/top1"], arm).mean,
            "top-1 at equal FLOPs": Estimate(tuple(equal)).mean,
        })
    table = pd.DataFrame(rows)
    saved = table["forward FLOPs saved"]
    candidates = next(part for part in (table[saved >= LEAST], table[saved > 0], table) if len(part))
    order = candidates.sort_values(["top-1 at equal FLOPs", "forward FLOPs saved"], ascending=False, kind="stable")
    return table.assign(chosen=table.index == order.index[0])


def chosen(table: pd.DataFrame, tried: Sequence[str], strategy: LearnAndDrop) -> LearnAndDrop:
    """The strategy with what `threshold_table` chose."""
    row = table[table["chosen"]].iloc[0]
    return LearnAndDrop(**strategy.model_dump() | {setting: row[setting] for setting in tried})


def storage_arms(strategy: LearnAndDrop) -> dict[str, Any]:
    """Plain training, Learn&Drop with each storage and each way with augmented images, and with the other score."""
    settings = strategy.model_dump()
    ways = [{"storage": storage} for storage in _BITS]
    ways += [{"augmentation": way} for way in ("none", "copies", "refresh") if way != strategy.augmentation]
    arms: dict[str, Any] = {PLAIN: ()}
    for way in ways:
        changed = LearnAndDrop(**settings | way)
        arms[f"{_BITS[changed.storage]}, {_way(changed)}"] = changed
    other = "gradients" if strategy.score == "weights" else "weights"
    arms[f"score from {other}"] = LearnAndDrop(**settings | {"score": other})
    return arms


_BITS = {"compute": "32 bits", "bfloat16": "16 bits", "int8": "8 bits"}


def _way(strategy: LearnAndDrop) -> str:
    return {"none": "plain images", "copies": f"{strategy.copies} augmented copies",
            "refresh": f"refreshed every {strategy.refresh_every} epochs"}[strategy.augmentation]


# ---------------------------------------------------------------------------------------------- exact


def plan_of(name: str, shape: tuple[int, int, int] = (3, 224, 224), **options: Any) -> Plan:
    """A network's layers and cuts, from shapes alone: no memory, no arithmetic."""
    with torch.device("meta"):
        return make_plan(build_model(name, **options), torch.empty(1, *shape))


def cut_table(plan: Plan, image_bytes: int) -> pd.DataFrame:
    """Every cut of a plan.

    Returns:
        A row a cut: `layers` before it and their `share` of all layers, `FLOPs` (share of the forward pass before it),
        `features` (float32, in multiples of the uint8 image), `tensors` that cross.
    """
    return pd.DataFrame([
        {"layers": count, "share": count / len(plan.layers), "FLOPs": cut.flops / plan.flops,
         "features": 4 * cut.elements / image_bytes, "tensors": len(cut.shapes)}
        for count, cut in plan.cuts.items()
    ])


def published_savings(plans: Mapping[str, Plan]) -> pd.DataFrame:
    """What the published FLOP reductions mean: how early a prefix would have to go.

    Returns:
        A row a network: its `layers` and `GFLOPs` forward; `all but the last layer`, the share of the forward pass that
        the longest prefix carries; what is `published` as the reduction over the whole training; and the `latest drop`,
        as a share of training, at which that prefix can go to reach it, features for free.
    """
    rows = []
    for name, plan in plans.items():
        longest = plan.cuts[max(plan.cuts)].flops / plan.flops
        published = PUBLISHED.get(name, math.nan) / 100
        rows.append({"network": name, "layers": len(plan.layers), "GFLOPs": plan.flops / 1e9,
                     "all but the last layer": longest, "published": published,
                     "latest drop": 1 - published / longest})
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------- a step


def step_costs(
    build: Callable[[], nn.Module], data: Dataset, batch_size: int, shares: Sequence[float], rounds: int,
    storages: Sequence[Storage] = ("compute",), channels_last: bool = True,
) -> pd.DataFrame:
    """A training step with a prefix frozen and with it dropped, against the whole step, measured by turns.

    Each step reads its own batch: images, or stored features in memory.

    Args:
        shares: of the forward FLOPs; the longest prefix within each is taken.

    Returns:
        A row a prefix and way: `prefix`, `FLOPs` (its share of the forward pass), `way`, `time`, `time low` and
        `time high` (median and quartiles of the ratio to the whole step, round by round), `MB` of features for
        1,000 images.
    """
    device = data.train.labels.device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    network = build().to(device, memory_format=memory_format)  # type: ignore[call-overload]  # not in torch's stubs
    example = next(data.train.batches(2, memory_format=memory_format))[0]
    plan = make_plan(network, example)
    count = min(len(data.train), 8 * batch_size)
    steps = {"whole": _step(copy.deepcopy(network), data.train, batch_size, memory_format)}
    rows: list[dict[str, Any]] = []
    for share in shares:
        cut = max((cut for cut in plan.cuts.values() if cut.flops <= share * plan.flops), key=lambda cut: cut.flops)
        what = {"prefix": f"{cut.layers} of {len(plan.layers)} layers", "FLOPs": cut.flops / plan.flops}
        frozen = copy.deepcopy(network)
        rows.append({**what, "way": "frozen", "label": f"{share} frozen", "MB": 0.0})
        modules = [frozen.get_submodule(name) for name in cut.modules]
        steps[rows[-1]["label"]] = _step(frozen, data.train, batch_size, memory_format, modules)
        for storage in storages:
            whole = copy.deepcopy(network)
            prefix, tail = split(whole, cut)
            making = Making(prefix, data.train, storage, 0, 0, batch_size, nullcontext, memory_format)
            features = making.make(device, math.inf, Path(), limit=count // batch_size)
            rows.append({**what, "way": f"dropped, {_BITS[storage]}", "label": f"{share} {storage}",
                         "MB": features.nbytes / len(features) / 1e3})
            steps[rows[-1]["label"]] = _step(tail, features, batch_size, memory_format)
    turns = measure.time_by_turns(steps, rounds, device=str(device))
    for row in rows:
        row["time"], row["time low"], row["time high"] = turns[row.pop("label")].ratio(turns["whole"])
    return pd.DataFrame(rows)


def _step(
    model: nn.Module, source: Any, batch_size: int, memory_format: torch.memory_format, frozen: Sequence[nn.Module] = ()
) -> Callable[[], object]:
    """A training step on the next batch of a source, pass after pass."""
    model.train()
    for module in frozen:
        module.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=True)
    generator = torch.Generator().manual_seed(0)

    def stream() -> Any:
        while True:
            yield from source.batches(batch_size, generator, torch.float32, memory_format)

    batches = stream()

    def step() -> None:
        x, y = next(batches)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


# ---------------------------------------------------------------------------------------------- a run


def forward_flops(result: FitResult) -> float:
    """Of a whole run, those of making features included."""
    return result.total("cost/forward_flops")


def flop_reduction(comparison: Comparison, arm: str = DROPPED) -> Estimate:
    """Per cent of plain training's forward FLOPs that an arm saved, making features included."""
    return comparison.saving(forward_flops, arm, PLAIN)


def observed(comparison: Comparison) -> dict[str, float]:
    """What the claims' gates read: plain training's top-1, and the dropped share of its forward FLOPs, in per cent."""
    return comparison.observed(PLAIN) | {"dropped share": flop_reduction(comparison).mean}


def flop_reduction_alone(result: FitResult) -> float:
    """The same from a run of Learn&Drop alone: its first epoch, in which everything learns, is what all would cost."""
    return 100 * (1 - forward_flops(result) / (len(result.history) * result.history[0]["cost/forward_flops"]))


def speedup(comparison: Comparison, arm: str, baseline: str = PLAIN) -> Estimate:
    """How many times faster an arm did the same number of epochs, evaluation excluded and features included."""
    return comparison.paired("seconds", baseline, arm)


def points(comparison: Comparison, arm: str) -> Estimate:
    """Percentage points of final top-1 that an arm is above plain training."""
    return comparison.paired("top-1", arm, PLAIN)


def peak_bytes(result: FitResult) -> float:
    """The most that a run held: a step's peak and the features that lay in memory beside it."""
    return max(row.get("cost/peak_memory_bytes", math.nan) for row in result.history)


def table(runs: Mapping[str, Comparison]) -> pd.DataFrame:
    """What each arm cost and gained over whole runs: means, with half-widths of 95 % intervals as ±."""
    rows = []
    for name, run in runs.items():
        for arm in run.arms:
            results = run.of(arm)
            row: dict[str, Any] = {"run": name, "arm": arm}
            row["top-1"] = str(run.estimate("top-1", arm))
            row["against plain"] = "" if arm == PLAIN else str(points(run, arm))
            row["seconds"] = str(run.estimate("seconds", arm))
            row["faster"] = "" if arm == PLAIN else str(speedup(run, arm))
            row["forward FLOPs saved"] = "" if arm == PLAIN else str(flop_reduction(run, arm))
            features = [max(epoch.get(f"{NAME}/feature_bytes", 0) for epoch in result.history) for result in results]
            row["features"] = f"{max(features) / 1e6:.1f} MB" if max(features) else ""
            row["peak"] = f"{max(map(peak_bytes, results)) / 1e6:.0f} MB"
            rows.append(row)
    return pd.DataFrame(rows)


def times(runs: Mapping[str, Comparison], below: float = MARGIN) -> pd.DataFrame:
    """Seconds of each arm until its top-1 is at plain training's final one, less `below` points; by seed."""
    rows = []
    for name, run in runs.items():
        for seed in run.seeds:
            target = run.results[PLAIN, seed].final["test/top1"] - below / 100
            row: dict[str, Any] = {"run": name, "seed": seed, "target": f"{target:.1%}"}
            for arm in run.arms:
                spent = run.results[arm, seed].time_to(target)
                row[arm] = f"{spent:.1f} s" if math.isfinite(spent) else "never"
            rows.append(row)
    return pd.DataFrame(rows)


def targets(runs: Mapping[str, Comparison]) -> pd.DataFrame:
    """What this workbook asks of the method on the CPU, and whether it was met: on the mean over seeds."""
    rows = []
    for name, run in runs.items():
        family = "vgg" if "vgg" in name else "resnet"
        checks = {
            f"at least {TARGETS[family]}× faster than plain": (speedup(run, DROPPED), TARGETS[family]),
            "faster than freezing the same layers": (speedup(run, DROPPED, FROZEN), 1.0),
            f"at most {MARGIN} points of top-1 lost": (points(run, DROPPED), -MARGIN),
        }
        for what, (estimate, bound) in checks.items():
            met = "yes" if estimate.mean >= bound else "no"
            rows.append({"run": name, "target": what, "measured": str(estimate), "met": met})
    return pd.DataFrame(rows)


def score_map(result: FitResult, score: str) -> pd.DataFrame:
    """A score of every layer and epoch: `change` (as log₁₀) or `trend`; empty where a layer did not learn."""
    return result.strategies[0].layer_maps(result.history)[score].table


def edges(result: FitResult) -> list[int]:
    """How many layers, from the input on, were dropped or frozen in each epoch."""
    return [int(row[f"{NAME}/dropped_layers"] + row[f"{NAME}/frozen_layers"]) for row in result.history]


def decisions(runs: Mapping[str, Comparison]) -> pd.DataFrame:
    """Every change of the prefix: when, up to which layer, what it took."""
    rows = []
    for name, run in runs.items():
        for seed in run.seeds:
            result, before = run.results[DROPPED, seed], 0
            layers = _layers(result)
            for row, edge in zip(result.history, edges(result), strict=True):
                if edge != before:
                    rows.append({
                        "run": name, "seed": seed, "epoch": row["epoch"],
                        "what": "dropped" if row[f"{NAME}/dropped_layers"] else "frozen",
                        "layers": f"{edge} of {len(layers)}",
                        "up to": layers[edge - 1],
                        "features": f"{row[f'{NAME}/feature_bytes'] / 1e6:.1f} MB",
                        "made in": f"{row[f'{NAME}/feature_seconds']:.2f} s",
                    })
                    before = edge
    return pd.DataFrame(rows)


def _layers(result: FitResult) -> list[str]:
    """The network's layers as the run's strategy counts them."""
    (strategy,) = result.strategies
    assert isinstance(strategy, LearnAndDrop)
    return strategy.layers


def network_of(name: str, data: Dataset) -> Callable[[], nn.Module]:
    """A function that builds a network of `name` or `name-depth` (`resnet-cifar-56`) for the data."""
    base, _, depth = name.rpartition("-")
    if depth.isdigit():
        return explore.build_network(base, data, {"depth": int(depth)})
    return explore.build_network(name, data)


def load(options: Mapping[str, Any]) -> Dataset:
    """The data of a run: `load_dataset` with shifts, and mirror images where digits are not what is shown.

    Args:
        options: `dataset`, `padding` (pixels of the shifts, 2 by default) and what `load_dataset` takes; the run's own
            `epochs` and `lr` are left out.
    """
    options = {key: value for key, value in options.items() if key not in ("epochs", "lr")}
    name, padding = options.pop("dataset"), options.pop("padding", 2)
    how: Augment = "crop" if "digits" in name or "mnist" in name else "crop-flip"
    return load_dataset(name, **options).augmented(how, padding)
