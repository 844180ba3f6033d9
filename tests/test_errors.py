"""What is told of errors that are not our own: one line each, also of one that says nothing."""

from __future__ import annotations

import math
import pickle
from typing import ClassVar

import pytest

from layerlab import Diverged, LayerlabError, Strategy, fit, load_dataset
from layerlab.base.errors import first_line, reason
from layerlab.testing.networks import mlp, plain_cnn


@pytest.mark.parametrize(
    ("error", "whole", "first"),
    [
        (LayerlabError("Too small; enlarge it."), "Too small; enlarge it.", "Too small; enlarge it."),
        (ValueError("\n  no\n  such  thing"), "ValueError: no such thing", "no"),
        (MemoryError(), "MemoryError", "MemoryError"),
        (RuntimeError(" \n"), "RuntimeError", "RuntimeError"),
    ],
)
def test_an_error_is_told_in_one_line(error, whole, first):
    assert reason(error) == whole
    assert first_line(error) == first


class Explodes(Strategy):
    """Makes gradients huge in the second epoch."""

    name: ClassVar[str] = "explodes"

    def on_after_backward(self, run) -> None:
        for parameter in run.model.parameters():
            parameter.grad *= 1e30 if run.epoch == 2 else 1.0


@pytest.mark.parametrize("build", [mlp, plain_cnn])
def test_a_training_that_diverges_keeps_its_history_and_its_traceback(build):
    data = load_dataset("digits", limit=96, test_limit=32, device="cpu")
    with pytest.raises(Diverged, match=r"loss of 'explodes' \(seed 0\) is (nan|inf) in epoch 2") as caught:
        fit(build, data, Explodes(), epochs=3, batch_size=32, measure=False, progress=False)
    first, last = caught.value.history
    assert first["test/top1"] >= 0
    assert last["epoch"] == 2
    assert not math.isfinite(last["train/loss"])
    assert any("loop.py" in line for line in caught.value._render_traceback_())
    assert pickle.loads(pickle.dumps(caught.value)).history[0] == first
