"""What a notebook costs besides its cells, beside what users would take instead, and what a batch of papers gains.

Run: python benchmarks/batch.py [--rounds 3] [--notebooks 6] [--papers lars-skip …] [--workers 2]
The goals: at most 0.8 s a notebook that has a kernel of its own, so six trivial ones in at most 5 s with one worker; at
most 1 s for a batch with nothing to do; the quick plan of all papers in at most 5 minutes, and at least 1.6 times as
fast as papermill. Peers run as they come, each in one process: nbclient and papermill one notebook after the other,
papermill with a process for each of two at once, ploomber-engine in its own process without a kernel. Sides take turns
in alternating order; a ratio is a peer's time over the batch's in the same round. CPU seconds over the number of cores
are what no schedule can go below. pip install -e '.[bench]' brings the peers; one that is missing is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import nbformat

from layerlab import load_paper, strategies
from layerlab.measure import machine_name

# Whoever starts this may have chosen these for something else.
UNSET = ("OMP_NUM_THREADS", "MLFLOW_TRACKING_URI", "LAYERLAB_OUTPUT", "LAYERLAB_BATCH")
LAYERLAB = [sys.executable, "-m", "layerlab.cli"]
NBCLIENT = """
import sys, nbclient, nbformat
for number in range(int(sys.argv[1])):
    book = nbformat.read(f"notebooks/{number}.ipynb", 4)
    nbclient.NotebookClient(book).execute()
    nbformat.write(book, f"{number}.out.ipynb")
"""
PAPERMILL = """
import sys, papermill
for number in range(int(sys.argv[1])):
    papermill.execute_notebook(f"notebooks/{number}.ipynb", f"{number}.out.ipynb", progress_bar=False)
"""
PLOOMBER = """
import sys
from ploomber_engine import execute_notebook
for number in range(int(sys.argv[1])):
    execute_notebook(f"notebooks/{number}.ipynb", f"{number}.out.ipynb", progress_bar=False)
"""
PARALLEL = """
import subprocess, sys
from concurrent.futures import ThreadPoolExecutor
def one(number):
    subprocess.run([sys.executable, "-m", "papermill", f"notebooks/{number}.ipynb", f"{number}.out.ipynb"], check=True)
with ThreadPoolExecutor(2) as pool:
    list(pool.map(one, range(int(sys.argv[1]))))
"""
# Side → (module that it needs, its script).
PEERS = {
    "nbclient, one process": ("nbclient", NBCLIENT),
    "papermill, one process": ("papermill", PAPERMILL),
    "papermill, two at once": ("papermill", PARALLEL),
    "ploomber-engine, no kernel": ("ploomber_engine", PLOOMBER),
}

Commands = list[list[str]]


def environment(folder: str) -> dict[str, str]:
    """Variables for a run whose notebooks and database lie in a folder of their own, and that reports to nobody."""
    own = {"LAYERLAB_HOME": folder, "PLOOMBER_STATS_ENABLED": "false"}
    return {name: value for name, value in os.environ.items() if name not in UNSET} | own


def measured(commands: Callable[[str], Commands]) -> tuple[float, float]:
    """Wall and CPU seconds of commands that run one after the other in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = commands(folder)
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        for command in chosen:
            subprocess.run(command, check=True, capture_output=True, env=environment(folder), cwd=folder)
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_trivial(folder: str, notebooks: int) -> Path:
    """Write notebooks that do nothing worth a second, and a plan of them."""
    place = Path(folder, "notebooks")
    place.mkdir()
    for number in range(notebooks):
        book = nbformat.v4.new_notebook(cells=[
            nbformat.v4.new_code_cell(source) for source in (f"number = {number}", "number + 1")])
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, place / f"{number}.ipynb")
    plan = Path(folder, "plan.yaml")
    plan.write_text("".join(f"- notebook: notebooks/{number}.ipynb\n" for number in range(notebooks)))
    return plan


def trivial_sides(notebooks: int) -> dict[str, Callable[[str], Commands]]:
    """Side → the commands that run trivial notebooks in a folder; the first side is the batch with one worker."""

    def batch(workers: int) -> Callable[[str], Commands]:
        return lambda folder: [[*LAYERLAB, "batch", str(write_trivial(folder, notebooks)), "--workers", str(workers)]]

    def peer(script: str) -> Callable[[str], Commands]:
        def commands(folder: str) -> Commands:
            write_trivial(folder, notebooks)
            return [[sys.executable, "-c", script, str(notebooks)]]

        return commands

    sides = {"layerlab, one worker": batch(1), "layerlab, two workers": batch(2)}
    for name, (module, script) in PEERS.items():
        if importlib.util.find_spec(module):
            sides[name] = peer(script)
        else:
            print(f"{name}: not installed here; pip install -e '.[bench]' brings it")
    return sides


def paper_sides(papers: list[str], workers: int) -> dict[str, Callable[[str], Commands]]:
    """Side → the commands that run papers; papermill has the whole machine for each notebook, the batch a share."""

    def papermill(folder: str) -> Commands:
        return [[sys.executable, "-m", "papermill", str(load_paper(paper).notebook_file), f"{folder}/{paper}.ipynb"]
                for paper in papers]

    return {f"layerlab, {workers} workers": lambda _: [[*LAYERLAB, "reproduce", *papers, "--workers", str(workers)]],
            "papermill": papermill}


def by_turns(sides: Mapping[str, Callable[[str], Commands]], rounds: int) -> None:
    """Print the median wall and CPU seconds of each side, and its time over that of the first one."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        # In alternating order, so that a machine that slows down or warms up favours neither.
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            found[name].append(measured(sides[name]))
    first = [wall for wall, _ in found[next(iter(sides))]]
    for name, times in found.items():
        walls, ratios = [wall for wall, _ in times], [wall / own for (wall, _), own in zip(times, first, strict=True)]
        print(f"{name}: median {statistics.median(walls):.1f} s ({min(walls):.1f} to {max(walls):.1f}), CPU "
              f"{statistics.median(cpu for _, cpu in times):.1f} s, {statistics.median(ratios):.2f} × the batch's time "
              f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def nothing_to_do(notebooks: int, rounds: int) -> None:
    """Print the seconds of a batch of which everything is done."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*LAYERLAB, "batch", str(write_trivial(folder, notebooks))]
        seconds = []
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=environment(folder), cwd=folder)
            seconds.append(time.perf_counter() - begin)
    again = seconds[1:]
    print(f"nothing to do: median {statistics.median(again):.2f} s ({min(again):.2f} to {max(again):.2f})", flush=True)


def planning(jobs: int, rounds: int) -> None:
    """Print the seconds in which a plan of thousands of jobs is shown, none of which runs."""
    with tempfile.TemporaryDirectory() as folder:
        write_trivial(folder, 1)
        plan = Path(folder, "plan.yaml")
        plan.write_text(f"- {{paper: {next(iter(strategies))}, seeds: {list(range(jobs))}}}\n")
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            subprocess.run([*LAYERLAB, "batch", str(plan), "--dry-run"], check=True, capture_output=True,
                           env=environment(folder), cwd=folder)
            seconds.append(time.perf_counter() - begin)
    print(f"{jobs} jobs planned: median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})",
          flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--notebooks", type=int, default=6)
    parser.add_argument("--papers", nargs="*", default=list(strategies))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2000)
    chosen = parser.parse_args()
    print(machine_name())
    # What is read from the disk for the first time would count against whoever comes first.
    subprocess.run([sys.executable, "-c", "import mlflow, papermill, seaborn, torch"], check=True)
    print(f"{chosen.notebooks} trivial notebooks:")
    by_turns(trivial_sides(chosen.notebooks), chosen.rounds)
    nothing_to_do(chosen.notebooks, chosen.rounds)
    planning(chosen.jobs, chosen.rounds)
    if chosen.papers:
        print(f"{', '.join(chosen.papers)}:")
        by_turns(paper_sides(chosen.papers, chosen.workers), chosen.rounds)


if __name__ == "__main__":
    main()
