"""Maps of contexts that are sharded over processes: what goes by position stays where it is, what goes by row is merged.

Legend: z batch, r repeats on one context, h heads, n queries, m context positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crossattention.attention import CrossAttention, PreparedQueries, PreparedShard
from crossattention.attention.sharded import (
    Shards,
    all_gather,
    all_reduce,
    is_dtensor,
    open_queries,
    own_part,
    prepare_shard,
    share_of_rows,
)
from crossattention.maps.blocks import MapRows
from crossattention.maps.summaries import Alignment, Argmax, Entropy, Highlight, Rows, Summary, Top, TopK


class ShardRows:
    """The rows of one process: the columns of its own positions, in terms of the whole row.

    Args:
        rows: as if the process's part were all there is.
        share: (z, h, n) or (z, r, h, n), what each row has of its weight there.
    """

    def __init__(self, rows: MapRows, share: Tensor) -> None:
        self._rows, self._share = rows, share
        self.sizes, self.shape, self.repeats = rows.sizes, rows.shape, rows.repeats
        self.key_heads, self.key_width, self.makes_all_heads = rows.key_heads, rows.key_width, rows.makes_all_heads
        self.context_mask = rows.context_mask

    def weights(self, items: slice, repeats: slice, heads: slice, queries: slice) -> Tensor:
        """Some rows, (items, heads, queries, m) or (items, repeats, heads, queries, m)."""
        place = (items, heads, queries) if self.repeats is None else (items, repeats, heads, queries)
        weights = self._rows.weights(items, repeats, heads, queries)
        return weights * self._share[place].unsqueeze(-1).to(weights.dtype)

    def whole(self) -> Tensor:
        """All rows."""
        z, r, h, n, _ = self.sizes
        return self.weights(slice(0, z), slice(0, r), slice(0, h), slice(0, n))


@torch.no_grad()
def map_of_shard(
    layer: CrossAttention,
    a: Tensor | PreparedQueries,
    b: Any,
    *,
    context_mask: Tensor | None,
    context_positions: Tensor | None,
    attn_mask: Tensor | None,
    query_positions: Tensor | None,
) -> tuple[ShardRows, Shards]:
    """The rows of this process's part of B, raw or prepared, and how the whole lies."""
    if isinstance(b, PreparedShard):
        prepared = b
    else:
        hints = {"query_length": a.shape[-2], "repeats": a.shape[1] if a.dim() == 4 else None, "uses": 1}
        prepared = prepare_shard(layer, b, context_mask, context_positions, None, **hints, stamped=False, only_keys=True)
    if is_dtensor(a):
        a = open_queries(a, prepared.shards)
    share = share_of_rows(layer, a, prepared, attn_mask, query_positions)
    own_mask = own_part("attn_mask", attn_mask, prepared.shards)
    rows = layer.score_rows(a, prepared.local, attn_mask=own_mask, query_positions=query_positions)
    return ShardRows(rows, share), prepared.shards


def mergeable(summaries: Sequence[Summary]) -> list[Summary]:
    """What each process keeps of its own columns, for each summary.

    Raises:
        ValueError: a summary that needs whole rows.
    """
    workers: list[Summary] = []
    for summary in summaries:
        if type(summary) is Alignment:
            raise ValueError(
                "Alignment cannot be taken of a sharded context: its path leads through every position from the first to the last, "
                "and no process has them all; gather the context first (b.full_tensor())"
            )
        if type(summary) not in (TopK, Highlight, Entropy, Argmax, Rows):
            raise ValueError(
                f"{type(summary).__name__} cannot be taken of a sharded context: its blocks would be this process's columns, and "
                "how to merge what it keeps is not known; TopK, Highlight, Entropy, Argmax and Rows of the library can be, and "
                "attention_map without summaries gives this process's columns themselves"
            )
        workers.append(TopK(1, heads=summary.heads) if isinstance(summary, Argmax) else summary)
    return workers


def merged(summaries: Sequence[Summary], kept: Sequence[Any], shards: Shards) -> list[Any]:
    """The summaries of the whole map out of what this process kept; a collective call."""
    return [_merge(summary, own, shards) for summary, own in zip(summaries, kept, strict=True)]


def _merge(summary: Summary, own: Any, shards: Shards) -> Any:
    if isinstance(summary, TopK):
        return _merge_top(own, summary.k, shards)
    if isinstance(summary, Argmax):
        best = _merge_top(own, 1, shards)
        if not shards.length:
            return best.weights.new_full(best.weights.shape[:-1], -1, dtype=torch.long)
        return best.positions[..., 0].masked_fill(best.weights[..., 0] == 0.0, -1)
    if isinstance(summary, Entropy):
        return all_reduce(own.contiguous(), "sum", shards.group)
    return shards.along_context(own, -1)


def _merge_top(own: Top, k: int, shards: Shards) -> Top:
    """The best of all processes' best; of equal weights the lowest position, as parts lie in the order of their positions."""
    lacking = k - own.weights.shape[-1]  # a part shorter than k brings what can never be among the best
    weights = torch.nn.functional.pad(own.weights, (0, lacking), value=-1.0)
    positions = torch.nn.functional.pad(own.positions + shards.start, (0, lacking))
    weights, positions = torch.cat(all_gather(weights, shards.group), -1), torch.cat(all_gather(positions, shards.group), -1)
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    count = min(k, shards.length)
    return Top(weights[..., :count], positions.gather(-1, order[..., :count]))
