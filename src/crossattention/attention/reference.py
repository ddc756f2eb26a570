"""The specification: textbook cross-attention in twenty lines, any dtype. The oracle of every test; never run in production.

Legend: z batch, n queries, m context length, a/b widths of A and B, h heads, g key-value heads, k/v head widths, o output width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_attention(
    a: Tensor,
    b: Tensor,
    *,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    out_weight: Tensor,
    heads: int,
    kv_heads: int | None = None,
    scale: float | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    context_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-attention as written in the paper, with every intermediate held.

    weights[z, h, n, m] = softmax over m of (A Wq)(B Wk)^T scale + attn_mask, zero where nothing may be attended
    out = concat over h of (weights B Wv) Wo + bo

    Args:
        a: queries (z, n, a).
        b: context (z, m, b).
        q_weight: (h k, a), as `nn.Linear` stores it.
        k_weight: (g k, b).
        v_weight: (g v, b).
        out_weight: (o, h v).
        heads: h.
        kv_heads: g, default h; query head i reads key-value head i // (h / g).
        scale: factor of the scores, default 1 / sqrt(k).
        q_bias: (h k) or None; k_bias (g k), v_bias (g v) and out_bias (o) likewise.
        k_bias: see q_bias.
        v_bias: see q_bias.
        out_bias: see q_bias.
        context_mask: bool (z, m), True = may be attended.
        attn_mask: bool or additive float, broadcastable to (z, h, n, m).

    Returns:
        Output (z, n, o) and weights (z, h, n, m).

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """
    groups = kv_heads or heads
    q = torch.nn.functional.linear(a, q_weight, q_bias).unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = (
        torch.nn.functional.linear(b, weight, bias)
        .unflatten(-1, (groups, -1))
        .transpose(1, 2)
        .repeat_interleave(heads // groups, 1)
        for weight, bias in ((k_weight, k_bias), (v_weight, v_bias))
    )
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    if context_mask is not None:
        scores = scores.masked_fill(~context_mask[:, None, None, :], -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return torch.nn.functional.linear(out, out_weight, out_bias), weights
