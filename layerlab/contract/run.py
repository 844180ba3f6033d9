"""The `Run` that `fit` shares with its strategies, and what a strategy may put into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from layerlab.base.errors import LayerlabError
from layerlab.contract.preflight import Preflight


class Batches(Protocol):
    """What a run reads batches from: `layerlab.Split`, or anything of this shape that a strategy puts there.

    What a strategy puts there may have `resident_bytes`, the memory that it takes: it counts to the run's peak.
    """

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def batches(
        self, batch_size: int, generator: torch.Generator | None, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> Iterator[tuple[Tensor | tuple[Tensor, ...], Tensor]]:
        """One pass: shuffled and augmented from `generator`, dropping the uneven rest, or in order without one.

        What a batch gives to the network is one tensor, or a tuple of them for a training network that takes several.
        """
        ...


class Replaced(NamedTuple):
    """A parameter that took the place of another one.

    Attributes:
        old, new: the parameters.
        carry: from a tensor of the old one's shape, its momentum say, the same of the new one's; None if there is none.
    """

    old: nn.Parameter
    new: nn.Parameter
    carry: Callable[[Tensor], Tensor] | None


class Wire(Protocol):
    """How gradients travel between workers: whatever communicates them encodes, sends both parts, and decodes.

    A gradient is about `codes × 2**exponent`. Codes of equal exponents may be added as they are, in wider integers.
    """

    def encode(self, name: str, gradient: Tensor) -> tuple[Tensor, int]:
        """(codes, exponent) of the gradient of the parameter called `name`: integers of the gradient's shape."""
        ...

    def decode(self, codes: Tensor, exponent: int) -> Tensor:
        """The gradient that the codes stand for, float32."""
        ...


@dataclass(eq=False)
class Run:
    """The one mutable thing that `fit` and its strategies share.

    Attributes:
        model: the network that predicts and that a user deploys.
        training_model: the network that trains. The same object as `model` unless a strategy separates the two.
        optimizer: holds every parameter of `model`, frozen or not; a frozen one has no gradient and is skipped.
        schedule: the learning-rate schedule; `fit` steps it. A strategy with rates of its own puts its schedule there
            in `on_fit_start`, after it has split the optimizer's parameters into groups if it needs several.
        schedule_each: how often `fit` steps it, `epoch` or `step`; whoever puts a schedule there says so.
        data: where the training batches come from. A strategy may replace it between epochs.
        test_data: what `model` is evaluated on after each epoch.
        loss: maps (logits, labels) to a scalar.
        example: one training batch's images as the network sees them, shape (batch, channels, height, width).
        epochs: the number of epochs of the whole run.
        epoch: the current epoch, counted from 1; 0 before the first.
        step: optimizer steps taken so far, over all epochs.
        steps_per_epoch: optimizer steps in the current epoch.
        device: where model and data are.
        generator: the CPU generator behind shuffling and augmentation; its initial seed is the fit's.
        folder: where the fit's checkpoint lies and a strategy may keep what it can make again; None without one.
        history: one row an epoch of everything logged, including `logged` of the epochs that are finished.
        logged: what strategies logged in the current epoch.
        autocast: gives the context in which forward and loss run, in training and in evaluation.
        batch_size: images a step.
        after_backward: every strategy's `on_after_backward`, as `backward` calls them.
        wire: how gradients travel where a strategy says so; None: as they are.
        preflights: what each strategy said before the first step, by its name.
    """

    model: nn.Module
    training_model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    data: Batches
    test_data: Batches
    loss: Callable[[Tensor, Tensor], Tensor]
    example: Tensor
    epochs: int
    device: torch.device
    generator: torch.Generator
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    folder: Path | None = None
    batch_size: int = 0
    schedule_each: Literal["epoch", "step"] = "epoch"
    epoch: int = 0
    step: int = 0
    steps_per_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    logged: dict[str, float] = field(default_factory=dict)
    after_backward: list[Callable[[Run], None]] = field(default_factory=list)
    wire: Wire | None = None
    preflights: dict[str, Preflight] = field(default_factory=dict)
    _frozen: dict[str, set[nn.Module]] = field(default_factory=dict)
    _stopped: list[nn.Parameter] = field(default_factory=list)

    def log(self, name: str, value: float) -> None:
        """Log a number for the current epoch, by convention as `strategy/what`; the last value in an epoch counts."""
        self.logged[name] = float(value)

    def freeze(self, owner: str, modules: Iterable[nn.Module]) -> None:
        """Make `modules` all that `owner` keeps frozen from now on; an empty set thaws what it had frozen.

        A frozen module's parameters get no gradient, so the optimizer leaves them, their momentum and their decay
        alone, and backward ends where nothing further towards the input learns. Its batch-norm statistics stand still
        too. Several owners' sets add up. Parameters that the user froze beforehand are never touched.
        """
        self._frozen[owner] = {inner for module in modules for inner in module.modules()}
        self.apply_freezing()

    @property
    def frozen(self) -> set[nn.Module]:
        """Every module that some strategy keeps frozen at present."""
        return set().union(*self._frozen.values()) if self._frozen else set()

    def apply_freezing(self) -> None:
        """Put `requires_grad` and the batch norms' modes where `frozen` wants them, as `fit` does after train()."""
        for parameter in self._stopped:
            parameter.requires_grad_(True)
        self._stopped.clear()
        frozen = self.frozen
        for module in self.training_model.modules():
            tracks = getattr(module, "running_mean", None) is not None
            if module not in frozen:
                if tracks and self.training_model.training:
                    module.train()
                continue
            if tracks:
                module.eval()
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._stopped.append(parameter)

    def restructure(self, model: nn.Module, replaced: Iterable[Replaced] = ()) -> None:
        """Let `model` be the network from now on: the one that there was with a changed structure, or another.

        Everything that refers to parameters follows: the optimizer holds exactly those of `model`, in its order, each
        in the group of the one whose place it took, with its state; what was frozen stays frozen and is thawed by
        whoever froze it. The optimizer stays the same object, and with it the schedule.

        Args:
            model: the changed network.
            replaced: (old, new, carry) of every parameter that took another's place, in the order in which that
                happened; a parameter replaced twice stands there twice. `carry` makes the new one's state of a tensor
                of the old one's shape (momentum, say); None starts it anew. Parameters that are in both networks need
                no entry; new ones join the first group.

        Raises:
            LayerlabError: another strategy trains another network than the one that predicts.
        """
        if self.training_model is not self.model:
            raise LayerlabError(
                "The network's structure cannot change while another strategy trains a part of it; use one of the two."
            )
        groups, state = self.optimizer.param_groups, self.optimizer.state
        place = {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
        stopped = set(self._stopped)
        for old, new, carry in replaced:
            place[new] = place.get(old, 0)
            new.requires_grad_(old.requires_grad)
            if old in stopped:
                stopped.add(new)
            if carry is not None and old in state:
                state[new] = {
                    key: carry(value) if isinstance(value, Tensor) and value.shape == old.shape else value
                    for key, value in state[old].items()
                }
        parameters = list(model.parameters())
        for index, group in enumerate(groups):
            group["params"] = [parameter for parameter in parameters if place.get(parameter, 0) == index]
        alive = set(parameters)
        for parameter in [each for each in state if each not in alive]:
            del state[parameter]
        self._stopped = [parameter for parameter in parameters if parameter in stopped]
        self.model = self.training_model = model

    def plain_step(self, x: Tensor | tuple[Tensor, ...], y: Tensor) -> Tensor:
        """The step of a run in which no strategy replaces it: forward, `backward`, update.

        Args:
            x, y: as `Strategy.training_step`, or as `data` gives them.

        Returns:
            The batch's mean loss.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.loss(self.training_model(x), y)
        self.backward(loss)
        self.optimizer.step()
        return loss

    def backward(self, loss: Tensor) -> None:
        """Backward from `loss`, then every strategy's `on_after_backward`: for a strategy that replaces the step."""
        loss.backward()
        for hook in self.after_backward:
            hook(self)
