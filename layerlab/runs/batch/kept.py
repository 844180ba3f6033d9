"""Which notebooks a batch was made of, kept so that their answers can be shown later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from layerlab.base.errors import LayerlabError, unknown
from layerlab.base.files import write_json
from layerlab.base.text import as_json
from layerlab.runs.jobs import Job
from layerlab.runs.record import workbook_folder


def batch_id(jobs: Sequence[Job]) -> str:
    """The id of a batch, the same for the same notebooks with the same parameters: a command that is repeated after an
    interruption goes on with its batch."""
    text = "\n".join(sorted(job.folder for job in jobs))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _file(batch: str) -> Path:
    return workbook_folder() / "runs" / "batches" / f"{batch}.json"


def keep_batch(batch: str, jobs: Sequence[Job]) -> None:
    """Keep which jobs a batch consists of."""
    # What its outcome rests on stands in each job's own folder.
    write_json(_file(batch), [as_json({**asdict(job), "basis": {}}) for job in jobs])


def kept_batches() -> list[str]:
    """The ids of this workbook's batches, the one that was started last first."""
    files = _file("*").parent.glob("*.json")
    return [file.stem for file in sorted(files, key=lambda file: -file.stat().st_mtime_ns)]


def read_batch(batch: str = "") -> tuple[str, list[Job]]:
    """(id, jobs) of a batch.

    Args:
        batch: its id, or the beginning of it; empty: the one that was started last.

    Raises:
        LayerlabError: there is no such batch, or several ids begin so; the file that keeps it holds something else.
    """
    known = kept_batches()
    if not known:
        raise LayerlabError(f"No batch was run in {workbook_folder()} yet; run `layerlab reproduce` or `layerlab "
                            "batch` first.")
    found = [each for each in known if each.startswith(batch)] if batch else known[:1]
    if len(found) != 1:
        if found:
            raise LayerlabError(f"Batch {batch!r} may be {' or '.join(found)}; write more of it.")
        raise unknown("batch", batch, known)
    try:
        content: list[dict[str, Any]] = json.loads(_file(found[0]).read_text(encoding="utf-8"))
        return found[0], TypeAdapter(list[Job]).validate_python(content)
    except (OSError, ValueError, ValidationError):
        raise LayerlabError(f"{_file(found[0])} does not say which notebooks the batch had; run it again.") from None
