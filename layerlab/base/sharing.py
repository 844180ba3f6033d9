"""Tensors that a network has under several names."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn


def shared_names(network: nn.Module) -> list[list[str]]:
    """The names of each parameter and buffer that has several: tied weights, and those of modules used twice."""
    names: dict[Tensor, list[str]] = {}
    every = chain(network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
    for name, tensor in every:
        names.setdefault(tensor, []).append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)
