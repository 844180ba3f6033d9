"""How the cost of each step grows with the work: seconds of processor time at growing sizes, and the exponent.

Run: python benchmarks/growth.py [CURVE …] [--whole] [--rounds 2]
Runs in MLflow for the scoreboard and for `publish`, jobs of a plan, images of a folder, layers of a network for the
pre-flight of each strategy, for cutting and for pruning. What the smallest size takes is subtracted, so that starting a
command or importing a library hides no growth; the exponent is the slope of a line through the logarithms of the upper
half of the sizes. The goal: no step above n log n, whose exponent at these sizes stands in the head. `--whole` goes up
to 10,000 runs and 1,000,000 images, which needs 4 GB of disk and half an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from layerlab import Study, load_dataset, load_paper, scoreboard, strategies
from layerlab.measure import machine_name
from layerlab_adaptive_pruning import below, remove_channels
from layerlab_learn_and_drop.method.cutting import make_plan, split

# Sizes; `--whole` adds those of the second row.
SIZES = {
    "runs": ([10, 30, 100, 300, 1000, 3000], [10_000]),
    "jobs": ([10, 30, 100, 300, 1000, 2000], []),
    "images": ([1000, 3000, 10_000, 30_000], [100_000, 300_000, 1_000_000]),
    "layers": ([10, 25, 50, 100, 200, 400], []),
}
# Of ten runs one is a notebook's, with parameters of its own; the others are its trainings.
NOTEBOOKS = 10
Step = Callable[[], object]


def seconds(step: Step) -> float:
    """Processor time of a step, with that of the processes that it started and that have ended."""

    def spent() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    before = spent()
    with contextlib.redirect_stdout(io.StringIO()):
        step()
    return spent() - before


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The slope of log(time) over log(size), of the upper half of the sizes, by least squares; without what the
    smallest takes."""
    half = len(sizes) // 2
    grown = np.maximum(np.array(times[half:]) - times[0], 1e-6)
    return float(np.polyfit(np.log(sizes[half:]), np.log(grown), 1)[0])


def cli(*arguments: object) -> Step:
    """A command of layerlab's."""
    words = [sys.executable, "-m", "layerlab.cli", *map(str, arguments)]
    return lambda: subprocess.run(words, check=True, capture_output=True)


def runs(size: int, folder: Path) -> Iterator[tuple[str, Step]]:
    """The scoreboard and `publish` of a database with so many runs."""
    os.environ["LAYERLAB_HOME"] = str(folder)
    name = "lars-skip"
    study = Study(name, "cpu", folder / "run")
    paper = load_paper(name)
    study.claim(paper.claims[0].id, [1.0, 2.0, 3.0], seeds=[0, 1, 2], conditions={"dataset": "digits"})
    study.finish()
    multiply_runs(folder / "mlflow.db", study.run_id, size)
    yield "scoreboard", lambda: scoreboard.page(scoreboard.collected([name]))
    yield "publish", cli("publish", name, "--to", folder / "results")


def multiply_runs(database: Path, first: str, size: int) -> None:
    """Copy a finished notebook's run until there are so many: each newer than the first, with other parameters."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for number in range(1, size):
            new, notebook = uuid.uuid4().hex, number % NOTEBOOKS == 0
            for table in ("runs", "tags", "params", "latest_metrics", "metrics"):
                columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
                taken = {"run_uuid": "?", "start_time": f"start_time + {number}"}
                chosen = ", ".join(taken.get(column, column) for column in columns)
                connection.execute(f"INSERT INTO {table} SELECT {chosen} FROM {table} WHERE run_uuid = ?",
                                   (new, first))
            change = "UPDATE tags SET value = ? WHERE run_uuid = ? AND key = ?"
            if notebook:
                rows = connection.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (new,)).fetchall()
                for key, value in rows:
                    connection.execute(change, (value.replace('"changed":{}', f'"changed":{{"alpha":{number}.5}}'),
                                                new, key))
            else:
                connection.execute(change, ("training", new, "kind"))


def jobs(size: int, folder: Path) -> Iterator[tuple[str, Step]]:
    """What a batch of so many jobs would do."""
    os.environ["LAYERLAB_HOME"] = str(folder)
    plan = folder / "plan.yaml"
    plan.write_text(f"- {{paper: lars-skip, grid: {{alpha: {[number + 0.5 for number in range(size)]}}}}}\n")
    yield "plan of a batch", cli("batch", plan, "--dry-run")


def images(size: int, folder: Path) -> Iterator[tuple[str, Step]]:
    """Loading a folder of so many images for the first time and again, and looking at all of them."""
    draw = np.random.default_rng(0)
    place = folder / "images"
    for number in range(size):
        file = place / "train" / str(number % 10) / f"{number}.png"
        if number < 10:
            file.parent.mkdir(parents=True)
        Image.fromarray(draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)).save(file)
    yield "images, first time", lambda: load_dataset(place, image_size=4, device="cpu")
    yield "images, again", lambda: load_dataset(place, image_size=4, device="cpu")
    yield "data check", cli("data", "check", place)


def chain(layers: int, norm: Callable[[], nn.Module] = lambda: nn.BatchNorm2d(4)) -> nn.Module:
    """Convolutions with normalisation, one behind the other, and a classifier."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for number in range(layers - 1):
        parts += [nn.Conv2d(4 if number else 3, 4, 3, padding=1, bias=False), norm(), nn.ReLU()]
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.tensor([1e-6, 1.0, 1.0, 1.0]))
    return network


def layers(size: int, folder: Path) -> Iterator[tuple[str, Step]]:
    """Pre-flights, cutting and pruning of a network of so many layers."""
    example = torch.randn(2, 3, 8, 8)
    network = chain(size)
    # Sub-networks share no batch norm; ten of them, since one for each layer is n networks of n layers by itself.
    others = {"network-with-subnetworks": chain(size, lambda: nn.GroupNorm(2, 4))}
    settings = {"network-with-subnetworks": {"detach_at_once": max(1, size // 10)}}
    for name in strategies:
        strategy = strategies(name, **settings.get(name, {}))
        yield f"pre-flight of {name}", partial(strategy.preflight, others.get(name, network), example)
    plan = make_plan(network, example)
    yield "cutting, the plan", lambda: make_plan(network, example)
    yield "cutting, in the middle", lambda: split(network, list(plan.cuts.values())[len(plan.cuts) // 2])
    pruned = chain(size).eval()
    yield "pruning a channel of each layer", lambda: remove_channels(pruned, example, below(pruned, 1e-3))


CURVES: dict[str, Callable[[int, Path], Iterator[tuple[str, Step]]]] = {
    "runs": runs, "jobs": jobs, "images": images, "layers": layers,
}


def measured(curve: str, sizes: Sequence[int], rounds: int) -> dict[str, list[float]]:
    """Step → its least seconds at each size."""
    found: dict[str, list[float]] = {}
    for place, size in enumerate(sizes):
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as temporary:
                os.environ["LAYERLAB_CACHE"] = str(Path(temporary) / "cache")
                for name, step in CURVES[curve](size, Path(temporary)):
                    times = found.setdefault(name, [])
                    spent = seconds(step)
                    if len(times) == place:
                        times.append(spent)
                    times[place] = min(times[place], spent)
    return found


def main() -> None:
    """Print a table for each curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curves", nargs="*", metavar="CURVE", help=f"of {', '.join(CURVES)}; default: all")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    print(machine_name())
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    for curve in chosen.curves or CURVES:
        usual, more = SIZES[curve]
        sizes = [*usual, *(more if chosen.whole else [])]
        linear = exponent(sizes, [size * math.log(size) for size in sizes])
        print(f"\n{curve}: {' '.join(f'{size:>8,}' for size in sizes)}  exponent (n log n: {linear:.2f})")
        for name, times in measured(curve, sizes, chosen.rounds).items():
            print(f"{name:<32} {' '.join(f'{each:8.3f}' for each in times)}  {exponent(sizes, times):.2f}", flush=True)


if __name__ == "__main__":
    main()
