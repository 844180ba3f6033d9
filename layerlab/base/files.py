"""Files that are whole or not there."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from layerlab.base.errors import LayerlabError


def write_atomically(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that a reader, after a crash too, finds the old content or the new, never a part.

    Raises:
        LayerlabError: the folder cannot be written (full disk, read-only); the old file is still there.
    """
    stream = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        # Like any file that open() makes, rather than readable by its owner alone as temporary ones are.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(stream.name, 0o666 & ~umask)
        os.replace(stream.name, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError.
        raise LayerlabError(f"Cannot write {file} ({error}); make room or choose another folder.") from error
    finally:
        if stream is not None:
            Path(stream.name).unlink(missing_ok=True)


def write_json(file: Path, content: Any) -> None:
    """Write JSON atomically.

    Raises:
        LayerlabError: the folder cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    write_atomically(file, lambda stream: stream.write(text.encode()))


def plain_file(folder: Path, name: str) -> Path:
    """A file below a folder that somebody may have sent, to be read: no link on the way to it is followed.

    Args:
        name: with folders, if any, before it: `tables/I.csv`.

    Raises:
        LayerlabError: it is not there, or it or a folder on the way is a link, a device or the like.
    """
    place = folder
    *folders, last = name.split("/")
    for part in folders:
        place /= part
        if place.is_symlink() or not place.is_dir():
            raise LayerlabError(_not_plain(place, "folder"))
    place /= last
    if not is_plain(place):
        raise LayerlabError(_not_plain(place, "file"))
    return place


def is_plain(file: Path) -> bool:
    """Whether there is a regular file, not a link to one."""
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except (OSError, ValueError):  # not there; a name that no file can have
        return False


def _not_plain(place: Path, kind: str) -> str:
    if place.is_symlink():
        return f"{place} is a link, which layerlab does not follow; put a {kind} in its place."
    return f"There is no {kind} {place}; check the path."


def swap(new: Path, old: Path) -> None:
    """Exchange two folders at once, so that a process killed at any moment leaves one or the other in both places.

    Raises:
        OSError: this system or file system cannot do that.
    """
    # Of Linux; Python has no name for it. -100: both paths are as they are given; 2: exchange.
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError("no renameat2")
    if rename(-100, os.fsencode(new), -100, os.fsencode(old), 2):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
