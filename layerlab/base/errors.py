"""The errors that layerlab raises for what a user can mend, and the sentences it is made of."""

from __future__ import annotations

import difflib
import errno
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import PurePath
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


def located(error: BaseException) -> str:
    """What somebody's code raised, with its type and the place: `KeyError: 'x', line 7 of network.py`."""
    own = str(PurePath(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if "site-packages" not in frame.filename and not frame.filename.startswith(own)]
    kind, text = type(error).__name__, first_line(error)
    said = text if text == kind else f"{kind}: {text}"
    return f"{said}, line {frames[-1].lineno} of {PurePath(frames[-1].filename).name}" if frames else said


# What the system refuses → what a person can do about it.
_REMEDIES = {
    errno.ENOSPC: "make room there", errno.EDQUOT: "make room within your quota",
    errno.EROFS: "name a folder that can be written", errno.EACCES: "name a folder that you may use",
    errno.EPERM: "name a folder that you may use", errno.EIO: "look after that disk",
    errno.EMFILE: "raise `ulimit -n`", errno.ENFILE: "end some programs", errno.ENOMEM: "end some programs",
}


def refusal(error: BaseException) -> str:
    """What the system refuses and the remedy, in a sentence without its end; empty for any other error.

    Example:
        >>> refusal(OSError(errno.ENOSPC, "No space left on device", "/tmp/x"))
        'No space left on device: /tmp/x; make room there'
    """
    if not isinstance(error, OSError):
        return ""
    if str(error.strerror).startswith("No usable temporary directory"):
        # Python has tried to write to each of those that it lists.
        return f"{error.strerror}; set TMPDIR to a folder that can be written"
    if error.errno not in _REMEDIES:
        return ""
    # Of two files the second is the one that is written.
    where = error.filename2 or error.filename
    return f"{error.strerror}{f': {where}' if where else ''}; {_REMEDIES[error.errno]}"


def brief(value: Any) -> str:
    """What a value looks like in code, in one line of at most 80 characters.

    Example:
        >>> brief("x" * 1000)[-3:]
        'xx…'
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


class LayerlabWarning(UserWarning):
    """Something a user should know and the work goes on without; a sentence, as `LayerlabError` has.

    Example:
        >>> import warnings
        >>> from layerlab import LayerlabWarning
        >>> warnings.simplefilter("ignore", LayerlabWarning)
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is meant by one that is not: empty where none is near.

    Case and separators do not matter; initials stand for words; among words in common, the most decide; then spelling.

    Example:
        >>> names = ("epochs", "max_steps", "lr", "batch_size", "crop-flip")
        >>> [nearest(name, names) for name in ("max_epochs", "learning_rate", "bs", "CROP_FLIP", "epcohs", "callbacks")]
        ['epochs', 'lr', 'batch_size', 'crop-flip', 'epochs', '']
    """
    names = sorted(known)
    words = {each: _words(each) for each in names}
    own = _words(name)
    for each in names:
        if words[each] == own:
            return each
    for each in names:
        one, other = "".join(words[each]), "".join(own)
        if (len(own) > 1 and _initials(own) == one) or (len(words[each]) > 1 and _initials(words[each]) == other):
            return each
    within = [each for each in names if set(words[each]) < set(own) or set(own) < set(words[each])]
    if own and within:
        return max(within, key=lambda each: len("".join(set(words[each]) & set(own))))
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), "")


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


def _initials(words: Iterable[str]) -> str:
    return "".join(word[0] for word in words)


def unknown(kind: str, name: object, known: Iterable[str], remedy: str = "") -> LayerlabError:
    """The error for a name that does not exist: lists what does, and the nearest spelling.

    Returns the error (the caller raises it), so that type checkers see the control flow.
    """
    names = sorted(known)
    near = nearest(str(name), names)
    guess = f" Did you mean {near!r}?" if near else ""
    listing = ", ".join(names) if names else "none"
    return LayerlabError(f"Unknown {kind} {brief(name)}.{guess} Known: {listing}.{' ' + remedy if remedy else ''}")


def sentence(error: ValidationError, owner: str, known: Iterable[str] = ()) -> str:
    """A pydantic validation error as one sentence a setting: `owner: setting 'x' …, got …`.

    Args:
        error: pydantic's.
        owner: whose settings they are.
        known: the settings that there are, of which the nearest is named in the place of an unknown one.
    """
    known = sorted(known)
    parts = []
    for same in _by_setting(error):
        detail = same[0]
        setting = ".".join(str(part) for part in detail["loc"] if not _names_a_type(part)) or "settings"
        if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            near = nearest(str(detail["loc"][-1]), known)
            listing = f"it has {', '.join(known)}" if known else ""
            hint = f"did you mean {near!r}?" if near else listing
            parts.append(f"{owner} has no setting {setting!r}" + (f" ({hint})" if hint else ""))
            continue
        messages = [each["msg"].removeprefix("Value error, ").removeprefix("Input ").replace(
            "be callable", "be a function") for each in same]
        first, *others = dict.fromkeys(messages)
        choices = re.findall(r"'([^']*)'", " ".join(str(each.get("ctx", {}).get("expected", "")) for each in same))
        near = nearest(detail["input"], choices) if isinstance(detail["input"], str) else ""
        hint = f" (did you mean {near!r}?)" if near else ""
        message = " or ".join([first, *(other.removeprefix("should ") for other in others)])
        parts.append(f"{owner}: setting {setting!r} {message}, got {brief(detail['input'])}{hint}")
    return "; ".join(parts) + "."


def _names_a_type(part: Any) -> bool:
    """Whether a part of a place is pydantic's own name of an alternative, such as `dict[str,int]`."""
    return isinstance(part, str) and "[" in part


def _by_setting(error: ValidationError) -> list[list[Any]]:
    """The problems of an error, those together that are one: a value of which no alternative of a type takes."""
    groups: list[list[Any]] = []
    before: Any
    for detail in error.errors():
        before = groups[-1][-1] if groups else {"input": object(), "type": "", "loc": ()}
        # Settings that are missing have one input, too: what they are missing in.
        same = before["input"] is detail["input"] and before["type"] != "missing"
        if same and len(detail["loc"]) > 1 and before["loc"][:-1] == detail["loc"][:-1]:
            groups[-1].append(detail)
        else:
            groups.append([detail])
    # Of alternatives of which one went further, such as a list with a wrong number in it, that one is meant.
    further = {group[0]["loc"][0] for group in groups if any(map(_names_a_type, group[0]["loc"]))}
    groups = [group for group in groups if group[0]["loc"][:1] not in {(each,) for each in further}
              or any(map(_names_a_type, group[0]["loc"]))]
    for group in groups:
        if len(group) > 1:  # which alternative it was is no part of the setting's name
            group[0]["loc"] = group[0]["loc"][:-1]
    return groups


def first_problem(error: ValidationError) -> str:
    """What is wrong first in a file's content, in words that fit into a sentence: `0.paper should be …, got '…'`."""
    first, *others = error.errors()
    place = ".".join(str(part) for part in first["loc"]) or "the content"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "json_invalid":
        return message
    return f"{place} {message}, got {brief(first['input'])}" + (f", and {len(others)} more" if others else "")
