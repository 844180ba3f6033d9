"""Work grows with what there is to do, not with its square: counted in calls of functions, which no load changes."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import slow
from torch import nn

from layerlab import Study, scoreboard, strategies
from layerlab.runs.batch.plans import Plan, jobs_of
from layerlab.runs.tracking.store import notebook_runs

# n log n has 1.2 at these sizes.
MOST = 1.3


def calls(work: Callable[[], object]) -> int:
    """How many functions a piece of work calls."""
    count = 0

    def hear(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(hear)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def exponent(work: Callable[[int], Callable[[], object]], sizes: Sequence[int]) -> float:
    """By which power of the size the calls of the work grow, from the second size to the third; those of the first are
    what does not grow."""
    work(sizes[0])()  # what is imported or remembered at the first time
    base, one, two = [calls(work(size)) for size in sizes]
    return math.log((two - base) / (one - base)) / math.log(sizes[2] / sizes[1])


def chain(layers: int) -> nn.Sequential:
    """Convolutions with batch norms of which a channel is dead, and a classifier."""
    parts: list[nn.Module] = []
    for number in range(layers - 1):
        parts += [nn.Conv2d(4 if number else 3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
        nn.init.constant_(parts[-2].weight[0], 0.0)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


@slow
@pytest.mark.parametrize("name", ["comm-overlap", "lars-skip", "learn-and-drop", "low-bit", "memory-reorder"])
def test_a_pre_flight_grows_with_the_layers(name):
    example = torch.randn(2, 3, 8, 8)

    def work(size: int) -> Callable[[], object]:
        network = chain(size)
        return lambda: strategies(name).preflight(network, example)

    assert exponent(work, (5, 40, 160)) < MOST


@slow
def test_a_plan_grows_with_its_jobs(tmp_path):
    def work(size: int) -> Callable[[], object]:
        alphas = [number + 0.5 for number in range(size)]
        return lambda: jobs_of(Plan(jobs=[{"paper": "lars-skip", "grid": {"alpha": alphas}}]), tmp_path)

    assert exponent(work, (5, 40, 160)) < MOST


@slow
def test_a_scoreboard_grows_with_the_runs(fake, tmp_path, monkeypatch):
    fake()
    made = itertools.count(1)

    def work(size: int) -> Callable[[], object]:
        while len(notebook_runs("fake")) < size:
            number = next(made)
            study = Study("fake", "cpu", tmp_path / str(number), epochs=number)
            study.claim("gain", [2.0, 4.0], seeds=[0, 1], conditions={"dataset": "digits"})
            study.finish()
        return lambda: scoreboard.collect(["fake"])

    assert exponent(work, (1, 4, 12)) < MOST
    # No run is left behind, however many there are.
    monkeypatch.setattr("layerlab.runs.tracking.pages.PAGE", 5)
    assert len(notebook_runs("fake")) == 12
