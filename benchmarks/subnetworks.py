"""An epoch of a network and its sub-networks at once, against one of each of the three networks alone, by turns.

Run: python benchmarks/subnetworks.py [--rounds 11] [--images 12800] [--device cpu]
The goal is a ratio below 1 on the paper's perceptron of two hidden layers (784 units each) at batch 128. On a GPU each
step is a captured CUDA graph.
"""

from __future__ import annotations

import argparse
import math

import torch
from fit_overhead import WARMUP, epochs_by_turns

from layerlab import Fit, load_paper, noise
from layerlab.measure import machine_name
from layerlab_network_with_subnetworks import analysis

TOGETHER = "model0-1-2"
ALONE = ("ref-model0", "ref-model1", "ref-model2")


def main() -> None:
    """Warm up, then epochs by turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--images", type=int, default=12_800)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    paper = load_paper("network-with-subnetworks").profile("paper").parameters
    data = noise(options.images, (1, 28, 28), options.device)
    strategies = analysis.arms(paper["l2"], cuda_graph=options.device.startswith("cuda"))
    fits = {name: Fit(build, data, strategies[name], epochs=options.rounds + WARMUP, batch_size=paper["batch_size"],
                      lr=0.01, momentum=paper["momentum"], weight_decay=0.0)
            for name, build in analysis.networks((TOGETHER, *ALONE), data).items()}

    def alone() -> float:
        return math.fsum(fits[name].train_epoch()["time/epoch_seconds"] for name in ALONE)

    together, separate = epochs_by_turns(fits[TOGETHER], alone, options.rounds)
    middle, low, high = together.ratio(separate)
    print(f"{machine_name()}, torch {torch.__version__}; {options.images:,} images, {options.rounds} rounds")
    print(f"at once / one after the other = {middle:.3f} (quartiles {low:.3f} to {high:.3f}); "
          f"{together.median:.3f} against {separate.median:.3f} s an epoch")


if __name__ == "__main__":
    main()
