"""Notebooks as people have them: read whatever their version, their parameters, the kernel that runs them."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from layerlab.base.errors import LayerlabError, unknown

# Tag of the cell that holds the parameters, as papermill has it.
TAG = "parameters"
# The kernel of this Python, which Jupyter has wherever ipykernel is installed.
OWN_KERNEL = "python3"


def read_notebook(file: Path) -> dict[str, Any]:
    """A notebook's content in nbformat 4, whatever version of the format its file has.

    Args:
        file: UTF-8, with a byte-order mark or without.

    Raises:
        LayerlabError: there is no such file, or it is no notebook.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = json.loads(text)
        if content["nbformat"] != 4:
            import nbformat

            content = nbformat.reads(text, as_version=4)
        for cell in content["cells"]:
            # A list of lines in files, a text elsewhere.
            cell["source"] = "".join(cell["source"])
            cell["cell_type"] = str(cell["cell_type"])
            cell["metadata"] = dict(cell["metadata"])
        if not isinstance(content["metadata"], Mapping):
            raise TypeError("its metadata are no mapping")
    except UnicodeDecodeError as error:
        raise LayerlabError(
            f"{file} is no notebook that can be read ({error}); save it as UTF-8."
        ) from None
    except FileNotFoundError:
        raise LayerlabError(f"There is no notebook {file}; check the path.") from None
    except Exception as error:  # whatever nbformat and JSON raise on what is no notebook
        raise LayerlabError(f"{file} is no notebook that can be read ({_why(error)}); check the file.") from None
    return content


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    return " ".join(str(error).split()) or type(error).__name__


def parameter_cells(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The code cells that are tagged `parameters`; papermill takes the first and calls it the one."""
    return [cell for cell in content["cells"]
            if cell["cell_type"] == "code" and TAG in (cell["metadata"].get("tags") or ())]


def parameter_names(content: Mapping[str, Any]) -> list[str]:
    """Names of the parameters of a notebook: what its cells tagged `parameters` assign, with annotations or without.

    Example:
        >>> from layerlab.runs.notebook_file import parameter_names
        >>> source = "first, second = 1, 2\\nepochs: int | None = 3  # or fewer"
        >>> cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
        >>> parameter_names({"metadata": {}, "cells": [cell]})
        ['first', 'second', 'epochs']
    """
    names: dict[str, None] = {}
    for cell in parameter_cells(content):
        names |= dict.fromkeys(_assigned(cell["source"], _is_python(content)))
    return list(names)


def _assigned(source: str, python: bool) -> list[str]:
    if python:
        with contextlib.suppress(SyntaxError, ValueError):
            return list(_targets(ast.parse(_without_magics(source)).body))
    # What stands before an equals sign or R's arrow at the beginning of a line.
    return re.findall(r"(?m)^([^\W\d]\w*)\s*(?:=(?!=)|<-)", source)


def _is_python(content: Mapping[str, Any]) -> bool:
    return _language(content).lower() in ("python", "ipython")


def _language(content: Mapping[str, Any]) -> str:
    """The language that a notebook says it is written in; Python where it says none."""
    spec, info = (_mapping(content["metadata"].get(name)) for name in ("kernelspec", "language_info"))
    return str(spec.get("language") or info.get("name") or "python")


def _without_magics(source: str) -> str:
    """The Python of a cell: IPython's commands, which begin a line with % or !, are blanked out."""
    return re.sub(r"(?m)^\s*[%!].*$", "", source)


def _targets(statements: Sequence[ast.stmt]) -> Iterator[str]:
    """The names that statements assign, those in branches too, in their order."""
    for statement in statements:
        match statement:
            case ast.Assign(targets=targets):
                for target in targets:
                    yield from _names(target)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                yield from _names(target)
            case ast.If() | ast.For() | ast.While() | ast.With() | ast.Try():
                for part in ("body", "orelse", "finalbody"):
                    yield from _targets(getattr(statement, part, []))
                for handler in getattr(statement, "handlers", []):
                    yield from _targets(handler.body)


def _names(target: ast.expr) -> Iterator[str]:
    match target:
        case ast.Name(id=name):
            yield name
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            for element in elements:
                yield from _names(element)
        case ast.Starred(value=value):
            yield from _names(value)


def check_parameters(file: Path, content: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse parameters that would not arrive.

    Raises:
        LayerlabError: no such parameter, no cell that is tagged `parameters`, or two of them.
    """
    if not given:
        return
    cells, known = parameter_cells(content), parameter_names(content)
    if not cells:
        raise LayerlabError(
            f"{file.name} has no code cell tagged `parameters`, so it takes no {next(iter(given))!r}; add that tag to "
            "the cell that sets it (in JupyterLab: the gears at the top right)."
        )
    for name in given:
        if name not in known:
            raise unknown(f"parameter of {file.name}", name, known)
    if len(cells) > 1:
        # What is given is put behind the first, and the second would set its own value again.
        raise LayerlabError(f"{file.name} has {len(cells)} cells tagged `parameters`; merge them into one.")


class Kernel(NamedTuple):
    """What runs a notebook.

    Attributes:
        name: as Jupyter knows it.
        notice: why it is not the one that the notebook names; otherwise empty.
    """

    name: str
    notice: str = ""


def kernel_for(file: Path, content: Mapping[str, Any], wanted: str = "") -> Kernel:
    """The kernel that runs a notebook: the one that is wanted, the one that it names, or this Python.

    Args:
        file: the notebook's, for the sentence.
        content: see `read_notebook`.
        wanted: what a person asked for; empty for what the notebook names.

    Raises:
        LayerlabError: no such kernel is installed, and the notebook is not Python's or the kernel was asked for.
    """
    from jupyter_client.kernelspec import KernelSpecManager

    known = KernelSpecManager().find_kernel_specs()
    if wanted:
        if wanted not in known:
            raise unknown("kernel", wanted, known, "`jupyter kernelspec list` shows where they lie.")
        return Kernel(wanted)
    named = str(_mapping(content["metadata"].get("kernelspec")).get("name") or "")
    if named in known:
        return Kernel(named)
    if not _is_python(content):
        raise LayerlabError(
            f"{file.name} is written in {_language(content)}, and its kernel {named!r} is not installed here; install "
            "it, or choose another one with --kernel."
        )
    if not named:
        return Kernel(OWN_KERNEL)
    return Kernel(OWN_KERNEL, f"The kernel {named!r} of {file.name} is not installed here; this Python runs it.")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def prepared(content: Mapping[str, Any], kernel: str, source: Path) -> dict[str, Any]:
    """What papermill is given: the notebook for a kernel, with at most one cell that parameters are put behind.

    Args:
        content: see `read_notebook`.
        kernel: name of an installed one.
        source: the notebook's file, which papermill notes in what it executes.
    """
    metadata = {**content["metadata"]}
    spec, info = (_mapping(metadata.get(name)) for name in ("kernelspec", "language_info"))
    language = _language(content)
    if spec.get("name") != kernel:
        spec = {"name": kernel, "display_name": kernel}
    metadata["kernelspec"] = {"display_name": kernel, **spec, "language": language}
    metadata["language_info"] = {"name": language, **info}
    # The names of widgets without their state, as an interrupted session leaves them, are no valid metadata.
    metadata.pop("widgets", None)
    metadata["layerlab"] = {"source": str(source)}
    cells = []
    for cell in content["cells"]:
        tags = list(cell["metadata"].get("tags") or ())
        if cell["cell_type"] != "code":
            tags = [tag for tag in tags if tag != TAG]
        cells.append({**cell, "metadata": {**cell["metadata"], "tags": tags}})
    return {**content, "metadata": metadata, "cells": cells}
