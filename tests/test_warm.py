"""Runners and kernels that are forked from a warm server: as new ones, and nothing of one notebook reaches the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest

from layerlab.runs.batch.local import run_batch
from layerlab.runs.batch.one_job import Stop, run_job
from layerlab.runs.batch.runners import Runners, imported, started_anew
from layerlab.runs.jobs import Job, notebook_job
from layerlab.show.progress import VARIABLE

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux alone")
# What a kernel is like, as one that was started anew would tell it.
LOOK = """
import json, logging, os, signal, sys, threading, warnings
import matplotlib, numpy, torch
told = {
    "path": sys.path, "cwd": os.getcwd(), "threads": torch.get_num_threads(), "argv": sys.argv[:1],
    "backend": matplotlib.get_backend(), "main": __name__,
    # But for those of the libraries that are imported, which are about their own warnings.
    "filters": [str(each) for each in warnings.filters if each[2].__module__ == "builtins"],
    **{f"${name}": value for name, value in os.environ.items() if name not in ("JPY_PARENT_PID", "LAYERLAB_PROGRESS")},
    "signals": [str(signal.getsignal(each)) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)],
    "names": sorted(each.name for each in threading.enumerate()), "group": os.getpgid(0) == os.getpid(),
    "parent": os.getppid() == int(os.environ["JPY_PARENT_PID"]), "root": logging.getLogger().level,
    "input": os.read(0, 1).decode(),
}
"""


@pytest.fixture
def notebook(tmp_path: Path) -> Callable[..., Job]:
    """Write a notebook of the given cells; gives its job."""

    def write(name: str, *cells: str) -> Job:
        book = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
        file = tmp_path / "home" / "notebooks" / f"{name}.ipynb"
        file.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(book, file)
        return notebook_job(file)

    return write


def _start(folder: Path) -> tuple[dict[str, str], Path]:
    """Variables and the log of a runner."""
    folder.mkdir()
    return {VARIABLE: str(folder / "events")}, folder / "log"


def test_a_forked_kernel_is_as_one_that_was_started_anew(notebook, tmp_path):
    job = notebook("looks", LOOK, f"open({str(tmp_path / 'told')!r}, 'w').write(json.dumps(told))")
    environment = {"OMP_NUM_THREADS": "2", "LAYERLAB_HOME": str(tmp_path / "home")}
    told = []
    with Runners(["torch", "matplotlib"]) as runners:
        for start in (runners.start, started_anew):
            outcome = run_job(job, environment, lambda event: None, Stop(), since=time.time(), start=start)
            assert outcome.status == "finished", outcome
            told.append(json.loads((tmp_path / "told").read_text()))
    warm, cold = told
    # Of Intel's library, which what a kernel need not import has set.
    both = {name: (warm.get(name), cold.get(name)) for name in warm | cold if not name.startswith("$KMP_")}
    assert {name: values for name, values in both.items() if values[0] != values[1]} == {}


def test_nothing_of_one_notebook_reaches_the_next(notebook, tmp_path):
    change = ("import os, sys, random, numpy, torch, layerlab, pandas\n"
              "pandas.DataFrame = layerlab.fit = None\nos.environ['MINE'] = '1'\nsys.path.append('/mine')\n"
              "torch.manual_seed(3)\ntorch.set_num_threads(1)\nsys.modules['mine'] = sys")
    draw = ("import random, numpy, torch, uuid, mlflow\n"
            "drawn = random.random(), numpy.random.random(), torch.rand(1).item(), uuid.uuid4()\n"
            "open(log, 'a').write(' '.join(map(str, drawn)) + '\\n')")
    look = ("import os, sys, torch, layerlab, pandas\n"
            "assert pandas.DataFrame and layerlab.fit and 'MINE' not in os.environ and '/mine' not in sys.path\n"
            "assert 'mine' not in sys.modules and torch.initial_seed() != 3")
    log = f"log = {str(tmp_path / 'log')!r}"
    # The first may import what it draws with itself, as the server has not yet.
    jobs = [notebook("first", log, draw, change), *(notebook(name, log, look, draw) for name in ("second", "third"))]
    assert [outcome.status for outcome in run_batch(jobs, workers=1)] == ["finished"] * 3
    drawn = (tmp_path / "log").read_text().split()
    assert len(drawn) == len(set(drawn)) == 12


def test_figures_and_what_is_left_open_arrive(notebook, tmp_path):
    job = notebook("draws", "import atexit, matplotlib.pyplot as plt\nplt.plot([1, 2])",
                   "import sys, types\nsys.modules['mine'] = mine = types.ModuleType('mine')\n"
                   f"mine.left = open({str(tmp_path / 'left')!r}, 'w'); mine.left.write('open')",
                   f"atexit.register(lambda: open({str(tmp_path / 'exit')!r}, 'w').write('done'))")
    assert [outcome.status for outcome in run_batch([job])] == ["finished"]
    outputs = nbformat.read(job.file, 4).cells[0].outputs
    assert ["image/png" in output.data for output in outputs if output.output_type == "display_data"] == [True]
    assert (tmp_path / "left").read_text() == "open"
    assert (tmp_path / "exit").read_text() == "done"


def test_a_notebook_uses_the_core_as_it_is_when_the_notebook_starts(notebook, tmp_path):
    job = notebook("plain", "1 + 1", "import torch")
    assert [outcome.status for outcome in run_batch([job])] == ["finished"]
    used = json.loads((Path(job.folder) / "study.json").read_text())["used"]["files"]
    assert not [file for file in used if "/layerlab/runs/" in file], used


def test_the_server_has_one_thread_when_it_forks_and_holds_nothing_open(tmp_path):
    script = ("import os, layerlab.runs.batch.warm_server as server\n"
              "os.environ.update(server.SINGLE)\n"
              "for _ in server._steps(list(server.ALONG)): pass\n"
              "print(len(os.listdir('/proc/self/task')), [os.readlink(f'/proc/self/fd/{each}') for each in range(3, 64)"
              " if os.path.exists(f'/proc/self/fd/{each}')])")
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert told.stdout.split() == ["1", "[]"], told.stderr


def test_a_runner_lives_on_when_its_server_is_killed_and_the_next_has_another(tmp_path):
    with Runners() as runners:
        runner, channel = runners.start(*_start(tmp_path / "first"))
        (server,) = psutil.Process(runner.pid).parents()[:1]
        assert "layerlab.runs.batch.warm_server" in server.cmdline()
        server.kill()
        server.wait(10)
        assert runner.poll() is None
        second, other = runners.start(*_start(tmp_path / "other"))
        assert "layerlab.runs.batch.warm_server" in psutil.Process(second.pid).parents()[0].cmdline()
        for each in (runner, second):
            os.killpg(each.pid, signal.SIGKILL)
        assert second.wait(10) == -signal.SIGKILL
        # Who knew its status is no more.
        assert runner.wait(10) == 1
        for descriptor in (channel, other):
            os.close(descriptor)


def test_a_runner_that_could_not_be_labelled_is_a_new_python(tmp_path):
    with Runners() as runners:
        started = [runners.start(*_start(tmp_path / name)) for name in ("one", "three")]
        assert [isinstance(runner, subprocess.Popen) for runner, _ in started] == [False, True]
        for runner, channel in started:
            os.killpg(runner.pid, signal.SIGKILL)
            assert runner.wait(10) == -signal.SIGKILL
            os.close(channel)


def test_the_modules_of_a_notebook_are_those_that_it_imports_at_the_beginning_of_a_line(notebook):
    job = notebook("imports", "import os, numpy as np, torch.nn\n  from pandas.api import types", "'import seaborn'")
    assert imported([Path(job.notebook), Path("nowhere")]) == ["numpy", "os", "pandas", "torch"]


def test_a_killed_kernel_of_a_warm_runner_is_told_apart_from_an_error(notebook):
    job = notebook("dies", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    (outcome,) = run_batch([job], retries=0)
    assert outcome.status == "failed"
    assert "lost its kernel" in outcome.message or "died" in outcome.message
