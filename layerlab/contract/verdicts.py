"""What measured values say of a claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerlab.contract.claims import UNDECIDED
from layerlab.show.interval import mean_interval

if TYPE_CHECKING:
    from layerlab.contract.claims import Claim, Verdict


def judge(
    claim: Claim, values: Sequence[float], conditions: Mapping[str, Any], seeded: bool = True
) -> tuple[Verdict, str]:
    """What measured values say of a claim.

    Args:
        values: one a seed, in the claim's unit; a value that is not finite means that what the claim speaks of did not
            happen with that seed (a target accuracy never reached, say).
        conditions: what they were measured under.
        seeded: whether seeds could change them.

    Returns:
        (verdict, why in a few words).
    """
    if not values:
        return "not run", ""
    if not all(math.isfinite(value) for value in values):
        missing = sum(not math.isfinite(value) for value in values)
        return "differs", f"did not happen in {missing} of {len(values)} runs"
    mean, half = mean_interval(values)
    spread = 0.0 if math.isnan(half) else half
    same = claim.analytic or (
        bool(claim.conditions) and all(conditions.get(name) == wanted for name, wanted in claim.conditions.items())
    )
    if same:
        off, allowed = mean - claim.value, f"{claim.tolerance:g} {claim.unit}"
        if abs(off) <= claim.tolerance >= spread:
            return "reproduced", f"within {allowed}"
        if abs(off) - spread <= claim.tolerance:
            return "differs", f"{UNDECIDED}: the interval has values within {allowed} and others"
        return "differs", f"off by {off:+.3g} {claim.unit}"
    if claim.neutral is None:
        return "differs", "no direction to compare at reduced scale"
    effect = (mean - claim.neutral) * math.copysign(1, claim.value - claim.neutral)
    if effect > spread:
        return "holds at reduced scale", "one seed" if seeded and len(values) == 1 else "same direction"
    if spread and effect >= -spread:
        return "differs", f"{UNDECIDED}: the interval includes no effect"
    return "differs", "other direction" if effect else "no effect"
