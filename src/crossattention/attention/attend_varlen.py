"""All items of a ragged call in one launch: `torch.nn.attention.varlen`, which CUDA has for half precision.

Legend: t rows of all items' queries, u of all contexts, h heads, g key-value heads, c/w widths in which scores and values meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crossattention.attention.fused import spread, widen

if TYPE_CHECKING:
    from crossattention.attention.cross_attention import CrossAttention
    from crossattention.attention.ragged import PreparedRagged

WIDEST = 256
"""Head width up to which the flash kernel runs."""


def takes(layer: CrossAttention, prepared: PreparedRagged, queries: Tensor, attn_mask: object, dropout: float) -> bool:
    """Whether the kernel applies: half precision on CUDA, nothing masked, added or dropped, heads that are not summed."""
    keys, values = prepared.keys, prepared.values
    adds = layer.positions is not None and layer.positions.adds_to_scores
    return (
        keys.device.type == "cuda"
        and prepared.plan.kernel == "fused"
        and prepared.plan.values != "output"
        and queries.dtype == keys.dtype == values.dtype
        and keys.dtype in (torch.float16, torch.bfloat16)
        and not (adds or dropout or attn_mask is not None or prepared.mask is not None or prepared.key_bias is not None)
        and queries.shape[3] <= keys.shape[3] == values.shape[3] <= WIDEST
        and keys.shape[3] % 8 == 0
        and 0 not in (queries.shape[2], keys.shape[2])
        and _kernel()[0] is not None
    )


@lru_cache(maxsize=1)
def _kernel() -> tuple[Callable[..., Any] | None, bool]:
    """`varlen_attn`, None where this torch has none (before 2.10), and whether it takes fewer heads of keys than of queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, False
    known = inspect.signature(varlen_attn).parameters
    return (varlen_attn if "scale" in known else None), "enable_gqa" in known


def read(
    queries: Tensor, keys: Tensor, values: Tensor, asked: Sequence[int], taken: Sequence[int], scale: float
) -> tuple[Tensor, Tensor | None]:
    """Let each item's queries read its keys and values.

    Args:
        queries: (h or 1, t, c), items end to end.
        keys: (g, u, c), items end to end in the same order.
        values: (g', u, c).
        asked: rows of queries of each item.
        taken: length of each context.
        scale: factor of the scores.

    Returns:
        What the heads read (1, h, t, c), zero where a context is empty, and the sums of the rows of weights (1, 1, t, 1), None
        where all are one.
    """
    attend, shares_heads = _kernel()
    assert attend is not None
    heads, groups = max(queries.shape[0], keys.shape[0], values.shape[0]), max(keys.shape[0], values.shape[0])
    groups = groups if shares_heads else heads
    queries = widen(queries, keys.shape[2]).expand(heads, -1, -1)
    by_head = (queries, spread(keys.unsqueeze(0), groups)[0], spread(values.unsqueeze(0), groups)[0])
    rows = [tensor.transpose(0, 1).contiguous() for tensor in by_head]
    ends = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=queries.device) for lengths in (asked, taken)]
    more = {"enable_gqa": True} if heads != groups else {}
    out = attend(rows[0], rows[1], rows[2], ends[0], ends[1], max(asked), max(taken), scale=scale, **more)
    assert isinstance(out, Tensor)
    sums = None
    if 0 in taken:  # said by us, whatever the kernel leaves there
        live = torch.tensor([m > 0 for n, m in zip(asked, taken, strict=True) for _ in range(n)], device=queries.device)
        out = out.masked_fill(~live[:, None, None], 0.0)
        sums = live[None, None, :, None].to(out.dtype)
    return out.transpose(0, 1).unsqueeze(0), sums
