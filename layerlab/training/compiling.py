"""Compiling a network block by block."""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any

import torch
from torch import fx, nn

from layerlab.base.errors import LayerlabWarning
from layerlab.contract.run import Run

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


class Compiler:
    """Compiles the blocks of the network that a run trains, and takes that back.

    Blocks rather than the whole, because every new pattern of frozen layers compiles anew, and only the blocks at its
    edge change with it.

    Args:
        setting: `Settings.compile`: false, true, or the name of a backend.

    Attributes:
        blocks: the modules that are compiled at present.
    """

    def __init__(self, setting: bool | str) -> None:
        self.blocks: list[nn.Module] = []
        self._eager = not setting
        self._backend = setting if isinstance(setting, str) else None
        self._warm: set[str] = set()
        self._said = False

    def follow(self, run: Run) -> None:
        """Compile the blocks of `run.training_model` that are not compiled yet."""
        if run.frozen and not self._eager and TORCH < (2, 12):
            self._eager = True
            warnings.warn(
                "torch before 2.12 gives a compiled layer that was frozen no gradient after it is thawed; going on "
                "eagerly. Install torch 2.12 or later to compile with a strategy that freezes.",
                stacklevel=2,
            )
        blocks = [] if self._eager else compiled_blocks(run.training_model)
        if blocks == self.blocks:
            return
        self.release()
        if blocks and not self._said and self._backend in (None, "inductor") and not _vectorises(run.device):
            self._said = True
            warnings.warn(
                "torch.compile finds no vector instructions on this processor that it can use (AVX2, AVX-512, NEON, "
                "SVE, …), and its code may be several times slower than the eager network's here; set compile=False, "
                "or train on another machine.", LayerlabWarning, stacklevel=2)
        for block in blocks:
            block.compile(**self._options(block))
        self.blocks = blocks

    def release(self) -> None:
        """Let every block run eagerly again."""
        for block in self.blocks:
            block._compiled_call_impl = None
        self.blocks = []

    def warms_up(self, key: str) -> bool:
        """Whether the first step of an epoch compiles, `key` being what learns; says so once for each key."""
        if not self.blocks or key in self._warm:
            return False
        self._warm.add(key)
        return True

    def _options(self, block: nn.Module) -> dict[str, Any]:
        takes = inspect.signature(torch.compile).parameters
        options: dict[str, Any] = {"dynamic": False}
        if self._backend is not None:
            options["backend"] = self._backend
        if "isolate_recompiles" in takes:
            options["isolate_recompiles"] = True
        if "recompile_limit" in takes:
            # One graph a pattern of frozen layers, in training and in evaluation.
            options["recompile_limit"] = 2 * len(list(block.modules())) + 8
        return options


def _vectorises(device: torch.device) -> bool:
    """Whether inductor's code for a device uses vector instructions; on a CPU it compiles a line of C++ to find out."""
    if device.type != "cpu":
        return True
    # Imported here: it takes seconds, and compiling imports it anyway.
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return bool(pick_vec_isa())
