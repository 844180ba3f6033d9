"""What the comparisons of all papers say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from layerlab.reporting.bottom_line import QUICK
from layerlab.reporting.findings import Companion, Finding, called
from layerlab.reporting.wording import EQUAL, PLACEBO, Standing, standing

_WORDS: Mapping[Standing, str] = {"better": "the method to be better", "worse": "it to be worse",
                                  "open": "no measurable difference"}


def overall(found: Iterable[Finding | None]) -> str:
    """How many comparisons with plain training of the same cost and with a placebo the methods win, and which.

    A comparison is one line of a paper's sentence; one with a single seed, and the profile `quick`, count for nothing.

    Args:
        found: of papers; None of those without a headline.

    Returns:
        One sentence; empty where nothing was compared.
    """
    places = [place for each in found if each is not None for place in _places(each)]
    equal = [(name, each.equal) for name, each in places if each.equal]
    placebo = [(name, each.placebo) for name, each in places if each.placebo]
    parts = [_counted("comparisons with " + EQUAL, equal), _counted("with " + PLACEBO, placebo)]
    told = "; ".join(filter(None, parts))
    return f"Taken together: {told}." if told else ""


def _places(found: Finding) -> list[tuple[str, Finding]]:
    """The finding and those elsewhere, with the method's name and, of several, the data."""
    places = [each for each in (found, *found.elsewhere) if each.anchor and each.anchor.profile != QUICK]
    return [(called(each, several=len(places) > 1), each) for each in places]


def _counted(what: str, compared: Sequence[tuple[str, Companion]]) -> str:
    names: dict[Standing, list[str]] = {word: [] for word in _WORDS}
    for name, companion in compared:
        if (stands := standing(companion.points)) in names:
            names[stands].append(name)
    count = sum(map(len, names.values()))
    if not count:
        return ""
    parts = []
    for stands, words in _WORDS.items():
        those = names[stands]
        named = f" ({', '.join(those)})" if those and stands != "open" else ""
        parts.append(f"{len(those) or 'none'} {'show' if len(those) > 1 else 'shows'} {words}{named}")
    return f"of {count} {what}, {', '.join(parts[:-1])} and {parts[-1]}"
