"""The picture of the house in DESIGN.md, held against the imports: rooms, one direction, no circle, public names."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "layerlab"
# The floors from top to bottom; rooms of one floor do not import each other.
FLOORS = (
    ("cli",), ("reporting",), ("runs", "testing"), ("training",), ("measure",), ("contract", "workload"), ("show",),
    ("base",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_FILE = 500
LONGEST_FUNCTION = 60
# Public modules besides `layerlab` itself, from which others import names.
OPEN = ("layerlab", "layerlab.measure", "layerlab.testing")


def core_files() -> list[Path]:
    return sorted(file for file in CORE.rglob("*.py") if "my-method" not in file.parts)


def outside_sources() -> list[tuple[str, str]]:
    """(name, source) of what uses layerlab from outside: plugins, benchmarks, the scaffold, notebooks' code."""
    files = [*ROOT.glob("plugins/*/layerlab_*/**/*.py"), *ROOT.glob("benchmarks/*.py"),
             *CORE.glob("cli/scaffold/my-method/**/*.py")]
    found = [(str(file.relative_to(ROOT)), file.read_text()) for file in sorted(files)]
    for file in sorted([*ROOT.glob("notebooks/*.ipynb"), *CORE.glob("cli/scaffold/my-method/**/*.ipynb")]):
        cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
        found += [(f"{file.relative_to(ROOT)}, cell {number}", "".join(cell["source"]))
                  for number, cell in enumerate(cells)]
    return found


def imported_modules(source: str, package: str = "") -> Iterator[tuple[str, str]]:
    """(module, name) of every import of layerlab in a source, wherever in it; the name is empty for `import module`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((each.name, "") for each in names if each.name.split(".")[0] == "layerlab")
            case ast.ImportFrom(module=module, names=names, level=level):
                base = ".".join(package.split(".")[: len(package.split(".")) - level + 1]) if level else ""
                whole = ".".join(part for part in (base, module) if part)
                if whole.split(".")[0] == "layerlab":
                    yield from ((whole, each.name) for each in names)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def arrows() -> dict[str, set[str]]:
    """Module of the core → the modules of the core that it imports."""
    known = {module_name(file) for file in core_files()}
    found: dict[str, set[str]] = {}
    for file in core_files():
        own = module_name(file)
        package = own if file.name == "__init__.py" else own.rpartition(".")[0]
        targets = {f"{module}.{name}" if f"{module}.{name}" in known else module
                   for module, name in imported_modules(file.read_text(), package)}
        found[own] = targets - {own}
    return found


def test_every_file_of_the_core_stands_in_a_room_with_a_floor():
    rooms = {file.relative_to(CORE).parts[0] for file in core_files()} - {"__init__.py"}
    assert rooms == set(FLOOR)


def test_the_core_imports_downwards_only():
    wrong = []
    for module, targets in arrows().items():
        if module == "layerlab":
            continue
        room = module.split(".")[1]
        for target in targets:
            to = target.split(".")[1] if "." in target else "layerlab"
            if to != room and (to == "layerlab" or FLOOR[to] <= FLOOR[room]):
                wrong.append(f"{module} → {target}")
    assert wrong == []


def test_no_module_of_the_core_imports_itself_in_a_circle():
    graph = {module: {target for target in targets if target != "layerlab"} for module, targets in arrows().items()}
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        if module in above:
            pytest.fail("a circle: " + " → ".join((*above[above.index(module):], module)))
        if module in finished:
            return
        for target in sorted(graph.get(module, ())):
            visit(target, (*above, module))
        finished.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_nobody_outside_takes_what_is_not_public():
    public = {module: set(importlib.import_module(module).__all__) | {"", "__version__"} for module in OPEN}
    wrong = []
    for name, source in outside_sources():
        source = "\n".join(line for line in source.split("\n") if not line.lstrip().startswith(("%", "!")))
        for module, taken in imported_modules(source):
            if taken not in public.get(module, ()):
                wrong.append(f"{name}: {module} {taken}")
    assert wrong == []


def test_no_private_name_is_taken_across_modules():
    wrong = [
        f"{file.relative_to(ROOT)}: {module} {name}"
        for file in core_files()
        for module, name in imported_modules(file.read_text())
        if name.startswith("_") and not name.startswith("__")
    ]
    assert wrong == []


def functions(file: Path) -> Iterator[tuple[str, int, str]]:
    """(name, lines, source) of every function in a file."""
    text = file.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1, "\n".join(lines[node.lineno - 1:node.end_lineno])


def code_files() -> list[Path]:
    return core_files() + sorted(ROOT.glob("plugins/*/layerlab_*/**/*.py"))


def test_files_and_functions_stay_short():
    wrong = []
    for file in code_files():
        lines = file.read_text().count("\n")
        if lines > LONGEST_FILE:
            wrong.append(f"{file.relative_to(ROOT)}: {lines} lines")
        for name, length, source in functions(file):
            if length > LONGEST_FUNCTION and "# Long because " not in source:
                wrong.append(f"{file.relative_to(ROOT)}: {name}, {length} lines")
    assert wrong == []


def test_every_plugin_has_the_same_files():
    wrong = []
    packages = [file.parent for file in ROOT.glob("plugins/*/layerlab_*/__init__.py")]
    for folder in [*packages, CORE / "cli/scaffold/my-method/layerlab_my_method"]:
        files = {file.name for file in folder.iterdir() if file.name not in ("__pycache__", "method")}
        allowed = {"__init__.py", "strategy.py", "analysis.py", "pictures.py", "paper.toml", "py.typed"}
        needed = {"__init__.py", "strategy.py", "analysis.py", "paper.toml"}
        if extra := files - allowed - {"notebook.ipynb"}:
            wrong.append(f"{folder.name}: {sorted(extra)} belong under method/")
        if missing := needed - files:
            wrong.append(f"{folder.name}: lacks {sorted(missing)}")
    assert wrong == []


def test_a_plugin_s_notebook_is_a_link_to_the_one_in_notebooks():
    for link in ROOT.glob("plugins/*/layerlab_*/notebook.ipynb"):
        assert link.is_symlink(), f"{link} is a copy, which would not follow changes"
        assert link.resolve().parent == ROOT / "notebooks"
