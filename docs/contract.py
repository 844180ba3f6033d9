"""Write the contract of a strategy and the list of public names from the docstrings: `make docs`."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import layerlab
from layerlab import Batches, Preflight, Replaced, Run, Strategy, Wire
from layerlab.contract import strategy
from layerlab.contract.headings import Heading
from layerlab.contract.headline import Headline
from layerlab.contract.strategy import check_composition
from layerlab.testing import CHECKS

sys.path.insert(0, str(Path(__file__).parent))
from comments import comment_above

PAGE = Path(__file__).parent / "contract.md"
REFERENCE = Path(__file__).parent / "reference"
NAMES = REFERENCE / "index.md"
LINKS = Path(__file__).parent / "links.txt"
ROOT = Path(__file__).parents[1]
ADDRESS = re.compile(r"\]\((\w+://[^)\s]+)\)")
# Characters of a signature that stands in one line.
WIDTH = 88
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$")
ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \w+)*)(?: \(.*?\))?: (.*)$")
# An example of a docstring, up to the next blank line.
EXAMPLE = re.compile(r"^>>> .*\n(?:.+\n?)*", re.M)
INTRODUCTION = f"""\
<!-- Made by `make docs` from the docstrings of layerlab; change those. -->
# The contract of a strategy

{inspect.getdoc(strategy)}

Start with [From paper to plugin in an hour](../plugins/README.md). A plugin needs nothing but the names on this page
and the other [public names](reference/index.md). `layerlab check NAME` says whether a strategy keeps the contract.
"""
OVERVIEW = """\
<!-- Made by `make docs` from the docstrings of layerlab; change those. -->
# Reference

Import each of these names from `layerlab`. Two modules are public besides: [layerlab.measure](measure.md) and
[layerlab.testing](testing.md).
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
    parts += ["## Headings of a page's tables", described(Heading)]
    parts += ["## Which strategies run together", text(check_composition)]
    parts += ["## The checks of the contract", "Run by `layerlab.testing.check_strategy` and `layerlab check NAME`."]
    parts.append("\n".join(["| check | what it holds a strategy to |", "| --- | --- |",
                            *(f"| `{name}` | {cell(summary(check))} |" for name, check in CHECKS.items())]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def names_page() -> str:
    """The list of public names, each with a link to where it is described."""
    contract = page()
    rows = [f"| [`{name}`]({place(name, contract)}) | {cell(public(name))} |" for name in layerlab.__all__]
    return "\n".join([OVERVIEW, "| name | what it is |", "| --- | --- |", *rows]) + "\n"


def place(name: str, contract: str) -> str:
    """The link from the list to the one page that describes a public name.

    Raises:
        ValueError: no page of the reference describes it, or several do.
    """
    places = ["../contract.md#" + name.lower()] if f"\n## {name}\n" in contract else []
    places += [f"{file.name}#layerlab.{name}" for file in sorted(REFERENCE.glob("*.md"))
               if re.search(rf"^::: layerlab\.{name}$", file.read_text(encoding="utf-8"), re.M)]
    if len(places) != 1:
        raise ValueError(f"describe `{name}` once in docs/reference, by `::: layerlab.{name}`; found: {places}")
    return places[0]


def links_list() -> str:
    """Every address elsewhere that a page written by people links to, one a line."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/**/README.md"),
             *ROOT.glob("tests/outside/*/README.md")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    return "\n".join(sorted({link for text in texts for link in ADDRESS.findall(text)})) + "\n"


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
    """A method or a property: its name, its signature and its text."""
    value = inspect.getattr_static(kind, name)
    if isinstance(value, property):
        return f"{heading} {name}\n\n{text(value)}"
    function: Callable[..., Any] = value.__func__ if isinstance(value, classmethod) else value
    return f"{heading} {escaped(name)}\n\n```python\n{definition(function)}\n```\n\n{text(function)}"


def escaped(name: str) -> str:
    """A name as Markdown."""
    return name.replace("__", r"\_\_")


def definition(function: Callable[..., Any]) -> str:
    """The `def` line of a function, broken after each argument where it is long; it compiles as it stands."""
    signature = inspect.signature(function)
    arguments: list[str] = []
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        # Annotations are texts here, so only defaults keep their quotes.
        annotation = "" if each.annotation is each.empty else f": {each.annotation}"
        default = "" if each.default is each.empty else f" = {each.default!r}"
        arguments.append(f"{each.name}{annotation}{default}")
    start, end = f"def {function.__name__}(", f") -> {signature.return_annotation}: ..."
    line = f"{start}{', '.join(arguments)}{end}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([start, *(f"    {each}," for each in arguments), end])


def described(kind: type) -> str:
    """A class's own docstring."""
    return text(kind)


def summary(what: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(what) or "").partition("\n\n")[0].split())


def public(name: str) -> str:
    """What a public name is, in a line."""
    value = getattr(layerlab, name)
    if isinstance(value, (ModuleType, FunctionType, type)):
        return summary(value)
    return assigned(name)


def assigned(name: str) -> str:
    """What the comment above a public name's assignment says of it.

    Raises:
        ValueError: there is none.
    """
    tree = ast.parse(Path(layerlab.__file__).read_text(encoding="utf-8"))
    (module,) = [node.module for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom) and name in [each.name for each in node.names]]
    source = inspect.getsource(sys.modules[str(module)])
    for node in ast.parse(source).body:
        named = isinstance(node, ast.Assign) and name in [ast.unparse(target) for target in node.targets]
        if named and (comment := comment_above(source, node.lineno)):
            return comment
    raise ValueError(f"`{name}` has no comment above its assignment in {module}")


def cell(sentence: str) -> str:
    """Text for a cell of a table."""
    return sentence.replace("|", "\\|")


def text(what: Any) -> str:
    """A docstring as Markdown: its sections become lists, its example a block of code."""
    lines = (inspect.getdoc(what) or "").splitlines()
    out: list[str] = []
    section = ""
    for line in lines:
        head = SECTION.match(line)
        if head:
            section = head[1]
            out += [f"**{section}**", ""]
        elif section == "Example":
            out.append(line.removeprefix("    "))
        elif section and line.startswith("    "):
            out.append(listed(line, section))
        else:
            section = section if not line.strip() else ""
            out.append(line)
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", "\n".join(out))


def listed(line: str, section: str) -> str:
    """A line of a docstring's section as one of a list."""
    if section == "Returns":
        return line.strip()
    entry = ENTRY.match(line.strip()) if not line.startswith("     ") else None
    if entry:
        return "- " + ", ".join(f"`{part}`" for part in entry[1].split(", ")) + f": {entry[2]}"
    return "  " + line.strip()


if __name__ == "__main__":
    for file, written in ((PAGE, page()), (NAMES, names_page()), (LINKS, links_list())):
        file.write_text(written, encoding="utf-8")
        print(file)
