"""Figures: what is written at an axis is what is drawn there."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from layerlab import figures


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.31, 0.47), (0.9, 0.93), (0.981, 0.9865), (0.99, 0.991)])
@pytest.mark.parametrize("kind", ["curves", "grouped_bars", "tradeoff"])
def test_each_label_of_a_share_says_its_tick_s_value_and_none_repeats(kind, low, high):
    shares = [low + (high - low) * step / 5 for step in range(6)]
    if kind == "curves":
        frame = pd.DataFrame({"arm": "a", "seed": 0, "epoch": range(1, 7), "seconds": range(1, 7), "test/top1": shares})
        drawn = figures.curves(frame, "test/top1")
        axes = [drawn.axes[0].yaxis]
    elif kind == "grouped_bars":
        frame = pd.DataFrame({"x": range(6), "y": shares, "hue": "a"})
        drawn = figures.grouped_bars(frame, "x", "y", "hue", "share", percent=True)
        axes = [drawn.axes[0].yaxis]
    else:
        frame = pd.DataFrame({"x": shares, "y": shares, "name": list("abcdef"), "panel": "p"})
        drawn = figures.tradeoff(frame, "x", "y", "name", "panel", "cost", "share")
        axes = [drawn.axes[0].xaxis, drawn.axes[0].yaxis]
    drawn.canvas.draw()
    for axis in axes:
        texts = [label.get_text() for label in axis.get_ticklabels()]
        assert len(set(texts)) == len(texts)
        for place, text in zip(axis.get_ticklocs(), texts, strict=True):
            assert float(text.rstrip("%").replace("−", "-")) == pytest.approx(100 * place, abs=1e-6)
    plt.close(drawn)
