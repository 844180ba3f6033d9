"""Activation checkpointing, block by block, beside the executor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(
    model: nn.Module, patch: Callable[[nn.Module, Callable[..., Any]], None], reentrant: bool = True
) -> None:
    """Let every block of a network keep its input only and compute the rest again in backward.

    Blocks are the modules inside lists of blocks (a residual block, an Inception module) and, in plain lists of layers
    with convolutions, the stretches that end with a pooling.

    Args:
        model: the network.
        patch: gives a module another forward, which gets the original one as its first argument.
        reentrant: as in `torch.utils.checkpoint`; a forward without graph, as this package's functions need it.
    """
    for block in blocks(model):
        plain = isinstance(block, nn.Sequential) and not any(list(child.children()) for child in block)
        patch(block, _stretch_forward(_stretches(block), reentrant) if plain else _block_forward(block, reentrant))


def _stretch_forward(stretches: list[nn.Sequential], reentrant: bool) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], x: Tensor) -> Tensor:
        for stretch in stretches:
            few = sum(isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for layer in stretch) < 2
            # With one convolution, ReLU and pooling, this package's functions keep little but the input.
            x = stretch(x) if reentrant and few else _checkpointed(stretch, stretch, x, reentrant)
        return x

    return forward


def _block_forward(block: nn.Module, reentrant: bool) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], x: Any) -> Any:
        return _checkpointed(original, block, x, reentrant)

    return forward


def _checkpointed(call: Callable[..., Any], block: nn.Module, x: Any, reentrant: bool) -> Any:
    learns = any(p.requires_grad for p in block.parameters())
    if not isinstance(x, Tensor) or not torch.is_grad_enabled() or not (learns or x.requires_grad):
        return call(x)
    keep_random = x.device.type != "meta"
    if not reentrant:
        return checkpoint(call, x, use_reentrant=False, preserve_rng_state=keep_random)
    # The images need no gradient, but without an operand that does the reentrant form records nothing.
    wanted = torch.empty(0, device=x.device, requires_grad=True)

    def again(x: Tensor, _: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return call(x)
        with still_statistics(block):
            return call(x)

    return checkpoint(again, x, wanted, use_reentrant=True, preserve_rng_state=keep_random)


@contextmanager
def still_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch but leave their running statistics alone: they have seen this batch."""
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.training]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def blocks(module: nn.Module) -> list[nn.Module]:
    """The modules inside lists of blocks, and plain lists of layers with convolutions; see `checkpoint_blocks`."""
    found = []
    for child in module.children():
        inner = list(child.children())
        if not inner:
            continue
        if isinstance(child, nn.Sequential) and any(list(each.children()) for each in inner):
            found += blocks(child)
        elif any(isinstance(each, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for each in child.modules()):
            found.append(child)
    return found


def _stretches(layers: Any) -> list[nn.Sequential]:
    """The layers cut after each pooling, or into about √n parts before a convolution where there is none."""
    parts: list[list[nn.Module]] = [[]]
    pools = any(isinstance(layer, nn.MaxPool2d) for layer in layers)
    convolutions = [index for index, layer in enumerate(layers) if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    size = max(1, math.isqrt(len(convolutions)))
    cuts = set(convolutions[size::size])
    for index, layer in enumerate(layers):
        if not pools and index in cuts:
            parts.append([])
        parts[-1].append(layer)
        if pools and isinstance(layer, nn.MaxPool2d):
            parts.append([])
    return [nn.Sequential(*part) for part in parts if part]
