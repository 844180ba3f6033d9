"""What memory-reorder does with a network, and what it saves there: found by a dry run before any training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from layerlab import LayerlabError, Preflight, first_line
from layerlab_memory_reorder.method.executor import CONVOLUTIONS, reorders
from layerlab_memory_reorder.method.measuring import BOTH, FUSED, NULL, OURS, measured_peak
from layerlab_memory_reorder.method.trace import symbolic

BATCH = 32
"""Images of the dry runs."""
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def coverage(network: nn.Module, example: Tensor, settings: Mapping[str, Any], checkpointing: bool) -> Preflight:
    """Which layers follow the plan, and the peak against PyTorch's own best at the same amount of computing.

    That is its optimizer in backward; with checkpointing, both together.

    Args:
        network: not changed.
        example: images, (batch, channels, height, width).
        settings: of `Takeover`, but for its checkpointing.
        checkpointing: whether blocks are computed again in backward.
    """
    covered, left_out = [], {}
    for name, module in network.named_modules():
        if reorders(module):
            covered.append(name)
        elif isinstance(module, CONVOLUTIONS) and type(module) in CONVOLUTIONS:
            left_out[name] = "its padding is not zeros by number, so it keeps PyTorch's backward"
    if not any(parameter.requires_grad for parameter in network.parameters()):
        return Preflight.of(network, covered, left_out)
    notes, saves = [], {}
    called = _called_relus(network) if "relu" in settings["fuse"] else ""
    notes += [called] if called else []
    ours, null = (BOTH, NULL) if checkpointing else (OURS, FUSED)
    shape = tuple(example.shape[1:])
    try:
        shapes = copy.deepcopy(network).to("meta")
        mine = measured_peak(shapes, shape, BATCH, ours, **settings)
        theirs = measured_peak(shapes, shape, BATCH, null)
    except (LayerlabError, RuntimeError, TypeError) as error:
        notes.append(f"The network cannot run dry ({first_line(error)}), so what it saves is not known.")
    else:
        if mine < theirs:
            saves[f"peak memory, against PyTorch's {null.removeprefix('PyTorch, ')},"] = 1 - mine / theirs
        notes.append(_verdict(mine, theirs, null, checkpointing))
    return Preflight.of(network, covered, left_out, saves=saves, notes=notes,
                        otherwise="it keeps PyTorch's backward")


def _verdict(mine: int, theirs: int, null: str, checkpointing: bool) -> str:
    text = (f"A step of {BATCH} images with SGD and momentum needs {mine / 1e6:.3g} MB by a dry run, PyTorch's "
            f"{null.removeprefix('PyTorch, ')} {theirs / 1e6:.3g} MB")
    if mine <= 0.99 * theirs:
        return f"{text}."
    if mine <= 1.01 * theirs:
        return f"{text}: this method saves nothing here."
    remedy = " Checkpoint blocks in PyTorch instead." if checkpointing else ""
    return f"{text}: this method is worse here.{remedy}"


def _called_relus(network: nn.Module) -> str:
    """What is to say of ReLUs that are no modules, which cannot leave their sign to the layer that reads them."""
    try:
        graph: fx.GraphModule = symbolic(network)
    except LayerlabError as error:
        return f"No ReLU leaves its sign to the layer that reads it: {first_line(error)}"
    called = sum(node.op in ("call_function", "call_method") and node.target in _RELUS for node in graph.graph.nodes)
    if not called:
        return ""
    return f"ReLUs called as functions ({called}) keep their results, as in PyTorch; modules would save these."
