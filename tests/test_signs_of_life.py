"""Something moves while a person waits: during the installation, and at the end of it all stands what to type next."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import nbformat
from click.testing import CliRunner
from fake_paper import FINISH, OPEN
from helpers import slow
from nbclient import NotebookClient

from layerlab import load_paper
from layerlab.base.provenance import machine_name, processor_of
from layerlab.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
INSTALLING = ROOT / "layerlab" / "cli" / "installing.py"


def test_a_silent_command_is_seen_to_be_at_work_every_second(tmp_path):
    ours, theirs = pty.openpty()
    waits = "import time; time.sleep(3.5); exit(7)"
    command = [sys.executable, "-S", INSTALLING, tmp_path, sys.executable, "-c", waits]
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 1024)
        except OSError:  # the terminal is closed
            break
        if not part:
            break
        said += part
    assert process.wait() == 7
    assert said.count(b"installing: ") >= 3
    # Nothing is left of it.
    assert said.endswith(b"\r\x1b[K")


def test_a_log_is_not_filled_and_errors_pass(tmp_path):
    fails = "import sys; sys.exit('no such package')"
    command = [sys.executable, "-S", INSTALLING, tmp_path, sys.executable, "-c", fails]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "no such package\n")


def test_make_names_the_size_before_it_installs():
    done = subprocess.run(["make", "-n", "-B", ".venv/.ready"], cwd=ROOT, capture_output=True, text=True, check=True)
    said, installs = done.stdout.index("about 7 GB"), done.stdout.index("pip install")
    assert said < installs
    for line in done.stdout.splitlines():
        assert "installing.py" in line or ("pip install" not in line and "-m venv" not in line)


def test_a_notebook_s_first_cell_counts_its_seconds_until_it_has_loaded():
    shown: list[str] = []

    class Watched(NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if msg["msg_type"] in ("display_data", "update_display_data"):
                shown.append(msg["content"]["data"]["text/plain"])
            return super().process_message(msg, cell, cell_index)

    cell = nbformat.v4.new_code_cell
    book = nbformat.v4.new_notebook(cells=[cell("from layerlab import Table\nimport time\ntime.sleep(2.5)"),
                                           cell("from layerlab import Estimate\nimport time\ntime.sleep(1.2)")])
    Watched(book, kernel_name="python3").execute()
    *moving, last = shown
    assert len(moving) >= 3
    assert all(text.startswith("loading: ") for text in moving)
    # Nothing is left of it, and the second cell has none.
    assert last == ""
    assert [len(each.outputs) for each in book.cells] == [1, 0]


def test_reproduce_ends_with_a_sentence_for_each_paper_and_what_to_type_next(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    fake(OPEN, "study.claim('gain', [2.0], seeds=[0], conditions={'dataset': 'digits'})", FINISH)
    with (load_paper("fake").folder / "paper.toml").open("a") as stream:
        stream.write("\n[headline]\nmethod = 'Fake'\naccuracy = 'gain'\n")
    result = CliRunner().invoke(main, ["reproduce", "fake"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(result.stdout.split())
    said = ("Fake against plain training: 2.00 points more accuracy; the quick profile on digits, 1 seed, "
            f"{processor_of(machine_name())}, which settles nothing.")
    assert said in text
    assert text.index(said) < text.index("What to type next: ") < text.index("scoreboard every claim, published")
    assert "Table I" not in text
    longer, profile = next(each for each in load_paper("fake").profiles.items() if each[0] != "quick")
    assert f"reproduce fake --profile {longer}\n      {profile.description}" in result.stdout
    assert " publish " not in text


@slow
def test_after_a_longer_profile_what_to_type_next_is_its_page(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake(OPEN, "study.claim('gain', [2.0], seeds=[0], conditions={'dataset': 'digits'})", FINISH)
    with (load_paper("fake").folder / "paper.toml").open("a") as stream:
        stream.write("\n[headline]\nmethod = 'Fake'\naccuracy = 'gain'\n")
    longer = next(name for name in load_paper("fake").profiles if name != "quick")
    done = CliRunner().invoke(main, ["reproduce", "fake", "--profile", longer]).stdout
    assert f"publish {Path('home/runs/fake', longer)}\n" in done
    assert " reproduce " not in done
