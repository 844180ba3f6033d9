"""Channels and layers taken out of a network: what is constant, what goes, and what it leaves behind.

A channel counts as dead at a batch norm when its scale γ is taken for zero: the norm then gives its shift β, whatever
it reads. That constant is followed through the network, through activations, poolings and further layers; a channel can
be removed where everything that reads it reads a constant, and that constant goes into the bias of what follows. Which
layers are coupled is found by torch-pruning's dependency graph, which also does the cutting.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from layerlab import LayerlabError, Replaced
from layerlab_adaptive_pruning.method.constants import (
    ROUNDING,
    Constants,
    Probe,
    add_bias,
    padding,
    probe_images,
)
from layerlab_adaptive_pruning.method.dependencies import (
    cut,
    drop_unread_inputs,
    reads_a_trunk,
    recorded,
    refused_in_a_sentence,
)
from layerlab_adaptive_pruning.method.structure import (
    Shift,
    clean,
    edit,
    forget_selections,
    frozen_by_user,
    layer,
    name_of,
    source,
    trace,
)

Bridge = Literal["zero", "merge", "relu", "random"]


def scales(network: nn.Module) -> dict[str, Tensor]:
    """|γ| of every batch norm with a scale, by its path: shape (channels,)."""
    return {name: module.weight.detach().abs() for name, module in network.named_modules()
            if isinstance(module, _BatchNorm) and module.affine}


def below(network: nn.Module, threshold: float) -> dict[str, list[int]]:
    """The channels of each batch norm whose |γ| is not above a threshold: the one for all layers (Section 4.4)."""
    return {name: (scale <= threshold).nonzero().flatten().tolist() for name, scale in scales(network).items()}


@torch.no_grad()
def remove_channels(
    network: nn.Module, example: Tensor, dead: Mapping[str, list[int]], bridge: Bridge = "zero", *,
    inside_only: bool = False, check: bool = True,
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
            1 × 1 convolution with weights of zero would do (4.4.1); the others: conv–BN–conv becomes one 1 × 1
            convolution, see `merge_thin_layers`. Where no way leads around it, `zero` acts as `merge`.
        inside_only: no layer goes, and no channel of a sum or a concatenation; what reads one selects its channels.
        check: compare the outputs before and after, away from padded borders and before anything is merged.

    Returns:
        (the traced network, its modules those of `network`; the parameters that were replaced, in order).

    Raises:
        Refused: the network cannot be traced, or torch-pruning cannot follow its channels, with the reason.
        LayerlabError: the outputs differ though the channels were dead.
    """
    traced = trace(network)
    mode = {module: module.training for module in traced.modules()}
    traced.eval()
    marks = _marks(traced, dead)
    replaced: list[Replaced] = []
    with recorded(replaced):
        gone, empty = (set(), set()) if inside_only else _branches_to_remove(traced, marks, bridge)
        before = _Outputs(traced, example, marks, _zeroed_terms(traced, gone, empty)) if check else None
        values = _remove_branches(traced, example, marks, gone, empty, replaced)
        for each in list(traced.graph.nodes):
            norm = layer(traced, each)
            if (isinstance(norm, _BatchNorm) and norm.affine and reads_a_trunk(traced, each)
                    and not values[each.name].isnan().all()):
                edit(traced, "select", each.name)
        clean(traced)
        with refused_in_a_sentence(network):
            cut(traced, example, values, replaced, inside_only)
        drop_unread_inputs(traced, example)
        forget_selections(traced)
        clean(traced)
        if before is not None:
            before.hold_against(traced, replaced)
        if not inside_only:
            _merge(traced, replaced, bridge)
    for module in traced.modules():
        module.training = mode.get(module, mode[traced])
    return traced, replaced


class _Outputs:
    """What a network gives with its dead channels at their shifts, to be held against the network without them."""

    def __init__(self, network: fx.GraphModule, example: Tensor, marks: Mapping[str, Tensor],
                 ignored: Mapping[str, str]) -> None:
        self.images = probe_images(example)
        self.marks = marks
        self.scales = {path: network.get_submodule(path).weight for path in marks}
        self.outputs = _tensors(Probe(network, marks, ignored).run(self.images))

    def hold_against(self, network: fx.GraphModule, replaced: list[Replaced]) -> None:
        """Raise `LayerlabError` if the network without its dead channels gives something else."""
        left = {}
        present = {name for name, _ in network.named_modules()}
        carried = {old: (new, carry) for old, new, carry in reversed(replaced) if carry is not None}
        for path, scale in self.scales.items():
            if path not in present:
                continue
            kept = torch.arange(len(scale), device=scale.device)
            # A channel that is dead but coupled to others stays, and counts as dead here, too.
            while scale in carried:
                scale, carry = carried[scale]
                kept = carry(kept)
            left[path] = self.marks[path][kept]
        now = _tensors(Probe(network, left).run(self.images))
        for before, after in zip(self.outputs, now, strict=True):
            off = float((after - before).abs().max() / before.abs().max().clamp(min=1e-6))
            if not off <= ROUNDING:
                raise LayerlabError(
                    f"Removing dead channels changed the outputs of {name_of(network)} by {off:.1%}, though nothing "
                    "but rounding may differ; an operation in it passes on less or more than torch-pruning follows. "
                    "Leave this network unpruned."
                )


def _tensors(value: object) -> list[Tensor]:
    """The tensors in what a network gives."""
    if isinstance(value, Tensor):
        return [value.float()]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


@torch.no_grad()
def merge_thin_layers(network: nn.Module, bridge: Bridge = "merge") -> tuple[fx.GraphModule, list[Replaced]]:
    """Replace each conv–(BN)–activation–conv with one channel in the middle by a 1 × 1 convolution (Section 4.4.2).

    Its weights are conv2 · BN · conv1 with each kernel summed up and the activation taken as open. This equals the
    original where the activation passes its input on unchanged and the kernels are 1 × 1; for larger kernels, where
    the input does not change within the kernel's reach. A pooling in between moves in front of the new convolution,
    which changes nothing for the mean, and for the maximum where the input does not change within it.

    Args:
        network: with or without batch norms; it is changed.
        bridge: the new weights; `merge` and `zero`: as above; `relu`: 4.4.2 to the letter, conv2(ReLU(BN(weights of
            conv1))), without a bias of its own; `random`: drawn from a generator of its own, to which 4.4.3 compares.

    Returns:
        (the traced network; the parameters that were replaced).
    """
    traced = trace(network)
    replaced: list[Replaced] = []
    _merge(traced, replaced, bridge)
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


def _starved(
    network: fx.GraphModule, before: set[fx.Node], without: set[fx.Node]
) -> dict[fx.Node, list[fx.Node]] | None:
    """Additions and concatenations that lose inputs when some nodes pass nothing on, and which; None if the network's
    output no longer depends on the image, or what loses an input is neither."""
    after = _reached(network, without)
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


def _branches_to_remove(
    network: fx.GraphModule, marks: dict[str, Tensor], bridge: Bridge
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The batch norms that cut off a branch; a wholly dead one with no way around gets a channel back in `marks`.

    Returns:
        (the norms; all nodes that the image still reaches when the norms that count as zero pass nothing on).
    """
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
    reached = _reached(network, set())
    for _, alive, each in sorted(weak, key=lambda item: item[0]):
        if _starved(network, reached, gone | {each}) is not None and not _loses_frozen(network, gone | {each}):
            gone.add(each)
            if alive:
                zeroed.add(each)
                marks[str(each.target)][:] = True
        elif not alive:
            marks[str(each.target)][layer(network, each).weight.abs().argmax()] = False
    return gone, _reached(network, zeroed)


def _loses_frozen(network: fx.GraphModule, gone: set[fx.Node]) -> bool:
    """Whether a layer that the user froze would go with the branches that some norms cut off."""
    frozen = frozen_by_user(network)
    if not frozen:
        return False
    lost = _lost_terms(network, gone)
    kept = {each for each in network.graph.nodes if each.op == "output"}
    for each in reversed(network.graph.nodes):
        if each in kept:
            kept.update(n for n in each.all_input_nodes if n is not lost.get(each))
    return any(layer(network, each) in frozen for each in network.graph.nodes if each not in kept)


def _lost_terms(network: fx.GraphModule, gone: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Sum → the term that it loses; concatenations are left out, since their readers leave the constants out."""
    starved = _starved(network, _reached(network, set()), gone) or {}
    return {n: starved[n][0] for n in network.graph.nodes if n in starved and n.target not in (torch.cat, torch.concat)}


def _zeroed_terms(network: fx.GraphModule, gone: set[fx.Node], empty: set[fx.Node]) -> dict[str, str]:
    """Names of the sums and of the terms that count as zero in them (4.4.1), not as the constants that they give."""
    return {each.name: lost.name for each, lost in _lost_terms(network, gone).items() if lost not in empty}


def _remove_branches(network: fx.GraphModule, example: Tensor, marks: dict[str, Tensor], gone: set[fx.Node],
                     empty: set[fx.Node], replaced: list[Replaced]) -> dict[str, Tensor]:
    """Take out every branch that a norm in `gone` cuts off; gives the values of the channels that are constant."""
    values = Constants(network, marks, example).values
    lost_terms = _lost_terms(network, gone)
    for each, lost in lost_terms.items():
        (other,) = [n for n in each.all_input_nodes if n is not lost]
        constant = values[lost.name].nan_to_num(0.0)
        edit(network, "bypass", each.name, other.name)
        network.graph.eliminate_dead_code()
        # 4.4.1 sets the weights to zero, so that not even a constant is left of the branch.
        if lost in empty and constant.any() and not _add_constant(network, other, constant, replaced):
            edit(network, "shift", other.name, len(constant))
            _add_constant(network, next(iter(other.users)), constant, replaced)
    clean(network)
    if not lost_terms:
        return values
    present = {str(n.target) for n in network.graph.nodes if n.op == "call_module"}
    return Constants(network, {path: mask for path, mask in marks.items() if path in present}, example).values


def _add_constant(network: fx.GraphModule, at: fx.Node, constant: Tensor, replaced: list[Replaced]) -> bool:
    """Add a constant a channel to what a node gives, in the bias of a layer; False if no layer gives just that."""
    module = layer(network, at)
    if module in frozen_by_user(network):
        return False
    if isinstance(module, (nn.Conv2d, nn.Linear, Shift)) or (isinstance(module, _BatchNorm) and module.affine):
        add_bias(module, constant, replaced)
        return True
    if getattr(at.target, "__name__", "") == "add" and len(at.all_input_nodes) == 2:
        return any(len(each.users) == 1 and _add_constant(network, each, constant, replaced)
                   for each in at.all_input_nodes)
    return False


def _merge(network: fx.GraphModule, replaced: list[Replaced], bridge: Bridge) -> None:
    generator = torch.Generator().manual_seed(0)
    frozen = frozen_by_user(network)
    gone: set[fx.Node] = set()
    # A merged convolution stands in the second one's place, which is still to come.
    for first in list(network.graph.nodes):
        found = None if first in gone else _thin(network, first, frozen)
        if found is None:
            continue
        norm, between, second = found
        conv1, conv2, bn = layer(network, first), layer(network, second), layer(network, norm) if norm else None
        weight, bias = _bridged(conv1, bn, conv2, bridge, generator)
        before = conv2.weight
        conv2.weight = nn.Parameter(weight[:, :, None, None], requires_grad=before.requires_grad)
        replaced.append(Replaced(before, conv2.weight, None))
        follower = layer(network, next(iter(second.users)))
        settles = isinstance(follower, _BatchNorm) and follower not in frozen
        if conv2.bias is None and len(second.users) == 1 and settles:
            follower.running_mean.sub_(bias)
        else:
            add_bias(conv2, bias - (conv2.bias if conv2.bias is not None else 0.0), replaced)
        conv2.in_channels = conv1.in_channels
        conv2.stride = tuple(a * b for a, b in zip(conv1.stride, conv2.stride, strict=True))
        conv2.kernel_size, conv2.dilation, conv2.padding = (1, 1), (1, 1), (0, 0)
        for each in between:
            edit(network, "bypass", each.name, source(each).name)
        for each in between:
            network.graph.erase_node(each)
        gone.update(between)
    if gone:
        clean(network)


def _bridged(
    conv1: nn.Conv2d, bn: _BatchNorm | None, conv2: nn.Conv2d, bridge: Bridge, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(weight (outputs, inputs), bias (outputs,)) of the convolution that takes the place of conv1, norm and conv2."""
    row = conv1.weight.flatten(2).sum(2)[0]  # (inputs,)
    column = conv2.weight.flatten(2).sum(2)[:, 0]  # (outputs,)
    own = conv2.bias if conv2.bias is not None else torch.zeros_like(column)
    if bridge == "random":
        drawn = torch.randn(len(column), len(row), generator=generator) * (2 / len(row)) ** 0.5  # He's, for ReLU
        return drawn.to(row), own.clone()
    offset = conv1.bias[0] if conv1.bias is not None else row.new_zeros(())
    scale, mean, shift = row.new_ones(()), row.new_zeros(()), row.new_zeros(())
    if bn is not None:
        scale = (bn.running_var + bn.eps).rsqrt()[0] * (bn.weight[0] if bn.affine else 1.0)
        mean, shift = bn.running_mean[0], bn.bias[0] if bn.affine else shift
    if bridge == "relu":
        return torch.outer(column, torch.relu((row - mean) * scale + shift)), own.clone()
    # In this order of operations, which decides how the sum is rounded.
    return torch.outer(column, row * scale), column * ((offset - mean) * scale + shift) + own


def _thin(
    network: fx.GraphModule, first: fx.Node, frozen: Collection[nn.Module]
) -> tuple[fx.Node | None, list[fx.Node], fx.Node] | None:
    """Whether a node is a convolution with one output that one more convolution, behind a norm and an activation,
    reads: the norm if there is one, what goes, and the other convolution."""
    conv1 = layer(network, first)
    if not isinstance(conv1, nn.Conv2d) or conv1.out_channels != 1 or not _mergeable(conv1) or conv1 in frozen:
        return None
    norm, between, at = None, [first], first
    while len(at.users) == 1:
        (at,) = at.users
        module = layer(network, at)
        if module in frozen:
            break
        if isinstance(module, nn.Conv2d):
            return (norm, between, at) if _mergeable(module) else None
        if isinstance(module, nn.BatchNorm2d) and norm is None and len(between) == 1 and module.track_running_stats:
            norm = at
        elif isinstance(module, _POOLINGS) and conv1.stride == (1, 1):
            continue  # stays, in front of the new convolution
        elif not (isinstance(module, _ACTIVATIONS) or (module is None and at.target in _FUNCTIONS)):
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
