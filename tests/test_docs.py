"""The pages for authors say what the code says, and their commands exist."""

from __future__ import annotations
import __future__

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import tomllib
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from click.testing import CliRunner
from commands import commands, wrong
from pages import PUBLISHED, ROOT, WRITTEN, anchors, blocks, inline, links, written_blocks
from ruamel.yaml import YAML
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import layerlab
from layerlab import Run, Strategy, build_model, load_dataset
from layerlab.cli.main import main

# Annotations of the contract's definitions are for readers.
FLAGS = __future__.annotations.compiler_flag
# Packages that pages import and nobody installs.
OUTSIDE = (ROOT / "layerlab/cli/scaffold/my-method", ROOT / "tests/outside/freezeout")
# An address that GitHub resolves from the front page: a workflow and its badge.
WORKFLOW = re.compile(r"^\.\./\.\./actions/workflows/")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contract", ROOT / "docs" / "contract.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_made_from_docstrings_say_what_those_say(generator):
    assert generator.PAGE.read_text() == generator.page(), "docs/contract.md is out of date; run `make docs`"
    names = generator.names_page()
    assert generator.NAMES.read_text() == names, "docs/reference/index.md is out of date; run `make docs`"
    for name in layerlab.__all__:
        assert re.search(rf"^\| \[`{name}`\]\(\S+\) \| \w.* \|$", names, re.M), name


def test_the_contract_has_every_hook_and_attribute(generator):
    text = generator.PAGE.read_text()
    hooks = [name for name in vars(Strategy) if name.startswith("on_")]
    assert len(hooks) >= 7
    for name in (*hooks, "training_step", "state_dict", "load_state_dict", "example_network"):
        assert f"#### {name}\n\n```python\ndef {name}(" in text, name
    for name in Run.__dataclass_fields__:
        if not name.startswith("_"):
            assert re.search(rf"^- (`\w+`, )*`{name}`", text, re.M), name


@pytest.mark.parametrize("page", ["README.md", "plugins/README.md"])
def test_a_page_says_how_to_begin(page):
    names = {command[1] for block in blocks(page) if block.language == "sh" for command in commands(block.text)
             if command[0] == "layerlab"}
    assert names >= {"README.md": {"list", "describe", "reproduce"}, "plugins/README.md": {"new", "check"}}[page]


# Letters of code in a page's column, on the site and on GitHub: what is behind them has to be scrolled to.
WIDTH = 90


@pytest.mark.parametrize("page", [page for page in WRITTEN if page != "docs/contract.md"])
def test_code_is_no_wider_than_its_column(page):
    for block in blocks(page):
        if block.language in ("python", "sh", "yaml"):
            assert [line for line in block.text.splitlines() if len(line) > WIDTH] == [], str(block)


def test_each_page_of_the_folder_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in menu, page


@pytest.mark.parametrize("page", [*WRITTEN, *PUBLISHED])
def test_what_a_page_links_to_is_there(page):
    wrong = []
    for link in links(page):
        path, _, name = link.partition("#")
        if WORKFLOW.match(link):
            path = f"{'../' * page.count('/')}.github/workflows/{WORKFLOW.sub('', path).partition('/')[0]}"
        elif ":" in path:
            continue
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not (file.is_file() and file.is_relative_to(ROOT)):
            wrong.append(link)
        elif name and name not in anchors(str(file.relative_to(ROOT))):
            wrong.append(f"{link}: no such heading")
    assert wrong == []


def test_addresses_elsewhere_are_listed_in_one_place(generator):
    """There is no network here. With one: `xargs -n 1 curl -sSfLo /dev/null < docs/links.txt`."""
    assert generator.LINKS.read_text() == generator.links_list(), "docs/links.txt is out of date; run `make docs`"
    for link in generator.LINKS.read_text().split():
        address = urlsplit(link)
        assert address.scheme == "https", link
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", address.netloc), link


def test_each_block_of_code_says_what_it_is():
    known = {"python", "pycon", "sh", "yaml", "toml", "json", "text"}
    assert [str(block) for page in WRITTEN for block in blocks(page) if block.language not in known] == []


@pytest.mark.parametrize("block", written_blocks("sh"), ids=str)
def test_the_commands_of_a_block_exist_with_their_options(block):
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [sentence for command in commands(block.text) if (sentence := wrong(command))] == []


@pytest.mark.parametrize("page", WRITTEN)
def test_the_commands_in_a_page_s_sentences_exist_with_their_options(page):
    spans = [token.content.replace("…", "NAME") for token in inline(page, "code_inline")]
    found = [command for span in spans if re.match(r"(layerlab|make|pip|python|papermill) ", span)
             for command in commands(span)]
    assert [sentence for command in found if (sentence := wrong(command))] == []


def test_what_is_wrong_with_a_command_is_seen():
    for command in ("layerlab reprodce x", "layerlab reproduce x --profle cpu", "layerlab table --format latx",
                    "layerlab describe a b", "layerlab data chek x", "make dcs", "pip install 'layerlab[lightnin]'",
                    "python -m pytest tests/test_nothing.py"):
        (words,) = commands(command)
        assert wrong(words), command


@pytest.mark.parametrize("block", written_blocks("yaml", "toml", "json"), ids=str)
def test_data_on_a_page_can_be_read(block):
    read = {"yaml": YAML(typ="safe").load, "toml": tomllib.loads, "json": json.loads}[block.language]
    assert read(block.text)


@pytest.mark.parametrize("block", written_blocks("python"), ids=str)
def test_the_python_of_a_page_compiles_and_imports_what_is_there(block, monkeypatch):
    for folder in OUTSIDE:
        monkeypatch.syspath_prepend(str(folder))
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("layerlab"):
            # Names of a module may be modules of their own.
            exec(ast.unparse(node), {})


@pytest.fixture
def readers(tmp_path, monkeypatch) -> dict[str, Any]:
    """What the readers of the pages have: a network, data, a loop."""
    monkeypatch.chdir(tmp_path)
    for folder in OUTSIDE:
        monkeypatch.syspath_prepend(str(folder))
    data = load_dataset("digits", channels=3, limit=256, test_limit=64, device="cpu")
    model = build_model("resnet-cifar", num_classes=10, depth=8, channels=3)
    batches = list(data.train.batches(32, None, torch.float32, torch.contiguous_format))
    loader = DataLoader(TensorDataset(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])), 32)
    words = torch.randint(0, 20, (256, 9), generator=torch.Generator().manual_seed(0))
    return {
        "layerlab": layerlab, "fit": layerlab.fit, "F": functional, "network": model, "data": data,
        "train_loader": loader, "test_loader": loader, "train_words": words, "test_words": words,
        "language_model": nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20)),
        "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "epochs": 2, "loader": batches,
        "criterion": nn.CrossEntropyLoss(), "images": batches[0][0], "gradient": torch.rand(4, 4) - 0.5,
    }


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", [page for page in WRITTEN if any(
    block.language == "python" and block.how != "compiled only" for block in blocks(page))])
def test_the_python_of_a_page_works_when_pasted(page, readers):
    """Block by block into one program; what is marked as slow with `make test-all` alone."""
    names = {"__name__": "__main__", **readers}
    allowed = {"run", "slow"} if os.environ.get("LAYERLAB_SLOW") else {"run"}
    for block in blocks(page):
        if block.language == "python" and block.how in allowed:
            exec(compile(block.text, str(block), "exec", FLAGS), names)


def test_new_is_explained_by_the_command_line():
    text = CliRunner().invoke(main, ["new", "--help"]).output
    assert "--title" in text
    assert "--folder" in text
