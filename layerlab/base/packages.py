"""What tells that a package of Python is another one than before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from layerlab.base import digests
from layerlab.base.errors import LayerlabError
from layerlab.base.files import cache_folder, write_json

# Seconds after an edit in which another one may leave a file's times as they are, on the coarsest file systems.
_SETTLED = 2.0


def package_digests(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Python file below a folder → its digest.

    They are remembered in the cache, since parsing a package takes half a second and more.

    Args:
        folder: of a package.
        without: folders directly below it that do not count.
    """
    below = sorted(file.relative_to(folder) for file in folder.rglob("*.py"))
    names = [file.as_posix() for file in below if file.parts[0] not in without]
    memory = _memory(folder, names)
    if memory is None:
        return _digests(folder, names)
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(memory.read_bytes())
        if isinstance(found, dict) and list(found) == names and all(isinstance(each, str) for each in found.values()):
            return found
    made = _digests(folder, names)
    # Files that were edited meanwhile have another memory.
    if all(made.values()) and _memory(folder, names) == memory:
        # A cache that cannot be written costs the time alone.
        with contextlib.suppress(LayerlabError):
            write_json(memory, made)
    return made


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: digests.file_digest(folder / name) for name in names}


def _memory(folder: Path, names: Sequence[str]) -> Path | None:
    """The file of the cache for a package as it is; None while an edit could leave its times as they are."""
    # What makes digests counts, and the Python: what it cannot parse counts as it stands.
    digest = hashlib.blake2b(Path(digests.__file__).read_bytes(), digest_size=16)
    digest.update(f"{sys.version_info[:2]}|{folder}\n".encode())
    newest = 0.0
    for name in names:
        try:
            status = (folder / name).stat()
        except OSError:
            return None
        newest = max(newest, status.st_mtime, status.st_ctime)
        digest.update(f"{name}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}\n".encode())
    settled = time.time() - newest > _SETTLED
    return cache_folder() / "code" / f"{digest.hexdigest()}.json" if settled else None
