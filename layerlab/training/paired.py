"""Differences between two arms, seed by seed."""

from __future__ import annotations

import math

from layerlab.training.results import SUMMARY, Comparison

BASELINE = "baseline"


def paired(comparison: Comparison, column: str, arm: str, other: str) -> list[float]:
    """What an arm has of `column` against another, seed by seed: differences in points of accuracies, else ratios."""
    values = [comparison.per_seed(SUMMARY[column], each) for each in (arm, other)]
    if column.startswith(("top", "best")):
        return [100 * (mine - theirs) for mine, theirs in zip(*values, strict=True)]
    return [mine / theirs if theirs else math.nan for mine, theirs in zip(*values, strict=True)]
