"""Files that are whole or not there, and what tells that a folder's content has changed."""

from __future__ import annotations

import hashlib
import json
import os
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


def folder_digest(source: str) -> str:
    """Changes when the files of a folder do; quick, since it reads none of them.

    Names, sizes and times of what is in the folder, and of the folders (not the files) one level below, so that a
    dataset of a million images in class folders costs a thousand look-ups. Empty for what is no folder.
    """
    top = Path(source)
    if not top.is_dir():
        return ""
    digest = hashlib.blake2b(digest_size=8)
    for folder in [top, *sorted(entry for entry in top.iterdir() if entry.is_dir())]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if folder == top or entry.is_dir():
                status = entry.stat()
                digest.update(f"{entry.path}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
