"""A published result is of the code that its plugin has today: `publish` refuses any other; pages say what is older."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from ruamel.yaml import YAML

from layerlab import LayerlabError, Study, load_paper
from layerlab.base.digests import file_digest, same_code
from layerlab.contract.paper import read_paper
from layerlab.contract.rows import counts
from layerlab.reporting.bottom_line import kept_line
from layerlab.reporting.freshness import TODAY, age, kept_ages
from layerlab.reporting.kept import kept_profiles
from layerlab.reporting.pages import paper_page
from layerlab.reporting.publish import publish
from layerlab.reporting.scoreboard import collect, run_table
from layerlab.runs.record import workbook_folder

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(ROOT.glob("plugins/*/layerlab_*/paper.toml"))


def test_what_is_published_comes_from_today_s_code_of_its_plugin():
    """To mend it: run the profile again and publish it; a profile that waits for that stands in results/older.yaml."""
    papers = [read_paper(file, file.parents[1].name) for file in PACKAGES]
    older = {f"{kept.paper}/{kept.profile}" for kept in kept_ages(ROOT / "results", papers) if kept.state != TODAY}
    waiting = YAML(typ="safe").load(ROOT / "results" / "older.yaml") or []
    assert older == set(waiting)
    assert len(waiting) == len(set(waiting))


@pytest.fixture
def run(fake) -> Study:
    """A finished one, whose plugin draws its pictures in a file of its own."""
    package = fake() / "fake_plugin"
    (package / "pictures.py").write_text("COLOUR = 'red'\n")
    return finished()


def finished() -> Study:
    study = Study("fake", "cpu")
    study.claim("gain", [2.0, 4.0], seeds=[0, 1], conditions={"dataset": "digits"})
    study.figure("fig-1", Figure())
    study.finish()
    return study


@pytest.mark.parametrize(("file", "numbers"), [("__init__.py", True), ("pictures.py", False), ("method.py", True)])
def test_a_run_of_other_code_is_refused_with_what_changed_and_the_remedy(run, tmp_path, file, numbers):
    package = load_paper("fake").folder
    with (package / file).open("a") as stream:
        stream.write("\nOTHER = 1\n")
    for what in (run.folder, "fake"):
        with pytest.raises(LayerlabError, match=rf"other code than 'fake' has today: {file} changed since; run "
                                                r"`layerlab reproduce fake --profile cpu --rerun` and publish that"):
            publish([what], tmp_path / "results")
    assert not (tmp_path / "results" / "fake").exists()
    assert bool(age(run.folder, load_paper("fake")).numbers) == numbers


def test_comments_docstrings_and_paper_toml_are_no_code(run, tmp_path):
    package = load_paper("fake").folder
    source = (package / "pictures.py").read_text()
    (package / "pictures.py").write_text(f'"""Pictures."""\n\n# Red.\n{source}')
    with (package / "paper.toml").open("a") as stream:
        stream.write("\n[headline]\nmethod = 'Fake'\naccuracy = 'gain'\n")
    assert publish([run.folder], tmp_path / "results")


def test_what_is_kept_of_older_code_is_marked_and_counts_for_nothing(run, tmp_path):
    target = tmp_path / "results"
    publish([run.folder], target)
    paper = load_paper("fake")
    before = kept_profiles(target / "fake", paper)
    assert counts(next(iter(before.values())))["undecided"] == "1"
    assert [kept.state for kept in kept_ages(target, [paper])] == [TODAY]

    (paper.folder / "__init__.py").write_text((paper.folder / "__init__.py").read_text() + "\nOTHER = 1\n")
    # Pages are written anew without it being run again.
    pages = publish([], target)
    kept = kept_profiles(target / "fake", paper)
    assert counts(next(iter(kept.values()))) == {**dict.fromkeys(counts([]), ""), "not run": "1"}
    assert kept_line(paper, kept) == "fake: nothing was run of 0 claims."
    page = paper_page(target / "fake", paper)
    assert pages[0].read_text() == page
    assert ".py changed since): it counts for no verdict" in page
    assert "| cpu, made by older code, digits, 2 seeds" in page


def test_the_scoreboard_has_what_is_published_where_mlflow_has_no_run(run, monkeypatch, tmp_path):
    target = workbook_folder() / "results"
    publish([run.folder], target)
    [own] = collect(["fake"])
    assert (own.profile, own.values, bool(own.mlflow_run)) == ("cpu", [2.0, 4.0], True)
    # The same repository on another machine.
    monkeypatch.setenv("LAYERLAB_HOME", str(tmp_path / "other"))
    assert [row.verdict for row in collect(["fake"])] == ["not run"]
    shutil.copytree(target, tmp_path / "other" / "results")
    [row] = collect(["fake"])
    assert (row.profile, row.values, row.verdict, row.mlflow_run) == ("cpu", [2.0, 4.0], own.verdict, "")
    assert "published: results/fake" in run_table([row]).text()


def test_a_page_goes_with_the_last_profile_that_somebody_removes(run, tmp_path):
    target = tmp_path / "results"
    publish([run.folder], target)
    # So that MLflow has no run that would take its place.
    (load_paper("fake").folder / "pictures.py").write_text("COLOUR = 'blue'\n")
    shutil.rmtree(target / "fake" / "cpu")
    (target / "fake" / "notes.md").write_text("Mine.")
    publish([], target)
    assert [file.name for file in (target / "fake").iterdir()] == ["notes.md"]
    assert "fake/README.md" not in (target / "README.md").read_text()


def test_what_is_published_names_data_and_no_folder_of_the_machine(run, tmp_path):
    identity = json.loads((run.folder / "identity.json").read_text())
    identity["data"] = {"/home/me/cifar10": "one", "/other/cifar10": "two"}
    (run.folder / "identity.json").write_text(json.dumps(identity))
    publish([run.folder], tmp_path / "results")
    kept = json.loads((tmp_path / "results" / "fake" / "cpu" / "identity.json").read_text())
    assert kept == identity | {"data": {"cifar10": "one", "cifar10 (another)": "two"}}


def test_older_pictures_are_marked_and_the_numbers_count(run, tmp_path):
    target = tmp_path / "results"
    publish([run.folder], target)
    paper = load_paper("fake")
    (paper.folder / "pictures.py").write_text("COLOUR = 'blue'\n")
    kept = kept_profiles(target / "fake", paper)
    assert counts(next(iter(kept.values())))["undecided"] == "1"
    assert [each.state for each in kept_ages(target, [paper])] == ["older pictures"]
    assert "**Figures drawn by older code** (pictures.py changed since)" in paper_page(target / "fake", paper)


def test_a_run_without_an_identity_is_older(run):
    (run.folder / "identity.json").unlink()
    assert "noted no code" in age(run.folder, load_paper("fake")).numbers
    (run.folder / "identity.json").write_text("[]")
    assert "cannot be read" in age(run.folder, load_paper("fake")).numbers


def test_a_digest_of_code_is_the_same_on_every_python(tmp_path):
    file = tmp_path / "some.py"
    file.write_text('"""Some."""\nclass A:\n    def f(self, x=None):\n        return [f"{x!r:>3}", (), {}]\n')
    program = ("from layerlab.base.digests import file_digest; from pathlib import Path; "
               f"print(file_digest(Path({str(file)!r})))")
    found = {file_digest(file)}
    for version in ("3.11", "3.12", "3.13", "3.14"):
        for python in Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"):
            found.add(subprocess.run([python, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
                                     env={"PYTHONPATH": str(ROOT)}).stdout.strip())
    # Of a Python that is not here: written down.
    assert found == {"0e615d8648c7c42c"}


def test_what_python_3_11_wrote_before_still_counts(tmp_path):
    file = tmp_path / "some.py"
    file.write_text("def f():\n    return 1\n")
    assert same_code(file_digest(file), file)
    assert same_code("0362a9070ff6eefc", file)
    assert not same_code("cfee6ff0709a2630", file)
