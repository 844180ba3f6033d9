"""The two scores of a layer: how much it changes or is asked to change, and whether that is still on its way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def relative_change(weights: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """The first score, from weights: ‖w − w_before‖₂ / ‖w_before‖₂ over a layer's parameters.

    Args:
        weights: a layer's parameters at the end of an epoch.
        before: the same at its start.

    Returns:
        ≥ 0; infinite for a layer that was zero and moved.
    """
    moved = norm([weight - start for weight, start in zip(weights, before, strict=True)])
    return _ratio(moved, norm(before))


class Gradients:
    """The first score, from monitored gradients: the mean over an epoch's steps of ‖g‖₂ / ‖w_before‖₂.

    Args:
        parameters: index of a layer → its parameters.
    """

    def __init__(self, parameters: dict[int, list[nn.Parameter]]) -> None:
        self._parameters = parameters
        self._sums: dict[int, Tensor] = {}
        self._steps: dict[int, int] = dict.fromkeys(parameters, 0)

    def add(self) -> None:
        """Take a step's gradients; a layer without any is left out."""
        for index, parameters in self._parameters.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                # One scalar, which stays on the device: to read it here would wait for each step.
                size = torch.stack(torch._foreach_norm(gradients)).norm()
                self._sums[index] = self._sums[index] + size if index in self._sums else size
                self._steps[index] += 1

    def score(self, index: int, before: Sequence[Tensor]) -> float | None:
        """Of an epoch; None for a layer that had no gradients.

        Args:
            index: of the layer.
            before: its parameters at the epoch's start.
        """
        if index not in self._sums:
            return None
        return _ratio(float(self._sums[index]) / self._steps[index], norm(before))


def trend(changes: Sequence[float], window: int) -> float:
    """The second score: the slope of ln(change) per epoch, by least squares over the last `window` epochs.

    −0.5 means that an epoch changes the layer by e^−0.5 = 0.61 of what the epoch before did: it is still on its way to
    somewhere. A positive slope, as when a network leaves a plateau, means that it has only begun. About 0 means that
    its change has become steady: what is left is the noise of the gradients.

    Returns:
        The slope; NaN while there are fewer than `window` epochs; 0 for a layer that stands still.
    """
    recent = changes[-window:]
    if len(recent) == window and recent[-1] == 0:
        return 0.0
    if len(recent) < window or min(recent) == 0 or math.isinf(max(recent)):
        return math.nan
    logs = [math.log(change) for change in recent]
    middle, mean = (window - 1) / 2, math.fsum(logs) / window
    return math.fsum((i - middle) * (value - mean) for i, value in enumerate(logs)) / math.fsum(
        (i - middle) ** 2 for i in range(window))


def norm(tensors: Sequence[Tensor]) -> float:
    """‖·‖₂ of several tensors together, in float64."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _ratio(value: float, size: float) -> float:
    if size:
        return value / size
    return math.inf if value else 0.0
