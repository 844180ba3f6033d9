"""`layerlab lab` and `layerlab ui`: outside a checkout too, on this machine alone, at a free port."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner
from helpers import free_port as some_port
from helpers import serving, slow
from test_lab import _addresses as addresses

from layerlab import LayerlabError
from layerlab.cli.main import main
from layerlab.cli.servers import free_port, lab_command, lay_out_notebooks, ui_command

HERE = "0100007F"


def test_a_port_that_is_taken_is_passed_over_and_one_that_is_asked_for_is_not():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(None, port) > port
        with pytest.raises(LayerlabError, match=f"Port {port} is taken on this machine; give another one with --port"):
            free_port(port, 8888)
    assert free_port(port, 8888) == port


def test_a_folder_without_notebooks_gets_those_that_the_core_carries(tmp_path):
    assert [file.name for file in lay_out_notebooks(tmp_path)] == ["compare.ipynb", "explore.ipynb", "scoreboard.ipynb"]
    mine = tmp_path / "notebooks" / "explore.ipynb"
    assert json.loads(mine.read_text())["cells"]
    mine.write_text("mine")
    assert lay_out_notebooks(tmp_path) == []
    assert mine.read_text() == "mine"


def test_both_are_told_to_listen_on_this_machine_alone():
    from jupyterlab.handlers.announcements import NeverCheckForUpdate
    from jupyterlab.labapp import LabApp

    app = LabApp()
    app.parse_command_line(lab_command(8889, Path("/home/me"), browser=False)[3:])
    assert app.config.ServerApp.ip == "127.0.0.1"
    assert app.news_url is None
    assert app.check_for_updates_class is NeverCheckForUpdate
    command = ui_command(5001)
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_a_server_of_somebody_else_is_not_started_here(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host:1")
    result = CliRunner().invoke(main, ["ui"])
    assert result.exit_code == 2
    assert "MLFLOW_TRACKING_URI names a server" in result.stderr
    assert "secret" not in result.output


@slow
@pytest.mark.parametrize("name", ["ui", "lab"])
def test_it_serves_outside_a_checkout(name, tmp_path):
    port = some_port()
    (tmp_path / "config").mkdir()
    # Tests may run as root, whom Jupyter asks for consent.
    (tmp_path / "config" / "jupyter_server_config.json").write_text('{"ServerApp": {"allow_root": true}}')
    environment = {**os.environ, "LAYERLAB_HOME": str(tmp_path / "work"),
                   "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    command = [sys.executable, "-m", "layerlab.cli", name, "--port", str(port),
               *(["--no-browser"] if name == "lab" else [])]
    place = "health" if name == "ui" else "api"
    with serving(command, f"http://127.0.0.1:{port}/{place}", cwd=tmp_path, env=environment, grace=15):
        assert addresses(port) == {HERE}
    made = {file.name for file in (tmp_path / "work").rglob("*") if file.suffix in (".ipynb", ".db")}
    assert made == ({"mlflow.db"} if name == "ui" else {"compare.ipynb", "explore.ipynb", "scoreboard.ipynb"})


def _offered(*words: str) -> list[str]:
    *before, incomplete = words
    return [item.value for item in BashComplete(main, {}, "layerlab", "_LAYERLAB_COMPLETE").get_completions(
        before, incomplete)]


@pytest.mark.parametrize(("words", "offered"), [
    (["pa"], ["pays"]),
    (["describe", "lars"], ["lars-skip"]),
    (["reproduce", "lars-skip", "--profile", "q"], ["quick"]),
    (["reproduce", "lars-skip", "-p", "alpha"], ["alphas=", "alpha="]),
    (["reproduce", "notebooks/explore.ipynb", "-p", "network_"], ["network_options="]),
    (["check", "lars-skip", "-p", "al"], ["alpha="]),
    (["pays", "resnet18", "dig"], ["digits"]),
    (["pays", "resnet18", "digits", "-p", "tol"], ["tolerance="]),
    (["pays", "resnet18", "digits", "-s", "low"], ["low-bit"]),
    (["describe", "nothing"], []),
])
def test_the_shell_offers_names_profiles_and_parameters(words, offered, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    found = [value for value in _offered(*words) if value not in (words[-1], "")]
    assert found == offered
