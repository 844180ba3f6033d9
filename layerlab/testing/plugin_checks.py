"""The checks of what a plugin brings besides its strategy: the paper as data, the notebook, the card."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import re
import unittest
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerlab.base.errors import LayerlabError
from layerlab.contract.claims import PLACEHOLDER, Claim, placeholders
from layerlab.contract.paper import NoPaper, Paper, load_paper
from layerlab.contract.registry import Plugin, strategies

PROFILES = ("quick", "cpu", "paper")
# What a reader of a card looks for: the section → words of its heading, any of which will do.
SECTIONS = {
    "the idea": ("idea",), "the settings": ("settings",), "when to use it": ("when to use",),
    "what it costs": ("cost",), "what was measured": ("measured", "costs"),
    "what was easy and what was difficult": ("difficult", "easy"),
}
_ACCURACY = re.compile(r"top-\d|accuracy|error", re.IGNORECASE)


def paper_complete(plugin: Plugin) -> None:
    """The paper is readable, says who published what and where, and holds no placeholder."""
    paper = _paper(plugin)
    found = placeholders(paper.model_dump(exclude={"folder"}))
    assert not found, f"paper.toml still holds what `layerlab new` wrote ({_few(found)}); put the paper's own there"
    assert paper.claims or paper.targets, "paper.toml has no claims, so that nothing can be reproduced; add one"


def paper_claims(plugin: Plugin) -> None:
    """Each claim that is measured names its null arm, and one of accuracy the gate that shows a trained baseline."""
    measured = [claim for claim in _paper(plugin).everything if not (claim.analytic or claim.by_model)]
    alone = [claim.id for claim in measured if claim.kind != "value" and not claim.null]
    assert not alone, f"{_few(alone)} compares with nothing; name the arm that a user would run today as its `null`"
    open_ = [claim.id for claim in measured if _of_accuracy(claim) and not claim.gates]
    assert not open_, (f"{_few(open_)} would be judged from a baseline that did not train; add a gate, such as "
                       "{ observed = \"baseline top-1\", at_least = 70.0, shows = \"the baseline trains\" }")


def paper_profiles(plugin: Plugin) -> None:
    """There are the profiles quick, cpu and paper, with the same parameters, and the long ones say what they take."""
    profiles = _paper(plugin).profiles
    missing = [name for name in PROFILES if name not in profiles]
    assert not missing, f"paper.toml has no profile {_few(missing)}; add it"
    keys = profiles["quick"].parameters.keys()
    for name, profile in profiles.items():
        others = sorted(keys ^ profile.parameters.keys())
        assert not others, f"profile {name} and quick differ in their parameters ({_few(others)}); give both the same"
    for name in PROFILES[1:]:
        unsaid = sorted({"cores", "memory_gb"} - profiles[name].model_fields_set)
        assert not unsaid, f"profile {name} does not say its {' and '.join(unsaid)}; a batch plans with them"


def notebook_whole(plugin: Plugin) -> None:
    """The notebook takes every parameter, each with a comment, and comes without outputs and placeholders."""
    paper = _paper(plugin)
    cells = _cells(paper.notebook_file)
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    assert len(tagged) == 1, f"the notebook has {len(tagged)} cells tagged `parameters`; it needs one"
    lines = [line for line in _source(tagged[0]).splitlines() if line.strip() and not line.startswith("#")]
    bare = [line.split("=")[0].strip() for line in lines if "#" not in line]
    assert not bare, f"parameter {_few(bare)} has no comment; say what it is in its line"
    names = {line.split("=")[0].strip() for line in lines}
    others = sorted(names ^ {"profile", "output", *paper.profile("quick").parameters})
    assert not others, f"the notebook's parameters and the profile's differ in {_few(others)}; give both the same"
    outputs = [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    assert not outputs, "the notebook holds outputs; clear them, since a reader cannot tell which run they are of"
    marked = [_line_of(_source(cell)) for cell in cells if PLACEHOLDER in _source(cell)]
    assert not marked, f"the notebook still holds what `layerlab new` wrote ({_few(marked)}); tell the paper's story"


def card_whole(plugin: Plugin) -> None:
    """The card tells the idea, settings, use, cost, measurements and what was difficult, without placeholders."""
    text = _card(plugin)
    marked = [_line_of(part) for part in text.split("\n\n") if PLACEHOLDER in part]
    assert not marked, f"the card still holds what `layerlab new` wrote ({_few(marked)}); write the method's own"
    sections = _sections(text)
    for what, words in SECTIONS.items():
        bodies = [body for heading, body in sections.items() if any(word in heading.lower() for word in words)]
        assert bodies, f"the card has no section on {what}; add one to README.md"
        assert any(body.strip() for body in bodies), f"the card's section on {what} is empty; fill it in"


def card_settings(plugin: Plugin) -> None:
    """The card names every setting."""
    text = _card(plugin)
    missing = [name for name in plugin.load().model_fields if f"`{name}" not in text and f"{name}=" not in text]
    assert not missing, f"the card does not name the setting {_few(missing)}; say what it does"


def strategy_described(plugin: Plugin) -> None:
    """The class says what the method does, and each setting what it is."""
    kind = plugin.load()
    text = inspect.getdoc(kind) or ""
    assert PLACEHOLDER not in text, f"the docstring of {kind.__name__} still holds what `layerlab new` wrote; write it"
    bare = [name for name, field in kind.model_fields.items() if not field.description]
    assert not bare, f"setting {_few(bare)} has no docstring, which `layerlab describe` would show; add one below it"


PLUGIN_CHECKS: dict[str, Callable[[Plugin], None]] = {
    check.__name__: check
    for check in (strategy_described, paper_complete, paper_claims, paper_profiles, notebook_whole, card_whole,
                  card_settings)
}


def check_plugin(name: str, callback: Callable[[dict[str, Any]], None] | None = None) -> list[dict[str, Any]]:
    """Check what an installed plugin brings besides its strategy: paper, notebook and card.

    Args:
        name: of the strategy.
        callback: called with each check's dict as soon as it is there.

    Returns:
        Dicts as `check_strategy` gives them; without a `paper.toml`, or a card, the checks of it are skipped.

    Raises:
        LayerlabError: no such strategy.
    """
    plugin = strategies[name]
    results = []
    for check_name, check in PLUGIN_CHECKS.items():
        result: dict[str, Any] = {
            "strategy": None, "check_name": check_name, "exception": None, "status": "passed",
            "expected_to_fail": False, "expected_to_fail_reason": None}
        try:
            check(plugin)
        except unittest.SkipTest as skipped:
            result |= {"status": "skipped", "exception": skipped}
        except (AssertionError, LayerlabError) as error:
            result |= {"status": "failed", "exception": error}
        results.append(result)
        if callback is not None:
            callback(result)
    return results


def badge(results: list[dict[str, Any]]) -> str:
    """The Markdown line for a plugin's card that says how many checks hold, under which layerlab.

    Args:
        results: of all checks, none of which failed.
    """
    held = sum(result["status"] in ("passed", "xfail") for result in results)
    known = sum(result["status"] == "xfail" for result in results)
    said = f"{held - known} checks hold" + (f", {known} known" if known else "")
    name = f"layerlab {importlib.metadata.version('layerlab')}"
    label = name.replace("-", "--").replace(" ", "_")
    message = said.replace(" ", "_").replace(",", "%2C")
    return f"![{name}: {said}](https://img.shields.io/badge/{label}-{message}-2ea44f)"


def _paper(plugin: Plugin) -> Paper:
    """The plugin's paper.

    Raises:
        SkipTest: it has none.
        LayerlabError: it cannot be read.
    """
    try:
        return load_paper(plugin)
    except NoPaper:
        raise unittest.SkipTest("the plugin brings no paper.toml") from None


def _of_accuracy(claim: Claim) -> bool:
    return claim.kind != "value" and (claim.unit == "points" or _ACCURACY.search(claim.statement) is not None)


def _cells(notebook: Path) -> list[dict[str, Any]]:
    """A notebook's cells.

    Raises:
        LayerlabError: it is none.
    """
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LayerlabError(f"{notebook} is no notebook ({error}); write it anew.") from None


def _source(cell: Mapping[str, Any]) -> str:
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def _card(plugin: Plugin) -> str:
    """The card: README.md of the distribution's folder, or as its wheel carries it.

    Raises:
        SkipTest: there is none.
    """
    package = plugin.target.partition(":")[0].partition(".")[0]
    found = importlib.util.find_spec(package)
    for folder in found.submodule_search_locations or () if found else ():
        for file in (Path(folder).parent / "README.md", Path(folder).parents[1] / "README.md"):
            # Of an editable installation; in site-packages there is no README of anybody's.
            if file.is_file() and (file.parent / "pyproject.toml").is_file():
                return file.read_text(encoding="utf-8")
    try:
        text = str(importlib.metadata.metadata(plugin.distribution).json.get("description", ""))
    except importlib.metadata.PackageNotFoundError:
        text = ""
    if not text.strip():
        raise unittest.SkipTest("the distribution carries no README.md (readme in pyproject.toml)")
    return text


def _sections(text: str) -> dict[str, str]:
    """Heading → what stands below it, of a page in Markdown; headings in code are none."""
    plain = re.sub(r"^```.*?^```", lambda block: block[0].replace("#", " "), text, flags=re.M | re.S)
    parts = re.split(r"^#+ (.*)$", plain, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _line_of(text: str) -> str:
    """The first line with a placeholder, shortened."""
    line = next(line for line in text.splitlines() if PLACEHOLDER in line).strip()
    return line if len(line) <= 50 else f"{line[:49]}…"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
