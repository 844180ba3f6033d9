"""Channels and layers taken out of a network: what is constant, what goes, and what it leaves behind.

A channel counts as dead at a batch norm when its scale γ is taken for zero: the norm then gives its shift β, whatever
it reads. That constant is followed through the network, through activations, poolings and further layers; a channel can
be removed where everything that reads it reads a constant, and that constant goes into the bias of what follows. Which
layers are coupled is found by torch-pruning's dependency graph, which also does the cutting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from layerlab import LayerlabError, Replaced
from layerlab_adaptive_pruning.method.constants import Constants, add_bias, padding
from layerlab_adaptive_pruning.method.dependencies import cut, drop_unread_inputs, reads_a_trunk, recorded
from layerlab_adaptive_pruning.method.structure import Shift, clean, edit, forget_selections, layer, source, trace

Bridge = Literal["zero", "merge"]


def scales(network: nn.Module) -> dict[str, Tensor]:
    """|γ| of every batch norm with a scale, by its path: shape (channels,)."""
    return {name: module.weight.detach().abs() for name, module in network.named_modules()
            if isinstance(module, _BatchNorm) and module.affine}


def below(network: nn.Module, threshold: float) -> dict[str, list[int]]:
    """The channels of each batch norm whose |γ| is not above a threshold: the one for all layers (Section 4.4)."""
    return {name: (scale <= threshold).nonzero().flatten().tolist() for name, scale in scales(network).items()}


@torch.no_grad()
def remove_channels(
    network: nn.Module, example: Tensor, dead: Mapping[str, list[int]], bridge: Bridge = "zero"
) -> tuple[fx.GraphModule, list[Replaced]]:
    """Take dead channels out of a network, and layers of which nothing is left.

    A channel goes with everything that is coupled to it, if all of that is dead: where branches are added up, a
    channel of the sum goes when every branch is dead in it. A batch norm that reads a sum or a concatenation gets a
    selection of the channels that it still needs. A branch that has lost all channels of a layer is removed; its
    constant is kept. What has no way around it keeps its strongest channel, and then see `merge_thin_layers`.

    With γ = 0 in the dead channels, the network's output in evaluation mode stays the same: exactly if β = 0 or
    the activation maps β to 0, otherwise up to the borders of convolutions that pad with zeros, where a constant other
    than zero cannot be folded into a bias.

    Args:
        network: any network of convolutions with batch norms; it is changed.
        example: two or more images as it takes them, (batch, channels, height, width).
        dead: path of a batch norm → its channels to remove.
        bridge: at a batch norm with one channel left (Section 4.4), `zero`: the branch it is in goes, as a
            1 × 1 convolution with weights of zero would do (4.4.1); `merge`: conv–BN–conv becomes one 1 × 1
            convolution (4.4.2). Where no way leads around it, always `merge`.

    Returns:
        (the traced network, its modules those of `network`; the parameters that were replaced, in order).

    Raises:
        LayerlabError: the network cannot be traced, with the reason.
    """
    traced = trace(network)
    mode = {module: module.training for module in traced.modules()}
    traced.eval()
    marks = _marks(traced, dead)
    replaced: list[Replaced] = []
    with recorded(replaced):
        _remove_branches(traced, example, marks, bridge, replaced)
        values = Constants(traced, marks, example).values
        for each in list(traced.graph.nodes):
            norm = layer(traced, each)
            if (isinstance(norm, _BatchNorm) and norm.affine and reads_a_trunk(traced, each)
                    and not values[each.name].isnan().all()):
                edit(traced, "select", each.name)
        clean(traced)
        cut(traced, example, marks, replaced)
        drop_unread_inputs(traced, example)
        forget_selections(traced)
        clean(traced)
        _merge(traced, replaced)
    for module in traced.modules():
        module.training = mode.get(module, mode[traced])
    return traced, replaced


@torch.no_grad()
def merge_thin_layers(network: nn.Module) -> tuple[fx.GraphModule, list[Replaced]]:
    """Replace each conv–(BN)–activation–conv with one channel in the middle by a 1 × 1 convolution (Section 4.4.2).

    Its weights are conv2 · BN · conv1 with each kernel summed up and the activation taken as open. This equals the
    original where the activation passes its input on unchanged and the kernels are 1 × 1; for larger kernels, where
    the input does not change within the kernel's reach. A pooling in between moves in front of the new convolution,
    which changes nothing for the mean, and for the maximum where the input does not change within it.

    Args:
        network: with or without batch norms; it is changed.

    Returns:
        (the traced network; the parameters that were replaced).
    """
    traced = trace(network)
    replaced: list[Replaced] = []
    _merge(traced, replaced)
    return traced, replaced


def _marks(network: fx.GraphModule, dead: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Path of a batch norm → mask of its dead channels."""
    marks = {}
    for path, channels in dead.items():
        try:
            module = network.get_submodule(path)
        except AttributeError:
            raise LayerlabError(f"The network has no layer {path!r}.") from None
        if not isinstance(module, _BatchNorm) or not module.affine:
            raise LayerlabError(f"Layer {path!r} is no batch norm with a scale.")
        mask = torch.zeros(module.num_features, dtype=torch.bool, device=module.weight.device)
        mask[channels] = True
        marks[path] = mask
    return marks


def _reached(network: fx.GraphModule, without: set[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on the image when some nodes pass nothing on."""
    reached: set[fx.Node] = set()
    for each in network.graph.nodes:
        if each.op == "placeholder" or (each not in without and any(n in reached for n in each.all_input_nodes)):
            reached.add(each)
    return reached


def _starved(network: fx.GraphModule, without: set[fx.Node]) -> dict[fx.Node, list[fx.Node]] | None:
    """Additions and concatenations that lose inputs when some nodes pass nothing on, and which; None if the network's
    output no longer depends on the image, or what loses an input is neither."""
    before, after = _reached(network, set()), _reached(network, without)
    found: dict[fx.Node, list[fx.Node]] = {}
    for each in after:
        lost = [n for n in each.all_input_nodes if n in before and n not in after]
        if each.op == "output" and not any(n in after for n in each.all_input_nodes):
            return None
        if lost:
            name = getattr(each.target, "__name__", str(each.target))
            if name not in ("add", "cat", "concat"):
                return None
            found[each] = lost
    return found if any(each.op == "output" for each in after) else None


def _remove_branches(network: fx.GraphModule, example: Tensor, marks: dict[str, Tensor], bridge: Bridge,
                     replaced: list[Replaced]) -> None:
    """Take out every branch that a wholly dead batch norm cuts off; one with no way around gets a channel back."""
    weak = []
    for each in network.graph.nodes:
        mask = marks.get(str(each.target))
        if each.op == "call_module" and mask is not None:
            alive = int((~mask).sum())
            if alive == 0 or (alive == 1 and bridge == "zero" and len(mask) > 1):
                module = layer(network, each)
                weak.append((float(module.weight.abs().max()), alive, each))
    gone: set[fx.Node] = set()
    zeroed: set[fx.Node] = set()
    for _, alive, each in sorted(weak, key=lambda item: item[0]):
        if _starved(network, gone | {each}) is not None:
            gone.add(each)
            if alive:
                zeroed.add(each)
                marks[str(each.target)][:] = True
        elif not alive:
            marks[str(each.target)][layer(network, each).weight.abs().argmax()] = False
    starved = _starved(network, gone) or {}
    values = Constants(network, marks, example).values if starved else {}
    empty = _reached(network, zeroed)
    for each in [n for n in network.graph.nodes if n in starved]:
        if each.target in (torch.cat, torch.concat):
            continue  # its readers will leave the constants out
        lost = starved[each][0]
        (other,) = [n for n in each.all_input_nodes if n is not lost]
        constant = values[lost.name].nan_to_num(0.0)
        edit(network, "bypass", each.name, other.name)
        network.graph.eliminate_dead_code()
        # 4.4.1 sets the weights to zero, so that not even a constant is left of the branch.
        if lost in empty and constant.any() and not _add_constant(network, other, constant, replaced):
            edit(network, "shift", other.name, len(constant))
            _add_constant(network, next(iter(other.users)), constant, replaced)
    clean(network)


def _add_constant(network: fx.GraphModule, at: fx.Node, constant: Tensor, replaced: list[Replaced]) -> bool:
    """Add a constant a channel to what a node gives, in the bias of a layer; False if no layer gives just that."""
    module = layer(network, at)
    if isinstance(module, (nn.Conv2d, nn.Linear, Shift)) or (isinstance(module, _BatchNorm) and module.affine):
        add_bias(module, constant, replaced)
        return True
    if getattr(at.target, "__name__", "") == "add" and len(at.all_input_nodes) == 2:
        return any(len(each.users) == 1 and _add_constant(network, each, constant, replaced)
                   for each in at.all_input_nodes)
    return False


def _merge(network: fx.GraphModule, replaced: list[Replaced]) -> None:
    while (found := _thin(network)) is not None:
        first, norm, between, second = found
        conv1, conv2, bn = layer(network, first), layer(network, second), layer(network, norm) if norm else None
        row = conv1.weight.flatten(2).sum(2)[0]
        offset = conv1.bias[0] if conv1.bias is not None else row.new_zeros(())
        if bn is not None:
            scale = (bn.running_var + bn.eps).rsqrt()[0] * (bn.weight[0] if bn.affine else 1.0)
            row, offset = row * scale, (offset - bn.running_mean[0]) * scale
            offset = offset + (bn.bias[0] if bn.affine else 0.0)
        column = conv2.weight.flatten(2).sum(2)[:, 0]
        bias = column * offset + (conv2.bias if conv2.bias is not None else 0.0)
        before = conv2.weight
        conv2.weight = nn.Parameter(torch.outer(column, row)[:, :, None, None], requires_grad=before.requires_grad)
        replaced.append(Replaced(before, conv2.weight, None))
        follower = layer(network, next(iter(second.users)))
        if conv2.bias is None and len(second.users) == 1 and isinstance(follower, _BatchNorm):
            follower.running_mean.sub_(bias)
        else:
            add_bias(conv2, bias - (conv2.bias if conv2.bias is not None else 0.0), replaced)
        conv2.in_channels = conv1.in_channels
        conv2.stride = tuple(a * b for a, b in zip(conv1.stride, conv2.stride, strict=True))
        conv2.kernel_size, conv2.dilation, conv2.padding = (1, 1), (1, 1), (0, 0)
        for each in between:
            edit(network, "bypass", each.name, source(each).name)
        clean(network)


def _thin(network: fx.GraphModule) -> tuple[fx.Node, fx.Node | None, list[fx.Node], fx.Node] | None:
    """The first convolution with one output that one more convolution, behind a norm and an activation, reads."""
    for first in network.graph.nodes:
        conv1 = layer(network, first)
        if not isinstance(conv1, nn.Conv2d) or conv1.out_channels != 1 or not _mergeable(conv1):
            continue
        norm, between, at = None, [first], first
        while len(at.users) == 1:
            (at,) = at.users
            module = layer(network, at)
            if isinstance(module, nn.Conv2d):
                if _mergeable(module):
                    return first, norm, between, at
                break
            if isinstance(module, nn.BatchNorm2d) and norm is None and len(between) == 1 and module.track_running_stats:
                norm = at
            elif isinstance(module, _POOLINGS) and conv1.stride == (1, 1):
                continue  # stays, in front of the new convolution
            elif not (isinstance(module, _ACTIVATIONS) or at.target in _FUNCTIONS):
                break
            between.append(at)
    return None


_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.SiLU, nn.GELU, nn.ELU, nn.Identity, nn.Dropout)
_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)
_FUNCTIONS = (torch.relu, functional.relu, functional.relu6, functional.leaky_relu, "relu", "relu_")


def _mergeable(conv: nn.Conv2d) -> bool:
    """Whether a 1 × 1 convolution of the same stride gives an output of the same size."""
    return conv.groups == 1 and conv.padding_mode == "zeros" and all(
        2 * pad == step * (kernel - 1)
        for pad, step, kernel in zip(padding(conv), conv.dilation, conv.kernel_size, strict=True)
    )
