"""Figures 2 and 3 of the paper, what was skipped, and the cost of a step for each skipped prefix."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from layerlab import figures

figures.bind(plain=["conventional", "full learning"], method=["proposed"], others=["linear freezing", "own history"])

TITLE = "multiply-accumulates, VGG-F at 224 × 224"


def operations(costs: pd.DataFrame) -> Figure:
    """Fig. 2: `layerlab.measure.layer_costs` of one image."""
    millions = costs.assign(macs=costs["forward_macs"] / 1e6)
    return figures.layer_bars(millions, {"macs": "forward"}, "million MACs an image", f"Fig. 2: {TITLE}")


def traffic(costs: pd.DataFrame, batch_size: int) -> Figure:
    """Fig. 3: `layer_costs` of a batch, in both accountings, as float32."""
    by = 4 / (batch_size * 1e6)  # bytes an element, MB an image
    scaled = costs.assign(operands=costs["forward_operands"] * by, tensors=costs["forward_tensors"] * by)
    labels = {"operands": "every MAC reads its operands", "tensors": f"every tensor moved once (batch {batch_size})"}
    return figures.layer_bars(
        scaled, labels, "MB an image", "Fig. 3: memory traffic of the forward pass, float32", log=True)


def prefixes(table: pd.DataFrame, dataset: str) -> Figure:
    """Of `analysis.measure_prefixes`: FLOPs beside seconds."""
    names = {"flops": "FLOPs (ideal)", "time": "seconds (measured)"}
    bars = table.rename(columns=names).melt(["skipped", "up to"], list(names.values()), "quantity", "relative")
    return figures.grouped_bars(
        bars, "up to", "relative", "quantity", "relative to a full step", percent=True,
        xlabel="skipped up to and including", title=f"Cost of a training step, VGG-F on {dataset}")


def skipped(maps: Mapping[str, pd.DataFrame]) -> Figure:
    """Of `analysis.skip_map`: which layer was skipped in which epoch."""
    return figures.layer_epoch_map(maps, "", ["learns", "skipped"])


def savings(table: pd.DataFrame) -> Figure:
    """Figs. 6 and 7: of `analysis.savings`."""
    return figures.grouped_bars(
        table, "dataset", "saved", "what", "saved against full learning", percent=True, error="±", xlabel="dataset",
        title="Figs. 6 and 7: saved over the run")


def sweep(table: pd.DataFrame) -> Figure:
    """Of `analysis.sweep_table`: accuracy against FLOPs."""
    return figures.tradeoff(
        table, "FLOPs", "top-1", "arm", "where", "training FLOPs relative to full learning", "final top-1")
