"""Runners and kernels that are forked from a warm server: as new ones, and nothing of one notebook reaches the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
import venv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from helpers import slow, write_notebook

from layerlab.base.provenance import package_folders
from layerlab.runs.batch.local import run_batch
from layerlab.runs.batch.one_job import Outcome, Start, Stop, run_job
from layerlab.runs.batch.runners import SERVER_GB, Runner, Runners, imported, started_anew
from layerlab.runs.jobs import Job, notebook_job
from layerlab.show.progress import VARIABLE

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux alone")
# Whether a kernel was forked behind the server's imports, and what it is like otherwise.
WARM = "import sys; warm = {'torch', 'matplotlib.pyplot', 'seaborn'} <= set(sys.modules)\n"
LOOK = WARM + """
import json, logging, os, resource, signal, threading, warnings
import matplotlib.pyplot, numpy, seaborn, torch
told = {
    "warm": warm, "path": sys.path, "cwd": os.getcwd(), "argv": (sys.argv[:1], sys.orig_argv[1:3]), "main": __name__,
    **{f"${name}": value for name, value in os.environ.items() if name not in (
        "JPY_PARENT_PID", "LAYERLAB_PROGRESS", "LAYERLAB_RERUN")},
    "signals": {each.name: str(signal.getsignal(each)) for each in signal.Signals},
    "mask": str(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "umask": os.umask(0o22),
    "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if "RLIMIT_" in name},
    "threads": sorted(type(each).__name__ + each.name.strip("-0123456789") for each in threading.enumerate()),
    "group": os.getpgid(0) == os.getpid(), "parent": os.getppid() == int(os.environ["JPY_PARENT_PID"]),
    "root": [logging.getLogger().level, str(logging.getLogger().handlers)], "input": os.read(0, 1).decode(),
    "inherited": [each for each in os.listdir("/proc/self/fd")
                  if int(each) > 2 and os.path.exists(f"/proc/self/fd/{each}") and os.get_inheritable(int(each))],
    "files": sorted(file for each in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{each}")
                    and os.path.isfile(file := os.readlink(f"/proc/self/fd/{each}")) and not file.endswith("/log")),
    "drawing": str(matplotlib.rcParams), "printing": str(numpy.get_printoptions()),
    "computing": [torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled(),
                  torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled, str(torch.get_default_dtype())],
    # Their order is that of the imports.
    "filters": sorted(map(str, warnings.filters)),
    "of libraries": [str(each) for each in warnings.filters if each[2].__module__ != "builtins"],
}
"""
IMPORTS = ["layerlab", "torch", "matplotlib", "seaborn"]


@pytest.fixture
def notebook(tmp_path: Path) -> Callable[..., Job]:
    """Write a notebook of the given cells; gives its job."""

    def write(name: str, *cells: str) -> Job:
        file = tmp_path / "home" / "notebooks" / f"{name}.ipynb"
        return notebook_job(write_notebook(file, [nbformat.v4.new_code_cell(cell) for cell in cells]))

    return write


def _start(folder: Path) -> tuple[dict[str, str], Path]:
    """Variables and the log of a runner."""
    folder.mkdir(parents=True)
    return {VARIABLE: str(folder / "events")}, folder / "log"


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Outcome]]:
    """Run a job in a kernel that is forked from a server that has imported everything."""
    folder = tmp_path_factory.mktemp("warmed")
    # A server is for one environment, and pytest changes its own from test to test.
    environment = {"OMP_NUM_THREADS": "2", "LAYERLAB_HOME": str(folder / "home"),
                   "LAYERLAB_CACHE": str(folder / "cache"), "PYTEST_CURRENT_TEST": ""}
    write = nbformat.v4.new_code_cell(WARM + f"open({str(folder / 'warm')!r}, 'w').write(str(warm))")

    with Runners(IMPORTS) as runners:
        def run(job: Job, start: Start = runners.start) -> Outcome:
            return run_job(job, environment, lambda event: None, Stop(), rerun=uuid.uuid4().hex, start=start, retries=0)

        for _ in range(50):
            warms = notebook_job(write_notebook(folder / "home" / "notebooks" / "warms.ipynb", [write]))
            assert run(warms).status == "finished"
            if (folder / "warm").read_text() == "True":
                break
        else:
            pytest.fail("the server has imported nothing")
        yield run


def test_a_forked_kernel_is_as_one_that_was_started_anew(notebook, warmed, tmp_path):
    job = notebook("looks", LOOK, f"open({str(tmp_path / 'told')!r}, 'w').write(json.dumps(told))")
    told = []
    for start in ({}, {"start": started_anew}):
        outcome = warmed(job, **start)
        assert outcome.status == "finished", outcome
        told.append(json.loads((tmp_path / "told").read_text()))
    warm, cold = told
    assert (warm.pop("warm"), cold.pop("warm")) == (True, False)
    # A library that the notebook does not import, and the server does, has some for its own warnings.
    more = set(warm.pop("of libraries")) - set(cold.pop("of libraries"))
    warm["filters"] = [each for each in warm["filters"] if each not in more]
    # Of Intel's library and torch's compiler, which what a kernel need not import has set.
    both = {name: (warm.get(name), cold.get(name)) for name in warm | cold
            if not name.startswith(("$KMP_", "$TORCHINDUCTOR_"))}
    assert {name: values for name, values in both.items() if values[0] != values[1]} == {}


def test_nothing_of_one_notebook_reaches_the_next(notebook, warmed, tmp_path):
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
    jobs = [notebook("first", log, draw, change), *(notebook(name, log, look, draw) for name in ("second", "third"))]
    assert [warmed(job).status for job in jobs] == ["finished"] * 3
    drawn = (tmp_path / "log").read_text().split()
    assert len(drawn) == len(set(drawn)) == 12


def test_figures_and_what_is_left_open_arrive(notebook, warmed, tmp_path):
    job = notebook("draws", "import atexit, matplotlib.pyplot as plt\nplt.plot([1, 2])",
                   "import sys, types\nsys.modules['mine'] = mine = types.ModuleType('mine')\n"
                   f"mine.left = open({str(tmp_path / 'left')!r}, 'w'); mine.left.write('open')",
                   f"atexit.register(lambda: open({str(tmp_path / 'exit')!r}, 'w').write('done'))")
    assert warmed(job).status == "finished"
    outputs = nbformat.read(job.file, 4).cells[0].outputs
    assert ["image/png" in output.data for output in outputs if output.output_type == "display_data"] == [True]
    assert (tmp_path / "left").read_text() == "open"
    assert (tmp_path / "exit").read_text() == "done"


def test_a_module_in_the_notebook_s_folder_stands_before_one_that_the_server_has_imported(notebook, warmed):
    job = notebook("shadows", "import seaborn\nassert seaborn.mine")
    (Path(job.notebook).parent / "seaborn.py").write_text("mine = True")
    assert warmed(job).status == "finished"


@slow
def test_a_kernel_of_another_virtual_environment_is_one(notebook, warmed, tmp_path, monkeypatch):
    place = tmp_path / "other"
    venv.create(place, symlinks=True)
    (packages,) = place.glob("lib/*/site-packages")
    # It sees the same packages, and is another environment all the same.
    (packages / "ours.pth").write_text("\n".join(package_folders()))
    spec = {"argv": [str(place / "bin/python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Other", "language": "python"}
    file = tmp_path / "jupyter" / "kernels" / "other" / "kernel.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    job = notebook("elsewhere", f"import sys\nassert sys.prefix == {str(place)!r}, sys.prefix")
    assert warmed(replace(job, kernel="other")).status == "finished"


@slow
def test_a_warning_that_an_import_tells_is_shown_by_each_notebook(notebook, tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "seaborn.py").write_text("import warnings\nwarnings.warn('mind the gap')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    started = []
    with Runners(["seaborn"]) as runners:
        def start(*arguments: Any) -> tuple[Runner, int]:
            found = runners.start(*arguments)
            started.append(found[0])
            return found

        for _ in range(50):
            job = notebook("warned", "import seaborn")
            outcome = run_job(job, {}, lambda event: None, Stop(), rerun=uuid.uuid4().hex, start=start)
            assert outcome.status == "finished"
            assert "mind the gap" in nbformat.read(job.file, 4).cells[0].outputs[0].text
            if isinstance(started[-1], subprocess.Popen):
                break
        else:
            pytest.fail("the server has not looked at seaborn")


def test_a_notebook_uses_the_core_as_it_is_when_the_notebook_starts(notebook, tmp_path):
    job = notebook("plain", "1 + 1", "import torch")
    assert [outcome.status for outcome in run_batch([job])] == ["finished"]
    used = json.loads((Path(job.folder) / "study.json").read_text())["used"]["files"]
    assert not [file for file in used if "/layerlab/runs/" in file], used


def test_the_server_has_one_thread_when_it_forks_holds_nothing_open_and_takes_what_a_batch_reserves(tmp_path):
    script = ("import os, psutil, layerlab.runs.batch.warm_server as server\n"
              "os.environ.update(server.SINGLE)\n"
              "for _ in server._steps(list(server.ALONG)): pass\n"
              "memory = psutil.Process().memory_info()\n"
              "print(len(os.listdir('/proc/self/task')), [os.readlink(f'/proc/self/fd/{each}') for each in range(3, 64)"
              " if os.path.exists(f'/proc/self/fd/{each}')], memory.rss - memory.shared)")
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    *state, memory = told.stdout.split()
    assert state == ["1", "[]"], told.stderr
    assert SERVER_GB / 2 < int(memory) / 1e9 < SERVER_GB


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


def test_what_is_installed_meanwhile_is_imported_by_another_server(tmp_path, monkeypatch):
    monkeypatch.setattr("site.USER_SITE", str(tmp_path))
    servers = []
    with Runners() as runners:
        for name in ("first", "again", "other"):
            runner, channel = runners.start(*_start(tmp_path / "runs" / name))
            servers.append(psutil.Process(runner.pid).ppid())
            os.killpg(runner.pid, signal.SIGKILL)
            runner.wait(10)
            os.close(channel)
            if name == "again":
                (tmp_path / "new-1.0.dist-info").mkdir()
    assert servers[0] == servers[1] != servers[2]


def test_a_server_goes_with_a_batch_that_is_killed(tmp_path):
    script = ("import sys, time\nfrom pathlib import Path\nfrom layerlab.runs.batch.runners import Runners\n"
              f"runner, _ = Runners().start({{{VARIABLE!r}: sys.argv[1]}}, Path(sys.argv[2]))\n"
              "print(runner.pid, flush=True)\ntime.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "events"), str(tmp_path / "log")],
                          stdout=subprocess.PIPE, text=True) as batch:
        runner = psutil.Process(int(batch.stdout.readline()))
        server = runner.parent()
        assert server.ppid() == batch.pid
        batch.kill()
    # What is no child of this one is waited for until it is gone.
    assert len(psutil.wait_procs([server, runner], timeout=60)[0]) == 2


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
