"""How a page heads the columns of a run's tables, where the notebook's own names do not say the unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from layerlab.contract.claims import Data


class Heading(Data):
    """How a page heads a column of a run's table: `[headings.TABLE]` in paper.toml, a line a column.

    Attributes:
        text: the heading, with its unit in brackets; the column's own name where it is left out. In paper.toml a text
            alone stands for it.
        share: whether the numbers are shares, which a page shows in per cent.

    Example:
        >>> Heading.model_validate("latency [µs]").text
        'latency [µs]'
    """

    text: str = ""
    share: bool = False

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        return {"text": given} if isinstance(given, str) else given


def headings_of(table: str, headings: Mapping[str, Mapping[str, Heading]]) -> dict[str, Heading]:
    """Those of a table: `choice` holds for `choice-mnist`, too, and gives way to what stands there.

    Args:
        table: its name.
        headings: a paper's, table → column → heading.
    """
    found: dict[str, Heading] = {}
    for name in sorted(headings, key=len):
        if table == name or table.startswith(f"{name}-"):
            found |= headings[name]
    return found
