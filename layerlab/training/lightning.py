"""Strategies as a callback of Lightning's trainer; imported only where Lightning is installed."""

from __future__ import annotations

import math
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from layerlab.base.errors import LayerlabWarning, Refused
from layerlab.training.attached import Attached, attach
from layerlab.training.driven import Driven
from layerlab.training.fit import Strategies

_UNFINISHED = {"unfinished": True}


class LightningCallback(Callback):
    """See `layerlab.lightning_callback`."""

    def __init__(self, strategies: Strategies, example: Tensor | None) -> None:
        self._given, self._example = strategies, example
        self._driven: Driven | None = None
        self._loaded: dict[str, Any] = {}

    @property
    def attached(self) -> Attached | None:
        """The strategies, once training has begun."""
        return self._driven.attached if self._driven is not None else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach; the optimizer's state is loaded afterwards."""
        if trainer.world_size > 1:
            raise Refused("A strategy in Lightning acts in one process; set devices=1.")
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise Refused("A strategy in Lightning needs automatic optimization with one optimizer; in a step of your "
                          "own, use layerlab.attach.")
        example = pl_module.example_input_array if self._example is None else self._example
        if not isinstance(example, Tensor):
            raise Refused("lightning_callback needs one batch's input: give example=… or set the module's "
                          "example_input_array to a tensor.")
        # Of a training without a limit, it is not known how long it is.
        steps, epochs = trainer.estimated_stepping_batches, trainer.max_epochs or -1
        known = epochs > 0 and math.isfinite(steps)
        # Any, since it may be one that follows a metric.
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler if trainer.lr_scheduler_configs else None
        exact = trainer.precision == "32-true"
        self._driven = Driven(attach(
            pl_module, trainer.optimizers[0], self._given, example=example.to(pl_module.device),
            epochs=epochs if known else None, steps=math.ceil(steps / epochs) if known else None,
            schedule=scheduler, autocast=None if exact else trainer.precision_plugin.forward_context,
        ))
        if self._loaded:
            self._load(self._driven, self._loaded)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        if self._driven is not None:
            self._driven.begin_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a forward pass."""
        if self._driven is not None:
            self._driven.begin_forward()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """End it."""
        if self._driven is not None:
            self._driven.end_forward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Show the gradients, which are not yet clipped."""
        if self._driven is not None:
            self._driven.end_forward()
            self._driven.attached.after_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the forward pass of a step that was left out."""
        if self._driven is not None:
            self._driven.end_forward()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the epoch and log what the strategies logged."""
        if self._driven is not None:
            pl_module.log_dict(self._driven.end_epoch())

    def on_validation_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Begin a forward pass."""
        if self._driven is not None:
            self._driven.begin_forward()

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """End it."""
        if self._driven is not None:
            self._driven.end_forward()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the strategies leave the network that is deployed."""
        if self._driven is not None:
            self._driven.attached.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave what an error has left open, and the optimizer."""
        if self._driven is not None:
            self._driven.leave()
            self._driven.attached.detach()

    def state_dict(self) -> dict[str, Any]:
        """The strategies' state; within an epoch there is none."""
        if self._driven is None:
            return {}
        if self._driven.within:
            warnings.warn("This checkpoint is written within an epoch, where a strategy's state is not whole: training "
                          "cannot go on from it. Save at the end of training epochs (ModelCheckpoint's "
                          "save_on_train_epoch_end=True).", LayerlabWarning, stacklevel=2)
            return dict(_UNFINISHED)
        return self._driven.attached.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back, now or once there is something to load it into."""
        self._loaded = state_dict
        if self._driven is not None:
            self._load(self._driven, state_dict)

    def _load(self, driven: Driven, state: dict[str, Any]) -> None:
        self._loaded = {}
        if state == _UNFINISHED:
            raise Refused("The checkpoint was written within an epoch, without the strategies' state; go on from one "
                          "that was written at the end of an epoch.")
        driven.attached.load_state_dict(state)
