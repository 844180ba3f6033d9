"""A network as it is deployed: the same outputs, with fewer passes over the tensors between its convolutions."""

from __future__ import annotations

import copy
import operator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import fusion

from layerlab_adaptive_pruning.method.constants import padding
from layerlab_adaptive_pruning.method.structure import FRESH, Select, Sum, clean, layer, source, trace

NEARLY_ALL = 0.9
"""A share of the channels from which on reading all of them, some with weights of zero, takes less time than a copy of
those that are needed: measured on a processor at 64 to 256 channels, one image and 128."""


class Clip(nn.Module):
    """ReLU behind a batch norm, taken before it: relu(scale · x + shift) = scale · clip(x) + shift.

    With t = −shift / scale, clip(x) is max(x, t) for a scale above zero and min(x, t) for one below. Scale and shift
    go into the convolution that follows, so that norm and activation are one pass: (batch, channels, …) → same.

    Args:
        scale: (channels,), as 64-bit floats.
        shift: (channels,), as 64-bit floats.
        like: a tensor of the type and device of the network's.
        in_place: whether the input is overwritten.
    """

    lower: Tensor
    upper: Tensor | None

    def __init__(self, scale: Tensor, shift: Tensor, like: Tensor, in_place: bool) -> None:
        super().__init__()
        # Without a scale a channel counts for nothing: its constant is in the convolution's bias.
        bound = torch.where(scale == 0, 0.0, -shift / scale)
        self.in_place = in_place
        lower = torch.where(scale >= 0, bound, -torch.inf)
        upper = torch.where(scale >= 0, torch.inf, bound)
        self.register_buffer("lower", lower.view(1, -1, 1, 1).to(like))
        # Negative scales are rare: two passes there are better than the slower one with two bounds everywhere.
        self.register_buffer("upper", upper.view(1, -1, 1, 1).to(like) if bool((scale < 0).any()) else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) → same shape."""
        x = x.clamp_min_(self.lower) if self.in_place else x.clamp_min(self.lower)
        return x if self.upper is None else x.clamp_max_(self.upper)


@torch.no_grad()
def fold(network: nn.Module) -> fx.GraphModule:
    """A copy of a network for inference, whose outputs are the same up to rounding.

    A batch norm behind a convolution goes into its weights. One that reads a sum or a concatenation,
    in front of a ReLU and convolutions that do not pad, goes into those convolutions, and its ReLU in front of them
    becomes a `Clip`; the selection of channels that pruning put before it is then a copy that the clipping works on, or
    goes altogether where nearly all channels are kept: their convolution reads all, with weights of zero for the
    others. Sums are written over the branch's output.

    Args:
        network: pruned or not, of any class that `trace` takes; it stays as it is.

    Returns:
        The copy, in evaluation mode, its parameters without gradients. It is neither trained nor pruned further: keep
        the network itself, and fold it once its weights are loaded.

    Raises:
        Refused: the network cannot be traced.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> [type(layer).__name__ for layer in fold(network).children()]
        ['Conv2d', 'ReLU']
    """
    traced = trace(copy.deepcopy(network).eval())
    for each in list(traced.graph.nodes):
        _into_convolution_before(traced, each)
    clean(traced)
    for each in list(traced.graph.nodes):
        _into_convolutions_behind(traced, each)
    for each in list(traced.graph.nodes):
        _sum_in_place(traced, each)
    clean(traced)
    # Without its edits it is no longer a network that `structure` tells and pruning goes on with.
    del traced.meta["edits"]
    return traced.requires_grad_(False)


def _plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its class does: a subclass, a parametrisation or a hook may do more."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def _read_by_statistics(network: fx.GraphModule, at: fx.Node) -> nn.BatchNorm2d | None:
    """The batch norm that a node calls, if it normalises with the statistics that it has learned."""
    norm = layer(network, at)
    if not _plain(norm, nn.BatchNorm2d) or not at.args:
        return None
    assert isinstance(norm, nn.BatchNorm2d)
    return norm if norm.running_mean is not None else None


def _into_convolution_before(network: fx.GraphModule, at: fx.Node) -> None:
    """Fold a batch norm into the convolution whose output it alone reads, if there is one."""
    norm = _read_by_statistics(network, at)
    if norm is None or len(source(at).users) > 1:
        return
    before = layer(network, source(at))
    if _plain(before, nn.Conv2d):
        assert isinstance(before, nn.Conv2d)
        network.set_submodule(str(source(at).target), fusion.fuse_conv_bn_eval(before, norm))
        at.replace_all_uses_with(source(at))
        network.graph.erase_node(at)


def _into_convolutions_behind(network: fx.GraphModule, at: fx.Node) -> None:
    """Fold a batch norm into the convolutions that read its ReLU, if nothing else does and they do not pad."""
    norm = _read_by_statistics(network, at)
    if norm is None or len(at.users) != 1:
        return
    activation = next(iter(at.users))
    readers = list(activation.users)
    if not _is_relu(network, activation) or not readers or not all(_reads_plainly(network, each) for each in readers):
        return
    scale, shift = _scale_and_shift(norm)
    read = source(at)
    chooser = layer(network, read)
    fresh = isinstance(chooser, Select) and len(read.users) == 1
    if isinstance(chooser, Select) and len(chooser.index) >= NEARLY_ALL * chooser.channels:
        read, fresh = source(read), False
        for reader in readers:
            _widen(layer(network, reader), chooser)
        scale, shift = (_spread(value, chooser) for value in (scale, shift))
    for reader in readers:
        _scale_inputs(layer(network, reader), scale, shift)
    path = f"folded_{at.name}"
    network.add_submodule(path, Clip(scale, shift, next(layer(network, readers[0]).parameters()), fresh))
    with network.graph.inserting_before(activation):
        clipped = network.graph.call_module(path, (read,))
    activation.replace_all_uses_with(clipped)


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale, shift), (channels,) each, as 64-bit floats: what a batch norm does to a channel.

    A channel without a scale, or with one so small that the bound of its `Clip` overflows, is constant: its scale is
    zero and its shift what ReLU leaves of it.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale * norm.weight.double() if norm.affine else scale
    shift = -norm.running_mean.double() * scale
    shift = shift + norm.bias.double() if norm.affine else shift
    constant = ~(shift / scale).to(norm.running_var.dtype).isfinite()
    return torch.where(constant, 0.0, scale), torch.where(constant, shift.relu(), shift)


def _is_relu(network: fx.GraphModule, at: fx.Node) -> bool:
    if at.op == "call_module":
        return _plain(layer(network, at), nn.ReLU)
    return at.target in (functional.relu, torch.relu, "relu", "relu_")


def _reads_plainly(network: fx.GraphModule, at: fx.Node) -> bool:
    """Whether a node is a convolution that reads every pixel as it is: neither in groups nor padded."""
    module = layer(network, at)
    if not _plain(module, nn.Conv2d):
        return False
    assert isinstance(module, nn.Conv2d)
    return module.groups == 1 and not any(padding(module))


def _spread(values: Tensor, chooser: Select) -> Tensor:
    """Values of the selected channels at their places among all, the others zero: (selected, …) → (channels, …)."""
    return values.new_zeros(chooser.channels, *values.shape[1:]).index_copy_(0, chooser.index, values)


def _widen(conv: nn.Module | None, chooser: Select) -> None:
    """Let a convolution read all channels, those that are not selected with weights of zero."""
    assert isinstance(conv, nn.Conv2d)
    conv.weight = nn.Parameter(_spread(conv.weight.transpose(0, 1), chooser).transpose(0, 1).contiguous())
    conv.in_channels = chooser.channels


def _scale_inputs(conv: nn.Module | None, scale: Tensor, shift: Tensor) -> None:
    """Let a convolution, as `_reads_plainly` has it, read x instead of scale · x + shift, both (inputs,)."""
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.double()  # (outputs, inputs, height, width)
    moved = weight.sum((2, 3)) @ shift  # (outputs,)
    moved = moved if conv.bias is None else moved + conv.bias.double()
    scaled = weight * scale.view(1, -1, 1, 1)
    conv.weight, conv.bias = (nn.Parameter(value.to(conv.weight)) for value in (scaled, moved))


def _sum_in_place(network: fx.GraphModule, at: fx.Node) -> None:
    """Let an addition write over an output of a layer that it alone reads."""
    if at.op == "call_module" or at.target not in (operator.add, torch.add, "add") or len(at.args) != 2 or at.kwargs:
        return
    terms = [each for each in at.args if isinstance(each, fx.Node)]
    own = [each for each in terms if len(each.users) == 1 and isinstance(layer(network, each), FRESH)]
    if len(set(terms)) < 2 or not own:
        return
    (other,) = [each for each in terms if each is not own[0]]
    path = f"folded_{at.name}"
    network.add_submodule(path, Sum())
    with network.graph.inserting_before(at):
        added = network.graph.call_module(path, (own[0], other))
    at.replace_all_uses_with(added)

