"""What a session notes in its folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from layerlab.base.errors import LayerlabError, first_problem
from layerlab.base.files import plain_file
from layerlab.base.text import as_json
from layerlab.contract.claims import ClaimResult
from layerlab.runs.notebook_file import read_notebook


def workbook_folder() -> Path:
    """Where this workbook keeps runs and the tracking database.

    `$LAYERLAB_HOME`, else the nearest folder upwards from here that has a `notebooks` folder or a tracking database
    that layerlab made (its lock lies beside it), else the current folder.
    """
    if home := os.environ.get("LAYERLAB_HOME"):
        return Path(home).resolve()
    here = Path.cwd()
    for folder in (here, *here.parents):
        ours = (folder / DATABASE).exists() and (folder / f"{DATABASE}.lock").exists()
        if ours or (folder / "notebooks").is_dir():
            return folder
    return here


DATABASE = "mlflow.db"
OUTPUT = "LAYERLAB_OUTPUT"
RECORD = "study.json"
RESULTS = "claims.json"
# Folders of what a session shows.
PARTS = ("tables", "figures")
PARAMETERS = "parameters.json"
MANIFEST = "manifest.json"
IDENTITY = "identity.json"
# Variable of a notebook's kernel: the id of the batch that does everything anew, if one runs it.
RERUN = "LAYERLAB_RERUN"
# Variable of a notebook's kernel: the parameters in which it differs from the others of its batch, in JSON.
DIFFERS = "LAYERLAB_DIFFERS"


def default_folder(strategy: str, profile: str, overrides: Mapping[str, Any]) -> Path:
    """`runs/<strategy>/<profile>` in the workbook's folder, or one of their own for other parameters."""
    name = profile
    if overrides:
        text = json.dumps(as_json(overrides), sort_keys=True)
        name += "-" + hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return workbook_folder() / "runs" / strategy / name


def read_record(folder: Path) -> dict[str, Any]:
    """What a study noted of itself in its folder: `attempt`, `finished`, `parameters`, `mlflow_run`, its `artifacts`,
    `basis`, `used`, `seconds`, `answers`; or nothing, also where the file holds anything else."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(record, dict) or not isinstance(record.get("finished"), bool):
        return {}
    kinds: dict[str, type] = {"basis": dict, "used": dict, "seconds": Real, "rerun": str, "attempt": str,
                              "answers": list, "mlflow_run": str, "artifacts": str}
    return record if all(isinstance(record.get(name), (kind, NoneType)) for name, kind in kinds.items()) else {}


def notebook_cells(notebook: Path) -> list[tuple[str, str]]:
    """Type and source of each cell of a notebook's file.

    Raises:
        LayerlabError: the file is no notebook.
    """
    return [(cell["cell_type"], cell["source"]) for cell in read_notebook(notebook)["cells"]]


def read_results(folder: Path) -> list[ClaimResult]:
    """The claims' results that a finished study left in its folder.

    Raises:
        LayerlabError: there are none, or the file holds something else.
    """
    file = folder / RESULTS
    if not file.exists():
        raise LayerlabError(f"{folder} holds no finished run (no {RESULTS}); run `layerlab reproduce` first.")
    try:
        return parse_results(file.read_bytes())
    except ValidationError as error:
        raise LayerlabError(f"{file} does not hold the claims of a run ({first_problem(error)}); delete its "
                            "folder and run it again.") from None


def read_parameters(folder: Path) -> dict[str, Any]:
    """The parameters that a study noted in its folder.

    Raises:
        LayerlabError: there are none, or the file holds something else, or is a link.
    """
    return read_object(folder, PARAMETERS)


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a study's folder, which may come from anybody.

    Raises:
        LayerlabError: the file is not there, is a link, or holds something else.
    """
    file = plain_file(folder, name)
    try:
        return TypeAdapter(dict[str, Any]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise LayerlabError(f"{file} does not say what a run began with ({first_problem(error)}); run `layerlab "
                            "reproduce` again, with --rerun.") from None


def parse_results(content: bytes) -> list[ClaimResult]:
    """The rows of a `claims.json`.

    Raises:
        pydantic.ValidationError: it is no JSON, or holds something else.
    """
    return TypeAdapter(list[ClaimResult]).validate_json(content)
