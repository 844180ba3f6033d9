"""Attached strategies for trainers that call back, rather than for a loop with blocks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from layerlab.training.attached import Attached


class Driven:
    """Attached strategies whose blocks begin and end by calls.

    Args:
        attached: the strategies.
    """

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self._epoch: AbstractContextManager[None] | None = None
        self._forwards: list[AbstractContextManager[None]] = []

    @property
    def within(self) -> bool:
        """Whether an epoch has begun and not ended."""
        return self._epoch is not None

    def begin_epoch(self) -> None:
        """Enter the block of an epoch."""
        epoch = self.attached.epoch()
        epoch.__enter__()
        self._epoch = epoch

    def end_epoch(self) -> dict[str, Any]:
        """Leave it; what the strategies logged in it."""
        self.end_forward()
        if self._epoch is not None:
            epoch, self._epoch = self._epoch, None
            epoch.__exit__(None, None, None)
        return {name: value for name, value in self.attached.history[-1].items() if name != "epoch"}

    def begin_forward(self) -> None:
        """Enter the block of a forward pass."""
        forward = self.attached.forward()
        forward.__enter__()
        self._forwards.append(forward)

    def end_forward(self) -> None:
        """Leave the innermost one, if there is one."""
        if self._forwards:
            self._forwards.pop().__exit__(None, None, None)

    def leave(self) -> None:
        """Leave all forward passes after an error."""
        while self._forwards:
            self.end_forward()
