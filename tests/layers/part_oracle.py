"""Attention with a part, written out: what a part does is given as plain functions of one head's rows, in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from crossattention import CrossAttention, SelfAttention

# All sizes different, so that no two can be mistaken: z 2, n 5, m 7, a 6, b 9, h 3, k 4, v 5, o 8.
SIZES = {"heads": 3, "head_dim": 4, "value_head_dim": 5, "out_dim": 8, "dtype": torch.float64}


def rows_as_they_are(rows: Tensor, positions: Tensor) -> Tensor:
    return rows


def nothing_added(queries: Tensor, query_positions: Tensor, context_positions: Tensor, head: int) -> float:
    return 0.0


def written_out(
    layer: CrossAttention | SelfAttention,
    a: Tensor,
    b: Tensor,
    query_positions: Tensor,
    context_positions: Tensor,
    *,
    turn_queries: Callable[[Tensor, Tensor], Tensor] = rows_as_they_are,
    turn_keys: Callable[[Tensor, Tensor], Tensor] = rows_as_they_are,
    added: Callable[[Tensor, Tensor, Tensor, int], Tensor | float] = nothing_added,
    mask: Tensor | None = None,
) -> Tensor:
    """The layer's output, item by item and head by head.

    `turn_queries` and `turn_keys` get rows (n, k) and positions (n,); `added` gets the projected queries (n, k), both positions and
    the head, and returns what is added to the scaled scores (n, m). Positions are (z, n) and (z, m), `mask` is bool (z, n, m).
    """
    heads, groups = layer.heads, layer.kv_heads
    outputs = []
    for item in range(len(b)):
        q, k, v = layer.q_proj(a[item]), layer.k_proj(b[item]), layer.v_proj(b[item])
        read = []
        for head in range(heads):
            group = head // (heads // groups)
            q_head = q.unflatten(-1, (heads, -1))[:, head]
            k_head, v_head = (x.unflatten(-1, (groups, -1))[:, group] for x in (k, v))
            p, s = query_positions[item], context_positions[item]
            scores = turn_queries(q_head, p) @ turn_keys(k_head, s).T * layer.scale + added(q_head, p, s, head)
            if mask is not None:
                scores = scores.masked_fill(~mask[item], -torch.inf)
            read.append(scores.softmax(-1) @ v_head)
        outputs.append(layer.out_proj(torch.cat(read, -1)))
    return torch.stack(outputs)
