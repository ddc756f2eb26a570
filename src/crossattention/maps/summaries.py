"""What is kept of a map that is never held whole: a few numbers of each row, or of each column.

A summary is any object with `update(block)`, called with blocks of whole rows until all rows were seen, and `result()`. If it has
an attribute `heads = "mean"`, its blocks are of the mean over heads. `attention_map` works on a copy, so that one summary can be
asked for any number of times.

Legend: z batch, r repeats on one context, h heads, n queries, m context positions. Results have an r after z where queries came as
(z, r, n, a), and no h where `heads` is "mean".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from crossattention.maps.blocks import Block, Heads
from crossattention.maps.top import top
from crossattention.maps.warping import Paths

Kept = TypeVar("Kept")


class Summary(Protocol):
    """What `attention_map` takes in its list."""

    def update(self, block: Block) -> None:
        """Take in some whole rows. They are not to be changed; keep a copy of what is kept."""

    def result(self) -> Any:
        """What the rows came to, after all of them."""


@dataclass(frozen=True, eq=False)
class Top:
    """What `TopK` gives.

    Args:
        weights: (z, h, n, k), the largest first; 0 in rows that may attend nothing.
        positions: (z, h, n, k), where in B each stands.
    """

    weights: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Aligned:
    """What `Alignment` gives.

    Args:
        first: (z, h, n), the first position of B that the path gives a query; -1 where B has no position that may be attended.
        last: (z, h, n), the last one, itself included.
        cost: (z, h), the sum of 1 - weight along the path, in float64.
    """

    first: Tensor
    last: Tensor
    cost: Tensor


class TopK:
    """The k positions of B that each query reads most, with their weights.

    Equal weights are taken by lowest position; of a context shorter than k all positions are given.

    Args:
        k: how many.
        heads: "each" head by itself, or of the "mean" of the weights over heads.

    Returns from `result()`:
        `Top`: weights and positions, (z, h, n, k), or m in the place of k where m is less.

    Raises:
        ValueError: k below 1, an unknown word for `heads`.
        TypeError: k is no integer.

    Cost: 12 bytes for each of z h n k in float32; a long row is read once, and then k blocks of 64 columns.

    Example:
        >>> import torch
        >>> from crossattention import CrossAttention, attention_map
        >>> layer = CrossAttention(48, 32, heads=4)
        >>> [top] = attention_map(layer, torch.randn(2, 5, 48), torch.randn(2, 700, 32), [TopK(3)])
        >>> top.weights.shape, top.positions.shape
        (torch.Size([2, 4, 5, 3]), torch.Size([2, 4, 5, 3]))
    """

    def __init__(self, k: int, *, heads: Heads = "each") -> None:
        if not _is_integer(k):
            raise TypeError(f"TopK expects a number of positions, got {type(k).__name__} {k!r}; write TopK(8)")
        if k < 1:
            raise ValueError(f"TopK keeps at least 1 position, got k={k}; leave it out of the list to keep none")
        self.k, self.heads = int(k), _checked(heads)
        self._weights, self._positions = _ByRow(), _ByRow()

    def update(self, block: Block) -> None:
        """Take in some whole rows."""
        weights, positions = top(block.weights, min(self.k, block.shape[-1])) if block.shape[-1] else _none_of(block)
        self._weights.put(block, weights)
        self._positions.put(block, positions)

    def result(self) -> Top:
        """Weights and positions."""
        return Top(self._weights.whole(self), self._positions.whole(self))


class Highlight:
    """The mass that each position of B receives: its weights summed over all queries. What A highlights in B.

    mass[z, h, m] = sum over n of weights[z, h, n, m]

    A query that may attend nothing brings nothing, so a head's mass sums to the number of the others.

    Args:
        heads: "each" head by itself, or the "mean" over heads.

    Returns from `result()`:
        (z, h, m), in the weights' dtype; summed in float64 over blocks.

    Raises:
        ValueError: an unknown word for `heads`.

    Cost: 8 bytes for each of z h m.
    """

    def __init__(self, *, heads: Heads = "each") -> None:
        self.heads = _checked(heads)
        self._mass: Tensor | None = None
        self._dtype = torch.float32

    def update(self, block: Block) -> None:
        """Take in some whole rows."""
        if self._mass is None:
            self._dtype = block.weights.dtype
            self._mass = block.weights.new_zeros(*block.shape[:-2], block.shape[-1], dtype=torch.float64)
        self._mass[block.place[:-1]] += block.weights.sum(-2)

    def result(self) -> Tensor:
        """The mass."""
        return _seen(self, self._mass).to(self._dtype)


class Entropy:
    """How spread each query's weights are: 0 where one position has all, log m where all have the same.

    entropy[z, h, n] = - sum over m of w log w, in nats

    Args:
        heads: "each" head by itself, or of the "mean" of the weights over heads.

    Returns from `result()`:
        (z, h, n); 0 in rows that may attend nothing.

    Raises:
        ValueError: an unknown word for `heads`.

    Cost: one more block while a block is read.
    """

    def __init__(self, *, heads: Heads = "each") -> None:
        self.heads = _checked(heads)
        self._entropy = _ByRow()

    def update(self, block: Block) -> None:
        """Take in some whole rows."""
        self._entropy.put(block, torch.special.entr(block.weights).sum(-1))

    def result(self) -> Tensor:
        """The entropies."""
        return self._entropy.whole(self)


class Argmax:
    """The position of B that each query reads most; of equal weights the lowest position.

    Args:
        heads: "each" head by itself, or of the "mean" of the weights over heads.

    Returns from `result()`:
        Integers (z, h, n); -1 in rows that may attend nothing.

    Raises:
        ValueError: an unknown word for `heads`.
    """

    def __init__(self, *, heads: Heads = "each") -> None:
        self.heads = _checked(heads)
        self._positions = _ByRow()

    def update(self, block: Block) -> None:
        """Take in some whole rows."""
        if block.shape[-1]:
            highest, positions = block.weights.max(-1)
            positions = positions.masked_fill(highest == 0.0, -1)
        else:
            positions = torch.full(block.weights.shape[:-1], -1, device=block.weights.device)
        self._positions.put(block, positions)

    def result(self) -> Tensor:
        """The positions."""
        return self._positions.whole(self)


class Alignment:
    """Which positions of B belong to which query if both run in the same order: dynamic time warping over the weights.

    Of all paths from the first query and position to the last by steps of one query, one position, or one of both, the one along
    which the sum of 1 - weight is least; of several such, one of them. It gives each query one position or several neighbours, and
    leaves none out. For sequences of which one tells the other: letters and phonemes, words and sound.

    Positions that `context_mask` forbids are left out of the path. Queries are all in it: pass only the real ones.

    Args:
        heads: "mean" over heads, or "each" head by itself. Of a model's heads only some align, so choose a layer that does.

    Returns from `result()`:
        `Aligned`: first and last position of each query (z, n), and the path's cost (z,); with h after z for "each".

    Raises:
        ValueError: an unknown word for `heads`.

    Cost: a loop over n; two bits for each pair of a query and a position, 1/16 of the weights' bytes in float32.
    Source: Sakoe and Chiba 1978, doi:10.1109/TASSP.1978.1163055, without weights on its steps.

    Example:
        >>> import torch
        >>> from crossattention import CrossAttention, attention_map
        >>> layer = CrossAttention(48, 32, heads=4)
        >>> [path] = attention_map(layer, torch.randn(1, 3, 48), torch.randn(1, 7, 32), [Alignment()])
        >>> path.first[0, 0].item(), path.last[0, 2].item()
        (0, 6)
    """

    def __init__(self, *, heads: Heads = "mean") -> None:
        self.heads = _checked(heads)
        self._paths: Paths | None = None
        self._shape: tuple[int, ...] = ()
        self._order: Tensor | None = None
        self._lengths = torch.empty(0)

    def update(self, block: Block) -> None:
        """Take in some whole rows, those of each map in the order of its queries."""
        weights, (*maps, queries) = block.weights, block.place
        if self._paths is None:
            self._paths, self._shape = Paths(block.shape, weights.device), block.shape
            self._lengths = torch.full((block.shape[0],), block.shape[-1], device=weights.device)
            if block.context_mask is not None:
                self._order = torch.zeros(block.shape[0], block.shape[-1], dtype=torch.int64, device=weights.device)
        if block.context_mask is not None:
            assert self._order is not None
            self._lengths[maps[0]] = block.context_mask.sum(-1)
            self._order[maps[0]] = (~block.context_mask).sort(dim=-1, stable=True).indices  # those that may be attended first
            weights = weights.gather(-1, _along_maps(self._order[maps[0]], weights.dim()).expand(weights.shape))
        for i in range(queries.start, queries.stop):
            self._paths.read(tuple(maps), i, weights[..., i - queries.start, :])

    def result(self) -> Aligned:
        """The path."""
        paths, (*maps, n, m) = _seen(self, self._paths), self._shape
        lengths = _along_maps(self._lengths.unsqueeze(-1), len(maps) + 1).squeeze(-1)  # (z, 1, ...)
        if m == 0:
            nowhere = torch.full((*maps, n), -1, device=lengths.device)
            return Aligned(nowhere, nowhere, torch.zeros(maps, dtype=torch.float64, device=lengths.device))
        first, last, cost = paths.trace(lengths.clamp(min=1))
        if self._order is not None:
            order = _along_maps(self._order, first.dim()).expand(*maps, m)
            first, last = order.gather(-1, first), order.gather(-1, last)
        is_nowhere = lengths == 0
        first, last = (at.masked_fill(is_nowhere.unsqueeze(-1), -1) for at in (first, last))
        return Aligned(first, last, cost.masked_fill(is_nowhere, 0.0))


class Rows:
    """The whole weights of some queries.

    Args:
        queries: their indices, in any order; negative ones count from the end.
        heads: "each" head by itself, or the "mean" over heads.

    Returns from `result()`:
        (z, h, len(queries), m).

    Raises:
        ValueError: no queries, an unknown word for `heads`; when the map is taken, an index that it has no query for.
        TypeError: an index that is no integer, one by itself.

    Cost: z h m numbers for each query.
    """

    def __init__(self, queries: Sequence[int] | Tensor, *, heads: Heads = "each") -> None:
        given = queries.tolist() if isinstance(queries, Tensor) else queries
        if not isinstance(given, Iterable):
            raise TypeError(
                f"Rows expects a list of integers that tell which queries to keep, got {type(given).__name__} {given!r}; "
                "write Rows([0]) for the first alone"
            )
        given = list(given)
        if not given:
            raise ValueError("Rows expects at least one query, got none; leave it out of the list to keep no rows")
        wrong = [query for query in given if not _is_integer(query)]
        if wrong:
            raise TypeError(f"Rows expects integers that tell which queries to keep, got {type(wrong[0]).__name__} {wrong[0]!r}")
        self.queries, self.heads = tuple(map(int, given)), _checked(heads)
        self._rows: Tensor | None = None

    def update(self, block: Block) -> None:
        """Take in some whole rows."""
        *_, n, m = block.shape
        if self._rows is None:
            for query in self.queries:
                if not -n <= query < n:
                    raise ValueError(f"Rows asks for query {query}, but there are {n} queries; indices go from {-n} to {n - 1}")
            self._rows = block.weights.new_empty(*block.shape[:-2], len(self.queries), m)
        queries = block.place[-1]
        for kept, query in enumerate(self.queries):
            query = query % n
            if queries.start <= query < queries.stop:
                self._rows[(*block.place[:-1], kept)] = block.weights[..., query - queries.start, :]

    def result(self) -> Tensor:
        """The rows."""
        return _seen(self, self._rows)


# ----------------------------------------------------------------------------------------------------------------- shared


class _ByRow:
    """A tensor with something for each row of the map, filled block by block."""

    def __init__(self) -> None:
        self._whole: Tensor | None = None

    def put(self, block: Block, values: Tensor) -> None:
        """What the block's rows have: (block's dimensions but the last, and maybe more)."""
        if self._whole is None:
            self._whole = values.new_empty(*block.shape[:-1], *values.shape[block.weights.dim() - 1 :])
        self._whole[block.place] = values

    def whole(self, summary: object) -> Tensor:
        """All of it."""
        return _seen(summary, self._whole)


def _seen(summary: object, kept: Kept | None) -> Kept:
    """What a summary kept; refused where it was never updated."""
    if kept is None:
        raise ValueError(f"this {type(summary).__name__} has seen no block; attention_map(layer, a, b, [...]) returns the results")
    return kept


def _checked(heads: Heads) -> Heads:
    if heads not in get_args(Heads):
        raise ValueError(f'heads must be "each" or "mean", got {heads!r}')
    return heads


def _is_integer(number: object) -> bool:
    """Whether it is an integer, of Python or of NumPy, and no truth value."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def _none_of(block: Block) -> tuple[Tensor, Tensor]:
    """Weights and positions of rows without a position."""
    return block.weights, block.weights.long()


def _along_maps(tensor: Tensor, dim: int) -> Tensor:
    """(z, m) as (z, 1, ..., 1, m) with so many dimensions."""
    return tensor.reshape(tensor.shape[0], *(1,) * (dim - 2), tensor.shape[1])
