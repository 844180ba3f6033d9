"""Plugins of other people: installed beside layerlab's wheel, found by everything, and harmless when broken."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner
from fake_paper import PAPER
from helpers import same_weights, slow

import layerlab
from layerlab import LayerlabError, fit, load_paper
from layerlab.base.processes import marked_processes
from layerlab.cli.main import main
from layerlab.contract.registry import Registry
from layerlab.reporting.scoreboard import collect
from layerlab.runs import tracking
from layerlab.runs.batch.local import preview
from layerlab.runs.batch.plans import Plan, jobs_of
from layerlab.training.loop import Fit

ROOT = Path(__file__).resolve().parents[1]
FREEZEOUT = Path(__file__).parent / "outside" / "freezeout"


def _wheel(source: Path, folder: Path) -> Path:
    """Build a wheel of a copy of a source tree, with the running environment's setuptools and without a network."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "-w", str(folder), str(source)], check=True, capture_output=True)
    (wheel,) = [path for path in folder.glob("*.whl") if path.name.startswith(f"{source.name}-")]
    return wheel


@pytest.fixture(scope="module")
def freezeout_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("freezeout")
    shutil.copytree(FREEZEOUT, folder / "freezeout", ignore=shutil.ignore_patterns("__pycache__"))
    return _wheel(folder / "freezeout", folder)


def _forget(*packages: str) -> None:
    layerlab.strategies.refresh()
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


# ------------------------------------------------------------------------- in the running environment


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which what is unpacked is installed, here and in processes that are started."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    before = set(sys.modules)
    _forget()
    yield folder
    _forget(*{name.partition(".")[0] for name in set(sys.modules) - before if (folder / name.split(".")[0]).exists()})


def test_a_plugin_that_lies_in_no_folder_of_the_project_is_found_and_trains(site, freezeout_wheel, digits, residual):
    zipfile.ZipFile(freezeout_wheel).extractall(site)
    plugin = Registry()["freezeout"]
    assert (plugin.distribution, plugin.version) == ("freezeout", "1.0.0")
    paper = load_paper("freezeout")
    assert paper.notebook_file.is_relative_to(site)
    assert {claim.id for claim in paper.claims} >= {"densenet-saving", "resnet-saving", "vgg-improvement"}
    assert re.search(r"t_0 +0\.8 ", CliRunner().invoke(main, ["describe", "freezeout"]).output)
    result = fit(residual, digits, Registry()("freezeout", t_0=0.7), epochs=4, batch_size=256, progress=False)
    assert [row["freezeout/frozen_layers"] for row in result.history] == [0, 1, 2, 2]


def test_it_goes_on_after_an_interruption_with_the_same_weights(site, freezeout_wheel, digits, residual, tmp_path):
    zipfile.ZipFile(freezeout_wheel).extractall(site)
    strategy = Registry()("freezeout", t_0=0.7)
    options = dict(epochs=4, batch_size=256, lr=0.05)
    whole = fit(residual, digits, strategy, progress=False, **options)
    for stop in (1, 2, 3):
        first = Fit(residual, digits, strategy, checkpoint=tmp_path / str(stop), **options)
        for _ in range(stop):
            first.train_epoch()
        again = fit(residual, digits, strategy, checkpoint=tmp_path / str(stop), progress=False, **options)
        assert same_weights(whole.model, again.model), f"after epoch {stop}"


STRATEGY = """
from layerlab import Strategy
class Mine(Strategy):
    name = {name!r}
"""
# Changes whatever others would need, in the process that imports it.
MEDDLING = """
import importlib
from layerlab.contract import paper, registry, run
def spoil(*_, **__):
    raise RuntimeError("spoilt by meddler")
paper.load_paper = paper.read_paper = registry.Registry.__getitem__ = spoil
importlib.import_module = run.Run.freeze = spoil
"""


def _install(site: Path, name: str, source: str = "", paper: str | None = PAPER, cells: tuple[str, ...] | None = (),
             target: str = "") -> None:
    """Put a plugin into a folder of packages, as pip unpacks its wheel."""
    package = site / f"plugin_{name.replace('-', '_')}"
    if not target:
        package.mkdir()
        (package / "__init__.py").write_text(textwrap.dedent(source) or STRATEGY.format(name=name))
        if paper is not None:
            (package / "paper.toml").write_text(paper)
        if cells is not None:
            own = f"from {package.name} import Mine"
            parameters = nbformat.v4.new_code_cell("profile = 'quick'\nepochs = pause = None")
            parameters.metadata["tags"] = ["parameters"]
            book = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, [own, *cells])])
            book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            nbformat.write(book, package / "notebook.ipynb")
    info = site / f"{package.name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name.replace('_', '-')}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[layerlab.strategies]\n{name} = {target or f'{package.name}:Mine'}\n")


# Name → what is installed, and what `list` says of it (None: nothing is wrong with its import and its paper.toml).
BROKEN: dict[str, tuple[dict[str, object], str | None]] = {
    "bad-import": ({"source": "import no_such_module"}, "ModuleNotFoundError: No module named 'no_such_module'"),
    "bad-exit": ({"source": "raise SystemExit(0)"}, "SystemExit: 0"),
    "bad-death": ({"source": "import os; os._exit(0)"}, "its import ended the process with status 0"),
    "bad-signal": ({"source": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"}, "signal 9"),
    "bad-toml": ({"paper": "title = 'no end"}, "cannot be read"),
    "bad-bytes": ({"paper": PAPER + "# \udcff"}, "cannot be read"),
    "bad-claims": ({"paper": PAPER.replace("value = 3.0", "value = 'much'")}, "claims.0.value"),
    "bad-nowhere": ({"target": "there_is_no_package:Mine"}, "ModuleNotFoundError"),
    "bad-class": ({"target": "json:Mine"}, "AttributeError: module 'json' has no attribute 'Mine'"),
    "no-notebook": ({"cells": None}, None),
    "meddler": ({"source": STRATEGY.format(name="meddler") + MEDDLING}, None),
}
REFUSED = {"bad-toml", "bad-bytes", "bad-claims", "bad-nowhere", "bad-class", "no-notebook"}


def _install_broken(site: Path) -> None:
    for name, (what, _) in BROKEN.items():
        raw = str(what.get("paper", "")).encode("utf-8", "surrogateescape")
        _install(site, name, **{**what, "paper": PAPER if "paper" in what else what.get("paper", PAPER)})
        if raw:
            (site / f"plugin_{name.replace('-', '_')}" / "paper.toml").write_bytes(raw)


@slow
def test_the_list_names_each_broken_plugin_with_its_reason_and_goes_on(site):
    _install_broken(site)
    result = CliRunner(env={"COLUMNS": "400"}).invoke(main, ["list"])
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines()}
    for name, (_, reason) in BROKEN.items():
        assert (reason or "A paper (Author, 2020)") in lines[name], lines[name]
    assert "Layer Skip Learning" in lines["lars-skip"]


@slow
@pytest.mark.parametrize(("source", "reason"), [
    ("import os, time\nif os.fork() == 0: time.sleep(600)", ""),
    ("import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(600)\nos._exit(3)", "status 3"),
    ("import multiprocessing, time\nkept = multiprocessing.Manager()\ntime.sleep(600)", "did not import within 20 s"),
])
def test_an_import_that_starts_processes_ends_with_them_within_its_limit(site, source, reason):
    from layerlab.contract.plugin_probe import import_errors

    _install(site, "starts", source=f"{source}\n{STRATEGY.format(name='starts')}")
    # What is started sleeps for ten minutes.
    (found,) = import_errors([Registry()["starts"]], limit=20)
    assert reason in found
    assert bool(found) == bool(reason)
    home = os.environ["LAYERLAB_HOME"]
    assert [each for each in marked_processes("LAYERLAB_HOME", home) if each.status() != "zombie"] == []


@slow
def test_an_import_that_does_not_end_is_given_up(site):
    from layerlab.contract.plugin_probe import PluginProbe

    _install(site, "endless", source="import time; time.sleep(600)")
    _install(site, "fine")
    found = Registry()
    with PluginProbe() as probe:
        errors = probe.import_errors([found["endless"], found["fine"]], limit=1.5)
    assert errors == ["it did not import within 1.5 s", ""]


def test_of_all_papers_those_that_cannot_be_run_are_refused_by_name_and_the_others_run(site, tmp_path):
    _install_broken(site)
    jobs = jobs_of(Plan(jobs=[{"paper": "all"}]), tmp_path)
    assert {job.name for job in jobs if job.problem} == REFUSED
    assert {"lars-skip", "meddler", "bad-import"} <= {job.name for job in jobs if not job.problem}
    rows = {job.name: (status, last) for job, status, last in preview(jobs)}
    assert rows["lars-skip"] == ("runs", "never run")
    assert rows["no-notebook"][0] == "refused"
    assert "no-notebook: The notebook" in rows["no-notebook"][1]
    # Asked for by its name, it is a mistake of the plan; so is a plan of which nothing can run.
    with pytest.raises(LayerlabError, match="nothing was run"):
        jobs_of(Plan(jobs=[{"paper": ["lars-skip", "bad-toml"]}]), tmp_path)
    with pytest.raises(LayerlabError, match=r"nothing was run(.*\n)+.*Unknown profile 'quik'"):
        jobs_of(Plan(jobs=[{"paper": "all", "profile": "quik"}]), tmp_path)


THROWING = """
    def on_epoch_start(self, run):
        run.log("no(name)%", float("nan"))
        raise OSError("thrown")
"""
THROWN = """
from torch import nn
from layerlab import fit, load_dataset, track
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
fit(network, load_dataset("digits"), Mine(), observers=[track("thrower")], epochs=1)
"""
def test_what_is_plugged_into_papermill_and_broken_stops_nobody(site, tmp_path):
    _install(site, "fine")
    points_of = {"engines": "[papermill.engine]\nbad = no_such_module:Engine\n", "twice": "[a]\nx = m:f\nx = m:g\n"}
    for name, points in points_of.items():
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
    notebooks = [site / f"tiny{number}.ipynb" for number in range(3)]
    for notebook in notebooks:
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")]), notebook)
    place = tmp_path / "empty"
    place.mkdir()
    # One after another, so that the later ones are forked from a server which has imported papermill.
    ended = subprocess.run([sys.executable, "-m", "layerlab.cli", "reproduce", "--workers", "1", *map(str, notebooks)],
                           capture_output=True, text=True, cwd=place)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("What engines plugs into papermill (bad) is left out: ModuleNotFoundError") == 3
    assert list(place.iterdir()) == []


GARBAGE = """
import json, os
from pathlib import Path
from layerlab import Study
from layerlab.runs import tracking
study = Study("{name}", profile)
good = study.claim("gain", [3.0]).model_dump()
study.finish()
rows = ['no json', json.dumps(good | {{"paper": "lars-skip", "claim": "top1-gain"}}), json.dumps({{"claim": 3}})]
for number, row in enumerate(rows):
    tracking.client().set_tag(study.run_id, f"{{tracking.CLAIM}}{{number:03}}", row)
tracking.client().delete_tag(study.run_id, "profile")
(study.folder / "claims.json").write_text("[1, 2")
"""


def test_the_scoreboard_goes_on_without_what_cannot_be_read(site, monkeypatch):
    _install_broken(site)
    run = tracking.start_run("no-notebook", "a run", "attempt", {"kind": "notebook"})
    claim = load_paper("no-notebook").not_run(load_paper("no-notebook").claim("gain"), "quick")
    other = claim.model_copy(update={"paper": "lars-skip", "claim": "top1-gain", "measured": 99.0})
    for number, row in enumerate([claim.model_dump_json(), other.model_dump_json()]):
        tracking.client().set_tag(run, f"{tracking.CLAIM}{number:03}", row)
    tracking.client().set_terminated(run, "FINISHED")
    with pytest.warns(UserWarning, match="bad-toml is left out: .*cannot be read"):
        rows = collect()
    assert {row.paper for row in rows} >= {"lars-skip", "no-notebook", "meddler"}
    assert [row.measured for row in rows if row.claim == "top1-gain"] == [None]  # nobody speaks for another paper
    tracking.client().set_tag(run, f"{tracking.CLAIM}001", "no json")
    with pytest.warns(UserWarning, match=f"The run {run} of no-notebook is left out"):
        assert [row.verdict for row in collect(["no-notebook"])] == ["not run"]
    result = CliRunner().invoke(main, ["scoreboard"])
    assert result.exit_code == 0, result.output
    assert "Warning: bad-toml is left out:" in result.output
    assert "Layer Skip" in result.output or "lars-skip" in result.output


@pytest.mark.parametrize("text", ["", "[]", "{", '{"finished": "yes"}', '{"finished": true, "seconds": "long"}'])
def test_a_record_that_is_none_counts_as_none(site, tmp_path, text):
    _install(site, "writes-anything")
    jobs = jobs_of(Plan(jobs=[{"paper": "writes-anything"}]), tmp_path)
    folder = Path(jobs[0].folder)
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(text)
    (folder / "claims.json").write_text("[1, 2")
    assert [row[1:] for row in preview(jobs)] == [("runs", "never run")]


# ------------------------------------------------------------------------- in a clean environment


@dataclass
class Environment:
    """A virtual environment with layerlab's wheel in it, and a folder to work in.

    Attributes:
        bin, site: of the environment.
        home: the folder to work in.
    """

    bin: Path
    site: Path
    home: Path

    def install(self, *what: str | Path) -> None:
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "-q", "--no-deps",
             "--no-index", "--no-build-isolation", "--disable-pip-version-check", *map(str, what)], check=True,
            capture_output=True, env=self.variables)

    @property
    def variables(self) -> dict[str, str]:
        """Without those in which pip or a command would find the workbook's own packages."""
        hidden = ("PYTHON", "JUPYTER", "LAYERLAB", "MLFLOW", "VIRTUAL_ENV", "COV", "PYTEST")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        return kept | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "300", "OMP_NUM_THREADS": "1"}

    def run(self, *words: str, status: int = 0, folder: Path | None = None) -> str:
        """Run a command of the environment; gives what it wrote."""
        ended = subprocess.run([str(self.bin / words[0]), *words[1:]], capture_output=True, text=True,
                               env=self.variables, cwd=folder or self.home)
        assert ended.returncode == status, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr


def _dependencies(folder: Path) -> None:
    """Links to every package that the running environment has, but for layerlab and what is installed in place."""
    folder.mkdir()
    ours = re.compile(r"__editable__|_?layerlab|freezeout", re.I)
    for place in map(Path, dict.fromkeys(sys.path)):
        if not any(place.glob("*.dist-info")):
            continue
        for entry in place.iterdir():
            link = folder / entry.name
            if not (ours.match(entry.name) or entry.suffix in (".pth", ".egg-link") or entry.name == "__pycache__"
                    or link.exists()):
                link.symlink_to(entry)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, freezeout_wheel: Path) -> Environment:
    folder = tmp_path_factory.mktemp("clean")
    venv.EnvBuilder(symlinks=True).create(folder / "env")
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "env"), "platbase": str(folder / "env")}))
    _dependencies(folder / "dependencies")
    (site / "dependencies.pth").write_text(f"{folder / 'dependencies'}\n")
    source = folder / "layerlab"
    source.mkdir()
    shutil.copytree(ROOT / "layerlab", source / "layerlab", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    home = folder / "home"
    home.mkdir()
    made = Environment(folder / "env" / "bin", site, home)
    made.install(_wheel(source, folder), freezeout_wheel)
    return made


@pytest.fixture
def bystanders(clean: Environment) -> Iterator[Callable[[], None]]:
    """Installs broken and misbehaving plugins beside FreezeOut; they go at the end."""
    before = set(clean.site.iterdir())

    def install() -> None:
        _install_broken(clean.site)
        _install(clean.site, "liar", cells=(GARBAGE.format(name="liar"),))
        _install(clean.site, "thrower", source=STRATEGY.format(name="thrower") + THROWING, cells=(THROWN,))

    yield install
    for path in set(clean.site.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@slow
def test_a_wheel_from_outside_beside_the_installed_wheel(clean):
    where = clean.run("python", "-c", "import layerlab, freezeout; print(layerlab.__file__, freezeout.__file__)")
    assert all(Path(path).is_relative_to(clean.site) for path in where.split())
    _, row = clean.run("layerlab", "list").splitlines()
    assert row.split()[:3] == ["freezeout", "freezeout", "1.0.0"]
    assert "FreezeOut: Accelerate Training by Progressively Freezing Layers" in row
    assert "densenet-saving" in clean.run("layerlab", "describe", "freezeout")
    assert "The contract holds." in clean.run("layerlab", "check", "freezeout")


@slow
def test_its_own_tests_pass_there(clean):
    shutil.copytree(FREEZEOUT / "tests", clean.home / "freezeout-tests")
    text = clean.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not contract", "freezeout-tests")
    assert " passed" in text


@slow
def test_its_notebook_runs_and_the_scoreboard_shows_it_beside_broken_plugins(clean, bystanders):
    bystanders()
    (clean.home / "plan.yaml").write_text("jobs:\n  - paper: all\nretries: 0\ntime_limit: 8\n")
    text = clean.run("layerlab", "batch", "plan.yaml", status=1)
    assert "freezeout: 2 undecided of 5 claims." in text
    assert re.search(r"freezeout quick +runs/freezeout/quick/freezeout.ipynb", text)
    for name in [*BROKEN, "thrower"]:
        assert f"again: layerlab reproduce {name} --profile quick" in text, name
    assert "OSError: thrown" in text
    assert "claims.json does not hold the claims of a run" in text
    record = json.loads((clean.home / "runs" / "freezeout" / "quick" / "claims.json").read_text())[0]
    assert record["versions"]["freezeout"] == "1.0.0"
    assert "plugin-meddler" in record["versions"]
    # What was finished stays so, and the table shows it, whatever the others have left in their folders and runs.
    again = clean.run("layerlab", "reproduce", "freezeout")
    assert "finished before" in again
    board = clean.run("layerlab", "scoreboard", "--format", "markdown")
    assert "| less training time for DenseNets (at most) |" in board
    assert re.search(r"liar is left out: its claims cannot be read", board)
    listed = clean.run("layerlab", "list")
    assert "FreezeOut: Accelerate" in listed
    assert "broken: SystemExit: 0" in listed


@slow
def test_a_new_plugin_installs_passes_its_tests_and_gives_a_verdict_as_it_stands(clean, bystanders):
    made = clean.run("layerlab", "new", "fresh-idea", "--title", "A fresh idea")
    assert "pip install -e fresh-idea" in made
    folder = clean.home / "fresh-idea"
    clean.install("-e", folder)
    assert "A fresh idea (Author and Author, 2026)" in clean.run("layerlab", "list")
    text = clean.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", folder=folder)
    assert re.search(r"^\d+ passed, 1 skipped", text.splitlines()[-1]), text
    text = clean.run("layerlab", "reproduce", "fresh-idea")
    assert re.search(r"^A fresh idea against plain training: .* 1 seed, .*, which settles nothing\.$", text, re.M), text
    # Its paper is invented as yet.
    assert re.search(r"^fewer FLOPs over the whole training .* not tested$", clean.run("layerlab", "scoreboard"), re.M)
