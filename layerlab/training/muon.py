"""Muon: momentum whose update of a matrix is orthogonal; SGD for what is no matrix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The quintic of Newton and Schulz with the steepest slope at zero (Jordan et al., kellerjordan.github.io/posts/muon).
QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) on matrices and convolutions' kernels, SGD with Nesterov's momentum on the rest.

    torch's own Muon takes matrices alone and computes in bfloat16, which many processors do slowly. A kernel is a
    matrix with a row for each output channel. A step moves a hidden weight by `lr` times an orthogonal matrix of its
    shape, scaled by the square root of rows over columns where there are more rows.

    Args:
        groups: of parameters; `hidden` says of a group whether its members are orthogonalised.
        lr: learning rate of groups without one of their own.
        momentum: of both.
        weight_decay: decoupled: `lr · weight_decay` of the weight a step, of both.
        keep_norm: before its update, scale each hidden weight to the norm of an orthogonal matrix of its shape. Where a
            normalisation follows, that changes no output, and the rate alone decides how far a step turns a weight.
        iterations: of Newton and Schulz.
    """

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], lr: float, momentum: float, weight_decay: float,
        keep_norm: bool = False, iterations: int = 5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations,
                    "keep_norm": keep_norm, "hidden": False}
        super().__init__([dict(group) for group in groups], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            momentum, lr = group["momentum"], group["lr"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                mean = state["momentum_buffer"].mul_(momentum).add_(weight.grad)
                change = weight.grad.add(mean, alpha=momentum)
                if group["hidden"]:
                    rows = len(weight)
                    flat = orthogonalised(change.reshape(rows, -1), group["iterations"])  # (rows, columns)
                    change = flat.reshape(weight.shape) * max(1.0, rows / flat.shape[1]) ** 0.5
                    if group["keep_norm"]:
                        weight.mul_(rows**0.5 / weight.norm().clamp_min(1e-7))
                weight.mul_(1 - lr * group["weight_decay"]).add_(change, alpha=-lr)
        return loss


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix with the same singular vectors, whose singular values are near 1 (about 0.7 to 1.2), (rows, columns).

    Args:
        matrix: (rows, columns).
        iterations: of Newton and Schulz.
    """
    a, b, c = QUINTIC
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)  # no singular value above 1, or the iteration does not converge
    for _ in range(iterations):
        product = wide @ wide.T  # (short side, short side)
        wide = a * wide + (b * product + c * product @ product) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def hidden_first(
    groups: Iterable[Mapping[str, Any]], lr: float, output: Collection[nn.Parameter]
) -> list[dict[str, Any]]:
    """Groups for `Muon`: the matrices and kernels, trained at `lr`, and the rest.

    The output layer belongs to the rest, as Muon's authors advise.
    """
    given, last = [dict(group) for group in groups], set(output)
    hidden = {each for group in given for each in group["params"] if each.dim() >= 2 and each not in last}
    first = {"params": [each for group in given for each in group["params"] if each in hidden], "lr": lr,
             "hidden": True}
    rest = [{**group, "params": [each for each in group["params"] if each not in hidden]} for group in given]
    return [group for group in (first, *rest) if group["params"]]
