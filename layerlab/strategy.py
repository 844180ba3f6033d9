"""The contract: what a training strategy is, which hooks it has, and the `Run` that it shares with `fit`.

A strategy is a pydantic model. Its fields are its settings; its hooks carry the names known from Lightning. A hook
that a strategy does not define is never called, so it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from layerlab.errors import LayerlabError, sentence

if TYPE_CHECKING:
    import pandas as pd


class Batches(Protocol):
    """What a run reads batches from: `layerlab.data.Split`, or anything of this shape that a strategy puts there.

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


class LayerMap(NamedTuple):
    """What a strategy did to each layer, or found out about it, in each epoch.

    Attributes:
        table: layers as index, in forward order (input first), epochs as columns; NaN where there is nothing to say.
        label: what the numbers are, with their unit.
        states: where the numbers are 0, 1, … as names of something: those names.
    """

    table: pd.DataFrame
    label: str
    states: tuple[str, ...] = ()


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


class Strategy(BaseModel):
    """A method that changes how a network is trained. Subclass it; the fields are the settings.

    `name` is the name it is installed, logged and called by: `[a-z0-9-]+`, the same as its entry point's.
    `replaces_network` says that it puts another `run.training_model` and other `run.data` in place between epochs,
    which a strategy that replaces the step does not expect. `changes_structure` says that it removes or reshapes layers
    (`run.restructure`), `follows_layers` that it keeps numbers or tensors about each layer from epoch to epoch, so that
    the layers have to stay what they are. `expected_failed_checks` maps the checks of
    `layerlab.testing` that it is known to fail to the reason.

    State that changes during training lives in pydantic private attributes and is set anew in `on_fit_start`, so that
    one object serves several fits. Whatever of it is needed to go on after an interruption is in `state_dict`, as
    tensors, numbers, strings, lists and dicts (checkpoints are read with `weights_only=True`).

    Raises:
        LayerlabError: a setting that does not exist or does not validate, in one sentence.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)
    name: ClassVar[str] = ""
    replaces_network: ClassVar[bool] = False
    changes_structure: ClassVar[bool] = False
    follows_layers: ClassVar[bool] = False
    expected_failed_checks: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise LayerlabError(sentence(error, type(self).name or type(self).__name__)) from None

    def on_fit_start(self, run: Run) -> None:
        """Once, before the first epoch and again after an interruption: adapt the model, the data, the optimizer."""

    def on_load_checkpoint(self, run: Run) -> None:
        """After an interruption, with `load_state_dict` done and before the weights are loaded.

        A strategy that had changed the network's structure, the data or the optimizer makes the same change again.
        """

    def on_epoch_start(self, run: Run) -> None:
        """Before each epoch; the network is in training mode."""

    def training_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        """Replace the whole step (forward, `run.backward`, update). At most one strategy of a run defines it.

        Args:
            x: images, (batch, channels, height, width), normalised and augmented.
            y: labels, (batch,), int64.

        Returns:
            The batch's mean loss, a scalar; `fit` detaches it.
        """
        raise TypeError(f"{type(self).__name__} does not replace the training step")

    def on_after_backward(self, run: Run) -> None:
        """After each backward: the gradients are there, the optimizer has not stepped."""

    def on_epoch_end(self, run: Run) -> None:
        """After each epoch's last step, before the evaluation."""

    def on_validation_end(self, run: Run) -> None:
        """After each epoch's evaluation, outside the epoch's seconds: for what a strategy evaluates and logs itself."""

    def on_fit_end(self, run: Run) -> None:
        """Once at the end: leave `run.model` as the network that a user deploys."""

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on after an interruption at the end of an epoch."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def rebuild(self, network: nn.Module) -> nn.Module:
        """Give a new network the structure in which this strategy left the one that it trained.

        Called after `load_state_dict` on an object that has seen no fit; the weights are loaded afterwards. A strategy
        that leaves the structure as it was has no need of it.

        Args:
            network: as its builder made it; may be taken over.
        """
        return network

    def layer_maps(self, history: Sequence[Mapping[str, Any]]) -> dict[str, LayerMap]:
        """What to show of a finished fit as layer × epoch maps, by title; none by default.

        Args:
            history: the fit's, `FitResult.history`: one row an epoch with everything that was logged.
        """
        return {}

    @classmethod
    def example_network(cls, shape: tuple[int, int, int], classes: int) -> nn.Module | None:
        """A new small network that this strategy can train, for whatever runs over all strategies, tests say.

        A strategy that takes any network leaves this as it is; one that needs a network of a certain form gives one.

        Args:
            shape: (channels, height, width) of the images.
            classes: logits that the network gives.

        Returns:
            The network, or None for any.
        """
        return None

    def _repr_html_(self) -> str:
        from layerlab import tables

        return tables.strategy_table(self)._repr_html_()

    @classmethod
    def defines(cls, hook: str) -> bool:
        """Whether this strategy has a hook of its own."""
        return getattr(cls, hook) is not getattr(Strategy, hook)


def check_composition(strategies: Iterable[Strategy]) -> None:
    """Refuse strategies that cannot run together.

    Raises:
        LayerlabError: two of them replace the training step, or the network that trains, or one does the one and
            another the other; one changes the structure while another follows its layers; or one is given twice.
    """
    strategies = list(strategies)
    for strategy in strategies:
        if not isinstance(strategy, Strategy):
            raise LayerlabError(f"{strategy!r} is no strategy: pass objects of layerlab.Strategy, such as "
                                "layerlab.strategies(NAME) makes.")
    names = [strategy.name for strategy in strategies]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LayerlabError(f"Strategy {twice[0]!r} is given twice in one fit; give it once.")
    stepping = [strategy.name for strategy in strategies if strategy.defines("training_step")]
    if len(stepping) > 1:
        raise LayerlabError(
            f"Strategies {stepping[0]!r} and {stepping[1]!r} cannot run together: both replace the training step "
            "(hook training_step); use one of them at a time."
        )
    replacing = [strategy.name for strategy in strategies if strategy.replaces_network]
    if len(replacing) > 1:
        raise LayerlabError(
            f"Strategies {replacing[0]!r} and {replacing[1]!r} cannot run together: both replace the network that "
            "trains; use one of them at a time."
        )
    changing = [strategy.name for strategy in strategies if strategy.changes_structure]
    following = [strategy.name for strategy in strategies if strategy.follows_layers]
    if changing and following:
        raise LayerlabError(
            f"Strategies {changing[0]!r} and {following[0]!r} cannot run together: the one removes layers, "
            "the other follows each layer from epoch to epoch; use one of them at a time."
        )
    if replacing and stepping:
        raise LayerlabError(
            f"Strategies {replacing[0]!r} and {stepping[0]!r} cannot run together: the one replaces the network that "
            "trains and its data between epochs, the other the training step; use one of them at a time."
        )
