"""Tables that took long to measure, kept until their notebook has ended: one that was interrupted finds them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from layerlab.base.errors import LayerlabError
from layerlab.base.files import is_plain, write_atomically
from layerlab.show.progress import say

if TYPE_CHECKING:
    import pandas as pd

# In a file's own notes: what the table was measured of.
_OF = b"layerlab.measured"


def measured(file: Path, of: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table in a file, or what is measured now and kept there.

    Args:
        file: in Parquet's format; its folder is made if there is none.
        of: what tells this measurement from others; a file of another one does not count, nor one that cannot be read.
        make: measures.
    """
    found = _read(file, of)
    if found is None:
        found = make()
        try:
            _write(file, of, found)
        except LayerlabError as error:
            say(f"The table {file.stem!r} is not kept for a notebook that goes on: {error}")
    return found


def _read(file: Path, of: str) -> pd.DataFrame | None:
    import pyarrow
    import pyarrow.parquet

    if not is_plain(file):
        return None
    try:
        table = pyarrow.parquet.read_table(file)
        return table.to_pandas() if (table.schema.metadata or {}).get(_OF) == of.encode() else None
    except (OSError, ValueError, pyarrow.ArrowException):
        return None


def _write(file: Path, of: str, frame: pd.DataFrame) -> None:
    """Keep a table, unless it holds what Parquet does not give back as it was."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.Table.from_pandas(frame)
        same = table.to_pandas().equals(frame)
    except (TypeError, ValueError, pyarrow.ArrowException):
        same = False
    if same:
        table = table.replace_schema_metadata({**table.schema.metadata, _OF: of.encode()})
        write_atomically(file, lambda stream: pyarrow.parquet.write_table(table, stream))
