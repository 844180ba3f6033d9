"""Multi-head attention as torch computes it, with its projections done by a given function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def attention(
    linear: Linear, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None,
    training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, static_k: Tensor | None = None,
    static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward` with `linear` in the place of its projections.

    Args:
        linear: maps (x, weight, bias) to x · weightᵀ + bias.
        query, key, value: (length, batch, embedding), or (length, embedding) without a batch.
        the others: as torch's function takes them.

    Returns:
        (output in the query's shape, weights of the attention or None), as torch's function.
    """
    if query.dim() == 2:  # one sequence without a batch
        out, single = attention(
            linear, query[:, None], key[:, None], value[:, None], embed_dim_to_check, num_heads, in_proj_weight,
            in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training,
            None if key_padding_mask is None else key_padding_mask[None], need_weights, attn_mask,
            use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v,
            average_attn_weights, is_causal,
        )
        return out[:, 0], None if single is None else single[0]
    length, batch, width = query.shape
    q, k, v = _projected(
        linear, query, key, value, in_proj_weight, in_proj_bias,
        (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None,
    )
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, batch, -1)])
        v = torch.cat([v, bias_v.expand(1, batch, -1)])
    q, k, v = (_heads(part, batch, num_heads) for part in (q, k, v))  # (batch, heads, length, width of a head)
    k = k if static_k is None else static_k.unflatten(0, (batch, num_heads))
    v = v if static_v is None else static_v.unflatten(0, (batch, num_heads))
    if add_zero_attn:
        k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
    mask = _mask(attn_mask, key_padding_mask, batch, num_heads, k.shape[2], q.dtype)
    if mask is None and is_causal:
        mask = q.new_full((length, length), -math.inf).triu(1)
    dropped = dropout_p if training else 0.0
    weights: Tensor | None = None
    if need_weights:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores if mask is None else scores + mask
        weights = functional.dropout(scores.softmax(-1), dropped)
        mixed = weights @ v
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropped)
    mixed = mixed.permute(2, 0, 1, 3).reshape(length, batch, width)
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    return linear(mixed, out_proj_weight, out_proj_bias), weights


def _projected(
    linear: Linear, query: Tensor, key: Tensor, value: Tensor, packed: Tensor | None, bias: Tensor | None,
    separate: tuple[Any, ...] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value after their projections, each (length, batch, embedding)."""
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if separate is not None:
        q, k, v = (linear(x, w, b) for x, w, b in zip((query, key, value), separate, biases, strict=True))
        return q, k, v
    assert packed is not None
    if query is key and key is value:
        q, k, v = linear(query, packed, bias).chunk(3, -1)
        return q, k, v
    # The whole weight is one tensor with one scale, so each input meets all of it.
    q, k, v = (linear(x, packed, bias).chunk(3, -1)[part] for part, x in enumerate((query, key, value)))
    return q, k, v


def _heads(x: Tensor, batch: int, heads: int) -> Tensor:
    """(length, batch, embedding) → (batch, heads, length, embedding / heads)."""
    return x.reshape(x.shape[0], batch, heads, -1).permute(1, 2, 0, 3)


def _mask(
    attention: Tensor | None, padding: Tensor | None, batch: int, heads: int, keys: int, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores, which broadcasts to (batch, heads, queries, keys); None for nothing."""
    total: Tensor | None = None
    if attention is not None:
        total = _added(attention, dtype)
        if total.dim() == 3:
            total = total.unflatten(0, (batch, heads))
        total = functional.pad(total, (0, keys - total.shape[-1]))
    if padding is not None:
        of_keys = functional.pad(_added(padding, dtype), (0, keys - padding.shape[-1]))[:, None, None]
        total = of_keys if total is None else total + of_keys
    return total


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of booleans (True: not looked at) as one of floats that is added."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
