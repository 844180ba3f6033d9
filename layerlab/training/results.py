"""What a fit and a comparison leave, and how both are shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import nn

from layerlab.contract.strategy import Strategy
from layerlab.show.figures import picture
from layerlab.show.interval import mean_interval, scale, spread
from layerlab.show.layer_map import LayerMap
from layerlab.show.table import Table
from layerlab.training.settings import Settings

# Rows of a fit's table; of a longer one every so-many-th epoch is shown, with the first and the last.
EPOCHS = 12
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


def comparison_table(comparison: Comparison) -> Table:
    """One row an arm: accuracy, seconds, FLOPs, bytes moved and peak memory of a run; or why it was left out."""
    frame, headings = in_units(comparison.summary) if comparison.results else (None, {})
    rows = [[row["arm"], *(spread(row[name], row[f"{name} ±"]) for name in headings)]
            for _, row in frame.iterrows()] if frame is not None else []
    rows += [[arm, f"left out: {reason}"] for arm, reason in comparison.failures.items()]
    return Table(["arm", *headings.values()] if headings else ["arm", ""], rows, _caption(comparison))


def _caption(comparison: Comparison) -> str:
    if not comparison.results:
        return "Nothing was trained to the end."
    epochs = max(len(result.history) for result in comparison.results.values())
    seeds = len(comparison.seeds)
    return f"{epochs} epochs, " + (
        "one seed, which says nothing about the spread" if seeds == 1 else f"{seeds} seeds: mean ± 95 % interval")


def fit_table(result: FitResult) -> Table:
    """One row an epoch, or every so-many-th of a long fit: loss, accuracy, seconds, FLOPs."""
    rows = result.history
    step = -(-len(rows) // EPOCHS)
    shown = [row for number, row in enumerate(rows) if number % step == 0 or number == len(rows) - 1]
    header = ["epoch", "training loss", "test loss", "top-1 [%]", "time [s]"]
    texts = [[f"{row['epoch']}", f"{row['train/loss']:.4f}", f"{row['test/loss']:.4f}", f"{100 * row['test/top1']:.2f}",
              f"{row['time/epoch_seconds']:.2f}"] for row in shown]
    flops = [row.get("cost/forward_flops", math.nan) + row.get("cost/backward_flops", math.nan) for row in shown]
    if any(map(math.isfinite, flops)):
        by, label = scale(flops, "FLOP")
        header.append(f"compute [{label}]")
        for text, value in zip(texts, flops, strict=True):
            text.append(spread(by * value))
    return Table(header, texts, result.headline)


@dataclass(eq=False)
class FitResult:
    """What a fit leaves.

    Attributes:
        model: the trained network, in evaluation mode, as a user deploys it.
        history: one row an epoch; metric names as in MLflow, and `epoch`, `timestamp` (ms).
        seed: the fit's.
        name: of the arm in a comparison, or the strategies' names.
        strategies: the strategy objects as the fit left them.
        settings: the fit's.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    seed: int
    name: str
    strategies: tuple[Strategy, ...]
    settings: Settings

    @property
    def frame(self) -> pd.DataFrame:
        """The history as a table, with `seconds`, the training time up to each epoch's end."""
        frame = pd.DataFrame(self.history).drop(columns="timestamp")
        frame["seconds"] = frame["time/epoch_seconds"].cumsum()
        return frame

    @property
    def final(self) -> dict[str, Any]:
        """The last epoch's row."""
        return self.history[-1]

    def total(self, metric: str) -> float:
        """The sum of a metric over the epochs; NaN where it was not measured."""
        return math.fsum(row.get(metric, math.nan) for row in self.history)

    @property
    def layer_maps(self) -> dict[str, LayerMap]:
        """The layer × epoch maps of its strategies, as `strategy: title`."""
        return {f"{strategy.name}: {title}": each for strategy in self.strategies
                for title, each in strategy.layer_maps(self.history).items()}

    @property
    def headline(self) -> str:
        """The result in a line."""
        row, seconds = self.final, self.total("time/epoch_seconds")
        return (
            f"{self.name}, seed {self.seed}: top-1 {row['test/top1']:.2%} after {row['epoch']} epochs "
            f"and {seconds:.1f} s of training"
        )

    def __repr__(self) -> str:
        return self.headline

    def __str__(self) -> str:
        return fit_table(self).text()

    def _repr_html_(self) -> str:
        from layerlab.show import figures

        maps = self.layer_maps
        drawn = picture(figures.png(figures.layer_maps(maps))) if maps else ""
        return fit_table(self)._repr_html_() + drawn


@dataclass(eq=False)
class Comparison:
    """Results of several arms and seeds.

    Attributes:
        results: (arm, seed) → result.
        failures: arm that was left out of them → why.
    """

    results: dict[tuple[str, int], FitResult]
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """In the order given."""
        return list(dict.fromkeys(arm for arm, _ in self.results))

    @property
    def seeds(self) -> list[int]:
        """In the order given."""
        return list(dict.fromkeys(seed for _, seed in self.results))

    @property
    def frame(self) -> pd.DataFrame:
        """One row an arm, seed and epoch, with `seconds` of training up to the epoch's end."""
        frames = [result.frame.assign(arm=arm, seed=seed) for (arm, seed), result in self.results.items()]
        return pd.concat(frames, ignore_index=True)

    @property
    def runs(self) -> pd.DataFrame:
        """One row an arm and seed: what a run reached and cost, columns as in `SUMMARY`."""
        return pd.DataFrame([{"arm": arm, "seed": seed} | {name: value(result) for name, value in SUMMARY.items()}
                             for (arm, seed), result in self.results.items()])

    def per_seed(self, value: Callable[[FitResult], float], arm: str) -> list[float]:
        """`value` of each seed's result of an arm."""
        return [value(self.results[arm, seed]) for seed in self.seeds]

    @property
    def summary(self) -> pd.DataFrame:
        """One row an arm: mean and 95 % half-width over seeds of accuracy, time, FLOPs and bytes."""
        rows = []
        for arm in self.arms:
            row: dict[str, Any] = {"arm": arm, "seeds": len(self.seeds)}
            for label, value in SUMMARY.items():
                values = self.per_seed(value, arm)
                row[label], row[f"{label} ±"] = mean_interval(values)
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return comparison_table(self).text()

    def _repr_html_(self) -> str:
        from layerlab.show import figures

        drawn = picture(figures.png(figures.curves(self.frame, "test/top1"))) if self.results else ""
        return comparison_table(self)._repr_html_() + drawn


# What is told of a run: name with unit → value.
SUMMARY: dict[str, Callable[[FitResult], float]] = {
    "top-1": lambda result: result.final["test/top1"],
    "top-5": lambda result: result.final["test/top5"],
    "best top-1": lambda result: max(row["test/top1"] for row in result.history),
    "seconds": lambda result: result.total("time/epoch_seconds"),
    "TFLOP": lambda result: (result.total("cost/forward_flops") + result.total("cost/backward_flops")) / 1e12,
    "GB moved": lambda result: result.total("cost/bytes_moved") / 1e9,
    "peak MB": lambda result: max(row.get("cost/peak_memory_bytes", math.nan) for row in result.history) / 1e6,
}
