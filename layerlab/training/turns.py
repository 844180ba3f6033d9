"""What a run keeps to itself while several take turns in one process: random state, determinism, GPU memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from layerlab.base.devices import random_state, set_random_state
from layerlab.training.settings import Settings


class Turn:
    """The state of one run between its turns: `with turn.taken(): …`.

    Args:
        seed: of the run's random state.
        device: where it trains.
        settings: the fit's.

    Attributes:
        random: the global random states as the run left them, to be stored and taken back.
        others: bytes on the GPU that belong to other runs.
    """

    def __init__(self, seed: int, device: torch.device, settings: Settings) -> None:
        self.device = device
        self.settings = settings
        self.random = _seeded(seed, device)
        self.others = 0
        self._own = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The run's random state and determinism in force; what it allocates is counted as its own."""
        cuda = self.device.type == "cuda"
        with ExitStack() as stack:
            outside = random_state(self.device)
            set_random_state(self.random, self.device)
            stack.callback(set_random_state, outside, self.device)
            if cuda and self.settings.deterministic:
                stack.enter_context(_deterministic())
            before = torch.cuda.memory_allocated(self.device) if cuda else 0
            self.others = before - self._own
            if self.settings.compile:
                stack.enter_context(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
            yield
            self.random = random_state(self.device)
            if cuda:
                self._own += torch.cuda.memory_allocated(self.device) - before


def _seeded(seed: int, device: torch.device) -> list[Tensor]:
    """The global random states right after seeding, without disturbing the present ones."""
    outside = random_state(device)
    torch.manual_seed(seed)
    state = random_state(device)
    set_random_state(outside, device)
    return state


@contextmanager
def _deterministic() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    filling: Any = torch.utils.deterministic  # a module that gets its attribute at run time
    fills = filling.fill_uninitialized_memory
    before = (cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled(),
              torch.is_deterministic_algorithms_warn_only_enabled())
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before[0], before[1]
        torch.use_deterministic_algorithms(before[2], warn_only=before[3])
        filling.fill_uninitialized_memory = fills
