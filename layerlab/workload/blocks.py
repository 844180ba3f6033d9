"""Residual blocks: what is added up, the branch that computes and the shortcut around it."""

from __future__ import annotations

import operator
import posixpath
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import fx, nn

from layerlab.base.errors import Refused, first_line

_SUMS = {operator.add, operator.iadd, torch.add}


class ResidualBlock(NamedTuple):
    """A sum of two paths from one tensor.

    Attributes:
        name: the module that holds all of the branch, such as `layer1.0`; empty where that is the network.
        branch: the modules of the longer path, by name, in the order in which they run.
        shortcut: those of the other path; empty where the tensor itself is added.

    Example:
        >>> from layerlab import build_model, residual_blocks
        >>> residual_blocks(build_model("resnet-cifar", depth=8))[1].shortcut
        {}
    """

    name: str
    branch: dict[str, nn.Module]
    shortcut: dict[str, nn.Module]


def residual_blocks(model: nn.Module) -> list[ResidualBlock]:
    """The residual blocks of a network, in the order of the forward pass, found in its graph for any kind of layer.

    A block is a sum of two tensors that come from one, with the modules that run on both ways. Blocks within the branch
    of another one stand before it. Sums with a parameter, or of paths without a module, are none.

    Args:
        model: any network that torch.fx can trace; it is not changed.

    Raises:
        Refused: torch.fx cannot trace it.

    Example:
        >>> from layerlab import build_model, residual_blocks
        >>> network = build_model("resnet-cifar", num_classes=10, channels=1, depth=8)
        >>> [block.name for block in residual_blocks(network)]
        ['stage1.0', 'stage2.0', 'stage3.0']
        >>> list(residual_blocks(network)[0].branch)
        ['stage1.0.conv1', 'stage1.0.bn1', 'stage1.0.relu1', 'stage1.0.conv2', 'stage1.0.bn2']
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # torch.fx's, or the network's own when it is given a proxy
        raise Refused(f"The residual blocks of {type(model).__name__} cannot be found, since torch.fx cannot trace it "
                      f"({first_line(error)}); let its forward not depend on values.") from None
    place = {node: index for index, node in enumerate(graph.nodes)}
    above: dict[fx.Node, set[fx.Node]] = {}
    found = []
    for node in graph.nodes:
        above[node] = {node}.union(*(above[each] for each in node.all_input_nodes))
        if not _is_sum(node):
            continue
        one, other = node.args[:2]
        assert isinstance(one, fx.Node)
        assert isinstance(other, fx.Node)
        common = above[one] & above[other]
        if not common:
            continue
        # Where both paths begin: what is before it, both have in common.
        fork = max(common, key=place.__getitem__)
        paths = [_modules(model, above[end] - above[fork], place) for end in (one, other)]
        branch, shortcut = sorted(paths, key=len, reverse=True)
        if branch:
            found.append(ResidualBlock(_holder(branch), branch, shortcut))
    return found


def _is_sum(node: fx.Node) -> bool:
    """Whether a node of the graph adds two tensors."""
    operands = [each for each in node.args[:2] if isinstance(each, fx.Node)]
    if len(operands) < 2 or operands[0] is operands[1]:
        return False
    if node.op == "call_method":
        return node.target in ("add", "add_")
    return node.op == "call_function" and node.target in _SUMS


def _modules(model: nn.Module, nodes: Iterable[fx.Node], place: dict[fx.Node, int]) -> dict[str, nn.Module]:
    """The modules that nodes call or whose parameters they read, by name, in the order of the graph."""
    names = []
    for node in sorted(nodes, key=place.__getitem__):
        if node.op == "call_module":
            names.append(str(node.target))
        elif node.op == "get_attr":
            names.append(str(node.target).rpartition(".")[0])
    return {name: model.get_submodule(name) for name in names}


def _holder(branch: Iterable[str]) -> str:
    """The innermost module that holds all of some modules, which may be among them."""
    names = [name.replace(".", "/") for name in branch]
    holders = [name if any(other.startswith(f"{name}/") for other in names) else posixpath.dirname(name)
               for name in names]
    return posixpath.commonpath(holders).replace("/", ".")
