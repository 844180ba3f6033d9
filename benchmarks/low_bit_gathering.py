"""What gathering the statistic and choosing formats takes of a low-bit training step, by turns.

Run: python benchmarks/low_bit_gathering.py [--network vgg-cifar] [--batch 128] [--rounds 15] [--device cpu]
The goal is at most 10 % on VGG-11 for CIFAR-10 at batch 128.
"""

from __future__ import annotations

import argparse

import torch

from layerlab import build_model
from layerlab.measure import machine_name
from layerlab_low_bit import analysis


def main() -> None:
    """One network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="vgg-cifar")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(f"{machine_name()}, torch {torch.__version__}")
    table, (middle, low, high) = analysis.gathering_cost(
        lambda: build_model(options.network, channels=options.channels),
        (options.channels, options.image_size, options.image_size), options.batch, options.rounds, options.bits,
        options.device,
    )
    print(table.round(4).to_string(index=False))
    print(f"{options.network}, batch {options.batch}, {options.bits} bits: gathering takes {middle:.1%} of a step "
          f"(quartiles {low:.1%} to {high:.1%}, {options.rounds} rounds)")


if __name__ == "__main__":
    main()
