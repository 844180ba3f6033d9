"""Batch-norm statistics that a layer keeps for good when it stops learning."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerlab import Batches, Run, measure
from layerlab_learn_and_drop.method.cutting import mode

# Enough for means and variances of a channel; a pass over a small training set has fewer.
BATCHES = 200


def batch_norms(network: nn.Module, names: Collection[str]) -> list[_BatchNorm]:
    """Those of a network's modules that track batch statistics, of the given names."""
    modules = [network.get_submodule(name) for name in names]
    return [module for module in modules if isinstance(module, _BatchNorm) and module.running_mean is not None]


def settle(run: Run, network: nn.Module, norms: Collection[_BatchNorm], data: Batches, seed: int) -> int:
    """Replace running statistics by those of the weights as they are, by forward passes in the place of their average.

    A running average follows the weights at a distance: after few steps, or with a small momentum, it is far from what
    the layer gives, and in inference mode, in which the layer stays from then on, its outputs explode.

    Args:
        run: whose batch size, memory format and autocast are used.
        network: runs the layers, in inference mode but for `norms`.
        norms: whose statistics are made anew.
        data: gives the images.
        seed: of their order and augmentation.

    Returns:
        FLOPs of these passes, which the run is told of (`Run.spend`).
    """
    if not norms:
        return 0
    each = flops = 0
    order = torch.Generator().manual_seed(seed)
    batches = data.batches(run.batch_size, order, torch.float32, memory_format(run))
    momenta = {module: module.momentum for module in norms}
    try:
        with torch.no_grad(), mode(network, training=False), run.autocast():
            for module in norms:
                module.reset_running_stats()
                # None: the plain mean over all passes.
                module.momentum = None
                module.train()
            for x, _ in islice(batches, BATCHES):
                if each:
                    network(x)
                else:
                    # All batches are of one size.
                    with measure.Meter() as meter:
                        network(x)
                    assert meter.cost is not None
                    each = meter.cost.flops
                flops += each
    finally:
        for module, momentum in momenta.items():
            module.momentum = momentum
    run.spend(flops)
    return flops


def memory_format(run: Run) -> torch.memory_format:
    """Of the run's images."""
    channels_last = run.example.is_contiguous(memory_format=torch.channels_last) and not run.example.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
