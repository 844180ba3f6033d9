"""`make lab` in a real browser: explore.ipynb, all cells run, bars while it trains and results after."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import chromium, free_port, serving, slow

from layerlab.base.processes import import_path
from layerlab.runs import tracking
from layerlab.runs.execution import execute
from layerlab.runs.jobs import notebook_job
from layerlab.runs.tracking.schema import sqlite_file
from layerlab.runs.tracking.store import open_client

ROOT = Path(__file__).parents[1]
# `LAYERLAB_SHOTS=docs` keeps the picture that the docs show.
SHOTS = os.environ.get("LAYERLAB_SHOTS")


def _recipe(target: str) -> str:
    """The command of a target of the Makefile."""
    found = re.search(rf"^{target}:.*\n\t(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    return found[1]


def _addresses(port: int) -> set[str]:
    """The addresses at which somebody listens on a port."""
    found = set()
    for file, width in (("/proc/net/tcp", 8), ("/proc/net/tcp6", 32)):
        with contextlib.suppress(OSError):
            for line in Path(file).read_text().splitlines()[1:]:
                local, _, state = line.split()[1:4]
                if state == "0A" and int(local[width + 1:], 16) == port:
                    found.add(local[:width])
    return found


def test_lab_and_ui_listen_on_this_machine_alone():
    assert "--ip 127.0.0.1" in _recipe("lab")
    assert "--host 127.0.0.1" in _recipe("ui")


@slow
def test_the_ui_listens_on_this_machine_alone_when_it_runs(tmp_path):
    port = free_port()
    place = _checkout(tmp_path / "plain", {"mlflow": f'exec "{sys.executable}" -m mlflow "$@"'})
    with (place / "Makefile").open("r+") as file:
        text = file.read().replace("--port 5000", f"--port {port}")
        file.seek(0)
        file.write(text)
    with serving(["make", "ui"], f"http://127.0.0.1:{port}/health", cwd=place):
        assert _addresses(port) == {"0100007F"}


def _checkout(folder: Path, programs: dict[str, str]) -> Path:
    """A folder with the Makefile and an environment of these programs, lines for the shell each, beside `python`."""
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    (folder / ".venv" / ".ready").touch()
    shutil.copy(ROOT / "Makefile", folder)
    for name, line in {"python": f'exec "{sys.executable}" "$@"', **programs}.items():
        (binaries / name).write_text(f"#!/bin/sh\n{line}\n")
        (binaries / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("name", ["a checkout#1", "100%41?it's", 'two" and\'one', "a :b$HOME`;x"])
def test_lab_and_ui_work_wherever_the_checkout_lies(tmp_path, monkeypatch, name):
    place = _checkout(tmp_path / name, {"mlflow": 'printf "%s\\n" "$@"', "jupyter": 'printf "%s" "$LAYERLAB_HOME"'})
    monkeypatch.setenv("PYTHONPATH", import_path())
    # What a person has set for another workbook is not what a checkout shows.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere.db")
    told = {target: subprocess.run(["make", "-s", target], cwd=place, capture_output=True, text=True, check=True).stdout
            for target in ("ui", "lab")}
    words = told["ui"].splitlines()
    address = words[words.index("--backend-store-uri") + 1]
    assert sqlite_file(address) == place / "mlflow.db"
    assert told["lab"] == str(place)
    # What layerlab tracks there is what the address shows.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("LAYERLAB_HOME", str(place))
    monkeypatch.chdir(place)
    number = tracking.experiment_id("mine")
    assert open_client(address).get_experiment(number).name == "mine"


def test_lab_asks_nobody_for_news_or_updates():
    from jupyterlab.handlers.announcements import NeverCheckForUpdate
    from jupyterlab.labapp import LabApp

    app = LabApp()
    app.parse_command_line(_recipe("lab").partition("/jupyter lab ")[2].split())
    assert app.news_url is None
    assert app.check_for_updates_class is NeverCheckForUpdate


KERNEL = """
import os, psutil
found = {each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN}
assert found == {"127.0.0.1"}, found
import mlflow.telemetry
assert mlflow.telemetry.get_telemetry_client() is None
"""


def test_a_kernel_listens_on_this_machine_alone_and_sends_nothing(fake, tmp_path, monkeypatch):
    # What MLflow takes for a test or a server of continuous integration switches its telemetry off, too.
    for name in ("CI", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    execute(notebook_job(fake(KERNEL) / "fake_plugin" / "notebook.ipynb", output=tmp_path / "out"))


def test_telemetry_is_the_user_s_to_switch_on():
    script = "import os, layerlab; print(os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    for given, found in ((None, "true"), ("false", "false")):
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_DISABLE_TELEMETRY"}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": given} if given else {}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == found, done.stderr


@pytest.fixture
def lab(tmp_path) -> Iterator:
    """A browser at JupyterLab, which `make lab`'s command started on a copy of the notebooks: (driver, address)."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    settings = tmp_path / "settings" / "@jupyterlab"
    for name, content in (("notebook-extension/tracker", {"windowingMode": "none"}),
                          ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False})):
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    port = free_port()
    arguments = _recipe("lab").partition("/jupyter lab ")[2].split()
    assert arguments
    # Only for this test: no token, no window of its own, and root's consent.
    arguments += ["--no-browser", f"--port={port}", "--IdentityProvider.token=", "--allow-root"]
    environment = os.environ | {
        "LAYERLAB_HOME": str(tmp_path), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
    }
    # The server ends its kernels itself when it is asked to.
    with (chromium(1120, 1080) as browser,
          serving([sys.executable, "-m", "jupyterlab", *arguments], f"http://127.0.0.1:{port}/api", cwd=tmp_path,
                  env=environment, grace=30)):
        assert _addresses(port) == {"0100007F"}
        yield browser, f"http://127.0.0.1:{port}"


def _until(condition, what: str, seconds: float = 60):
    """What the condition gives, once that is true."""
    from selenium.common.exceptions import WebDriverException

    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(WebDriverException):
            if found := condition():
                return found
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.2)


def _shot(browser, name: str) -> None:
    if SHOTS:
        browser.save_screenshot(str(Path(SHOTS) / f"{name}.png"))


@slow
@pytest.mark.skipif(importlib.util.find_spec("selenium") is None, reason="needs selenium: pip install selenium")
def test_explore_runs_in_jupyterlab_with_bars_and_results(lab, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser, address = lab

    def texts(selector: str) -> list[str]:
        return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]

    def click(selector: str, text: str) -> None:
        def find():
            return next((each for each in browser.find_elements(By.CSS_SELECTOR, selector)
                         if each.text.strip().startswith(text)), None)

        _until(find, f"{text!r} to click on").click()

    browser.get(f"{address}/lab/tree/explore.ipynb")
    _until(lambda: any("Explore" in text for text in texts(".jp-MarkdownCell")), "the notebook", 120)
    _until(lambda: any("Python 3" in text for text in texts(".jp-Notebook-toolbar, .jp-KernelName, .jp-Toolbar")),
           "a kernel")
    click(".lm-MenuBar-itemLabel", "Run")
    click(".lm-Menu-itemLabel", "Run All Cells")

    # While it trains: two bars, that of all runs and one that names the run.
    bars = _until(lambda: [text for text in texts(".jp-OutputArea-output pre") if "all runs" in text],
                  "progress bars", 240)
    assert any("seed" in text and "loss" in text and "top-1" in text for text in bars)
    assert len(bars[0].splitlines()) == 2
    (drawn,) = [each for each in browser.find_elements(By.CSS_SELECTOR, ".jp-OutputArea-output pre")
                if "all runs" in each.text]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", drawn)
    _shot(browser, "jupyterlab-explore-running")

    _until(lambda: any("loaded again" in text for text in texts(".jp-OutputArea-output")), "the last cell", 400)
    _until(lambda: not any("[*]" in text for text in texts(".jp-InputPrompt")), "all cells")
    assert not browser.find_elements(By.CSS_SELECTOR, '[data-mime-type="application/vnd.jupyter.stderr"]')
    # The bars are gone, and tables and pictures are there.
    assert not any("all runs" in text for text in texts(".jp-OutputArea-output"))
    shown = "\n".join(texts(".jp-OutputArea-output"))
    for part in ("training images", "own-history", "6 epochs, 3 seeds", "peak memory [MB]", "against the baseline"):
        assert part in shown, part
    pictures = browser.find_elements(By.CSS_SELECTOR, ".jp-OutputArea-output img")
    assert len(pictures) >= 4
    assert all(browser.execute_script("return arguments[0].naturalWidth", picture) > 300 for picture in pictures)
    heading = next(each for each in browser.find_elements(By.CSS_SELECTOR, ".jp-MarkdownCell h2")
                   if each.text.startswith("Side by side"))
    # The whole width for the notebook.
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.CONTROL, "b")
    time.sleep(1)
    browser.execute_script("arguments[0].scrollIntoView()", heading)
    time.sleep(1)
    _shot(browser, "jupyterlab-explore")

    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.CONTROL, "s")
    file = tmp_path / "notebooks" / "explore.ipynb"
    saved = _until(lambda: [output for cell in json.loads(file.read_text())["cells"]
                            for output in cell.get("outputs", [])], "the saving")
    assert not any(output["output_type"] == "error" for output in saved)
