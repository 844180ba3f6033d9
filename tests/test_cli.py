"""The command line: what it shows, and exit status 2 with one sentence for bad input."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import slow

from layerlab.cli.main import main

pytestmark = pytest.mark.usefixtures("known_plugins")
ROOT = Path(__file__).resolve().parents[1]


def _call(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == status, result.output
    return result.output


def test_help_explains_each_command_in_a_line():
    text = _call("--help")
    for line in ("list ", "describe ", "reproduce ", "data ", "publish "):
        assert any(row.strip().startswith(line) and len(row.split()) > 3 for row in text.splitlines()), line


def test_list_names_strategy_distribution_and_paper():
    text = " ".join(_call("list").split())
    for part in ("lars-skip", "layerlab-lars-skip 0.1.0", "Layer Skip Learning using LARS variables"):
        assert part in text


def test_describe_shows_settings_profiles_and_claims():
    text = _call("describe", "lars-skip")
    for part in ("alpha         2.0       Threshold of rule", "quick", "top1-gain", "Table I", "Notebook"):
        assert part in text


def test_the_list_has_a_row_for_each_strategy_at_80_columns():
    lines = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["list"]).output.splitlines()
    assert lines[0].split() == ["strategy", "installed", "by", "paper"]
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.startswith("network-with")] == ["network-with-subnetworks"]


@pytest.mark.parametrize("arguments", [["list"], ["describe", "lars-skip"], ["data"], ["scoreboard"]])
def test_what_is_known_of_plugins_and_datasets_is_shown_without_torch(arguments):
    _call(*arguments)
    script = (f"import sys; from layerlab.cli.main import main; main({arguments!r}, standalone_mode=False); "
              "print([m for m in ('torch', 'mlflow', 'pandas', 'numpy') if m in sys.modules])")
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1] == "[]"


def test_the_command_line_is_there_before_what_its_commands_need():
    script = ("import sys, layerlab.cli.main; "
              "print([m for m in sys.modules if m.startswith(('layerlab.contract.', 'layerlab.reporting.', "
              "'layerlab.runs.', 'layerlab.training.', 'layerlab.workload.'))])")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_scoreboard_of_published_results_waits_for_no_large_library(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("figures"))
    monkeypatch.setenv("LAYERLAB_HOME", str(tmp_path))
    script = ("import sys; from layerlab.cli.main import main; main(['scoreboard'], standalone_mode=False); "
              "print([m for m in ('torch', 'mlflow', 'pandas', 'scipy.stats') if m in sys.modules])")
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.splitlines()
    assert " ± " in "".join(told)
    assert told[-1] == "[]"


def test_data_says_what_is_here(tmp_path):
    text = _call("data", "--root", str(tmp_path))
    assert "digits" in text
    assert "embedded" in text
    assert text.count("missing") == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "lars-skp"], "Unknown strategy 'lars-skp'. Did you mean 'lars-skip'?"),
        (["reproduce", "lars-skip", "--profile", "quik"], "Unknown profile 'quik'. Did you mean 'quick'?"),
        (["reproduce", "lars-skip", "-p", "alhpa=1"], "Did you mean 'alpha'?"),
        (["reproduce", "lars-skip", "-p", "alpha"], "is not of the form key=value"),
        (["reproduce", "lars-skip", "--output", "/dev/null/x"], "cannot be written"),
        (["describe", "nothing"], "Unknown strategy 'nothing'"),
        (["publish", "/dev/null"], "no folder of a finished run"),
    ],
)
def test_bad_input_ends_with_status_2_and_a_sentence(arguments, message):
    text = _call(*arguments, status=2)
    assert message in text
    assert "Traceback" not in text


@slow
def test_a_negative_alpha_is_refused_by_the_strategy_through_the_notebook(tmp_path):
    out = tmp_path / "out"
    text = _call("reproduce", "lars-skip", "-p", "alpha=-1", "--output", str(out), status=2)
    assert "lars-skip: setting 'alpha' should be greater than or equal to 0, got -1" in text
    assert not list(out.glob("*.ipynb"))
    assert not (out / "claims.json").exists()
