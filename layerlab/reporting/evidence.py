"""What the numbers of a comparison prove, by Student's t corrected for the number of arms; and when they prove none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerlab.show.interval import quantile
from layerlab.training.results import Comparison

# How often a statement may be wrong by chance.
ALPHA = 0.05
# A ratio nearer to 1 than this is rounding.
EXACT = 1e-6
# What a saving has to be, for a strategy to be worth it: the order in which arms take turns alone makes some per cent.
WORTH = 0.05

Interval = tuple[float, float]


def above(interval: Interval, count: int, null: float = 0.0) -> float:
    """The two-sided p of a mean that is above `null`; 1 where it is not.

    Args:
        interval: (mean, half-width of the 95 % interval) of `count` values.
        null: the value that means no effect.
    """
    from scipy.special import stdtr

    mean, half = interval
    if not (math.isfinite(mean) and math.isfinite(half)) or mean <= null:
        return 1.0
    if half == 0:
        return 0.0
    # The half-width is 0.975's quantile of t times the standard error.
    return float(2 * stdtr(count - 1, -(mean - null) / half * quantile(count)))


def below(interval: Interval, count: int, null: float = 0.0) -> float:
    """The two-sided p of a mean that is below `null`; 1 where it is not."""
    return above((-interval[0], interval[1]), count, -null)


def proven(values: Mapping[str, float], alpha: float = ALPHA) -> list[str]:
    """The arms whose p holds when as many are looked at, by Holm's procedure."""
    from statsmodels.stats.multitest import multipletests

    if not values:
        return []
    rejected = multipletests(list(values.values()), alpha=alpha, method="holm")[0]
    return [arm for arm, holds in zip(values, rejected, strict=True) if holds]


@dataclass(frozen=True)
class Evidence:
    """What is known of arms against a baseline.

    Attributes:
        comparison: their results.
        baseline: the arm without strategies.
        arms: those that did something.
        metric: the accuracy that chooses: of the validation half where there is one, else of the test half.
        finest: points of one test image: no interval of accuracies is taken to be narrower.
        tolerance: points that may be lost for a saving.
        looks: how often the numbers are looked at to decide whether to go on; each look has its share of `ALPHA`.
    """

    comparison: Comparison
    baseline: str
    arms: Sequence[str]
    metric: str
    finest: float
    tolerance: float
    looks: int = 1

    @property
    def alpha(self) -> float:
        """How often a statement of this look may be wrong by chance."""
        return ALPHA / self.looks

    @property
    def seeds(self) -> int:
        """How many."""
        return len(self.comparison.seeds)

    def points(self, arm: str, metric: str = "") -> Interval:
        """The arm's accuracy above the baseline's, in points; by the metric that chooses, where no other is named."""
        mean, half = self.comparison.paired(metric or self.metric, arm, self.baseline).interval
        return mean, max(half, self.finest)

    def ratio(self, arm: str, column: str) -> Interval:
        """The arm's cost as a share of the baseline's."""
        return self.comparison.paired(column, arm, self.baseline).interval

    def costs_more(self, arm: str, column: str) -> bool:
        """Whether the whole interval of a cost is above the baseline's."""
        mean, half = self.ratio(arm, column)
        return mean - half > 1 + EXACT

    def saves(self, arm: str, column: str) -> bool:
        """Whether the whole interval of a cost is below the baseline's, and its mean by `WORTH`."""
        mean, half = self.ratio(arm, column)
        return mean + half < 1 - EXACT and mean <= 1 - WORTH

    def beats_equal_cost(self, arm: str) -> float:
        """The p of the arm being above plain training of the same cost; 1 where none was trained."""
        if arm not in self.comparison.equal:
            return 1.0
        mean, half = self.comparison.pays(arm, self.metric).points.interval
        return above((mean, max(half, self.finest)), self.seeds)

    def more_accurate(self) -> list[str]:
        """The arms that are proven to be above the baseline, and above its equal in cost where they take more."""
        values = {}
        for arm in self.arms:
            values[arm] = above(self.points(arm), self.seeds)
            if self.takes_longer(arm):
                values[arm] = max(values[arm], self.beats_equal_cost(arm))
        return proven(values, self.alpha)

    def takes_longer(self, arm: str) -> bool:
        """Whether plain training could have gone on for what the arm cost."""
        return any(self.costs_more(arm, column) and self.ratio(arm, column)[0] >= 1 + WORTH
                   for column in ("seconds", "TFLOP"))

    def cheaper(self, column: str, bought: bool) -> list[str]:
        """The arms that are proven to save a cost, to keep the accuracy and, where it counts, to pay.

        Args:
            column: of `Comparison.runs`.
            bought: whether training less saves this cost, too, so that an arm has to beat that.
        """
        values = {}
        for arm in self.arms:
            tests = [
                below(self.ratio(arm, column), self.seeds, 1 - EXACT) if self.saves(arm, column) else 1.0,
                above(self.points(arm), self.seeds, -self.tolerance),
            ]
            if bought:
                tests.append(self.beats_equal_cost(arm))
            # All of them have to hold, so the weakest one counts.
            values[arm] = max(tests)
        return proven(values, self.alpha)


def never_acted(comparison: Comparison, arm: str, baseline: str) -> bool:
    """Whether an arm's history, its costs included, is the baseline's number for number."""
    for mine, plain in zip(comparison.of(arm), comparison.of(baseline), strict=True):
        if len(mine.history) != len(plain.history):
            return False
        for row, other in zip(mine.history, plain.history, strict=True):
            names = [name for name in other if name.startswith(("train/", "test/", "cost/"))]
            names = [name for name in names if name != "cost/energy_joules"]
            if any(row.get(name) != other[name] for name in names):
                return False
    return True


def unfit(comparison: Comparison, baseline: str, metric: str, tolerance: float, test_images: int | None) -> str:
    """Why nothing can be told from a baseline: it is at chance, or still rising. Empty where it will do."""
    results = comparison.of(baseline)
    chance = max(result.chance for result in results)
    reached = comparison.estimate("top-1", baseline)
    half = reached.half
    if test_images:
        # What a guess at every image spreads by.
        half = max(half, 196 * math.sqrt(chance * (1 - chance) / test_images))
    if reached.mean - half <= 100 * chance:
        return (
            f"Nothing can be recommended: the baseline is at chance, with {reached} of top-1 where always naming the "
            f"most frequent class reaches {100 * chance:.1f} %; train longer or with another learning rate."
        )
    epochs = len(results[0].history)
    if epochs < 2:
        return (
            "Nothing can be recommended: the baseline was trained for one epoch, which does not show whether it is "
            "still rising; train longer."
        )
    # The last tenth of the epochs against the tenth before it.
    part = max(1, epochs // 10)
    gained = 0.0
    for result in results:
        shares = [row[metric] for row in result.history]
        gained += 100 * (math.fsum(shares[-part:]) - math.fsum(shares[-2 * part:-part])) / part / len(results)
    if gained > tolerance:
        return (
            f"Nothing can be recommended: the baseline is still rising, by {gained:.1f} points of top-1 in its last "
            f"{'epoch' if part == 1 else f'{part} epochs'}; train longer."
        )
    return ""
