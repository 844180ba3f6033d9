"""The errors that layerlab raises for what a user can mend, and the sentences it is made of."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError


class LayerlabError(Exception):
    """Something a user can mend: its message names the thing and the remedy in one sentence.

    Example:
        >>> from layerlab import LayerlabError, build_model
        >>> try:
        ...     build_model("resnet-19")
        ... except LayerlabError as error:
        ...     print(str(error)[:13])
        Unknown model
    """

    def _render_traceback_(self) -> list[str]:
        # What IPython shows in a notebook: the sentence, without the pages of code that found it out.
        return [f"{type(self).__name__}: {self}"]


class Refused(LayerlabError):
    """A strategy, a setting or a network that cannot be used together, found before any training.

    Example:
        >>> from layerlab import Refused
        >>> raise Refused("my-method needs two layers or more; use another network.")
        Traceback (most recent call last):
        layerlab.base.errors.Refused: my-method needs two layers or more; use another network.
    """


class Diverged(LayerlabError):
    """A training whose loss is no longer finite, with its traceback: it says in which step of which method.

    Attributes:
        history: one row an epoch up to there, the last one with a loss that is not finite.

    Example:
        >>> from layerlab import Diverged, build_model, fit, load_dataset
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
        >>> try:
        ...     fit(network, data, epochs=1, lr=1e30, progress=False)
        ... except Diverged as error:
        ...     print(str(error)[:17])
        Training diverged
    """

    def __init__(self, message: str, history: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.history = [dict(row) for row in history]

    def _render_traceback_(self) -> list[str]:
        return "".join(traceback.format_exception(self)).splitlines()


def reason(error: BaseException) -> str:
    """An error in one line: a sentence of ours as it is, any other with its type."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, LayerlabError):
        return text
    return f"{kind}: {text}" if text else kind


def first_line(error: BaseException) -> str:
    """What an error says in its first line, in at most 200 characters; its type where it says nothing.

    Example:
        >>> from layerlab import first_line
        >>> first_line(ValueError("no such file\\nand much more"))
        'no such file'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class LayerlabWarning(UserWarning):
    """Something a user should know and the work goes on without; a sentence, as `LayerlabError` has.

    Example:
        >>> import warnings
        >>> from layerlab import LayerlabWarning
        >>> warnings.simplefilter("ignore", LayerlabWarning)
    """


def unknown(kind: str, name: str, known: Iterable[str], remedy: str = "") -> LayerlabError:
    """The error for a name that does not exist: lists what does, and the nearest spelling.

    Returns the error (the caller raises it), so that type checkers see the control flow.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    listing = ", ".join(names) if names else "none"
    return LayerlabError(f"Unknown {kind} {name!r}.{guess} Known: {listing}.{' ' + remedy if remedy else ''}")


def sentence(error: ValidationError, owner: str) -> str:
    """A pydantic validation error as one sentence a setting: `owner: setting 'x' …, got …`."""
    parts = []
    for detail in error.errors():
        setting = ".".join(str(part) for part in detail["loc"]) or "settings"
        if detail["type"] == "extra_forbidden":
            parts.append(f"{owner} has no setting {setting!r}")
        else:
            message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
            parts.append(f"{owner}: setting {setting!r} {message}, got {detail['input']!r}")
    return "; ".join(parts) + "."


def first_problem(error: ValidationError) -> str:
    """What is wrong first in a file's content, in words that fit into a sentence: `0.paper should be …, got '…'`."""
    first, *others = error.errors()
    place = ".".join(str(part) for part in first["loc"]) or "the content"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "json_invalid":
        return message
    return f"{place} {message}, got {first['input']!r:.80}" + (f", and {len(others)} more" if others else "")
