"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from layerlab.base.errors import LayerlabError

try:
    import fcntl
except ImportError:  # Windows, where nobody removes or replaces a file that another process has open
    fcntl = None  # type: ignore[assignment]

# What a temporary file's name ends with, so that nothing else passes for one.
_PARTIAL = ".partial"


def write_atomically(
    file: Path, write: Callable[[IO[bytes]], object], check: Callable[[Path], object] | None = None
) -> None:
    """Write a file so that a reader, after a crash too, finds the old content or the new, never a part.

    Args:
        file: its folder is made if there is none.
        write: is given a stream, in which it may seek.
        check: is given what was written, before that takes the file's name; what it raises leaves the old file.

    Raises:
        LayerlabError: the folder cannot be written (full disk, read-only); the old file is still there.
    """
    stream = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sweep(file)
        with _temporary(file) as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
            if check is not None:
                check(Path(stream.name))
            # Like any file that open() makes, rather than readable by its owner alone as temporary ones are.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(stream.name, 0o666 & ~umask)
            if fcntl is not None:
                os.replace(stream.name, file)
        if fcntl is None:
            os.replace(stream.name, file)
        else:
            _sync_folder(file.parent)
    except (OSError, RuntimeError) as error:
        raise LayerlabError(f"Cannot write {file} ({_of_the_system(error)}); make room or choose another folder.") \
            from error
    finally:
        if stream is not None:
            Path(stream.name).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let the name of a file that was put into a folder survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(file: Path) -> Any:
    """A new file beside another one, locked as long as it is open: by that it differs from those of killed writers."""
    while True:
        stream = tempfile.NamedTemporaryFile(  # noqa: SIM115, the caller's
            dir=file.parent, prefix=f".{file.name}.", suffix=_PARTIAL, delete=False
        )
        if fcntl is None:
            return stream
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        # Another process may have swept it away before it was locked.
        if os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()


def sweep(file: Path) -> None:
    """Remove what killed processes left of their tries to write a file."""
    for left in filter(Path.is_file, file.parent.glob(f".{glob.escape(file.name)}.*{_PARTIAL}")):
        # Locked by a process that is writing it, not ours, or on a file system without locks: it stays.
        with contextlib.suppress(OSError):
            if fcntl is None:
                left.unlink()
                continue
            with left.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def _of_the_system(error: BaseException) -> BaseException:
    """The system's own error, where torch has put one of its own in front of it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__context__
    return error


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
