"""Which of a network's layers multiply in fixed point, and what becomes of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from layerlab import Preflight
from layerlab_low_bit.method.arithmetic import STORED, Arithmetic, Parameters
from layerlab_low_bit.method.products import Geometry

FLOATS = "its numbers stay float32"


class Noting(Arithmetic):
    """Remembers which modules ran when something multiplied in fixed point or was kept in it."""

    running: list[str]
    multiplied: list[tuple[str, Tensor]]
    kept: set[str]

    def multiply(
        self, x: Tensor, weight: Tensor, parameter: Tensor, bias: Tensor | None, geometry: Geometry | None
    ) -> Tensor:
        self.multiplied.append((self.running[-1], parameter))
        return super().multiply(x, weight, parameter, bias, geometry)

    def left(self, *_: Any) -> None:
        """A module has run: a forward hook."""
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in STORED:
            self.kept.add(self.running[-1])
        return super().__torch_function__(func, types, args, kwargs)


def coverage(
    network: nn.Module, example: Tensor, arithmetic: Callable[[Parameters, torch.device, type[Noting]], Noting],
    stored: int | None, notes: Iterable[str],
) -> Preflight:
    """What multiplies in fixed point in one pass through a copy.

    Args:
        network: the user's.
        example: images as it takes them, (batch, channels, height, width).
        arithmetic: gives fixed point for (parameters, device, kind).
        stored: bits of what other layers keep for backward; None for floats.
        notes: what is to be said besides.
    """
    copied = copy.deepcopy(network)
    noting = arithmetic(copied.named_parameters, example.device, Noting)
    noting.running, noting.multiplied, noting.kept = [""], [], set()
    for name, module in copied.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: noting.running.append(name))
        module.register_forward_hook(noting.left)
    with noting, torch.enable_grad():
        copied(example)
    covered, made = _layers(copied, noting.multiplied)
    kept = noting.kept - set(covered) if stored is not None else set()
    with_parameters = [name for name, module in copied.named_modules()
                       if next(module.parameters(recurse=False), None) is not None]
    reasons = {name: f"it computes in float32, and keeps {stored} bits for backward"
               for name in with_parameters if name in kept}
    notes = list(notes)
    if made:
        notes.append(f"The weights of {', '.join(made)} are made anew in each step, so that the final network has "
                     "what makes them in float32.")
    return Preflight.of(network, covered, reasons, otherwise=FLOATS, notes=notes)


def _layers(network: nn.Module, multiplied: Iterable[tuple[str, Tensor]]) -> tuple[list[str], list[str]]:
    """(names of the layers that multiplied, those of them whose weight is no parameter but made of others).

    Args:
        multiplied: (name of the module that ran, its weight), in the order in which they ran.
    """
    owners = {id(parameter): name.rpartition(".")[0] for name, parameter in network.named_parameters()}
    covered: list[str] = []
    made: list[str] = []
    for name, weight in multiplied:
        module = network.get_submodule(name)
        if any(weight is own for own in module.parameters(recurse=False)):
            covered.append(name)
        elif id(weight) in owners:  # attention reads the weight of a projection that does not run itself
            covered.append(owners[id(weight)])
        else:
            made.append(name)
            covered += [f"{name}.{path}".strip(".") for path, part in module.named_modules()
                        if next(part.parameters(recurse=False), None) is not None]
    return list(dict.fromkeys(covered)), list(dict.fromkeys(made))
