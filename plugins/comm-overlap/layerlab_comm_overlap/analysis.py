"""What the notebook shows: the job that its workers do, tables of times against their bounds, equality of weights."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from layerlab import Comparison, Dataset, Estimate, FitResult, build_model, fit, load_dataset
from layerlab_comm_overlap.method import measuring
from layerlab_comm_overlap.method.launcher import launch
from layerlab_comm_overlap.method.measuring import COMPUTE, CUT, OFF, VARIANTS, WHOLE
from layerlab_comm_overlap.method.model import Measured
from layerlab_comm_overlap.method.networks import LimitedLink, limited_link
from layerlab_comm_overlap.method.stock import STOCK
from layerlab_comm_overlap.strategy import CommOverlap

ALL = "all together"


def measured(
    workers: Sequence[int], network: Mapping[str, Any], batch: int, megabits: float, latency_ms: float, steps: int,
    rounds: int, settings: Mapping[str, Any], shown: Sequence[str] = ("no overlap", ALL),
) -> tuple[dict[int, Measured], dict[str, pd.DataFrame], LimitedLink]:
    """Start workers behind a slow link and measure; see `measuring.measure`.

    Every worker computes with one thread. Workers beyond the machine's processors share them: computing takes longer
    by the same factor in all variants and in the bound.

    Args:
        workers: numbers of workers, one job each.
        network, batch, steps, rounds: of `measuring.measure`.
        megabits, latency_ms: of `limited_link`.
        settings: of `CommOverlap`.
        shown: variants whose timeline the first job records.

    Returns:
        What was measured by number of workers; timelines of the first worker by variant; the link.
    """
    # Workers inherit it: the profiler otherwise reports each of its starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    found: dict[int, Measured] = {}
    timelines: dict[str, pd.DataFrame] = {}
    for count in workers:
        with limited_link(count, megabits, latency_ms) as link:
            every = {**settings, **link.delays}
            answers = launch(_job, count, network, batch, steps, rounds, every, () if timelines else tuple(shown),
                             threads=1, networks=link.networks)
        results, spans = answers[0]
        timelines = timelines or spans
        found[count] = Measured(count, results, settings)
    return found, timelines, link


def _job(
    network: Mapping[str, Any], batch: int, steps: int, rounds: int, settings: Mapping[str, Any], shown: Sequence[str]
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """In each worker."""
    results = measuring.measure(network, batch, steps, rounds, settings)
    return results, measuring.timeline(network, batch, settings, shown) if shown else {}


def by_link(
    megabits: Sequence[float], workers: Sequence[int], network: Mapping[str, Any], batch: int, latency_ms: float,
    steps: int, rounds: int, settings: Mapping[str, Any],
) -> tuple[pd.DataFrame, list[str]]:
    """Where on the bandwidth curve overlap beats DDP as it comes.

    Args:
        megabits: a second, of each link; 0: the link as it is, without the latency.
        workers, network, batch, latency_ms, steps, rounds, settings: of `measured`.

    Returns:
        `against_bounds` of every link, with `Mbit/s`, `over DDP` with `low over DDP` and `high over DDP` (mean of the
        rounds' ratios, 95 % interval) and `chosen` (what `measuring.CHOSEN` went on with); and a sentence a link that
        says how it was limited.
    """
    tables, how = [], []
    for each in megabits:
        latency = latency_ms if each else 0.0
        found, _, link = measured(workers, network, batch, each, latency, steps, rounds, settings, ())
        table = against_bounds(found)
        over = [gains(found[row.workers], row.variant, best_stock(found[row.workers])) for row in table.itertuples()]
        table["over DDP"] = [each.mean for each in over]
        table["low over DDP"], table["high over DDP"] = [each.low for each in over], [each.high for each in over]
        table["chosen"] = [found[count].results["chosen"] for count in table["workers"]]
        tables.append(table.assign(**{"Mbit/s": each}))
        how.append(f"{each:g} Mbit/s: {link.how}" if each else link.how)
    return pd.concat(tables, ignore_index=True), how


def against_bounds(found: Mapping[int, Measured]) -> pd.DataFrame:
    """Seconds a step against max(compute, communicate) and compute + communicate.

    Returns:
        One row a number of workers and variant: `workers`, `variant`, `seconds` (median over rounds), `low` and `high`
        (quartiles), `max` and `sum` (the two bounds), `gain` (seconds without overlap over seconds, median of rounds),
        `over DDP` (seconds of the fastest of `STOCK` over seconds, median of rounds), `share` (of the way from the sum
        to the max, in per cent). `STOCK` are the null arms.
    """
    rows = []
    for workers, each in found.items():
        seconds = each.results["seconds"]
        compute, communicate = each.seconds[COMPUTE], each.seconds[WHOLE]
        upper, lower = compute + communicate, max(compute, communicate)
        for name, values in seconds.items():
            if name in (COMPUTE, WHOLE, CUT):
                continue
            quartiles = (
                statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3)
            rows.append({
                "workers": workers, "variant": name, "seconds": statistics.median(values), "low": quartiles[0],
                "high": quartiles[2], "max": lower, "sum": upper, "gain": statistics.median(gains(each, name).values),
                "over DDP": statistics.median(gains(each, name, best_stock(each)).values),
                "share": 100 * (upper - statistics.median(values)) / (upper - lower),
            })
    return pd.DataFrame(rows)


def parts(found: Mapping[int, Measured]) -> pd.DataFrame:
    """What the bounds are made of.

    Returns:
        One row a number of workers: seconds `compute alone` (all workers at the same time), `communicate alone` whole
        and in segments, and the link's `latency [ms]` and `bandwidth [Mbit/s]` as measured by all-reduces.
    """
    return pd.DataFrame([
        {"workers": workers, **{name: each.seconds[name] for name in (COMPUTE, WHOLE, CUT)},
         "latency [ms]": 1e3 * each.link.latency, "bandwidth [Mbit/s]": 8e-6 * each.link.bandwidth}
        for workers, each in found.items()
    ])


def tried(found: Mapping[int, Measured]) -> pd.DataFrame:
    """What `CommOverlap` as it comes timed in its first steps, and what it went on with.

    Returns:
        One row a number of workers and way: `workers`, `way`, `seconds` a step, `chosen`.
    """
    return pd.DataFrame([
        {"workers": workers, "way": way, "seconds": seconds, "chosen": way == each.results["chosen"]}
        for workers, each in found.items() for way, seconds in each.results["tried"].items()])


def gate_numbers(each: Measured, weights: pd.DataFrame) -> dict[str, float]:
    """What a gate reads of the measurement.

    Args:
        each: of one number of workers.
        weights: `same_weights`.

    Returns:
        `possible gain`: compute + communicate over the longer of the two, the most times as fast as without overlap
        that any overlap makes; `weights differ by`: the largest difference of `weights` with so many workers.
    """
    compute, communicate = each.seconds[COMPUTE], each.seconds[WHOLE]
    return {"possible gain": (compute + communicate) / max(compute, communicate),
            "weights differ by": float(weights.loc[weights["workers"] == each.workers, "difference"].max())}


def gains(each: Measured, variant: str = ALL, base: str = "no overlap") -> Estimate:
    """How many times as fast as `base` a variant is, one value for each round."""
    seconds = each.results["seconds"]
    return Estimate(tuple(slow / fast for slow, fast in zip(seconds[base], seconds[variant], strict=True)), "×")


def best_stock(each: Measured) -> str:
    """The bucket size with which DistributedDataParallel as it comes is fastest, a name of `STOCK`."""
    return min(STOCK, key=lambda name: each.seconds[name])


def announced(curves: pd.DataFrame, published: pd.DataFrame, variant: str = ALL) -> pd.DataFrame:
    """The published speeds and gains beside the model's; nothing of it is measured at these numbers of workers.

    Args:
        curves: `model.scaling`.
        published: indexed by the number of GPUs, with `speed` and `more than without [%]`.
        variant: the one with overlap.

    Returns:
        One row a number of GPUs and quantity: `GPUs`, `quantity` (`speed`, one = 1; `gain [%]`), `published`, `model`
        with `low` and `high` as far as the model may be off; and at last `trend`, the points by which the gain grows
        from the first number to the last. Ring all-reduce.
    """
    ring = curves[(curves["variant"] == variant) & (curves["algorithm"] == "ring")].set_index("workers")
    rows = []
    for count, row in published.iterrows():
        at = ring.loc[count]
        rows.append({"GPUs": count, "quantity": "speed", "published": row["speed"], "model": at["speed"],
                     "low": at["speed low"], "high": at["speed high"]})
        rows.append({"GPUs": count, "quantity": "gain [%]", "published": row["more than without [%]"],
                     **{name: 100 * (at[column] - 1)
                        for name, column in (("model", "gain"), ("low", "gain low"), ("high", "gain high"))}})
    first, last = rows[1], rows[-1]
    trend = {name: last[name] - first[name] for name in ("published", "model", "low", "high")}
    # One factor for both numbers, so that its ends are the trend's, in either order.
    trend["low"], trend["high"] = sorted((trend["low"], trend["high"]))
    rows.append({"GPUs": last["GPUs"], "quantity": "trend [points]", **trend})
    return pd.DataFrame(rows)


def same_weights(
    workers: Sequence[int], dataset: Mapping[str, Any], network: Mapping[str, Any], variants: Sequence[str],
    settings: Mapping[str, Any],
) -> pd.DataFrame:
    """Train in one process at batch B, and on N workers at batch B/N each, and compare.

    In float64: a few hundred steps of training amplify float32's rounding until two runs that differ in nothing but the
    order of a sum are as far apart as two seeds, and an error of the method could not be told from that.

    Args:
        workers: numbers of workers.
        dataset: arguments of `load_dataset`.
        network: `name` and other arguments of `build_model`.
        variants: names of `VARIANTS`.
        settings: of `fit`.

    Returns:
        One row a number of workers and variant: `workers`, `variant`, `difference` (the largest of a weight, relative
        to the largest weight of its tensor), `top-1` and `train loss` at the end.
    """
    data = load_dataset(**dataset).augmented("crop", 1)
    options = dict(network)
    torch.manual_seed(0)
    model = _Double(build_model(options.pop("name"), **options))
    alone = fit(model, data, progress=False, **settings)
    rows = [{"workers": 1, "variant": "one process", "difference": 0.0, **_end(alone)}]
    for count in workers:
        for name, result in launch(_train, count, model, data, variants, settings)[0].items():
            pairs = zip(alone.model.parameters(), result.model.parameters(), strict=True)
            difference = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
            rows.append({"workers": count, "variant": name, "difference": difference, **_end(result)})
    return pd.DataFrame(rows)


def equal_seconds(
    each: Measured, dataset: Mapping[str, Any], network: Mapping[str, Any], settings: Mapping[str, Any],
    seeds: Sequence[int], variant: str = ALL,
) -> Comparison:
    """A whole training beside one that ends when the time of `variant` is up for the fastest DDP as it comes.

    Both run in one process, since every variant leaves the same weights (`same_weights`).

    Args:
        each: the measured seconds a step.
        dataset, network, settings: as `same_weights`.
        seeds: each with its own initial weights.

    Returns:
        A comparison for `explore.payoff`, of `variant` and what costs as many seconds.
    """
    data = load_dataset(**dataset).augmented("crop", 1)
    options = dict(network)
    build = partial(build_model, options.pop("name"), **options)
    whole = fit(build, data, seed=seeds, name=variant, progress=False, **settings)
    faster = gains(each, variant, best_stock(each)).mean
    budget = max(1, math.floor(whole[0].steps / faster))
    length = {"max_steps": budget, "epochs": math.ceil(settings["epochs"] * budget / whole[0].steps)}
    equal = f"{variant} · equal seconds"
    short = fit(build, data, seed=seeds, name=equal, progress=False, **{**settings, **length})
    results = {(result.name, result.seed): result for result in (*whole, *short)}
    return Comparison(results, {}, variant, {variant: equal})


class _Double(nn.Module):
    """A network in float64, images included."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the network's, in float64."""
        return self.network(x.double())


def _train(model: nn.Module, data: Dataset, variants: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """In each worker."""
    small = {"bucket_mb": 0.1, "segment_mb": 0.02}  # several of each in a small network
    return {name: fit(model, data, CommOverlap(**small, **(OFF | VARIANTS[name])), progress=False, **settings)
            for name in variants}


def _end(result: FitResult) -> dict[str, float]:
    return {"top-1": result.final["test/top1"], "train loss": result.final["train/loss"]}
