"""The `Run` that `fit` shares with its strategies, and what a strategy may put into it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from layerlab.base.errors import LayerlabError
from layerlab.base.trees import chunks, count
from layerlab.contract.agreement import check_agreement
from layerlab.contract.preflight import Preflight
from layerlab.contract.wire import Wire


class Batches(Protocol):
    """The source of a run's batches: a `layerlab.Split`, or an object with the same methods that a strategy puts there.

    What a strategy puts there may have `resident_bytes`, the memory that it takes: it counts to the run's peak.

    Example:
        >>> import torch
        >>> from layerlab import load_dataset
        >>> split = load_dataset("digits", limit=100, device="cpu").train
        >>> x, y = next(split.batches(32, None, torch.float32, torch.contiguous_format))
        >>> tuple(x.shape), tuple(y.shape)
        ((32, 1, 8, 8), (32,))
    """

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def batches(
        self, batch_size: int, generator: torch.Generator | None, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> Iterator[tuple[Any, Any]]:
        """One pass: shuffled and augmented from `generator`, dropping the uneven rest, or in order without one.

        What a batch gives to the network is one tensor, or a tuple of them for a training network that takes several;
        data of the user's own may give dicts, and no labels.
        """
        ...


class Replaced(NamedTuple):
    """A parameter that took the place of another one.

    Attributes:
        old, new: the parameters.
        carry: maps a tensor shaped like `old` (its momentum, for example) to one shaped like `new`; None if there is
            none.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from layerlab import Replaced
        >>> old, new = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2, 3))
        >>> pruned = Replaced(old, new, lambda momentum: momentum[:2])
        >>> pruned.carry(torch.zeros(4, 3)).shape
        torch.Size([2, 3])
    """

    old: nn.Parameter
    new: nn.Parameter
    carry: Callable[[Tensor], Tensor] | None


@dataclass(eq=False)
class Run:
    """The one mutable thing that `fit` and its strategies share.

    Attributes:
        model: the network that predicts and that a user deploys.
        training_model: the network that trains. The same object as `model` unless a strategy separates the two.
        optimizer: holds every parameter of `model`, frozen or not; a frozen one has no gradient and is skipped.
        schedule: the learning-rate schedule; `fit` steps it. A strategy with rates of its own puts its schedule there
            in `on_fit_start`, after it has split the optimizer's parameters into groups if it needs several.
        schedule_each: how often `fit` steps it, `epoch` or `step`; set it together with `schedule`.
        data: where the training batches come from. A strategy may replace it between epochs.
        test_data: what `model` is evaluated on after each epoch.
        loss: maps (logits, labels), or (model, batch), to a scalar.
        objective: maps (a network, x, y) of a batch to the loss, forward included, for every form of batches and loss.
        example: what a batch gives to the network: images, (batch, channels, height, width), or any other tensor, or a
            tuple or dict of tensors.
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
        wire: encoder for gradients sent between workers; None sends them unencoded.
        preflights: what each strategy said before the first step, by its name.
        spent_flops: what strategies computed outside the steps of the current epoch, see `spend`.
        measures_anew: whether a strategy has called `remeasure` since the last step.
        memory_format: of the images that batches give to the network.
        clip_norm: `backward` shortens the gradients of all parameters together to this norm; None leaves them.
        scaler: of the loss, under float16; `backward` scales and unscales with it.
        accumulate: parts in which `plain_step` computes its batch's gradient.
        kept: by its keeper's name, a tensor of its own shape for each of some parameters, such as an average. A change
            of structure carries them along, and a checkpoint holds them.
        generators: what `generator_for` made, by name; a checkpoint holds their states.

    Example:
        >>> from layerlab import Strategy, build_model, fit, load_dataset
        >>> class Watch(Strategy):
        ...     name = "watch"
        ...     def on_epoch_end(self, run):
        ...         run.log("watch/steps", run.step)
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
        >>> fit(network, data, Watch(), epochs=2, batch_size=64, progress=False).final["watch/steps"]
        8.0
    """

    model: nn.Module
    training_model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    data: Batches
    test_data: Batches
    loss: Callable[..., Tensor]
    # A tensor, unless data of the user's own give something else, which strategies refuse that need one.
    example: Any
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
    spent_flops: float = 0.0
    measures_anew: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    clip_norm: float | None = None
    scaler: torch.amp.GradScaler | None = None
    accumulate: int = 1
    kept: dict[str, dict[nn.Parameter, Tensor]] = field(default_factory=dict)
    generators: dict[str, torch.Generator] = field(default_factory=dict)
    objective: Callable[[nn.Module, Any, Any], Tensor] = field(default=None)  # type: ignore[assignment]
    _frozen: dict[str, set[nn.Module]] = field(default_factory=dict)
    _stopped: list[nn.Parameter] = field(default_factory=list)
    _stilled: list[nn.Module] = field(default_factory=list)
    _left_out: set[nn.Parameter] = field(init=False)
    _besides: set[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        own = set(self.model.parameters())
        held = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        # What the user's optimizer does not train, and what it trains besides the network (a loss, say).
        self._left_out, self._besides = own - held, held - own
        if self.objective is None:
            self.objective = lambda network, x, y: self.loss(network(x), y)

    def log(self, name: str, value: float) -> None:
        """Log a number for the current epoch, by convention as `strategy/what`; the last value in an epoch counts."""
        self.logged[name] = float(value)

    def remeasure(self) -> None:
        """Measure what the next step costs, and let it stand for those after it.

        Call it when a strategy changes the cost of a step in the middle of an epoch; between epochs layerlab measures
        anew by itself. Each call makes one step slow. A strategy that calls it at every step has all of them measured.

        Example:
            >>> from layerlab import Strategy, build_model, fit, load_dataset
            >>> class Halfway(Strategy):
            ...     name = "halfway"
            ...     def on_after_backward(self, run):
            ...         if run.step == 1:
            ...             run.freeze(self.name, list(run.model.children())[:-1])
            ...             run.remeasure()
            >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
            >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
            >>> first, second = fit(network, data, Halfway(), epochs=2, batch_size=64, progress=False).history
            >>> first["cost/backward_flops"] > second["cost/backward_flops"]
            True
        """
        self.measures_anew = True

    def spend(self, flops: float) -> None:
        """Count what a strategy computes outside the steps of the current epoch, such as features that it stores.

        It counts to the epoch's `cost/forward_flops`, and so to the budget of plain training of the same cost.

        Args:
            flops: two a multiply-accumulate.
        """
        self.spent_flops += flops

    def generator_for(self, name: str) -> torch.Generator:
        """Random numbers of a strategy's own, which disturb neither shuffling nor dropout nor other strategies.

        They follow from the run's seed and the name alone; other random numbers and the device do not matter. A resumed
        run continues where it was interrupted.

        Args:
            name: the strategy's, by convention; the same name gives the same generator, which is on the CPU.

        Example:
            >>> import torch
            >>> from layerlab import Strategy, build_model, fit, load_dataset
            >>> class Draws(Strategy):
            ...     name = "draws"
            ...     def on_epoch_start(self, run):
            ...         run.log("draws/number", torch.rand((), generator=run.generator_for(self.name)))
            >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
            >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
            >>> results = [fit(network, data, each, epochs=1, progress=False) for each in ((), Draws())]
            >>> results[0].final["train/loss"] == results[1].final["train/loss"]
            True
        """
        if name not in self.generators:
            text = f"{self.generator.initial_seed()}/{name}"
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
            self.generators[name] = torch.Generator().manual_seed(seed)
        return self.generators[name]

    def freeze(self, owner: str, modules: Iterable[nn.Module]) -> None:
        """Make `modules` all that `owner` keeps frozen from now on; an empty set thaws what it had frozen.

        A frozen module's parameters get no gradient, so the optimizer leaves them, their momentum and their decay
        alone, and backward ends where no layer nearer the input learns. Its batch-norm statistics do not change
        either. Several owners' sets add up. layerlab never touches parameters that the user froze before.
        """
        self._frozen[owner] = {inner for module in modules for inner in module.modules()}
        self.apply_freezing()

    def thaw(self) -> None:
        """Let everything learn again that strategies keep frozen; `fit` does so at the end."""
        self._frozen.clear()
        self.apply_freezing()

    @property
    def frozen(self) -> set[nn.Module]:
        """Every module that some strategy keeps frozen at present."""
        return set().union(*self._frozen.values()) if self._frozen else set()

    @property
    def frozen_by_user(self) -> set[nn.Module]:
        """Every module with parameters of its own that were all frozen before the fit: no strategy ever thaws them."""
        stopped = set(self._stopped)
        found = set()
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad or parameter in stopped for parameter in own):
                found.add(module)
        return found

    def apply_freezing(self) -> None:
        """Set `requires_grad` and the batch norms' modes as `frozen` demands; `fit` does so after train().

        A parameter that several modules share learns until all of them are frozen. Batch norms that the user put into
        evaluation mode stay in it.
        """
        for parameter in self._stopped:
            parameter.requires_grad_(True)
        for module in self._stilled:
            module.train(self.training_model.training)
        self._stopped.clear()
        self._stilled.clear()
        frozen = self.frozen
        learning: set[nn.Parameter] = set()
        for module in self.training_model.modules():
            if module not in frozen:
                learning.update(module.parameters(recurse=False))
        for module in self.training_model.modules():
            if module not in frozen:
                continue
            if module.training and getattr(module, "running_mean", None) is not None:
                module.eval()
                self._stilled.append(module)
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and parameter not in learning:
                    parameter.requires_grad_(False)
                    self._stopped.append(parameter)

    def restructure(
        self, model: nn.Module, replaced: Iterable[Replaced] = (), *, group: int = 0, exact: bool = False
    ) -> None:
        """Let `model` be the network from now on: the one that there was with a changed structure, or another.

        Everything that refers to parameters follows. Optimizer and schedule stay the same objects. Each parameter takes
        the place of the one that it replaces in the optimizer's groups, with its state; parameters without a
        predecessor stand at the end. Parameters that the user's optimizer leaves out stay out, and so do those that
        replace them. Frozen parameters stay frozen until the strategy that froze them thaws them.

        Args:
            model: the changed network.
            replaced: (old, new, carry) of every parameter that took another's place, in the order in which that
                happened; a parameter replaced twice stands there twice. `carry` maps a tensor shaped like the old one
                (its momentum, for example) to one shaped like the new one; None starts the state anew. Parameters
                that are in both networks need no entry.
            group: the optimizer's group that parameters without a predecessor join.
            exact: the change is meant to change no output; it is checked with `same_outputs`. `model` is then another
                object than the network that there was.

        Raises:
            LayerlabError: another strategy trains another network than the one that predicts; or the change is meant
                to be exact and is not.
        """
        if self.training_model is not self.model:
            raise LayerlabError(
                "The network's structure cannot change while another strategy trains a part of it; use one of the two."
            )
        if exact and model is self.model:
            raise LayerlabError("An exact change is compared with the network as it was; change a copy of `run.model`.")
        if exact:
            self.same_outputs(self.model, model)
        places = self._places()
        stopped = set(self._stopped)
        for old, new, carry in replaced:
            new.requires_grad_(old.requires_grad)
            for those in (self._left_out, stopped):
                if old in those:
                    those.add(new)
            if old in places:
                places[new] = places[old]
            self._carry_state(old, new, carry)
        parameters = list(model.parameters())
        self._hold(parameters, places, group)
        self._stopped = [parameter for parameter in parameters if parameter in stopped]
        alive = set(parameters)
        for owner, kept in self.kept.items():
            self.kept[owner] = {parameter: each for parameter, each in kept.items() if parameter in alive}
        self.model = self.training_model = model

    def _places(self) -> dict[nn.Parameter, tuple[int, int]]:
        """(group, place in it) of everything that the optimizer holds."""
        found = {}
        for index, group in enumerate(self.optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                found[parameter] = index, place
        return found

    def _carry_state(self, old: nn.Parameter, new: nn.Parameter, carry: Callable[[Tensor], Tensor] | None) -> None:
        """Give the new parameter what the optimizer and others keep of the old one."""
        state = self.optimizer.state
        for kept in self.kept.values():
            mine = kept.pop(old, None)
            if mine is not None and carry is not None:
                kept[new] = carry(mine)
        if carry is None or old not in state:
            return
        state[new] = {}
        for key, value in state[old].items():
            fits = isinstance(value, Tensor) and value.shape == old.shape
            state[new][key] = carry(value) if fits else value

    def _hold(
        self, parameters: list[nn.Parameter], places: dict[nn.Parameter, tuple[int, int]], group: int
    ) -> None:
        """Let the optimizer hold a network's parameters, in the places that are known, and forget all others."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        known = [each for each in places if each in self._besides]
        end = len(places)
        for parameter in parameters:
            if parameter not in places and parameter not in self._left_out:
                places[parameter] = group, end
            if parameter in places:
                known.append(parameter)
        known.sort(key=lambda each: places[each][1])
        for index, own in enumerate(groups):
            own["params"] = [parameter for parameter in known if places[parameter][0] == index]
        alive = set(known)
        for gone in [each for each in state if each not in alive]:
            del state[gone]

    @property
    def held(self) -> list[list[str]]:
        """Names of the parameters in each of the optimizer's groups, in their order; '' for one of another network."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [[names.get(parameter, "") for parameter in group["params"]] for group in self.optimizer.param_groups]

    def hold(self, held: list[list[str]]) -> None:
        """Put the optimizer's parameters into the order in which `held` was taken.

        After an interruption all changes of structure are made at once, which may leave them in another order than
        one after the other; and the optimizer finds each one's state by its place.
        """
        named = dict(self.model.named_parameters())
        own = set(named.values())
        for group, names in zip(self.optimizer.param_groups, held, strict=True):
            others = iter([parameter for parameter in group["params"] if parameter not in own])
            group["params"] = [named[name] if name else next(others) for name in names]

    def same_outputs(self, before: nn.Module, after: nn.Module, *, train: bool = False) -> None:
        """Check that two networks compute the same, for a change of structure that is meant to be exact.

        They are given `example` and as much noise, in evaluation mode, and with `train` in training mode as well, from
        the same random state. Both are left as they were.

        Args:
            before, after: networks on the run's device.
            train: whether they should be the same in training, too.

        Raises:
            LayerlabError: they differ by more than rounding; with the largest difference.
        """
        check_agreement(before, after, self.example, (False, True) if train else (False,))

    def plain_step(self, x: Any, y: Any) -> Tensor:
        """The step of a run in which no strategy replaces it: forward, `backward`, update.

        Args:
            x, y: as `Strategy.training_step`, or as `data` gives them.

        Returns:
            The batch's mean loss.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.accumulate > 1:
            loss = self._accumulated(x, y)
        else:
            with self.autocast():
                loss = self.objective(self.training_model, x, y)
        if self.backward(loss):
            self.optimizer.step()
        return loss

    def _accumulated(self, x: Any, y: Any) -> Tensor:
        """A batch part by part: its mean loss, whose gradient is that of the last part; the others' are there."""
        parts = chunks((x, y), self.accumulate)
        before = torch.zeros((), device=self.device)
        for number, own in enumerate(parts):
            with self.autocast():
                loss = self.objective(self.training_model, *own)
            # The parts may differ by an example.
            loss = loss * (count(own) / count((x, y)))
            if number < len(parts) - 1:
                if loss.requires_grad:
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                before = before + loss.detach()
        return before + loss

    def backward(self, loss: Tensor) -> bool:
        """Backward from `loss`, then every strategy's `on_after_backward`: for a strategy that replaces the step.

        At the end it clips the gradients if the user asked for that.

        Returns:
            Whether there is a gradient to learn from. If all that `loss` depends on is frozen there is none: neither
            backward nor the hooks run. Under float16 one may overflow. Either way the step ends without an update.
        """
        if not loss.requires_grad:
            return False
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        for hook in self.after_backward:
            hook(self)
        if self.clip_norm is not None:
            learning = [each for group in self.optimizer.param_groups for each in group["params"]]
            torch.nn.utils.clip_grad_norm_(learning, self.clip_norm)
        if self.scaler is None:
            return True
        before = self.scaler.get_scale()
        self.scaler.update()
        # It falls where a gradient was not finite.
        return self.scaler.get_scale() >= before
