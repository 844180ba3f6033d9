"""Which arms of a comparison pay: yes, no or undecided, each with its reason, and all of it in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from layerlab.reporting.evidence import Evidence, Interval, above, below, never_acted, unfit
from layerlab.reporting.wording import EQUAL, over_placebo
from layerlab.show.interval import signed, spread
from layerlab.training.results import BASELINE, Comparison

Word = Literal["yes", "no", "undecided"]
# What is told, whichever accuracy decides.
TOLD = "test/top1"
# What a saving is called → column of `Comparison.runs`.
SAVED = {"time": "seconds", "compute": "TFLOP"}


@dataclass(frozen=True)
class Judged:
    """Whether an arm pays.

    Attributes:
        word: `yes` where it is proven to be more accurate, or to be cheaper at a kept accuracy, and in either case to
            beat plain training of the same cost; `no` where a gain over that training that is worth anything is ruled
            out; else `undecided`.
        why: the numbers behind it, in words that follow the arm's name.
    """

    word: Word
    why: str


@dataclass(frozen=True)
class Verdict:
    """What a comparison says of all its arms.

    Attributes:
        arms: name → whether it pays.
        obstacle: why nothing can be told; otherwise empty.
    """

    arms: Mapping[str, Judged]
    obstacle: str = ""

    def named(self, word: Word) -> list[str]:
        """The arms of which that is the word."""
        return [arm for arm, judged in self.arms.items() if judged.word == word]


def judge_arms(
    comparison: Comparison, *, metric: str = "test/top1", tolerance: float = 1.0, test_images: int | None = None,
    looks: int = 1, baseline: str = BASELINE,
) -> Verdict:
    """Judge every arm of a comparison, by Student's t with Holm's correction for the number of arms.

    Args:
        comparison: with `equal`, and with `placebo` where a strategy names one.
        metric: the accuracy that decides; the numbers that are told are of the test images in any case.
        tolerance: points of top-1: what may be lost for a saving, and what is too small a gain to be worth it.
        test_images: how many the metric comes from; no interval is taken to be narrower than one of them.
        looks: how often the numbers are looked at in order to stop; each look has its share of the 5 %.
        baseline: the arm without strategies.
    """
    arms = [arm for arm in comparison.given.arms if arm != baseline]
    if not arms:
        return Verdict({}, "Nothing can be told: no strategy was trained to the end.")
    if len(comparison.seeds) < 2:
        return Verdict({}, "Nothing can be told: one seed says nothing about how much results vary by chance; give "
                           "three or more.")
    obstacle = unfit(comparison, baseline, metric, tolerance, test_images)
    if obstacle:
        return Verdict({}, obstacle)
    idle = [arm for arm in arms if never_acted(comparison, arm, baseline)]
    active = [arm for arm in arms if arm not in idle]
    finest = 100 / test_images if test_images else 0.0
    evidence = Evidence(comparison, baseline, active, metric, finest, tolerance, looks)
    better = evidence.more_accurate()
    cheaper = {what: evidence.cheaper(column, bought=True) for what, column in SAVED.items()}
    judged = {}
    for arm in arms:
        if arm in idle:
            judged[arm] = Judged("no", "never acted: its history and its costs are the baseline's")
        elif arm in better or any(arm in those for those in cheaper.values()):
            judged[arm] = Judged("yes", _gained(evidence, arm, [what for what in SAVED if arm in cheaper[what]]))
        else:
            judged[arm] = _not_paying(evidence, arm)
    return Verdict(judged)


def _gained(evidence: Evidence, arm: str, saved: Sequence[str]) -> str:
    """What an arm that pays gains, and what its placebo says of that."""
    text = f"is {signed(evidence.points(arm, TOLD))} points of top-1 above the baseline"
    costs = [f"{spread(*evidence.ratio(arm, SAVED[what]))} of its {what}" for what in saved]
    if costs:
        text += f" for {' and '.join(costs)}"
    if arm in evidence.comparison.equal and saved:
        text += f", and {signed(_over_equal(evidence, arm, TOLD))} points above {EQUAL}"
    return text + _placebo(evidence, arm)


def _placebo(evidence: Evidence, arm: str) -> str:
    if arm not in evidence.comparison.placebos:
        return ""
    placebo = evidence.comparison.placebos[arm]
    told = evidence.comparison.paired(TOLD, arm, placebo).interval
    mean, half = evidence.comparison.paired(evidence.metric, arm, placebo).interval
    proven = above((mean, max(half, evidence.finest)), evidence.seeds) <= evidence.alpha
    return f"; {over_placebo(told, proven)}"


def _over_equal(evidence: Evidence, arm: str, metric: str = "") -> Interval:
    """The arm above plain training of the same cost, in points; above the baseline where none was trained."""
    if arm not in evidence.comparison.equal:
        return evidence.points(arm, metric)
    mean, half = evidence.comparison.pays(arm, metric or evidence.metric).points.interval
    return mean, max(half, evidence.finest)


def _not_paying(evidence: Evidence, arm: str) -> Judged:
    gain, points = _over_equal(evidence, arm), evidence.points(arm)
    against = EQUAL if arm in evidence.comparison.equal else "the baseline"
    lost = below(points, evidence.seeds, -evidence.tolerance) <= evidence.alpha
    if lost:
        told = signed(evidence.points(arm, TOLD))
        return Judged("no", f"loses more than {_points(evidence.tolerance)} of top-1 ({told})")
    saves = any(evidence.saves(arm, column) for column in SAVED.values())
    shown = signed(_over_equal(evidence, arm, TOLD))
    told = f"{shown} points above {against}"
    if saves and arm not in evidence.comparison.equal:
        return Judged("undecided", f"was not compared with {EQUAL} ({told})")
    if below(gain, evidence.seeds) <= evidence.alpha:
        return Judged("no", f"is less accurate than {against} ({shown} points)")
    # What takes as much as the baseline is held against the baseline itself.
    if below(gain, evidence.seeds, evidence.tolerance) <= evidence.alpha:
        return Judged("no", f"gains less than {_points(evidence.tolerance)} ({told}"
                            f"{'' if saves else ', and saves neither time nor compute'})")
    return Judged("undecided", f"may or may not ({told})")


def headline(verdict: Verdict, title: str) -> str:
    """The answer in one sentence.

    Args:
        verdict: of `judge_arms`.
        title: what was trained on what, such as `resnet18 on my-images`.
    """
    if verdict.obstacle:
        return verdict.obstacle
    yes, undecided = verdict.named("yes"), verdict.named("undecided")
    if yes:
        told = "; ".join(f"{arm} {verdict.arms[arm].why}" for arm in yes)
        return f"Yes, {' and '.join(yes)} {'pays' if len(yes) == 1 else 'pay'} for {title}: {told}."
    if undecided:
        told = f"Undecided for {title}: more seeds or a larger budget may tell whether {_or(undecided)} pays"
        no = verdict.named("no")
        return f"{told}; {' and '.join(no)} {'does' if len(no) == 1 else 'do'} not." if no else f"{told}."
    count = len(verdict.arms)
    if count == 1:
        (arm, judged), = verdict.arms.items()
        return f"No, {arm} does not pay for {title}: it {judged.why}."
    return f"No, none of {count} strategies pays for {title}: {EQUAL} does as well, or better."


def _points(count: float) -> str:
    return f"{count:g} point{'s' * (count != 1)}"


def _or(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
