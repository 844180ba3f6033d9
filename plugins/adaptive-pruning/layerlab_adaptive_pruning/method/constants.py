"""Which channels are constant because what they are made of is gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from layerlab import Replaced

# A channel that was found constant may differ from its value by this much on images, relative to 1 + |value|.
ROUNDING = 1e-3


class Constants(fx.Interpreter):
    """Follows what does not depend on the image: runs the network on NaN, so that what is a number is a constant.

    Some operations make a number of NaN: sign, comparisons, isfinite, fake quantisation. So a channel stays unknown
    where an operation of one channel each reads an unknown one, and each constant that is found is confirmed on images.

    Args:
        network: traced, in evaluation mode.
        dead: path of a batch norm → mask of its dead channels, (channels,).
        images: of the shape that the network takes, (batch, channels, height, width).

    Attributes:
        values: name of a node → its channels' values, (channels,); NaN where they depend on the image.
    """

    def __init__(self, network: fx.GraphModule, dead: Mapping[str, Tensor], images: Tensor) -> None:
        super().__init__(network)
        self.dead = dead
        self.values: dict[str, Tensor] = {}
        self.run(torch.full_like(images[:1], torch.nan))
        Probe(network, dead, confirm=self.values).run(probe_images(images))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        flat = _by_channel(value[:1])  # (channels, pixels)
        unknown = ~(flat == flat[:, :1]).all(1) | self._inherited(n, len(flat))
        if getattr(n.target, "__name__", n.target) == "mul":
            zero = self._zero_factors(n, flat)
            unknown, flat = unknown & ~zero, torch.where(zero[:, None], 0.0, flat)
            value = torch.where(zero.view(1, -1, *[1] * (value.dim() - 2)), 0.0, value)
        self.values[n.name] = torch.where(unknown, torch.nan, flat[:, 0].float())
        if value.is_floating_point():
            value = torch.where(unknown.view(1, -1, *[1] * (value.dim() - 2)), torch.nan, value)
        return value

    def _inherited(self, n: fx.Node, channels: int) -> Tensor | bool:
        """Which channels are unknown because what is read there is, (channels,)."""
        if n.op == "call_module" and (n.target in self.dead or _mixes(self.submodules[str(n.target)])):
            return False  # known from the weights
        read = [self.values[each.name].isnan() for each in n.all_input_nodes if each.name in self.values]
        alike = [mask for mask in read if len(mask) == channels]
        if read and all(bool(mask.all()) for mask in read):
            return True
        return torch.stack(alike).any(0) if alike else False

    def _zero_factors(self, n: fx.Node, flat: Tensor) -> Tensor:
        """In which channels a product has a constant factor of zero, (channels,): squeeze-and-excitation, say."""
        factors = [self.values[each.name] == 0 for each in n.all_input_nodes if each.name in self.values]
        known = [mask for mask in factors if len(mask) == len(flat)]
        return torch.stack(known).any(0) if known else torch.zeros_like(flat[:, 0], dtype=torch.bool)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.submodules[target]
        x = args[0] if args else None
        if isinstance(module, _BatchNorm) and target in self.dead:
            return _dead_at_shift(module, self.dead[target], x)
        if _mixes(module) and (isinstance(module, nn.Conv2d) or x.dim() == 2):
            return _of_constants(module, x)
        return super().call_module(target, args, kwargs)


class Probe(fx.Interpreter):
    """Runs the network on images, its dead channels at their shifts.

    Convolutions continue the image beyond its border instead of padding with zeros: then a constant channel gives a
    constant everywhere, as it does in the bias into which it is folded.

    Args:
        network: traced, in evaluation mode.
        dead: path of a batch norm → mask of its dead channels, (channels,).
        ignored: name of a sum → name of the term that counts as zero in it.
        confirm: what `Constants` found; a value that the images do not confirm becomes NaN.
    """

    def __init__(self, network: fx.GraphModule, dead: Mapping[str, Tensor], ignored: Mapping[str, str] | None = None,
                 confirm: dict[str, Tensor] | None = None) -> None:
        super().__init__(network)
        self.dead, self.ignored, self.confirm = dead, ignored or {}, confirm or {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.ignored:
            (kept,) = [each for each in n.all_input_nodes if each.name != self.ignored[n.name]]
            return self.env[kept]
        value = super().run_node(n)
        found = self.confirm.get(n.name)
        if found is not None and isinstance(value, Tensor) and not found.isnan().all():
            flat = _by_channel(value).float()  # (channels, batch · pixels)
            far = (flat - found[:, None]).abs().amax(1) > ROUNDING * (1 + found.abs())
            found[far] = torch.nan
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.submodules[target]
        x = args[0] if args else None
        if isinstance(module, _BatchNorm) and target in self.dead:
            return _dead_at_shift(module, self.dead[target], x)
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and any(_sides(module)):
            continued = functional.pad(x, _sides(module), mode="replicate")
            return functional.conv2d(continued, module.weight, module.bias, module.stride, 0, module.dilation,
                                     module.groups)
        return super().call_module(target, args, kwargs)


def probe_images(images: Tensor) -> Tensor:
    """Two of the images and two of noise, of larger numbers than those: (4, channels, height, width)."""
    generator = torch.Generator().manual_seed(0)
    noise = 3 * torch.randn(images[:2].shape, generator=generator)
    return torch.cat([images[:2], noise.to(images)])


def _by_channel(value: Tensor) -> Tensor:
    """(batch, channels, …) → (channels, everything else)."""
    return value.transpose(0, 1).flatten(1)


def _dead_at_shift(module: Any, dead: Tensor, x: Tensor) -> Tensor:
    """What a batch norm gives whose dead channels have the scale zero: β there, whatever x is."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    return torch.where(dead.view(shape), module.bias.view(shape), module(x))


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear))


def _of_constants(module: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """What a layer makes of constants and NaN: NaN where a weight other than zero meets one."""
    weight = module.weight.flatten(2).sum(2) if isinstance(module, nn.Conv2d) else module.weight
    uses = (module.weight.flatten(2).abs().sum(2) if isinstance(module, nn.Conv2d) else weight.abs()) > 0
    groups = getattr(module, "groups", 1)
    flat = x.flatten(2) if isinstance(module, nn.Conv2d) else x.unsqueeze(2)
    known = torch.where((flat == flat[..., :1]).all(2), flat[..., 0], torch.nan)  # (1, channels)
    values, unknown = known.nan_to_num(0.0), known.isnan().to(x.dtype)
    if groups == 1:
        value, lost = functional.linear(values, weight), functional.linear(unknown, uses.to(x.dtype)) > 0
    else:
        apart = (groups, -1, weight.shape[1])  # outputs and inputs of a group: weight (outputs, inputs of a group)
        value = (weight.view(apart) @ values.view(groups, -1, 1)).view(1, -1)
        lost = (uses.to(x.dtype).view(apart) @ unknown.view(groups, -1, 1)).view(1, -1) > 0
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


def _sides(module: nn.Conv2d) -> list[int]:
    """[left, right, top, bottom]: the pixels that a convolution adds on each side."""
    if module.padding != "same":
        vertical, horizontal = padding(module)
        return [horizontal, horizontal, vertical, vertical]
    sides = []
    for kernel, step in zip(reversed(module.kernel_size), reversed(module.dilation), strict=True):
        total = step * (kernel - 1)
        sides += [total // 2, total - total // 2]
    return sides


def add_bias(module: Any, constant: Tensor, replaced: list[Replaced]) -> None:
    """Add what a constant input contributes, (outputs,), to a layer's bias, which it gets if it has none."""
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros_like(constant))
        replaced.append(Replaced(module.weight, module.bias, None))
    module.bias.add_(constant)
