"""Which channels are constant because what they are made of is gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from layerlab import Replaced


class Constants(fx.Interpreter):
    """Follows what does not depend on the image: runs the network on NaN, so that what is a number is a constant.

    Args:
        network: traced, in evaluation mode.
        dead: path of a batch norm → mask of its dead channels.
        images: NaN, of the shape that the network takes, one image.
    """

    def __init__(self, network: fx.GraphModule, dead: Mapping[str, Tensor], images: Tensor) -> None:
        super().__init__(network)
        self.dead = dead
        self.values: dict[str, Tensor] = {}
        self.run(torch.full_like(images[:1], torch.nan))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dim() > 1:
            flat = value[0].flatten(1) if value.dim() > 2 else value[0].unsqueeze(1)
            same = (flat == flat[:, :1]).all(1)
            self.values[n.name] = torch.where(same, flat[:, 0], torch.nan)
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.submodules[target]
        x = args[0] if args else None
        if isinstance(module, _BatchNorm) and target in self.dead:
            shape = (1, -1, *[1] * (x.dim() - 2))
            return torch.where(self.dead[target].view(shape), module.bias.view(shape), module(x))
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and x.dim() == 2):
            return _of_constants(module, x)
        return super().call_module(target, args, kwargs)


def _of_constants(module: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """What a layer makes of constants and NaN: NaN where a weight other than zero meets one."""
    weight = module.weight.flatten(2).sum(2) if isinstance(module, nn.Conv2d) else module.weight
    uses = (module.weight.flatten(2).abs().sum(2) if isinstance(module, nn.Conv2d) else weight.abs()) > 0
    groups = getattr(module, "groups", 1)
    flat = x.flatten(2) if isinstance(module, nn.Conv2d) else x.unsqueeze(2)
    known = torch.where((flat == flat[..., :1]).all(2), flat[..., 0], torch.nan)  # (1, channels)
    values, unknown = known.nan_to_num(0.0), known.isnan().to(x.dtype)
    parts = [
        (functional.linear(v, w), functional.linear(u, m.to(x.dtype)) > 0)
        for v, u, w, m in zip(values.chunk(groups, 1), unknown.chunk(groups, 1), weight.chunk(groups),
                              uses.chunk(groups), strict=True)
    ]
    value, lost = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
    if module.bias is not None:
        value = value + module.bias
    value = torch.where(lost, torch.nan, value)
    if isinstance(module, nn.Linear):
        return value
    sides = [
        (size + 2 * pad - step * (kernel - 1) - 1) // stride + 1
        for size, pad, step, kernel, stride in zip(x.shape[2:], padding(module), module.dilation, module.kernel_size,
                                                   module.stride, strict=True)
    ]
    return value.view(1, -1, 1, 1).expand(1, -1, *sides)


def padding(module: nn.Conv2d) -> tuple[int, ...]:
    """(vertical, horizontal) pixels of zeros that a convolution adds on each side."""
    if module.padding == "same":
        return tuple((kernel - 1) * step // 2 for kernel, step in zip(module.kernel_size, module.dilation, strict=True))
    return (0, 0) if module.padding == "valid" else tuple(module.padding)


def add_bias(module: Any, constant: Tensor, replaced: list[Replaced]) -> None:
    """Add what a constant input contributes, (outputs,), to a layer's bias, which it gets if it has none."""
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros_like(constant))
        replaced.append(Replaced(module.weight, module.bias, None))
    module.bias.add_(constant)
