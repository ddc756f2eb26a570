"""Attention whose scores have a learned part that depends on the query and on the distance, with its backward pass.

    scores[h, n, m] = scale (q[h, n] . k[h, m] + (q[h, n] + bias_h) . table_h[p_n - s_m])

Where positions count up by one, each row meets every distance that there is, and the pairs' logits are the same numbers one further
along in each row. Items are taken in turn, so many at once that their scores stay in the processor's cache; of several items one
head at a time, as heads of one item lie evenly in memory and so do items of one head, but not both. Only the weights are kept for
the backward pass, in which the gradients of scores and of distances are one another's, laid out anew.

Legend: z batch, h heads, n queries, m keys, k/w widths of keys and values, u distances, r/c runs of queries and of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossattention.attention.learned import heads_first, takes_own_gradient
from crossattention.attention.parts import Distances, Run

CACHED_NUMBERS = 1 << 18
"""Scores of as many pairs, a thread, are in work at once: with the logits of their distances they fill a core's own cache."""

SPAN = 128
"""Rows of causal attention that are written out together: fewer meet fewer keys that they may not read, in smaller products."""


def causal_spans(num_rows: int, context_length: int, offset: int) -> list[tuple[int, int, int]]:
    """Stretches of rows, each with the number of keys up to its last row: begin, end, keys. One inside graphs."""
    if torch.compiler.is_compiling() or num_rows < 2 * SPAN:
        return [(0, num_rows, context_length)]
    ends = [*range(SPAN, num_rows - SPAN // 2, SPAN), num_rows]
    return [(begin, end, offset + end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def runs_by_distance(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend_by_distance` takes these: what has a gradient of its own, on a CPU, not under autocast, nothing empty."""
    return (
        queries.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and takes_own_gradient(queries, keys, values)
        and queries.numel() > 0
        and values.numel() > 0
    )


def attend_by_distance(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    distances: Distances,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """What queries read of keys and values.

    Args:
        queries: projected queries (z, h, n, k).
        keys: (z, h, m, k).
        values: (z, h, m, w).
        distances: what the queries have to say of each distance; where causal, of those from 0 on.
        scale: factor of both parts of the scores.
        mask: bool (z, m), True = may be attended; not where causal.
        is_causal: whether each query reads keys up to its own position; both are then one run that ends at the same place.

    Returns:
        (z, h, n, w), zero where nothing may be attended.
    """
    if mask is not None and bool(mask.all()):
        mask = None
    rows, columns = distances.rows, distances.columns
    layout = _Layout(rows, columns, scale, is_causal)
    out: Tensor = _ByDistance.apply(queries, keys, values, distances.bias, distances.table, mask, layout)
    return out


class _Layout(NamedTuple):
    """All that is no tensor."""

    rows: Run
    columns: Run
    scale: float
    is_causal: bool

    def spans(self) -> list[tuple[int, int, int]]:
        """Rows that are taken together, with their keys: begin, end, keys."""
        n, m = self.rows.length * self.rows.count, self.columns.length * self.columns.count
        return causal_spans(n, m, m - n) if self.is_causal else [(0, n, m)]


class _Skew:
    """Logits of distances (h, y, r n, u), furthest first, and the same by pairs: memory for them, used again for each item.

    The distance of row i and column j is number n - 1 - i + j of u = n + m - 1. Causal rows leave out the last n - 1, which no row
    reads but through what is cut: u = m, and the numbers of a row beyond its last are the next row's.
    """

    def __init__(self, like: Tensor, heads: int, items: int, span: tuple[int, int, int], layout: _Layout) -> None:
        begin, end, keys = span
        self.causal, self.heads = layout.is_causal, heads
        self.runs, self.n = (1, end - begin) if self.causal else (layout.rows.count, layout.rows.length)
        self.repeats, self.m = (1, keys) if self.causal else (layout.columns.count, layout.columns.length)
        self.u = self.m if self.causal else self.n + self.m - 1
        self.flat = like.new_zeros(heads, items * self.runs * self.n * self.u)

    def by_distance(self, items: int) -> Tensor:
        """(h, y r n, u) of the first items."""
        rows = items * self.runs * self.n
        return self.flat[:, : rows * self.u].view(len(self.flat), rows, self.u)

    def _by_pair(self, items: int, columns: int) -> Tensor:
        """(h, y, r, n, columns), a view."""
        whole = self.n * self.u
        shape = (len(self.flat), items, self.runs, self.n, columns)
        return self.flat.as_strided(shape, (self.flat.stride(0), self.runs * whole, whole, self.u - 1, 1), self.n - 1)

    def to_pairs(self, scores: Tensor) -> None:
        """Write the logits of all pairs to scores (h y, r n, c m)."""
        items = len(scores) // len(self.flat)
        wide = scores.view(len(self.flat), items, self.runs, self.n, self.repeats, self.m)
        wide.copy_(self._by_pair(items, self.m).unsqueeze(4))

    def from_pairs(self, scores: Tensor) -> None:
        """Take the gradient of each distance from that of the pairs; those that no pair has stay zero."""
        items = len(scores) // len(self.flat)
        if self.causal:  # what is cut has no gradient: each row without its last number, which only the last row has, lies apart
            self.flat.view(-1, self.n * self.u)[: len(scores), : self.n - 1] = 0.0
            self._by_pair(items, self.m - 1).copy_(scores.view(len(self.flat), items, 1, self.n, self.m)[..., :-1])
            self.flat.view(-1, self.n * self.u)[: len(scores), -1] = scores[:, -1, -1]
            return
        wide = scores.view(len(self.flat), items, self.runs, self.n, self.repeats, self.m)
        self._by_pair(items, self.m).copy_(wide.squeeze(4) if self.repeats == 1 else wide.sum(4))


class _ByDistance(torch.autograd.Function):
    """Within a block the heads come first, as the table of distances is a head's."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        table: Tensor,
        mask: Tensor | None,
        layout: _Layout,
    ) -> Tensor:
        z, h, n, _ = queries.shape
        spans, scaled = layout.spans(), (table * layout.scale).transpose(0, 1)
        weights = queries.new_empty(z * h * sum((end - begin) * m for begin, end, m in spans))
        out = queries.new_empty(z, n, h, values.shape[3])
        work = _Work(queries, layout, spans)
        for block, heads, kept in work.blocks(weights):
            q, k, v = (heads_first(tensor[block, heads]) for tensor in (queries, keys, values))
            placed, some_scaled = _placed(q, None if bias is None else bias[heads]), scaled[heads]
            for span, skew, w in zip(spans, work.skews, kept, strict=True):
                begin, end, m = span
                by_distance = skew.by_distance(len(q) // skew.heads)
                rows = placed[:, begin:end].reshape(skew.heads, -1, q.shape[2])
                torch.bmm(rows, some_scaled[:, -skew.u :].transpose(1, 2), out=by_distance)
                skew.to_pairs(w)
                w.baddbmm_(q[:, begin:end], k[:, :m].transpose(1, 2), alpha=layout.scale)
                _cut(w, span, layout, None if mask is None else mask[block], skew.heads)
                read = torch.bmm(w, v[:, :m])
                out[block, begin:end, heads] = read.view(skew.heads, -1, end - begin, read.shape[2]).permute(1, 2, 0, 3)
        ctx.save_for_backward(queries, keys, values, bias, table, weights)
        ctx.layout = layout
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, bias, table, weights = ctx.saved_tensors
        layout, spans = ctx.layout, ctx.layout.spans()
        scaled = (table * layout.scale).transpose(0, 1)
        d_queries, d_keys, d_values = (tensor.new_empty(*tensor.transpose(1, 2).shape) for tensor in (queries, keys, values))
        d_bias = None if bias is None else torch.zeros_like(bias)
        d_table = scaled.new_zeros(scaled.shape) if ctx.needs_input_grad[4] else None
        work = _Work(queries, layout, spans)
        for block, heads, kept in work.blocks(weights):
            q, k, v, g = (heads_first(tensor[block, heads]) for tensor in (queries, keys, values, grad))
            placed, some_scaled = _placed(q, None if bias is None else bias[heads]), scaled[heads]
            dq = torch.empty_like(q, memory_format=torch.contiguous_format)
            dk, dv = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (k, v))
            if len(spans) > 1:
                dk.zero_(), dv.zero_()
            kept_before = 1.0 if len(spans) > 1 else 0.0  # of the gradients of keys and values, which each span adds to
            for (begin, end, m), skew, w in zip(spans, work.skews, kept, strict=True):
                gs, qs = g[:, begin:end], q[:, begin:end]
                dv[:, :m].baddbmm_(w.transpose(1, 2), gs, beta=kept_before)
                ds = torch.bmm(gs, v[:, :m].transpose(1, 2))
                torch._softmax_backward_data(ds, w, -1, w.dtype, grad_input=ds)
                dk[:, :m].baddbmm_(ds.transpose(1, 2), qs, beta=kept_before, alpha=layout.scale)
                skew.from_pairs(ds)
                by_distance = skew.by_distance(len(q) // skew.heads)
                d_placed = torch.bmm(by_distance, some_scaled[:, -skew.u :])
                if d_bias is not None:
                    d_bias[heads] += d_placed.sum(1)
                if d_table is not None:
                    rows = placed[:, begin:end].reshape(skew.heads, -1, q.shape[2])
                    d_table[heads, -skew.u :].baddbmm_(by_distance.transpose(1, 2), rows, alpha=layout.scale)
                dq[:, begin:end] = d_placed.view(len(q), end - begin, -1).baddbmm_(ds, k[:, :m], alpha=layout.scale)
            for tensor, whole in ((dq, d_queries), (dk, d_keys), (dv, d_values)):
                whole[block, :, heads] = tensor.view(work.heads, -1, *tensor.shape[1:]).permute(1, 2, 0, 3)
        given = (d_queries.transpose(1, 2), d_keys.transpose(1, 2), d_values.transpose(1, 2))
        return *given, d_bias, None if d_table is None else d_table.transpose(0, 1), None, None


class _Work:
    """Which items and heads are taken together, and the memory that they share."""

    def __init__(self, queries: Tensor, layout: _Layout, spans: list[tuple[int, int, int]]) -> None:
        self.batch, self.all_heads = queries.shape[:2]
        self.sizes = [((end - begin), m) for begin, end, m in spans]
        # Spans cut rows out of the middle of an item, which are then not whole in memory: one item at a time.
        self.heads = self.all_heads if len(spans) > 1 or self.batch == 1 else 1
        largest = self.heads * max(rows * m for rows, m in self.sizes)
        room = CACHED_NUMBERS * torch.get_num_threads()
        self.items = 1 if len(spans) > 1 else max(1, min(self.batch, room // largest))
        self.skews = [_Skew(queries, self.heads, self.items, span, layout) for span in spans]

    def blocks(self, weights: Tensor) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """Items, heads, and their weights (h y, rows, keys) of each span."""
        at = 0
        for head in range(0, self.all_heads, self.heads):
            for begin in range(0, self.batch, self.items):
                items = min(self.items, self.batch - begin)
                kept = []
                for rows, m in self.sizes:
                    size = self.heads * items * rows * m
                    kept.append(weights[at : at + size].view(-1, rows, m))
                    at += size
                yield slice(begin, begin + items), slice(head, head + self.heads), kept


def _placed(queries: Tensor, bias: Tensor | None) -> Tensor:
    """Queries (h y, n, k) as they meet distances."""
    if bias is None:
        return queries
    return (queries.view(len(bias), -1, *queries.shape[1:]) + bias[:, None, None]).view(queries.shape)


def _cut(scores: Tensor, span: tuple[int, int, int], layout: _Layout, mask: Tensor | None, heads: int) -> None:
    """Scores (h y, rows, keys) to weights, in place; zero in rows that have nothing to read."""
    begin, end, m = span
    if layout.is_causal and end - begin > 1:
        rows = end - begin
        later = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu(1)
        scores[:, :, m - rows :].masked_fill_(later, -math.inf)
    if mask is None:
        torch.softmax(scores, -1, out=scores)
        return
    by_item, cut = scores.view(heads, -1, *scores.shape[1:]), ~mask[None, :, None]
    is_empty = cut.all(-1, keepdim=True)
    by_item.masked_fill_(cut & ~is_empty, -math.inf)  # a row of -inf alone would be NaN
    by_item.masked_fill_(is_empty, 0.0)
    torch.softmax(scores, -1, out=scores)
    by_item.masked_fill_(is_empty, 0.0)
