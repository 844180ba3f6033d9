"""What the notebook shows: the paper's table with the measured numbers beside the published."""

from __future__ import annotations

import pandas as pd

from layerlab import Comparison


def table_1(published: pd.DataFrame, comparison: Comparison, dataset: str, baseline: str) -> pd.DataFrame:
    """The paper's table, with a row of the same columns for each arm that was run here: means over seeds."""
    rows = {}
    for arm in comparison.arms:
        top1 = comparison.estimate("top-1", arm).mean
        saved = comparison.saving("TFLOP", arm, baseline).mean
        rows[f"{arm} (here, {dataset})"] = [round(top1, 1), round(saved, 1)]
    measured = pd.DataFrame.from_dict(rows, orient="index", columns=list(published.columns))
    table = pd.concat([published.rename(index=lambda method: f"{method} (paper)"), measured])
    table.index.name = published.index.name
    return table
