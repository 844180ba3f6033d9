"""The pages for authors say what the code says, and their commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from helpers import slow

import layerlab
from layerlab import Run, Strategy
from layerlab.cli.main import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contract", ROOT / "docs" / "contract.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_contract_s_page_is_what_the_docstrings_say(generator):
    assert generator.PAGE.read_text() == generator.page(), "docs/contract.md is out of date; run `make docs`"


def test_the_page_has_every_hook_attribute_and_public_name(generator):
    text = generator.PAGE.read_text()
    hooks = [name for name in vars(Strategy) if name.startswith("on_")]
    assert len(hooks) >= 7
    for name in (*hooks, "training_step", "state_dict", "load_state_dict", "example_network"):
        assert f"#### `{name}(" in text, name
    for name in Run.__dataclass_fields__:
        if not name.startswith("_"):
            assert re.search(rf"^- (`\w+`, )*`{name}`", text, re.M), name
    for name in layerlab.__all__:
        assert re.search(rf"^\| `{name}` \| \w.* \|$", text, re.M), name


@pytest.mark.parametrize("page", ["README.md", "plugins/README.md"])
def test_the_commands_of_a_page_exist(page):
    commands = set(re.findall(r"^(?:\.venv/bin/)?layerlab (\w+)", (ROOT / page).read_text(), re.M))
    assert commands >= {"new", "check", "reproduce"}
    assert commands <= set(main.commands)


@pytest.mark.parametrize("page", ["plugins/README.md", "docs/contract.md"])
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert links
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize("page", ["plugins/README.md"])
def test_the_strategies_of_a_page_run(page, digits, residual):
    """Every Python block, one after the other, with a network and data of the reader's."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    names = {"data": digits, "network": residual}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@slow
def test_the_python_of_the_front_page_works_when_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(from layerlab .*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_new_is_explained_by_the_command_line():
    text = CliRunner().invoke(main, ["new", "--help"]).output
    assert "--title" in text
    assert "--folder" in text
