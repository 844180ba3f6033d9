"""What the workers measure: seconds a step of every variant, of the two bounds' parts, and of every layer."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from layerlab import Dataset, Fit, Split, build_model, forward_order, noise
from layerlab.measure import synchronise
from layerlab_comm_overlap.method.choosing import VISIT
from layerlab_comm_overlap.method.stock import STOCK, StockDDP
from layerlab_comm_overlap.strategy import CommOverlap

OFF = {"overlap_backward": False, "overlap_forward": False, "pipeline_segments": False}
VARIANTS: dict[str, dict[str, bool]] = {
    "no overlap": OFF,
    "1: backward": {**OFF, "overlap_backward": True},
    "2: forward": {**OFF, "overlap_forward": True},
    "3: segments": {**OFF, "pipeline_segments": True},
    "1 + 2": {**OFF, "overlap_backward": True, "overlap_forward": True},
    "all together": {name: True for name in OFF},
}
"""Name → the switches of `CommOverlap`."""
CHOSEN = "chosen by measuring"
"""Name of `CommOverlap` as it comes."""
COMPUTE, WHOLE, CUT = "compute alone", "communicate alone", "communicate alone, in segments"


def measure(
    network: Mapping[str, Any], batch: int, steps: int, rounds: int, settings: Mapping[str, Any],
    variants: Sequence[str] = tuple(VARIANTS),
) -> dict[str, Any]:
    """In each worker: time all variants by turns, epochs of a few steps each, and what the model needs.

    Args:
        network: `name` and the other arguments of `build_model`, `image_size` and `channels` among them.
        batch: images a worker and step.
        steps: of an epoch; its last waits for all updates, so that a short epoch shows a little less overlap.
        rounds: epochs of each variant, by turns; the first of each is not counted.
        settings: of `CommOverlap`, for all variants.
        variants: names of `VARIANTS`.

    Returns:
        `seconds`: name → seconds a step, one a round, the mean over the workers; with `STOCK` (the null arms); with
        `CHOSEN`, where epochs are long enough to choose in; with `COMPUTE` (the same steps without communication, in
        all workers at the same time), `WHOLE` and `CUT` (all buckets with nothing computed).
        `layers`: see `layer_times`. `link`: see `link_times`. `buckets`: of each bucket, the bytes of each layer.
        `chosen`, `tried`: see `CommOverlap`.
    """
    options = dict(network)
    shape = (options["channels"], options["image_size"], options["image_size"])
    workers = dist.get_world_size()
    torch.manual_seed(0)
    model = build_model(options.pop("name"), **options)
    alone, shared = noise(batch * steps, shape), noise(batch * steps * workers, shape)
    common: dict[str, Any] = {"epochs": rounds + 1, "lr": 1e-3, "measure": False, "device": str(_device())}
    jobs = {COMPUTE: Fit(model, alone, batch_size=batch, **common)}
    common["batch_size"] = batch * workers
    strategies = {name: CommOverlap(**settings, **VARIANTS[name]) for name in variants}
    for name, strategy in strategies.items():
        jobs[name] = Fit(model, shared, strategy, **common)
    delays = {name: value for name, value in settings.items() if name in ("link_megabits", "link_latency_ms")}
    for name, megabytes in STOCK.items():
        jobs[name] = Fit(model, shared, StockDDP(bucket_mb=megabytes, **delays), **common)
    chooser = CommOverlap(choose=True, **delays)
    if steps > VISIT:
        jobs[CHOSEN] = Fit(model, shared, chooser, **common | {"epochs": rounds + 1 + _CHOOSING})
        while not chooser.chosen:
            jobs[CHOSEN].train_epoch()
    seconds = _by_turns(jobs, rounds, steps, {WHOLE: strategies[variants[0]], CUT: strategies[variants[-1]]})
    layers = layer_times(model, noise(batch * 4, shape), batch)
    buckets = [[bucket.get(layer, 0) for layer in layers["layer"]] for bucket in strategies[variants[-1]].buckets]
    link = link_times(CommOverlap(**settings, **OFF))
    choice = {"chosen": chooser.chosen, "tried": chooser.tried}
    for job in jobs.values():
        job.finish()
    table = torch.tensor([seconds[name] for name in seconds], dtype=torch.float64)
    dist.all_reduce(table)
    means = {name: row for name, row in zip(seconds, (table / workers).tolist(), strict=True)}
    return {"seconds": means, "layers": layers, "link": link, "buckets": buckets, **choice}


def _by_turns(
    jobs: Mapping[str, Fit], rounds: int, steps: int, sending: Mapping[str, CommOverlap]
) -> dict[str, list[float]]:
    """Name → seconds a step, one a round: of each job's epochs, and of communicating alone by those of `sending`."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        names = list(jobs)
        for name in names if turn % 2 else reversed(names):
            dist.barrier()
            row = jobs[name].train_epoch()
            if turn:
                seconds[name].append(row["time/epoch_seconds"] / steps)
        for label, strategy in sending.items():
            values = [strategy.seconds_to_communicate() for _ in range(3)]
            if turn:
                seconds[label].append(statistics.median(values))
    return seconds


# Epochs that a choice may take: one for each visit of each way.
_CHOOSING = 12


def _device() -> torch.device:
    """This worker's: the GPU that it was given, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def link_times(strategy: CommOverlap, sizes: Sequence[int] = (2**12, 2**15, 2**18, 2**20, 2**22)) -> pd.DataFrame:
    """Seconds of an all-reduce by its size, one after the other, over this job's link with nothing computed.

    Returns:
        One row a size: `bytes`, `seconds` (median of five).
    """
    rows = []
    with strategy.transport(_device()) as transport:
        for size in sizes:
            values = [transport.exchange([size]) for _ in range(6)][1:]
            rows.append({"bytes": size, "seconds": statistics.median(values)})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------ layers, from the profiler


class LayerRanges:
    """Names, for the profiler, what each layer does: ranges `forward <layer>` around its calls, while it is open.

    What backward does for a layer is found by the sequence number that autograd gives to a forward operation and to its
    backward.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        self.layers = [(name, module) for name, module in forward_order(model, example)]

    def __enter__(self) -> LayerRanges:
        self._handles = []
        for name, module in self.layers:
            stack: list[Any] = []

            def enter(_: nn.Module, __: Any, name: str = name, stack: list[Any] = stack) -> None:
                stack.append(record_function(f"forward {name}"))
                stack[-1].__enter__()

            def leave(_: nn.Module, __: Any, ___: Any, stack: list[Any] = stack) -> None:
                stack.pop().__exit__(None, None, None)

            # After the waiting for parameters, so that a layer's time is its own.
            self._handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def spans(profiler: Any) -> pd.DataFrame:
    """A profile's ranges: what each layer computes, and what is communicated and updated, when.

    Returns:
        One row a span in time order: `kind` (forward, backward, communicate, update), `what` (a layer's name, a
        bucket's index), `start`, `end` in seconds since the first on the host, `device`: seconds of a GPU in it.
    """
    rows, marks, sequence = [], [], {}
    events = list(profiler.events())
    for event in events:
        kind, _, what = event.name.partition(" ")
        if kind in ("forward", "communicate", "update") and what:
            rows.append((kind, what, event.time_range.start, event.time_range.end, event.device_time_total))
            if kind == "forward":
                marks.append((event.time_range.start, event.time_range.end, what))
    marks.sort()
    starts = np.array([start for start, _, _ in marks])
    for event in events:
        number = event.sequence_nr
        if number is not None and number >= 0 and not event.name.startswith("autograd::"):
            at = int(np.searchsorted(starts, event.time_range.start, side="right")) - 1
            if at >= 0 and event.time_range.end <= marks[at][1]:
                # Between a layer's call and the next one's nothing else runs: what stands there is its activation.
                sequence[number] = marks[at][2]
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function") and event.sequence_nr in sequence:
            rows.append(("backward", sequence[event.sequence_nr], event.time_range.start, event.time_range.end,
                         event.device_time_total))
    frame = pd.DataFrame(rows, columns=["kind", "what", "start", "end", "device"])
    frame = frame.sort_values("start", ignore_index=True)
    first = frame["start"].min()
    frame["start"], frame["end"] = (frame["start"] - first) / 1e6, (frame["end"] - first) / 1e6
    frame["device"] /= 1e6
    return frame


def record(model: nn.Module, example: torch.Tensor, call: Any) -> pd.DataFrame:
    """The spans of whatever `call` does with a network."""
    from torch._C._profiler import _ExperimentalConfig

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * example.is_cuda
    with LayerRanges(model, example), profile(
        activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True)
    ) as profiler:
        call()
    return spans(profiler)


def layer_times(model: nn.Module, data: Dataset, batch: int) -> pd.DataFrame:
    """Measured compute of each layer, without communication, while all workers compute.

    Operations between two layers (activations, pooling) count for the layer before, and the sums are scaled to the
    seconds of unprofiled steps.

    Returns:
        One row a layer with parameters in forward order: `layer`, `forward`, `backward` (seconds), `bytes` (gradients).
    """
    device = _device()
    network = copy.deepcopy(model).to(device).train()
    x, y = (each.to(device) for each in next(data.train.batches(batch, torch.Generator().manual_seed(0))))

    def step() -> None:
        network.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(network(x), y).backward()

    def forward() -> None:
        nn.functional.cross_entropy(network(x), y)

    for _ in range(2):
        step()
    dist.barrier()
    times: dict[str, list[float]] = {"step": [], "forward": []}
    for _ in range(5):
        for name, call in (("step", step), ("forward", forward)):
            start = time.perf_counter()
            call()
            synchronise(device)
            times[name].append(time.perf_counter() - start)
    whole, ahead = statistics.median(times["step"]), statistics.median(times["forward"])
    dist.barrier()

    def thrice() -> None:
        for _ in range(3):
            step()

    frame = record(network, x[:2], thrice)
    seconds = frame["device"] if device.type == "cuda" else frame["end"] - frame["start"]
    summed = seconds.groupby([frame["kind"], frame["what"]]).sum()
    rows = []
    for name, module in forward_order(network, x[:2]):
        size = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        rows.append({"layer": name, "forward": summed.get(("forward", name), 0.0),
                     "backward": summed.get(("backward", name), 0.0), "bytes": size})
    table = pd.DataFrame(rows)
    table["forward"] *= ahead / table["forward"].sum()
    table["backward"] *= (whole - ahead) / table["backward"].sum()
    return table


def timeline(
    network: Mapping[str, Any], batch: int, settings: Mapping[str, Any], variants: Sequence[str], steps: int = 2
) -> dict[str, pd.DataFrame]:
    """In each worker: the spans of a few steps in the middle of training, a table a variant, from the profiler's trace.

    Returns:
        Variant → `spans`, buckets named by the layers whose gradients they hold.
    """
    options = dict(network)
    shape = (options["channels"], options["image_size"], options["image_size"])
    torch.manual_seed(0)
    model = build_model(options.pop("name"), **options)
    warm, workers = 6, dist.get_world_size()
    data = noise(batch * workers * (warm + steps + 1), shape)
    found = {}
    for name in variants:
        strategy = CommOverlap(**settings, **VARIANTS[name])
        job = Fit(model, data, strategy, batch_size=batch * workers, epochs=1, lr=1e-3, measure=False,
                  device=str(_device()))
        run = job.run
        run.epoch, run.steps_per_epoch = 1, warm + steps + 1
        run.training_model.train()
        strategy.on_epoch_start(run)
        assert isinstance(run.data, Split)
        batches = iter(run.data.batches(batch * workers, run.generator, torch.float32, torch.contiguous_format))
        for x, y in itertools.islice(batches, warm):
            strategy.training_step(run, x, y)
        found[name] = record(
            run.training_model, run.example,
            lambda run=run, strategy=strategy, batches=batches: [
                strategy.training_step(run, x, y) for x, y in itertools.islice(batches, steps)],
        )
        for x, y in batches:
            strategy.training_step(run, x, y)
        labels = [_label(layers) for layers in strategy.buckets]
        busy = found[name]["kind"].isin(["communicate", "update"])
        found[name].loc[busy, "what"] = [labels[int(index)] for index in found[name].loc[busy, "what"]]
        job.finish()
    return found


def _label(layers: dict[str, int]) -> str:
    # Backward fills a bucket from the last layer on.
    short = [layer.rpartition(".")[2] for layer in reversed(layers)]
    return short[0] if len(short) == 1 else f"{short[0]}–{short[-1]}"
