"""A training step with a prefix frozen, and dropped with 32, 16 and 8 bits, against the whole step, by turns.

Run: python benchmarks/learn_and_drop.py [--rounds 15] [--batch 64] [--device cpu]
The goals are those of whole runs (`layerlab reproduce learn-and-drop --profile cpu`): a step that drops 80 % of the
forward FLOPs has to take less than a third of the whole one, and less than the step that freezes the same layers.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from layerlab import build_model, noise
from layerlab.measure import machine_name
from layerlab_learn_and_drop import analysis


def main() -> None:
    """Both networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(f"{machine_name()}, torch {torch.__version__}")
    for name, depth, side in (("resnet-cifar", 56, 16), ("vgg-cifar", 11, 32)):
        data = noise(1024, (3, side, side), options.device).augmented("crop-flip", 2)
        table = analysis.step_costs(partial(build_model, name, depth=depth), data,
                                    options.batch, [0.25, 0.5, 0.8], options.rounds, ["compute", "bfloat16", "int8"])
        print(f"\n{name}-{depth} at {side} pixels, batch {options.batch}, {options.rounds} rounds")
        print(table.round(3).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
