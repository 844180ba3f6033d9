"""What the checks train, and with what: a few digits, the strategy's network, fits of four epochs."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from layerlab.contract.strategy import Strategy
from layerlab.testing.networks import CLASSES, SHAPE, residual_network
from layerlab.training.loop import Fit
from layerlab.training.results import FitResult
from layerlab.workload.dataset import Dataset, Split
from layerlab.workload.loading import load_dataset

if TYPE_CHECKING:
    from layerlab.testing.networks import Network

EPOCHS = 4
BATCH = 32


@functools.cache
def _digits() -> Dataset:
    return load_dataset("digits", limit=6 * BATCH, test_limit=100, device="cpu")


def digits() -> Dataset:
    """Some digits, each time in memory of their own: a strategy that spoils them spoils one fit."""
    kept = _digits()
    return replace(kept, train=_copied(kept.train), test=_copied(kept.test))


def _copied(split: Split) -> Split:
    assert isinstance(split.images, Tensor)
    return replace(split, images=split.images.clone(), labels=split.labels.clone())


def own_network(strategy: Strategy) -> Network:
    """What a strategy is checked on where one network is enough: its own example, or the residual one."""
    if type(strategy).example_network(SHAPE, CLASSES) is None:
        return residual_network

    def build() -> nn.Module:
        network = type(strategy).example_network(SHAPE, CLASSES)
        assert network is not None
        return network

    return build


def train(
    strategies: Sequence[Strategy], model: Any, *, epochs: int = EPOCHS, globals_seed: int = 0,
    until: int | None = None, data: Dataset | None = None, **options: Any,
) -> tuple[Fit, FitResult | None]:
    """Train with these very objects; up to the end of epoch `until`, or to the end.

    The random states that are not torch's are the same for each fit, unless a check wants them otherwise.
    """
    random.seed(globals_seed)
    np.random.seed(globals_seed)
    torch.manual_seed(globals_seed)
    settings: dict[str, Any] = {"batch_size": BATCH, "lr": 0.02, "measure": False, **options}
    job = Fit(model, data or digits(), strategies, epochs=epochs, **settings)
    while job.run.epoch < (epochs if until is None else until):
        job.train_epoch()
    return job, job.finish() if until is None else None


def trained(strategy: Strategy, model: Any = None, **options: Any) -> FitResult:
    """A fit with a copy of the strategy, on its network."""
    result = train([copy.deepcopy(strategy)], model or own_network(strategy), **options)[1]
    assert result is not None
    return result


def difference(first: nn.Module, second: nn.Module) -> str:
    """The first tensor in which two networks' states are not equal bit for bit, or an empty string."""
    a, b = first.state_dict(), second.state_dict()
    if a.keys() != b.keys():
        return "the names of its tensors"
    for name in a:
        if a[name].shape != b[name].shape or not torch.equal(a[name], b[name]):
            return name
    return ""


def logits_of(model: nn.Module) -> Tensor:
    """What a network gives for some test images, (16, classes)."""
    with torch.no_grad():
        return model(next(digits().test.batches(16))[0])
