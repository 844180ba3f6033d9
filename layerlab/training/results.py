"""What a fit and a comparison leave, and how both are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import nn

from layerlab.base.errors import LayerlabError, unknown
from layerlab.contract.preflight import Preflight
from layerlab.contract.strategy import Strategy
from layerlab.show.interval import Estimate, mean_interval, scale, spread
from layerlab.show.layer_map import LayerMap
from layerlab.show.table import Table
from layerlab.training.metric_names import check_metric, own_metrics
from layerlab.training.pays import Pays
from layerlab.training.settings import Settings
from layerlab.training.units import in_units

# The arm without a strategy, where nobody has named it.
BASELINE = "baseline"
# Rows of a fit's table; of a longer one every so-many-th epoch is shown, with the first and the last.
EPOCHS = 12


def comparison_table(comparison: Comparison) -> Table:
    """One row an arm: accuracy, seconds, FLOPs, bytes moved and peak memory of a run; or why it was left out."""
    headings: dict[str, str] = {}
    frame = None
    if comparison.results:
        frame, headings = in_units(comparison.summary)
    # What no accuracy tells: the loss where there are no classes, and metrics of the user's own.
    others = own_metrics(comparison.results.values())
    if comparison.results and "top-1" not in headings:
        others = ["test/loss", *others]
    rows = [[row["arm"], *(str(comparison.estimate(name, row["arm"])) for name in others),
             *(spread(row[name], row[f"{name} ±"]) for name in headings)]
            for _, row in frame.iterrows()] if frame is not None else []
    rows += [[arm, f"left out: {reason}"] for arm, reason in comparison.failures.items()]
    notes = [f"{arm}: {comparison.pays(arm)}" for arm in comparison.equal]
    if "peak MB" in headings and any(_on_cpu(result.model) for result in comparison.results.values()):
        notes.append("Peak memory on a CPU: of live tensors, without what kernels take for themselves "
                     "(measure.peak_allocated).")
    if any(not comparison.by_turns(arm) for arm in comparison.arms):
        notes.append("Time is told of arms that took turns; the others were trained after them.")
    if comparison.untouched:
        notes.append("Data, torch's settings and the first batch: bit-equal before and after "
                     f"{', '.join(comparison.untouched)}.")
    names = [name.replace("/", " ") if name == "test/loss" else name.removeprefix("test/") for name in others]
    return Table(["arm", *names, *headings.values()] if headings else ["arm", ""], rows, _caption(comparison), notes)


def _on_cpu(model: nn.Module) -> bool:
    return any(parameter.device.type == "cpu" for parameter in model.parameters())


def _caption(comparison: Comparison) -> str:
    if not comparison.results:
        return "Nothing was trained to the end."
    lengths = {len(result.history) for result in comparison.results.values()}
    early = any(result.settings.patience is not None for result in comparison.results.values())
    epochs = f"{min(lengths)} to {max(lengths)}" if early and len(lengths) > 1 else f"{max(lengths)}"
    seeds = len(comparison.seeds)
    return f"{epochs} epochs, " + (
        "one seed, which says nothing about the spread" if seeds == 1 else f"{seeds} seeds: mean ± 95 % interval")


def fit_table(result: FitResult) -> Table:
    """One row an epoch, or every so-many-th of a long fit: loss, accuracy, seconds, FLOPs."""
    rows = result.history
    step = -(-len(rows) // EPOCHS)
    shown = [row for number, row in enumerate(rows) if number % step == 0 or number == len(rows) - 1]
    of_own = own_metrics([result])
    header = ["epoch", "training loss", "test loss", *(["top-1 [%]"] if "test/top1" in result.final else []),
              *(name.removeprefix("test/") for name in of_own), "time [s]"]
    texts = [[f"{row['epoch']}", f"{row['train/loss']:.4f}", f"{row['test/loss']:.4f}",
              *([f"{100 * row['test/top1']:.2f}"] if "test/top1" in row else []),
              *(f"{row[name]:.4g}" for name in of_own), f"{row['time/epoch_seconds']:.2f}"] for row in shown]
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
        steps: of the optimizer, over all epochs.
        chance: the test accuracy of always naming the most frequent class, a share.
        preflights: what each strategy said before the first step, by its name.
        turns: the same of fits that took turns epoch by epoch, so that their seconds can be compared.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    seed: int
    name: str
    strategies: tuple[Strategy, ...]
    settings: Settings
    steps: int = 0
    chance: float = math.nan
    preflights: dict[str, Preflight] = field(default_factory=dict)
    turns: str = ""

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
        check_metric(metric, [self], SUMMARY)
        return math.fsum(row.get(metric, math.nan) for row in self.history)

    def time_to(self, level: float, metric: str = "test/top1") -> float:
        """Seconds of training until `metric` first reaches `level` at an epoch's end; infinite if it never does.

        Example:
            >>> both.results["plain", 0].time_to(1.01)
            inf
        """
        check_metric(metric, [self], SUMMARY)
        seconds = 0.0
        for row in self.history:
            seconds += row["time/epoch_seconds"]
            if row[metric] >= level:
                return seconds
        return math.inf

    def within(
        self, budget: float, costs: Sequence[str] = ("cost/forward_flops", "cost/backward_flops"),
        metric: str = "test/top1",
    ) -> float:
        """`metric` once so much is spent, interpolated between epochs' ends and from 0 at the start.

        Args:
            budget: what the `costs` add up to; the last epoch's value from the whole run's cost on.
            costs: names of metrics that count, each one epoch's; an epoch without one of them does not spend it.
            metric: the name of what is reached.

        Example:
            >>> result = both.results["plain", 0]
            >>> result.within(result.total("time/epoch_seconds"), ["time/epoch_seconds"]) == result.final["test/top1"]
            True
        """
        spent, last = 0.0, 0.0
        for row in self.history:
            cost = math.fsum(row.get(name, 0.0) for name in costs)
            if spent + cost > budget:
                return last + (row[metric] - last) * (budget - spent) / cost
            spent, last = spent + cost, row[metric]
        return last

    @property
    def layer_maps(self) -> dict[str, LayerMap]:
        """The layer × epoch maps of its strategies, as `strategy: title`."""
        return {f"{strategy.name}: {title}": each for strategy in self.strategies
                for title, each in strategy.layer_maps(self.history).items()}

    @property
    def epochs_told(self) -> str:
        """The epochs that were trained, in words; of how many, where `patience` ended the training before the last."""
        trained, planned = self.final["epoch"], self.settings.epochs
        early = self.settings.patience is not None and trained < planned and self.settings.max_steps is None
        return f"{trained} of {planned}" if early else str(trained)

    @property
    def headline(self) -> str:
        """The result in a line."""
        row, seconds = self.final, self.total("time/epoch_seconds")
        reached = f"top-1 {row['test/top1']:.2%}" if "test/top1" in row else ", ".join(
            f"{name.replace('/', ' ')} {row[name]:.4g}" for name in ("test/loss", *own_metrics([self])))
        return (
            f"{self.name}, seed {self.seed}: {reached} after {self.epochs_told} epochs "
            f"and {seconds:.1f} s of training"
        )

    def __repr__(self) -> str:
        return self.headline

    def __str__(self) -> str:
        return fit_table(self).text()

    def _repr_html_(self) -> str:
        from layerlab.show import figures

        maps = self.layer_maps
        drawn = figures.picture(figures.png(figures.layer_maps(maps))) if maps else ""
        return fit_table(self)._repr_html_() + drawn


# What a number of a result is asked by: a name of `SUMMARY` or of MLflow, or a function.
Metric = str | Callable[[FitResult], float]


def _value_of(metric: Metric) -> Callable[[FitResult], float]:
    if callable(metric):
        return metric
    if metric in SUMMARY:
        return SUMMARY[metric]
    return lambda result: result.final.get(metric, math.nan)


def _is_accuracy(metric: Metric) -> bool:
    return isinstance(metric, str) and metric.startswith(("top-", "best top-", "test/top", "validation/top"))


def _ratio(value: float, whole: float) -> float:
    return value / whole if whole else math.nan


@dataclass(eq=False)
class Comparison:
    """Results of several arms and seeds.

    Seconds are NaN of an arm that did not take turns with the baseline (or the first arm, where there is none): what
    else the machine did in the meantime would be in their ratio. `FitResult` has them as they were.

    Attributes:
        results: (arm, seed) → result.
        failures: arm that was left out of them → why.
        baseline: name of the arm without strategies; empty where there is none.
        equal: arm → name of the baseline that costs as much as the arm, where one was trained.
        placebos: arm → name of its placebo, where one was trained.
        untouched: arms with strategies after whose turns data, torch's settings and the baseline's first batch were
            bit-equal to what they were before; a comparison ends where they are not.

    Example:
        >>> from layerlab import build_model, compare, load_dataset
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> network = lambda: build_model("mlp", num_classes=10, image_size=8, width=16)
        >>> both = compare(network, data, {"plain": (), "same": ()}, seeds=[0, 1, 2], epochs=1, progress=False)
        >>> print(both.paired("top-1", "same", "plain"))
        0.000 points
    """

    results: dict[tuple[str, int], FitResult]
    failures: dict[str, str] = field(default_factory=dict)
    baseline: str = ""
    equal: Mapping[str, str] = field(default_factory=dict)
    placebos: Mapping[str, str] = field(default_factory=dict)
    untouched: tuple[str, ...] = ()

    @property
    def arms(self) -> list[str]:
        """In the order given, with those that were trained beside them at the end."""
        return list(dict.fromkeys(arm for arm, _ in self.results))

    @property
    def given(self) -> Comparison:
        """The arms that were asked for, without those that were trained beside them to judge them."""
        beside = {*self.equal.values(), *self.placebos.values()}
        results = {key: result for key, result in self.results.items() if key[0] not in beside}
        untouched = tuple(arm for arm in self.untouched if arm not in beside)
        return Comparison(results, self.failures, self.baseline, untouched=untouched)

    @property
    def seeds(self) -> list[int]:
        """In the order given."""
        return list(dict.fromkeys(seed for _, seed in self.results))

    @property
    def frame(self) -> pd.DataFrame:
        """One row an arm, seed and epoch, with `seconds` of training up to the epoch's end."""
        frames = []
        for (arm, seed), result in self.results.items():
            frame = result.frame.assign(arm=arm, seed=seed)
            if not self.by_turns(arm):
                frame["seconds"] = math.nan
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    @property
    def runs(self) -> pd.DataFrame:
        """One row an arm and seed: what a run reached and cost, columns as in `SUMMARY`."""
        columns: dict[str, list[Any]] = {"arm": [], "seed": []} | {name: [] for name in SUMMARY}
        for arm in self.arms:
            columns["arm"] += [arm] * len(self.seeds)
            columns["seed"] += self.seeds
            for name in SUMMARY:
                columns[name] += self.per_seed(name, arm)
        return pd.DataFrame(columns)

    def by_turns(self, arm: str) -> bool:
        """Whether an arm took turns with the baseline, or the first arm, with every seed.

        Raises:
            LayerlabError: no such arm.

        Example:
            >>> both.by_turns("same")
            True
        """
        reference = self.of(self.baseline if self.baseline in self.arms else self.arms[0])
        return all(mine.turns == theirs.turns for mine, theirs in zip(self.of(arm), reference, strict=True))

    def of(self, arm: str) -> list[FitResult]:
        """An arm's results, in the order of the seeds.

        Raises:
            LayerlabError: no such arm.
        """
        if arm not in self.arms:
            raise unknown("arm", arm, self.arms)
        return [self.results[arm, seed] for seed in self.seeds]

    def per_seed(self, metric: Metric, arm: str) -> list[float]:
        """One value for each seed of an arm.

        Args:
            metric: a name of `SUMMARY` (`top-1`, `seconds`, `TFLOP`, …); a metric's name as in MLflow, whose value in
                the last epoch is meant; or a function of a `FitResult`.
            arm: the arm's name.

        Example:
            >>> both.per_seed("top-1", "plain") == both.per_seed("test/top1", "same")
            True
        """
        value = _value_of(metric)
        if isinstance(metric, str) and metric not in SUMMARY:
            check_metric(metric, self.results.values(), SUMMARY)
        if metric == "seconds" and not self.by_turns(arm):
            return [math.nan] * len(self.seeds)
        return [value(result) for result in self.of(arm)]

    def estimate(self, metric: Metric, arm: str, unit: str = "") -> Estimate:
        """Mean and 95 % interval of an arm's `metric`; accuracies that are named come in per cent.

        Example:
            >>> both.estimate("top-1", "plain").unit
            '%'
        """
        values = self.per_seed(metric, arm)
        if _is_accuracy(metric):
            return Estimate(tuple(100 * value for value in values), unit or "%")
        return Estimate(tuple(values), unit)

    def paired(self, metric: Metric, arm: str, baseline: str) -> Estimate:
        """An arm against another one under the same seeds.

        Args:
            metric: as `per_seed`.
            arm, baseline: names of arms.

        Returns:
            For a named accuracy the difference in points, for anything else the ratio arm ÷ baseline.

        Example:
            >>> print(both.paired("top-1", "same", "plain"))
            0.000 points
            >>> print(both.paired("TFLOP", "same", "plain"))
            1.000 ×
        """
        pairs = zip(self.per_seed(metric, arm), self.per_seed(metric, baseline), strict=True)
        if _is_accuracy(metric):
            return Estimate(tuple(100 * (mine - theirs) for mine, theirs in pairs), "points")
        return Estimate(tuple(_ratio(mine, theirs) for mine, theirs in pairs), "×")

    def observed(self, baseline: str) -> dict[str, float]:
        """What a claim's gates read of an arm: `baseline top-1`, the mean over seeds in per cent.

        Example:
            >>> 0 <= both.observed("plain")["baseline top-1"] <= 100
            True
        """
        return {"baseline top-1": self.estimate("top-1", baseline).mean}

    def saving(self, metric: Metric, arm: str, baseline: str) -> Estimate:
        """What an arm saves of a cost against another one, in per cent of the other's, seed by seed.

        Args:
            metric: as `per_seed`.
            arm, baseline: names of arms.

        Example:
            >>> print(both.saving("TFLOP", "same", "plain"))
            0.000 %
        """
        pairs = zip(self.per_seed(metric, arm), self.per_seed(metric, baseline), strict=True)
        return Estimate(tuple(100 * (1 - _ratio(mine, theirs)) for mine, theirs in pairs), "%")

    def speedup(self, arm: str, baseline: str, metric: str = "test/top1", level: float | None = None) -> Estimate:
        """How many times sooner an arm reaches an accuracy than the baseline does, seed by seed.

        Args:
            arm, baseline: names of arms.
            metric: the accuracy, as a share.
            level: what is to be reached. Default: the best that the baseline reaches with the same seed.

        Returns:
            Ratios of seconds; NaN with a seed in which either never reaches it, and of arms without turns.

        Example:
            >>> len(both.speedup("same", "plain", level=0.05).values)
            3
        """
        check_metric(metric, self.results.values(), SUMMARY)
        ratios = []
        for mine, theirs in zip(self.of(arm), self.of(baseline), strict=True):
            wanted = max(row[metric] for row in theirs.history) if level is None else level
            ratio = theirs.time_to(wanted, metric) / mine.time_to(wanted, metric)
            happened = math.isfinite(ratio) and ratio > 0 and mine.turns == theirs.turns
            ratios.append(ratio if happened else math.nan)
        return Estimate(tuple(ratios), "×")

    def pays(self, arm: str, metric: Metric | None = None) -> Pays:
        """Whether an arm is more accurate than plain training that costs as much.

        Args:
            arm: one that `compare(…, equal="flops")` trained such a baseline beside.
            metric: an accuracy, as `per_seed`. Default: top-1; where there are no classes, how much lower the loss is.

        Raises:
            LayerlabError: no such baseline was trained.

        Example:
            >>> from layerlab import build_model, compare, load_dataset, strategies
            >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
            >>> arms = {"full": (), "skip": strategies("lars-skip")}
            >>> network = lambda: build_model("resnet-cifar", num_classes=10, channels=1, depth=8)
            >>> runs = compare(network, data, arms, epochs=1, equal="flops", progress=False)
            >>> runs.pays("skip").verdict
            'undecided'
        """
        self.of(arm)
        if arm not in self.equal:
            raise LayerlabError(
                f"No baseline of equal cost was trained beside {arm!r}; pass equal='flops' to compare."
            )
        plain = self.equal[arm]
        pairs = zip(self.of(plain), self.of(self.baseline), strict=True)
        shares = [short.steps / whole.steps for short, whole in pairs]
        classes = any("test/top1" in result.final for result in self.results.values())
        if metric is None and not classes:
            losses = zip(self.per_seed("test/loss", plain), self.per_seed("test/loss", arm), strict=True)
            lower = Estimate(tuple(theirs - mine for theirs, mine in losses), "lower loss")
            return Pays(lower, math.fsum(shares) / len(shares))
        return Pays(self.paired(metric or "top-1", arm, plain), math.fsum(shares) / len(shares))

    @property
    def summary(self) -> pd.DataFrame:
        """One row an arm: mean and 95 % half-width over seeds of accuracy, time, FLOPs and bytes."""
        rows = []
        for arm in self.arms:
            row: dict[str, Any] = {"arm": arm, "seeds": len(self.seeds)}
            for label in SUMMARY:
                row[label], row[f"{label} ±"] = mean_interval(self.per_seed(label, arm))
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return comparison_table(self).text()

    def _repr_html_(self) -> str:
        from layerlab.show import figures

        drawn = figures.picture(figures.png(figures.curves(self.frame, "test/top1"))) if self.results else ""
        return comparison_table(self)._repr_html_() + drawn


# What is told of a run: name with unit → value.
SUMMARY: dict[str, Callable[[FitResult], float]] = {
    "top-1": lambda result: result.final.get("test/top1", math.nan),
    "top-5": lambda result: result.final.get("test/top5", math.nan),
    "best top-1": lambda result: max(row.get("test/top1", math.nan) for row in result.history),
    "seconds": lambda result: result.total("time/epoch_seconds"),
    "TFLOP": lambda result: (result.total("cost/forward_flops") + result.total("cost/backward_flops")) / 1e12,
    "GB moved": lambda result: result.total("cost/bytes_moved") / 1e9,
    "peak MB": lambda result: max(row.get("cost/peak_memory_bytes", math.nan) for row in result.history) / 1e6,
}
