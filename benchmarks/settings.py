"""How many images a second and core the networks of results/cpu.yaml train on, by batch size and memory layout.

Run: python benchmarks/settings.py [--rounds 7] [--images 512]
The plan's profiles take the fastest setting; docs/evidence.md has the budget that follows. The ratio of an epoch's
seconds to those of the first setting decides, by turns; images a second belong to the machine that is named.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from layerlab import Fit, build_model, noise
from layerlab.measure import machine_name, time_by_turns

# Network → its options, an image's shape, the batch sizes to try.
NETWORKS: Mapping[str, tuple[Mapping[str, Any], tuple[int, int, int], tuple[int, ...]]] = {
    "mlp": ({}, (1, 28, 28), (64, 128, 256)),
    "lenet": ({}, (1, 28, 28), (64, 128, 256)),
    "resnet-cifar": ({"depth": 20}, (3, 16, 16), (64, 128, 256)),
    "airnet": ({}, (3, 32, 32), (128, 250, 500)),
}


def measure(name: str, images: int, rounds: int) -> None:
    """Print a network's rates, a line a setting, the fastest marked."""
    options, shape, batches = NETWORKS[name]
    data = noise(images, shape)
    # More epochs than are ever asked for: a fit that has ended trains no further.
    fits = {f"batch {batch}, channels {'last' if last else 'first'}":
            Fit(partial(build_model, name, **options), data, epochs=rounds + 10, lr=0.01, batch_size=batch,
                channels_last=last)
            for batch, last in itertools.product(batches, (False, True))}
    times = time_by_turns({title: one.train_epoch for title, one in fits.items()}, rounds=rounds)
    first = next(iter(times.values()))
    fastest = min(times, key=lambda title: times[title].ratio(first)[0])
    print(f"\n{name} at {shape[-1]} pixels, {images:,} images an epoch, {rounds} rounds")
    for title, turns in times.items():
        middle, low, high = turns.ratio(first)
        rate = images / turns.median / torch.get_num_threads()
        mark = "  fastest" if title == fastest else ""
        print(f"{title:30} {middle:.2f} × ({low:.2f} to {high:.2f}) {rate:7,.0f} images/s·core{mark}", flush=True)


def main() -> None:
    """Every network of the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=512)
    chosen = parser.parse_args()
    print(f"{machine_name()}, torch {torch.__version__}")
    for name in NETWORKS:
        measure(name, chosen.images, chosen.rounds)


if __name__ == "__main__":
    main()
