"""The checks of how a strategy trains: that it learns, repeats itself, goes on, and does so in every precision."""

from __future__ import annotations

import copy
import math
import re
import tempfile
import unittest
import warnings
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from layerlab.base.errors import Refused, reason
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy
from layerlab.testing.networks import CLASSES, NETWORKS, SHAPE
from layerlab.testing.trial import EPOCHS, difference, own_network, train, trained
from layerlab.training.results import FitResult


def _trains(strategy: Strategy, which: str) -> None:
    try:
        result = trained(strategy, NETWORKS[which])
    except Refused as refusal:
        if which == "residual" and type(strategy).example_network(SHAPE, CLASSES) is None:
            raise AssertionError(
                f"it refuses this network ({refusal}); a strategy that needs a network of a certain form gives one as "
                "its `example_network`"
            ) from refusal
        raise unittest.SkipTest(f"refused: {refusal}") from None
    _learned(result)


def _learned(result: FitResult) -> None:
    losses = [row["train/loss"] for row in result.history]
    assert losses[-1] < losses[0], (
        f"the training loss does not fall over {len(losses)} epochs ({', '.join(f'{loss:.3g}' for loss in losses)}); "
        "see that gradients reach the optimizer"
    )


def trains_mlp(strategy: Strategy) -> None:
    """Trains a perceptron, or refuses it with a sentence."""
    _trains(strategy, "mlp")


def trains_cnn(strategy: Strategy) -> None:
    """Trains convolutions without batch norm, or refuses them with a sentence."""
    _trains(strategy, "cnn")


def trains_residual(strategy: Strategy) -> None:
    """Trains a residual network with batch norm; may refuse it if it has an `example_network` of its own."""
    _trains(strategy, "residual")


def trains_example(strategy: Strategy) -> None:
    """Trains the network of its own `example_network`, if it has one."""
    if type(strategy).example_network(SHAPE, CLASSES) is None:
        raise unittest.SkipTest("takes any network")
    _learned(trained(strategy))


def deterministic(strategy: Strategy) -> None:
    """The same seed gives the same weights, a different seed others; other random states do not matter."""
    first, second = (trained(strategy, globals_seed=number) for number in (1, 2))
    where = difference(first.model, second.model)
    assert not where, (
        f"two fits with the same seed end with other weights ({where}); draw from torch's random state, or from "
        "`run.generator_for(self.name)`"
    )
    other = trained(strategy, seed=1)
    assert difference(first.model, other.model), (
        "another seed ends with the same weights; do not set a seed of your own"
    )


def fits_again(strategy: Strategy) -> None:
    """The same object fits a second time with the same outcome."""
    same = copy.deepcopy(strategy)
    first, second = (train([same], own_network(strategy))[1] for _ in range(2))
    assert first is not None
    assert second is not None
    where = difference(first.model, second.model)
    assert not where, (
        f"a second fit with the same object ends with other weights ({where}); set all state anew in `on_fit_start`"
    )


def resumes(strategy: Strategy) -> None:
    """Interrupted after any epoch, the fit goes on to the same weights, bit for bit, with SGD and with AdamW."""
    for optimizer, lr in (("sgd", 0.02), ("adamw", 0.005)):
        options: dict[str, Any] = {"optimizer": optimizer, "lr": lr, "schedule": "cosine"}
        whole = trained(strategy, **options)
        losses = {row["train/loss"] for row in whole.history}
        assert len(losses) == EPOCHS, "all epochs have the same loss, so that equality would prove nothing"
        for stop in range(1, EPOCHS):
            with tempfile.TemporaryDirectory() as folder:
                train([copy.deepcopy(strategy)], own_network(strategy), until=stop, checkpoint=folder, **options)
                again = trained(strategy, checkpoint=folder, **options)
            where = difference(whole.model, again.model)
            assert not where, (
                f"interrupted after epoch {stop} of {EPOCHS} it ends with other weights ({where}, {optimizer}); put "
                "what changes during training into `state_dict` and take it back in `load_state_dict`"
            )


def metrics_finite(strategy: Strategy) -> None:
    """What it logs is finite, under names of its own that MLflow takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, result = train([], own_network(strategy))[1], trained(strategy)
    assert plain is not None
    known = plain.final.keys()
    for row in result.history:
        for name, value in row.items():
            assert name in known or name.startswith(f"{type(strategy).name}/"), (
                f"it logs {name!r}; log under its own name, {type(strategy).name}/…"
            )
            assert re.fullmatch(r"[\w./ :-]+", name, re.ASCII), f"MLflow refuses the name {name!r} that it logs"
            assert math.isfinite(value), f"{name} is {value} in epoch {row['epoch']}; do not log what there is not"


# Images a step where costs are checked: enough steps an epoch that a few of them are drawn.
_FEW = 8
# How far the cost of steps that differ may be off, in half-widths of its interval and as a share of it.
_WIDTHS, _OFF = 3.0, 0.05


def costs_logged(strategy: Strategy) -> None:
    """Measuring changes no weight, and the FLOPs that are logged are the mean of all steps, each of them measured."""
    plain, few, every = (trained(strategy, batch_size=_FEW, measure=measure) for measure in (False, True, "every"))
    for measured in (few, every):
        where = difference(plain.model, measured.model)
        assert not where, (
            f"with measure={measured.settings.measure!r} it ends with other weights than unmeasured ({where}); what a "
            "step does must depend on no dispatch mode, and its random numbers come from torch's random state"
        )
    for row, whole in zip(few.history, every.history, strict=True):
        logged, taken = (each["cost/forward_flops"] + each["cost/backward_flops"] for each in (row, whole))
        allowed = 1e-9 * taken
        if "cost/flops_interval" in whole:  # its steps differ, and some of them stand for all
            allowed = max(_WIDTHS * row.get("cost/flops_interval", 0.0), _OFF * taken)
        assert abs(logged - taken) <= allowed, (
            f"epoch {row['epoch']} is logged with {logged:,.0f} FLOPs, and its steps take {taken:,.0f}; call "
            "`run.remeasure()` where the cost of a step changes within an epoch"
        )


def bfloat16(strategy: Strategy) -> None:
    """Trains with `precision="bfloat16"`, or refuses with a sentence."""
    try:
        result = trained(strategy, precision="bfloat16")
    except Refused as refusal:
        raise unittest.SkipTest(f"refused: {refusal}") from None
    except Exception as error:
        raise AssertionError(
            f"under bfloat16 it ends with {reason(error)}; run forward and loss in `run.autocast()`, "
            "take .float() before NumPy, or raise layerlab.Refused"
        ) from error
    assert all(p.dtype == torch.float32 for p in result.model.parameters()), "the weights are no longer float32"


class _Weights(Strategy):
    """Keeps the weights of each epoch's end."""

    name: ClassVar[str] = "weights"
    _epochs: list[dict[str, Tensor]] = PrivateAttr(default_factory=list)

    def on_fit_start(self, run: Run) -> None:
        """Those at the start."""
        self.on_epoch_end(run)

    def on_epoch_end(self, run: Run) -> None:
        """Keep them."""
        self._epochs.append({name: value.detach().clone() for name, value in run.model.named_parameters()})

    @property
    def epochs(self) -> list[dict[str, Tensor]]:
        """By epoch, the initial ones first."""
        return self._epochs


def compiles(strategy: Strategy) -> None:
    """Under `torch.compile` each epoch ends with the weights of the eager one, thawed layers included; or it refuses.

    Compiled with the backend `aot_eager`: what is traced, guarded and differentiated is what counts here, not the code
    that is generated.
    """
    runs: list[_Weights] = []
    try:
        for backend in ("", "aot_eager"):
            torch._dynamo.reset()
            runs.append(_Weights())
            train([copy.deepcopy(strategy), runs[-1]], own_network(strategy), compile=backend or False)
    except Refused as refusal:
        raise unittest.SkipTest(f"refused: {refusal}") from None
    finally:
        torch._dynamo.reset()
    eager, compiled = (weights.epochs for weights in runs)
    for epoch in range(1, len(eager)):
        for name, wanted in eager[epoch].items():
            got, before = compiled[epoch].get(name), eager[epoch - 1].get(name)
            assert got is not None and got.shape == wanted.shape, (  # noqa: PT018
                f"compiled, the network has another structure after epoch {epoch} than eagerly ({name})"
            )
            moved = (wanted - before).norm() if before is not None and before.shape == wanted.shape else wanted.norm()
            error = (got - wanted).norm()
            assert error <= 0.02 * moved + 1e-5, (
                f"compiled, {name} is {error:.2g} away from the eager weights after epoch {epoch}, in which they moved "
                f"by {moved:.2g}; hooks that are added after compiling are ignored, and Python values are compiled in"
            )
