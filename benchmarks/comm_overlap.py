"""Seconds of a data-parallel step over a slow link, each technique of comm-overlap alone and together, by turns.

Run: python benchmarks/comm_overlap.py [--workers 2] [--megabits 400] [--latency-ms 0.1] [--steps 24] [--segment-mb 1]
The goals: what CommOverlap chooses by measuring goes at least 85 % of the way from compute + communicate to
max(compute, communicate); on no link is it slower than DistributedDataParallel at its best bucket by over 2 %, which
many rounds of short steps tell: `--megabits 0 --batch 32 --width 64 --steps 10 --rounds 60 --variants`, where 0
leaves the link as it is.
"""

from __future__ import annotations

import argparse
import os

from layerlab.measure import machine_name
from layerlab_comm_overlap import analysis
from layerlab_comm_overlap.method.launcher import launch
from layerlab_comm_overlap.method.measuring import CHOSEN, VARIANTS, measure
from layerlab_comm_overlap.method.model import Measured
from layerlab_comm_overlap.method.networks import limited_link


def main() -> None:
    """Print what the bounds are made of, and every variant against them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabits", type=float, default=400.0)
    parser.add_argument("--latency-ms", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=160)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--bucket-mb", type=float, default=0.5)
    parser.add_argument("--segment-mb", type=float, default=1.0)
    parser.add_argument("--in-flight", type=int, default=2)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS),
                        help="beside no overlap, DDP and what is chosen, which are always there")
    options = parser.parse_args()
    network = {"name": "vgg-f", "num_classes": 10, "channels": 3, "image_size": options.image_size,
               "width": options.width}
    settings = {"bucket_mb": options.bucket_mb, "segment_mb": options.segment_mb, "in_flight": options.in_flight}
    # Workers inherit it: the profiler otherwise reports each of its starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    variants = dict.fromkeys([next(iter(VARIANTS)), *options.variants])
    with limited_link(options.workers, options.megabits, options.latency_ms if options.megabits else 0.0) as link:
        results = launch(measure, options.workers, network, options.batch, options.steps, options.rounds,
                         {**settings, **link.delays}, tuple(variants), threads=1, networks=link.networks)[0]
    each = Measured(options.workers, results, settings)
    found = {options.workers: each}
    print(machine_name())
    print(link.how)
    print(analysis.parts(found).round(4).to_string(index=False))
    print(analysis.against_bounds(found).round(3).to_string(index=False))
    if CHOSEN in each.results["seconds"]:
        stock = analysis.best_stock(each)
        print(f"{CHOSEN} ({each.results['chosen']}) is {analysis.gains(each, CHOSEN, stock)} as fast as {stock} "
              f"(95 % interval of {options.rounds} rounds)")


if __name__ == "__main__":
    main()
