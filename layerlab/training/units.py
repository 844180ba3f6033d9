"""What comparisons measure, in units that make its numbers readable."""

from __future__ import annotations

import pandas as pd

from layerlab.show.interval import scale

# Heading, unit before scaling, and the factor from `SUMMARY` to that unit.
_COLUMNS: dict[str, tuple[str, str, float]] = {
    "top-1": ("top-1", "%", 100.0),
    "seconds": ("time", "s", 1.0),
    "TFLOP": ("compute", "FLOP", 1e12),
    "GB moved": ("moved", "B", 1e9),
    "peak MB": ("peak memory", "B", 1e6),
}


def in_units(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """`Comparison.summary` or `Comparison.runs` in units that make its numbers readable.

    Returns:
        (the frame with scaled columns, column → heading with the unit, of those that were measured).
    """
    scaled, headings = frame.copy(), {}
    for name, (heading, unit, factor) in _COLUMNS.items():
        if not frame[name].notna().any():
            continue
        by, label = scale(factor * frame[name], unit) if unit in ("FLOP", "B") else (1.0, unit)
        for column in {name, f"{name} ±"} & set(frame.columns):
            scaled[column] = by * factor * frame[column]
        headings[name] = f"{heading} [{label}]"
    return scaled, headings
