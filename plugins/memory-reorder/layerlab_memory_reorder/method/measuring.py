"""A training step of each arm as plain PyTorch runs it, and what it needs: peaks, times, the largest that fits."""

from __future__ import annotations

import copy
import gc
import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerlab import LayerlabError, measure
from layerlab_memory_reorder.method import plan as plans
from layerlab_memory_reorder.method.checkpointing import checkpoint_blocks
from layerlab_memory_reorder.method.executor import Takeover
from layerlab_memory_reorder.method.trace import Network, trace

# Ways of doing a training step in plain PyTorch. `gradients kept`: until zero_grad, called after the forward pass as in
# PyTorch's tutorials; `freed first`: zero_grad before the forward pass, as `layerlab.fit` does; `optimizer in
# backward`: one optimizer for each parameter, stepped and freed by `register_post_accumulate_grad_hook`; `activation
# checkpointing`: `torch.utils.checkpoint`, blocks as in `checkpoint_blocks`; and the last two together, which is the
# least that a user reaches without this method.
USERS, PLAIN, FUSED = "PyTorch, gradients kept", "PyTorch, gradients freed first", "PyTorch, optimizer in backward"
CHECKPOINTING, NULL = "activation checkpointing", "checkpointing + optimizer in backward"
# Ways of this method: the paper's part alone, all of it, and all of it with checkpointing.
PAPER, OURS, BOTH = "paper's part: order, early update", "memory-reorder", "memory-reorder + checkpointing"
ARMS = (USERS, PLAIN, FUSED, CHECKPOINTING, NULL, PAPER, OURS, BOTH)
# The parts of memory-reorder, each on top of those before it → the settings that switch them on. Only the first is in
# the paper.
PARTS: dict[str, dict[str, Any]] = {
    PAPER: {"slab": 0, "fuse": ()},
    "+ slabs": {"fuse": ()},
    "+ ReLU's sign": {"fuse": ("relu",)},
    "+ pooling's places in 2 bytes": {"fuse": ("relu", "pool")},
    "+ response norm computed again": {},
}
# Tensors of a parameter's size that an optimizer keeps for it.
STATES = {"sgd": 1, "adamw": 2}
# (channels, height, width)
IMAGENET = (3, 224, 224)


class Step:
    """A training step of one of `ARMS` or `PARTS`, on a network of its own.

    Args:
        arm: one of `ARMS` or `PARTS`.
        model: copied to `device`.
        input_shape: of one image.
        batch_size: images a step.
        optimizer: `sgd` (momentum 0.9) or `adamw`.
        device: `meta` runs the same code without computing or allocating anything, for its peak alone; `cpu`; `cuda`.
        classes: of the random labels.
        settings: for `Takeover`.

    Attributes:
        each: parameter → its own optimizer, where the optimizer runs in backward.

    Raises:
        LayerlabError: unknown arm or optimizer, or a device that is not there.
    """

    def __init__(
        self, arm: str, model: nn.Module, input_shape: tuple[int, ...], batch_size: int, optimizer: str = "sgd",
        device: str = "meta", classes: int = 1000, **settings: Any,
    ) -> None:
        known = dict.fromkeys((*ARMS, *PARTS))
        if arm not in known:
            raise LayerlabError(f"Unknown way of doing a step {arm!r}; known: {', '.join(known)}.")
        if optimizer not in STATES:
            raise LayerlabError(f"Peaks are measured with {' or '.join(STATES)}, not {optimizer!r}.")
        if device == "cuda" and not torch.cuda.is_available():
            raise LayerlabError("There is no CUDA device here; use device 'cpu' or 'meta'.")
        self.arm, self.device = arm, torch.device(device)
        self._others = _allocated(self.device)
        self.model = _on_device(model, device)
        self.model.train()
        self.x = torch.empty(batch_size, *input_shape, device=device)
        self.y = torch.zeros(batch_size, dtype=torch.int64, device=device)
        if device != "meta":
            self.x.normal_()
            self.y.random_(classes)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._stack = ExitStack()
        self._takeover: Takeover | None = None
        self.optimizer = _optimizer(optimizer, parameters)
        self.each: dict[nn.Parameter, torch.optim.Optimizer] = {}
        if arm in (FUSED, NULL):
            self.each = {p: _optimizer(optimizer, [p]) for p in parameters}
            for parameter in parameters:
                self._stack.callback(parameter.register_post_accumulate_grad_hook(self._at_once).remove)
        if arm in (CHECKPOINTING, NULL):
            checkpoint_blocks(self.model, self._patch, reentrant=False)
        if arm in (OURS, BOTH) or arm in PARTS:
            settings = PARTS.get(arm, {}) | settings
            self._takeover = Takeover(self.model, self.optimizer, self.x[:2], checkpointing=arm == BOTH, **settings)
            self._stack.enter_context(self._takeover)

    def __call__(self) -> Tensor:
        """One step; returns the detached loss."""
        return self._with(self.x, self.y)

    def peak(self) -> int:
        """The most bytes allocated at once in a step after the first: weights, optimizer state, gradients, activations.

        On a GPU by the CUDA allocator, less what was there before this object was; on a CPU by
        `measure.peak_allocated`. Kernels' workspaces count, but for the one that cuBLAS keeps for good. On the meta
        device, where no kernel runs, the live tensors' bytes: a dry run.
        """
        if self.device.type == "cpu":
            kept = [self.x, self.y, *self.model.parameters(), *self.model.buffers()]
            # What a first step leaves is the optimizer's state, whatever its batch.
            return measure.peak_allocated(lambda: self._with(self.x[:2], self.y[:2]), self, kept)
        self()
        holders = [self.optimizer, *self.each.values()]
        with measure.Meter(self.model, *holders, self.x, self.y) as meter:
            self()
        assert meter.cost is not None
        assert meter.cost.peak_memory_bytes is not None
        return meter.cost.peak_memory_bytes - self._others

    def close(self) -> None:
        """Give the network back its own forward and remove all hooks."""
        self._stack.close()

    def _with(self, x: Tensor, y: Tensor) -> Tensor:
        if self.arm != USERS:
            self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(x), y)
        if self.arm == USERS:
            self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._takeover is not None:
            self._takeover.finish()
        elif not self.each:
            self.optimizer.step()
        return loss.detach()

    def _at_once(self, parameter: nn.Parameter) -> None:
        self.each[parameter].step()
        parameter.grad = None

    def _patch(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        original = module.forward
        module.forward = lambda *arguments: forward(original, *arguments)
        self._stack.callback(delattr, module, "forward")


def _allocated(device: torch.device) -> int:
    """Bytes on a GPU before anything of a step's is there; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    gc.collect()
    square = torch.zeros(8, 8, device=device)
    square @ square  # the first product takes cuBLAS's workspace
    del square
    return torch.cuda.memory_allocated(device)


def _on_device(model: nn.Module, device: str) -> nn.Module:
    """A copy; of weights that were never made (meta) one with any values, which do for memory and time."""
    if device == "meta" or not next(model.parameters()).is_meta:
        return copy.deepcopy(model).to(device)
    made = copy.deepcopy(model).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.uniform_(-0.03, 0.03) if tensor.is_floating_point() else tensor.zero_()
        for name, buffer in made.named_buffers():
            if name.endswith("running_var"):
                buffer.fill_(1)
    return made


def _optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "sgd":
        # No weight decay: PyTorch's foreach SGD adds it to a copy of the gradients, which would make every arm that
        # updates several or large weights at once look worse than it needs to be.
        return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, foreach=True)
    return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)


def measured_peak(
    model: nn.Module, input_shape: tuple[int, ...], batch_size: int, arm: str = OURS, **options: Any
) -> int:
    """Peak bytes of one training step; `options` and errors as of `Step`. Infinite memory is assumed but on a GPU.

    Raises:
        torch.cuda.OutOfMemoryError: on a GPU that is too small.
    """
    step = Step(arm, model, input_shape, batch_size, **options)
    try:
        return step.peak()
    finally:
        step.close()


def largest_batch(
    model: nn.Module, memory: int, input_shape: tuple[int, ...] = IMAGENET, arm: str = OURS, **options: Any
) -> int:
    """The largest batch whose training step stays within `memory`, found by search on the measured peak.

    The reverse, the memory that a batch needs, is `measured_peak`.

    Args:
        model: any network.
        memory: bytes.
        input_shape: of one image.
        arm: one of `ARMS`.
        options: as of `Step`; on the default device `meta` nothing is computed.

    Returns:
        Images; 0 when not even one fits.
    """
    return largest(lambda batch: measured_peak(model, input_shape, batch, arm, **options), memory)


def largest_network(
    build: Callable[[int], nn.Module], memory: int, batch_size: int, input_shape: tuple[int, ...] = IMAGENET,
    arm: str = OURS, **options: Any,
) -> int:
    """The largest size whose network trains within `memory` at a given batch, found by search on the measured peak.

    Args:
        build: makes a network from a whole-numbered size (a width, a number of blocks), growing with it.
        memory: bytes.
        batch_size, input_shape, arm, options: as of `largest_batch`.

    Returns:
        The size; 0 when not even size 1 fits.
    """
    def peak(size: int) -> float:
        with torch.device("meta"):
            model = build(size)
        return measured_peak(model, input_shape, batch_size, arm, **options)

    return largest(peak, memory)


def largest_planned_batch(
    model: nn.Module, memory: int, input_shape: tuple[int, ...], make: Callable[[Network], plans.Plan]
) -> int:
    """The largest batch whose plan fits, as `largest_batch`, from the plan instead of a measurement."""
    return largest(lambda batch: make(trace(model, input_shape, batch)).total, memory)


def largest(peak: Callable[[int], float], memory: float) -> int:
    """The largest whole number whose peak fits; peaks grow, nearly along a line, which is what the guesses use."""
    @cache
    def needs(size: int) -> float:
        try:
            return peak(size)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return math.inf

    if needs(1) > memory:
        return 0
    low, high = 1, 2
    while needs(high) <= memory:
        # One more than the line through the last two sizes says; the first two lie too close together to go far by.
        slope = (needs(high) - needs(low)) / (high - low)
        reach = high + (memory - needs(high)) / slope + 1 if slope > 0 else math.inf
        low, high = high, int(min(max(reach, high + 1), 32 * high))
    for turn in itertools.count():
        if high - low <= 1:
            return low
        share = (memory - needs(low)) / (needs(high) - needs(low))
        guess = (low + high) // 2 if turn % 3 == 2 else low + int(share * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        low, high = (guess, high) if needs(guess) <= memory else (low, guess)
    raise AssertionError("unreachable")
