"""Freezing by a plan that is made before the training: the placebo of LARS skip, and the freezing that Composer has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from layerlab import Preflight, Run, Strategy
from layerlab_lars_skip.method.convolutions import Convolutions, find_convolutions

SKIPPED = "lars-skip/skipped_layers"


class PlannedFreezing(Strategy):
    """Freezes as many convolutions, from the input on, as a plan says for each epoch, with all layers before them."""

    name: ClassVar[str] = "planned-freezing"
    needs: ClassVar[frozenset[str]] = frozenset({"one tensor"})
    follows_layers: ClassVar[bool] = True

    plan: dict[int, int] = Field(default_factory=dict)
    """Epoch, counted from 1, to the number of convolutions; 0 in epochs that it does not name."""

    _found: Convolutions = PrivateAttr(default_factory=Convolutions)

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """Say which layers the plan freezes at most.

        Raises:
            Refused: as `LarsSkip.on_fit_start`.
        """
        found = find_convolutions(network, example)
        return Preflight.of(network, found.names[: max(self.plan.values(), default=0)])

    def on_fit_start(self, run: Run) -> None:
        self._found = find_convolutions(run.model, run.example)

    def on_epoch_start(self, run: Run) -> None:
        count = min(self.plan.get(run.epoch, 0), self._found.most)
        run.freeze(self.name, self._found.prefixes[count - 1] if count else ())
        run.log(f"{self.name}/skipped_layers", count)


def alternation(history: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """A plan that skips one prefix in evenly spread epochs and saves what a run of LARS skip saved.

    The prefix is one that the run skipped, and it is skipped as often as comes nearest to the run's FLOPs; where costs
    were not measured, a convolution counts as much as another.

    Args:
        history: of the run, one row an epoch; everything learns in the first.

    Returns:
        Epoch → number of convolutions, of the epochs that skip; empty where the run skipped nothing.
    """
    saved: dict[int, float] = {}
    plan: dict[int, int] = {}
    total, nearest = 0.0, math.inf
    whole = _cost(history[0])
    for row in history:
        count = int(row[SKIPPED])
        each = whole - _cost(row)
        saved[count] = each if math.isfinite(each) else float(count)
        total += saved[count]
    # The longest prefix first: of several that save as much, it is the one that is taken.
    for count in sorted(saved, reverse=True):
        times = min(len(history) - 1, round(total / saved[count])) if saved[count] > 0 else 0
        missed = abs(times * saved[count] - total)
        if times and missed < nearest:
            nearest, plan = missed, dict.fromkeys(spread_epochs(len(history), times), count)
    return plan


def linear(
    step_flops: Sequence[float], epochs: int, share: float, starts: int = 20, levels: int = 10
) -> dict[int, int]:
    """Composer's linear freezing at a given cost: from `start` on, layers freeze one after the other up to `level`.

    Its algorithm LayerFreezing freezes in an epoch int(level · (p − start) / (1 − start) · layers) of them, p being the
    share of the training that is over. Both of its settings are searched for the cost that comes nearest.

    Args:
        step_flops: of a step with 0, 1, … convolutions frozen.
        epochs: of the run.
        share: FLOPs of the run, relative to one in which everything learns.
        starts, levels: how fine both are searched.

    Returns:
        Epoch → number of convolutions, of the epochs that freeze any.
    """
    nearest, plan = math.inf, {}
    layers = len(step_flops) - 1
    for index in range(starts * levels):
        start, level = index // levels / starts, (index % levels + 1) / levels
        counts = [_frozen_at((epoch - 1) / epochs, start, level, layers) for epoch in range(1, epochs + 1)]
        spent = math.fsum(step_flops[count] for count in counts) / (epochs * step_flops[0])
        if abs(spent - share) < nearest:
            nearest = abs(spent - share)
            plan = {epoch: count for epoch, count in enumerate(counts, 1) if count}
    return plan


def _frozen_at(progress: float, start: float, level: float, layers: int) -> int:
    return int(max(0.0, (progress - start) / (1 - start)) * level * layers)


def spread_epochs(epochs: int, times: int) -> list[int]:
    """So many epochs of a run, evenly spread, never the first.

    Example:
        >>> spread_epochs(6, 3)
        [2, 4, 6]
    """
    room = epochs - 1
    return [2 + (index * room + room // 2) // times for index in range(times)]


def _cost(row: Mapping[str, Any]) -> float:
    """FLOPs of an epoch; NaN where they were not measured."""
    return float(row.get("cost/forward_flops", math.nan) + row.get("cost/backward_flops", math.nan))
