"""Write docs/contract.md, the contract of a strategy, from the docstrings: `make docs`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import layerlab
from layerlab import Batches, Preflight, Replaced, Run, Strategy, Wire
from layerlab.contract import strategy
from layerlab.contract.headline import Headline
from layerlab.contract.strategy import check_composition
from layerlab.testing import CHECKS

PAGE = Path(__file__).parent / "contract.md"
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$")
ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \w+)*)(?: \(.*?\))?: (.*)$")
INTRODUCTION = f"""\
<!-- Made by `make docs` from the docstrings of layerlab; change those. -->
# The contract of a strategy

{inspect.getdoc(strategy)}

A plugin needs nothing but the names on this page, the [public names](#public-names) among them. From a paper to a
plugin in an hour: [plugins/README.md](../plugins/README.md). `layerlab check NAME` says whether a strategy keeps the
contract.
"""


def page() -> str:
    """The page."""
    parts = [INTRODUCTION, "## Strategy", described(Strategy)]
    parts += ["### Class attributes", attributes(Strategy)]
    parts += ["### Hooks, in the order in which `fit` calls them", *(hook(name) for name in methods(Strategy, "on_"))]
    others = [name for name in methods(Strategy) if not name.startswith("on_")]
    parts += ["### What else a strategy may define or use", *(hook(name) for name in others)]
    parts += ["## Run", described(Run), *(member(Run, name) for name in methods(Run))]
    for kind in (Replaced, Batches, Wire, Preflight):
        parts += [f"## {kind.__name__}", described(kind), *(member(kind, name) for name in methods(kind))]
    parts += ["## The headline", described(Headline)]
    parts += ["## Which strategies run together", text(check_composition)]
    parts += ["## The checks of the contract", "Run by `layerlab.testing.check_strategy` and `layerlab check NAME`."]
    parts.append("\n".join(["| check | what it holds a strategy to |", "| --- | --- |",
                            *(f"| `{name}` | {cell(summary(check))} |" for name, check in CHECKS.items())]))
    parts += ["## Public names", "Imported from `layerlab`; `help(layerlab.fit)` and so on says the rest."]
    parts.append("\n".join(["| name | what it is |", "| --- | --- |",
                            *(f"| `{name}` | {cell(public(name))} |" for name in layerlab.__all__)]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def methods(kind: type, prefix: str = "") -> list[str]:
    """Names of a class's own public methods and properties, in the order of their definition."""
    return [name for name, value in vars(kind).items()
            if name.startswith(prefix) and not name.startswith(("_", "model_"))
            and (inspect.isfunction(value) or isinstance(value, (property, classmethod)))] + (
        ["__len__"] if not prefix and "__len__" in vars(kind) else [])


def attributes(kind: type) -> str:
    """A class's public class variables with their defaults."""
    names = [name for name in kind.__annotations__ if not name.startswith(("_", "model_"))]
    values = [(name, kind.__annotations__[name], getattr(kind, name)) for name in names if hasattr(kind, name)]
    return "\n".join(f"- `{name}: {annotation} = {value!r}`" for name, annotation, value in values)


def hook(name: str) -> str:
    """A method of Strategy."""
    return member(Strategy, name, "####")


def member(kind: type, name: str, heading: str = "###") -> str:
    """A method or a property: signature and text."""
    value = inspect.getattr_static(kind, name)
    if isinstance(value, property):
        return f"{heading} `{name}`\n\n{text(value)}"
    function: Callable[..., Any] = value.__func__ if isinstance(value, classmethod) else value
    signature = str(inspect.signature(function)).replace("'", "")
    signature = re.sub(r"^\((self|cls)(, )?", "(", signature)
    return f"{heading} `{name}{signature}`\n\n{text(function)}"


def described(kind: type) -> str:
    """A class's own docstring."""
    return text(kind)


def summary(what: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(what) or "").partition("\n\n")[0].split())


def public(name: str) -> str:
    """What a public name is, in a line."""
    value = getattr(layerlab, name)
    if isinstance(value, ModuleType) or inspect.isclass(value) or inspect.isfunction(value):
        return summary(value)
    return f"{summary(type(value))} `{name}(\"lars-skip\", alpha=2)` makes a strategy."


def cell(sentence: str) -> str:
    """Text for a cell of a table."""
    return sentence.replace("|", "\\|")


def text(what: Any) -> str:
    """A docstring as Markdown: its sections become lists."""
    lines = (inspect.getdoc(what) or "").splitlines()
    out: list[str] = []
    section = ""
    for line in lines:
        head = SECTION.match(line)
        if head:
            section = head[1]
            out += [f"**{section}**", ""]
        elif section and line.startswith("    "):
            entry = ENTRY.match(line.strip()) if not line.startswith("     ") and section != "Returns" else None
            if entry:
                out.append("- " + ", ".join(f"`{part}`" for part in entry[1].split(", ")) + f": {entry[2]}")
            elif section == "Returns":
                out.append(line.strip())
            else:
                out.append("  " + line.strip())
        else:
            section = section if not line.strip() else ""
            out.append(line)
    return "\n".join(out)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
