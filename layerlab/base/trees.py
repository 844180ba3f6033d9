"""Batches of any form: a tensor, or tuples and dicts of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

# How a network is given the inputs of a batch.
Manner = Callable[[nn.Module, Any], Any]


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a batch, in their order.

    Example:
        >>> import torch
        >>> [len(each) for each in tensors({"a": torch.zeros(2), "b": (torch.zeros(3), None)})]
        [2, 3]
    """
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


def count(tree: Any) -> int:
    """How many examples a batch has: the length of its first tensor."""
    return len(tensors(tree)[0])


def on_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tree with a function's value in the place of each tensor."""
    return tree_map(lambda each: function(each) if isinstance(each, Tensor) else each, tree)


def chunks(tree: Any, parts: int) -> list[Any]:
    """A batch in at most so many parts of about as many examples each; what is no tensor is in all of them."""
    number = len(tensors(tree)[0].chunk(parts))
    return [on_tensors(lambda each, at=at: each.chunk(parts)[at], tree) for at in range(number)]  # type: ignore[misc]


def manner(network: nn.Module, x: Any) -> Manner:
    """How a network takes such inputs: a dict's entries by their names, a tuple's one after the other, where its
    `forward` has parameters for them; everything else as it is.

    Example:
        >>> import torch
        >>> bilinear = nn.Bilinear(2, 3, 4)
        >>> pair = (torch.zeros(5, 2), torch.zeros(5, 3))
        >>> tuple(manner(bilinear, pair)(bilinear, pair).shape)
        (5, 4)
    """
    if isinstance(x, Tensor):
        return _as_it_is
    signature = inspect.signature(network.forward)
    try:
        if isinstance(x, Mapping):
            signature.bind(**x)
            return _by_name
        signature.bind(*x)
        return _in_order
    except TypeError:
        return _as_it_is


def shapes(tree: Any) -> str:
    """What a batch is, in words: its tensors' types and shapes.

    Example:
        >>> import torch
        >>> shapes(torch.zeros(2, 3))
        'float32 of shape (2, 3)'
    """
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} of shape {tuple(tree.shape)}"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key!r}: {shapes(value)}" for key, value in tree.items()) + "}"
    return "(" + ", ".join(map(shapes, tree)) + ")" if isinstance(tree, tuple | list) else type(tree).__name__


def predict(network: nn.Module, x: Any) -> Any:
    """What a network gives for the inputs of a batch, whatever their form."""
    return manner(network, x)(network, x)


def _as_it_is(network: nn.Module, x: Any) -> Any:
    return network(x)


def _by_name(network: nn.Module, x: Mapping[str, Any]) -> Any:
    return network(**x)


def _in_order(network: nn.Module, x: tuple[Any, ...]) -> Any:
    return network(*x)
