"""A training step with a prefix frozen, and dropped with 32, 16 and 8 bits, against the whole step, by turns.

Run: python benchmarks/learn_and_drop.py [--rounds 15] [--batch 64] [--device cpu]
The goals are those of whole runs (`layerlab reproduce learn-and-drop --profile cpu`): a step that drops 80 % of the
forward FLOPs has to take less than a third of the whole one, and less than the step that freezes the same layers.
"""

from __future__ import annotations

import argparse

import torch

from layerlab import build_model
from layerlab.data import Dataset, Split
from layerlab.measure import machine_name
from layerlab_learn_and_drop import analysis


def noise(side: int, device: torch.device) -> Dataset:
    """Resident random images: what is timed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1024, 3, side, side), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(0, 10, (1024,), generator=generator).to(device)
    split = Split(images, labels, (127.0,) * 3, (64.0,) * 3)
    return Dataset("noise", split, split, 10, "noise", "random numbers").augmented("crop-flip", 2)


def main() -> None:
    """Both networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{machine_name()}, torch {torch.__version__}")
    for name, depth, side in (("resnet-cifar", 56, 16), ("vgg-cifar", 11, 32)):
        table = analysis.step_costs(lambda name=name, depth=depth: build_model(name, depth=depth), noise(side, device),
                                    options.batch, [0.25, 0.5, 0.8], options.rounds, ["compute", "bfloat16", "int8"])
        print(f"\n{name}-{depth} at {side} pixels, batch {options.batch}, {options.rounds} rounds")
        print(table.round(3).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
