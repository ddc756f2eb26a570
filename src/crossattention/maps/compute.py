"""Attention maps: what A looks at in B, from the layer's own scores, without touching how the layer runs.

Legend: z batch, r repeats on one context, h heads, n queries, m context positions.
"""

from __future__ import annotations

from torch import Tensor

from crossattention.attention import CrossAttention, PreparedContext


def attention_map(
    layer: CrossAttention,
    a: Tensor,
    b: Tensor | PreparedContext,
    *,
    context_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    context_positions: Tensor | None = None,
) -> Tensor:
    """The weights with which every query reads every context position.

    weights[z, h, n, m] = softmax over m of (A Wq + bq)(B Wk + bk)^T scale, zero in rows that may attend nothing

    Args:
        layer: the layer whose weights are asked for.
        a: queries (z, n, a), learned queries (n, a), or (z, r, n, a).
        b: context (z, m, b), or what `layer.prepare` made of it; its plan's scores are then used.
        context_mask: bool (z, m), True = may be attended; only with a raw context.
        attn_mask: bool, or floating and added to the scaled scores; broadcasts to (z, h, n, m), or (z, r, h, n, m).
        query_positions: integers (n,) or (z, n), for a position part; default 0, 1, ...
        context_positions: integers (m,) or (z, m), likewise; only with a raw context.

    Returns:
        (z, h, n, m), or (z, r, h, n, m); each row sums to one, or is zero where nothing may be attended. Without dropout.

    Raises:
        ValueError: as `CrossAttention.attend`; a `context_mask` or `context_positions` with an already prepared context.
        TypeError: `layer` is no CrossAttention, or a mask of a wrong dtype.

    Cost: the whole z h n m matrix in memory.

    Example:
        >>> import torch
        >>> layer = CrossAttention(48, 32, heads=4)
        >>> attention_map(layer, torch.randn(2, 5, 48), torch.randn(2, 7, 32)).shape
        torch.Size([2, 4, 5, 7])
    """
    if not isinstance(layer, CrossAttention):
        raise TypeError(f"attention_map expects a CrossAttention, got {type(layer).__name__}")
    if isinstance(b, PreparedContext):
        for name, given in (("context_mask", context_mask), ("context_positions", context_positions)):
            if given is not None:
                raise ValueError(f"{name} belongs to the prepared context and would be ignored here; pass it to prepare(b, ...)")
        return layer.score_map(a, b, attn_mask=attn_mask, query_positions=query_positions)
    prepared = layer.prepare(b, context_mask=context_mask, context_positions=context_positions, query_length=a.shape[-2], uses=1)
    return layer.score_map(a, prepared, attn_mask=attn_mask, query_positions=query_positions)
