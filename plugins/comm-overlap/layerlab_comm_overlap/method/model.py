"""How long a data-parallel step takes on any number of workers, simulated from measured layers and a measured link."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from layerlab_comm_overlap.method.measuring import COMPUTE, VARIANTS
from layerlab_comm_overlap.method.transport import order_of_segments

Algorithm = Literal["ring", "tree"]


@dataclass(frozen=True)
class AllReduce:
    """What it costs to sum a tensor over workers.

    `ring`: 2(N − 1) messages one after the other, each of 1/N of the tensor. `tree`: two binary trees, each for half of
    the tensor, pipelined (Sanders, Speck and Träff 2009; NCCL's double tree): 2⌈log₂ N⌉ messages deep, and every worker
    sends the tensor twice.

    Attributes:
        latency: seconds of a message, without its bytes; with the software's part in it.
        bandwidth: bytes a second that a worker sends while it receives as many.
        algorithm: `ring` or `tree`.
    """

    latency: float
    bandwidth: float
    algorithm: Algorithm = "ring"

    def delay(self, workers: int) -> float:
        """Seconds that pass without the link being busy."""
        if workers == 1:
            return 0.0
        return self.latency * (2 * (workers - 1) if self.algorithm == "ring" else 2 * math.ceil(math.log2(workers)))

    def busy(self, size: float, workers: int) -> float:
        """Seconds in which `size` bytes keep the link busy."""
        if workers == 1:
            return 0.0
        return size / self.bandwidth * (2 * (workers - 1) / workers if self.algorithm == "ring" else 2.0)


def fit_link(times: pd.DataFrame, workers: int) -> AllReduce:
    """Latency and bandwidth from measured all-reduces (rings), by least squares of the relative error.

    Args:
        times: columns `bytes`, `seconds`; see `measuring.link_times`.
        workers: among whom.
    """
    seconds = times["seconds"].to_numpy()
    slope, start = np.polyfit(times["bytes"].to_numpy(), seconds, 1, w=1 / seconds)
    hops = 2 * (workers - 1)
    return AllReduce(max(start, 0.0) / hops, hops / workers / slope)


def step_seconds(
    layers: pd.DataFrame, buckets: Sequence[Sequence[float]], link: AllReduce, workers: int,
    switches: Mapping[str, bool], segment: float, in_flight: int = 2, other: float = 0.0,
) -> float:
    """Seconds of a step once steps follow each other.

    Walks through some steps event by event: a worker computes layer by layer, a link carries the segments in the order
    that the transport would choose, at most `in_flight` at a time.

    Args:
        layers: see `measuring.layer_times`.
        buckets: for each of DDP's buckets, in the order of backward, the bytes of each layer in it.
        link: what an all-reduce costs.
        workers: their number.
        switches: of `CommOverlap`, as in `measuring.VARIANTS`.
        segment: bytes; used where segments are switched on.
        in_flight: segments, or whole buckets, under way at a time.
        other: seconds a step that are neither of a layer nor communication: reading the batch, updating.

    Returns:
        Seconds.
    """
    forward, backward = layers["forward"].tolist(), layers["backward"].tolist()
    count = len(layers)
    inside = [[layer for layer, size in enumerate(bucket) if size] for bucket in buckets]
    sizes = [sum(bucket) for bucket in buckets]
    parts = [max(1, math.ceil(size / segment)) if switches["pipeline_segments"] else 1 for size in sizes]
    cost = [link.busy(size / part, workers) for size, part in zip(sizes, parts, strict=True)]
    delay = link.delay(workers)
    # A segment's share of the link when others fill its delay.
    pace = [max(seconds, (seconds + delay) / in_flight) for seconds in cost]
    until_ready = np.cumsum(backward[::-1])[::-1]
    ready = [until_ready[min(layers_in)] for layers_in in inside]
    if not switches["overlap_backward"]:
        ready = [until_ready[0]] * len(buckets)
    if switches["overlap_forward"]:
        order = order_of_segments(ready, [min(layers_in) for layers_in in inside], parts, pace)
    else:
        order = [(bucket, part) for bucket in range(len(buckets)) for part in range(parts[bucket])]
    now, free, arrived, ends = 0.0, 0.0, [0.0] * len(buckets), []
    needs = [[bucket for bucket, layers_in in enumerate(inside) if layer in layers_in] for layer in range(count)]
    for _ in range(8):
        now += other
        for layer in range(count):
            now = max(now, *(arrived[bucket] for bucket in needs[layer])) if needs[layer] else now
            now += forward[layer]
        start = now = max(now, *arrived)
        landed: list[float] = []
        for bucket, _part in order:
            room = landed[-in_flight] if len(landed) >= in_flight else 0.0
            begin = max(free, room, start + ready[bucket])
            free = begin + cost[bucket]
            landed.append(free + delay)
            arrived[bucket] = landed[-1]
        now = start + until_ready[0]
        if not switches["overlap_forward"]:
            now = max(now, *arrived)
        ends.append(now)
    return (ends[-1] - ends[2]) / (len(ends) - 3)


@dataclass(frozen=True)
class Measured:
    """What `measuring.measure` found with a number of workers."""

    workers: int
    results: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def layers(self) -> pd.DataFrame:
        """Measured compute and bytes of each layer."""
        return self.results["layers"]

    @property
    def seconds(self) -> dict[str, float]:
        """Median seconds a step of everything that was timed."""
        return {name: float(np.median(values)) for name, values in self.results["seconds"].items()}

    @property
    def link(self) -> AllReduce:
        """The link as measured."""
        return fit_link(self.results["link"], self.workers)

    @property
    def other(self) -> float:
        """Seconds a step outside of layers."""
        return max(0.0, self.seconds[COMPUTE] - float(self.layers[["forward", "backward"]].to_numpy().sum()))

    @property
    def alone(self) -> float:
        """Seconds of a step of one worker, without communication."""
        return float(self.layers[["forward", "backward"]].to_numpy().sum()) + self.other

    def predict(self, variant: str) -> float:
        """Seconds of a step by the model, under the settings of the measurement.

        Args:
            variant: a name of `VARIANTS`.
        """
        return self._step(variant, self.link, self.workers, self.results["buckets"], self._segment)

    def best(self, variant: str, link: AllReduce, workers: int) -> float:
        """Seconds of a step by the model, with the sizes of buckets and segments that suit link and workers best.

        Many workers on a ring make small messages dear, with and without overlap; so both choose anew, from buckets as
        measured, merged two by two again and again up to a single one, and segments as measured, doubled again and
        again up to whole buckets.
        """
        if workers == 1:
            return self.alone
        buckets, seconds = [list(bucket) for bucket in self.results["buckets"]], []
        while True:
            segment = self._segment
            while True:
                seconds.append(self._step(variant, link, workers, buckets, segment))
                if segment >= max(sum(bucket) for bucket in buckets) or not VARIANTS[variant]["pipeline_segments"]:
                    break
                segment *= 2
            if len(buckets) == 1:
                return min(seconds)
            buckets = [[sum(sizes) for sizes in zip(*buckets[start : start + 2], strict=True)]
                       for start in range(0, len(buckets), 2)]

    @property
    def _segment(self) -> float:
        return self.settings["segment_mb"] * 2**20

    def _step(
        self, variant: str, link: AllReduce, workers: int, buckets: Sequence[Sequence[float]], segment: float
    ) -> float:
        return step_seconds(self.layers, buckets, link, workers, VARIANTS[variant], segment,
                            self.settings["in_flight"], self.other)


def predictions(measured: Iterable[Measured]) -> pd.DataFrame:
    """The model's seconds beside the measured ones.

    Returns:
        One row a number of workers and variant: `workers`, `variant`, `measured`, `predicted` (seconds a step), `error`
        (predicted / measured − 1).
    """
    rows = []
    for each in measured:
        for variant in VARIANTS:
            if variant in each.seconds:
                seen, said = each.seconds[variant], each.predict(variant)
                rows.append({"workers": each.workers, "variant": variant, "measured": seen, "predicted": said,
                             "error": said / seen - 1})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Margins:
    """How far the model was off where there is a measurement, and so may be elsewhere.

    Attributes:
        seconds: (least, most) of measured ÷ predicted seconds of a step; above 1 where the model is too fast.
        gain: (least, most) of measured ÷ predicted gain over the first of two variants.
    """

    seconds: tuple[float, float]
    gain: tuple[float, float]


def margins(measured: Iterable[Measured], variants: tuple[str, str]) -> Margins:
    """Measured over predicted, the range over variants and numbers of workers; 1, the model's own word, is within.

    Args:
        measured: with one or more numbers of workers.
        variants: (without, with) overlap, for the gain.
    """
    seconds, gains = [1.0], [1.0]
    for each in measured:
        ratios = {name: each.seconds[name] / each.predict(name) for name in VARIANTS if name in each.seconds}
        seconds += ratios.values()
        gains.append(ratios[variants[0]] / ratios[variants[1]])
    return Margins((min(seconds), max(seconds)), (min(gains), max(gains)))


def scaling(
    base: Measured, workers: Sequence[int], variants: Sequence[str], off: Margins = Margins((1.0, 1.0), (1.0, 1.0))
) -> pd.DataFrame:
    """Figure 1: learning speed against the number of workers, each with its own processor and a batch of the same size.

    Bucket and segment sizes are those that suit best, for every number and variant (`Measured.best`).

    Args:
        base: layers and link as measured.
        workers: numbers of workers.
        variants: names of `VARIANTS`.
        off: how far the model may be off.

    Returns:
        One row a number, algorithm and variant: `workers`, `algorithm`, `variant`, `seconds` a step, `speed` (images a
        second relative to one worker), `gain` (speed relative to the first variant); `speed low`, `speed high`, `gain
        low` and `gain high`, as far as the model may be off. One worker does not communicate, and nothing is off.
    """
    rows = []
    for algorithm in ("ring", "tree"):
        link = AllReduce(base.link.latency, base.link.bandwidth, algorithm)
        for count in workers:
            first = None
            for variant in variants:
                seconds = base.best(variant, link, count)
                first = first or seconds
                speed, gain = count * base.alone / seconds, first / seconds
                alone = count == 1
                slower, faster = (1.0, 1.0) if alone else (off.seconds[1], off.seconds[0])
                less, more = (1.0, 1.0) if alone or variant == variants[0] else off.gain
                rows.append({"workers": count, "algorithm": algorithm, "variant": variant, "seconds": seconds,
                             "speed": speed, "speed low": speed / slower, "speed high": speed / faster,
                             "gain": gain, "gain low": gain * less, "gain high": gain * more})
    return pd.DataFrame(rows)


def gain_by_bandwidth(
    base: Measured, workers: int, variants: tuple[str, str], ratios: Sequence[float]
) -> pd.DataFrame:
    """What overlap gains on a faster or slower link of the measured latency.

    Args:
        base: layers and latency as measured.
        workers: their number.
        variants: (without, with) overlap.
        ratios: seconds in which the gradients keep the link busy over seconds of computing.

    Returns:
        One row a ratio: `ratio`, `gain`, and `limit`: (compute + communicate) / max(compute, communicate), with no
        latency; more than which nothing can gain.
    """
    size = sum(sum(bucket) for bucket in base.results["buckets"])
    rows = []
    for ratio in ratios:
        link = AllReduce(base.link.latency, AllReduce(0.0, 1.0).busy(size, workers) / (ratio * base.alone))
        gain = base.best(variants[0], link, workers) / base.best(variants[1], link, workers)
        rows.append({"ratio": ratio, "gain": gain, "limit": (1 + ratio) / max(1.0, ratio)})
    return pd.DataFrame(rows)
