"""Does any strategy pay on a network and images? Asked with a budget of time, answered with one page.

On held-out training images alone: a rate at which the baseline trains, a length from which on twice as long gains
nothing, and what each strategy costs. Then the strategies that can pay, beside plain training of the same cost and
placebos, with as many seeds as decide it or as the budget carries; the test images are read at the end.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from layerlab.base import usage
from layerlab.base.errors import Diverged, LayerlabError
from layerlab.base.files import write_json
from layerlab.base.text import as_json, to_yaml
from layerlab.contract.strategy import Strategy
from layerlab.reporting.against import against
from layerlab.reporting.answer_page import Report, payoff_points
from layerlab.reporting.conclusion import keep_report
from layerlab.reporting.evidence import WORTH, unfit
from layerlab.reporting.explore import (
    ALL,
    Arms,
    Place,
    build_network,
    load_images,
    make_arms,
    open_session,
    session_place,
)
from layerlab.reporting.paying import Verdict, judge_arms
from layerlab.runs.answer import PAGE, answers_of
from layerlab.runs.record import read_record
from layerlab.runs.session import Session
from layerlab.show import figures
from layerlab.show.interval import mean_interval, signed, spread
from layerlab.show.progress import clock
from layerlab.training.results import BASELINE, Comparison
from layerlab.workload.dataset import Augment, Dataset

# Tried in this order, so that what is usual comes first.
RATES = (0.1, 0.03, 0.3, 0.01, 0.003)
# Of pilots, so that no seed of the comparison has been looked at.
PILOT_SEED = 1000
SHORTEST, FEWEST, MOST = 4, 3, 12
# Shares of the budget: for the rates, for what the strategies cost, and where the comparison has to end.
FOR_RATES, FOR_PILOT, USABLE = 0.12, 0.15, 0.95
CHOICES = "choices.json"
READ = ("Rate, length and the strategies to compare were chosen by held-out training images; the numbers above are "
        "those of the test images, which were read at the end.")


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        network, data: as in explore.ipynb.
        budget: seconds.
        strategies: names, or `all`.
        settings: strategy → its settings.
        combinations: as `explore.make_arms`.
        tolerance: points of top-1 that may be lost for a saving, and below which a gain is worth nothing.
        equal: in what plain training of the same cost is counted.
        validation: each so-many-th training image chooses, where the data have no validation half of their own.
        network_options, image_size, channels, limit, augment, batch_size: as in explore.ipynb.
        output: the folder; None for one of its own below `runs/pays`.
    """

    network: str
    data: str
    budget: float
    strategies: str | Sequence[str] = ALL
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    combinations: Sequence[str] = ()
    tolerance: float = 1.0
    equal: Literal["flops", "seconds"] = "flops"
    validation: int = 5
    network_options: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    channels: Literal[1, 3] | None = None
    limit: int | None = None
    augment: Augment = "none"
    batch_size: int = 128
    output: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What its session is known by."""
        return {name: value for name, value in vars(self).items() if name not in ("network", "data", "output")}

    @property
    def command(self) -> str:
        """What asks the same again."""
        usual = Question(self.network, self.data, self.budget)
        words = ["layerlab", "pays", self.network, self.data, "--budget", f"{self.budget:g}s"]
        if self.strategies != ALL:
            words += [word for name in self.strategies for word in ("--strategy", name)]
        for name, value in self.parameters.items():
            if name not in ("strategies", "budget") and value != getattr(usual, name):
                words += ["-p", f"{name}={to_yaml(value)}"]
        return shlex.join([*words, *(["--output", self.output] if self.output else [])])


@dataclass(frozen=True)
class Found:
    """What was found out.

    Attributes:
        sentence: the answer.
        page: the file of the page.
    """

    sentence: str
    page: Path


Tell = Callable[[str], None]


def does_it_pay(
    question: Question, tell: Tell = lambda _: None, arms: Arms | None = None, rerun: bool = False
) -> Found:
    """Answer a question; asked again after an interruption, it goes on from the last finished epoch, and asked again
    after the answer, it gives that one, unless anything that it rests on was edited.

    Args:
        question: what is asked.
        tell: gets a line for each step.
        arms: strategies that are not installed, in the place of those that the question names.
        rerun: find it out anew in any case.

    Raises:
        LayerlabError: what was asked is wrong, or the budget carries no comparison at all.
    """
    images = load_images(
        question.data, question.network, image_size=question.image_size, channels=question.channels,
        limit=question.limit, augment=question.augment, validation=question.validation)
    build = build_network(question.network, images, question.network_options)
    chosen = arms or make_arms(question.strategies, question.combinations, question.settings)
    place = session_place("pays", images, question.network, question.output, question.parameters)
    if not rerun and (before := _found_before(place)):
        tell("finished before; --rerun finds it out anew")
        return before
    session = open_session("pays", images, question.network, question.output, **question.parameters)
    inquiry = Inquiry(question, images, build, chosen, session, tell)
    report = inquiry.report()
    page = keep_report(session, report)
    session.close()
    return Found(report.sentence, page)


def _found_before(place: Place) -> Found | None:
    """What a finished session in that place found out, if nothing that it used was edited since."""
    record = read_record(place.folder)
    same = record.get("finished") and record.get("parameters") == as_json(place.values)
    if not same or not (place.folder / PAGE).exists() or usage.changes(record.get("used") or {}, os.getcwd()):
        return None
    return next((Found(answer.sentence, place.folder / PAGE) for answer in answers_of(record)), None)


class Kept:
    """What was chosen and how much time is spent, in a file that an interruption survives.

    Args:
        folder: of the session.
        attempt: the session's; what another one chose does not count.
    """

    def __init__(self, folder: Path, attempt: str) -> None:
        self._file = folder / CHOICES
        self._begin = time.monotonic()
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        same = isinstance(content, dict) and content.get("attempt") == attempt
        self._content: dict[str, Any] = content if same else {"attempt": attempt}
        self._before = float(self._content.get("spent", 0.0))

    @property
    def spent(self) -> float:
        """Seconds, those of interrupted processes included."""
        return self._before + time.monotonic() - self._begin

    def once(self, name: str, choose: Callable[[], Any]) -> Any:
        """What was chosen under a name, in plain values; chosen now where it was not yet."""
        if name not in self._content:
            self.note(name, choose())
        return self._content[name]

    def note(self, name: str, value: Any) -> None:
        """Keep a value, and the time."""
        self._content |= {name: value, "spent": self.spent}
        write_json(self._file, self._content)

    def get(self, name: str, other: Any) -> Any:
        """What is kept under a name."""
        return self._content.get(name, other)


class Inquiry:
    """One question at work.

    Args:
        question, images, build, arms, session, tell: as `does_it_pay` has them.
    """

    def __init__(self, question: Question, images: Dataset, build: Callable[[], nn.Module], arms: Arms,
                 session: Session, tell: Tell) -> None:
        self.question, self.images, self.build, self.session = question, images, build, session
        self.arms: dict[str, tuple[Strategy, ...]] = dict(arms.chosen)
        self.left_out = dict(arms.refused)
        self.steps: dict[str, str] = {}
        self._kept = Kept(session.folder, session.attempt)
        self._tell_line = tell
        # Seconds of a fit apart from its epochs, and of an epoch, as far as they are known.
        self._start, self._epoch = math.inf, 0.0
        self._epochs: list[float] = []
        assert images.validation is not None
        # Without the test images, so that nothing can be chosen by them.
        self.pilot = replace(images, test=images.validation, validation=None, fingerprint=f"{images.fingerprint}-pilot")

    def _tell(self, text: str) -> None:
        self._tell_line(f"{clock(self._kept.spent):>7}  {text}")

    def report(self) -> Report:
        """Go through all steps."""
        rate = self._kept.once("rate", self._choose_rate)
        self.steps["learning rate"] = rate["told"]
        if rate["rate"] is None:
            return self._reported(Verdict({}, rate["told"]), None, ())
        epochs = self._kept.once("epochs", lambda: self._choose_length(rate["rate"]))
        self.steps["length"] = epochs["told"]
        self._epoch, self._start = epochs["epoch"], epochs["start"]
        costs = self._kept.once("pilot", lambda: self._choose_arms(rate["rate"], epochs["epochs"]))
        self.left_out |= costs["left_out"]
        self.steps["what the strategies cost"] = costs["told"]
        self.arms = {arm: self.arms[arm] for arm in costs["kept"]}
        if not self.arms:
            told = f"No, no strategy can pay for {self.title}: each was left out before the comparison."
            return self._reported(Verdict({}, told), None, ())
        settings = {"epochs": epochs["epochs"], **self._training(rate["rate"])}
        runs, looks = self._compare(settings)
        images = len(self.images.test)
        verdict = judge_arms(runs, tolerance=self.question.tolerance, test_images=images, looks=looks)
        self.session.table("runs", runs.runs)
        self.session.table("against", against(runs))
        self.session.figure("payoff", figures.payoff(payoff_points(runs)))
        others = [f"{arm} {judged.why}." for arm, judged in verdict.arms.items() if judged.word != "yes"]
        return self._reported(verdict, runs, [*others, READ])

    @property
    def title(self) -> str:
        """What is trained on what."""
        network = Path(self.question.network).name
        return f"{network} on {Path(self.images.name).name}"

    def _reported(self, verdict: Verdict, runs: Comparison | None, details: Sequence[str]) -> Report:
        question = self.question
        self.steps["budget"] = f"{clock(self._kept.spent)} of {clock(question.budget)}"
        return Report(self.title, verdict, runs, details, self.left_out, self.steps, question.command)

    def _training(self, rate: float) -> dict[str, Any]:
        return {"lr": rate, "batch_size": self.question.batch_size, "schedule": "cosine", "schedule_each": "step",
                "progress": sys.stderr.isatty()}

    def _fit(self, title: str, rate: float, epochs: int) -> Comparison | None:
        """The baseline alone on the pilot's images; None where it diverges. What it took is kept in mind."""
        begin = time.monotonic()
        try:
            runs = self.session.compare(title, self.build, self.pilot, {BASELINE: ()}, trial=True, seeds=[PILOT_SEED],
                                        epochs=epochs, **self._training(rate))
        except Diverged:
            return None
        spent = time.monotonic() - begin
        rows = runs.results[BASELINE, PILOT_SEED].history
        # The first epoch of a process warms up what the others use; an evaluation belongs to an epoch, too.
        self._epochs += [row["time/epoch_seconds"] for row in rows[1:] or rows]
        # The median, since a moment in which the machine is busy tells nothing of the others.
        self._epoch = 1.2 * statistics.median(self._epochs)
        self._start = min(self._start, max(0.0, spent - epochs * self._epoch))
        return runs

    def _seconds(self, epochs: int) -> float:
        """What a fit of the baseline takes."""
        return self._start + epochs * self._epoch

    def _choose_rate(self) -> dict[str, Any]:
        budget = self.question.budget
        first = self._fit("first epochs", RATES[0], 2)
        least = (len(RATES) + 3 * FEWEST * SHORTEST) * self._epoch
        if first is not None and least > budget:
            raise LayerlabError(f"An epoch takes {clock(self._epoch)} here, so a budget of {clock(budget)} carries no "
                                f"comparison; give at least --budget {math.ceil(least / 60)}min, or fewer images with "
                                "-p limit=N.")
        afford = (FOR_RATES * budget / len(RATES) - self._start) / max(self._epoch, 1e-9)
        epochs = int(min(5, max(1, afford)))
        reached: dict[float, float] = {}
        for rate in RATES:
            runs = self._fit(f"rate {rate:g}", rate, epochs)
            reached[rate] = runs.estimate("top-1", BASELINE).mean if runs else math.nan
            self._tell(f"rate {rate:g}: {_percent(reached[rate])} of the held-out images after {_epochs(epochs)}")
        sound = {rate: top1 for rate, top1 in reached.items() if math.isfinite(top1)}
        told = ", ".join(f"{rate:g}: {_percent(top1)}" for rate, top1 in sorted(reached.items()))
        chance = _chance(self.pilot)
        if not sound or max(sound.values()) <= chance:
            return {"rate": None, "told": f"Nothing can be told: at no rate does {self.title} reach more than always "
                                          f"naming the most frequent class, {chance:.1f} % ({told})."}
        best = max(sound, key=sound.__getitem__)
        return {"rate": best, "told": f"{best:g}, by top-1 of the held-out images after {_epochs(epochs)} ({told})"}

    def _choose_length(self, rate: float) -> dict[str, Any]:
        """The shortest training from which on twice as long gains less than the tolerance."""
        images = len(self.pilot.test)
        worth = max(self.question.tolerance, 200 / images)
        epochs, before, sound, told = SHORTEST, math.nan, False, []
        while True:
            runs = self._fit(f"length {epochs}", rate, epochs)
            top1 = runs.estimate("top-1", BASELINE).mean if runs else 0.0
            told.append(f"{epochs}: {_percent(top1)}")
            self._tell(f"{_epochs(epochs)}: {_percent(top1)} of the held-out images")
            if sound and top1 - before < worth:
                epochs //= 2
                why = f"twice as many gain less than {worth:.1f} points of top-1 of the held-out images"
                break
            sound = runs is not None and not unfit(runs, BASELINE, "test/top1", self.question.tolerance, images)
            before = top1
            left = 0.6 * (USABLE * self.question.budget - self._kept.spent - self._seconds(2 * epochs))
            if 3.2 * FEWEST * self._seconds(2 * epochs) > left:
                why = "more would leave no time for the comparison"
                break
            epochs *= 2
        return {"epochs": epochs, "epoch": self._epoch, "start": self._start,
                "told": f"{_epochs(epochs)}: {why} ({', '.join(told)})"}

    def _choose_arms(self, rate: float, epochs: int) -> dict[str, Any]:
        """Train all strategies for a short time; those that can pay, the most promising first, as many as there is
        time for."""
        budget = self.question.budget
        left_out: dict[str, str] = {}
        room = int((0.35 * budget / max(self._seconds(1), 1e-9) - 1) / 2)
        tried = dict(list(self.arms.items())[:max(1, room)])
        left_out |= {arm: "No time is left to try it; give a larger budget, or name fewer strategies."
                     for arm in self.arms if arm not in tried}
        afford = (FOR_PILOT * budget / (1 + 2 * len(tried)) - self._start) / max(self._epoch, 1e-9)
        length = int(min(epochs, max(1, afford)))
        runs = self.session.compare(
            "pilot", self.build, self.pilot, {BASELINE: (), **tried}, trial=True, seeds=[PILOT_SEED],
            keep_going=tuple(tried), epochs=length, **self._training(rate))
        left_out |= runs.failures
        ratios, merits, told, chance = {}, {}, [], _chance(self.pilot)
        for arm in (arm for arm in tried if arm in runs.arms):
            cost, gain = _costs(runs, arm), runs.paired("top-1", arm, BASELINE).mean
            ratios[arm] = max(cost["time"], 0.2)
            saves = max(_saved(runs, arm, cost), _saves_at_most(runs, arm))
            said = f"{arm} {signed((gain, math.nan))} points, {spread(cost['time'])} × time, " \
                   f"{spread(cost['compute'])} × compute"
            told.append(said)
            self._tell(f"pilot: {said}")
            if runs.estimate("top-1", arm).mean <= chance < runs.estimate("top-1", BASELINE).mean:
                left_out[arm] = f"In {_epochs(length)} on held-out images it stayed at chance ({chance:.1f} %)."
            elif saves < WORTH and gain <= 0:
                left_out[arm] = (f"In {_epochs(length)} on held-out images it saved neither time nor compute nor "
                                 f"memory and was not more accurate: {said.removeprefix(f'{arm} ')}.")
            else:
                merits[arm] = saves + gain / 100
        kept = self._affordable(sorted(merits, key=lambda arm: -merits[arm]), ratios, epochs, left_out)
        return {"kept": kept, "left_out": left_out, "told": f"after {_epochs(length)}, one seed: {'; '.join(told)}",
                "ratios": ratios}

    def _affordable(self, arms: Sequence[str], ratios: Mapping[str, float], epochs: int,
                    left_out: dict[str, str]) -> list[str]:
        """As many of the arms as there is time for with the fewest seeds, in their order; at least one."""
        left = USABLE * self.question.budget - self._kept.spent
        kept: list[str] = []
        for arm in arms:
            needed = FEWEST * self._per_seed([*kept, arm], ratios, epochs)
            if needed <= left or not kept:
                kept.append(arm)
            else:
                left_out[arm] = (f"No time is left for it: {FEWEST} seeds need {clock(needed - left)} more; give a "
                                 "larger budget, or name it alone.")
        return kept

    def _per_seed(self, arms: Sequence[str], ratios: Mapping[str, float], epochs: int) -> float:
        """Seconds of one seed of the comparison: each arm with plain training of the same cost and its placebo."""
        return self._seconds(epochs) * (1 + sum(2.5 * ratios[arm] for arm in arms))

    def _compare(self, settings: Mapping[str, Any]) -> tuple[Comparison, int]:
        """Seed by seed until all is decided or the budget is spent; gives all results and the number of looks."""
        plan = self._kept.once("plan", lambda: self._planned(settings["epochs"]))
        most, looks = plan["seeds"], plan["looks"]
        first_look = max(FEWEST, most // 2)
        self._tell(f"comparing {', '.join(self.arms)} with at most {most} seeds, {_epochs(settings['epochs'])} each")
        every: list[Comparison] = []
        done = self._kept.get("done", 0)
        longest, seeds = 0.0, 0
        while seeds < most:
            late = self._kept.spent + longest > USABLE * self.question.budget
            if late and seeds >= max(FEWEST, done):
                break
            begin = time.monotonic()
            every.append(self._trained(seeds, settings))
            longest = max(longest, time.monotonic() - begin)
            seeds += 1
            if seeds > done:
                self._kept.note("done", seeds)
            self._tell(f"seed {seeds} of at most {most} done; {clock((most - seeds) * longest)} left at most")
            if looks == 2 and seeds == first_look and self._decided(joined(every), looks):
                break
        self.steps["seeds"] = f"{seeds}" + (
            f", looked at after {first_look} and after {seeds}, each time with {2.5:g} % of error" if looks == 2
            and seeds > first_look else ", with 2.5 % of error" if looks == 2 else "")
        runs = joined(every)
        self.session.compared("main", runs)
        return runs, looks

    def _planned(self, epochs: int) -> dict[str, int]:
        ratios = self._kept.get("pilot", {})["ratios"]
        left = USABLE * self.question.budget - self._kept.spent
        seeds = int(left / max(self._per_seed(list(self.arms), ratios, epochs), 1e-9))
        seeds = min(MOST, max(FEWEST, seeds))
        return {"seeds": seeds, "looks": 2 if seeds >= 2 * FEWEST else 1}

    def _trained(self, seed: int, settings: Mapping[str, Any]) -> Comparison:
        runs = self.session.compare(
            "main", self.build, self.images, {BASELINE: (), **self.arms}, seeds=[seed], equal=self.question.equal,
            placebo=True, keep_going=tuple(self.arms), **settings)
        failed = {arm: why for arm, why in runs.failures.items() if arm in self.arms}
        self.left_out |= failed
        self.arms = {arm: chosen for arm, chosen in self.arms.items() if arm not in failed}
        return runs

    def _decided(self, runs: Comparison, looks: int) -> bool:
        """Whether all arms are decided by the seeds so far."""
        verdict = judge_arms(runs, tolerance=self.question.tolerance, test_images=len(self.images.test), looks=looks)
        return not verdict.obstacle and not verdict.named("undecided")


def joined(every: Sequence[Comparison]) -> Comparison:
    """Comparisons of the same arms with one seed each as one; what failed with any seed is in none of the results."""
    arms = [arm for arm in every[-1].arms if all(arm in runs.arms for runs in every)]
    results = {(arm, seed): result for runs in every for (arm, seed), result in runs.results.items() if arm in arms}
    failures = {arm: why for runs in every for arm, why in runs.failures.items()}
    equal, placebos = ({arm: name for arm, name in names.items() if name in arms}
                       for names in (every[-1].equal, every[-1].placebos))
    untouched = tuple(arm for arm in every[-1].untouched if arm in arms)
    return Comparison(results, failures, every[-1].baseline, equal, placebos, untouched)


def _costs(runs: Comparison, arm: str) -> dict[str, float]:
    """Time, compute and memory of an arm as ratios to the baseline's; 1 where one was not measured."""
    found = {what: runs.paired(column, arm, BASELINE).mean
             for what, column in (("time", "seconds"), ("compute", "TFLOP"), ("memory", "peak MB"))}
    return {what: ratio if math.isfinite(ratio) else 1.0 for what, ratio in found.items()}


def _saved(runs: Comparison, arm: str, costs: Mapping[str, float]) -> float:
    """The largest saving of an arm, as a share. One of time alone counts if the epochs agree on it: what else the
    machine does slows one arm or the other."""
    rows = zip(*(runs.results[name, PILOT_SEED].history for name in (arm, BASELINE)), strict=False)
    ratios = [mine["time/epoch_seconds"] / plain["time/epoch_seconds"] for mine, plain in rows]
    mean, half = mean_interval(ratios)
    sure = math.isfinite(half) and mean + half < 1
    return max(1 - ratio for what, ratio in costs.items() if what != "time" or sure)


def _saves_at_most(runs: Comparison, arm: str) -> float:
    """What the arm's strategies said before the first step that they save, as a share; 0 where they said nothing."""
    result = runs.results[arm, PILOT_SEED]
    return max((share for each in result.preflights.values() for share in each.saves.values()), default=0.0)


def _chance(data: Dataset) -> float:
    """Top-1 of always naming the most frequent class, in per cent."""
    return 100 * data.test.labels.bincount().max().item() / len(data.test)


def _percent(value: float) -> str:
    return f"{value:.1f} %" if math.isfinite(value) else "diverged"


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"
