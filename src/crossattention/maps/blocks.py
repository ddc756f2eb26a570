"""Blocks of whole rows of a map: what summaries are updated with, and how a map is cut into them.

Legend: z batch, r repeats on one context, h heads, n queries, m context positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, Protocol

from torch import Tensor

BLOCK_SCORES = 3 << 19
"""Most scores of one block, unless a single row has more: 6 MB in float32. On 512 x 50,176 x 8 heads, 2^20 took a quarter longer,
as keys are read once for each block; 2^21 and more were up to a fifth quicker and took more memory (dev/LOG.md)."""

WIDE_KEYS = 64
"""Width of keys from which on a block is half as large, as the keys of the head beside it take twice the room: at width 128 that is
1/23 of the full weights and 1.23 of a plain read, with whole blocks 1/17 and 1.03 (dev/LOG.md)."""

Heads = Literal["each", "mean"]


class MapRows(Protocol):
    """A map whose rows are made when they are asked for: `ScoreRows` of our layers, and those of other libraries' kernels."""

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Of the whole map: z, r (1 without repeats), h, n, m."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole map: (z, h, n, m), or (z, r, h, n, m)."""

    @property
    def repeats(self) -> int | None:
        """How many query sequences read each context, None where there is no dimension for them."""

    @property
    def key_heads(self) -> int:
        """Number of heads that the keys have."""

    @property
    def key_width(self) -> int:
        """Width in which scores meet."""

    @property
    def makes_all_heads(self) -> bool:
        """Whether asking for some heads costs as much as for all."""

    @property
    def context_mask(self) -> Tensor | None:
        """Bool (z, m), True = may be attended; None if all may."""

    def weights(self, items: slice, repeats: slice, heads: slice, queries: slice) -> Tensor:
        """Some whole rows, (items, heads, queries, m) or (items, repeats, heads, queries, m), without gradients."""


@dataclass(frozen=True, eq=False)
class Block:
    """Some whole rows of a map: with `whole` what `attention_map` gives without summaries, `whole[block.place]` is `weights`.

    Args:
        weights: (items, heads, queries, m), or (items, repeats, heads, queries, m) where queries came as (z, r, n, a); without
            heads for a summary whose `heads` is "mean". Other summaries read it too, so it is not to be changed.
        place: where these rows stand: a slice for each dimension but the last.
        shape: of the whole map, (z, h, n, m), (z, r, h, n, m), or these without h.
        context_mask: bool (items, m), True = may be attended; None if all may.
    """

    weights: Tensor
    place: tuple[slice, ...]
    shape: tuple[int, ...]
    context_mask: Tensor | None


def blocks_of(rows: MapRows, kinds: Collection[Heads]) -> Iterator[tuple[Heads, Block]]:
    """Every row of a map in blocks, for each kind that is asked for: of each head, or of the mean over heads.

    Blocks of the same items, repeats and heads come in the order of their queries. There is at least one block of each kind asked
    for, of no rows where there are none. Whoever drops a block before asking for the next never holds two.
    """
    items, repeats, heads, queries = _cuts(rows)
    if "mean" not in kinds:  # heads before queries, so that the keys of a head are laid out once for all its rows
        for item, head, repeat, query in product(items, heads, repeats, queries):
            yield "each", _block(rows, item, repeat, head, query)
        return
    for item, repeat, query in product(items, repeats, queries):
        total: Tensor | None = None
        for head in heads:
            block = _block(rows, item, repeat, head, query)
            summed = block.weights.sum(-3)
            total = summed if total is None else total.add_(summed)
            if "each" in kinds:
                yield "each", block
            del block
        assert total is not None
        place = (item, query) if rows.repeats is None else (item, repeat, query)
        shape = (*rows.shape[:-3], *rows.shape[-2:])
        yield "mean", Block(total.div_(rows.shape[-3]), place, shape, _mask_of(rows, item))


def _block(rows: MapRows, item: slice, repeat: slice, head: slice, query: slice) -> Block:
    place = (item, head, query) if rows.repeats is None else (item, repeat, head, query)
    return Block(rows.weights(item, repeat, head, query), place, rows.shape, _mask_of(rows, item))


def _mask_of(rows: MapRows, item: slice) -> Tensor | None:
    return None if rows.context_mask is None else rows.context_mask[item]


def _cuts(rows: MapRows) -> tuple[list[slice], list[slice], list[slice], list[slice]]:
    """Slices of items, repeats, heads and queries, whose products are the blocks."""
    z, r, h, n, m = rows.sizes
    share = h // rows.key_heads
    # Where heads have keys of their own, these count like scores: few rows would otherwise bring the keys of all heads at once.
    width = rows.key_width if rows.key_heads > 1 else 1
    a_head = max(1, r * n, width) * max(1, m)
    if BLOCK_SCORES >= h * a_head:
        return _slices(z, BLOCK_SCORES // (h * a_head)), _slices(r, r), _slices(h, h), _slices(n, n)
    heads = h if rows.makes_all_heads else max(1, min(h, BLOCK_SCORES // a_head))
    most = BLOCK_SCORES if rows.key_width <= WIDE_KEYS else BLOCK_SCORES // 2
    left = max(1, most // (heads * max(1, m)))  # rows of each head
    repeats, queries = (min(r, left // n), n) if 0 < n <= left else (1, left)
    return _slices(z, 1), _slices(r, repeats), _head_slices(h, share, heads), _slices(n, queries)


def _slices(total: int, step: int) -> list[slice]:
    """Slices of some length that cover a dimension; one that is empty where there is nothing."""
    return [slice(start, min(start + step, total)) for start in range(0, total, max(1, step))] or [slice(0, 0)]


def _head_slices(heads: int, share: int, most: int) -> list[slice]:
    """Slices of at most `most` heads that are whole groups of `share` heads which read the same keys, or part of one group."""
    if most >= share:
        return _slices(heads, most // share * share)
    return [slice(group + some.start, group + some.stop) for group in range(0, heads, share) for some in _slices(share, most)]
