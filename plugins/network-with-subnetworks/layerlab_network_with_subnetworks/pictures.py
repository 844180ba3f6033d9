"""How the networks look: the models of one network share a tone, in all figures of the notebook."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from layerlab import figures

MODELS = ("model0", "model1", "model2")
ALONE, OWN_RATE = "trained separately", "trained separately, own rate"

figures.bind(
    plain=[ALONE, *(f"ref-{model}" for model in MODELS)],
    method=["model0-1-2, trained at once", "one block at a time, trained at once",
            *(f"{model} of model0-1-2" for model in MODELS)],
    others=[("model0-1, trained at once", "two blocks at a time, trained at once",
             *(f"{model} of model0-1" for model in MODELS[:2])),
            (OWN_RATE, *(f"ref-tuned-{model}" for model in MODELS)), *MODELS],
)


def curves(frame: pd.DataFrame, title: str) -> Figure:
    """`analysis.learning_curves`, or their later part, which the title says."""
    first = frame["epoch"].min()
    return figures.curves(frame, "test/top1", title=f"{title}, from epoch {first} on" if first > 1 else title)


def choice(frame: pd.DataFrame, title: str) -> Figure:
    """`analysis.cost_and_accuracy`: each network a line, its models against what they cost."""
    costs: Mapping[str, str] = {"parameters": "parameters", "latency": "latency of one image [µs]"}
    return figures.families(frame, costs, "top-1", "family", "model", "test accuracy, top-1", title)


def settings(bars: pd.DataFrame, title: str) -> Figure:
    """`analysis.settings_bars`."""
    return figures.grouped_bars(bars, "setting", "points", "model", "points of accuracy", xlabel="setting", title=title)
