"""The contract of a strategy, executable: for authors of plugins, in the manner of scikit-learn's `check_estimator`.

    check_strategy(MyStrategy)                       # runs every check, raises at the first that fails

    @parametrize_with_checks([MyStrategy()])         # pytest: one test a check
    def test_contract(strategy, check):
        check(strategy)

`layerlab check NAME` does the same for an installed strategy. A check that a strategy is known to fail is declared with
its reason, on the class (`Strategy.expected_failed_checks`) or in the call.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import unittest
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import yaml
from pydantic import PrivateAttr
from torch import Tensor, nn

from layerlab.base.errors import LayerlabError, reason
from layerlab.base.names import NAME
from layerlab.contract.registry import strategies
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy
from layerlab.testing.networks import CLASSES, NETWORKS, SHAPE, residual_network
from layerlab.training.loop import Fit
from layerlab.training.results import FitResult
from layerlab.workload.dataset import Dataset
from layerlab.workload.loading import load_dataset

if TYPE_CHECKING:
    from layerlab.testing.networks import Network

EPOCHS = 4
BATCH = 32
Check = Callable[[Strategy], None]


@functools.cache
def _digits() -> Dataset:
    return load_dataset("digits", limit=6 * BATCH, test_limit=100, device="cpu")


def _network(strategy: Strategy) -> Network:
    """What a strategy is checked on where one network is enough: its own example, or the residual one."""
    if type(strategy).example_network(SHAPE, CLASSES) is None:
        return residual_network

    def build() -> nn.Module:
        network = type(strategy).example_network(SHAPE, CLASSES)
        assert network is not None
        return network

    return build


def _fit(
    strategies: Sequence[Strategy], model: Any, *, epochs: int = EPOCHS, globals_seed: int = 0,
    until: int | None = None, **options: Any,
) -> tuple[Fit, FitResult | None]:
    """Train with these very objects; up to the end of epoch `until`, or to the end.

    The random states that are not torch's are the same for each fit, unless a check wants them otherwise.
    """
    random.seed(globals_seed)
    np.random.seed(globals_seed)
    torch.manual_seed(globals_seed)
    settings: dict[str, Any] = {"batch_size": BATCH, "lr": 0.02, "measure": False, **options}
    job = Fit(model, _digits(), strategies, epochs=epochs, **settings)
    while job.run.epoch < (until or epochs):
        job.train_epoch()
    return job, job.finish() if until is None else None


def _trained(strategy: Strategy, model: Any = None, **options: Any) -> FitResult:
    """A fit with a copy of the strategy, on its network."""
    result = _fit([copy.deepcopy(strategy)], model or _network(strategy), **options)[1]
    assert result is not None
    return result


def _differs(first: nn.Module, second: nn.Module) -> str:
    """The first tensor in which two networks' states are not equal bit for bit, or an empty string."""
    a, b = first.state_dict(), second.state_dict()
    if a.keys() != b.keys():
        return "the names of its tensors"
    for name in a:
        if a[name].shape != b[name].shape or not torch.equal(a[name], b[name]):
            return name
    return ""


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(next(_digits().test.batches(16))[0])


def settings_round_trip(strategy: Strategy) -> None:
    """Settings are documented, validate, and come back through YAML; what is no setting is refused."""
    kind = type(strategy)
    assert NAME.fullmatch(kind.name), (
        f"the name is {kind.name!r}; give the class `name: ClassVar[str]` of the form {NAME.pattern}, as its entry "
        "point's"
    )
    for name, field in kind.model_fields.items():
        assert field.description, f"setting {name!r} has no description; write a docstring under the field"
    try:
        text = yaml.safe_dump(strategy.model_dump(mode="json"))
        again = kind(**yaml.safe_load(text))
    except Exception as error:
        raise AssertionError(
            f"settings {strategy!r} do not come back through YAML ({reason(error)}); let fields be "
            "numbers, texts, lists and dicts, or give them a validator and a serializer"
        ) from error
    assert again.model_dump(mode="json") == strategy.model_dump(mode="json"), (
        f"settings change on their way through YAML: {strategy!r} became {again!r}; a validator must give back "
        "unchanged what it made itself"
    )
    try:
        kind(**{"no-such-setting": 1})
    except LayerlabError:
        return
    raise AssertionError("a setting that does not exist is taken; leave `extra` as 'forbid' in model_config")


def _trains(strategy: Strategy, which: str) -> None:
    try:
        result = _trained(strategy, NETWORKS[which])
    except LayerlabError as refusal:
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
    _learned(_trained(strategy))


def deterministic(strategy: Strategy) -> None:
    """The same seed gives the same weights, another one others, whatever other random states are."""
    first, second = (_trained(strategy, globals_seed=number) for number in (1, 2))
    where = _differs(first.model, second.model)
    assert not where, (
        f"two fits with the same seed end with other weights ({where}); draw from torch's random state, or from "
        "`torch.Generator().manual_seed(run.generator.initial_seed())`"
    )
    other = _trained(strategy, seed=1)
    assert _differs(first.model, other.model), "another seed ends with the same weights; do not set a seed of your own"


def leaves_users_model(strategy: Strategy) -> None:
    """The user's network object is as it was: `fit` trains a copy."""
    model = _network(strategy)()
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, logits = [module.training for module in model.modules()], _logits(model)
    _trained(strategy, model)
    now = model.state_dict()
    assert state.keys() == now.keys(), "it changes the structure of the user's network; change `run.model` alone"
    changed = [name for name in state if not torch.equal(state[name], now[name])]
    assert not changed, f"it changes {changed[0]!r} of the user's network; change `run.model` alone"
    assert modes == [module.training for module in model.modules()], "it changes the mode of the user's network"
    assert torch.equal(logits, _logits(model)), (
        "the user's network computes something else afterwards; patch modules of `run.model`, never their classes"
    )


def final_model(strategy: Strategy) -> None:
    """The network that is left gives one logit a class, and its saved state holds all that it needs."""
    model = _trained(strategy).model
    logits = _logits(model)
    assert logits.shape == (16, CLASSES), (
        f"the final network gives {tuple(logits.shape)} for 16 images of {CLASSES} classes; leave the whole network in "
        "`run.model` at `on_fit_end`"
    )
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    again = copy.deepcopy(model)
    with torch.no_grad():
        for value in again.state_dict().values():
            value.zero_()
    stream.seek(0)
    again.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(logits, _logits(again)), (
        "a network that loads the final one's state_dict gives other logits; keep what it computes with in parameters "
        "and buffers"
    )


def fits_again(strategy: Strategy) -> None:
    """The same object fits a second time with the same outcome."""
    same = copy.deepcopy(strategy)
    first, second = (_fit([same], _network(strategy))[1] for _ in range(2))
    assert first is not None
    assert second is not None
    where = _differs(first.model, second.model)
    assert not where, (
        f"a second fit with the same object ends with other weights ({where}); set all state anew in `on_fit_start`"
    )


class _Recorder(Strategy):
    """Writes down which hooks were called, but for those after backward."""

    name: ClassVar[str] = "recorder"
    _calls: list[str] = PrivateAttr(default_factory=list)

    def on_fit_start(self, run: Run) -> None:
        """Note it."""
        self._calls.append("on_fit_start")

    def on_epoch_start(self, run: Run) -> None:
        """Note it."""
        self._calls.append("on_epoch_start")

    def on_epoch_end(self, run: Run) -> None:
        """Note it, with the steps that were taken."""
        self._calls.append(f"on_epoch_end at step {run.step}")

    def on_validation_end(self, run: Run) -> None:
        """Note it."""
        self._calls.append("on_validation_end")

    def on_fit_end(self, run: Run) -> None:
        """Note it."""
        self._calls.append("on_fit_end")

    @property
    def calls(self) -> list[str]:
        """In their order."""
        return self._calls


class _Later(_Recorder):
    name: ClassVar[str] = "later"


class _Backward(_Recorder):
    """All hooks."""

    name: ClassVar[str] = "backward"

    def on_after_backward(self, run: Run) -> None:
        """Note it."""
        self._calls.append("on_after_backward")


def hook_calls(strategy: Strategy) -> None:
    """A strategy before it and one after it have all their hooks called, once each, in order.

    One that frees gradients at once may refuse those that read them after backward.
    """
    try:
        _hook_calls(strategy, _Backward(), _Later())
        _hook_calls(strategy, _Recorder(), _Backward())
    except LayerlabError:
        _hook_calls(strategy, _Recorder(), _Later())


def _hook_calls(strategy: Strategy, before: _Recorder, after: _Recorder) -> None:
    _fit([before, copy.deepcopy(strategy), after], _network(strategy))
    steps = len(_digits().train) // BATCH
    for recorder in (before, after):
        wanted = ["on_fit_start"]
        for epoch in range(1, EPOCHS + 1):
            backward = ["on_after_backward"] * steps if recorder.defines("on_after_backward") else []
            wanted += ["on_epoch_start", *backward, f"on_epoch_end at step {epoch * steps}", "on_validation_end"]
        wanted.append("on_fit_end")
        if recorder.calls == wanted:
            continue
        place = next((i for i, (got, want) in enumerate(zip(recorder.calls, wanted, strict=False)) if got != want),
                     min(len(recorder.calls), len(wanted)))
        got = recorder.calls[place] if place < len(recorder.calls) else "nothing"
        want = wanted[place] if place < len(wanted) else "nothing"
        raise AssertionError(
            f"call {place + 1} of another strategy's hooks is {got}, not {want}; a `training_step` calls "
            "`run.backward(loss)` once a step, and leaves the hooks to `fit`"
        )


def resumes(strategy: Strategy) -> None:
    """Interrupted after any epoch, the fit goes on to the same weights, bit for bit, with SGD and with AdamW."""
    for optimizer, lr in (("sgd", 0.02), ("adamw", 0.005)):
        options: dict[str, Any] = {"optimizer": optimizer, "lr": lr, "schedule": "cosine"}
        whole = _trained(strategy, **options)
        losses = {row["train/loss"] for row in whole.history}
        assert len(losses) == EPOCHS, "all epochs have the same loss, so that equality would prove nothing"
        for stop in range(1, EPOCHS):
            with tempfile.TemporaryDirectory() as folder:
                _fit([copy.deepcopy(strategy)], _network(strategy), until=stop, checkpoint=folder, **options)
                again = _trained(strategy, checkpoint=folder, **options)
            where = _differs(whole.model, again.model)
            assert not where, (
                f"interrupted after epoch {stop} of {EPOCHS} it ends with other weights ({where}, {optimizer}); put "
                "what changes during training into `state_dict` and take it back in `load_state_dict`"
            )


def leaves_nothing_behind(strategy: Strategy) -> None:
    """No hooks, modes, gradients, changed `requires_grad` or global settings are left."""
    model = _network(strategy)()
    *_, (kept, parameter) = model.named_parameters()
    parameter.requires_grad_(False)
    with _global_state() as changed:
        result = _trained(strategy, model)
    assert not changed, f"it leaves {', '.join(changed)} changed; put back what it sets"
    for name, module in result.model.named_modules():
        where = f"module {name!r}" if name else "the network"
        hooks = [kind for kind in vars(module) if kind.endswith("_hooks") and vars(module)[kind]]
        # Hooks of state_dict belong to how a module saves itself.
        hooks = [kind for kind in hooks if "state_dict" not in kind]
        assert not hooks, f"{where} keeps {hooks[0]}; remove your hooks in `on_fit_end`"
        assert "forward" not in vars(module), f"{where} keeps a patched forward; put it back in `on_fit_end`"
        assert not module.training, f"{where} is left in training mode"
    for name, value in result.model.named_parameters():
        hooked = value._backward_hooks or getattr(value, "_post_accumulate_grad_hooks", None)
        assert not hooked, f"parameter {name!r} keeps a hook; remove your hooks in `on_fit_end`"
        assert value.grad is None, f"parameter {name!r} keeps its gradient"
        assert value.requires_grad == (name != kept), (
            f"parameter {name!r} is left with requires_grad = {value.requires_grad}; freeze with `run.freeze`, which "
            "never touches what the user froze"
        )


@contextmanager
def _global_state() -> Iterator[list[str]]:
    """Yields a list that holds, after the block, the names of torch's global settings that it changed."""
    def look() -> dict[str, Any]:
        kinds = nn.modules.module
        return {
            "torch.is_grad_enabled": torch.is_grad_enabled(),
            "torch.get_default_dtype": torch.get_default_dtype(),
            "torch.get_num_threads": torch.get_num_threads(),
            "torch.are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled(),
            "torch.is_autocast_enabled": torch.is_autocast_enabled("cpu"),
            "torch.is_anomaly_enabled": torch.is_anomaly_enabled(),
            "torch.get_float32_matmul_precision": torch.get_float32_matmul_precision(),
            "the default device": torch.get_default_device(),
            "hooks of all modules": [len(hooks) for name, hooks in vars(kinds).items()
                                     if name.startswith("_global_") and isinstance(hooks, dict)],
            "the environment's variables": dict(os.environ),
        }

    changed: list[str] = []
    before = look()
    yield changed
    after = look()
    changed += [name for name in before if before[name] != after[name]]


def metrics_finite(strategy: Strategy) -> None:
    """What it logs is finite, under names of its own that MLflow takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, result = _fit([], _network(strategy))[1], _trained(strategy)
    assert plain is not None
    known = plain.final.keys()
    for row in result.history:
        for name, value in row.items():
            assert name in known or name.startswith(f"{type(strategy).name}/"), (
                f"it logs {name!r}; log under its own name, {type(strategy).name}/…"
            )
            assert re.fullmatch(r"[\w./ :-]+", name, re.ASCII), f"MLflow refuses the name {name!r} that it logs"
            assert math.isfinite(value), f"{name} is {value} in epoch {row['epoch']}; do not log what there is not"


def composes(strategy: Strategy, others: Iterable[Strategy] | None = None) -> None:
    """Trains together with each other strategy, before it and after it, or one of them refuses with a sentence.

    Args:
        strategy: the one that is checked.
        others: default: a new object of each installed strategy.
    """
    if others is None:
        found = [plugin for plugin in strategies.every() if plugin.name != type(strategy).name and not plugin.broken]
        others = [plugin.load()() for plugin in found]
    for other in others:
        # The one that needs a network of a certain form says which; if both do, they will refuse.
        own = type(strategy).example_network(SHAPE, CLASSES) is not None
        network = _network(strategy if own else other)
        for pair in ((strategy, other), (other, strategy)):
            names = " then ".join(type(each).name for each in pair)
            try:
                result = _fit([copy.deepcopy(each) for each in pair], network)[1]
            except LayerlabError:
                continue
            except Exception as error:
                raise AssertionError(
                    f"{names} ends with {reason(error)}; refuse with a LayerlabError what cannot work, "
                    "and expect gradients that are None and modules that are frozen"
                ) from error
            assert result is not None
            bad = [name for name, value in result.model.state_dict().items()
                   if value.is_floating_point() and not value.isfinite().all()]
            assert not bad, f"{names} ends with values that are not finite in {bad[0]}"


def bfloat16(strategy: Strategy) -> None:
    """Trains with `precision="bfloat16"`, or refuses with a sentence."""
    try:
        result = _trained(strategy, precision="bfloat16")
    except LayerlabError as refusal:
        raise unittest.SkipTest(f"refused: {refusal}") from None
    except Exception as error:
        raise AssertionError(
            f"under bfloat16 it ends with {reason(error)}; run forward and loss in `run.autocast()`, "
            "take .float() before NumPy, or refuse with a LayerlabError"
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
            _fit([copy.deepcopy(strategy), runs[-1]], _network(strategy), compile=backend or False)
    except LayerlabError as refusal:
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


def pickles(strategy: Strategy) -> None:
    """Travels to another process and has the same settings there."""
    try:
        data = pickle.dumps(strategy)
    except Exception as error:
        raise AssertionError(
            f"it cannot be pickled ({reason(error)}); define its class at the top of an importable "
            "module and keep functions and handles out of its state until `on_fit_start`"
        ) from error
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).model_dump_json())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    answer = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, env=environment)
    lines = answer.stderr.decode(errors="replace").strip().splitlines()
    assert answer.returncode == 0, (
        f"another process cannot unpickle it ({lines[-1] if lines else answer.returncode}); define its class at the "
        "top of an importable module"
    )
    assert answer.stdout.decode().strip() == strategy.model_dump_json(), "its settings are others in another process"


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        settings_round_trip, trains_mlp, trains_cnn, trains_residual, trains_example, deterministic,
        leaves_users_model, final_model, fits_again, hook_calls, resumes, leaves_nothing_behind, metrics_finite,
        composes, bfloat16, compiles, pickles,
    )
}
