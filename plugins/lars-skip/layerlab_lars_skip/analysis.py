"""What the notebook shows: the paper's accountings, savings, times to an accuracy, skip maps, the threshold sweep."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from layerlab import Comparison, Dataset, Estimate, FitResult, Strategy, measure, prefixes
from layerlab_lars_skip.method.convolutions import find_convolutions, step_flops
from layerlab_lars_skip.method.planned import PlannedFreezing, linear
from layerlab_lars_skip.strategy import LarsSkip

CONVENTIONAL, PROPOSED, LINEAR = "conventional", "proposed", "linear freezing"
FLOPS = ("cost/forward_flops", "cost/backward_flops")
SECONDS = ("time/epoch_seconds",)


def shares(costs: Mapping[int, pd.DataFrame]) -> pd.DataFrame:
    """conv1's and conv2's part of VGG-F under every accounting that Figs. 2 and 3 may mean.

    Args:
        costs: batch size → `layerlab.measure.layer_costs`.

    Returns:
        Indexed by accounting: `share of conv1 and conv2`, in per cent.
    """
    one = next(iter(costs.values()))
    conv = one[one["kind"] == "conv"]
    first = conv.iloc[0]

    def share(frame: pd.DataFrame, column: str) -> float:
        return 100 * frame[column].iloc[:2].sum() / frame[column].sum()

    training = 3 * conv["forward_macs"].sum() - first["dx_macs"]
    rows = {
        "MACs of the convolutions (Fig. 2)": share(conv, "forward_macs"),
        "MACs of training them, without conv1's dX": 100 * (
            3 * conv["forward_macs"].iloc[:2].sum() - first["dx_macs"]) / training,
        "MACs, fully connected layers included": share(one, "forward_macs"),
        "operand traffic of the convolutions: each MAC reads its operands (Fig. 3)": share(conv, "forward_operands"),
    }
    for batch, frame in costs.items():
        part = frame[frame["kind"] == "conv"]
        rows[f"traffic of the convolutions, each tensor moved once, batch {batch}"] = share(part, "forward_tensors")
    return pd.DataFrame({"share of conv1 and conv2": rows})


def skipping_macs(costs: pd.DataFrame, skipped: int, autograd: bool) -> float:
    """MACs of training the convolutions when the first `skipped` get no backward, as a share of full training's.

    Args:
        costs: from `layer_costs`.
        skipped: 0 to the number of convolutions.
        autograd: whether the input gradient of the first layer that learns is saved too, as backward in PyTorch does,
            rather than counted, as the paper's arithmetic does (conv1's own dX is counted there).
    """
    macs = costs.loc[costs["kind"] == "conv", "forward_macs"].to_numpy()
    saved = 2 * macs[:skipped].sum()
    if autograd and 0 < skipped < len(macs):
        saved += macs[skipped]
    return 1 - saved / (3 * macs.sum())


def measure_prefixes(
    build: Callable[[], nn.Module], data: Dataset, batch_size: int, rounds: int, channels_last: bool = True
) -> pd.DataFrame:
    """Cost of a training step for each prefix of skipped convolutions, measured by turns.

    Returns:
        One row a prefix, 0 convolutions first: `skipped`, `up to`, `forward_flops`, `backward_flops`, `flops`
        (relative to the step in which everything learns: the ideal), `seconds`, and `time` with `time low` and
        `time high` (median and quartiles of the ratio to that step, round by round).
    """
    device = data.train.labels.device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, y = next(data.train.batches(batch_size, torch.Generator().manual_seed(0), memory_format=memory_format))
    network = build().to(device, memory_format=memory_format)  # type: ignore[call-overload]  # not in torch's stubs
    layers: list[tuple[str, list[nn.Module]]] = [("none", []), *prefixes(network, x)]
    steps: dict[str, Callable[[], object]] = {}
    rows: list[dict[str, Any]] = []
    for skipped in range(len(layers)):
        model = copy.deepcopy(network)
        frozen = [] if skipped == 0 else prefixes(model, x)[skipped - 1][1]
        for module in frozen:
            module.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=True)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        with measure.Meter() as meter:
            step()
        cost = meter.cost
        assert cost is not None
        steps[str(skipped)] = step
        rows.append({"skipped": skipped, "up to": layers[skipped][0].rpartition(".")[2],
                     "forward_flops": cost.forward_flops, "backward_flops": cost.backward_flops})
    turns = measure.time_by_turns(steps, rounds, device=str(device))
    for row in rows:
        turn = turns[str(row["skipped"])]
        row["flops"] = (row["forward_flops"] + row["backward_flops"]) / (
            rows[0]["forward_flops"] + rows[0]["backward_flops"])
        row["seconds"] = turn.median
        row["time"], row["time low"], row["time high"] = turn.ratio(turns["0"])
    return pd.DataFrame(rows)


def linear_freezing(
    comparison: Comparison, build: Callable[[], nn.Module], data: Dataset, baseline: str = CONVENTIONAL,
    arm: str = PROPOSED,
) -> PlannedFreezing:
    """Composer's linear layer freezing at the FLOPs that an arm took, as a share of the baseline's."""
    network = build().to(data.train.labels.device)
    example = next(data.train.batches(2))[0]  # (2, channels, height, width)
    found = find_convolutions(network, example)
    costs = [step_flops(network, example, prefix) for prefix in ((), *found.prefixes[: found.most])]
    epochs = len(comparison.of(arm)[0].history)
    return PlannedFreezing(plan=linear(costs, epochs, comparison.paired("TFLOP", arm, baseline).mean))


def alpha_arms(alphas: Sequence[float]) -> dict[str, LarsSkip]:
    """The method with each threshold, for `alpha_table`."""
    return {f"α = {alpha:g}": LarsSkip(alpha=alpha) for alpha in sorted(alphas)}


def alpha_table(comparison: Comparison) -> pd.DataFrame:
    """Which threshold to take, from runs on held-out training images.

    Of the thresholds with which some epoch after the first skips and some does not, the one with the best top-1 once as
    many FLOPs are spent as the cheapest run took in all; of equals the smallest. Where there is none, of all.

    Args:
        comparison: the runs of `alpha_arms` on `Dataset.held_out`.

    Returns:
        A row a threshold: `α`, `epochs that skip` (share of those after the first), `top-1` and `top-1 at equal FLOPs`
        (means over seeds, shares), `chosen`.
    """
    budgets = _cheapest(comparison)
    rows = []
    for arm in comparison.arms:
        results = comparison.of(arm)
        later = [row["lars-skip/skipped_layers"] > 0 for result in results for row in result.history[1:]]
        equal = [result.within(budget, FLOPS) for result, budget in zip(results, budgets, strict=True)]
        rows.append({
            "α": float(arm.removeprefix("α = ")),
            "epochs that skip": sum(later) / len(later) if later else math.nan,
            "top-1": comparison.estimate(lambda result: result.final["test/top1"], arm).mean,
            "top-1 at equal FLOPs": Estimate(tuple(equal)).mean,
        })
    table = pd.DataFrame(rows)
    adaptive = table[(table["epochs that skip"] > 0) & (table["epochs that skip"] < 1)]
    candidates = adaptive if len(adaptive) else table
    return table.assign(chosen=table.index == candidates["top-1 at equal FLOPs"].idxmax())


def chosen_arm(table: pd.DataFrame, alpha: float) -> dict[str, LarsSkip]:
    """The method with the threshold that `alpha_table` chose, by its arm's name; empty where that is `alpha` itself."""
    chosen = float(table.loc[table["chosen"], "α"].iloc[0])
    return {} if chosen == alpha else {f"{PROPOSED}, α = {chosen:g}": LarsSkip(alpha=chosen)}


def _cheapest(comparison: Comparison) -> list[float]:
    """FLOPs of the cheapest arm that was asked for, for each seed."""
    arms = comparison.given.arms
    return [min(_spent(comparison.results[arm, seed], FLOPS) for arm in arms) for seed in comparison.seeds]


def joined(first: Comparison, second: Comparison) -> Comparison:
    """The arms of two comparisons with the same seeds."""
    return replace(first, results=first.results | second.results, failures=first.failures | second.failures)


def null_arms(runs: Mapping[str, Comparison], baseline: str, arm: str) -> pd.DataFrame:
    """What a user has without the method, at about the method's FLOPs, and how far the method is above it.

    Returns:
        One row a dataset and arm: FLOPs relative to the baseline's, top-1, and points that `arm` is above it.
    """
    rows = []
    for name, comparison in runs.items():
        for other in comparison.arms:
            rows.append({
                "dataset": name, "arm": other, "FLOPs": str(comparison.paired("TFLOP", other, baseline)),
                "top-1": str(comparison.estimate("top-1", other)),
                f"{arm} is above by": "" if other == arm else str(comparison.paired("top-1", arm, other)),
            })
    return pd.DataFrame(rows)


def at_equal_cost(runs: Mapping[str, Comparison], baseline: str, arm: str) -> pd.DataFrame:
    """Top-1 of both methods once the arm has ended: at the same seconds, and at the same FLOPs, of training.

    Returns:
        One row a dataset and cost, with each method's mean top-1 and half-widths of 95 % intervals.
    """
    rows = []
    for name, comparison in runs.items():
        for what, costs in (("seconds", SECONDS), ("FLOPs", FLOPS)):
            row: dict[str, Any] = {"dataset": name, "at the same": what}
            budgets = [_spent(result, costs) for result in comparison.of(arm)]
            for method in (baseline, arm):
                # A hair more than the sum, so that rounding does not cut the last epoch.
                values = [result.within(budget * (1 + 1e-9), costs)
                          for result, budget in zip(comparison.of(method), budgets, strict=True)]
                row[method], row[f"{method} ±"] = Estimate(tuple(values)).interval
            rows.append(row)
    return pd.DataFrame(rows)


def _spent(result: FitResult, metrics: Sequence[str]) -> float:
    """The sum of `metrics` over a run."""
    return math.fsum(map(result.total, metrics))


def paper_saving(comparison: Comparison, costs: pd.DataFrame, arm: str) -> Estimate:
    """The MAC saving over the run in the paper's arithmetic (see `skipping_macs`), from the epochs' skips, in %."""
    saved = []
    for result in comparison.of(arm):
        skips = [int(row["lars-skip/skipped_layers"]) for row in result.history]
        left = sum(skipping_macs(costs, count, autograd=False) for count in skips)
        saved.append(100 * (1 - left / len(skips)))
    return Estimate(tuple(saved), "%")


def observed(comparison: Comparison, baseline: str, arm: str) -> dict[str, float]:
    """What the claims' gates read: the baseline's top-1, and in how many of the epochs something was skipped, in %."""
    epochs = [row for result in comparison.of(arm) for row in result.history]
    skipped = sum(row["lars-skip/skipped_layers"] > 0 for row in epochs)
    return comparison.observed(baseline) | {"skipped share": 100 * skipped / len(epochs)}


def skip_map(result: FitResult) -> pd.DataFrame:
    """Which layer was skipped (1) or learned (0) in which epoch: layers in forward order × epochs."""
    table = result.strategies[0].layer_maps(result.history)["skipped"].table
    return table.rename(index=lambda layer: layer.removeprefix("features."))


def sweep_arms(alphas: Sequence[float]) -> dict[str, Strategy | tuple[()]]:
    """Arms of the threshold sweep: full learning, each α, the rule without a threshold, the other readings of nw."""
    lowest = min(alphas)
    arms: dict[str, Strategy | tuple[()]] = {"full learning": ()}
    arms |= {f"α = {alpha:g}": LarsSkip(alpha=alpha) for alpha in alphas}
    arms["own history"] = LarsSkip(rule="own-history")
    arms[f"α = {lowest:g}, keep nw"] = LarsSkip(alpha=lowest, memory="keep")
    arms[f"α = {lowest:g}, forget after 2"] = LarsSkip(alpha=lowest, memory="keep", forget_after=2)
    return arms


def sweep_table(comparison: Comparison, title: str) -> pd.DataFrame:
    """The sweep on one dataset and network: final top-1, FLOPs relative to full learning, and top-1 at
    equal FLOPs (those that the cheapest arm spends in all), means over seeds with half-widths of 95 % intervals."""
    baseline = comparison.arms[0]
    rows = []
    for arm in comparison.arms:
        row: dict[str, Any] = {"where": title, "arm": arm}
        parts: dict[str, list[float]] = {"top-1": [], "FLOPs": [], "top-1 at equal FLOPs": []}
        for seed, budget in zip(comparison.seeds, _cheapest(comparison), strict=True):
            result, full = comparison.results[arm, seed], comparison.results[baseline, seed]
            parts["top-1"].append(result.final["test/top1"])
            parts["FLOPs"].append(_spent(result, FLOPS) / _spent(full, FLOPS))
            parts["top-1 at equal FLOPs"].append(result.within(budget, FLOPS))
        for name, values in parts.items():
            row[name], row[f"{name} ±"] = Estimate(tuple(values)).interval
        rows.append(row)
    return pd.DataFrame(rows)


def rule_against_sweep(table: pd.DataFrame, rule: str = "own history") -> pd.DataFrame:
    """For each place of a sweep: the best hand-set α by top-1 at equal FLOPs, beside the rule, its placebo and full
    learning; a rule that skipped nothing has no placebo."""
    score = "top-1 at equal FLOPs"
    rows = []
    for where, part in table.groupby("where", sort=False):
        fixed = part[part["arm"].str.fullmatch(r"α = [\d.]+")]
        best = fixed.loc[fixed[score].idxmax()]
        scores = part.set_index("arm")[score]
        rows.append({"where": where, "best α": best["arm"].removeprefix("α = "), "with it": best[score],
                     rule: scores[rule], "its placebo": scores.get(f"{rule} · placebo", math.nan),
                     "full learning": scores["full learning"]})
    return pd.DataFrame(rows)


def table_1(published: pd.DataFrame, runs: Mapping[str, Comparison]) -> pd.DataFrame:
    """Table I, published beside measured: final top-1, top-5 and seconds, mean ± half-width of the 95 % interval."""
    rows = [{"dataset": "imagenet (paper)", "method": method, **{column: f"{value:g}" for column, value in row.items()}}
            for method, row in published.iterrows()]
    for name, comparison in runs.items():
        for arm in comparison.arms:
            rows.append({
                "dataset": name, "method": arm,
                "top-1": str(comparison.estimate(lambda result: result.final["test/top1"], arm)),
                "top-5": str(comparison.estimate(lambda result: result.final["test/top5"], arm)),
                "time [s]": str(comparison.estimate("seconds", arm)),
                "seeds": str(len(comparison.seeds)),
            })
    return pd.DataFrame(rows).fillna("").set_index(["dataset", "method"])


def table_2(published: pd.DataFrame, runs: Mapping[str, Comparison], baseline: str, arm: str) -> pd.DataFrame:
    """Table II, published beside measured; a seed that never reached the baseline's best is counted, not averaged."""
    table = published.rename(columns={"speed-up": "imagenet (paper)"}).map(lambda value: f"{value:g}×")
    for name, comparison in runs.items():
        cells = []
        for metric in ("test/top1", "test/top5"):
            ratios = comparison.speedup(arm, baseline, metric)
            reached, count = ratios.reached, len(ratios.values)
            text = str(reached) if reached.values else "never"
            cells.append(text if len(reached.values) == count else f"{text} ({len(reached.values)} of {count} seeds)")
        table[name] = cells
    return table


def savings(runs: Mapping[str, Comparison], costs: pd.DataFrame, baseline: str, arm: str) -> pd.DataFrame:
    """Figs. 6 and 7 and their seconds: what both methods spent over the run, and the share that the arm saved.

    Returns:
        One row a dataset and quantity: the means of both methods in `unit`, `saved` and its half-width `±`.
    """
    quantities = {"FLOPs, measured": ("TFLOP", "TFLOP"), "bytes moved, measured": ("GB moved", "GB"),
                  "seconds, measured": ("seconds", "s")}
    rows = []
    for name, comparison in runs.items():
        saved = paper_saving(comparison, costs, arm)
        rows.append({"dataset": name, "what": "MACs, paper's arithmetic", **_shares(saved)})
        for what, (metric, unit) in quantities.items():
            spent = {method: comparison.estimate(metric, method).mean for method in (baseline, arm)}
            saved = comparison.saving(metric, arm, baseline)
            rows.append({"dataset": name, "what": what, **spent, "unit": unit, **_shares(saved)})
    return pd.DataFrame(rows, columns=["dataset", "what", baseline, arm, "unit", "saved", "±"])


def _shares(percent: Estimate) -> dict[str, float]:
    return {"saved": percent.mean / 100, "±": percent.half / 100}
