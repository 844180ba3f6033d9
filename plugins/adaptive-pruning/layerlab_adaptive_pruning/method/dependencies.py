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
from layerlab_adaptive_pruning.method.groups import (
    Candidate,
    Grouped,
    GroupedPruner,
    balance,
    called_grouped,
    in_groups,
)
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


def dependencies(
    network: nn.Module, example: Tensor, pruners: Mapping[type[nn.Module], BasePruningFunc]
) -> torch_pruning.DependencyGraph:
    """torch-pruning's graph of a network, in whatever mode and with whatever frozen.

    Args:
        network: the network.
        example: images, (batch, channels, height, width).
        pruners: class of a layer → how it is cut, where torch-pruning does not know.

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
                network, example[:2], customized_pruners=dict(pruners), verbose=False
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
    grouped = GroupedPruner()
    with called_grouped(network):
        graph = dependencies(network, example, {Select: _SelectPruner(), Grouped: grouped})
        present = {str(n.target): n for n in network.graph.nodes if n.op == "call_module"}
        nodes = {network.get_submodule(path): n for path, n in present.items()}
        candidates = list(_candidates(network, graph, nodes, values, inside_only))
        balance(candidates)
        for each in candidates:
            for reader, channels, of_set in each.readers:
                gone = [channel for channel, place in zip(channels, of_set, strict=True) if each.constant[place]]
                if gone:
                    _fold(network, nodes[reader], gone, values, replaced)
        for each in candidates:
            gone = each.constant.nonzero().flatten().tolist()
            if gone:
                graph.get_pruning_group(each.root, each.handler, gone).prune(record_history=False)
        grouped.finish(replaced)


def _candidates(
    network: fx.GraphModule, graph: Any, nodes: Mapping[nn.Module, fx.Node], values: Mapping[str, Tensor],
    inside_only: bool,
) -> Iterator[Candidate]:
    """Each set of coupled channels, some of which every reader reads as constants."""
    frozen = frozen_by_user(network)
    done: set[nn.Module] = set()
    for root, node in nodes.items():
        if root in done or root not in graph.module2node or not _is_root(network, root, node):
            continue
        handler = graph.get_pruner_of_module(root).prune_out_channels
        group = graph.get_pruning_group(root, handler, list(range(graph.get_out_channels(root))))
        done |= {item.dep.target.module for item in group
                 if isinstance(item.dep.target.module, nn.Module) and _gives(graph, item.dep)}
        if inside_only and _is_trunk(graph, group):
            continue
        if any(item.dep.target.module in frozen for item in group):
            continue
        found = _removable(graph, Candidate(root, handler, *_empty(group)), group, nodes, values)
        if found is not None:
            yield found


def _is_root(network: fx.GraphModule, module: nn.Module, node: fx.Node) -> bool:
    """Whether a set of channels begins at a layer: a convolution, or a batch norm that selects what it reads."""
    if isinstance(module, nn.Conv2d):
        # One with a single output in each group keeps them, and torch-pruning would take it for a depthwise one.
        return module.groups == 1 or (in_groups(module) and module.groups != module.out_channels)
    return isinstance(module, _BatchNorm) and isinstance(layer(network, source(node)), Select)


def _empty(group: Any) -> tuple[Tensor, Tensor]:
    """(constant, strength) of a set's channels before anything is known: all, none; (channels,) each."""
    count = len(group[0].idxs)
    return torch.ones(count, dtype=torch.bool), torch.zeros(count)


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
    return selected or sum(module.groups == 1 or in_groups(module) for module in writers) > 1


def _removable(
    graph: Any, candidate: Candidate, group: Any, nodes: Mapping[nn.Module, fx.Node], values: Mapping[str, Tensor]
) -> Candidate | None:
    """The candidate with what can go of the group, and who reads it; None if nothing can."""
    constant, strength, readers = candidate.constant, candidate.strength, candidate.readers
    read = False
    for item in group:
        module, idxs, roots = item.dep.target.module, item.idxs, item.root_idxs
        if isinstance(module, Select):
            if item.dep.handler == graph.get_pruner_of_module(module).prune_in_channels:
                read = True
                chosen = torch.isin(torch.tensor(idxs), module.index.cpu())
                constant[torch.tensor(roots)[chosen]] = False
        elif isinstance(module, nn.Conv2d):
            gives = _gives(graph, item.dep)
            if gives and max(idxs) >= module.out_channels:
                return None
            if not gives:
                readers.append((module, idxs, roots))
            if in_groups(module):
                candidate.demands.append((module, "outputs" if gives else "inputs", idxs, roots))
        elif isinstance(module, nn.Linear):
            readers.append((module, idxs, roots))
        elif isinstance(module, _BatchNorm):
            strength.scatter_reduce_(0, torch.tensor(roots), module.weight.abs().float().cpu()[idxs], "amax")
        elif isinstance(module, (nn.Parameter, ops._OutputOp)) or "Pad" in str(module) or (
            not isinstance(module, nn.PReLU) and next(module.parameters(), None) is not None
        ):
            # What leaves the network keeps its width; so does what has weights of another kind.
            return None
    for module, idxs, roots in readers:
        read = True
        varies = values[source(nodes[module]).name].isnan().cpu()[idxs]
        constant[torch.tensor(roots)[varies]] = False
    if not read or not constant.any():
        return None
    if constant.all():
        # A convolution without outputs is no convolution.
        constant[strength.argmax()] = False
    return candidate


def _fold(network: fx.GraphModule, at: fx.Node, channels: list[int], values: Mapping[str, Tensor],
          replaced: list[Replaced]) -> None:
    """Add what constant inputs make of a layer's output to what follows it."""
    module: Any = layer(network, at)
    constant = torch.zeros_like(values[source(at).name])
    constant[channels] = values[source(at).name][channels]
    if not constant.any():
        return
    weight = module.weight.flatten(2).sum(2) if module.weight.dim() > 2 else module.weight
    groups = getattr(module, "groups", 1)
    # (groups, outputs of a group, inputs of a group) @ (groups, inputs of a group, 1)
    moved = (weight.view(groups, -1, weight.shape[1]) @ constant.view(groups, -1, 1)).flatten()
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
