"""How much faster a pruned network answers: ratios to the unpruned one at batch 1 and 128, by turns.

Run: python benchmarks/pruned_inference.py [--depth 164] [--image-size 32] [--share 0.558] [--rounds 31] [--device cpu]
     [--compile]
The pre-activation ResNet with random scales in its batch norms, and every second block's all small, is pruned to a
share of its parameters: by adaptive pruning, which removes whole blocks too, and by torch-pruning's network slimming.
The paper's ratio is 1.7 at a share of 0.558. Weights do not matter to the time. Compiled, a selection of channels, the
batch norm behind it and its ReLU are one loop; each network is compiled once a batch size, which takes minutes.
"""

from __future__ import annotations

import argparse
import copy
from typing import cast

import torch
import torch_pruning
from torch import nn

from layerlab import build_model
from layerlab.measure import machine_name
from layerlab_adaptive_pruning import below, remove_channels, scales
from layerlab_adaptive_pruning.analysis import multiply_accumulates
from layerlab_adaptive_pruning.method.pruning import count, latencies, search


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


def adaptive(network: nn.Module, images: torch.Tensor, share: float) -> nn.Module:
    """Pruned at one threshold for all layers."""
    whole = count(network)
    levels = torch.cat(list(scales(network).values())).sort().values[::8].tolist()

    def pruned(level: float) -> nn.Module:
        copied = copy.deepcopy(network)
        return remove_channels(copied, images, below(copied, level))[0]

    return pruned(search(lambda level: count(pruned(level)) / whole, levels, share, "adaptive pruning")[0])


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
    return pruned(search(lambda ratio: count(pruned(ratio)) / whole, ratios, share, "network slimming")[0])


def main() -> None:
    """Print a line a batch and network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=164)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.558)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    dense = uneven(arguments.depth)
    size = arguments.image_size
    images = torch.randn(2, 3, size, size)
    networks = {"dense": dense, "adaptive pruning": adaptive(dense, images, arguments.share),
                "network slimming": slimmed(dense, images, arguments.share)}
    print(f"{machine_name()}, {torch.get_num_threads()} threads, ResNet-{arguments.depth}, {size} pixels"
          f"{', compiled' if arguments.compile else ''}")
    for batch in (1, 128):
        x = torch.randn(batch, 3, size, size, device=arguments.device)
        timed = {name: network.to(arguments.device) for name, network in networks.items()}
        if arguments.compile:
            torch.compiler.reset()
            timed = {name: cast(nn.Module, torch.compile(network, dynamic=False)) for name, network in timed.items()}
        turns = latencies(timed, x, arguments.rounds)
        for name, network in networks.items():
            middle, low, high = turns["dense"].ratio(turns[name])
            layers = sum(isinstance(module, nn.Conv2d) for module in network.modules())
            print(f"batch {batch:3}  {name:17} {count(network):9,} parameters  {layers:3} convolutions  "
                  f"{multiply_accumulates(network, x[:1]) / 1e6:6.1f} M MACs  "
                  f"{1e3 * turns[name].median:8.1f} ms  {middle:.2f} × ({low:.2f}–{high:.2f})")


if __name__ == "__main__":
    main()
