"""What may stand inside attention as a part: a position part and a query-key norm. The layers room has the ready ones.

A part is a module that is handed to the layer's constructor. It names, as data, the meeting spaces that it forbids: the planner
then never chooses them, and `plan_for` prints the reason. Legend: z batch, h heads, g key-value heads, n queries, m context
positions, k head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from crossattention.plan import Forbidden


@dataclass(frozen=True)
class Run:
    """Positions start, start + 1, ... of some length, one after the other or, as of neighbours laid end to end, again and again."""

    start: int
    length: int
    count: int = 1


@dataclass(frozen=True)
class Distances:
    """Logits of distances for runs of queries and context positions, as `attention.by_distance` wants them.

    Args:
        rows: where the queries stand.
        columns: where the context stands.
        table: (u, h, k), what queries meet of each distance, the furthest first, down to the nearest or to 0.
        bias: (h, k), added to the queries before; None for none.
    """

    rows: Run
    columns: Run
    table: Tensor
    bias: Tensor | None


class PositionPart(nn.Module):
    """Tells attention where queries and context positions stand: by turning queries and keys, or by adding to the scores.

    A part overrides what it does and leaves the rest. Positions are integers, `(n,)` or `(z, n)` for queries and `(m,)` or
    `(z, m)` for the context.
    """

    forbids: ClassVar[tuple[Forbidden, ...]] = ()
    """Meeting spaces that this part makes impossible, each with the reason."""
    adds_to_scores: ClassVar[bool] = False
    """Whether `score_bias` returns something; attention does not call it otherwise."""
    reads_queries: ClassVar[bool] = False
    """Whether `score_bias` needs the projected queries."""

    def turn_queries(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Queries (z, h, n, k) with their positions turned into them; the same shape."""
        return queries

    def turn_keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys (z, g, m, k) with their positions turned into them; the same shape."""
        return keys

    def score_bias(self, queries: Tensor | None, query_positions: Tensor, context_positions: Tensor, scale: float) -> Tensor:
        """What is added to the scaled scores, broadcastable to (z, h, n, m).

        `queries` are the projected queries (z, h, n, k) before any turning, None unless `reads_queries`; `scale` is the factor of
        the content scores, for parts whose logits are scaled alike.
        """
        raise NotImplementedError(f"{type(self).__name__} says adds_to_scores but has no score_bias")

    def distances(
        self, queries: Tensor, query_positions: Tensor | Run, context_positions: Tensor | Run, *, from_zero: bool = False
    ) -> Distances | None:
        """What `score_bias` adds, where it is a product of the queries with a table of distances; None where it is not.

        Args:
            queries: the projected queries (z, h, n, k).
            query_positions: as of `score_bias`, or the run that they are.
            context_positions: likewise.
            from_zero: whether only distances from 0 on are asked for, as in causal attention.
        """
        return None


class QueryKeyNorm(nn.Module):
    """A norm on each head's queries and keys, between projection and scores; over the last width, k.

    It is not linear, so neither projection can be moved to the other side of it.
    """

    forbids: ClassVar[tuple[Forbidden, ...]] = tuple(
        Forbidden("scores", space, "the query-key norm stands between Wq and Wk, so neither can be absorbed")
        for space in ("context", "query")
    )

    def normalise_queries(self, queries: Tensor) -> Tensor:
        """Queries (z, h, n, k), normalised."""
        raise NotImplementedError

    def normalise_keys(self, keys: Tensor) -> Tensor:
        """Keys (z, g, m, k), normalised."""
        raise NotImplementedError
