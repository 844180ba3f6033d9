"""What a batch gains over plain papermill, one notebook after the other, and how long it takes to start.

Run: python benchmarks/batch.py [--rounds 3] [--papers lars-skip …] [--workers 2]
The goals: the quick plan of all installed papers in at most 5 minutes on two cores, at least 1.6 times as fast as one
after the other, and at most 3 s before the first kernel starts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from layerlab import strategies
from layerlab.measure import machine_name
from layerlab.papers import load_paper

STAMP = {
    "cells": [{
        "cell_type": "code", "id": "stamp", "metadata": {"tags": ["parameters"]}, "outputs": [],
        "execution_count": None,
        "source": "file = ''  # where to",
    }, {
        "cell_type": "code", "id": "write", "metadata": {}, "outputs": [], "execution_count": None,
        "source": "import psutil\nopen(file, 'w').write(str(psutil.Process().create_time()))",
    }],
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    "nbformat": 4, "nbformat_minor": 5,
}


def start_seconds() -> float:
    """Seconds from the command to the start of its first kernel's process."""
    with tempfile.TemporaryDirectory() as folder:
        notebook, stamp = Path(folder) / "stamp.ipynb", Path(folder) / "stamp"
        notebook.write_text(json.dumps(STAMP))
        begin = time.time()
        subprocess.run([sys.executable, "-m", "layerlab.cli", "reproduce", str(notebook), "-p", f"file={stamp}"],
                       check=True, capture_output=True, env={**os.environ, "LAYERLAB_HOME": folder})
        return float(stamp.read_text()) - begin


def batch_seconds(papers: list[str], workers: int) -> float:
    """Seconds of the quick plan of the papers as a batch."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "layerlab.cli", "reproduce", *papers, "--workers", str(workers)], check=True,
            capture_output=True, env={**os.environ, "LAYERLAB_HOME": folder})
        return time.perf_counter() - begin


def papermill_seconds(papers: list[str]) -> float:
    """Seconds of the same notebooks with papermill's own command, one after the other, each with all threads."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        for paper in papers:
            subprocess.run(
                [sys.executable, "-m", "papermill", str(load_paper(paper).notebook_file), f"{folder}/{paper}.ipynb"],
                check=True, capture_output=True, env={**os.environ, "LAYERLAB_HOME": folder})
        return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--papers", nargs="*", default=list(strategies))
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    print(f"{machine_name()}; {', '.join(chosen.papers)}")
    starts = [start_seconds() for _ in range(5)]
    print(f"start to first kernel: median {statistics.median(starts):.2f} s ({min(starts):.2f} to {max(starts):.2f})")
    ratios = []
    for number in range(chosen.rounds):
        one, many = papermill_seconds(chosen.papers), batch_seconds(chosen.papers, chosen.workers)
        ratios.append(one / many)
        print(f"round {number + 1}: papermill {one:.0f} s, {chosen.workers} workers {many:.0f} s, {ratios[-1]:.2f} ×",
              flush=True)
    if ratios:
        print(f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds)")


if __name__ == "__main__":
    main()
