"""What measured values say of a claim: docs/verdicts.md has the rules with their reasons."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from layerlab.contract.claims import FEWEST, Claim, Gate, Verdict, placeholders
from layerlab.show.interval import Estimate, quantile

# More seeds or rounds than this are not asked for.
MOST_SEEDS = 1000


class Judgement(NamedTuple):
    """A verdict with its reason in a few words."""

    verdict: Verdict
    reason: str


def judge(
    claim: Claim, values: Sequence[float], conditions: Mapping[str, Any], seeded: bool = True,
    observed: Mapping[str, float | None] | None = None, by_model: bool = False,
) -> Judgement:
    """What measured values say of a claim.

    Args:
        claim: of the paper.
        values: one for each seed, in the claim's unit; a value that is not finite did not happen with that seed.
        conditions: what they were measured under.
        seeded: whether seeds could change them.
        observed: the run's own numbers, which the claim's gates read.
        by_model: whether a model computed them.

    Returns:
        The verdict, and why.

    Example:
        >>> from layerlab.contract.claims import Claim
        >>> claim = Claim(id="saving", statement="less time", value=40, unit="%", where="Table 1", kind="effect",
        ...               neutral=0, tolerance=5, conditions={"dataset": "imagenet"})
        >>> judge(claim, [30.0, 31.0, 32.0], {"dataset": "cifar10"}).verdict
        'holds'
        >>> judge(claim, [10.0, 11.0, 12.0], {"dataset": "cifar10"}).verdict
        'weaker'
        >>> judge(claim, [30.0], {"dataset": "cifar10"}).verdict
        'undecided'
    """
    if not values:
        return Judgement("not run", "")
    if found := placeholders(claim.model_dump()):
        return Judgement("not tested", f"its {found[0]} in paper.toml is a placeholder, so the number is nobody's")
    if by_model or claim.by_model:
        return Judgement("by a model", "computed, not measured")
    if closed := _closed_gate(claim.gates, observed or {}, conditions):
        return Judgement("not tested", closed)
    if claim.analytic:
        return _analytic(claim, values)
    missing = _missing_conditions(claim, conditions)
    happened = [value for value in values if math.isfinite(value)]
    if len(happened) < len(values):
        return _did_not_happen(claim, len(values) - len(happened), len(values), bool(missing))
    if seeded and len(values) == 1:
        return Judgement("undecided", f"one seed; {FEWEST} are the least")
    low, high = _interval(values, seeded)
    more = partial(_more, values, claim, conditions, "seeds" if seeded else "rounds")
    if not missing:
        if seeded and len(values) < FEWEST:
            return Judgement("undecided", f"{len(values)} seeds; {FEWEST} are the least")
        return _under_conditions(claim, low, high, more)
    if claim.kind == "value":
        return Judgement("not tested", f"needs the paper's conditions: {missing}")
    return _at_reduced_scale(claim, low, high, more)


def _interval(values: Sequence[float], seeded: bool) -> tuple[float, float]:
    estimate = Estimate(tuple(values))
    # A measurement that no seed changes is exact.
    half = estimate.half if seeded or len(values) > 1 else 0.0
    return estimate.mean - half, estimate.mean + half


def _closed_gate(
    gates: Sequence[Gate], observed: Mapping[str, float | None], conditions: Mapping[str, Any]
) -> str:
    """The first gate that fails, with its value and bound; empty where all are open."""
    dataset = str(conditions.get("dataset", ""))
    for gate in gates:
        value = observed.get(gate.observed)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"the run recorded no {gate.observed}, which would show that {gate.shows}"
        for bound, below, word in ((gate.at_least, True, "at least"), (gate.at_most, False, "at most")):
            limit = bound.get(dataset) if isinstance(bound, dict) else bound
            if bound is not None and limit is None:
                return f"{gate.observed} has no bound for dataset {dataset!r}, so nothing shows that {gate.shows}"
            if limit is not None and (value < limit if below else value > limit):
                return f"{gate.observed} is {value:.4g}, not {word} {limit:g}: nothing shows that {gate.shows}"
    return ""


def _missing_conditions(claim: Claim, conditions: Mapping[str, Any]) -> str:
    """The paper's conditions that were not met, in words; empty where all were."""
    unmet = []
    for name, wanted in claim.conditions.items():
        if conditions.get(name) != wanted:
            unmet.append(f"{name} {wanted}")
    return ", ".join(unmet)


def _analytic(claim: Claim, values: Sequence[float]) -> Judgement:
    worst = max(abs(value - claim.value) for value in values)
    if worst <= claim.tolerance:
        return Judgement("reproduced", f"follows from shapes, within {claim.tolerance:g} {claim.unit}")
    return Judgement("differs", f"follows from shapes, off by {worst:.3g} {claim.unit}")


def _did_not_happen(claim: Claim, missing: int, runs: int, reduced: bool) -> Judgement:
    if missing < runs or runs < FEWEST:
        return Judgement("undecided", f"did not happen in {missing} of {runs} runs")
    return Judgement("opposite" if reduced else "differs", f"did not happen in any of {runs} runs")


def _under_conditions(claim: Claim, low: float, high: float, more: Callable[[Sequence[float]], str]) -> Judgement:
    """Equivalence: reproduced within the tolerance, differs outside it, each with the whole interval."""
    least = claim.value - claim.tolerance
    most = math.inf if claim.kind == "at-most" else claim.value + claim.tolerance
    allowed = f"{claim.tolerance:g} {claim.unit}"
    if least <= low and high <= most:
        return Judgement("reproduced", f"the whole interval is within {allowed}")
    if high < least or low > most:
        return Judgement("differs", f"the whole interval is beyond {allowed}")
    limits = [limit for limit in (least, most) if low < limit < high or limit in (low, high)]
    straddled = " and ".join(f"{limit:g}" for limit in limits)
    return Judgement("undecided", f"the interval straddles {straddled} {claim.unit}{more(limits)}")


def _at_reduced_scale(claim: Claim, low: float, high: float, more: Callable[[Sequence[float]], str]) -> Judgement:
    """A direction: it never refutes a paper, and it confirms one only beyond half of the published effect."""
    if claim.kind == "at-most":
        limit = claim.value - claim.tolerance
        if low >= limit:
            return Judgement("holds", f"less than {limit:g} {claim.unit} is ruled out")
        if high < limit:
            return Judgement("opposite", f"wholly below {limit:g} {claim.unit}")
        return Judgement("undecided", f"the interval straddles {limit:g} {claim.unit}{more([limit])}")
    assert claim.neutral is not None
    sign = math.copysign(1.0, claim.value - claim.neutral)
    toward, away = sorted((sign * (low - claim.neutral), sign * (high - claim.neutral)), reverse=True)
    half = abs(claim.value - claim.neutral) / 2
    if away > half:
        return Judgement("holds", "wholly beyond half of the published effect")
    if away > 0:
        return Judgement("weaker", "the paper's direction, not beyond half of its effect")
    if toward < 0 or toward == away:
        return Judgement("opposite", "no effect" if toward == 0 else "the other direction")
    return Judgement("undecided", f"the interval includes no effect{more([claim.neutral])}")


def _more(
    values: Sequence[float], claim: Claim, conditions: Mapping[str, Any], repetitions: str, limits: Sequence[float]
) -> str:
    """How many repetitions would decide it at the present spread, and how many test images where these are too few."""
    if len(values) < 2 or not limits:
        return ""
    mean = math.fsum(values) / len(values)
    distance = min(abs(mean - limit) for limit in limits)
    text = _enough(values, mean, distance, repetitions)
    images = conditions.get("test_images")
    if isinstance(images, int) and claim.unit in ("points", "%") and 0 < distance < 100 / images:
        text += f" and {math.ceil(100 / distance):,} test images"
    return text


def _enough(values: Sequence[float], mean: float, distance: float, repetitions: str) -> str:
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    count = len(values) + 1
    while count <= MOST_SEEDS:
        if distance > 0 and quantile(count) * deviation / math.sqrt(count) < distance:
            return f"; {count} {repetitions} would decide at this spread"
        count = max(count + 1, count * 21 // 20)
    return f"; more than {MOST_SEEDS} {repetitions} would be needed at this spread"
