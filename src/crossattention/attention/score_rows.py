"""The weights of one call in parts: those of any items, repeats, heads and queries, made when they are asked for.

The scores are the executor's own, so what maps show cannot drift from what the layer computes. What is held between parts grows
with n and with m, never with n x m: masks and score biases are cut before they are combined.

Legend: z batch, r repeats on one context, h heads, g key-value heads, n queries, m context length, c width in which scores meet,
rows = repeats x queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crossattention.attention import execute
from crossattention.attention.masks import ScoreMask, combine_masks, fold_repeats, part_of
from crossattention.attention.prepared import PreparedContext

if TYPE_CHECKING:
    from crossattention.attention.cross_attention import CrossAttention


WIDEST_LAID_OUT = 128
"""Width up to which prepared keys of a head are laid out, which makes rows of scores a fifth to two fifths quicker."""


class ScoreRows:
    """Whole rows of a call's weights, on demand; `CrossAttention.score_rows` makes it of checked input.

    Args:
        layer: the layer.
        prepared: what is read; of it, only what concerns scores.
        queries: (z or 1, h or 1, rows, c), in the plan's meeting space.
        projected: the projected queries (z or 1, h, rows, k) where a part reads them.
        positions: positions of the rows, (rows,) or (z, rows), where a part wants them.
        attn_mask: bool or floating, broadcastable to (z, h, n, m), or (z, r, h, n, m).
        repeats: r where queries came as (z, r, n, a), else None.
        length: n.
        makes_keys: whether the keys of `prepared` are B itself, of which each head's keys are made when they are asked for.
    """

    def __init__(
        self,
        layer: CrossAttention,
        prepared: PreparedContext,
        queries: Tensor,
        projected: Tensor | None,
        positions: Tensor | None,
        attn_mask: Tensor | None,
        repeats: int | None,
        length: int,
        *,
        makes_keys: bool = False,
    ) -> None:
        self._layer, self._prepared, self.repeats, self._length = layer, prepared, repeats, length
        self._mask_dtype = queries.dtype
        self._queries, self._keys = execute.to_autocast_dtype(queries, prepared.keys)
        self._projected, self._positions, self._makes_keys = projected, positions, makes_keys
        self._attn_mask = None
        if attn_mask is not None:
            self._attn_mask = attn_mask.reshape((1,) * (len(self.shape) - attn_mask.dim()) + tuple(attn_mask.shape))
        self._last_keys: tuple[tuple[int, ...], Tensor] | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Of the whole map: z, r (1 without repeats), h, n, m."""
        repeats = 1 if self.repeats is None else self.repeats
        return self._prepared.batch, repeats, self._layer.heads, self._length, self._prepared.context_length

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole map: (z, h, n, m), or (z, r, h, n, m)."""
        z, r, h, n, m = self.sizes
        return (z, h, n, m) if self.repeats is None else (z, r, h, n, m)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._keys.device

    @property
    def key_heads(self) -> int:
        """Number of heads that the keys have."""
        return self._layer.kv_heads if self._makes_keys else self._keys.shape[1]

    @property
    def key_width(self) -> int:
        """Width in which scores meet."""
        return self._layer.head_dim if self._makes_keys else self._keys.shape[3]

    @property
    def makes_all_heads(self) -> bool:
        """Whether a part makes score biases of all heads at once, so that asking for some costs as much as for all."""
        return self._layer.positions is not None and self._layer.positions.adds_to_scores

    @property
    def context_mask(self) -> Tensor | None:
        """Bool (z, m), True = may be attended; None if all may."""
        return self._prepared.mask

    def weights(self, items: slice, repeats: slice, heads: slice, queries: slice) -> Tensor:
        """The weights (items, heads, queries, m), or (items, repeats, heads, queries, m), new in memory; without gradients.

        Args:
            items: of the batch.
            repeats: some; more than one only together with all queries. Without repeats, slice(0, 1).
            heads: some; either whole groups of heads that share keys, or part of one.
            queries: some.
        """
        r, n = repeats.stop - repeats.start, queries.stop - queries.start
        count, m = items.stop - items.start, self._prepared.context_length
        first = repeats.start * self._length + queries.start
        rows = slice(first, first + r * n)
        if 0 in (count, r * n, m):
            dtype = torch.float64 if self._queries.dtype == torch.float64 else torch.float32
            weights = torch.zeros(count, heads.stop - heads.start, r * n, m, dtype=dtype, device=self._keys.device)
        else:
            some = part_of(self._queries, items, heads, rows)
            mask = self._mask(items, repeats, heads, queries, rows)
            keys = self._keys_of(items, heads, is_read_again=r * n < self._queries.shape[2])
            with torch.autocast(some.device.type, enabled=False):
                weights = execute.explicit_weights(some, keys, mask, self._layer.scale)
            weights = weights.expand(count, -1, -1, -1)
        return weights if self.repeats is None else weights.unflatten(2, (r, n)).transpose(1, 2)

    def _keys_of(self, items: slice, heads: slice, *, is_read_again: bool) -> Tensor:
        """The keys that some heads read; one head's are laid out whole, once, where other rows follow and they are not too wide.

        Wider ones are read where they stand: a third slower at width 256, but a third of the memory (dev/LOG.md).
        """
        share = self._layer.heads // self.key_heads
        groups = slice(heads.start // share, (heads.stop - 1) // share + 1)
        lays_out = is_read_again and groups.stop - groups.start == 1 and self.key_width <= WIDEST_LAID_OUT
        if not self._makes_keys and not lays_out:
            return self._keys[items, groups]
        asked = (items.start, items.stop, groups.start, groups.stop)
        if self._last_keys is None or self._last_keys[0] != asked:
            self._last_keys = None  # before the next is made, so that two are never held
            if self._makes_keys:
                keys = execute.make_some_keys(self._layer, self._keys[items, 0], groups)
            else:
                keys = self._keys[items, groups]
            dtype = torch.float32 if keys.dtype in (torch.bfloat16, torch.float16) else keys.dtype
            self._last_keys = asked, keys.to(dtype).contiguous()
        return self._last_keys[1]

    def _mask(self, items: slice, repeats: slice, heads: slice, queries: slice, rows: slice) -> ScoreMask:
        """All that is added to or cut from these scores."""
        prepared, attn_mask = self._prepared, self._attn_mask
        if attn_mask is not None and self.repeats is None:
            attn_mask = part_of(attn_mask, items, heads, queries)
        elif attn_mask is not None:
            attn_mask = part_of(attn_mask, items, repeats, heads, queries)
            attn_mask = fold_repeats(attn_mask, repeats.stop - repeats.start, queries.stop - queries.start)
        bias = None if prepared.key_bias is None else prepared.key_bias[items, heads].unsqueeze(2)
        if self.makes_all_heads:
            added = part_of(self._added(items, rows), slice(None), heads)
            bias = added if bias is None else bias + added
        context_mask = None if prepared.mask is None else prepared.mask[items]
        return combine_masks(context_mask, attn_mask, bias, prepared.context_length, self._mask_dtype)

    def _added(self, items: slice, rows: slice) -> Tensor:
        """What the position part adds to the scores of some rows, broadcastable to (items, h, rows, m)."""
        part, at, context_at = self._layer.positions, self._positions, self._prepared.positions
        assert part is not None and at is not None and context_at is not None
        read = None
        if part.reads_queries:
            assert self._projected is not None
            read = part_of(self._projected, items, slice(None), rows)
        at = at[rows] if at.dim() == 1 else at[items, rows]
        context_at = context_at if context_at.dim() == 1 else context_at[items]
        return part.score_bias(read, at, context_at, self._layer.scale)


def rows_of_steps(steps: Sequence[ScoreRows], picks: Tensor) -> ScoreRows:
    """The rows of whole sequences, as of one call, out of those of their steps, each one query of r beams or samples a context.

    Args:
        steps: the rows of each step; all read what the first one reads, or some items of it.
        picks: (z, r, t) the row z' r' + r' of each of the t steps that a sequence goes through; -1 where it has ended, and weights
            are zero.

    Returns:
        Rows of (z, r, h, t, m).

    Raises:
        ValueError: a step of several queries, or one with a mask of pairs.
    """
    first = steps[0]
    if any(step._length != 1 or step.repeats is None or step._attn_mask is not None for step in steps):
        raise ValueError("steps of one query each, (z, r, 1, a), and without attn_mask can be joined; look at the calls one by one")
    z, r, t = picks.shape
    rows = picks.clamp(min=0)

    def joined(parts: Sequence[Tensor]) -> Tensor:
        """Of (z', h, r', c) each: (z, h, r t, c)."""
        flat = [
            part.expand(step._prepared.batch, -1, -1, -1).transpose(1, 2).flatten(0, 1)
            for part, step in zip(parts, steps, strict=True)
        ]
        picked = torch.stack([part[rows[..., s].flatten()] for s, part in enumerate(flat)], 1)
        return picked.view(z, r * t, *picked.shape[2:]).transpose(1, 2)

    projected = None if first._projected is None else joined([step._projected for step in steps if step._projected is not None])
    positions = None
    if first._positions is not None:
        at = [step._positions.expand(step._prepared.batch, -1).flatten() for step in steps if step._positions is not None]
        positions = torch.stack([part[rows[..., s]] for s, part in enumerate(at)], -1).flatten(1)
    is_real = (picks >= 0)[:, :, None, :, None] if bool((picks < 0).any()) else None
    queries = joined([step._queries for step in steps])
    return ScoreRows(first._layer, first._prepared, queries, projected, positions, is_real, r, t)
