"""`layerlab new`: what it writes is a plugin that works, or nothing."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner
from helpers import slow

import layerlab
from layerlab import LayerlabError, fit, load_dataset, load_paper
from layerlab.cli.main import main
from layerlab.cli.scaffold import TEMPLATE, new_plugin
from layerlab.contract.claims import placeholders
from layerlab.contract.registry import Registry
from layerlab.contract.verdicts import judge
from layerlab.reporting.publish import publish
from layerlab.testing import CHECKS
from layerlab.testing.plugin_checks import PLUGIN_CHECKS, badge, check_plugin


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


MARKED = ("strategy_described", "paper_complete", "notebook_whole", "card_whole")


def findings(name: str = "fresh-idea") -> dict[str, str]:
    """Check → what it found, of those that failed."""
    return {each["check_name"]: str(each["exception"]) for each in check_plugin(name) if each["status"] == "failed"}


def fill_in(folder: Path) -> None:
    """As an author would who knows the paper: no placeholder is left."""
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".toml", ".md", ".ipynb"):
            path.write_text(path.read_text().replace("Replace: ", ""))
    for name in [name for name in sys.modules if name.startswith("layerlab_fresh_idea")]:
        del sys.modules[name]
    layerlab.strategies.refresh()


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_nothing_that_new_invents_can_pass_for_the_authors(plugin, tmp_path):
    found = findings()
    assert tuple(found) == MARKED
    assert all("`layerlab new` wrote" in text for text in found.values())
    for place in ("authors", "venue", "tables.1.title"):
        assert place in placeholders(load_paper("fresh-idea").model_dump())
    for claim in load_paper("fresh-idea").claims:
        verdict, reason = judge(claim, [claim.value] * 3, claim.conditions, observed={"baseline top-1": 99.0})
        assert (verdict, "is a placeholder" in reason) == ("not tested", True)
    run = tmp_path / "run"
    run.mkdir()
    row = load_paper("fresh-idea").not_run(load_paper("fresh-idea").claims[0], "cpu")
    (run / "claims.json").write_text(json.dumps([row.model_dump()]))
    with pytest.raises(LayerlabError, match=r"The paper.toml of fresh-idea still holds placeholders \(authors, "):
        publish([run], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_what_is_filled_in_holds_and_has_a_badge(plugin):
    fill_in(plugin)
    assert findings() == {}
    held = len(PLUGIN_CHECKS)
    line = badge(check_plugin("fresh-idea"))
    assert re.fullmatch(rf"!\[layerlab \S+: {held} checks hold\]\(https://\S+{held}_checks_hold\S+\)", line)
    claim = load_paper("fresh-idea").claims[0]
    assert judge(claim, [claim.value] * 3, claim.conditions).verdict == "reproduced"


@pytest.mark.parametrize(("file", "old", "new", "check", "said"), [
    ("{}/paper.toml", 'null = "baseline"', "", "paper_claims", "flops-saving, top1-gain compares with nothing; name"),
    ("{}/paper.toml", "gates = ", "# gates = ", "paper_claims", "top1-gain would be judged from a baseline that did"),
    ("{}/paper.toml", "[profiles.paper", "[profiles.whole", "paper_profiles", "has no profile paper; add it"),
    ("{}/paper.toml", "depth = 20", "depths = 20", "paper_profiles",
     "profile paper and quick differ in their parameters (depths)"),
    ("{}/paper.toml", "memory_gb = 4", "", "paper_profiles", "profile cpu does not say its memory_gb"),
    ("{}/paper.toml", "title = ", "titel = ", "paper_complete", "titel"),
    ("{}/notebook.ipynb", '"lr = None  # learning rate', '"lr = None', "notebook_whole", "parameter lr has no comment"),
    ("{}/notebook.ipynb", '"depth = None', '"deep = None', "notebook_whole", "differ in deep, depth"),
    ("{}/notebook.ipynb", '"parameters"', '"else"', "notebook_whole", "has 0 cells tagged `parameters`"),
    ("{}/notebook.ipynb", '"execution_count": null', '"execution_count": 3', "notebook_whole", "holds outputs; clear"),
    ("{}/notebook.ipynb", '"cells"', '"sells"', "notebook_whole", "is no notebook"),
    ("README.md", "`every`", "every", "card_settings", "does not name the setting every; say what it does"),
    ("README.md", "## What it costs", "## Else", "card_whole", "no section on what it costs; add one to README.md"),
    ("{}/strategy.py", '"""They rest in each epoch whose number this divides, and learn in the others."""', "",
     "strategy_described", "setting every has no docstring"),
])
def test_what_a_plugin_lacks_is_found_and_said(plugin, file, old, new, check, said):
    fill_in(plugin)
    edit(plugin / file.format("layerlab_fresh_idea"), old, new)
    found = findings()
    assert said in found[check]
    # What cannot be read fails each check that reads it.
    assert set(found) - {check} <= ({"paper_claims", "paper_profiles", "notebook_whole"} if "titel" in new else set())


def test_the_card_of_a_wheel_is_read_from_what_pip_keeps(plugin, tmp_path):
    fill_in(plugin)
    card = (plugin / "README.md").read_text()
    (plugin / "pyproject.toml").unlink()  # as where there is no checkout
    metadata = tmp_path / "layerlab_fresh_idea-0.1.0.dist-info" / "METADATA"
    statuses = {each["check_name"]: each["status"] for each in check_plugin("fresh-idea")}
    assert (statuses["card_whole"], statuses["card_settings"]) == ("skipped", "skipped")
    metadata.write_text(metadata.read_text() + "\n" + card.replace("## Settings", "## Else"))
    assert list(findings()) == ["card_whole"]


@pytest.mark.parametrize("name", [plugin.name for plugin in layerlab.strategies.every()])
def test_paper_notebook_and_card_of_each_bundled_plugin_hold(name):
    assert findings(name) == {}


@slow
def test_the_command_ends_with_the_badge_where_everything_holds(plugin):
    fill_in(plugin)
    ended = CliRunner().invoke(main, ["check", "fresh-idea"])
    assert ended.exit_code == 0, ended.output
    said, line = ended.output.splitlines()[-2:]
    assert said == "The contract holds. For the plugin's README.md:"
    assert re.match(r"!\[layerlab \S+: \d+ checks hold\]\(https://", line)
