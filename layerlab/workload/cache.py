"""What is kept between two starts: decoded images under the digest of their content, and digests of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from layerlab.base.cache import SETTLED, cache_folder, write_cached
from layerlab.base.errors import first_line
from layerlab.show.progress import say

_MISSING = b"missing"


class Kept(NamedTuple):
    """Decoded images, as they are kept.

    Attributes:
        images: uint8, (n, channels, height, width), without those that do not decode.
        bad: row in the source → why it cannot be used, and what cannot be done with it, as `BadImage` takes them.
        treated: how many images had something done to them, by `layerlab.workload.decoding.TREATMENTS`.
    """

    images: np.ndarray
    bad: dict[int, tuple[str, str]]
    treated: dict[str, int]


def load_kept(key: str, rows: int, shape: tuple[int, ...]) -> Kept | None:
    """The decoded images of a key; None, with a warning, where they are damaged, or where there are none.

    Args:
        key: of `keep`.
        rows: of the source.
        shape: of an image.
    """
    file = cache_folder() / f"{key}.npy"
    if not file.exists():
        return None
    try:
        about = json.loads(file.with_suffix(".json").read_text())
        bad = {int(row): (str(why), str(what)) for row, (why, what) in about["bad"].items()}
        # Mapped, so that a header which claims more than there is allocates nothing.
        mapped = np.lib.format.open_memmap(file, mode="r")
        if mapped.dtype != np.uint8 or mapped.shape != (rows - len(bad), *shape):
            raise ValueError("other images than expected")
        images = np.array(mapped)
        if zlib.crc32(images.data) != about["checksum"]:
            raise ValueError("other pixels than were written")
        return Kept(images, bad, {name: int(count) for name, count in about["treated"].items()})
    except (ValueError, OSError, EOFError, KeyError, TypeError, AttributeError):
        say(f"{file} was damaged and is made again.")
        return None


def keep(key: str, kept: Kept) -> None:
    """Keep decoded images; where that fails, a warning says so."""
    folder = cache_folder()
    about = {"bad": kept.bad, "treated": kept.treated, "checksum": zlib.crc32(np.ascontiguousarray(kept.images).data)}
    try:
        # The pixels last: without them, nothing is taken for whole.
        write_cached(folder / f"{key}.json", lambda stream: stream.write(json.dumps(about).encode()))
        write_cached(folder / f"{key}.npy", lambda stream: np.save(stream, kept.images))
    except OSError as error:
        say(f"Decoded images are not kept, so the next start decodes again: {first_line(error)}.")


def content_digests(paths: Sequence[str | os.PathLike[str]]) -> list[bytes]:
    """A digest of each file's content, 16 bytes; one text for all that cannot be read.

    They are read once: as long as neither place, number, size nor times of any file change, the digests that were kept
    are taken. The time of the last change of a file's entry (ctime) cannot be set, so files that were unpacked with the
    sizes and times of others are read.
    """
    start = time.time()
    signature = hashlib.blake2b(digest_size=16)
    newest = 0.0
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            signature.update(os.fsencode(os.path.realpath(path)))
            signature.update(f"|{status.st_dev}|{status.st_ino}|{status.st_size}|{status.st_mtime_ns}|"
                             f"{status.st_ctime_ns}\n".encode())
            newest = max(newest, status.st_ctime, status.st_mtime)
    file = cache_folder() / f"{signature.hexdigest()}.digests"
    with contextlib.suppress(OSError):
        known = file.read_bytes()
        if len(known) == 16 * len(paths) + 4 and zlib.crc32(known[:-4]).to_bytes(4) == known[-4:]:
            return [known[index : index + 16] for index in range(0, len(known) - 4, 16)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(_content_digest, paths))
    if newest < start - SETTLED:
        joined = b"".join(found)
        with contextlib.suppress(OSError):
            write_cached(file, lambda stream: stream.write(joined + zlib.crc32(joined).to_bytes(4)))
    return found


def _content_digest(path: str | os.PathLike[str]) -> bytes:
    if not os.path.isfile(path):  # a pipe would be read for ever
        return _MISSING.ljust(16)
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return _MISSING.ljust(16)
