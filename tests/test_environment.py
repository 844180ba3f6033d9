"""environment.yml, pyproject.toml and constraints.txt say the same."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

from layerlab.base.text import from_yaml

ROOT = Path(__file__).resolve().parents[1]


def _projects() -> list[dict]:
    files = [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]
    return [tomllib.loads(file.read_text())["project"] for file in files]


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {_name(line): line.partition("==")[2] for line in lines}


def test_environment_yml_lists_what_the_core_needs():
    environment = from_yaml((ROOT / "environment.yml").read_text())
    core = _projects()[0]
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert {r for r in pip if not r.startswith("-")} == {*core["dependencies"], *core["optional-dependencies"]["dev"]}
    assert "-c constraints.txt" in pip
    assert {r for r in pip if r.startswith("-e")} == {
        "-e .", *(f"-e {file.parent.relative_to(ROOT)}" for file in ROOT.glob("plugins/*/pyproject.toml"))
    }
    assert f"python{core['requires-python']}" in environment["dependencies"]


def test_binder_installs_layerlab_and_every_plugin():
    lines = (ROOT / ".binder" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "-c ../constraints.txt", "-e .",
        *(f"-e {file.parent.relative_to(ROOT)}" for file in sorted(ROOT.glob("plugins/*/pyproject.toml")))]


def test_citation_and_badges_say_what_the_project_says():
    core = _projects()[0]
    citation = from_yaml((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], str(citation["version"]), citation["license"]) == (
        core["name"], core["version"], core["license"])
    assert citation["abstract"] == f"{core['description']}."
    assert re.search(r"^Copyright \(c\) \d+ (.*)$", (ROOT / "LICENSE").read_text(), re.M)[1] in [
        author["name"] for author in citation["authors"]]
    badges = re.findall(r"img\.shields\.io/badge/(\w+)-(\S+)-\w+\)", (ROOT / "README.md").read_text())
    assert {name: unquote(value) for name, value in badges} == {
        "licence": core["license"], "python": core["requires-python"].replace(">=", "≥")}


def test_everything_needed_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    pins = _pins()
    for project in _projects():
        extras = project.get("optional-dependencies", {})
        wanted = extras if project["name"] == "layerlab" else {"dev": extras.get("dev", [])}
        for text in chain(project.get("dependencies", []), *wanted.values()):
            requirement = Requirement(text)
            if requirement.name.startswith("layerlab"):
                continue
            assert _name(text) in pins, f"{text} is not pinned"
            assert requirement.specifier.contains(pins[_name(text)]), f"{text} is pinned to {pins[_name(text)]}"


def test_the_tests_run_with_the_pinned_versions():
    pins = _pins()
    for name in ("torch", "torchvision", "mlflow", "papermill", "pydantic"):
        assert importlib.metadata.version(name).split("+")[0] == pins[name]


def test_no_file_records_a_registry():
    for name in ("constraints.txt", "environment.yml", "pyproject.toml", ".binder/requirements.txt"):
        assert "://" not in (ROOT / name).read_text()
