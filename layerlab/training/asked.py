"""What strategies say of a network before the first step, asked once for each arm and network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from layerlab.base.trees import shapes
from layerlab.contract.preflight import Preflight
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy, preflights
from layerlab.training.fingerprint import Description, source_digests
from layerlab.training.settings import describe


class Asked:
    """The pre-flights of one comparison.

    A pre-flight rehearses steps on copies, which takes seconds on a large network. The seeds of an arm differ by their
    weights alone, and a pre-flight is about the structure: so it is asked again only where that differs.
    """

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Preflight]] = {}

    def of(self, arm: str, strategies: Sequence[Strategy], run: Run) -> dict[str, Preflight]:
        """What each of an arm's strategies says of a run's network, by the strategy's name.

        Args:
            arm: its name, since a strategy may know of another arm what its settings do not show.
            strategies: the arm's.
            run: before its first epoch.

        Raises:
            Refused: one of them cannot train the network.
        """
        if not strategies:
            return {}
        key = json.dumps([arm, [[each.name, describe(each), source_digests(type(each))] for each in strategies],
                          _structure(run)])
        if key not in self._found:
            self._found[key] = preflights(strategies, run.model, run.example)
        return self._found[key]


class _WithoutWeights(Description):
    """Objects as `Description` has them, of tensors of floats no more than their shapes and types."""

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return [list(value.shape), str(value.dtype), str(value.device)]
        return super().of(value)


def _structure(run: Run) -> list[Any]:
    """The run's network without its weights, what is frozen in it, and the shape of its inputs."""
    learning = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    return [_WithoutWeights().of(run.model), learning, shapes(run.example)]
