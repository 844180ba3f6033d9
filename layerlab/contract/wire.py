"""How gradients travel between workers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Wire(Protocol):
    """The form in which gradients travel between workers: one encodes and sends both parts, the other decodes.

    A gradient is about `codes × 2**exponent`. Codes of equal exponents may be added as they are, in wider integers.

    Example:
        >>> import torch
        >>> class Halves:
        ...     def encode(self, name, gradient):
        ...         return (2 * gradient).round().to(torch.int8), -1
        ...     def decode(self, codes, exponent):
        ...         return codes.float() * 2.0**exponent
        >>> Halves().decode(*Halves().encode("weight", torch.tensor([0.4, 1.0])))
        tensor([0.5000, 1.0000])
    """

    def encode(self, name: str, gradient: Tensor) -> tuple[Tensor, int]:
        """(codes, exponent) of the gradient of the parameter called `name`: integers of the gradient's shape."""
        ...

    def decode(self, codes: Tensor, exponent: int) -> Tensor:
        """The gradient that the codes stand for, float32."""
        ...
