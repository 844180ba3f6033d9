"""A step within a number of bytes: memory-reorder's budget beside what PyTorch users would pick instead.

Run: python benchmarks/memory_budget.py [--networks resnet50 …] [--rounds 7] [--compiled resnet50]
The goals: every budget is kept in the real heap; its forecast is within 2 % of it; at the time of PyTorch's
checkpointing with its optimizer in backward, at least 10 % less memory. Budgets are the peak of that arm, 5 and 10 %
less, the least possible, and half-way up to plain PyTorch with its optimizer in backward. Peaks are those of real steps
on a CPU, kernels' workspaces included (`layerlab.measure.peak_allocated`). Times are ratios of the process' CPU seconds
to PyTorch with its optimizer in backward, by turns, with quartiles, so that other jobs on the machine matter little.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from layerlab import Refused
from layerlab.measure import machine_name, peak_allocated, time_by_turns
from layerlab_memory_reorder.analysis import network
from layerlab_memory_reorder.method.budget import Planner
from layerlab_memory_reorder.method.checkpointing import blocks
from layerlab_memory_reorder.method.measuring import FUSED, NULL, OURS, Step

# Images a step of networks whose steps at 32 images of 64 pixels take long; the last two are for mobile devices.
NETWORKS = {"alexnet": 32, "vgg16": 8, "resnet50": 32, "googlenet": 16, "densenet121": 8, "squeezenet1_1": 32,
            "mobilenet_v2": 16, "mobilenet_v3_large": 16}
SIZE = 64
SELECTIVE = "selective checkpointing"
_PRODUCTS = {torch.ops.aten.convolution.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
# Shares of the activations that torch.compile may keep.
COMPILED = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)


def selective(step: Step) -> None:
    """torch's selective checkpointing of each block: products are kept, the rest is computed again."""
    def policy(_: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    for block in blocks(step.model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of a batch."""
    return F.cross_entropy(model(x), y)


def compare(name: str, batch: int, rounds: int) -> None:
    """Print one network's rows."""
    model, shape = network(name, SIZE)
    steps = {arm: Step(arm, model, shape, batch, device="cpu") for arm in (FUSED, NULL, OURS)}
    peaks: dict[str, int] = {arm: step.peak() for arm, step in steps.items()}
    peer = Step(FUSED, model, shape, batch, device="cpu")
    selective(peer)
    try:
        peaks[SELECTIVE] = peer.peak()
        steps[SELECTIVE] = peer
    except RuntimeError as error:
        print(f"  {SELECTIVE}: {str(error).splitlines()[0]:.120}")
    start = time.process_time()
    plain = Step(OURS, model, shape, batch, device="cpu")
    plain.close()
    planner = Planner(plain.model, plain.optimizer, plain.x, plain.y, loss_of)
    forecasts: dict[str, tuple[int, int]] = {}
    null = peaks[NULL]
    budgets = {"half-way up": (peaks[FUSED] + null) // 2, "checkpointing's": null, "5 % less": int(0.95 * null),
               "10 % less": int(0.9 * null), "the least": planner.least()}
    for what, budget in budgets.items():
        try:
            choice = planner.choose(budget)
        except Refused as error:
            print(f"  {what}: {str(error).partition(', and')[0].partition(' with ')[2]}")
            continue
        forecasts[what] = (budget, choice.forecast)
        steps[what] = Step(OURS, model, shape, batch, device="cpu", schedule=choice.schedule)
        peaks[what] = steps[what].peak()
    planning = time.process_time() - start
    # Each step has run for its peak.
    turns = time_by_turns(dict(steps), rounds, warmup=0, clock="processor")
    print(f"{name}, {batch} images of {SIZE} pixels; planning {planning:.0f} CPU seconds")
    for arm, step in steps.items():
        middle, low, high = turns[arm].ratio(turns[FUSED])
        budget, forecast = forecasts.get(arm, (0, 0))
        told = f"{budget / 1e6:8.1f}{forecast / 1e6:9.1f}" if budget else " " * 17
        off = f"{100 * (forecast / peaks[arm] - 1):+6.2f}" if budget else " " * 6
        label = arm.removeprefix("PyTorch, ").replace("optimizer in backward", "optim. in bw.")
        print(f"  {label:29.29}{told}{peaks[arm] / 1e6:8.1f}{off} {middle:5.2f} ({low:.2f} to {high:.2f})", flush=True)
        step.close()


def compiled(name: str, batch: int, backend: str) -> None:
    """Print real peaks of a step with torch.compile's budgets."""
    model, shape = network(name, SIZE)
    print(f"{name}, torch.compile({backend!r}), activation_memory_budget → real peak [MB]")
    for share in COMPILED:
        torch._dynamo.reset()
        step = Step(FUSED, model, shape, batch, device="cpu")
        with torch._functorch.config.patch(activation_memory_budget=share):
            run = torch.compile(step.model, backend=backend)

            def once(step: Step = step, run: Any = run) -> None:
                F.cross_entropy(run(step.x), step.y).backward()

            once()
            kept = [step.x, step.y, *step.model.parameters(), *step.model.buffers(),
                    *(value for each in step.each.values() for state in each.state.values()
                      for value in state.values() if isinstance(value, Tensor))]
            peak = peak_allocated(lambda: None, once, kept)
        print(f"  {share:.1f} → {peak / 1e6:.1f}", flush=True)
        step.close()


def main() -> None:
    """The table, then torch.compile's budgets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--compiled", nargs="*", default=["resnet50"])
    parser.add_argument("--backend", default="aot_eager_decomp_partition")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{machine_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if options.networks:
        print(f"  {'':29}{'budget':>8}{'forecast':>9}{'real MB':>8}{'off %':>6} time (quartiles)")
    for name in options.networks:
        compare(name, NETWORKS[name], options.rounds)
    for name in options.compiled:
        compiled(name, NETWORKS[name], options.backend)


if __name__ == "__main__":
    main()
