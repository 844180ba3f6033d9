"""How much memory each part of a real or dry step takes: intervals between marks, each with its peak."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from layerlab.measure import LiveBytes

_PREFIX = "layerlab mark: "


class Interval(NamedTuple):
    """From one mark to the next.

    Attributes:
        label: of the mark where it begins.
        start: bytes allocated there.
        peak: the most bytes allocated at once until the next mark.
    """

    label: str
    start: int
    peak: int


Mark = Callable[[str], None]


class Recorder(Protocol):
    """Runs a step that is given a function to mark its parts with; gives the intervals in order."""

    def __call__(self, prepare: Callable[[], object], step: Callable[[Mark], object]) -> list[Interval]: ...


def recorder(device: torch.device, before: Iterable[Tensor]) -> Recorder:
    """The recorder for a device.

    Args:
        device: meta counts live tensors, as a dry run does; a CPU every allocation, by the profiler; a GPU what its
            allocator says, less what was there before and is not in `before`.
        before: tensors that are there already and are not freed on the way.
    """
    tensors = list(before)
    if device.type == "meta":
        return lambda prepare, step: _dry(tensors, prepare, step)
    if device.type == "cpu":
        return lambda prepare, step: _profiled(tensors, prepare, step)
    return lambda prepare, step: _allocator(device, tensors, prepare, step)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def _run(prepare: Callable[[], object], step: Callable[[Mark], object], mark: Mark) -> None:
    """The step between its first and its last mark, once what came before it is gone."""
    prepare()
    gc.collect()
    mark("begin")
    step(mark)
    mark("end")


def _dry(tensors: list[Tensor], prepare: Callable[[], object], step: Callable[[Mark], object]) -> list[Interval]:
    found: list[Interval] = []
    opened: list[tuple[str, int]] = []
    with LiveBytes(tensors) as live:

        def mark(label: str) -> None:
            if opened:
                found.append(Interval(*opened.pop(), live.peak))
            opened.append((label, live.now))
            live.peak = live.now

        _run(prepare, step, mark)
    return found


def _profiled(
    tensors: list[Tensor], prepare: Callable[[], object], step: Callable[[Mark], object]
) -> list[Interval]:
    # The profiler's library otherwise prints a line on each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    gc.collect()

    def mark(label: str) -> None:
        with record_function(_PREFIX + label):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _run(prepare, step, mark)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [(each.start_ns(), each.name(), each.nbytes()) for each in profiler.profiler.kineto_results.events()]
    events = [each for each in events if each[1] == "[memory]" or each[1].startswith(_PREFIX)]
    events.sort(key=lambda each: each[0])
    found: list[Interval] = []
    now, label, start, peak = _bytes(tensors), "", 0, 0
    for _, name, size in events:
        if name == "[memory]":
            now += size
            peak = max(peak, now)
            continue
        if label:
            found.append(Interval(label, start, peak))
        label, start, peak = name.removeprefix(_PREFIX), now, now
    return found


def _allocator(
    device: torch.device, tensors: list[Tensor], prepare: Callable[[], object], step: Callable[[Mark], object]
) -> list[Interval]:
    gc.collect()
    others = torch.cuda.memory_allocated(device) - _bytes(tensors)
    found: list[Interval] = []
    opened: list[tuple[str, int]] = []

    def mark(label: str) -> None:
        if opened:
            found.append(Interval(*opened.pop(), torch.cuda.max_memory_allocated(device) - others))
        torch.cuda.reset_peak_memory_stats(device)
        opened.append((label, torch.cuda.memory_allocated(device) - others))

    _run(prepare, step, mark)
    return found
