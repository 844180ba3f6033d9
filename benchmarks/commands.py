"""How long the commands take that only show something, beside the shell's answer to `--help`.

Run: python benchmarks/commands.py [--rounds 5]
The goals: `list` in at most half a second, `describe`, `data` and `scoreboard` in at most a second each. `list, first
time` begins with an empty cache, so that every plugin is imported; `published` shows the results of this repository.
Commands take turns, in alternating order.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from layerlab import strategies
from layerlab.measure import machine_name

RESULTS = Path(__file__).resolve().parents[1] / "results"
PUBLISHED = "scoreboard, published"


def measured(arguments: list[str], folder: Path, cache: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command in a workbook of its own."""
    environment = os.environ | {"LAYERLAB_HOME": str(folder), "LAYERLAB_CACHE": str(cache)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "layerlab.cli", *arguments], check=True, capture_output=True,
                   env=environment)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    commands = {"--help": ["--help"], "list": ["list"], "describe": ["describe", next(iter(strategies))],
                "data": ["data"], "scoreboard": ["scoreboard"], PUBLISHED: ["scoreboard"]}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("list, first time", *commands)}
    print(machine_name())
    with tempfile.TemporaryDirectory() as temporary:
        folder, full, cache = (Path(temporary, name) for name in ("workbook", "published", "cache"))
        folder.mkdir()
        shutil.copytree(RESULTS, full / "results")
        # What is read from the disk for the first time would count against whoever comes first.
        measured(["list"], folder, cache)
        for number in range(chosen.rounds):
            found["list, first time"].append(measured(["list"], folder, Path(temporary, f"cache {number}")))
            for name in list(commands) if number % 2 == 0 else reversed(commands):
                found[name].append(measured(commands[name], full if name == PUBLISHED else folder, cache))
    for name, times in found.items():
        walls = [wall for wall, _ in times]
        print(f"{name}: median {statistics.median(walls):.2f} s ({min(walls):.2f} to {max(walls):.2f}), CPU "
              f"{statistics.median(cpu for _, cpu in times):.2f} s")


if __name__ == "__main__":
    main()
