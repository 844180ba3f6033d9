"""The `Run` of a loop that is not layerlab's: what only that loop knows is asked for where a strategy reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from layerlab.base.errors import LayerlabError, Refused
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy


def needs_fit(strategy: Strategy) -> str:
    """Why a strategy cannot act in a loop of the user's own, in one sentence; empty where it can.

    Args:
        strategy: any; the hooks that it defines and its class attributes decide.
    """
    if strategy.defines("training_step"):
        return _fit_alone(strategy.name, "replaces the training step")
    if strategy.replaces_network:
        return _fit_alone(strategy.name, "trains another network on other data between epochs")
    if strategy.changes_structure:
        return _fit_alone(strategy.name, "changes the network's structure")
    if strategy.acts_in_backward:
        return _fit_alone(strategy.name, "uses up gradients while backward runs")
    return ""


def _fit_alone(name: str, what: str) -> str:
    return f"{name} {what}, which a loop of your own cannot follow: it needs layerlab.fit."


class _Told:
    """An attribute that the loop's owner tells.

    Args:
        what: it is, for a sentence.
        how: it is given to `attach`.
    """

    def __init__(self, what: str, how: str) -> None:
        self.what, self.how = what, how

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, run: AttachedRun | None, owner: type | None = None) -> Any:
        if run is None:
            return self
        value = run.told(self.name)
        if value is None:
            raise Refused(f"{run.asking} needs to know {self.what}; call attach(…, {self.how}).")
        return value

    def __set__(self, run: AttachedRun, value: Any) -> None:
        vars(run)[self.name] = value


class _Reading:
    """Data that only the user's loop reads."""

    def __init__(self, half: str) -> None:
        self.half = half

    def __get__(self, run: AttachedRun | None, owner: type | None = None) -> Any:
        return self if run is None else vars(run).get(self.half) or Unread(run, self.half)

    def __set_name__(self, owner: type, name: str) -> None:
        self.half = name

    def __set__(self, run: AttachedRun, value: Any) -> None:
        vars(run)[self.half] = value


class Unread:
    """In the place of `run.data`: it has a length, and nothing can be read from it."""

    def __init__(self, run: AttachedRun, half: str) -> None:
        self._run, self._half = run, half

    def __len__(self) -> int:
        return self._run.steps_per_epoch * self._run.batch_size

    def batches(self, *arguments: Any, **more: Any) -> Iterator[Any]:
        """Raises Refused."""
        half = "test" if self._half == "test_data" else "training"
        raise Refused(_fit_alone(self._run.asking, f"reads the {half} data itself"))


class Row(dict[str, Any]):
    """An epoch's row of the history; what `fit` alone measures is missing with a sentence."""

    def __missing__(self, name: str) -> Any:
        raise Refused(f"A strategy reads {name!r} of an epoch, which `fit` measures and a loop of your own does not: "
                      "it needs layerlab.fit.")


class AttachedRun(Run):
    """A run of the user's own loop.

    Attributes:
        asking: the strategy whose hook is called.
    """

    asking = ""
    epochs = _Told("how many epochs the training has", "epochs=10")
    schedule = _Told("the learning-rate schedule", "schedule=scheduler")
    loss = _Told("the loss", "loss=torch.nn.CrossEntropyLoss()")
    batch_size = _Told("how many examples a step has", "batch_size=128")
    steps_per_epoch = _Told("how many steps an epoch has", "steps=len(loader)")
    data = _Reading("data")
    test_data = _Reading("test_data")

    def __repr__(self) -> str:
        return f"<run of {type(self.model).__name__} in a loop of its own, epoch {self.epoch}, step {self.step}>"

    def told(self, name: str) -> Any:
        """What was told of an attribute, or None."""
        return vars(self).get(name)

    @property
    def parts(self) -> tuple[Any, ...]:
        """What the user's loop holds too, so that no strategy can put something else in its place."""
        return self.model, self.training_model, self.optimizer, self.told("data"), self.told("test_data")

    def check_parts(self, before: tuple[Any, ...]) -> None:
        """Refuse a strategy that has put something else in the place of one of `parts`.

        Args:
            before: the parts before its hook.
        """
        names = ("network", "network that trains", "optimizer", "training data", "test data")
        for name, old, new in zip(names, before, self.parts, strict=True):
            if old is not new:
                raise Refused(_fit_alone(self.asking, f"replaces the {name}"))

    def restructure(self, *arguments: Any, **more: Any) -> None:
        """Raises Refused: the user's loop trains the network as it was."""
        raise Refused(_fit_alone(self.asking, "changes the network's structure"))

    def backward(self, loss: Any) -> bool:
        """Raises LayerlabError: the user's loop calls backward."""
        raise LayerlabError(_fit_alone(self.asking, "calls backward itself"))
