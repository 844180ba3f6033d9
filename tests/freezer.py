"""A strategy that freezes a growing and shrinking prefix, and can be slowed down: for tests of interruption."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from pydantic import PrivateAttr

from layerlab import Run, Strategy, forward_order


class Freezer(Strategy):
    """Freezes 0, 1, 2, 1, 0, … modules, by its own count of epochs."""

    name: ClassVar[str] = "freezer"
    seconds: float = 0.0

    _count: int = PrivateAttr(0)
    _order: list[Any] = PrivateAttr(default_factory=list)

    def on_fit_start(self, run: Run) -> None:
        self._count = 0
        self._order = [module for _, module in forward_order(run.model, run.example)]

    def on_epoch_start(self, run: Run) -> None:
        frozen = (0, 2, 4, 2)[self._count % 4]
        run.freeze(self.name, self._order[:frozen])
        run.log("freezer/frozen", frozen)

    def on_after_backward(self, run: Run) -> None:
        if self.seconds:
            time.sleep(self.seconds)

    def on_epoch_end(self, run: Run) -> None:
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]
