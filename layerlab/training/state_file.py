"""Tensors and plain values in a file of torch's: read without pickle, and not at all if one bit of it has flipped."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from layerlab.base.errors import LayerlabError, first_line
from layerlab.base.files import write_atomically

# torch's files are zip archives. The digest of everything before it stands in the archive's comment, at the very end.
_MARK = b"layerlab blake2b "
_DIGEST = 16  # bytes, written as hexadecimal digits
_LENGTH = 2  # bytes in front of the comment, which say how long it is
_PART = 1 << 20
# Types that come back as they were; of any other it is tried.
_PLAIN = (type(None), bool, int, float, str, Tensor, nn.Parameter)


class _Digesting:
    """A stream that passes on what is written and digests it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.blake2b(digest_size=_DIGEST)

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._stream.write(content)

    def flush(self) -> None:
        self._stream.flush()


def write_state(file: Path, content: Any, check: Callable[[Path], object] | None = None) -> None:
    """Write what `unstorable` finds nothing in; see `write_atomically`.

    Raises:
        LayerlabError: no room, or not writable; the file that was there still is.
    """
    def write(stream: IO[bytes]) -> None:
        digesting = _Digesting(stream)
        torch.save(content, digesting)  # type: ignore[arg-type]  # it needs no more of a stream
        comment = _MARK + digesting.digest.hexdigest().encode()
        stream.seek(-_LENGTH, os.SEEK_END)
        stream.write(len(comment).to_bytes(_LENGTH, "little") + comment)

    write_atomically(file, write, check)


def read_state(file: Path, what: str, remedy: str, foreign: str, device: torch.device | str = "cpu") -> Any:
    """What `write_state` wrote, with tensors on `device`.

    Args:
        file: the path.
        what: is read, for the error: `The checkpoint`.
        remedy: for a damaged one.
        foreign: the remedy for a file that something else wrote.
        device: where to put the tensors.

    Raises:
        LayerlabError: it cannot be read, is damaged, or was not written by `write_state`.
    """
    try:
        whole = _is_whole(file)
        if whole is None and zipfile.is_zipfile(file):
            raise LayerlabError(f"{what} {file} was not written by this layerlab; {foreign}.")
        why = "its end is missing" if whole is None else "its content is not what was written"
        if whole:
            return torch.load(file, map_location=device, weights_only=True)
    except OSError as error:
        raise LayerlabError(f"{what} {file} cannot be read ({error.strerror}); check the path.") from None
    except LayerlabError:
        raise
    except Exception as error:  # torch's, on a file that somebody made look like one of ours
        why = first_line(error)
    raise LayerlabError(f"{what} {file} is damaged ({why}); {remedy}.")


def _is_whole(file: Path) -> bool | None:
    """Whether the content is what was written; None where no digest says so."""
    tail = _LENGTH + len(_MARK) + 2 * _DIGEST
    with file.open("rb") as stream:
        rest = stream.seek(0, os.SEEK_END) - tail
        if rest < 0:
            return None
        stream.seek(rest)
        length, comment = stream.read(_LENGTH), stream.read()
        if not comment.startswith(_MARK):
            # Cut off or with something behind it, or none of ours.
            stream.seek(-min(2 * tail, rest + tail), os.SEEK_END)
            return False if _MARK in stream.read() else None
        stream.seek(0)
        digest = hashlib.blake2b(digest_size=_DIGEST)
        while rest > 0:
            part = stream.read(min(rest, _PART))
            digest.update(part)
            rest -= len(part)
    # As it was when the digest was taken: without a comment.
    digest.update(bytes(_LENGTH))
    same = comment.removeprefix(_MARK) == digest.hexdigest().encode()
    return same and int.from_bytes(length, "little") == len(comment)


def unstorable(value: Any, place: str = "") -> str:
    """The first thing in a value that would not come back from a file, with its place; empty if all of it does.

    Example:
        >>> from collections import deque
        >>> unstorable({"seen": [1, deque([2])]})
        "a collections.deque at 'seen.1'"
    """
    kind = type(value)
    if kind in _PLAIN:
        return ""
    if kind in (dict, OrderedDict):
        parts = [(f"{place}.{key}", each) for key, each in value.items()]
        parts += [(f"{place} (a key)", key) for key in value if type(key) not in _PLAIN]
    elif kind in (list, tuple):
        parts = [(f"{place}.{number}", each) for number, each in enumerate(value)]
    else:
        return "" if _comes_back(value) else f"a {kind.__module__}.{kind.__qualname__} at {place.lstrip('.')!r}"
    return next(filter(None, (unstorable(each, where) for where, each in parts)), "")


def _comes_back(value: Any) -> bool:
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        stream.seek(0)
        torch.load(stream, weights_only=True)
    except Exception:  # pickle's and torch's, whatever the value's class raises
        return False
    return True


def check_storable(owner: str, value: Any, remedy: str) -> None:
    """Refuse a state that would not come back, before it is written.

    Raises:
        LayerlabError: with the type, the place and the remedy.
    """
    try:
        found = unstorable(value)
    except RecursionError:
        found = "something that contains itself"
    if found:
        raise LayerlabError(f"{owner} has {found}, which no file gives back without pickle; {remedy} tensors, numbers, "
                            "texts, lists, tuples, sets and dicts, as float(…) makes one of a NumPy number.")
