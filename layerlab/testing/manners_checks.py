"""The checks of what a strategy leaves alone: the user's network and data, torch's switches, other strategies."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr

from layerlab.base.errors import Refused, reason
from layerlab.contract.registry import strategies
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy
from layerlab.testing.networks import CLASSES, SHAPE
from layerlab.testing.trial import BATCH, EPOCHS, digits, logits_of, own_network, train, trained
from layerlab.training.untouched import changed_data, torch_switches


def leaves_users_model(strategy: Strategy) -> None:
    """The user's network object stays unchanged: `fit` trains a copy."""
    model = own_network(strategy)()
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, logits = [module.training for module in model.modules()], logits_of(model)
    trained(strategy, model)
    now = model.state_dict()
    assert state.keys() == now.keys(), "it changes the structure of the user's network; change `run.model` alone"
    changed = [name for name in state if not torch.equal(state[name], now[name])]
    assert not changed, f"it changes {changed[0]!r} of the user's network; change `run.model` alone"
    assert modes == [module.training for module in model.modules()], "it changes the mode of the user's network"
    assert torch.equal(logits, logits_of(model)), (
        "the user's network computes something else afterwards; patch modules of `run.model`, never their classes"
    )


def final_model(strategy: Strategy) -> None:
    """The network that is left gives one logit a class, and its saved state holds all that it needs."""
    model = trained(strategy).model
    logits = logits_of(model)
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
    assert torch.equal(logits, logits_of(again)), (
        "a network that loads the final one's state_dict gives other logits; keep what it computes with in parameters "
        "and buffers"
    )


def leaves_nothing_behind(strategy: Strategy) -> None:
    """No hooks, modes, gradients or changed `requires_grad` are left."""
    model = own_network(strategy)()
    *_, (kept, parameter) = model.named_parameters()
    parameter.requires_grad_(False)
    result = trained(strategy, model)
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


def global_switches(strategy: Strategy) -> None:
    """Torch's global settings and the environment's variables are as they were."""
    before = _switches()
    trained(strategy)
    after = _switches()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"it leaves {', '.join(changed)} changed; put back what it sets"


def _switches() -> dict[str, Any]:
    """Name of a global setting → its value."""
    return torch_switches() | {"the environment's variables": dict(os.environ)}


def data_untouched(strategy: Strategy) -> None:
    """The user's images and labels stay unchanged: a strategy puts other data into `run.data`."""
    data = digits()
    job, _ = train([copy.deepcopy(strategy)], own_network(strategy), data=data)
    # The fit lends its strategies the data: what they write into is a copy of theirs.
    changed = changed_data(data, job.data)
    assert not changed, f"it changes the {changed} of the user's data; put other data into `run.data`, or change a copy"


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

    def on_train_batch_start(self, run: Run) -> None:
        """Note it."""
        self._calls.append("on_train_batch_start")

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
    except Refused:
        _hook_calls(strategy, _Recorder(), _Later())


def _hook_calls(strategy: Strategy, before: _Recorder, after: _Recorder) -> None:
    train([before, copy.deepcopy(strategy), after], own_network(strategy))
    steps = len(digits().train) // BATCH
    for recorder in (before, after):
        wanted = ["on_fit_start"]
        for epoch in range(1, EPOCHS + 1):
            step = ["on_train_batch_start"] + ["on_after_backward"] * recorder.defines("on_after_backward")
            wanted += ["on_epoch_start", *(step * steps), f"on_epoch_end at step {epoch * steps}", "on_validation_end"]
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
        network = own_network(strategy if own else other)
        for pair in ((strategy, other), (other, strategy)):
            names = " then ".join(type(each).name for each in pair)
            try:
                result = train([copy.deepcopy(each) for each in pair], network)[1]
            except Refused:
                continue
            except Exception as error:
                raise AssertionError(
                    f"{names} ends with {reason(error)}; raise layerlab.Refused where it cannot work, "
                    "and expect gradients that are None and modules that are frozen"
                ) from error
            assert result is not None
            bad = [name for name, value in result.model.state_dict().items()
                   if value.is_floating_point() and not value.isfinite().all()]
            assert not bad, f"{names} ends with values that are not finite in {bad[0]}"
