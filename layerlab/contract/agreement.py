"""Whether two networks compute the same, up to rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerlab.base.devices import random_state, set_random_state
from layerlab.base.errors import LayerlabError
from layerlab.base.trees import on_tensors, predict, tensors

# Of the largest output: some thousand roundings in float32, far below what a lost layer or a wrong constant does.
TOLERANCE = 1e-3


def check_agreement(before: nn.Module, after: nn.Module, example: Any, modes: Iterable[bool]) -> None:
    """Compare what two networks give for `example` and for as much noise.

    Args:
        before, after: networks; both are left as they were.
        example: what they take: images, (batch, channels, height, width), say.
        modes: in training mode (True) or evaluation mode (False).

    Raises:
        LayerlabError: they differ by more than rounding; with the largest difference.
    """
    draw = torch.Generator().manual_seed(0)

    def noise_like(each: Tensor) -> Tensor:
        # Numbers of words or classes have no noise.
        return torch.randn(each.shape, generator=draw).to(each) if each.is_floating_point() else each

    noise = on_tensors(noise_like, example)
    for training in modes:
        for what, images in (("the example", example), ("noise", noise)):
            wanted, got = _outputs(before, images, training), _outputs(after, images, training)  # (batch, classes)
            mode = "training" if training else "evaluation"
            if wanted.shape != got.shape:
                raise LayerlabError(f"A change of the network's structure that is meant to be exact changes the shape "
                                    f"of its outputs from {tuple(wanted.shape)} to {tuple(got.shape)}.")
            difference, scale = (wanted - got).abs().max().item(), wanted.abs().max().item()
            # Not `>`: a difference that is not a number is one.
            if not difference <= TOLERANCE * scale:
                raise LayerlabError(
                    f"A change of the network's structure that is meant to be exact changes its outputs for {what} by "
                    f"up to {difference:.3g} in {mode} mode, where the largest is {scale:.3g}; this is a fault of the "
                    "strategy, tell its author which network it was."
                )


def _outputs(network: nn.Module, images: Any, training: bool) -> Tensor:
    # Without TF32, whose rounding is as coarse as what is looked for.
    precise = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    device = tensors(images)[0].device
    with _as_it_was(network, device), precise, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        network.train(training)
        return tensors(predict(network, images))[0].double()


@contextmanager
def _as_it_was(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Put modes, buffers and random states back after the block; the random states are the same in each block."""
    modes = {module: module.training for module in network.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    outside = random_state(device)
    torch.manual_seed(0)
    try:
        yield
    finally:
        set_random_state(outside, device)
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)
