"""Peak memory and seconds of a training step: PyTorch as used and at its best, and memory-reorder, part by part.

Run: python benchmarks/memory_reorder.py [--rounds 7] [--device cpu]
The goals: at least 40 % below the conventional plan on AlexNet at batch 256 and on VGG-16 from batch 40 on; below
PyTorch's optimizer in backward on every network, at no more than 1.05 times its seconds; with checkpointing the lowest
of all, PyTorch's checkpointing with its optimizer in backward included. Networks and batches are those of the paper's
profiles; on a CPU the peaks are dry runs, and steps are timed at smaller batches.
"""

from __future__ import annotations

import argparse

import torch

from layerlab import load_paper
from layerlab.measure import machine_name
from layerlab_memory_reorder import analysis


def main() -> None:
    """Peaks, then times by turns, then the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    chosen = load_paper("memory-reorder").profile("paper" if on_gpu else "cpu").parameters
    print(f"{machine_name()}, torch {torch.__version__}")
    measured = analysis.peaks(chosen["measured"], device=options.device if on_gpu else "meta")
    ways, parts = analysis.ways(measured), analysis.parts(measured)
    print("\nGB, SGD with momentum")
    print(ways.pivot_table("peak GB", ["network", "batch"], "arm", sort=False).round(2).to_string(), flush=True)
    print("\nPer cent of the conventional plan that each part saves, on top of those before it")
    print(parts.pivot_table("part saves", ["network", "batch"], "arm", sort=False).round(2).to_string(), flush=True)
    times = analysis.timed(chosen["timed"], options.rounds, chosen["timed_size"], options.device)
    print(f"\nA step's seconds against PyTorch with its optimizer in backward, {options.rounds} rounds (quartiles)")
    print(times.drop(columns=["peak MB", "dry run MB"]).round(3).to_string(index=False))
    print()
    print(analysis.targets(ways, times).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
