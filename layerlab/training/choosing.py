"""What a short measurement on this machine decides before the first step."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from layerlab.base.errors import LayerlabError, LayerlabWarning
from layerlab.base.files import write_json
from layerlab.contract.run import Batches
from layerlab.measure.clock import time_by_turns
from layerlab.training.settings import Settings

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# Its name in a checkpoint's folder, so that a fit that goes on computes as it began.
CHOSEN = "memory_format.json"
# Images of a measured step at most, rounds, and how much slower 16 bits may be, noise included, before it is worth a
# word.
IMAGES, ROUNDS, SLOWER = 128, 3, 1.25


def memory_format(
    settings: Settings, network: nn.Module, images: Batches, folder: Path | None, writes: bool
) -> torch.memory_format:
    """The memory format of images and convolutions that the settings name, or that is faster here.

    Args:
        settings: the fit's; `channels_last="auto"` asks for a measurement.
        network: as it is trained; it is not changed.
        images: of the training.
        folder: of the checkpoint; what it holds counts.
        writes: whether the choice is written there.
    """
    if settings.channels_last != "auto":
        return torch.channels_last if settings.channels_last else torch.contiguous_format
    file = folder / CHOSEN if folder is not None else None
    if file is not None and file.exists():
        return _chosen_before(file)
    chosen = _faster_format(network, images, min(IMAGES, settings.batch_size))
    if file is not None and writes:
        write_json(file, {"memory_format": chosen})
    return FORMATS[chosen]


def _chosen_before(file: Path) -> torch.memory_format:
    """What a checkpoint's folder says.

    Raises:
        LayerlabError: it says no memory format.
    """
    try:
        return FORMATS[json.loads(file.read_text(encoding="utf-8"))["memory_format"]]
    except (OSError, ValueError, TypeError, KeyError):
        raise LayerlabError(f"{file} does not say in which memory format this fit computes; delete the folder "
                            f"{file.parent} to start anew, or write {{\"memory_format\": \"contiguous\"}} or "
                            "{\"memory_format\": \"channels-last\"} into it.") from None


def _faster_format(network: nn.Module, images: Batches, count: int) -> str:
    """Forward and backward of a few images in both formats, by turns; the name of the faster one."""
    if not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        return "contiguous"
    x, _ = next(images.batches(count, None, torch.float32, torch.contiguous_format))
    if not isinstance(x, Tensor) or x.dim() != 4:
        return "contiguous"
    calls = {}
    for name, form in FORMATS.items():
        own = copy.deepcopy(network).to(memory_format=form).train()
        given = x.contiguous(memory_format=form)
        calls[name] = functools.partial(_forward_backward, own, given)
    # Dropout draws from the global random state, which belongs to the training.
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        turns = time_by_turns(calls, rounds=ROUNDS, warmup=1, device=str(x.device))
    return min(turns, key=lambda name: min(turns[name].seconds))


def _forward_backward(network: nn.Module, x: Tensor) -> None:
    network(x).square().mean().backward()
    network.zero_grad(set_to_none=True)


def warn_of_slow(device: torch.device, kind: torch.dtype) -> None:
    """Say in one sentence, once a process and place, that this processor is slower with 16 bits than without them."""
    times = _times(device.type, kind)
    if times > SLOWER:
        name = str(kind).removeprefix("torch.")
        warnings.warn(
            f"This processor takes {times:.1f} times as long for a convolution in {name} as in float32; use "
            "precision='float32'.",
            LayerlabWarning,
            stacklevel=2,
        )


@functools.cache
def _times(device: str, kind: torch.dtype) -> float:
    """Seconds of forward and backward of a convolution in a type of 16 bits over those in float32."""
    calls = {}
    # Enough for a GPU to compute longer than a process takes to start a kernel.
    images = 1024 if device == "cuda" else 16
    for each in (torch.float32, kind):
        x = torch.zeros(images, 64, 16, 16, device=device, dtype=each, requires_grad=True)
        weight = torch.zeros(64, 64, 3, 3, device=device, dtype=each, requires_grad=True)
        calls[str(each)] = functools.partial(_convolve, x, weight)
    single, half = time_by_turns(calls, rounds=ROUNDS, warmup=1, device=device).values()
    return min(half.seconds) / min(single.seconds)


def _convolve(x: Tensor, weight: Tensor) -> None:
    nn.functional.conv2d(x, weight, padding=1).sum().backward()
