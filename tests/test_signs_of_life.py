"""Something moves while a person waits: during the installation, and at the end of it all stands what to type next."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

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
