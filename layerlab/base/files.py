"""Files that are whole or not there."""

from __future__ import annotations

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
