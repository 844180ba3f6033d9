"""Batches: several notebooks at once, nothing finished run twice, nothing lost when something dies."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import nbformat
import psutil
import pytest
from click.testing import CliRunner
from fake_paper import FINISH, OPEN, TRAIN
from helpers import free_port, slow, small_disk, small_memory, write_notebook

from layerlab import LayerlabError, Study
from layerlab.base.usage import note_data
from layerlab.cli.main import main
from layerlab.runs import tracking
from layerlab.runs.batch.local import preview, run_batch
from layerlab.runs.batch.machine import Machine
from layerlab.runs.batch.plans import Plan, jobs_of, read_plan
from layerlab.runs.jobs import Job, notebook_job, paper_job
from layerlab.show.progress import Board

COUNT = "open(log, 'a').write(name + '\\n')"


@pytest.fixture
def notebook(tmp_path: Path) -> Callable[..., Job]:
    """Write a notebook of one's own with the given cells, the first of which notes that it ran; gives its job."""

    def write(name: str, *cells: str) -> Job:
        parameters = nbformat.v4.new_code_cell(
            f"name = {name!r}  # its name\nlog = {str(tmp_path / 'log')!r}  # where it notes that it ran\n"
            "size = 1  # a number\nseed = 0  # another",
            metadata={"tags": ["parameters"]})
        file = tmp_path / "home" / "notebooks" / f"{name}.ipynb"
        return notebook_job(write_notebook(
            file, [parameters, *(nbformat.v4.new_code_cell(cell) for cell in (COUNT, *cells))]))

    return write


@pytest.fixture
def ran(tmp_path: Path) -> Callable[[], list[str]]:
    """Names of the notebooks that ran, in their order."""
    return lambda: (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `layerlab …` as a process; what is left of it is killed at the end."""
    started = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-m", "layerlab.cli", *map(str, arguments)], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                   cwd=tmp_path)
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def _statuses(jobs: list[Job], **options: object) -> list[str]:
    return [outcome.status for outcome in run_batch(jobs, **options)]


def _processes(home: Path) -> dict[int, str]:
    """Runners and kernels that work in a workbook: process number → command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"LAYERLAB_HOME={home}\0" in (entry / "environ").read_text(errors="replace"):
                words = (entry / "cmdline").read_text().replace("\0", " ")
                if "ipykernel" in words or "layerlab.runs.batch.notebook_process" in words:
                    found[int(entry.name)] = words
    return found


def _runners(processes: Mapping[int, str]) -> list[int]:
    return [number for number, words in processes.items() if "layerlab.runs.batch.notebook_process" in words]


def _wait(what: Callable[[], object], seconds: float = 60) -> object:
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def _runner_and_kernel(home: Path) -> tuple[int, int]:
    """The process numbers of the one runner and its kernel, once both are there."""
    def alone() -> tuple[int, int] | None:
        # In one look: between its fork and its exec a process has another one's name.
        found = _processes(home)
        runners = _runners(found)
        kernels = [number for number in found if number not in runners]
        return (runners[0], kernels[0]) if len(runners) == len(kernels) == 1 else None

    return cast(tuple[int, int], _wait(alone))


# ------------------------------------------------------------------------------------------- plans


def test_a_plan_is_every_combination_once(fake, notebook, tmp_path):
    fake(OPEN, FINISH)
    mine = Path(notebook("mine").notebook)
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"""
jobs:
  - paper: fake
    grid: {{epochs: [1, 2], pause: [0.0, 0.5]}}
  - paper: [fake]
    parameters: {{epochs: 2, pause: 0.5}}
  - notebook: {os.path.relpath(mine, tmp_path)}
    seeds: [3, 4]
    parameters: {{size: 7}}
time_limit: 5
""")
    jobs = jobs_of(read_plan(plan), tmp_path)
    assert [job.changed for job in jobs] == [
        {"epochs": 1}, {"epochs": 1, "pause": 0.5}, {"epochs": 2}, {"epochs": 2, "pause": 0.5},
        {"size": 7, "seed": 3}, {"size": 7, "seed": 4},
    ]
    assert len({job.folder for job in jobs}) == 6
    assert read_plan(plan).time_limit == 5


def test_every_mistake_of_a_plan_is_reported_before_anything_runs(fake, tmp_path, ran):
    fake(OPEN, FINISH)
    plan = tmp_path / "plan.yaml"
    plan.write_text("""
- paper: fke
- paper: fake
  profile: [quick, slow]
  parameters: {epoch: 1}
- notebook: nowhere.ipynb
""")
    result = CliRunner().invoke(main, ["batch", str(plan)])
    assert result.exit_code == 2
    for part in ("Unknown strategy 'fke'. Did you mean 'fake'?", "'epoch'. Did you mean 'epochs'?", "profile 'slow'",
                 "no notebook", "nothing was run"):
        assert part in " ".join(result.output.split()), part
    plan.write_text("""
jobs:
  - {paper: fake, notebook: a.ipynb}
  - {paper: fake, grid: {epochs: []}}
  - {papers: fake}
wrokers: 2
""")
    with pytest.raises(LayerlabError) as error:
        read_plan(plan)
    for part in ("either a paper or a notebook", "gives 'epochs' no value", "'jobs.2.papers'", "'wrokers'"):
        assert part in str(error.value), part
    assert not (tmp_path / "home" / "runs").exists()


@pytest.mark.parametrize(("text", "message"), [
    ("jobs: [", "is no YAML"), ("3", "has no jobs"), (None, "cannot be read"), ("jobs: []", "at least 1 item"),
    ("jobs: [{paper: a}]\ntime_limit: .inf", "'time_limit' should be a finite number"),
    ("jobs: [{paper: a}]\ntime_limit: .nan", "'time_limit' should be"),
    ("jobs: [{paper: a}]\nretries: 1\njobs: [{paper: b}]", r"plan.yaml gives 'jobs' twice \(line 3\); keep one"),
    ("- {paper: a, grid: {x: [1], 'x': [2]}}", "gives 'x' twice"),
    ("- {paper: a, parameters: &p {x: *p}}", r"contains itself: \*p \(line 1\); write out"),
    ("- &all [*all]", "contains itself"),
    (f"- {{paper: a, parameters: {{x: {'[' * 60}{']' * 60}}}}}", "nests more than 50 lists"),
    (f"- {{paper: a, parameters: {{x: [{'0,' * 100_001}]}}}}", "stands for more than 100,000 values"),
    ("- &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"- &{b} [{','.join([f'*{a}'] * 10)}]\n"
                                              for a, b in itertools.pairwise("abcdefgh")), "more than 100,000 values"),
    (f"# {'x' * 4_000_000}", "is longer than 4,000,000 characters"),
    ("- {paper: a, parameters: {x: !!python/name:os.system }}", r"has the tag !!python/name:os.system \(line 1\)"),
    ("- {paper: a, parameters: {x: !!set {1}}}", "has the tag !!set"),
    ("- {paper: a, parameters: {[1, 2]: 3}}", "a list or a mapping as a key"),
])
def test_what_is_no_plan(tmp_path, text, message):
    file = tmp_path / "plan.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LayerlabError, match=message):
        read_plan(file)


def test_a_plan_of_too_many_jobs_is_refused_before_they_are_written_out(tmp_path):
    entry = {"paper": ["lars-skip"], "grid": {name: list(range(1000)) for name in ("alpha", "epochs", "lr")}}
    with pytest.raises(LayerlabError, match="stands for 1,000,000,000 jobs, more than 10,000; split it"):
        jobs_of(Plan(jobs=[entry]), tmp_path)


@pytest.mark.parametrize(("options", "said"), [
    (("--time-limit", "inf"), "inf is no time"), (("--time-limit", "nan"), "nan is no time"),
    (("-p", "a=1", "-p", "a=2"), "'a' is given twice"), (("-p", "a={x: 1, x: 2}"), "Parameter 'a' gives 'x' twice"),
    (("-p", "a=&a [*a]"), "Parameter 'a' contains itself"),
])
def test_what_no_option_takes(options, said):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["reproduce", "lars-skip", "--dry-run", *options])
    assert result.exit_code == 2
    assert said in result.output


def test_a_notebook_gets_its_parameters_as_they_were_written(notebook, tmp_path):
    kept = tmp_path / "kept"
    job = notebook("keeps", f"open({str(kept)!r}, 'w').write(repr((size, seed)))")
    plan = tmp_path / "plan.yaml"
    plan.write_text("- notebook: home/notebooks/keeps.ipynb\n"
                    "  parameters: {size: {1: a, null: 2024-01-01, '1': .inf}, seed: [12:30, 010, 1_000]}\n")
    (written,) = jobs_of(read_plan(plan), tmp_path)
    other = notebook_job(job.notebook, {"size": {"1": "a"}})
    assert len({written.folder, other.folder, notebook_job(job.notebook, {"size": {1: "a"}}).folder}) == 3
    assert _statuses([written]) == ["finished"]
    assert kept.read_text() == repr(({1: "a", None: "2024-01-01", "1": float("inf")}, ["12:30", 10, "1_000"]))
    assert _statuses([written]) == ["done before"]


# ------------------------------------------------------------------------------------------- outcomes


def test_failures_are_told_from_successes_and_the_others_go_on(notebook, ran, tmp_path):
    jobs = [
        notebook("good", "1 + 1"),
        notebook("leaves", "import sys; sys.exit(0)", "2"),
        notebook("breaks", "raise ValueError('something broke')"),
        notebook("dies", "import os; os.kill(os.getpid(), 9)"),
        notebook("hangs", "import time; time.sleep(600)"),
    ]
    outcomes = [*run_batch(jobs[:4], retries=1), *run_batch(jobs[4:], time_limit=10)]
    assert [outcome.status for outcome in outcomes] == ["finished", *["failed"] * 4]
    for outcome, part in zip(outcomes[1:], ("SystemExit", "something broke", "died 2 times", "ran out of its time"),
                             strict=True):
        assert part in outcome.message
    # A dead kernel is tried again, an error in a cell is not.
    assert sorted(ran()) == ["breaks", "dies", "dies", "good", "hangs", "leaves"]
    assert [job.file.exists() for job in jobs] == [True, *[False] * 4]
    assert all(job.failed.exists() for job in jobs[1:])
    assert "something broke" in jobs[2].failed.read_text()
    assert not _processes(tmp_path / "home")


def test_what_is_finished_is_not_run_again_unless_asked_or_changed(notebook, ran):
    job = notebook("good", "1 + 1")
    assert _statuses([job]) == ["finished"]
    assert _statuses([job]) == ["done before"]
    assert _statuses([job], rerun=True) == ["finished"]
    assert ran() == ["good"] * 2
    changed = notebook("good", "1 + 2")
    assert changed.folder == job.folder
    assert _statuses([changed]) == ["finished"]
    assert ran() == ["good"] * 3


def test_a_finished_study_counts_until_its_data_or_its_plugin_change(fake, tmp_path, monkeypatch):
    site = fake(OPEN, FINISH)
    data = tmp_path / "images"
    data.mkdir()
    (data / "train.parquet").write_bytes(b"1")
    job = paper_job("fake")
    study = Study("fake", output=job.folder)
    note_data(str(data), "")
    assert not job.is_done()
    study.finish()
    assert job.is_done()
    assert not job.is_done(rerun="a batch that does everything anew")
    (data / "train.parquet").write_bytes(b"22")
    assert not job.is_done()
    (data / "train.parquet").write_bytes(b"1")
    os.utime(data / "train.parquet", ns=(0, 0))
    assert not job.is_done()
    with (site / "fake_plugin" / "__init__.py").open("a") as source:
        source.write("\n# a comment\n")
    assert paper_job("fake").basis == job.basis
    with (site / "fake_plugin" / "__init__.py").open("a") as source:
        source.write("\nRULE = 2\n")
    assert paper_job("fake").basis != job.basis


def test_a_notebook_whose_name_a_kill_withheld_gets_it_from_a_batch_and_not_from_a_look(fake, tmp_path):
    fake(OPEN, FINISH)
    job = paper_job("fake")
    Study("fake", output=job.folder).finish()
    job.partial.write_text("{}")
    assert [status for _, status, _ in preview([job])] == ["done before"]
    assert not job.file.exists()
    assert [outcome.status for outcome in run_batch([job])] == ["done before"]
    assert job.file.exists()
    assert not job.partial.exists()


@slow
def test_the_command_names_each_failure_and_how_to_repeat_it(notebook, command, tmp_path):
    notebook("good", "1 + 1")
    notebook("breaks", "raise ValueError('something broke')")
    plan = tmp_path / "plan.yaml"
    plan.write_text("- {notebook: home/notebooks/good.ipynb}\n"
                    "- {notebook: home/notebooks/breaks.ipynb, parameters: {size: 2}}\n")
    dry = command("batch", plan, "--dry-run").communicate()[0]
    assert [line.split() for line in dry.splitlines()[1:]] == [["good", "runs", "never", "run"],
                                                               ["breaks", "size=2", "runs", "never", "run"]]
    process = command("batch", plan)
    text = process.communicate()[0]
    assert process.returncode == 1
    *_, failure, again = text.strip().splitlines()
    assert "something broke" in failure
    assert again.split() == ["again:", "layerlab", "reproduce", str(tmp_path / "home/notebooks/breaks.ipynb"), "-p",
                             "size=2"]
    assert "good: started" in text
    dry = command("batch", plan, "--dry-run").communicate()[0]
    assert "done before" in dry.splitlines()[1]
    assert " s" in dry.splitlines()[1]


def test_what_cells_write_to_the_standard_streams_of_the_process_is_no_outcome(notebook, ran):
    jobs = [
        notebook("prints", "import os; os.system('printf 50%; printf 50% >&2')"),
        notebook("lies", "import os; os.write(1, b'{\"status\": \"failed\", \"message\": \"a lie\"}\\n')"),
        notebook("good", "1 + 1"),
    ]
    assert _statuses(jobs, workers=1) == ["finished"] * 3
    assert sorted(ran()) == ["good", "lies", "prints"]


LEAVES_A_CHILD = """
import os, subprocess, time
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
    os._exit(0)
subprocess.Popen(["sleep", "600"], start_new_session=True)
"""


def _asleep(variable: str, value: str) -> list[str]:
    """Command lines of processes that have a variable in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{variable}={value}\0" in (entry / "environ").read_text(errors="replace"):
                found.append((entry / "cmdline").read_text())
    return found


@pytest.mark.parametrize("ending", [pytest.param("1", marks=slow), "time.sleep(600)", "1 / 0"])
def test_what_a_cell_starts_ends_with_its_job(notebook, monkeypatch, tmp_path, ending):
    monkeypatch.setenv("LAYERLAB_TEST_MARK", str(tmp_path))
    job = notebook("leaves", LEAVES_A_CHILD, ending)
    (outcome,) = run_batch([job], time_limit=8 if "sleep" in ending else None, retries=0)
    assert outcome.status == ("finished" if ending == "1" else "failed")
    assert _asleep("LAYERLAB_TEST_MARK", str(tmp_path)) == []


def test_a_batch_that_nobody_hears_any_more_goes_on_where_hanging_up_is_ignored(notebook, command, ran, tmp_path):
    notebook("slow", "import time; time.sleep(3)")
    ignored = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)]
    try:
        process = command("reproduce", tmp_path / "home" / "notebooks" / "slow.ipynb")
    finally:
        for number, before in zip((signal.SIGHUP, signal.SIGINT), ignored, strict=True):
            signal.signal(number, before)
    _wait(ran)
    os.kill(process.pid, signal.SIGHUP)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_folder_that_cannot_be_written_fails_its_notebook_only(notebook, tmp_path):
    with small_disk(tmp_path / "full", "64k") as full:
        job = notebook("talks", "print('x' * 10**6)")
        full_job = Job(job.notebook, str(full / "out"), basis=job.basis)
        none = Job(job.notebook, "/dev/null/out", basis=job.basis)
        outcomes = run_batch([full_job, none, job], retries=0)
        assert [outcome.status for outcome in outcomes] == ["failed", "refused", "finished"]
        assert "No space left" in outcomes[0].message
        assert "/dev/null/out cannot be written" in outcomes[1].message
        assert not full_job.is_done()


# ------------------------------------------------------------------------------------------- stopping, killing


@slow
def test_ctrl_c_stops_cleanly_and_a_second_one_at_once(fake, command, tmp_path):
    fake(OPEN, TRAIN, "import time; time.sleep(5 if p.pause else 0)", FINISH)
    out = tmp_path / "home" / "runs" / "fake"
    arguments = ("reproduce", "fake", "-p", "pause=0.02")
    process = command(*arguments)
    _wait(lambda: list(out.glob("*/checkpoints/*/main/*/state.pt")))
    os.kill(process.pid, signal.SIGINT)
    text = process.communicate(timeout=30)[0]
    assert process.returncode == 130
    assert "the same command goes on" in text
    runs = tracking.client().search_runs([tracking.experiment_id("fake")])
    assert {run.info.status for run in runs} <= {"KILLED", "FINISHED"}
    assert not list(out.glob("*/claims.json"))
    process = command(*arguments)
    _wait(lambda: [run for run in tracking.client().search_runs([tracking.experiment_id("fake")])
                   if run.info.status == "RUNNING"])
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    begin = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - begin < 10
    assert not _processes(tmp_path / "home")
    process = command(*arguments)
    process.communicate()
    assert process.returncode == 0
    runs = tracking.client().search_runs([tracking.experiment_id("fake")])
    assert len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}


@slow
def test_stopped_while_waiting_for_another_batch_it_leaves_that_ones_runs_alone(fake, command, tmp_path):
    fake(OPEN, "import time; time.sleep(8)", TRAIN, FINISH)
    first = command("reproduce", "fake")

    def statuses() -> list[str]:
        return [run.info.status for run in tracking.client().search_runs([tracking.experiment_id("fake")])]

    _wait(lambda: "RUNNING" in statuses())
    (runner,) = _runners(_processes(tmp_path / "home"))
    second = command("reproduce", "fake")
    waiting = _wait(lambda: [number for number in _runners(_processes(tmp_path / "home")) if number != runner])
    time.sleep(1)
    os.kill(second.pid, signal.SIGINT)
    second.communicate(timeout=30)
    assert second.returncode == 130
    assert not set(waiting) & set(_processes(tmp_path / "home"))
    assert statuses() == ["RUNNING"]
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert statuses() == ["FINISHED"] * 3


SEEDS = 20


@pytest.fixture(scope="session")
def undisturbed() -> dict[str, list[float | None]]:
    """What the first disturbed batch compares with, filled by the first undisturbed one."""
    return {}


@pytest.fixture
def trained(fake, tmp_path: Path, undisturbed: dict[str, list[float | None]]) -> tuple[Path, list[Job]]:
    """The plan of two trainings, and its jobs; what they end with when nothing disturbs them is in `undisturbed`."""
    os.environ["PYTHONPATH"] = str(fake(OPEN, TRAIN, FINISH))
    plan = tmp_path / "plan.yaml"
    plan.write_text("- {paper: fake, grid: {epochs: [3, 5]}, parameters: {pause: 0.01}}\n")
    jobs = jobs_of(read_plan(plan), tmp_path)
    if not undisturbed:
        quiet = jobs_of(Plan(jobs=[{"paper": "fake", "grid": {"epochs": [3, 5]}}]), tmp_path)
        assert _statuses(quiet) == ["finished"] * 2
        undisturbed |= {str(job.changed["epochs"]): _values(job) for job in quiet}
    return plan, jobs


@slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_at_random_moments_the_batch_ends_as_if_undisturbed(trained, command, tmp_path, undisturbed, seed):
    draw = random.Random(seed)
    plan, jobs = trained
    home = tmp_path / "home"
    before = len(tracking.client().search_runs([tracking.experiment_id("fake")]))
    for _ in range(3):
        process = command("batch", plan, "--retries", "5")
        end = time.monotonic() + draw.uniform(4, 14)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        victims = [*_processes(home), process.pid]
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(victims), signal.SIGKILL)
        if process.poll() is not None:
            process.communicate()
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    _wait(lambda: process.poll() is not None)
    last = command("batch", plan, "--retries", "5")
    assert last.communicate(timeout=120)[0]
    assert last.returncode == 0
    assert {str(job.changed["epochs"]): _values(job) for job in jobs} == undisturbed
    _wait(lambda: not _processes(home), 15)
    runs = tracking.client().search_runs([tracking.experiment_id("fake")])
    assert len(runs) - before == 6
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if run.data.tags.get("kind") != "notebook":
            history = tracking.client().get_metric_history(run.info.run_id, "train/loss")
            assert [metric.step for metric in history] == list(range(1, len(history) + 1))


@slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_at_random_moments_a_cluster_ends_as_if_undisturbed(trained, command, tmp_path, undisturbed, seed):
    pytest.importorskip("distributed")
    draw = random.Random(1000 + seed)
    plan, jobs = trained
    home, port = tmp_path / "home", str(free_port())
    address = f"tcp://127.0.0.1:{port}"
    words = [("scheduler", "--port", port), *[("worker", address, "--nthreads", "1", "--no-nanny")] * 2]
    parts = [_dask(tmp_path, *each) for each in words]

    def renew() -> None:
        """Start again what is dead; workers end with their scheduler."""
        dead = [number for number, part in enumerate(parts) if part.poll() is not None]
        for number in range(len(parts)) if 0 in dead else dead:
            parts[number].kill()
            parts[number].wait()
            parts[number] = _dask(tmp_path, *words[number])

    arguments = ("batch", plan, "--retries", "5", "--scheduler", address)
    try:
        for _ in range(3):
            process = command(*arguments)
            end = time.monotonic() + draw.uniform(4, 20)
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            victims = [*_processes(home), process.pid, *(part.pid for part in parts)]
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(victims), signal.SIGKILL)
            time.sleep(draw.uniform(0, 2))
            renew()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        last = command(*arguments)
        assert last.communicate(timeout=240)[0]
        assert last.returncode == 0
        _wait(lambda: not _processes(home), 30)
    finally:
        for part in parts:
            part.kill()
            part.wait()
    assert {str(job.changed["epochs"]): _values(job) for job in jobs} == undisturbed


def _values(job: Job) -> list[float | None]:
    (row,) = json.loads((Path(job.folder) / "claims.json").read_text())
    return row["values"]


@slow
def test_two_batches_at_once_in_one_folder_run_each_notebook_once(notebook, command, ran, tmp_path):
    notebook("slow", "import time; time.sleep(3)")
    arguments = ("reproduce", tmp_path / "home" / "notebooks" / "slow.ipynb")
    first, second = command(*arguments), command(*arguments)
    assert [process.communicate(timeout=60)[1] for process in (first, second)] == [None, None]
    assert [first.returncode, second.returncode] == [0, 0]
    assert ran() == ["slow"]


# ------------------------------------------------------------------------------------------- cluster, engine


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A Dask scheduler and two workers of one thread each: (its address, the workers' processes)."""
    pytest.importorskip("distributed", reason="needs dask.distributed: pip install 'layerlab[cluster]'")
    address = f"tcp://127.0.0.1:{free_port()}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    dask = [sys.executable, "-m", "dask"]
    local = ["--host", "127.0.0.1", "--no-dashboard"]
    scheduler = subprocess.Popen([*dask, "scheduler", *local, "--port", address.rpartition(":")[2]], **quiet)
    workers = [
        subprocess.Popen([*dask, "worker", address, *local, "--nthreads", "1", "--no-nanny", "--resources", "GPU=1"],
                         **quiet) for _ in range(2)
    ]
    yield address, workers
    for process in (*workers, scheduler):
        process.kill()
        process.wait()


@slow
def test_a_worker_of_a_cluster_that_dies_repeats_nothing_that_is_finished(cluster, notebook, ran):
    address, workers = cluster
    jobs = [notebook("quick", "1"), notebook("long", "import time; time.sleep(6)"), notebook("breaks", "1 / 0")]
    for job in jobs[:2]:
        assert not job.is_done()

    import threading

    def kill() -> None:
        _wait(jobs[0].is_done)
        # The worker that has finished the first holds its result; the other one is at the long notebook.
        time.sleep(1)
        workers[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = run_batch(jobs, scheduler=address)
    killer.join()
    assert [outcome.status for outcome in outcomes][2] == "failed"
    assert {outcome.status for outcome in outcomes[:2]} <= {"finished", "done before"}
    assert ran().count("quick") == 1
    assert all(job.is_done() for job in jobs[:2])


def _dask(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "dask", *words, "--host", "127.0.0.1", "--no-dashboard"],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)


@slow
def test_a_scheduler_that_dies_is_waited_for_and_nothing_is_run_twice(notebook, ran, tmp_path):
    pytest.importorskip("distributed")
    import threading

    port = str(free_port())
    address = f"tcp://127.0.0.1:{port}"
    worker = ("worker", address, "--nthreads", "1", "--no-nanny")
    started = [_dask(tmp_path, "scheduler", "--port", port), _dask(tmp_path, *worker)]

    def replace_scheduler() -> None:
        _wait(lambda: "long" in ran())
        started[0].kill()
        started[0].wait()
        started.extend([_dask(tmp_path, "scheduler", "--port", port), _dask(tmp_path, *worker)])

    jobs = [notebook("long", "import time; time.sleep(8)"), notebook("after", "1")]
    replacing = threading.Thread(target=replace_scheduler)
    replacing.start()
    drawn = io.StringIO()
    try:
        outcomes = run_batch(jobs, scheduler=address, board=Board(drawn))
    finally:
        replacing.join()
        for process in started:
            process.kill()
            process.wait()
    assert {outcome.status for outcome in outcomes} <= {"finished", "done before"}
    assert sorted(ran()) == ["after", "long"]
    assert f"The scheduler at {address} is gone; waiting" in drawn.getvalue()


@slow
def test_a_scheduler_that_stays_away_is_named_with_the_remedy(cluster, notebook, ran, monkeypatch):
    import threading

    monkeypatch.setattr("layerlab.runs.batch.cluster.RETURN", 3.0)
    address, _ = cluster

    def kill() -> None:
        _wait(ran)
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or ()
            if "scheduler" in words and address.rpartition(":")[2] in words:
                process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    (outcome,) = run_batch([notebook("long", "import time; time.sleep(20)")], scheduler=address)
    killer.join()
    assert outcome.status == "failed"
    assert "is gone; start it and its workers, and run the same command again" in outcome.message


def test_a_scheduler_that_is_not_there_is_named(notebook):
    pytest.importorskip("distributed")
    with pytest.raises(LayerlabError, match=r"no Dask scheduler at tcp://127.0.0.1:9 .*--scheduler"):
        run_batch([notebook("good")], scheduler="tcp://127.0.0.1:9")


def test_the_papermill_engine_reports_what_plain_papermill_calls_completed(notebook, tmp_path):
    import papermill

    job = notebook("leaves", "import sys; sys.exit(0)", "2")
    out = tmp_path / "out.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match="SystemExit"):
        papermill.execute_notebook(job.notebook, out, engine_name="layerlab", progress_bar=False)
    job = notebook("hangs", "import time; time.sleep(60)", "2")
    with pytest.raises(Exception, match="timed out"):
        papermill.execute_notebook(job.notebook, out, engine_name="layerlab", progress_bar=False, execution_timeout=1)
    book = nbformat.read(out, 4)
    assert [cell.metadata.papermill.status for cell in book.cells] == ["completed", "completed", "failed", "pending"]


@slow
def test_the_engine_draws_cells_and_epochs(fake, tmp_path):
    fake(OPEN, TRAIN, FINISH)
    command = [sys.executable, "-m", "papermill", "--engine", "layerlab",
               str(tmp_path / "site" / "fake_plugin" / "notebook.ipynb"), str(tmp_path / "out.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out.ipynb: frozen seed 0: loss" in done.stderr
    assert "out.ipynb: ended after" in done.stderr


def test_importing_papermill_stays_light():
    script = "import papermill, sys; print([m for m in ('torch', 'mlflow', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_starting_notebooks_needs_no_torch():
    script = ("import layerlab.runs.batch.local, layerlab.runs.batch.plans, sys; "
              "print([m for m in ('torch', 'mlflow') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_what_a_batch_would_do_is_known_without_pandas():
    script = ("import sys; from layerlab.cli.main import main; "
              "main(['reproduce', '--dry-run'], standalone_mode=False); "
              "print([m for m in ('torch', 'mlflow', 'pandas') if m in sys.modules])")
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.splitlines()
    assert len(told) > 1
    assert told[-1] == "[]"


def test_a_batch_with_nothing_to_do_waits_for_no_pandas(notebook, tmp_path):
    job = notebook("done", "x = 1")
    run_batch([job])
    script = (f"import sys; from layerlab.cli.main import main; main(['reproduce', {str(job.notebook)!r}], "
              "standalone_mode=False); print([m for m in ('torch', 'mlflow', 'pandas') if m in sys.modules])")
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.splitlines()
    assert "finished before" in "".join(told)
    assert told[-1] == "[]"


@slow
def test_memory_that_runs_out_is_said_with_the_peak(notebook):
    limit = "import resource, torch; resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9,) * 2)"
    for cell, kind in (("bytearray(8 * 10**9)", "MemoryError"), ("torch.empty(8 * 10**9)", "RuntimeError")):
        (full,) = run_batch([notebook("full", limit, cell)])
        assert re.search(rf"{kind}.*it took up to \d+\.\d\d GB", full.message)
    (killed,) = run_batch([notebook("killed", "x = bytearray(10**9); import os; os.kill(os.getpid(), 9)")], retries=0)
    peak = float(re.search(r"lost its kernel .*it took up to (\S+) GB", killed.message)[1])
    assert 1.0 < peak < 3.0


@pytest.mark.parametrize(("victim", "said"), [
    ("kernel", r"'full' lost its kernel .*; it took up to 0\.\d+ GB"),
    pytest.param("a child of the cell", r"failed in cell 3 \(CalledProcessError: .* it took up to 0\.\d+ GB",
                 marks=slow),
    pytest.param("runner", r"died 1 times .* its process was killed by signal 9", marks=slow),
])
def test_what_the_system_kills_because_memory_ran_out_is_said_so_and_the_others_go_on(
    notebook, tmp_path, victim, said
):
    fill = "x = [bytearray(10**7) for _ in range(300)]"
    cells = {
        "kernel": fill,
        "a child of the cell": f"import subprocess, sys; subprocess.run([sys.executable, '-c', {fill!r}], check=True)",
        # The system kills it first, and what the kernel takes stays.
        "runner": f"import os; open(f'/proc/{{os.getppid()}}/oom_score_adj', 'w').write('1000'); {fill}",
    }
    files = [notebook("full", cells[victim]).notebook, notebook("good", "1 + 1").notebook]
    with small_memory(10**9) as limit:
        ended = subprocess.run(
            [sys.executable, "-m", "layerlab.cli", "reproduce", "--workers", "1", "--retries", "0", *files],
            preexec_fn=limit, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert re.search(f"{said}.*, and the system ran out of memory and killed a process: ", ended.stderr), ended.stderr
    assert "good: finished" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("variable", "threads"), [("2,1", "2"), ("1", "1"), ("x", "3"), ("0", "3"), ("", "3")])
def test_a_job_gets_the_threads_that_openmp_would_take(notebook, monkeypatch, variable, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr("layerlab.runs.batch.machine.usable_cores", lambda: 3)
    environment, _ = Machine().take(notebook("any"), 3)
    assert environment["OMP_NUM_THREADS"] == threads


def test_a_batch_takes_no_more_memory_than_its_container_has(tmp_path):
    script = ("from layerlab.runs.batch.machine import Machine; from layerlab.base.memory import memory_limit; "
              "print(Machine().memory, memory_limit())")
    with small_memory(10**9) as limit:
        told = subprocess.run([sys.executable, "-c", script], preexec_fn=limit, capture_output=True, text=True)
    free, most = map(float, told.stdout.split())
    assert 0.2 < free < 1.0
    # The system counts whole pages.
    assert 0 <= 10**9 - most < 2**16


@slow
@pytest.mark.parametrize("victim", ["batch", "runner", "kernel"])
def test_what_is_stopped_for_a_while_goes_on(notebook, command, tmp_path, victim):
    notebook("slow", "import time; time.sleep(4)")
    process = command("reproduce", tmp_path / "home" / "notebooks" / "slow.ipynb")
    home = tmp_path / "home"
    runner, kernel = _runner_and_kernel(home)
    number = {"batch": process.pid, "runner": runner, "kernel": kernel}[victim]
    os.kill(number, signal.SIGSTOP)
    time.sleep(2)
    os.kill(number, signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode == 0


@slow
@pytest.mark.parametrize(("victim", "status"), [("runner", 0), ("kernel", 0), ("batch", 130)])
def test_what_is_asked_to_end_is_taken_up_again_or_ends_cleanly(notebook, command, ran, tmp_path, victim, status):
    notebook("slow", "import time; time.sleep(3)")
    process = command("reproduce", tmp_path / "home" / "notebooks" / "slow.ipynb")
    home = tmp_path / "home"
    _wait(ran)
    runner, kernel = _runner_and_kernel(home)
    os.kill({"batch": process.pid, "runner": runner, "kernel": kernel}[victim], signal.SIGTERM)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == status, text
    assert "Traceback" not in text
    assert not _processes(home)
    assert ran() == ["slow"] * (1 if victim == "batch" else 2)


def test_a_job_that_finds_no_file_descriptor_or_temporary_folder_fails_alone_in_a_sentence(notebook, monkeypatch):
    job = notebook("good", "1 + 1")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Those that are open stay so.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 1, limits[1]))
    try:
        (outcome,) = run_batch([job], retries=0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert outcome.status == "failed"
    assert "Too many open files" in outcome.message
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    (outcome,) = run_batch([job], retries=0)
    assert outcome.status == "failed"
    assert "/nowhere" in outcome.message
