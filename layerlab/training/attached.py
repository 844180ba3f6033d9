"""attach(): strategies in a training loop of the user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from layerlab.base.devices import kept_random_states
from layerlab.base.errors import LayerlabError, Refused, located
from layerlab.contract.preflight import Preflight
from layerlab.contract.strategy import Strategy, check_composition, preflights
from layerlab.training.attached_run import AttachedRun, Row, needs_fit
from layerlab.training.fit import Strategies, chosen
from layerlab.training.settings import describe
from layerlab.training.state_file import check_storable

# What is attached to which optimizer, to tell a second time.
_ATTACHED: WeakKeyDictionary[torch.optim.Optimizer, ref[Attached]] = WeakKeyDictionary()
Autocast = Callable[[], AbstractContextManager[Any]]


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    strategies: Strategies,
    *,
    example: Tensor,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    autocast: Autocast | None = None,
) -> Attached:
    """Let strategies act in a training loop of your own, with the same weights as in `fit` under the same seed.

    Five lines of a loop are layerlab's: this call, and the four methods of what it returns.

    Args:
        model: your network, on its device; it is changed in place.
        optimizer: yours, over its parameters.
        strategies: one or several, or the names of installed ones. A strategy that replaces the training step, the
            network or the data needs `fit`, and says so.
        example: one batch's input as the network takes it, such as images (batch, channels, height, width).
        epochs, steps, batch_size, schedule, loss: how many epochs the training has and how many optimizer steps an
            epoch, the examples a step, your learning-rate schedule, your loss. Leave them out until a strategy that
            reads one asks for it.
        generator: the one behind your shuffling, for a strategy that draws from it as in `fit`. Default: one with
            torch's present seed.
        autocast: your loop's mixed precision, such as `lambda: torch.autocast("cuda", torch.bfloat16)`; `forward()`
            enters it for you.

    Returns:
        The strategies at work.

    Raises:
        Refused: a strategy that needs `fit`, or cannot train this network, or asks for what is left out.

    Example:
        >>> import torch
        >>> from layerlab import attach, build_model
        >>> model = build_model("resnet-cifar", num_classes=10, channels=1, depth=8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
        >>> attached = attach(model, optimizer, "lars-skip", example=images)
        >>> for epoch in range(2):
        ...     with attached.epoch():
        ...         optimizer.zero_grad()
        ...         with attached.forward():
        ...             loss = torch.nn.functional.cross_entropy(model(images), labels)
        ...         loss.backward()
        ...         attached.after_backward()
        ...         optimizer.step()
        >>> attached.finish()
        >>> [row["lars-skip/skipped_layers"] for row in attached.history]
        [0.0, 7.0]
    """
    # Long because its docstring names every argument, with an example.
    given = tuple(copy.deepcopy(each) for each in chosen(strategies))
    check_composition(given)
    for strategy in given:
        if why := needs_fit(strategy):
            raise Refused(why)
    output = _checked(model, optimizer, example)
    run = AttachedRun(
        model=model, training_model=model, optimizer=optimizer, schedule=schedule, loss=loss,  # type: ignore[arg-type]
        data=None, test_data=None, epochs=epochs, batch_size=batch_size,  # type: ignore[arg-type]
        steps_per_epoch=steps, example=example[:2].detach(), device=example.device,  # type: ignore[arg-type]
        generator=generator or torch.Generator().manual_seed(torch.initial_seed()), autocast=autocast or nullcontext,
    )
    run.after_backward = [each.on_after_backward for each in given if each.defines("on_after_backward")]
    # A pre-flight rehearses steps with a loss of classes, for which other outputs than logits are no use.
    if isinstance(output, Tensor) and output.dim() == 2:
        run.preflights = preflights(given, model, run.example)
    return Attached(run, given)


def _checked(model: nn.Module, optimizer: torch.optim.Optimizer, example: Tensor) -> Any:
    """What the network gives for two examples, without a trace of the pass.

    Raises:
        Refused: no network, optimizer or tensor; an optimizer of another network; an example that does not fit.
    """
    if not isinstance(model, nn.Module):
        raise Refused(f"model must be an nn.Module, got {type(model).__name__}.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise Refused(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    if not isinstance(example, Tensor) or not len(example):
        raise Refused("example must be one batch's input, a tensor such as images (batch, channels, height, width), "
                      f"got {type(example).__name__}.")
    if optimizer in _ATTACHED:
        raise Refused("Strategies are attached to this optimizer already; give all of them in one call, or call "
                      "detach() of the earlier ones first.")
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(model.parameters()):
        raise Refused("The optimizer holds none of the network's parameters; make it of model.parameters().")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with kept_random_states(example.device), torch.no_grad():
            return model(example[:2])
    except Exception as error:  # torch's, or the network's own
        raise Refused(f"The network does not take the example of shape {tuple(example.shape)} ({located(error)}); give "
                      "a batch's input as your loop gives it.") from error
    finally:
        for module, mode in modes.items():
            module.training = mode


class Attached:
    """Strategies at work in a loop of your own; `layerlab.attach` makes it.

    Attributes:
        run: what the strategies share; `run.epoch` counts the epochs.
        strategies: copies of those that were given, with their state.

    Example:
        >>> import torch
        >>> from layerlab import Strategy, attach
        >>> model = torch.nn.Linear(4, 2)
        >>> attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), (), example=torch.zeros(1, 4))
        >>> with attached.epoch():
        ...     pass
        >>> attached.history
        [{'epoch': 1}]
    """

    def __init__(self, run: AttachedRun, strategies: Sequence[Strategy]) -> None:
        self.run = run
        self.strategies = tuple(strategies)
        self._over, self._within, self._in_forward = False, False, False
        # Of the present step: whether it has begun, ran within `forward`, and had its hooks after backward.
        self._begun = self._forwarded = self._hooked = False
        self._uncounted = False
        optimizer = run.optimizer
        scheduled = run.told("schedule") is not None or hasattr(optimizer.step, "_wrapped_by_lr_sched")
        mine, precision = run.told("schedule"), run.autocast
        self._parts = run.parts
        _ATTACHED[optimizer] = ref(self)
        self._handles = [optimizer.register_step_pre_hook(lambda *_: self._count()),
                         optimizer.register_step_post_hook(lambda *_: self._after_step())]
        try:
            self._call("on_fit_start")
            self._schedules = run.told("schedule") is not mine
            if self._schedules and scheduled:
                raise Refused(f"{self._names} brings a learning-rate schedule of its own, and yours steps the same "
                              "rates; leave yours out.")
        except BaseException:
            self.detach()
            raise
        self._own_precision = run.autocast is not precision

    @property
    def _names(self) -> str:
        return " + ".join(strategy.name for strategy in self.strategies) or "attach"

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row for each finished epoch, with what the strategies logged."""
        return self.run.history

    @property
    def preflights(self) -> dict[str, Preflight]:
        """What each strategy said of the network, by its name; empty where the network gives no logits."""
        return self.run.preflights

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """One epoch of training: `with attached.epoch(): …` around its steps; evaluate before or after.

        Raises:
            LayerlabError: as the strategies; an epoch that is not over; one after `finish`.
        """
        run = self.run
        if self._over:
            raise Refused("finish() has ended this training; attach again.")
        if self._within:
            raise Refused("The last epoch is not over: leave its block first, or load a state after an error in it.")
        if not run.model.training:
            run.model.train()
        run.epoch += 1
        run.logged = {}
        self._within, self._begun, self._forwarded, self._hooked = True, False, False, False
        run.apply_freezing()
        self._call("on_epoch_start")
        if not any(parameter.requires_grad for parameter in run.model.parameters()):
            raise Refused(f"{self._names} lets nothing learn in epoch {run.epoch}, where loss.backward() fails; it "
                          "needs fit, which leaves such steps out.")
        yield
        self._count()
        self._call("on_epoch_end")
        if self._schedules and run.schedule_each == "epoch":
            run.schedule.step()
        self._call("on_validation_end")
        run.history.append(Row({"epoch": run.epoch, **run.logged}))
        self._within = False

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Forward pass and loss, in training and in evaluation: in the precision that the strategies want.

        Call `loss.backward()` behind the block. With several blocks before one update, the first begins the step.
        """
        run = self.run
        if self._within and run.model.training:
            if any(module.training and getattr(module, "running_mean", None) is not None for module in run.frozen):
                run.apply_freezing()  # model.train() came in between
            self._count()
            if not self._begun:
                self._begun = True
                self._call("on_train_batch_start")
            self._forwarded = True
        if self._own_precision and torch.is_autocast_enabled(run.device.type):
            raise Refused(f"{self._names} and torch.autocast both decide what forward computes in; leave autocast out.")
        self._in_forward = True
        try:
            with run.autocast():
                yield
        finally:
            self._in_forward = False

    def after_backward(self) -> None:
        """Once for each update, when the gradients of the whole step are there: before clipping and `optimizer.step()`.

        With a gradient scaler call it after `scaler.unscale_(optimizer)`.

        Raises:
            LayerlabError: as the strategies; called outside of an epoch, or within `forward`.
        """
        if not self._within:
            raise Refused("after_backward() belongs into the block of `with attached.epoch():`.")
        if self._in_forward:
            raise Refused("after_backward() belongs behind the block of `with attached.forward():`.")
        self._count()
        self._check_forward()
        for hook in self.run.after_backward:
            self.run.asking = getattr(getattr(hook, "__self__", None), "name", "")
            hook(self.run)
            self.run.check_parts(self._parts)
        self._hooked, self._begun = True, False

    def finish(self) -> None:
        """After the last epoch: let the strategies leave the network that is deployed, and thaw it.

        Raises:
            LayerlabError: as the strategies; within an epoch.
        """
        if self._within:
            raise Refused("finish() belongs behind the block of the last epoch.")
        if self._over:
            return
        self._call("on_fit_end")
        self.detach()

    def detach(self) -> None:
        """Leave the loop to itself, for example after an error: everything thaws, no strategy has its last hook."""
        for handle in self._handles:
            handle.remove()
        self.run.thaw()
        _ATTACHED.pop(self.run.optimizer, None)
        self._over, self._within = True, False

    def state_dict(self) -> dict[str, Any]:
        """What the strategies need to go on, between two epochs; keep it beside the network's and optimizer's states.

        Raises:
            LayerlabError: within an epoch; or a strategy's state that no file gives back.
        """
        if self._within:
            raise Refused("A strategy's state is whole between epochs alone; save behind the block of the epoch.")
        run = self.run
        names = {parameter: name for name, parameter in run.model.named_parameters()}
        states = {each.name: each.state_dict() for each in self.strategies}
        for name, state in states.items():
            check_storable(f"The state of strategy {name!r}", state, "let its state_dict give")
        return copy.deepcopy({
            "settings": {each.name: describe(each) for each in self.strategies},
            "strategies": states,
            "epoch": run.epoch,
            "step": run.step,
            "history": [dict(row) for row in run.history],
            "generator": run.generator.get_state(),
            "generators": {name: each.get_state() for name, each in run.generators.items()},
            "kept": {owner: {names[parameter]: each.detach() for parameter, each in kept.items()}
                     for owner, kept in run.kept.items()},
            "schedule": run.schedule.state_dict() if self._schedules else {},
        })

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`: attach as before, then load the states of network, optimizer and this, in any order.

        Raises:
            Refused: it belongs to other strategies or settings, or is no such state.
        """
        run = self.run
        settings = {each.name: describe(each) for each in self.strategies}
        if not isinstance(state, dict) or "settings" not in state:
            raise Refused("This is no state of attached strategies; give what Attached.state_dict() returned.")
        if state["settings"] != settings:
            raise Refused(f"The state belongs to {state['settings']}, and attached is {settings}; attach the same.")
        for strategy in self.strategies:
            strategy.load_state_dict(copy.deepcopy(state["strategies"][strategy.name]))
        run.epoch, run.step, run.history = state["epoch"], state["step"], [Row(row) for row in state["history"]]
        self._call("on_load_checkpoint")
        named = dict(run.model.named_parameters())
        run.kept = {owner: {named[name]: each.to(run.device, copy=True) for name, each in kept.items()}
                    for owner, kept in state["kept"].items()}
        if self._schedules:
            run.schedule.load_state_dict(state["schedule"])
        run.generator.set_state(state["generator"].cpu())
        for name, each in state["generators"].items():
            run.generator_for(name).set_state(each.cpu())
        self._within = False

    def _call(self, hook: str) -> None:
        """One hook of every strategy that defines it.

        Raises:
            LayerlabError: as the strategy; or the strategy has replaced the network, for example.
        """
        run = self.run
        for strategy in self.strategies:
            if strategy.defines(hook):
                run.asking = strategy.name
                getattr(strategy, hook)(run)
                run.check_parts(self._parts)

    def _check_forward(self) -> None:
        """Refuse a step whose forward pass the strategies did not see, where they have to."""
        wanted = self._own_precision or any(each.defines("on_train_batch_start") for each in self.strategies)
        if wanted and not self._forwarded:
            raise Refused(f"{self._names} acts in the forward pass too; put `with attached.forward():` around the "
                          "forward pass and the loss.")

    def _after_step(self) -> None:
        """The optimizer has stepped."""
        if not self._within:
            raise LayerlabError("The optimizer stepped outside of an epoch, where the strategies did not act; put the "
                                "steps into `with attached.epoch():`.")
        if self.run.after_backward and not self._hooked:
            raise LayerlabError(f"The optimizer stepped, and {self._names} did not see the gradients; call "
                                "attached.after_backward() between loss.backward() and optimizer.step().")
        self._check_forward()
        self._begun = self._forwarded = self._hooked = False
        self._uncounted = True

    def _count(self) -> None:
        """Count the step that is over; not within the optimizer's, where strategies may have hooks as well."""
        if not self._uncounted:
            return
        self._uncounted = False
        self.run.step += 1
        if self._schedules and self.run.schedule_each == "step":
            self.run.schedule.step()
