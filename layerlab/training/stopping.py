"""When a training that no longer gets better by its validation half ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerlab.base.errors import Refused


def waited(history: Sequence[Mapping[str, Any]]) -> int:
    """Epochs since the best one by the validation half: by its accuracy, or by its loss where there are no classes.

    Example:
        >>> waited([{"validation/top1": share} for share in (0.3, 0.5, 0.4, 0.5)])
        2
    """
    if not history:
        return 0
    if "validation/top1" in history[-1]:
        scores = [row["validation/top1"] for row in history]
    else:
        scores = [-row["validation/loss"] for row in history]
    return len(scores) - 1 - scores.index(max(scores))


def check_patience(patience: int | None, data: str, validated: bool) -> None:
    """Refuse to wait where nothing says whether the training gets better.

    Args:
        patience: the fit's.
        data: their name.
        validated: whether they have a validation half.

    Raises:
        Refused: there is patience and no validation half.
    """
    if patience is not None and not validated:
        raise Refused(f"patience={patience} waits for the validation half to get better, and {data!r} has none; "
                      "`data.with_validation()` sets a part of the training examples apart.")
