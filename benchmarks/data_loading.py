"""Seconds to load each dataset for the first time (decoding) and again (from the cache).

Run: LAYERLAB_DATA=… python benchmarks/data_loading.py [NAME …]
The goal is at most 20 s and then at most 1 s for CIFAR-10's 60,000 images on two cores.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time

from layerlab import load_dataset
from layerlab.measure import machine_name


def seconds(name: str) -> float:
    """Load the dataset once."""
    start = time.perf_counter()
    load_dataset(name, device="cpu")
    return time.perf_counter() - start


def main() -> None:
    """Each named dataset with an empty cache, then five times with a filled one."""
    print(machine_name())
    for name in sys.argv[1:] or ["cifar10", "mnist", "fashion-mnist", "imagenette"]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LAYERLAB_CACHE"] = folder
            first = seconds(name)
            again = [seconds(name) for _ in range(5)]
        print(f"{name}: first {first:.1f} s, again {statistics.median(again):.2f} s "
              f"({min(again):.2f} to {max(again):.2f} s over 5)", flush=True)


if __name__ == "__main__":
    main()
