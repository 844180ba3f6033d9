"""`layerlab new`: what it writes is a plugin that works, or nothing."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner

import layerlab
from layerlab import LayerlabError, fit, load_dataset, load_paper
from layerlab.cli.main import main
from layerlab.cli.scaffold import TEMPLATE, new_plugin
from layerlab.contract.registry import Registry
from layerlab.testing import CHECKS


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_everything_bears_the_new_name(tmp_path):
    made = new_plugin("half-a-step", tmp_path, title='Half a "Step": α\\β')
    names = {name.replace("my_method", "half_a_step") for name in _files(TEMPLATE) if not name.endswith(".pyc")}
    assert _files(made) == names
    assert len(names) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["half-a-step"]
    for path in (made / name for name in names):
        text = path.read_text()
        assert not any(old in text for old in ("my-method", "my_method", "MyMethod", "My method")), path
        if path.suffix == ".py":
            compile(text, path, "exec")
    project = tomllib.loads((made / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["layerlab.strategies"] == {"half-a-step": "layerlab_half_a_step:HalfAStep"}
    paper = tomllib.loads((made / "layerlab_half_a_step" / "paper.toml").read_text())
    assert paper["title"] == 'Half a "Step": α\\β'
    notebook = nbformat.read(made / "layerlab_half_a_step" / "notebook.ipynb", 4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith('# Half a "Step": α\\β\n')


@pytest.mark.parametrize("name", ["strategy", "run", "exception"])
def test_a_class_never_takes_the_name_of_what_it_needs(tmp_path, name):
    text = (new_plugin(name, tmp_path) / f"layerlab_{name}" / "strategy.py").read_text()
    assert f"class {name.capitalize()}Method(Strategy):" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["My_Method"], "'My_Method' is no name for a strategy; take small letters, digits and single dashes"),
        (["2-bit"], "is no name for a strategy"),
        (["--", "-x"], "is no name for a strategy"),
        (["a--b"], "is no name for a strategy"),
        (["../x"], "is no name for a strategy"),
        (["lars-skip"], "'lars-skip' is installed already, by layerlab-lars-skip; choose another name"),
        (["there"], "there is there already; choose another name or another --folder"),
        (["mine", "--folder", "nowhere"], "There is no folder nowhere"),
        # Some of its files could be written: those whose names are not longer than a file system takes.
        (["x" * 248], "The plugin cannot be written into . (File name too long)"),
    ],
)
def test_what_cannot_be_gets_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    result = CliRunner().invoke(main, ["new", *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())


def test_a_package_of_that_name_is_not_doubled(tmp_path, monkeypatch):
    (tmp_path / "layerlab_taken").mkdir()
    (tmp_path / "layerlab_taken" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LayerlabError, match="A package 'layerlab_taken' is installed already"):
        new_plugin("taken", tmp_path)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A new plugin on the path, with what pip writes of it."""
    made = new_plugin("fresh-idea", tmp_path)
    info = tmp_path / "layerlab_fresh_idea-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: layerlab-fresh-idea\nVersion: 0.1.0\n")
    points = tomllib.loads((made / "pyproject.toml").read_text())["project"]["entry-points"]["layerlab.strategies"]
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[layerlab.strategies]", *lines]))
    for folder in (tmp_path, made):
        monkeypatch.syspath_prepend(str(folder))
    layerlab.strategies.refresh()
    yield made
    layerlab.strategies.refresh()
    for name in [name for name in sys.modules if name.startswith("layerlab_fresh_idea")]:
        del sys.modules[name]


def test_it_works_as_it_stands(plugin):
    text = CliRunner().invoke(main, ["describe", "fresh-idea"]).output
    for part in ("Fresh idea", "share", "0.5", "quick", "flops-saving", "notebook.ipynb"):
        assert part in text
    paper = load_paper("fresh-idea")
    parameters = [profile.parameters.keys() for profile in paper.profiles.values()]
    assert paper.profiles.keys() == {"quick", "cpu", "paper"}
    cells = json.loads(paper.notebook_file.read_text())["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    lines = [line for line in "".join(cell["source"]).splitlines() if not line.startswith("#")]
    assert all("  # " in line for line in lines)
    assert all({line.split(" = ")[0] for line in lines} == {"profile", "output", *each} for each in parameters)
    # All checks, composition with every installed strategy among them, are in the slow test of a clean environment.
    for name in ("settings_round_trip", "hook_calls", "resumes"):
        CHECKS[name](Registry()("fresh-idea"))


def test_its_example_saves_what_it_says(plugin, residual):
    data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
    strategy = Registry()("fresh-idea", share=0.5, every=3)
    result = fit(residual, data, strategy, epochs=3, batch_size=64, progress=False)
    assert [row["fresh-idea/rests"] for row in result.history] == [0, 0, 1]
    costs = [row["cost/backward_flops"] for row in result.history]
    assert costs[0] == costs[1] > costs[2]
