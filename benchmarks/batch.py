"""What a batch gains over plain papermill, one notebook after the other, and how long it takes to start.

Run: python benchmarks/batch.py [--rounds 3] [--papers lars-skip …] [--workers 2]
The goals: the quick plan of all installed papers in at most 5 minutes on two cores, at least 1.6 times as fast as one
after the other, and at most 3 s before the first kernel starts. Papermill has the whole machine for each notebook; the
batch's workers have their shares of it. CPU seconds over the number of cores are what no schedule can go below.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import psutil

from layerlab import load_paper, strategies
from layerlab.measure import machine_name

# Whoever starts this may have chosen these for something else.
UNSET = ("OMP_NUM_THREADS", "MLFLOW_TRACKING_URI", "LAYERLAB_OUTPUT", "LAYERLAB_BATCH")


def environment(folder: str) -> dict[str, str]:
    """Variables for a run whose notebooks and database lie in a folder of their own."""
    return {name: value for name, value in os.environ.items() if name not in UNSET} | {"LAYERLAB_HOME": folder}


def plan(papers: list[str], workers: int) -> list[str]:
    """The command that runs the papers as a batch."""
    return [sys.executable, "-m", "layerlab.cli", "reproduce", *papers, "--workers", str(workers)]


def start_seconds(papers: list[str], workers: int) -> float:
    """Seconds from the command of the plan to its first kernel's process; the plan is stopped then."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        batch = subprocess.Popen(plan(papers, workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                 env=environment(folder))
        try:
            while batch.poll() is None:
                for child in psutil.Process(batch.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if "ipykernel_launcher" in child.cmdline():
                            return time.perf_counter() - begin
                time.sleep(0.02)
        finally:
            batch.send_signal(signal.SIGINT)
            batch.wait()
    raise SystemExit(f"{' '.join(plan(papers, workers))} ended before it started a kernel.")


def measured(commands: Callable[[str], list[list[str]]]) -> tuple[float, float]:
    """Wall and CPU seconds of commands that run one after the other in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        for command in commands(folder):
            subprocess.run(command, check=True, capture_output=True, env=environment(folder))
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def papermill(papers: list[str], folder: str) -> list[list[str]]:
    """Papermill's own command for the same notebooks."""
    return [[sys.executable, "-m", "papermill", str(load_paper(paper).notebook_file), f"{folder}/{paper}.ipynb"]
            for paper in papers]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--papers", nargs="*", default=list(strategies))
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    papers, workers = chosen.papers, chosen.workers
    print(f"{machine_name()}; {', '.join(papers)}")
    # What is read from the disk for the first time would count against whoever comes first.
    imports = "import mlflow, papermill, layerlab.training.fit, layerlab.show.figures"
    subprocess.run([sys.executable, "-c", imports], check=True)
    starts = [start_seconds(papers, workers) for _ in range(5)]
    print(f"start to first kernel: median {statistics.median(starts):.2f} s ({min(starts):.2f} to {max(starts):.2f})",
          flush=True)
    sides: dict[str, Callable[[str], list[list[str]]]] = {
        "papermill": lambda folder: papermill(papers, folder),
        f"{workers} workers": lambda _: [plan(papers, workers)],
    }
    batches, ratios = [], []
    for number in range(chosen.rounds):
        # In alternating order, so that a machine that slows down or warms up favours neither.
        found = {name: measured(sides[name]) for name in (list(sides) if number % 2 == 0 else reversed(sides))}
        (alone, _), (together, _) = (found[name] for name in sides)
        batches.append(together)
        ratios.append(alone / together)
        each = ", ".join(f"{name} {wall:.0f} s (CPU {cpu:.0f} s)" for name, (wall, cpu) in found.items())
        print(f"round {number + 1}: {each}, {ratios[-1]:.2f} ×", flush=True)
    if ratios:
        print(f"the batch: median {statistics.median(batches):.0f} s ({min(batches):.0f} to {max(batches):.0f})")
        print(f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds)")


if __name__ == "__main__":
    main()
