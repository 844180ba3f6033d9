"""How much faster a pruned network answers: ratios to the unpruned one and to the peer at batch 1 and 128, by turns.

Run: python benchmarks/pruned_inference.py [--depth 164] [--image-size 32] [--share 0.558] [--latency 0.7] [--rounds 31]
     [--batches 1 128] [--device cpu] [--clock wall] [--compile]
The pre-activation ResNet with random scales in its batch norms, and every second block's all small, is pruned to a
share of its parameters: by adaptive pruning, which removes whole blocks too, and by torch-pruning's network slimming;
and by adaptive pruning to a share of the dense network's latency at the batch in question. `folded` is the same network
as `fold` makes it for inference; the peer is measured as it is, and folded alike. The paper's ratio is 1.7 at a share
of 0.558. Weights do not matter to the time.

With `--clock processor` the time is the process's on its processors, which a loaded machine disturbs least; one thread
is then what it is meant for. glibc maps a tensor of 32 MiB or more anew each time, as the trunk is at batch 128: page
faults take up to half of the time, and a network whose trunk has a channel less is ahead. An allocator for serving
keeps the memory, as glibc does with
GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184. `--latency 0` leaves that
target out. Compiled, a selection of channels, the batch norm behind it and its ReLU are one loop; each network is
compiled once a batch size, which takes minutes.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from functools import partial
from typing import cast, get_args

import torch
import torch_pruning
from torch import nn

from layerlab import build_model
from layerlab.measure import Clock, Turns, machine_name, time_by_turns
from layerlab_adaptive_pruning import below, fold, remove_channels, scales
from layerlab_adaptive_pruning.analysis import multiply_accumulates
from layerlab_adaptive_pruning.method.pruning import confirmed, count, search

PEER = "network slimming"
# Turns in which each trial of the search for a latency is measured.
TRIAL = 3


def uneven(depth: int) -> nn.Module:
    """The network with |γ| between 0 and 1, a tenth of that in every second block."""
    torch.manual_seed(0)
    network = build_model("preact-resnet", depth=depth).eval()
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                block = name.split(".")[1] if "." in name else "0"
                module.weight.copy_(torch.rand(module.num_features) * (0.1 if int(block) % 2 else 1.0))
    return network


def pruned(network: nn.Module, images: torch.Tensor, level: float) -> nn.Module:
    """A copy pruned at one threshold for all layers."""
    copied = copy.deepcopy(network)
    return remove_channels(copied, images, below(copied, level), check=False)[0].eval()


def levels(network: nn.Module) -> list[float]:
    """Thresholds, ascending."""
    return torch.cat(list(scales(network).values())).sort().values[::8].tolist()


def adaptive(network: nn.Module, images: torch.Tensor, share: float) -> nn.Module:
    """Pruned to a share of the parameters."""
    whole = count(network)
    found = search(lambda level: count(pruned(network, images, level)) / whole, levels(network), share,
                   "adaptive pruning", "parameters")
    return pruned(network, images, found[0])


def by_latency(network: nn.Module, images: torch.Tensor, share: float, x: torch.Tensor, clock: Clock) -> nn.Module:
    """Pruned to a share of the latency with these images, both folded."""
    dense = fold(network)

    def cost(level: float, rounds: int = TRIAL) -> float:
        timed = {"dense": dense, "pruned": fold(pruned(network, images, level)).to(x.device)}
        turns = by_turns(timed, x, rounds, clock)
        return turns["pruned"].ratio(turns["dense"])[0]

    dense.to(x.device)
    wanted, tried = f"latency {share:g}", levels(network)
    level = search(cost, tried, share, wanted, "latency")[0]
    level, _ = confirmed(lambda level: cost(level, 3 * TRIAL), tried[tried.index(level) :], share, wanted)
    return pruned(network, images, level)


def slimmed(network: nn.Module, images: torch.Tensor, share: float) -> nn.Module:
    """Pruned by torch-pruning's BNScalePruner."""
    whole = count(network)

    def pruned(ratio: float) -> nn.Module:
        copied = copy.deepcopy(network)
        torch_pruning.pruner.BNScalePruner(
            copied, images, importance=torch_pruning.importance.BNScaleImportance(), global_pruning=True,
            pruning_ratio=ratio, ignored_layers=[copied.fc],
        ).step()
        return copied.eval()

    ratios = [step / 200 for step in range(200)]
    return pruned(search(lambda ratio: count(pruned(ratio)) / whole, ratios, share, PEER, "parameters")[0])


def by_turns(networks: Mapping[str, nn.Module], x: torch.Tensor, rounds: int, clock: Clock) -> dict[str, Turns]:
    """Seconds of one forward pass of each network in each round, by the clock of that name."""
    with torch.inference_mode():
        return time_by_turns({name: partial(network, x) for name, network in networks.items()}, rounds, warmup=2,
                             device=str(x.device), clock=clock)


def spread(turns: Turns, other: Turns) -> str:
    """How many times faster the second is: median and quartiles."""
    middle, low, high = turns.ratio(other)
    return f"{middle:.2f} × ({low:.2f}–{high:.2f})"


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=164)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.558)
    parser.add_argument("--latency", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=get_args(Clock), default="wall")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Print a line a batch and network."""
    chosen = arguments()
    dense, size = uneven(chosen.depth), chosen.image_size
    images = torch.randn(2, 3, size, size)
    ours, peer = adaptive(dense, images, chosen.share), slimmed(dense, images, chosen.share)
    print(f"{machine_name()}, {torch.get_num_threads()} threads, ResNet-{chosen.depth}, {size} pixels, "
          f"{chosen.clock} time{', compiled' if chosen.compile else ''}")
    for batch in chosen.batches:
        x = torch.randn(batch, 3, size, size, device=chosen.device)
        networks = {"dense": dense, "dense, folded": fold(dense), "adaptive pruning": ours,
                    "adaptive pruning, folded": fold(ours), PEER: peer, f"{PEER}, folded": fold(peer)}
        sizes = dict(zip(networks, map(count, (dense, dense, ours, ours, peer, peer)), strict=True))
        if chosen.latency:
            name = f"… to latency {chosen.latency:g}, folded"
            timely = by_latency(copy.deepcopy(dense), images, chosen.latency, x, chosen.clock)
            networks[name], sizes[name] = fold(timely), count(timely)
        timed = {name: network.to(chosen.device) for name, network in networks.items()}
        if chosen.compile:
            torch.compiler.reset()
            timed = {name: cast(nn.Module, torch.compile(network, dynamic=False)) for name, network in timed.items()}
        turns = by_turns(timed, x, chosen.rounds, chosen.clock)
        for name, network in networks.items():
            print(f"batch {batch:3}  {name:26} {sizes[name]:9,} parameters  "
                  f"{multiply_accumulates(network, x[:1]) / 1e6:6.1f} M MACs  {1e3 * turns[name].median:7.1f} ms  "
                  f"{spread(turns['dense'], turns[name])} dense  {spread(turns[PEER], turns[name])} {PEER}", flush=True)
        dense, ours, peer = (network.cpu() for network in (dense, ours, peer))


if __name__ == "__main__":
    main()
