"""The contract: what a training strategy is, which hooks it has, and the `Run` that it shares with `fit`.

A strategy is a pydantic model. Its fields are its settings; its hooks carry the names known from Lightning. A hook
that a strategy does not define is never called, so it costs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from layerlab.base.devices import kept_random_states
from layerlab.base.errors import Refused, first_line, sentence
from layerlab.base.trees import tensors
from layerlab.contract.preflight import Preflight
from layerlab.contract.rehearsal import rehearsal
from layerlab.show.table import Table

if TYPE_CHECKING:
    from layerlab.contract.run import Run
    from layerlab.show.layer_map import LayerMap


def strategy_table(strategy: Strategy) -> Table:
    """One row a setting: its value, and what it does."""
    rows = [(name, str(getattr(strategy, name)), " ".join((field.description or "").split()))
            for name, field in type(strategy).model_fields.items()]
    return Table(("setting", "value", "what it does"), rows, strategy.name, () if rows else ("It has no settings.",))


# What a strategy may need of its data → in words, and the remedy where data do not give it.
NEEDS: Mapping[str, tuple[str, str]] = {
    "one tensor": ("batches that give the network one tensor", "give (x, y) with a tensor x"),
    "images": ("images, floats of (batch, channels, height, width)", "give images"),
    "targets": ("batches with a tensor of targets beside the inputs", "give (x, y)"),
    "classes": ("labels that are one class for each example", "give such labels"),
    "fixed order": ("examples that can be read again in one order", "give the DataLoader's dataset in its place"),
    "resident": ("examples that all lie in the device's memory", "give tensors"),
}


class Strategy(BaseModel):
    """A method that changes how a network is trained. Subclass it; the fields are the settings.

    Class attributes tell layerlab what the method does:

    - `name`: the strategy is installed, logged and called by it; `[a-z0-9-]+`, the same as its entry point's.
    - `needs`: its demands on the data: `one tensor` or `images` for the network, `targets` or `classes` beside them, a
      `fixed order` that can be read again, `resident` in the device's memory.
    - `replaces_network`: it puts another `run.training_model` and other `run.data` in place between epochs. A strategy
      that replaces the step does not expect that.
    - `changes_structure`: it removes or reshapes layers (`run.restructure`).
    - `follows_layers`: it keeps numbers or tensors about each layer from epoch to epoch, so the layers must not change.
    - `acts_in_backward`: it uses up or sends gradients while backward runs, so nobody can accumulate or clip them.
    - `memory_setting`: names the setting, if any, that limits the bytes a training step may allocate, as a number or a
      text such as 2GB; `fit(memory=…)` sets it.
    - `expected_failed_checks`: maps each check of `layerlab.testing` that it is known to fail to the reason.

    A strategy that sets none of these but `follows_layers`, and has no `training_step`, also works in a training loop
    of the user's own (`layerlab.attach`).

    Keep state that changes during training in pydantic private attributes and set it anew in `on_fit_start`, so that
    one object serves several fits. Return from `state_dict` what an interrupted run needs to resume: tensors, numbers,
    strings, lists and dicts. Anything else, such as NumPy numbers, is refused when it is saved, because checkpoints are
    read with `weights_only=True`.

    Raises:
        Refused: a setting that does not exist or does not validate, in one sentence.

    Example:
        >>> from layerlab import Strategy
        >>> class Half(Strategy):
        ...     name = "half"
        ...     share: float = 0.5
        >>> Half(share=0.25).share
        0.25
        >>> Half(shar=0.25)
        Traceback (most recent call last):
        layerlab.base.errors.Refused: half has no setting 'shar' (did you mean 'share'?).
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)
    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    replaces_network: ClassVar[bool] = False
    changes_structure: ClassVar[bool] = False
    follows_layers: ClassVar[bool] = False
    acts_in_backward: ClassVar[bool] = False
    memory_setting: ClassVar[str] = ""
    expected_failed_checks: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise Refused(sentence(error, type(self).name or type(self).__name__, type(self).model_fields)) from None

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """Say what this strategy can do with a network, before any training; `fit` asks each of its strategies.

        The default goes through one epoch of one step on copies of the network and of this object, and counts every
        layer that learns as covered. A strategy that acts on some layers alone says so with `Preflight.of`. Where it
        does something once in a training that may fail, it tries that here on a copy. `compare` asks once for each arm
        and structure of a network, not for each seed, so put what training needs into the hooks.

        Args:
            network: in any mode; it is not changed.
            example: images as the network takes them, (batch, channels, height, width).

        Raises:
            Refused: the method cannot train this network, in one sentence with the remedy.
        """
        notes = (f"{self.name} does not say on which layers it acts; these are all that learn.",
                 *self.rehearse(network, example))
        return Preflight.of(network, notes=notes)

    def rehearse(self, network: nn.Module, example: Tensor) -> tuple[str, ...]:
        """Go through one epoch of one step on copies of the network and of this object, for `preflight`.

        What this strategy cannot do with the network shows here, before any training, as the error that it raises.

        Args:
            network, example: as `preflight`.

        Returns:
            The sentences of which it warned on the way, each once.

        Raises:
            Refused: as the strategy's hooks.

        Example:
            >>> import torch, warnings
            >>> from layerlab import LayerlabWarning, Strategy, build_model
            >>> class Slow(Strategy):
            ...     name = "slow"
            ...     def on_epoch_start(self, run):
            ...         warnings.warn("slow takes its time.", LayerlabWarning, stacklevel=2)
            >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
            >>> Slow().rehearse(network, torch.zeros(2, 1, 8, 8))
            ('slow takes its time.',)
        """
        with rehearsal(network, example) as (run, said):
            copy.deepcopy(self)._call_hooks(run)
        return tuple(said)

    def _call_hooks(self, run: Run) -> None:
        """Every hook once, in the order in which `fit` calls them."""
        if self.defines("on_after_backward"):
            run.after_backward = [self.on_after_backward]
        self.on_fit_start(run)
        run.epoch = 1
        run.training_model.train()
        run.apply_freezing()
        self.on_epoch_start(run)
        for x, y in run.data.batches(run.batch_size, run.generator, torch.float32, torch.contiguous_format):
            self.on_train_batch_start(run)
            if self.defines("training_step"):
                assert isinstance(x, Tensor)
                self.training_step(run, x, y)
            else:
                run.plain_step(x, y)
            run.step += 1
        self.on_epoch_end(run)
        run.model.eval()
        self.on_validation_end(run)
        self.on_fit_end(run)

    def on_fit_start(self, run: Run) -> None:
        """Once, before the first epoch and again after an interruption: adapt the model, the data, the optimizer."""

    def on_load_checkpoint(self, run: Run) -> None:
        """After an interruption, with `load_state_dict` done and before the weights are loaded.

        A strategy that had changed the network's structure, the data or the optimizer repeats the change here.
        """

    def on_epoch_start(self, run: Run) -> None:
        """Before each epoch; the network is in training mode."""

    def on_train_batch_start(self, run: Run) -> None:
        """Before each step, of which nothing is computed yet: for what changes from step to step, such as what learns.

        `run.step` counts the steps that are done. What is computed here counts to the step's cost.
        """

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

        Called after `load_state_dict` on an object that has seen no fit; the weights are loaded afterwards. Only a
        strategy that changes the structure needs it.

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

    # Any rather than a protocol: a plugin writes `result: FitResult`, which a parameter of any other type forbids.
    def placebo(self, result: Any) -> Strategy | None:
        """A strategy that saves the same without this method's decision; None where it names none.

        Called on the object that the run was trained with. Return, for example, a strategy that freezes as many layers
        at fixed epochs, or one that removes as many channels at random.

        Args:
            result: the run's `FitResult`, with everything that was logged in `result.history`.
        """
        return None

    @classmethod
    def example_network(cls, shape: tuple[int, int, int], classes: int) -> nn.Module | None:
        """A new small network that this strategy can train; used by tools that run every strategy, such as tests.

        Override it if the strategy needs a network of a certain form; the default says that it takes any.

        Args:
            shape: (channels, height, width) of the images.
            classes: logits that the network gives.

        Returns:
            The network, or None for any.
        """
        return None

    def _repr_html_(self) -> str:
        return strategy_table(self)._repr_html_()

    @classmethod
    def defines(cls, hook: str) -> bool:
        """Whether this strategy has a hook of its own."""
        return getattr(cls, hook) is not getattr(Strategy, hook)


def check_composition(strategies: Iterable[Strategy]) -> None:
    """Refuse strategies that cannot run together.

    Raises:
        Refused: two of them replace the training step or the network that trains, or one replaces the step and
            another the network; one changes the structure while another follows its layers; or one is given twice.
    """
    strategies = list(strategies)
    for strategy in strategies:
        if not isinstance(strategy, Strategy):
            raise Refused(f"{strategy!r} is no strategy: pass objects of layerlab.Strategy, such as "
                          "layerlab.strategies(NAME) makes.")
    names = [strategy.name for strategy in strategies]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise Refused(f"Strategy {twice[0]!r} is given twice in one fit; give it once.")
    stepping = [strategy.name for strategy in strategies if strategy.defines("training_step")]
    if len(stepping) > 1:
        raise Refused(
            f"Strategies {stepping[0]!r} and {stepping[1]!r} cannot run together: both replace the training step "
            "(hook training_step); use one of them at a time."
        )
    replacing = [strategy.name for strategy in strategies if strategy.replaces_network]
    if len(replacing) > 1:
        raise Refused(
            f"Strategies {replacing[0]!r} and {replacing[1]!r} cannot run together: both replace the network that "
            "trains; use one of them at a time."
        )
    changing = [strategy.name for strategy in strategies if strategy.changes_structure]
    following = [strategy.name for strategy in strategies if strategy.follows_layers]
    if changing and following:
        raise Refused(
            f"Strategies {changing[0]!r} and {following[0]!r} cannot run together: the one removes layers, "
            "the other follows each layer from epoch to epoch; use one of them at a time."
        )
    if replacing and stepping:
        raise Refused(
            f"Strategies {replacing[0]!r} and {stepping[0]!r} cannot run together: the one replaces the network that "
            "trains and its data between epochs, the other the training step; use one of them at a time."
        )


def check_needs(strategies: Iterable[Strategy], data: str, offered: Collection[str], loss_of_model: bool) -> None:
    """Refuse strategies that need what the data do not give.

    Args:
        strategies: of a run.
        data: their name.
        offered: what they give, in the words of `NEEDS`.
        loss_of_model: whether the loss is a function of (model, batch), which no strategy can call that trains by a
            step or a network of its own.

    Raises:
        Refused: one does, with the remedy.
    """
    for strategy in strategies:
        for need in sorted(strategy.needs):
            if need not in NEEDS:
                raise Refused(f"{strategy.name} needs {need!r} of its data, which is none of {', '.join(NEEDS)}; mend "
                              "its `needs`.")
            if need not in offered:
                what, remedy = NEEDS[need]
                raise Refused(f"{strategy.name} needs {what}, which {data!r} does not give; {remedy}, or leave the "
                              "strategy out.")
        compares = strategy.defines("training_step") or strategy.needs & {"targets", "classes"}
        if loss_of_model and compares:
            raise Refused(f"{strategy.name} calls the loss with (output, target), and this loss takes (model, batch); "
                          "give one of (output, target), or leave the strategy out.")


def preflights(strategies: Iterable[Strategy], network: nn.Module, example: Tensor) -> dict[str, Preflight]:
    """What each strategy says of a network before the first step, by its name; each is given a copy.

    Random states are afterwards as before, so that a run draws the same whether or not it asks.

    Raises:
        Refused: one of them cannot train it.
    """
    found = {}
    for strategy in strategies:
        try:
            own = copy.deepcopy(network)
        except (RuntimeError, TypeError) as error:
            note = f"The network cannot be copied ({first_line(error)}), so nothing was tried."
            found[strategy.name] = Preflight.of(network, notes=(note,))
        else:
            with kept_random_states(tensors(example)[0].device):
                found[strategy.name] = strategy.preflight(own, example)
    return found
