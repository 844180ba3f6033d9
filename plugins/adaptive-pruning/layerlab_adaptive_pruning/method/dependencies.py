"""Which channels go together: torch-pruning's graph of dependencies, for every network that it can trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch_pruning import ops
from torch_pruning.pruner.function import BasePruningFunc

from layerlab import LayerlabError, Refused, Replaced, first_line
from layerlab_adaptive_pruning.method.constants import add_bias
from layerlab_adaptive_pruning.method.structure import Select, edit, frozen_by_user, layer, name_of, source


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


def reads_a_trunk(network: fx.GraphModule, norm: fx.Node) -> bool:
    """Whether what a batch norm reads is not a layer's output that nothing else reads."""
    before = source(norm)
    return not (isinstance(layer(network, before), (nn.Conv2d, nn.Linear, Select)) and len(before.users) == 1)


@contextmanager
def refused_in_a_sentence(network: nn.Module) -> Iterator[None]:
    """Turn an error of any kind from inside torch-pruning into `Refused`."""
    try:
        yield
    except LayerlabError:
        raise
    except Exception as error:
        raise Refused(f"{name_of(network)} cannot be pruned: torch-pruning cannot follow its channels "
                      f"({type(error).__name__}: {first_line(error)}); write what moves channels as a convolution, or "
                      "use another network.") from None


def dependencies(network: nn.Module, example: Tensor) -> torch_pruning.DependencyGraph:
    """torch-pruning's graph of a network, in whatever mode and with whatever frozen.

    Raises:
        Refused: the library cannot follow the network, with its reason.
    """
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    mode = {module: module.training for module in network.modules()}
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with refused_in_a_sentence(network), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch_pruning.DependencyGraph().build_dependency(
                network, example[:2], customized_pruners={Select: _SelectPruner()}, verbose=False
            )
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, training in mode.items():
            module.training = training


def cut(network: fx.GraphModule, example: Tensor, values: Mapping[str, Tensor], replaced: list[Replaced],
        inside_only: bool = False) -> None:
    """Remove every group of coupled channels that all of its readers read as constants.

    Args:
        network: traced, in evaluation mode; it is changed.
        example: images, (batch, channels, height, width).
        values: what `Constants` found.
        replaced: gets the layers that get a bias.
        inside_only: leave the channels of sums and concatenations.
    """
    present = {str(n.target): n for n in network.graph.nodes if n.op == "call_module"}
    graph = dependencies(network, example)
    nodes = {network.get_submodule(path): n for path, n in present.items()}
    roots = [module for module, n in nodes.items()
             if (isinstance(module, nn.Conv2d) and module.groups == 1)
             or (isinstance(module, _BatchNorm) and isinstance(layer(network, source(n)), Select))]
    done: set[nn.Module] = set()
    frozen = frozen_by_user(network)
    plan: list[tuple[nn.Conv2d | _BatchNorm, Any, list[int]]] = []
    for root in roots:
        if root in done or root not in graph.module2node:
            continue
        handler = graph.get_pruner_of_module(root).prune_out_channels
        group = graph.get_pruning_group(root, handler, list(range(graph.get_out_channels(root))))
        done |= {item.dep.target.module for item in group
                 if isinstance(item.dep.target.module, nn.Module) and _gives(graph, item.dep)}
        if inside_only and _is_trunk(graph, group):
            continue
        if any(item.dep.target.module in frozen for item in group):
            continue
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


def _is_trunk(graph: Any, group: Any) -> bool:
    """Whether a group's channels are added up from several convolutions, or selected from by what reads them."""
    writers = {item.dep.target.module for item in group if _gives(graph, item.dep)}
    selected = any(isinstance(item.dep.target.module, Select)
                   and item.dep.handler == graph.get_pruner_of_module(item.dep.target.module).prune_in_channels
                   for item in group)
    return selected or sum(module.groups == 1 for module in writers) > 1


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
    settles = isinstance(follower, _BatchNorm) and follower.track_running_stats and len(at.users) == 1
    if module.bias is None and settles and follower not in frozen_by_user(network):
        follower.running_mean.sub_(moved)
    else:
        add_bias(module, moved, replaced)


def drop_unread_inputs(network: fx.GraphModule, example: Tensor) -> None:
    """Take inputs out of concatenations whose every reader is a selection that leaves them out."""
    cats = [each for each in network.graph.nodes if each.target is torch.cat]
    if cats:
        ShapeProp(network).propagate(example[:1])
    for cat in cats:
        choosers = [layer(network, reader) for reader in cat.users]
        if not all(isinstance(each, Select) for each in choosers):
            continue
        at = 0
        for each in list(cat.args[0]):
            size = each.meta["tensor_meta"].shape[1]
            unread = not any(at <= index < at + size for chooser in choosers for index in chooser.index.tolist())
            if unread and len(cat.args[0]) > 1:
                edit(network, "uncat", cat.name, each.name)
                for chooser in choosers:
                    chooser.channels -= size
                    chooser.index = torch.where(chooser.index >= at, chooser.index - size, chooser.index)
            else:
                at += size


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
