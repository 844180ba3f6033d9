"""Compiling a network block by block."""

from __future__ import annotations

import sys

import torch
from torch import fx, nn

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def graph_count() -> int:
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo.utils" in sys.modules else 0


def compiled_blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that are compiled one by one: children, and what is inside plain lists of blocks."""
    if isinstance(model, fx.GraphModule):
        return [model]  # its graph calls the layers themselves, not the blocks that they came in
    blocks = []
    for child in model.children():
        inner = list(child.children())
        if not inner:
            continue
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and any(list(block.children()) for block in inner):
            blocks += compiled_blocks(child)
        else:
            blocks.append(child)
    return blocks or [model]
