"""What can be said of a network before several workers train it, from one step on a copy of it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from layerlab import devices


def idle_parameters(network: nn.Module, example: Tensor) -> list[str]:
    """Names of learning parameters that get no gradient from one pass in training mode.

    Args:
        network: not changed, random states neither.
        example: images, (batch, channels, height, width); of a single one two are made, for batch norm.
    """
    model = copy.deepcopy(network).train()
    model.zero_grad(set_to_none=True)
    images = example if len(example) > 1 else torch.cat((example, example))
    before = devices.random_state(images.device)
    with torch.enable_grad():
        reached = [leaf.sum() for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if reached:
            torch.autograd.backward(reached)
    devices.set_random_state(before, images.device)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]


def notes_on_shares(network: nn.Module) -> list[str]:
    """Sentences on what differs from one process because each worker sees a share of the batch."""
    notes = []
    norms = sum(isinstance(module, _BatchNorm) for module in network.modules())
    if norms:
        notes.append(f"On several workers, {norms} batch norms normalise by a worker's share of the batch, so that the "
                     "weights are not those of one process.")
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in network.modules()):
        notes.append("On several workers, dropout draws anew in each.")
    return notes
