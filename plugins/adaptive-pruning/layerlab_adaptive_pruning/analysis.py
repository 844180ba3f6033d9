"""The paper's results table from runs: accuracy, parameters, bytes and speed, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from layerlab import Comparison, Dataset, Estimate, FitResult, build_model, evaluate
from layerlab_adaptive_pruning.method.folding import fold
from layerlab_adaptive_pruning.method.outcome import BRIDGES
from layerlab_adaptive_pruning.method.peers import NetworkSlimming, TorchPruning
from layerlab_adaptive_pruning.method.pruning import Pruning, blocks_removed, count, latencies
from layerlab_adaptive_pruning.method.structure import rebuild
from layerlab_adaptive_pruning.method.surgery import Bridge
from layerlab_adaptive_pruning.strategy import AdaptivePruning

BASELINE, OURS, PEER = "conventional", "adaptive pruning", "network slimming"
PAPER = {0.845: "40 %", 0.646: "60 %", 0.558: "most"}
"""What the paper calls its rows, by the share of the parameters that they have left: 1.44, 1.10 and 0.95 of 1.70 M."""


def residual_network(classes: int, channels: int, depth: int, initial_scale: float) -> nn.Module:
    """The pre-activation ResNet with every γ at `initial_scale`, as network slimming's authors start it, at 0.5."""
    network = build_model("preact-resnet", num_classes=classes, channels=channels, depth=depth)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.constant_(module.weight, initial_scale)
    return network


def stage_labels(shares: Sequence[float]) -> list[str]:
    """What the stages are called: `dense`, then by the share of the parameters that is left."""
    return ["dense", *(_left(share) for share in shares)]


def _left(share: float) -> str:
    return f"{100 * share:.3g}% left"


NAMES = {_left(share): name for share, name in PAPER.items()}
"""The paper's name of a row by `stage_labels`'."""
MOST = _left(min(PAPER))


def arms(shares: Sequence[float], stage_epochs: int, sparsity: float, bridge: Bridge,
         library: Sequence[str] = ()) -> dict[str, Any]:
    """The ways of training that are compared: the plain one, the paper's, its peer's and today's library's.

    Args:
        shares: of the parameters that are left after each pruning, the same for all methods.
        stage_epochs: from one pruning to the next.
        sparsity: λ, the same for all but `GroupNorm`, which train alike until the first pruning: with a λ each,
            the one that happened to find the better one would be ahead.
        bridge: as the strategy's setting.
        library: torch-pruning's pruners, `BNScale` and `GroupNorm`.
    """
    shared: dict[str, Any] = {"targets": [{"parameters": share} for share in shares], "every": stage_epochs}
    # GroupNorm's penalty is a weight decay by groups, to which λ says nothing: the library's own default.
    strength = {"BNScale": sparsity, "GroupNorm": 1e-4}
    return {BASELINE: (), OURS: AdaptivePruning(bridge=bridge, sparsity=sparsity, **shared),
            PEER: NetworkSlimming(sparsity=sparsity, **shared),
            **{f"torch-pruning's {pruner}": TorchPruning(pruner=pruner, sparsity=strength[pruner], **shared)
               for pruner in library}}


def penalty(dose: float, stage_epochs: int, lr: float, steps: int, momentum: float = 0.9) -> float:
    """λ of a penalty dose: how far the penalty alone moves a scale in a stage, λ · Σ rates · steps / (1 − momentum).

    The dose is what carries over between schedules. Network slimming's own recipe (λ = 1e-5, 160 epochs) has 0.66,
    which is more than the 0.5 at which its scales start.

    Args:
        dose: in units of γ.
        stage_epochs: with the rates of `Restarts`.
        lr: at the start of a stage.
        steps: an epoch.
        momentum: of SGD.

    Example:
        >>> round(penalty(0.6592, 160, 0.1, 781), 8)
        1e-05
    """
    rates = lr * sum(map(rate_factor(stage_epochs), range(stage_epochs)))
    return dose * (1 - momentum) / (rates * steps)


def candidates(doses: Mapping[float, float], share: float, stage_epochs: int, bridge: Bridge) -> dict[str, Any]:
    """Both methods with each λ, pruned once to a share of the parameters: what `dose_choice` chooses from.

    Args:
        doses: penalty dose → λ.
    """
    return {f"{arm}, dose {dose:g}": strategy for dose, sparsity in doses.items()
            for arm, strategy in arms([share], stage_epochs, sparsity, bridge).items()
            if arm != BASELINE}


def dose_choice(comparison: Comparison) -> tuple[pd.DataFrame, float]:
    """Which penalty dose to take: the one with which both methods together are best after the pruning.

    Args:
        comparison: the runs of `candidates` on `Dataset.held_out`.

    Returns:
        A row a method and dose: `method`, `dose`, `λ`, `top-1 dense [%]` before the pruning and `top-1 pruned [%]` at
        the end, `small scales [%]` (|γ| below 0.01 at the pruning; all means over seeds), `chosen`; and the dose, the
        smallest of equals.
    """
    rows = []
    for name in comparison.arms:
        method, _, dose = name.partition(", dose ")
        runs = comparison.of(name)
        end = pruning_of(runs[0]).stages[1]["epoch"]
        rows.append({
            "method": method, "dose": float(dose), "λ": pruning_of(runs[0]).sparsity,
            "top-1 dense [%]": Estimate(tuple(100 * run.history[end - 1]["test/top1"] for run in runs)).mean,
            "top-1 pruned [%]": comparison.estimate("top-1", name).mean,
            "small scales [%]": comparison.estimate(lambda run: 100 * pruning_of(run).stages[1]["small"], name).mean,
        })
    table = pd.DataFrame(rows).sort_values(["method", "dose"], ignore_index=True)
    best = float(table.groupby("dose")["top-1 pruned [%]"].mean().idxmax())
    table["chosen"] = table["dose"] == best
    return table, best


def pruning_of(result: FitResult) -> Pruning:
    """The strategy that pruned a fit's network, as it left it."""
    (strategy,) = result.strategies
    assert isinstance(strategy, Pruning)
    return strategy


def gate_numbers(comparison: Comparison, stages: Sequence[int], data: Dataset) -> dict[int, dict[str, float]]:
    """What gates read of adaptive pruning's runs, means over seeds.

    Args:
        comparison: the runs of `arms`.
        stages: of which prunings, counted from 1.
        data: that they were trained on.

    Returns:
        Of each pruning: `small scales`: |γ| below 0.01 just before it, in per cent; `removed blocks`: how many have
        lost all their batch norms after it, and `removed blocks in the end`, after the last one; `baseline train
        top-1`: of the conventional network in the end, in per cent.
    """

    def mean(value: Callable[[FitResult], float], arm: str = OURS) -> float:
        return round(comparison.estimate(value, arm).mean, 2)

    def blocks(of: int) -> float:
        return mean(lambda run: blocks_removed(pruning_of(run).stages[of]["channels"]))

    in_the_end = {
        "removed blocks in the end": blocks(-1),
        "baseline train top-1": mean(
            lambda run: 100 * evaluate(run.model.to(data.train.labels.device), data.train)["test/top1"], BASELINE)}
    # `mean` calls the function at once, while `stage` is what it was.
    return {stage: {"small scales": mean(lambda run: 100 * pruning_of(run).stages[stage]["small"]),  # noqa: B023
                    "removed blocks": blocks(stage), **in_the_end} for stage in stages}


def rate_factor(stage_epochs: float) -> Callable[[int], float]:
    """Epoch, counted from 0 → what `Restarts` multiplies the rate by."""
    first, second = stage_epochs / 2, 3 * stage_epochs / 4

    def factor(epoch: int) -> float:
        within = epoch % stage_epochs
        return float(0.1 ** ((within >= first) + (within >= second)))

    return factor


@dataclass(frozen=True)
class Restarts:
    """The rate of every stage: divided by ten after a half and after three quarters of it, then from the top again.

    Attributes:
        stage: its length, in epochs or whatever else the schedule steps with.
    """

    stage: float

    def __call__(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(self.stage))

    def stretched(self, factor: float) -> Restarts:
        """The same over so many times as many steps of the schedule: for plain training of equal cost."""
        return Restarts(self.stage * factor)


def stages(comparison: Comparison, network: Callable[[], nn.Module]) -> pd.DataFrame:
    """What each arm and seed had at the end of each of its stages.

    Args:
        comparison: the runs of `arms`.
        network: builds the network before any pruning.

    Returns:
        A row an arm, seed and stage: `arm`, `seed`, `stage` (0 before the first pruning), `epoch` at its end,
        `top-1` (a share), `parameters`, `megabytes` of parameters and buffers, `channels` (share of the batch norms'
        channels that is left), `convolutions`, and `structure`. The conventional network is the same in every stage
        but for its weights.
    """
    rows = []
    dense = network()
    whole = {"parameters": count(dense), "channels": 1.0, "structure": None}
    for (arm, seed), result in comparison.results.items():
        pruned = pruning_of(comparison.results[OURS, seed]).stages
        ends = [stage["epoch"] for stage in pruned[1:]] + [len(result.history)]
        for stage, end in enumerate(ends):
            row = {"arm": arm, "seed": seed, "stage": stage, "epoch": end,
                   "top-1": result.history[end - 1]["test/top1"], **whole}
            if arm != BASELINE:
                noted = pruning_of(result).stages
                left = sum(noted[stage]["channels"].values()) / sum(noted[0]["channels"].values())
                row |= {"parameters": noted[stage]["parameters"], "channels": left,
                        "structure": noted[stage]["structure"]}
            built = _built(network, row["structure"])
            row["megabytes"] = sum(t.numel() * t.element_size() for t in built.state_dict().values()) / 1e6
            row["convolutions"] = sum(isinstance(module, nn.Conv2d) for module in built.modules())
            rows.append(row)
    return pd.DataFrame(rows)


def _built(network: Callable[[], nn.Module], described: Mapping[str, Any] | None) -> nn.Module:
    return network().eval() if described is None else rebuild(network(), described).eval()


def speeds(table: pd.DataFrame, network: Callable[[], nn.Module], example: Tensor, batches: Sequence[int],
           rounds: int) -> pd.DataFrame:
    """`stages` with what a forward pass of each network takes: arithmetic, and measured seconds.

    All networks take turns once they are trained, so that what slows the machine slows all of them; each as `fold`
    makes it for inference.

    Args:
        example: images, of which as many as needed are taken again and again.
        batches: images a batch.
        rounds: of timing.

    Returns:
        The table with `MACs`, multiply-accumulates an image, and `batch N [ms]` and `batch N ×` (how many times faster
        than the unpruned network) for each batch N; both for the whole batch.
    """
    table = table.copy()
    networks: dict[str, nn.Module] = {"dense": network().to(example.device).eval()}
    for index, row in table.iterrows():
        if row["structure"] is not None and row["stage"]:
            networks[str(index)] = _built(network, row["structure"]).to(example.device)
        table.loc[index, "MACs"] = multiply_accumulates(networks.get(str(index), networks["dense"]), example[:1])
    networks = {name: fold(each) for name, each in networks.items()}
    for size in batches:
        images = example.repeat(-(-size // len(example)), 1, 1, 1)[:size].contiguous()
        turns = latencies(networks, images, rounds)
        for index in table.index:
            mine = turns.get(str(index), turns["dense"])
            table.loc[index, f"batch {size} [ms]"] = 1e3 * mine.median
            table.loc[index, f"batch {size} ×"] = turns["dense"].ratio(mine)[0]
    return table


def multiply_accumulates(network: nn.Module, images: Tensor) -> float:
    """Of one forward pass on these images."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(images)
    return counter.get_total_flops() / 2


def results_table(published: pd.DataFrame, table: pd.DataFrame, labels: Sequence[str],
                  batches: Sequence[int]) -> pd.DataFrame:
    """The paper's table, published beside measured, a row a method and stage; means over seeds, ± 95 % half-width.

    Args:
        published: the paper's rows, by method and the paper's name.
        table: `speeds`.
        labels: `stage_labels`.
    """
    rows = []
    plain = table[table["arm"] == BASELINE].groupby("stage")["top-1"]
    for (arm, stage), part in table.groupby(["arm", "stage"], sort=False):
        if arm == BASELINE and stage:
            continue
        label = labels[stage]
        name = f"{arm}, {NAMES.get(label, label)}"
        known = published.loc[name] if name in published.index else {}
        row = {
            "network": f"{arm}, {label}", "row, paper": NAMES.get(label, "") if len(known) else "",
            "top-1, paper": known.get("top-1", ""), "top-1 [%]": _spread(100 * part["top-1"]),
            "conventional, as many epochs [%]": _spread(100 * plain.get_group(stage)),
            "parameters, paper": known.get("parameters", ""), "parameters": f"{part['parameters'].mean():,.0f}",
            "channels left": f"{part['channels'].mean():.0%}", "convolutions": _spread(part["convolutions"]),
            "MACs [M]": _spread(part["MACs"] / 1e6),
            "size, paper": known.get("size", ""), "size [MB]": f"{part['megabytes'].mean():.2f}",
            "speed, paper": known.get("speed", ""),
        }
        rows.append(row | {f"speed, batch {size} [×]": _spread(part[f"batch {size} ×"]) for size in batches})
    return pd.DataFrame(rows).set_index("network")


def gains(table: pd.DataFrame, arm: str, other: str, stage: int) -> Estimate:
    """Points of top-1 that an arm has more than another after the same epochs."""
    mine, theirs = (column(table, each, stage, "top-1") for each in (arm, other))
    return Estimate(tuple(100 * (a - b) for a, b in zip(mine.values, theirs.values, strict=True)), "points")


def column(table: pd.DataFrame, arm: str, stage: int, name: str) -> Estimate:
    """A column of `speeds` for an arm's stage."""
    rows = table[(table["arm"] == arm) & (table["stage"] == stage)].sort_values("seed")
    return Estimate(tuple(rows[name].tolist()))


def claim_values(table: pd.DataFrame, labels: Sequence[str], batches: Sequence[int]) -> dict[str, tuple[Estimate, int]]:
    """The paper's claims from its rows, as far as they were run: id in paper.toml → (values, stage).

    Args:
        table: `speeds`.
        labels: `stage_labels`.
        batches: images a batch that were timed.
    """
    stages = {label: stage for stage, label in enumerate(labels)}
    values = {}
    for label, name in NAMES.items():
        if label in stages:
            short, stage = name.removesuffix(" %"), stages[label]
            values[f"gain-{short}"] = gains(table, OURS, BASELINE, stage), stage
            if label != MOST:  # network slimming has no such row in the paper
                values[f"peer-{short}"] = gains(table, OURS, PEER, stage), stage
    if MOST in stages:
        dense, stage = table["megabytes"].max(), stages[MOST]
        sizes = column(table, OURS, stage, "megabytes").values
        values["size"] = Estimate(tuple(size / dense for size in sizes), "×"), stage
        for size in batches:
            if size in (1, 128):
                values[f"speed-{size}"] = column(table, OURS, stage, f"batch {size} ×"), stage
                values[f"peer-speed-{size}"] = _times_faster(table, stage, size), stage
    return values


def comparison_line(table: pd.DataFrame, stage: int, label: str, batches: Sequence[int]) -> str:
    """What adaptive pruning has over network slimming after a stage, in one line.

    With the parameters of both: where a whole block goes, the one threshold passes over the counts in between.
    """
    sizes = " against ".join(f"{column(table, arm, stage, 'parameters').mean:,.0f}" for arm in (OURS, PEER))
    faster = ", ".join(f"{_times_faster(table, stage, size)} as fast at batch {size}" for size in batches)
    return f"{label}, {sizes} parameters: {gains(table, OURS, PEER, stage)} against network slimming, {faster}"


def _times_faster(table: pd.DataFrame, stage: int, size: int) -> Estimate:
    ours, theirs = (column(table, arm, stage, f"batch {size} ×") for arm in (OURS, PEER))
    return Estimate(tuple(mine / other for mine, other in zip(ours.values, theirs.values, strict=True)), "×")


def inflections(table: pd.DataFrame, whole: int) -> pd.DataFrame:
    """Where each method's accuracy turns down for good (Section 5.4): at its best stage.

    Args:
        table: `stages`.
        whole: parameters of the unpruned network.

    Returns:
        A row a method: `paper` (by its rows), `parameters left [%]` at the best stage and `top-1 [%]` there.
    """
    known = {OURS: "64.6 (60 %)", PEER: "84.5 (40 %)"}
    rows = []
    for arm, part in table[table["arm"] != BASELINE].groupby("arm", sort=False):
        best = part.loc[part.groupby("seed")["top-1"].idxmax()]
        rows.append({"method": arm, "paper": known.get(str(arm), ""),
                     "parameters left [%]": _spread(100 * best["parameters"] / whole),
                     "top-1 [%]": _spread(100 * best["top-1"])})
    return pd.DataFrame(rows).set_index("method")


def bridge_table(comparison: Comparison, at_once: Mapping[tuple[str, int], float]) -> pd.DataFrame:
    """What each bridge keeps of the accuracy.

    Args:
        comparison: the bridged networks after one more stage of training, an arm a bridge.
        at_once: (bridge, seed) → top-1 right after bridging, a share.
    """
    rows, papers = [], {str(bridge): where for bridge, where in BRIDGES.items()}
    for bridge in comparison.arms:
        before = Estimate(tuple(100 * at_once[bridge, seed] for seed in comparison.seeds))
        models = [run.model for run in comparison.of(bridge)]
        rows.append({"bridge": bridge, "paper": papers[bridge], "parameters": _spread([count(m) for m in models]),
                     "top-1 at once [%]": str(before), "after one stage [%]": _spread(
                         [100 * run.final["test/top1"] for run in comparison.of(bridge)])})
    return pd.DataFrame(rows).set_index("bridge")


def choices(table: pd.DataFrame, labels: Sequence[str], batches: Sequence[int]) -> pd.DataFrame:
    """What a user chooses from, as `layerlab.figures.families` takes it: means over seeds, a row a pruned network and
    one for the conventional network after all epochs."""
    rows = []
    for (arm, stage), part in table.groupby(["arm", "stage"], sort=False):
        if stage != table["stage"].max() if arm == BASELINE else not stage:
            continue
        mean, half = Estimate(tuple(part["top-1"])).interval
        rows.append({"method": arm, "network": labels[0 if arm == BASELINE else stage],
                     "parameters": part["parameters"].mean(), "MACs": part["MACs"].mean(), "top-1": mean,
                     "top-1 ±": half,
                     **{f"batch {size} [ms]": part[f"batch {size} [ms]"].mean() for size in batches}})
    return pd.DataFrame(rows)


def _spread(values: Iterable[float]) -> str:
    return str(Estimate(tuple(float(value) for value in values)))
