"""Strategies on one's own network and images: which arms there are, what they gain and cost, which one to use."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from layerlab.data import Augment, Dataset, load_dataset
from layerlab.errors import LayerlabError, reason
from layerlab.measure import mean_interval
from layerlab.models import MODELS, network_builder, own_network
from layerlab.strategy import Strategy, check_composition
from layerlab.study import Session, default_folder
from layerlab.tables import Table, spread
from layerlab.training import SUMMARY, Comparison

BASELINE = "baseline"
ALL = "all"
# Costs that a strategy may save: what for → column of `Comparison.runs`.
COSTS = {"time": "seconds", "compute": "TFLOP", "memory": "peak MB"}
# A ratio nearer to 1 than this is rounding.
_EXACT = 1e-6
# What a saving has to be, for a strategy to be worth it: the order in which arms take turns alone makes some per cent.
WORTH = 0.05


# ---------------------------------------------------------------------------------------------- what is compared


def load_images(
    data: str, network: str, *, image_size: int | None = None, channels: int | None = None, limit: int | None = None,
    augment: Augment = "none", padding: int = 2, **options: Any,
) -> Dataset:
    """`load_dataset` with the channels that a network takes, where that is known: 3 for torchvision's.

    Args:
        data, image_size, channels, limit, options: as `load_dataset`.
        network: as `build_network` takes it.
        augment, padding: as `Dataset.augmented`.
    """
    if channels is None and ":" not in network and network not in MODELS:
        channels = 3
    loaded = load_dataset(data, image_size=image_size, channels=channels, limit=limit, **options)
    return loaded.augmented(augment, padding)


def build_network(network: str, data: Dataset, options: Mapping[str, Any] | None = None) -> Callable[[], nn.Module]:
    """`layerlab.models.network_builder` for a dataset."""
    return network_builder(network, data.classes, data.shape, **(options or {}))


class Arms(NamedTuple):
    """What is to be compared with the baseline.

    Attributes:
        chosen: name → strategies.
        refused: name → why it cannot be made at all.
    """

    chosen: dict[str, tuple[Strategy, ...]]
    refused: dict[str, str]


def make_arms(
    names: str | Sequence[str] = ALL,
    combinations: Sequence[str] | Mapping[str, Mapping[str, Mapping[str, Any]]] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Arms:
    """An arm for each strategy, and for each combination of several.

    Args:
        names: installed strategies, or `all`: whoever wrote them, and those that cannot be used are listed as such.
        combinations: as `one-method + another`; or with settings of their own, name → strategy → settings.
        settings: strategy → settings, wherever it is used without others.

    Raises:
        LayerlabError: what was written is wrong: a strategy that is not installed, settings that it does not have.
    """
    from layerlab import strategies

    settings = settings or {}
    for name in settings:
        strategies[name].load()
    arms = Arms({}, {})
    if names == ALL:
        for name in strategies:
            try:
                arms.chosen[name] = (strategies(name, **settings.get(name, {})),)
            # A third party's strategy may fail in any way; with settings that were written for it, they are to blame.
            except (Exception, SystemExit) as error:
                if name in settings:
                    raise
                arms.refused[name] = reason(error)
    else:
        for name in [names] if isinstance(names, str) else names:
            arms.chosen[name] = (strategies(name, **settings.get(name, {})),)
    for label, parts in _combined(combinations):
        made = tuple(strategies(name, **(settings.get(name, {}) if own is None else own)) for name, own in parts)
        if label in (BASELINE, *arms.chosen, *arms.refused):
            raise LayerlabError(f"Two arms are called {label!r}; give one of them another name.")
        try:
            check_composition(made)
        except LayerlabError as error:
            arms.refused[label] = str(error)
        else:
            arms.chosen[label] = made
    return arms


def _combined(
    combinations: Sequence[str] | Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Iterable[tuple[str, list[tuple[str, Mapping[str, Any] | None]]]]:
    """(label, [(strategy, its own settings or None), …]) of each combination."""
    if isinstance(combinations, Mapping):
        for label, parts in combinations.items():
            if not isinstance(parts, Mapping) or not parts:
                raise LayerlabError(f"Combination {label!r} lists no strategies; write "
                                    f"{{{label!r}: {{'one-method': {{'share': 0.5}}, 'another': {{}}}}}}.")
            yield label, [(name, own or {}) for name, own in parts.items()]
        return
    for text in [combinations] if isinstance(combinations, str) else combinations:
        names = [part.strip() for part in str(text).split("+")]
        if len(names) < 2 or not all(names):
            raise LayerlabError(f"Combination {text!r} is none; join two strategies or more by +, such as "
                                "'one-method + another'.")
        yield " + ".join(names), [(name, None) for name in names]


# ---------------------------------------------------------------------------------------------- doing it


def open_session(
    experiment: str, data: Dataset, network: str, output: str | Path | None = None, **parameters: Any
) -> Session:
    """A notebook's session: the same parameters, data and network of one's own go on where they were interrupted.

    Args:
        experiment: MLflow's, and the folder below `runs`.
        output: its folder. Default: `runs/<experiment>/<data>-<network>-<digest of the parameters>`.
        parameters: of the notebook.
    """
    values = {"data": data.name, "network": network, **parameters}
    title = f"{Path(data.name).name} · {network}"
    folder = output or default_folder(experiment, re.sub(r"[^\w.-]+", "-", title), values)
    # Another content of the same folder of images, or an edited network, begins anew rather than going on.
    values["content"] = data.fingerprint
    if ":" in network:
        file = own_network(network)[1]
        values["code"] = hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest() if file else ""
    tags = {"network": network, "dataset": data.name}
    return Session(experiment, f"{experiment} · {title}", Path(folder), values, tags)


def survey(
    session: Session, network: Callable[[], nn.Module], data: Dataset, arms: Arms, **settings: Any
) -> Comparison:
    """Train the baseline and every arm under the same seeds, by turns; who refuses or fails is left out with a reason.

    Args:
        session: keeps the checkpoints and logs the runs.
        settings: as `compare`.

    Raises:
        LayerlabError: what fails without any strategy.
    """
    every = {BASELINE: (), **arms.chosen}
    runs = session.compare(session.experiment, network, data, every, keep_going=tuple(arms.chosen), **settings)
    runs.failures |= arms.refused
    return runs


# ---------------------------------------------------------------------------------------------- what the numbers say


def paired(comparison: Comparison, column: str, arm: str, other: str) -> list[float]:
    """What an arm has of `column` against another, seed by seed: differences in points of accuracies, else ratios."""
    values = [comparison.per_seed(SUMMARY[column], each) for each in (arm, other)]
    if column.startswith(("top", "best")):
        return [100 * (mine - theirs) for mine, theirs in zip(*values, strict=True)]
    return [mine / theirs if theirs else math.nan for mine, theirs in zip(*values, strict=True)]


def against(comparison: Comparison, baseline: str = BASELINE) -> pd.DataFrame:
    """Every arm against the baseline, seed by seed.

    Returns:
        A row an arm: `top-1` (difference in points), `seconds`, `TFLOP`, `GB moved`, `peak MB` (ratios), each a mean
        with its half-width as `column ±`; and `left out`, the reason of an arm that has no numbers.
    """
    rows: list[dict[str, Any]] = []
    for arm in comparison.arms:
        if arm == baseline:
            continue
        row: dict[str, Any] = {"arm": arm}
        for column in ("top-1", "seconds", "TFLOP", "GB moved", "peak MB"):
            row[column], row[f"{column} ±"] = mean_interval(paired(comparison, column, arm, baseline))
        rows.append(row | {"left out": ""})
    rows += [{"arm": arm, "left out": reason} for arm, reason in comparison.failures.items()]
    return pd.DataFrame(rows)


def against_table(comparison: Comparison, baseline: str = BASELINE) -> Table:
    """`against`, to be read."""
    headings = {"top-1": "top-1 [points]", "seconds": "time [×]", "TFLOP": "compute [×]", "GB moved": "moved [×]",
                "peak MB": "peak memory [×]"}
    rows = []
    for _, row in against(comparison, baseline).iterrows():
        if row["left out"]:
            rows.append([row["arm"], f"left out: {row['left out']}"])
            continue
        values = {column: (row[column], row[f"{column} ±"]) for column in headings}
        rows.append([row["arm"], *(_signed(value) if column == "top-1" else spread(*value)
                                   for column, value in values.items())])
    seeds = len(comparison.seeds)
    return Table(["against the baseline", *headings.values()], rows, "one seed" if seeds == 1 else
                 f"{seeds} seeds: mean ± 95 % interval of differences and ratios, seed by seed")


def pareto_front(frame: pd.DataFrame, cost: str, value: str) -> list[str]:
    """The arms that no other beats: none costs at most as much and reaches at least as much, one of both for less.

    Args:
        frame: a row an arm, `Comparison.summary` say, with `arm` and both columns.
        cost: less is better.
        value: more is better.

    Returns:
        Their names in the frame's order; an arm without a number is not among them.
    """
    points = [(row["arm"], row[cost], row[value]) for _, row in frame.iterrows()
              if math.isfinite(row[cost]) and math.isfinite(row[value])]
    return [
        arm for arm, spent, reached in points
        if not any(less <= spent and more >= reached and (less < spent or more > reached) for _, less, more in points)
    ]


@dataclass(frozen=True)
class Advice:
    """Which strategy to use, by the numbers of a comparison.

    Attributes:
        choices: `accuracy`, `time`, `compute`, `memory` → the arms that are best for it; several where the numbers do
            not tell them apart; none where none is measurably better than the baseline.
        sentences: the answer, and for each of these what it rests on.
    """

    choices: dict[str, tuple[str, ...]]
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.sentences)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        first, *rest = map(html.escape, self.sentences)
        return f"<p><b>{first}</b></p>" + "".join(f"<p>{sentence}</p>" for sentence in rest)


def advise(
    comparison: Comparison, baseline: str = BASELINE, tolerance: float = 1.0, test_images: int | None = None
) -> Advice:
    """Which strategy to use: for accuracy, and for less time, compute or memory at an accuracy that is kept.

    An arm is better in something when the whole 95 % interval of its difference to the baseline, or of its ratio, taken
    seed by seed, says so; a saving has to be `WORTH` besides. It keeps the accuracy when the whole interval is above a
    loss of `tolerance`. Two arms are told apart when the interval of one against the other says so.

    Args:
        tolerance: points of top-1 that may be lost.
        test_images: how many top-1 comes from: no interval of it is taken to be narrower than one of them, since a few
            seeds may agree by chance.
    """
    arms = [arm for arm in comparison.arms if arm != baseline]
    nothing: dict[str, tuple[str, ...]] = dict.fromkeys(("accuracy", *COSTS), ())
    if not arms:
        return Advice(nothing, ("There is nothing to choose from: no strategy was trained to the end.",))
    if len(comparison.seeds) < 2:
        return Advice(nothing, (
            "Nothing can be told apart: one seed says nothing about how much results vary by chance. Compare with at "
            "least three, seeds=[0, 1, 2].",))
    finest = 100 / test_images if test_images else 0.0
    measured = {arm: mean_interval(paired(comparison, "top-1", arm, baseline)) for arm in arms}
    points = {arm: (mean, max(half, finest)) for arm, (mean, half) in measured.items()}
    choices, details = dict(nothing), []
    choices["accuracy"], sentences = _most_accurate(comparison, points)
    details += sentences
    dearer = _dearer(comparison, baseline, arms)
    for goal, column in COSTS.items():
        choices[goal], sentence = _cheapest(comparison, goal, column, baseline, points, tolerance, dearer)
        details.append(sentence)
    return Advice(choices, (_headline(choices, tolerance), *details))


def _most_accurate(
    comparison: Comparison, points: Mapping[str, tuple[float, float]]
) -> tuple[tuple[str, ...], list[str]]:
    """The arms measurably above the baseline that are not told apart from the best, and what to say of accuracy."""
    better = [arm for arm, (mean, half) in points.items() if mean - half > 0]
    worse = [arm for arm, (mean, half) in points.items() if mean + half < 0]
    chosen: tuple[str, ...] = ()
    sentences = ["Accuracy: no strategy is measurably above the baseline."]
    if better:
        best = max(better, key=lambda arm: points[arm][0])
        chosen = (best, *(arm for arm in better if arm != best and _includes(
            mean_interval(paired(comparison, "top-1", best, arm)), 0.0)))
        sentences = [f"Accuracy: {_listed({arm: f'{_signed(points[arm])} points of top-1' for arm in chosen})}."]
    if worse:
        below = ", ".join(f"{arm} ({_signed(points[arm])} points)" for arm in worse)
        sentences.append(f"Measurably less accurate than the baseline: {below}.")
    return chosen, sentences


def _cheapest(
    comparison: Comparison, goal: str, column: str, baseline: str, points: Mapping[str, tuple[float, float]],
    tolerance: float, dearer: Mapping[str, str],
) -> tuple[tuple[str, ...], str]:
    """The arms that are measurably cheaper, keep the accuracy and are not told apart from the cheapest, in words."""
    ratios = {arm: mean_interval(paired(comparison, column, arm, baseline)) for arm in points}
    cheaper = [arm for arm, (mean, half) in ratios.items() if mean + half < 1 - _EXACT and mean <= 1 - WORTH]
    if not cheaper:
        return (), f"Less {goal}: no strategy is measurably below the baseline by {100 * WORTH:g} % or more."
    told = {arm: f"{spread(*ratios[arm])} of the baseline's at {_signed(points[arm])} points of top-1{dearer[arm]}"
            for arm in cheaper}
    candidates = [arm for arm in cheaper if points[arm][0] - points[arm][1] >= -tolerance]
    if not candidates:
        below = ", ".join(f"{arm} ({told[arm]})" for arm in cheaper)
        return (), f"Less {goal}: {below}; but a loss of more than {_points(tolerance)} of top-1 is not excluded."
    best = min(candidates, key=lambda arm: ratios[arm][0])
    chosen = (best, *(arm for arm in candidates if arm != best and _includes(
        mean_interval(paired(comparison, column, best, arm)), 1.0)))
    return chosen, f"Less {goal}: {_listed({arm: told[arm] for arm in chosen})}."


def _dearer(comparison: Comparison, baseline: str, arms: Sequence[str]) -> dict[str, str]:
    """What each arm measurably takes more of than the baseline, in words that follow a price."""
    told = {}
    for arm in arms:
        more = []
        for goal, column in COSTS.items():
            mean, half = mean_interval(paired(comparison, column, arm, baseline))
            if mean - half > 1 + _EXACT:
                more.append(f"{spread(mean, half)} times the {goal}")
        told[arm] = f", for {_and(more)}" if more else ""
    return told


def _headline(choices: Mapping[str, tuple[str, ...]], tolerance: float) -> str:
    wanted = {"accuracy": "accuracy"} | {goal: f"less {goal}" for goal in COSTS}
    found: dict[tuple[str, ...], list[str]] = {}
    for goal, chosen in choices.items():
        if chosen:
            found.setdefault(chosen, []).append(wanted[goal])
    if not found:
        return ("Stay with the baseline: no strategy is measurably more accurate, and none is measurably cheaper with "
                f"a loss of more than {_points(tolerance)} of top-1 excluded.")
    text = "; ".join(f"{' or '.join(chosen)} for {_and(goals)}" for chosen, goals in found.items())
    missing = [wanted[goal] for goal, chosen in choices.items() if not chosen]
    return f"Use {text}." + (f" For {_and(missing)} nothing can be recommended over the baseline." if missing else "")


def _includes(interval: tuple[float, float], value: float) -> bool:
    mean, half = interval
    return mean - half <= value <= mean + half


def _signed(interval: tuple[float, float]) -> str:
    text = spread(*interval)
    return text if text.startswith("-") else f"+{text}"


def _points(count: float) -> str:
    return f"{count:g} point{'s' * (count != 1)}"


def _and(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _listed(told: Mapping[str, str]) -> str:
    text = " or ".join(f"{arm} ({what})" for arm, what in told.items())
    return text + (", which the numbers do not tell apart" if len(told) > 1 else "")
