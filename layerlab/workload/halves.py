"""The halves of a dataset: by which names they go, and which of them is trained on, chosen by and reported."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TypeVar

from layerlab.base.errors import LayerlabError, LayerlabWarning
from layerlab.workload.places import HALVES, TESTING, TRAINING, VALIDATION
from layerlab.workload.sources import Source, held_out

_Any = TypeVar("_Any")


def one_each(found: Mapping[str, list[_Any]], place: str) -> dict[str, _Any]:
    """Half → the one thing that goes by its name.

    Raises:
        LayerlabError: two things go by the names of one half.
    """
    for half, several in found.items():
        if len(several) > 1:
            raise LayerlabError(
                f"{place} has two {half} halves by their names, {several[0]} and {several[1]}; rename or remove one."
            )
    return {half: found[half][0] for half in HALVES if half in found}


def assigned(
    halves: Mapping[str, Source], place: str, aside: str = "", whole: bool = False
) -> tuple[dict[str, Source], list[str]]:
    """What is trained on, chosen by (`validation`, where there are three halves) and reported, and notes on it.

    A half called val is reported where there is no test half. Without either, every fifth training image of each class
    is held out for testing.

    Args:
        halves: half → its images, by their names.
        place: the folder, for a message.
        aside: which half cannot be used, and why.
        whole: nobody divided the images, so that a missing test half is no mistake.

    Raises:
        LayerlabError: no training half; a class of one image that cannot be split.
    """
    notes = [f"{aside}, so it is not used"] if aside else []
    if TRAINING not in halves:
        raise LayerlabError(f"{place} has a {' and a '.join(halves)} half and none called train; add the missing half.")
    if TESTING in halves:
        if VALIDATION in halves:
            notes.append("the validation half is for choosing, the test half for reporting")
        return dict(halves), notes
    if VALIDATION in halves:
        if aside:
            warnings.warn(f"{place}: {aside}, so the validation half is reported.", LayerlabWarning, stacklevel=2)
        notes.append("the test half is its validation half")
        return {TRAINING: halves[TRAINING], TESTING: halves[VALIDATION]}, notes
    rest, test = held_out(halves[TRAINING], 5, place)
    if not whole:
        warnings.warn(
            f"{place}: {aside or 'there is no test half'}, so every fifth training image of each class is held out "
            "for testing.", LayerlabWarning, stacklevel=2,
        )
    return {TRAINING: rest, TESTING: test}, [*notes, "every fifth image of each class is held out for testing"]
