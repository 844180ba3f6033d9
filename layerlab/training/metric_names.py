"""The names of what runs log: which there are, and which the user brought."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from layerlab.base.errors import unknown


class _Logged(Protocol):
    history: list[dict[str, Any]]


def own_metrics(results: Iterable[_Logged]) -> list[str]:
    """What was measured of the test half besides the loss and the accuracies that every classifier has."""
    known = ("test/loss", "test/top1", "test/top5")
    return list(dict.fromkeys(name for result in results for name in result.history[-1]
                              if name.startswith("test/") and name not in known))


def check_metric(name: str, results: Iterable[_Logged], others: Iterable[str]) -> None:
    """Refuse the name of what no run has logged; a cost that was not measured has a name all the same.

    Args:
        name: as in MLflow.
        results: with what they logged.
        others: names that would do as well.

    Raises:
        LayerlabError: no run has it; with the nearest name.
    """
    known = {each for result in results for row in result.history for each in row}
    if name not in known and not name.startswith(("cost/", "time/", "compile/")):
        raise unknown("metric", name, {*others, *known} - {"epoch", "timestamp"})
