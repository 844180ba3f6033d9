"""Stop anywhere, go on exactly there: whole files or none, read without pickle."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from layerlab.errors import LayerlabError


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


class Checkpoint:
    """The state of one fit at the end of its last finished epoch, in a folder of its own.

    Args:
        folder: where `state.pt` and `attempt.json` lie; made when first written.
        fingerprint: of the fit's arguments; a state that belongs to others is refused.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint

    @property
    def file(self) -> Path:
        """The state's file."""
        return self.folder / "state.pt"

    def attempt(self) -> str:
        """An id for this fit that survives interruptions, by which its MLflow run is found again."""
        file = self.folder / "attempt.json"
        if file.exists():
            return json.loads(file.read_text())["attempt"]
        attempt = uuid.uuid4().hex
        write_json(file, {"attempt": attempt})
        return attempt

    def save(self, state: dict[str, Any]) -> None:
        """Replace the stored state.

        Raises:
            LayerlabError: no room, or not writable; the previous state is still there.
        """
        write_atomically(self.file, lambda stream: torch.save({**state, "fingerprint": self.fingerprint}, stream))

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The stored state with tensors on `device`, or None if there is none yet.

        Raises:
            LayerlabError: it is damaged, or belongs to a fit with other arguments.
        """
        if not self.file.exists():
            return None
        try:
            state = torch.load(self.file, map_location=device, weights_only=True)
        except Exception as error:  # zip, pickle and runtime errors, depending on the damage
            raise LayerlabError(
                f"The checkpoint {self.file} is damaged ({str(error).splitlines()[0][:120]}); delete the folder "
                f"{self.folder} to start anew."
            ) from None
        if state["fingerprint"] != self.fingerprint:
            raise LayerlabError(
                f"The checkpoint in {self.folder} belongs to a fit with other arguments (settings, strategies, seed, "
                "data, initial weights or versions); give another folder, or delete this one to start anew."
            )
        return state
