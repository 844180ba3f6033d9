"""What every installed plugin must do, whoever wrote it."""

from __future__ import annotations

import json

import pytest
from helpers import run_check

from layerlab import load_paper, strategies
from layerlab.testing import parametrize_with_checks

NAMES = [plugin.name for plugin in strategies.every()]


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_is_complete(name):
    paper = load_paper(name)
    assert {"quick", "cpu", "paper"} <= paper.profiles.keys()
    assert len({claim.id for claim in paper.claims}) == len(paper.claims) > 0
    keys = [set(profile.parameters) for profile in paper.profiles.values()]
    assert all(each == keys[0] for each in keys)


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_takes_every_parameter_with_a_comment_and_has_no_outputs(name):
    paper = load_paper(name)
    cells = json.loads(paper.notebook_file.read_text())["cells"]
    (parameters,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    lines = [line for line in "".join(parameters["source"]).splitlines() if line and not line.startswith("#")]
    assert all("  # " in line for line in lines)
    assert {line.split(" = ")[0] for line in lines} == {"profile", "output", *paper.profile("quick").parameters}
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@parametrize_with_checks([plugin.load() for plugin in strategies.every()])
def test_the_strategy_keeps_the_contract(strategy, check):
    run_check(strategy, check)
