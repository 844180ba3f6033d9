"""What a notebook's outcome rests on, and whether what was finished still stands."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from layerlab.base import usage
from layerlab.base.digests import package_digests
from layerlab.base.provenance import versions
from layerlab.base.text import as_json
from layerlab.runs.record import notebook_cells

if TYPE_CHECKING:
    from layerlab.contract.paper import Paper

# Reasons that are named; the rest is counted.
NAMED = 3


class State(NamedTuple):
    """Whether a job is done, and why.

    Attributes:
        done: nothing would come out otherwise.
        why: what was compared; or what changed since it was finished, and nothing where it never was.
    """

    done: bool
    why: str = ""


def notebook_basis(notebook: Path, parameters: Mapping[str, Any], cwd: str = "") -> dict[str, Any]:
    """What is known of a notebook's outcome before it runs, as JSON.

    What it reads and imports is known when it has run: see `layerlab.base.usage`.

    Args:
        notebook: the notebook's file.
        parameters: every value in force.
        cwd: the folder that it runs in; empty for the present one.

    Raises:
        LayerlabError: the file is no notebook.
    """
    basis = {
        "cells": _digest(notebook_cells(notebook)),
        "parameters": dict(parameters),
        "places": _places(parameters, Path(cwd)),
        # Plugins count by the files that the notebook imports.
        "versions": versions(plugins=False),
    }
    return dict(as_json(basis))


def paper_basis(paper: Paper, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a paper's notebook, with its plugin's sources, whose version a developer does not raise at each edit.

    Of the claims their ids count: their values and words do not, since rows are judged anew whenever they are read.
    """
    return notebook_basis(paper.notebook_file, parameters) | {
        "plugin": package_digests(paper.folder),
        "claims": sorted(claim.id for claim in paper.everything),
        "tables": _digest([table.model_dump() for table in paper.tables]),
    }


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _places(parameters: Mapping[str, Any], cwd: Path) -> dict[str, str]:
    """The parameters that name a file or a folder, `file.py:function` among them, with the one that they mean."""
    found = {}
    for name, value in parameters.items():
        if isinstance(value, str) and value:
            for text in (value, value.rpartition(":")[0]):
                try:
                    place = cwd / Path(text).expanduser()
                    if text and place.exists():
                        found[name] = str(place.resolve())
                        break
                except (OSError, ValueError):  # a text that no path can be
                    continue
    return found


def standing(record: Mapping[str, Any], basis: Mapping[str, Any], cwd: str = "") -> State:
    """Whether what a record says is finished would come out the same today.

    Args:
        record: as `layerlab.runs.record.read_record` gives it.
        basis: today's, see `notebook_basis`.
        cwd: the folder that the notebook would run in; empty for the present one.
    """
    if not record.get("finished"):
        return State(False)
    before = record.get("basis") or {}
    if not before:
        return State(False, "an older version of layerlab ran it")
    found = [*_differences(before, basis), *usage.changes(record.get("used") or {}, cwd or os.getcwd())]
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        return State(False, "; ".join(found[:NAMED]) + more)
    count = len(before["parameters"])
    compared = f"cells, {count} parameter{'s' * (count != 1)}, versions"
    return State(True, f"{compared}, {usage.counted(record['used'])}" if record.get("used") else compared)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for part, what in (("cells", "the notebook was"), ("tables", "the paper's tables were")):
        if before.get(part) != now.get(part):
            found.append(f"{what} edited")
    for part in ("parameters", "places", "versions"):
        old, new = before.get(part, {}), now.get(part, {})
        found += [f"{name} is {new.get(name, 'left out')}, was {old.get(name, 'left out')}"
                  for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    old, new = before.get("plugin", {}), now.get("plugin", {})
    found += [f"{name} of the plugin was edited" for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    known, wanted = before.get("claims", []), now.get("claims", [])
    found += [f"claim {name} is new" for name in wanted if name not in known]
    return found + [f"claim {name} is gone" for name in known if name not in wanted]
