"""What `fit(recipe="fast")` reaches on CIFAR-10 with `airnet`: test accuracy, and the seconds of a whole training.

Run: python benchmarks/fast_recipe.py [--seeds 0 1 2] [--folder fast-recipe] [--smoke]
The goal is at least 90 % in at most 15 minutes a seed on two cores. Seconds are those of everything from loaded data to
the last evaluation. Run again with the same folder, it goes on behind the last finished epoch; the seconds of an epoch
that was cut off do not count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from layerlab import Dataset, Fit, build_model, files, load_dataset
from layerlab.measure import commit, machine_name, mean_interval


def train(data: Dataset, seed: int, folder: Path, widths: tuple[int, int, int], **changes: Any) -> tuple[float, float]:
    """Train one seed to its end, or go on; (test accuracy as a share, seconds)."""
    clock = folder / "seconds.json"
    start = time.perf_counter()
    job = Fit(lambda: build_model("airnet", num_classes=data.classes, widths=widths), data, recipe="fast", seed=seed,
              checkpoint=folder, **changes)
    taken: dict[str, float] = json.loads(clock.read_text()) if clock.exists() else {}
    taken.setdefault("start", time.perf_counter() - start)
    while not job.finished:
        start = time.perf_counter()
        row = job.train_epoch()
        taken[str(job.run.epoch)] = time.perf_counter() - start
        files.write_json(clock, taken)
        print(f"seed {seed}, epoch {job.run.epoch} of {job.run.epochs}: {row['test/top1']:.2%}, "
              f"{sum(taken.values()):.0f} s", flush=True)
    return job.finish().final["test/top1"], sum(taken.values())


def main() -> None:
    """All seeds, one after the other, and their mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="of the checkpoints; default: one that is deleted at the end")
    parser.add_argument("--widths", type=int, nargs=3, default=[32, 128, 128])
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--smoke", action="store_true", help="digits, a tiny network and two epochs: does it run?")
    options = parser.parse_args()
    widths, epochs = options.widths, options.epochs
    if options.smoke:
        data, widths, epochs = load_dataset("digits", image_size=16, channels=3), [8, 16, 16], 2
    else:
        data = load_dataset("cifar10")
    changes: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    with tempfile.TemporaryDirectory() as own:
        folder = options.folder or Path(own)
        reached = [train(data, seed, folder / f"seed{seed}", tuple(widths), **changes) for seed in options.seeds]
    accuracies, seconds = [100 * share for share, _ in reached], [each for _, each in reached]
    middle, half = mean_interval(accuracies)
    print(f"{machine_name()}, torch {torch.__version__}, commit {commit(Path(__file__).parent)}")
    print(f"{data.name}, airnet {'-'.join(map(str, widths))}: {middle:.2f} % ± {half:.2f} (95 % interval, seeds "
          f"{', '.join(map(str, options.seeds))}: {', '.join(f'{each:.2f}' for each in accuracies)}); "
          f"{sum(seconds) / len(seconds):.0f} s a seed (at most {max(seconds):.0f})")


if __name__ == "__main__":
    main()
