"""The folder that a run writes to, and the mark by which layerlab knows what in it is its own."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from layerlab.base.errors import LayerlabError
from layerlab.base.files import is_plain, write_json
from layerlab.runs.record import MANIFEST, PARAMETERS, PARTS, RECORD, RESULTS, read_record

# In a run's folder: the tables, figures and notebooks that layerlab wrote there, in JSON. No others are replaced or
# deleted.
MARK = ".layerlab.json"


class OwnFolder:
    """A folder that layerlab writes to: a new one, one of its own, or one without anything that would be replaced.

    Args:
        folder: an existing one.

    Raises:
        LayerlabError: something is there that layerlab did not write and would replace; the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        written = self._written()
        if written is None:
            for name in (RECORD, RESULTS, PARAMETERS, MANIFEST):
                self._check_free(folder / name)
            written = set()
            self._write(written)
        self._names = written

    def _written(self) -> set[str] | None:
        """What layerlab wrote to the folder; None if it is none of its own."""
        if is_plain(self.folder / MARK):
            with contextlib.suppress(ValidationError):
                return TypeAdapter(set[str]).validate_json((self.folder / MARK).read_bytes())
        if not {"attempt", "basis", "key", "process"} & read_record(self.folder).keys():
            return None
        # A run of a version without the mark.
        patterns = ("*.ipynb", *(f"{part}/*.*" for part in PARTS))
        files = [file for pattern in patterns for file in self.folder.glob(pattern)]
        return {file.relative_to(self.folder).as_posix() for file in files}

    def take(self, name: str) -> None:
        """Note that a table, a figure or a notebook is about to be written.

        Raises:
            LayerlabError: somebody else's is there.
        """
        if name not in self._names:
            self._check_free(self.folder / name)
            self._write(self._names | {name})

    def clear(self) -> None:
        """Delete the tables and figures that layerlab wrote: one that is made no more would pass for a new run's."""
        shown = {name for name in self._names if name.partition("/")[0] in PARTS}
        for name in shown:
            part, _, file = name.partition("/")
            # The mark, too, may come from somebody else.
            if "/" not in file and not (self.folder / part).is_symlink():
                with contextlib.suppress(OSError):
                    (self.folder / part / file).unlink()
        self._write(self._names - shown)

    def _write(self, names: set[str]) -> None:
        write_json(self.folder / MARK, sorted(names))
        self._names = names

    def _check_free(self, place: Path) -> None:
        if place.exists() or place.is_symlink():
            raise LayerlabError(f"{place} would be replaced, and layerlab did not write it; choose another folder with "
                                "--output, or move it away.")
