"""Devices: which one to use, its random state and the free memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from layerlab.base.errors import LayerlabError, first_line
from layerlab.base.memory import available_memory


def random_state(device: torch.device) -> list[Tensor]:
    """The global random states that a run on `device` draws from: the CPU's, and on a GPU its own."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Go back to what `random_state` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the random states of Python, NumPy, the CPU and `device` are afterwards as before."""
    outside = random_state(device), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        set_random_state(outside[0], device)
        random.setstate(outside[1])
        np.random.set_state(outside[2])


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` → a CUDA device if there is one, else Apple's GPU, else the CPU.

    Raises:
        LayerlabError: a device that this machine does not have.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise LayerlabError(
            f"Device {str(device)!r} is not available here ({first_line(error)}); use 'auto' or 'cpu'."
        ) from None
    return place


def free_memory(device: torch.device) -> float:
    """Bytes that are free on the device; on the CPU in main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()
