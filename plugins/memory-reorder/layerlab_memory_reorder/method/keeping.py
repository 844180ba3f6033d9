"""What a function keeps for its backward, in the place of autograd, which would hold it until the whole has run."""

from __future__ import annotations

from typing import Any

from layerlab import LayerlabError


def gone() -> LayerlabError:
    """The error for a second backward of one graph, for the caller to raise."""
    return LayerlabError("memory-reorder frees activations during backward, so that one graph serves one backward; "
                         "run the forward pass again.")


def taken(ctx: Any) -> Any:
    """The kept operand, or None where none was needed; the function itself holds it no longer."""
    x, ctx.x = ctx.x, None
    if x is None:
        if ctx.kept:
            raise gone()
        return None
    if x._version != ctx.version:
        raise RuntimeError("an activation needed for the gradient was modified in place after the forward pass; "
                           "memory-reorder, like PyTorch, cannot compute the gradient from it.")
    return x
