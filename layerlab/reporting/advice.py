"""Which strategy to use, by the numbers of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerlab.base.arguments import validated
from layerlab.reporting.evidence import WORTH, Evidence, never_acted, unfit
from layerlab.show.interval import signed, spread
from layerlab.training.results import BASELINE, Comparison

# Costs that a strategy may save: what for → column of `Comparison.runs`.
COSTS = {"time": "seconds", "compute": "TFLOP", "memory": "peak MB"}
# Those that training less saves, too.
BOUGHT = ("time", "compute")


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


@validated
def advise(
    comparison: Comparison, baseline: str = BASELINE, tolerance: float = 1.0, test_images: int | None = None
) -> Advice:
    """Which strategy to use: for accuracy, and for less time, compute or memory at an accuracy that is kept.

    An arm is better in something when Student's t says so of its differences to the baseline, or of its ratios, seed by
    seed, with 95 % certainty and Holm's correction for the number of arms; a saving has to be `WORTH` besides. For less
    time or compute, and for accuracy where it takes more of them, an arm has to beat plain training of the same cost,
    too (`compare(…, equal="flops")`). It keeps the accuracy when a loss of `tolerance` is ruled out in the same way.
    Two arms are told apart when the interval of one against the other says so.

    Nothing is recommended where the baseline is at chance or still rising. Where the data have a validation half, it
    chooses, and the test half is reported.

    Args:
        tolerance: points of top-1 that may be lost; also how much the baseline may rise at its end.
        test_images: how many top-1 comes from: no interval of it is taken to be narrower than one of them, since a few
            seeds may agree by chance.
    """
    nothing: dict[str, tuple[str, ...]] = dict.fromkeys(("accuracy", *COSTS), ())
    arms = [arm for arm in comparison.given.arms if arm != baseline]
    if not arms:
        return Advice(nothing, ("There is nothing to choose from: no strategy was trained to the end.",))
    if len(comparison.seeds) < 2:
        return Advice(nothing, (
            "Nothing can be told apart: one seed says nothing about how much results vary by chance. Compare with at "
            "least three, seeds=[0, 1, 2].",))
    validated = all("validation/top1" in result.final for result in comparison.results.values())
    metric = "validation/top1" if validated else "test/top1"
    obstacle = unfit(comparison, baseline, metric, tolerance, test_images)
    if obstacle:
        return Advice(nothing, (obstacle,))
    idle = [arm for arm in arms if never_acted(comparison, arm, baseline)]
    active = [arm for arm in arms if arm not in idle]
    finest = 100 / test_images if test_images else 0.0
    evidence = Evidence(comparison, baseline, active, metric, finest, tolerance)
    choices, details = _choices(evidence)
    details += [f"{arm} never acted: its history and its costs are the baseline's." for arm in idle]
    details.append(_halves(validated))
    return Advice(choices, (_headline(choices, tolerance), *details))


def _choices(evidence: Evidence) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Goal → arms, and what to say of each goal."""
    choices: dict[str, tuple[str, ...]] = {}
    choices["accuracy"], details = _most_accurate(evidence)
    for goal, column in COSTS.items():
        choices[goal], sentence = _cheapest(evidence, goal, column)
        details.append(sentence)
    return choices, details


def _halves(validated: bool) -> str:
    if validated:
        return "Chosen by the validation images; the gains that are told are those of the test images."
    return ("Chosen and reported by the same test images, since the data have no validation half: new images may say "
            "less (Dataset.with_validation sets one apart).")


def _most_accurate(evidence: Evidence) -> tuple[tuple[str, ...], list[str]]:
    """The arms proven above the baseline that are not told apart from the best, and what to say of accuracy."""
    better = evidence.more_accurate()
    chosen: tuple[str, ...] = ()
    sentences = ["Accuracy: no strategy is measurably above the baseline."]
    if better:
        best = max(better, key=lambda arm: evidence.points(arm)[0])
        chosen = (best, *_not_told_apart(evidence, evidence.metric, best, better, 0.0))
        sentences = [f"Accuracy: {_listed({arm: f'{_gain(evidence, arm)} points of top-1' for arm in chosen})}."]
    else:
        above = [arm for arm in evidence.arms if evidence.points(arm)[0] > evidence.points(arm)[1]]
        if above:
            told = ", ".join(f"{arm} ({_gain(evidence, arm)} points; but {_why_not_better(evidence, arm)})"
                             for arm in above)
            sentences = [f"Accuracy: {told}."]
    shown = {arm: evidence.points(arm, "test/top1") for arm in evidence.arms}
    worse = [arm for arm, (mean, half) in shown.items() if mean + half < 0]
    if worse:
        told = ", ".join(f"{arm} ({signed(shown[arm])} points)" for arm in worse)
        sentences.append(f"Measurably less accurate than the baseline: {told}.")
    return chosen, sentences


def _cheapest(evidence: Evidence, goal: str, column: str) -> tuple[tuple[str, ...], str]:
    """The arms proven to be cheaper at a kept accuracy that are not told apart from the cheapest, in words."""
    cheaper = [arm for arm in evidence.arms if evidence.saves(arm, column)]
    if not cheaper:
        return (), f"Less {goal}: no strategy is measurably below the baseline by {100 * WORTH:g} % or more."
    told = {arm: f"{spread(*evidence.ratio(arm, column))} of the baseline's at {_gain(evidence, arm)} points of "
                 f"top-1{_dearer(evidence, arm)}" for arm in cheaper}
    candidates = evidence.cheaper(column, goal in BOUGHT)
    if not candidates:
        missed = ", ".join(f"{arm} ({told[arm]}; but {_why_not(evidence, arm, goal)})" for arm in cheaper)
        return (), f"Less {goal}: {missed}."
    best = min(candidates, key=lambda arm: evidence.ratio(arm, column)[0])
    chosen = (best, *_not_told_apart(evidence, column, best, candidates, 1.0))
    return chosen, f"Less {goal}: {_listed({arm: told[arm] for arm in chosen})}."


def _not_told_apart(
    evidence: Evidence, metric: str, best: str, others: Sequence[str], same: float
) -> list[str]:
    """The others whose difference to the best, or ratio, may be none."""
    found = []
    for arm in others:
        difference = evidence.comparison.paired(metric, best, arm)
        if arm != best and difference.low <= same <= difference.high:
            found.append(arm)
    return found


def _why_not(evidence: Evidence, arm: str, goal: str) -> str:
    """Why an arm that saves something is not recommended for it."""
    mean, half = evidence.points(arm)
    if mean - half < -evidence.tolerance:
        return f"a loss of more than {_points(evidence.tolerance)} of top-1 is not excluded"
    return _unpaid(evidence, arm) if goal in BOUGHT else _corrected(evidence)


def _why_not_better(evidence: Evidence, arm: str) -> str:
    """Why an arm that is above the baseline is not recommended for accuracy."""
    return _unpaid(evidence, arm) if evidence.takes_longer(arm) else _corrected(evidence)


def _unpaid(evidence: Evidence, arm: str) -> str:
    if arm not in evidence.comparison.equal:
        return "it was not compared with plain training of the same cost, equal='flops'"
    pays = evidence.comparison.pays(arm, evidence.metric)
    if pays.verdict != "yes":
        return f"plain training of the same cost is not beaten, {pays}"
    return _corrected(evidence)


def _corrected(evidence: Evidence) -> str:
    return f"among {len(evidence.arms)} strategies and with {evidence.seeds} seeds that may be chance"


def _gain(evidence: Evidence, arm: str) -> str:
    """Points of the test half."""
    return signed(evidence.points(arm, "test/top1"))


def _dearer(evidence: Evidence, arm: str) -> str:
    """What an arm measurably takes more of than the baseline, in words that follow a price."""
    more = [f"{spread(*evidence.ratio(arm, column))} times the {goal}" for goal, column in COSTS.items()
            if evidence.costs_more(arm, column)]
    return f", for {_and(more)}" if more else ""


def _headline(choices: Mapping[str, tuple[str, ...]], tolerance: float) -> str:
    wanted = {"accuracy": "accuracy"} | {goal: f"less {goal}" for goal in COSTS}
    found: dict[tuple[str, ...], list[str]] = {}
    for goal, chosen in choices.items():
        if chosen:
            found.setdefault(chosen, []).append(wanted[goal])
    if not found:
        return ("Stay with the baseline: no strategy is measurably more accurate, and none is measurably cheaper with "
                f"a loss of more than {_points(tolerance)} of top-1 excluded and plain training of the same cost "
                "beaten.")
    text = "; ".join(f"{' or '.join(chosen)} for {_and(goals)}" for chosen, goals in found.items())
    missing = [wanted[goal] for goal, chosen in choices.items() if not chosen]
    return f"Use {text}." + (f" For {_and(missing)} nothing can be recommended over the baseline." if missing else "")


def _points(count: float) -> str:
    return f"{count:g} point{'s' * (count != 1)}"


def _and(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _listed(told: Mapping[str, str]) -> str:
    text = " or ".join(f"{arm} ({what})" for arm, what in told.items())
    return text + (", which the numbers do not tell apart" if len(told) > 1 else "")
