"""A run's tables as a page shows them: units in words, no rounding errors, shares in per cent everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import pandas as pd

from layerlab.contract.headings import Heading
from layerlab.contract.paper import Paper
from layerlab.show.interval import scale

# Below this a number that is no rounding error would be a wonder.
_ROUNDING = 1e-12
# An integer column that reaches this has a prefix to its unit.
_LONG = 10_000_000
_SHARE = re.compile(r"\b(top-[15]|accuracy|share)\b", re.IGNORECASE)
_BYTES = re.compile(r"\s*\[?\bbytes\b\]?", re.IGNORECASE)
_NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
_SPREAD = re.compile(r"^([+-]?\d*\.?\d+(?:e[+-]\d+)?)(?: ± (\d*\.?\d+))?$")
_NOISE = re.compile(r" ± \d+(?:\.\d+)?e-1[2-9]\b")
_NONE = re.compile(r"\bnan\b")


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of numbers and texts with headings and values to be read.

    Example:
        >>> import pandas as pd
        >>> readable(pd.DataFrame({"layer": ["a"], "bytes moved": [2679685120], "top-1": [0.405]}))
          layer moved [GB] top-1 [%]
        0     a       2.68      40.5
    """
    columns = {}
    for name in frame.columns:
        heading, values = _column(str(name), frame[name])
        columns[heading] = values
    return pd.DataFrame(columns)


def headed(frame: pd.DataFrame, headings: Mapping[str, Heading]) -> pd.DataFrame:
    """A table under the headings that its paper gives, what is declared a share in per cent.

    Example:
        >>> import pandas as pd
        >>> headed(pd.DataFrame({"saved": [0.25, -0.125]}), {"saved": Heading(text="FLOPs saved", share=True)})
          FLOPs saved [%]
        0              25
        1           -12.5
    """
    columns = {}
    for name in frame.columns:
        heading = headings.get(str(name), Heading())
        text, values = heading.text or str(name), frame[name]
        if heading.share:
            shares = [_per_cent(value, -math.inf, math.inf) for value in values]
            told = [value if share is None else share for value, share in zip(values, shares, strict=True)]
            text, values = f"{text} [%]", pd.Series(told, index=values.index)
        columns[text] = values
    return pd.DataFrame(columns)


def _column(name: str, values: pd.Series) -> tuple[str, pd.Series]:
    if pd.api.types.is_bool_dtype(values):
        return name, values
    if pd.api.types.is_numeric_dtype(values):
        if _BYTES.search(name):
            factor, unit = scale(values.dropna(), "B")
            return f"{_BYTES.sub('', name).strip() or 'size'} [{unit}]", _texts(values * factor)
        if values.abs().max() >= _LONG and "[" not in name:
            factor, unit = scale(values.dropna(), "")
            return f"{name} [{unit}]", _texts(values * factor)
    if _SHARE.search(name) and "[" not in name and "%" not in name:
        shares = [_per_cent(value) for value in values]
        if all(share is not None for share in shares) and any(shares):
            return f"{name} [%]", pd.Series(shares, index=values.index)
    if not pd.api.types.is_numeric_dtype(values):
        return name, values.map(
            lambda value: _NONE.sub("—", _NOISE.sub("", value)) if isinstance(value, str) else value)
    if ((values != 0) & (values.abs() < _ROUNDING)).any():
        return name, values.map(lambda value: "≈ 0" if 0 < abs(value) < _ROUNDING else value)
    return name, values


def _texts(values: pd.Series) -> pd.Series:
    return values.map(lambda value: "" if pd.isna(value) else f"{value:.3g}")


def _per_cent(value: object, low: float = 0.0, high: float = 1.0) -> str | None:
    """A share, with its interval or without, in per cent; empty for no value, None for what is no number from `low` to
    `high`."""
    if value is None or value == "" or value != value:  # not a number: none
        return ""
    found = _SPREAD.match(str(value))
    if not found or not low <= float(found[1]) <= high:
        return None
    # As exact as it was written; what has an exponent is a number that nobody rounded.
    decimals = 2 if "e" in found[1] else min(2, max(0, len(found[1].partition(".")[2]) - 2))
    text = f"{100 * float(found[1]):.{decimals}f}"
    return f"{text} ± {100 * float(found[2]):.{decimals}f}" if found[2] else text


def papers_alone(frame: pd.DataFrame, name: str, paper: Paper) -> bool:
    """Whether a table has no number but those that the paper published in the table of that name."""
    published = next((table for table in paper.tables if table.id == name), None)
    if published is None:
        return False
    known = _numbers([cell for row in published.rows for cell in row])
    columns = [frame[column] for column in frame.columns]
    # Headings and names may hold any number; what is measured stands in cells that are numbers.
    cells = [str(value) for column in columns for value in column if _NUMBER.match(str(value)) and pd.notna(value)]
    return bool(cells) and _numbers(cells) <= known


def _numbers(cells: Sequence[object]) -> set[float]:
    return {float(found[1]) for cell in cells if (found := _NUMBER.match(str(cell)))}
