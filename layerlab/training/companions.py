"""What is trained beside an arm to judge it: plain training of the same cost, and its placebo."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from layerlab.base.errors import LayerlabError, unknown
from layerlab.contract.strategy import Strategy
from layerlab.training.results import SUMMARY, Comparison, FitResult
from layerlab.training.rounds import Arm, Rounds
from layerlab.training.settings import length, shortened

Equal = Literal["none", "flops", "seconds"]
# What an equal cost is counted in: a name of `SUMMARY`.
COST = {"flops": "TFLOP", "seconds": "seconds"}


@dataclass(frozen=True)
class Companions:
    """Makes the arms that stand beside those with strategies, once these are trained with a seed.

    Args:
        arms: as the user gave them; the first one without strategies is the baseline.
        equal: in what the baseline of equal cost is as cheap as the arm; `none` for no such arm.
        placebo: whether a strategy's placebo is trained, where it names one.
        only: names of the arms that have companions; None: all with strategies.

    Raises:
        LayerlabError: no arm is without strategies, costs are not measured, or `only` names none with strategies.
    """

    arms: Sequence[Arm]
    equal: Equal = "none"
    placebo: bool = False
    only: Collection[str] | None = None

    def __post_init__(self) -> None:
        for name in self.only or ():
            known = [arm.name for arm in self.arms if arm.strategies]
            if name not in known:
                raise unknown("arm with strategies", name, known)
        if self.equal == "none":
            return
        if self.baseline is None:
            raise LayerlabError(
                f"equal={self.equal!r} needs a baseline, and every arm has strategies; add one without, such as "
                "'baseline': ()."
            )
        if self.equal == "flops" and not self.baseline.settings.measure:
            raise LayerlabError("equal='flops' needs measured costs; leave measure=True, or take equal='seconds'.")

    @property
    def baseline(self) -> Arm | None:
        """The first arm without strategies."""
        return next((arm for arm in self.arms if not arm.strategies), None)

    @property
    def judged(self) -> list[Arm]:
        """The arms that have companions."""
        return [arm for arm in self.arms if arm.strategies and (self.only is None or arm.name in self.only)]

    @property
    def equals(self) -> dict[str, str]:
        """Arm → name of the baseline that costs as much."""
        if self.equal == "none":
            return {}
        return {arm.name: f"{arm.name} · equal {self.equal}" for arm in self.judged}

    @property
    def placebos(self) -> dict[str, str]:
        """Arm → name of its placebo."""
        return {arm.name: f"{arm.name} · placebo" for arm in self.judged} if self.placebo else {}

    def beside(self, arm: str) -> list[str]:
        """Names of an arm's companions."""
        return [names[arm] for names in (self.equals, self.placebos) if arm in names]

    def train(self, rounds: Rounds, seed: int) -> None:
        """Train every companion with a seed whose arms are trained."""
        made: list[Arm] = []
        for arm in self.judged:
            result = rounds.results.get((arm.name, seed))
            for name in self.beside(arm.name):
                rounds.progress.total -= rounds.planned
                if result is None or name in rounds.failures:
                    continue
                with rounds.attempted(name):
                    companion = self._make(name, arm, result, rounds)
                    if companion is not None:
                        made.append(companion)
                        rounds.progress.total += rounds.planned
        rounds.train(seed, made)

    def _make(self, name: str, arm: Arm, result: FitResult, rounds: Rounds) -> Arm | None:
        """One companion of an arm; None where nothing is to be trained."""
        if name == self.placebos.get(arm.name):
            strategies = _placebo(arm, result)
            return arm._replace(name=name, strategies=strategies) if strategies else None
        assert self.baseline is not None
        plain = rounds.results[self.baseline.name, result.seed]
        steps = _affordable(result, plain, COST[self.equal])
        settings = self.baseline.settings
        epoch_steps = len(rounds.data.train) // settings.batch_size
        if steps == plain.steps == length(settings, epoch_steps)[1]:
            # The same training would end with the same weights.
            rounds.results[name, result.seed] = replace(plain, name=name)
            return None
        return self.baseline._replace(name=name, settings=shortened(settings, epoch_steps, steps))

    def comparison(self, rounds: Rounds) -> Comparison:
        """All results, of arms that have one with every seed."""
        for arm in self.judged:
            for name in self.beside(arm.name):
                if arm.name in rounds.failures:
                    rounds.forget(name)
        seeds = {seed for _, seed in rounds.results}
        for name in {name for name, _ in rounds.results}:
            missing = sorted(seed for seed in seeds if (name, seed) not in rounds.results)
            if missing:
                rounds.failures[name] = f"The strategy names no placebo for its run with seed {missing[0]}."
                rounds.forget(name)
        trained = {name for name, _ in rounds.results}
        return Comparison(
            rounds.results, rounds.failures, self.baseline.name if self.baseline else "",
            _kept(self.equals, trained), _kept(self.placebos, trained),
            tuple(arm for arm in rounds.untouched if arm in trained),
        )


def _kept(names: Mapping[str, str], trained: set[str]) -> dict[str, str]:
    return {arm: name for arm, name in names.items() if name in trained}


def _affordable(result: FitResult, plain: FitResult, cost: str) -> int:
    """How many steps of plain training cost as much as a run with strategies did, at least one.

    Raises:
        LayerlabError: the cost was not measured.
    """
    steps = plain.steps * SUMMARY[cost](result) / SUMMARY[cost](plain)
    if not math.isfinite(steps):
        raise LayerlabError(f"No cost of {result.name!r} in {cost} was measured; leave measure=True.")
    # Sums of floats may miss a whole number by their last digits.
    return max(1, math.floor(steps + 1e-6))


def _placebo(arm: Arm, result: FitResult) -> tuple[Strategy, ...]:
    """The arm's strategies, each by its placebo where it names one; empty where none does."""
    named = [strategy.placebo(result) for strategy in result.strategies]
    if all(placebo is None for placebo in named):
        return ()
    pairs = zip(named, arm.strategies, strict=True)
    return tuple(strategy if placebo is None else placebo for placebo, strategy in pairs)
