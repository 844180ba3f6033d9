"""my-method: in every second epoch, the layers nearest the input rest.

An example that works as it stands, to be replaced by the method of your paper: cite it here, section and equations.
All hooks and what they are given: `help(layerlab.Strategy)`, `help(layerlab.Run)`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, PrivateAttr
from torch import nn

from layerlab import Refused, Run, Strategy, prefixes


class MyMethod(Strategy):
    """Rest the first layers in every n-th epoch: no backward pass, no update.

    Replace: what the method does, in the paper's words and symbols.
    """

    # The name of the entry point in pyproject.toml, of the MLflow experiment, and of what is logged.
    name: ClassVar[str] = "my-method"

    # The settings: checked, documented and logged from here. Each needs a docstring; `layerlab describe` shows it.
    share: float = Field(0.5, ge=0, lt=1)
    """Share of the convolutions and fully connected layers that rest, from the input on."""
    every: int = Field(2, ge=2)
    """They rest in each epoch whose number this divides, and learn in the others."""

    # What changes during training is private. One object serves several fits, so `on_fit_start` sets it anew.
    _resting: list[nn.Module] = PrivateAttr(default_factory=list)
    _rests: int = PrivateAttr(0)

    def on_fit_start(self, run: Run) -> None:
        """Find the layers that rest.

        Raises:
            Refused: the network has fewer than two layers.
        """
        # Layers in the order of the forward pass, each with everything that learns no later than it.
        layers = prefixes(run.model, run.example, (nn.Conv2d, nn.Linear))
        if len(layers) < 2:
            # What a user can mend: one sentence that names the thing and the remedy.
            raise Refused(
                f"my-method needs a network of two layers or more, and {type(run.model).__name__} has {len(layers)}; "
                "use another network."
            )
        count = int(self.share * len(layers))
        self._resting = layers[count - 1][1] if count else []
        self._rests = 0

    def on_epoch_start(self, run: Run) -> None:
        rests = bool(self._resting) and run.epoch % self.every == 0
        self._rests += rests
        # Frozen layers get no gradient, so the optimizer leaves them alone; whatever was frozen before is thawed.
        run.freeze(self.name, self._resting if rests else ())
        run.log("my-method/rests", self._rests)

    # A method that works on gradients has this hook; one that replaces the whole step has `training_step`:
    #
    # def on_after_backward(self, run: Run) -> None:
    #     for parameter in run.model.parameters():
    #         if parameter.grad is not None:  # None: frozen, by this strategy or another
    #             parameter.grad.mul_(0.5)

    # What a fit needs to go on after an interruption as if undisturbed, at the end of an epoch.
    def state_dict(self) -> dict[str, Any]:
        return {"rests": self._rests}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rests = state["rests"]
