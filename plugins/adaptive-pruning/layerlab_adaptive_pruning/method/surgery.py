"""Channels and layers taken out of a network: what is constant, what goes, and what it leaves behind.

A channel counts as dead at a batch norm when its scale γ is taken for zero: the norm then gives its shift β, whatever
it reads. That constant is followed through the network, through activations, poolings and further layers; a channel can
be removed where everything that reads it reads a constant, and that constant goes into the bias of what follows. Which
layers are coupled is found by torch-pruning's dependency graph, which also does the cutting.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch_pruning
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch_pruning import ops
from torch_pruning.pruner.function import BasePruningFunc

from layerlab import LayerlabError, Replaced
from layerlab_adaptive_pruning.method.structure import (
    Select,
    Shift,
    clean,
    edit,
    forget_selections,
    layer,
    source,
    trace,
)

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
            if (isinstance(norm, _BatchNorm) and norm.affine and _reads_a_trunk(traced, each)
                    and not values[each.name].isnan().all()):
                edit(traced, "select", each.name)
        clean(traced)
        _cut(traced, example, marks, replaced)
        _drop_unread_inputs(traced, example)
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


# ---------------------------------------------------------------------------------------- what is constant


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
        for size, pad, step, kernel, stride in zip(x.shape[2:], _padding(module), module.dilation, module.kernel_size,
                                                   module.stride, strict=True)
    ]
    return value.view(1, -1, 1, 1).expand(1, -1, *sides)


def _padding(module: nn.Conv2d) -> tuple[int, ...]:
    if module.padding == "same":
        return tuple((kernel - 1) * step // 2 for kernel, step in zip(module.kernel_size, module.dilation, strict=True))
    return (0, 0) if module.padding == "valid" else tuple(module.padding)


# ---------------------------------------------------------------------------------------- whole branches


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
        _add_bias(module, constant, replaced)
        return True
    if getattr(at.target, "__name__", "") == "add" and len(at.all_input_nodes) == 2:
        return any(len(each.users) == 1 and _add_constant(network, each, constant, replaced)
                   for each in at.all_input_nodes)
    return False


def _add_bias(module: Any, constant: Tensor, replaced: list[Replaced]) -> None:
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros_like(constant))
        replaced.append(Replaced(module.weight, module.bias, None))
    module.bias.add_(constant)


# ---------------------------------------------------------------------------------------- channels


class _SelectPruner(BasePruningFunc):
    """Tells the dependency graph that the two sides of a selection are pruned independently of each other."""

    def prune_out_channels(self, layer: Any, idxs: Any) -> nn.Module:
        gone = set(idxs)
        kept = [place for place in range(len(layer.index)) if place not in gone]
        layer.index = layer.index[kept]
        return layer

    def prune_in_channels(self, layer: Any, idxs: Any) -> nn.Module:
        gone = set(idxs)
        place = {old: new for new, old in enumerate(each for each in range(layer.channels) if each not in gone)}
        layer.index = torch.tensor([place[old] for old in layer.index.tolist()], device=layer.index.device)
        layer.channels -= len(gone)
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return len(layer.index)

    def get_in_channels(self, layer: Any) -> int:
        return layer.channels


def _reads_a_trunk(network: fx.GraphModule, norm: fx.Node) -> bool:
    """Whether what a batch norm reads is not a layer's output that nothing else reads."""
    before = source(norm)
    return not (isinstance(layer(network, before), (nn.Conv2d, nn.Linear, Select)) and len(before.users) == 1)


def dependencies(network: nn.Module, example: Tensor) -> torch_pruning.DependencyGraph:
    """torch-pruning's graph of a network, in whatever mode and with whatever frozen.

    Raises:
        LayerlabError: the library cannot follow the network, with its reason.
    """
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    mode = {module: module.training for module in network.modules()}
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch_pruning.DependencyGraph().build_dependency(
                network, example, customized_pruners={Select: _SelectPruner()}, verbose=False
            )
    except Exception as error:  # of any kind, from inside the library
        raise LayerlabError(
            f"{type(network).__name__} cannot be pruned: torch-pruning cannot follow it ({type(error).__name__}: "
            f"{error})."
        ) from None
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, training in mode.items():
            module.training = training


def _cut(network: fx.GraphModule, example: Tensor, marks: Mapping[str, Tensor], replaced: list[Replaced]) -> None:
    """Remove every group of coupled channels that all of its readers read as constants."""
    present = {str(n.target): n for n in network.graph.nodes if n.op == "call_module"}
    marks = {path: mask for path, mask in marks.items() if path in present}
    values = Constants(network, marks, example).values
    graph = dependencies(network, example)
    nodes = {network.get_submodule(path): n for path, n in present.items()}
    roots = [module for module, n in nodes.items()
             if (isinstance(module, nn.Conv2d) and module.groups == 1)
             or (isinstance(module, _BatchNorm) and isinstance(layer(network, source(n)), Select))]
    done: set[nn.Module] = set()
    plan: list[tuple[nn.Conv2d | _BatchNorm, Any, list[int]]] = []
    for root in roots:
        if root in done or root not in graph.module2node:
            continue
        handler = graph.get_pruner_of_module(root).prune_out_channels
        group = graph.get_pruning_group(root, handler, list(range(graph.get_out_channels(root))))
        done |= {item.dep.target.module for item in group
                 if isinstance(item.dep.target.module, nn.Module) and _gives(graph, item.dep)}
        removable, folds = _removable(graph, group, nodes, values)
        if not removable:
            continue
        for reader, channels in folds:
            _fold(network, nodes[reader], channels, values, replaced)
        plan.append((root, handler, removable))
    for root, handler, channels in plan:
        graph.get_pruning_group(root, handler, channels).prune(record_history=False)


def _gives(graph: Any, dep: Any) -> bool:
    """Whether a dependency cuts a convolution's outputs."""
    module = dep.target.module
    return isinstance(module, nn.Conv2d) and dep.handler == graph.get_pruner_of_module(module).prune_out_channels


def _removable(
    graph: Any, group: Any, nodes: Mapping[nn.Module, fx.Node], values: Mapping[str, Tensor]
) -> tuple[list[int], list[tuple[nn.Module, list[int]]]]:
    """Which of a group's channels can go, and for each layer that reads them which of its inputs that are."""
    constant = torch.ones(len(group[0].idxs), dtype=torch.bool)
    strength = torch.zeros(len(constant))
    readers: list[tuple[nn.Module, list[int], list[int]]] = []
    read = False
    for item in group:
        module, idxs, roots = item.dep.target.module, item.idxs, item.root_idxs
        if isinstance(module, Select):
            if item.dep.handler == graph.get_pruner_of_module(module).prune_in_channels:
                read = True
                chosen = torch.isin(torch.tensor(idxs), module.index.cpu())
                constant[torch.tensor(roots)[chosen]] = False
        elif isinstance(module, nn.Conv2d):
            if module.groups > 1 and module.groups != module.in_channels:
                return [], []
            if module.groups == 1 and not _gives(graph, item.dep):
                readers.append((module, idxs, roots))
            elif max(idxs) >= module.out_channels:
                return [], []
        elif isinstance(module, nn.Linear):
            readers.append((module, idxs, roots))
        elif isinstance(module, _BatchNorm):
            strength.scatter_reduce_(0, torch.tensor(roots), module.weight.abs().float().cpu()[idxs], "amax")
        elif isinstance(module, (nn.Parameter, ops._OutputOp)) or "Pad" in str(module) or (
            not isinstance(module, nn.PReLU) and next(module.parameters(), None) is not None
        ):
            # What leaves the network keeps its width; so does what has weights of another kind.
            return [], []
    for module, idxs, roots in readers:
        read = True
        varies = values[source(nodes[module]).name].isnan().cpu()[idxs]
        constant[torch.tensor(roots)[varies]] = False
    if not read or not constant.any():
        return [], []
    if constant.all():
        # A convolution without outputs is no convolution.
        constant[strength.argmax()] = False
    gone = {int(each) for each in constant.nonzero()}
    folds = [(module, [index for index, root in zip(idxs, roots, strict=True) if root in gone])
             for module, idxs, roots in readers]
    return sorted(gone), [(module, channels) for module, channels in folds if channels]


def _fold(network: fx.GraphModule, at: fx.Node, channels: list[int], values: Mapping[str, Tensor],
          replaced: list[Replaced]) -> None:
    """Add what constant inputs make of a layer's output to what follows it."""
    module: Any = layer(network, at)
    constant = values[source(at).name][channels]
    if not constant.any():
        return
    weight = module.weight[:, channels]
    moved = (weight.flatten(2).sum(2) if weight.dim() > 2 else weight) @ constant
    follower = layer(network, next(iter(at.users)))
    if module.bias is None and len(at.users) == 1 and isinstance(follower, _BatchNorm) and follower.track_running_stats:
        follower.running_mean.sub_(moved)
    else:
        _add_bias(module, moved, replaced)


def _drop_unread_inputs(network: fx.GraphModule, example: Tensor) -> None:
    """Take inputs out of concatenations whose every reader is a selection that leaves them out."""
    values = Constants(network, {}, example).values
    for cat in list(network.graph.nodes):
        choosers = [layer(network, reader) for reader in cat.users]
        if cat.target is not torch.cat or not all(isinstance(each, Select) for each in choosers):
            continue
        at = 0
        for each in list(cat.args[0]):
            size = len(values[each.name])
            unread = not any(at <= index < at + size for chooser in choosers for index in chooser.index.tolist())
            if unread and len(cat.args[0]) > 1:
                edit(network, "uncat", cat.name, each.name)
                for chooser in choosers:
                    chooser.channels -= size
                    chooser.index = torch.where(chooser.index >= at, chooser.index - size, chooser.index)
            else:
                at += size


# ---------------------------------------------------------------------------------------- conv–BN–conv with one channel


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
            _add_bias(conv2, bias - (conv2.bias if conv2.bias is not None else 0.0), replaced)
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
        for pad, step, kernel in zip(_padding(conv), conv.dilation, conv.kernel_size, strict=True)
    )


@contextmanager
def recorded(replaced: list[Replaced]) -> Iterator[None]:
    """Note every parameter that torch-pruning replaces: all of it passes this one function."""
    plain = BasePruningFunc._prune_parameter_and_grad

    def noted(self: Any, weight: nn.Parameter, keep_idxs: list[int], pruning_dim: int) -> nn.Parameter:
        new = plain(self, weight, keep_idxs, pruning_dim)
        index = torch.tensor(keep_idxs, dtype=torch.int64, device=weight.device)
        replaced.append(Replaced(weight, new, lambda tensor: tensor.index_select(pruning_dim, index)))
        return new

    BasePruningFunc._prune_parameter_and_grad = noted
    try:
        yield
    finally:
        BasePruningFunc._prune_parameter_and_grad = plain
