"""Attention whose scores have a learned part, with its backward pass: no fused kernel computes that part's gradient.

Written out, autograd would hold the scores, what is added to them, what is cut from them, and the weights; here weights alone are
held, the addition is part of the product, and the gradient of what was added is that of the scores.

Legend: z batch, h heads, n queries, m keys, c/w widths of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossattention.attention.masks import ScoreMask
from crossattention.attention.products import is_traced, is_transformed


def takes_own_gradient(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether a gradient of this library's own may stand for autograd's: one set of keys and values a head, nobody looks inside."""
    return (
        not torch.compiler.is_compiling()
        and not is_transformed()
        and not is_traced()
        and queries.dtype == keys.dtype == values.dtype
        and queries.dtype in (torch.float32, torch.float64)
        and queries.shape[:2] == keys.shape[:2] == values.shape[:2]
        and queries.shape[3] == keys.shape[3]
        and queries.shape[2] > 0
        and keys.shape[2] > 0
    )


def runs_learned(queries: Tensor, keys: Tensor, values: Tensor, mask: ScoreMask) -> bool:
    """Whether `attend_learned` takes these: what has a gradient of its own, and a number for each score."""
    bias = mask.tensor
    return (
        bias is not None
        and takes_own_gradient(queries, keys, values)
        and bias.dtype == queries.dtype
        and tuple(bias.shape) == (*queries.shape[:3], keys.shape[2])
    )


def attend_learned(queries: Tensor, keys: Tensor, values: Tensor, mask: ScoreMask, scale: float) -> Tensor:
    """Softmax(queries keys^T scale + bias) values: (z, h, n, w), zero where nothing may be attended."""
    live = mask.live
    if live is not None and live.device.type == "cpu" and bool(live.all()):
        live = None
    out: Tensor = _Learned.apply(queries, keys, values, mask.tensor, mask.allowed, live, scale)
    return out


class _Learned(torch.autograd.Function):
    """One item a head and batch row, heads first: so the logits of relative positions lie, and they are the largest."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
        allowed: Tensor | None,
        live: Tensor | None,
        scale: float,
    ) -> Tensor:
        z, h, n, _ = queries.shape
        q, k, v, b = (heads_first(tensor) for tensor in (queries, keys, values, bias))
        weights = torch.baddbmm(b, q, k.transpose(1, 2), alpha=scale)
        by_item = weights.view(h, z, n, -1)
        if allowed is not None:
            by_item.masked_fill_(~allowed.transpose(0, 1), -torch.inf)
        if live is not None:
            by_item.masked_fill_(~live.transpose(0, 1), 0.0)
        torch.softmax(weights, -1, out=weights)
        if live is not None:
            by_item.masked_fill_(~live.transpose(0, 1), 0.0)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.heads = scale, h
        return _batch_first(torch.bmm(weights, v), h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        g = heads_first(grad)
        d_values = torch.bmm(weights.transpose(1, 2), g)
        d_scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), weights, -1, weights.dtype)
        d_queries = torch.bmm(d_scores, k).mul_(ctx.scale)
        d_keys = torch.bmm(d_scores.transpose(1, 2), q).mul_(ctx.scale)
        return *(_batch_first(tensor, ctx.heads) for tensor in (d_queries, d_keys, d_values, d_scores)), None, None, None


def heads_first(tensor: Tensor) -> Tensor:
    """(z, h, rows, columns) as (h z, rows, columns); a view where the heads lie first in memory."""
    return tensor.transpose(0, 1).reshape(-1, *tensor.shape[2:])


def _batch_first(tensor: Tensor, heads: int) -> Tensor:
    return tensor.view(heads, -1, *tensor.shape[1:]).transpose(0, 1)
