"""The blocked kernel: attention in blocks of scores that stay in the cache, each product by the quickest library.

One block is some query rows against some or all of the context: their scores, their softmax, their share of the result. What is
held besides input and output is one block, so memory does not grow with n x m, forward or backward: the backward pass makes the
weights again, block by block. Where a whole row of scores fits, a block is whole rows and torch's own softmax; where the context is
longer, it is read in parts, once, and partial results are joined by their log-sum-exp (Rabe & Staats 2021, arXiv:2112.05682).

Legend: z batch, h heads, n queries, m context length, c / w widths in which scores and values meet, rows = heads x queries of a
block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from crossattention.attention.masks import part_of
from crossattention.attention.products import multiply
from crossattention.plan import blocks as sizes_of

_LIBRARY = torch.library.Library("crossattention", "FRAGMENT")
_LIBRARY.define(
    "attend_blocks(Tensor queries, Tensor keys, Tensor? values, Tensor? mask, Tensor? live, float scale, bool sums_heads)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attend_blocks_backward(Tensor grad, Tensor queries, Tensor keys, Tensor? values, Tensor? mask, Tensor? live, Tensor out,"
    " Tensor normaliser, float scale, bool sums_heads, bool for_queries, bool for_keys, bool for_values)"
    " -> (Tensor, Tensor, Tensor)"
)


def attend_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, live: Tensor | None, scale: float, sums_heads: bool
) -> Tensor:
    """Let queries read keys and values, holding one block of scores at a time.

    Args:
        queries: (z or 1, h or 1, n, c); one head or one item is shared by all.
        keys: (z, g, m, c), g a divisor of h.
        values: (z, g', m, w); the very same tensor as `keys` is read once for both.
        mask: bool or float without a gradient, broadcastable to (z, h, n, m) with a full last dimension.
        live: bool (z or 1, h or 1, n or 1, 1), whether a row has anything to attend; None if all have.
        scale: factor of the scores.
        sums_heads: whether the heads' results are summed, giving (z, 1, n, w).

    Returns:
        (z, h, n, w), zero where nothing may be attended. Neither n nor m may be zero.

    Cost: as explicit weights, and a second time their scores in the backward pass; memory of one block.
    """
    others = None if values is keys else values
    out, _ = torch.ops.crossattention.attend_blocks.default(queries, keys, others, mask, live, scale, sums_heads)
    heads_last: Tensor = out
    return heads_last.transpose(1, 2)


class _Work:
    """The tensors of one item of the batch, and how its heads share keys and values."""

    def __init__(
        self,
        item: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor | None,
        mask: Tensor | None,
        live: Tensor | None,
        scale: float,
    ) -> None:
        self.queries, self.keys = _item(queries, item), keys[item]
        self.values = self.keys if values is None else values[item]
        self._last: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        self.mask = None if mask is None else _item(mask, item)
        self.live = None if live is None else _item(live, item)
        self.scale = scale
        self.heads = max(self.queries.shape[0], self.keys.shape[0], self.values.shape[0])
        self.length, self.context_length = self.queries.shape[1], self.keys.shape[1]
        self.dtype = torch.float32 if queries.dtype in (torch.bfloat16, torch.float16) else queries.dtype

    # One head of queries for several of keys: all heads' scores are one product, (n, c) times (h m, c) transposed.

    @property
    def shares_queries(self) -> bool:
        return self.queries.shape[0] == 1 and self.keys.shape[0] > 1

    @property
    def is_long(self) -> bool:
        return self.context_length > sizes_of.LONGEST_ROW

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Heads and queries of each block of whole rows; heads of one block read the same keys, or share their queries."""
        together = self.heads if self.shares_queries else self.heads // self.keys.shape[0]
        heads, length = sizes_of.block_shape(together, self.length, self.context_length, shares_queries=self.shares_queries)
        for group in range(0, self.heads, together):
            for head in range(group, group + together, heads):
                for query in range(0, self.length, length):
                    yield slice(head, min(head + heads, group + together)), slice(query, min(query + length, self.length))

    def query_rows(self, heads: slice, queries: slice) -> Tensor:
        """(rows, c), scaled; the same rows for all heads where the heads share them."""
        rows = self.queries[:, queries] if self.queries.shape[0] == 1 else self.queries[heads, queries]
        rows = rows if rows.shape[0] > 1 or self.shares_queries else rows.expand(heads.stop - heads.start, -1, -1)
        return rows.reshape(-1, rows.shape[-1]).to(self.dtype) * self.scale

    def key_rows(self, heads: slice, part: slice) -> Tensor:
        """(m, c), or (heads x m, c) where the heads share their queries."""
        if self.shares_queries:
            return self.keys[heads, part].reshape(-1, self.keys.shape[-1]).to(self.dtype)
        return self._written_out("keys", self.keys, heads.start * self.keys.shape[0] // self.heads, part, self.dtype)

    def value_rows(self, group: int, part: slice, dtype: torch.dtype) -> Tensor:
        """(m, w) of one group of values."""
        if self.values is self.keys and not self.shares_queries:
            return self._written_out("keys", self.keys, group, part, dtype)
        return self._written_out("values", self.values, group, part, dtype)

    def _written_out(self, name: str, tensor: Tensor, group: int, part: slice, dtype: torch.dtype) -> Tensor:
        """Rows of one group, whole in memory: where heads lie side by side they are copied, once for all blocks that follow."""
        asked = (group, part.start, part.stop, dtype.itemsize)
        if name not in self._last or self._last[name][0] != asked:
            self._last[name] = asked, tensor[group, part].to(dtype).contiguous()
        return self._last[name][1]

    def value_groups(self, heads: slice) -> Iterator[tuple[slice, int]]:
        """Heads, counted from the block's first, that read one group of values; and that group."""
        share = self.heads // self.values.shape[0]
        head = heads.start
        while head < heads.stop:
            end = min(heads.stop, (head // share + 1) * share)
            yield slice(head - heads.start, end - heads.start), head // share
            head = end

    def weights(self, rows: Tensor, keys: Tensor, heads: slice, queries: slice) -> Tensor:
        """The block's weights (heads, queries, m), of whatever layout is quickest."""
        width = keys.shape[-1] - rows.shape[-1]
        if width:
            rows = torch.nn.functional.pad(rows, (0, width))
        count, length = heads.stop - heads.start, queries.stop - queries.start
        if self.shares_queries and self.context_length <= sizes_of.NARROW_ROW:
            across = multiply(keys, rows).view(count, self.context_length, length)
            return self._softmax(across.transpose(1, 2), heads, queries)
        scores = multiply(rows, keys)
        if self.shares_queries:
            return self._softmax(scores.view(length, count, self.context_length).transpose(0, 1), heads, queries)
        return self._softmax(scores.view(count, length, self.context_length), heads, queries)

    def _softmax(self, scores: Tensor, heads: slice, queries: slice) -> Tensor:
        """Softmax of a block in its own memory; rows without a live key become zeros."""
        self.mask_scores(scores, heads, queries, slice(None))
        live = None if self.live is None else part_of(self.live, heads, queries)
        if live is not None:
            scores.masked_fill_(~live, 0.0)
        if _is_across(scores):
            across = scores.transpose(1, 2)
            torch.softmax(across, 1, out=across)
        else:
            torch.softmax(scores, -1, out=scores)
        return scores if live is None else scores.masked_fill_(~live, 0.0)

    def mask_scores(self, scores: Tensor, heads: slice, queries: slice, part: slice) -> None:
        """Add or cut, in place, what the mask says of these pairs."""
        if self.mask is None:
            return
        mask = part_of(self.mask, heads, queries)[..., part]
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            scores.add_(mask)


def _is_across(weights: Tensor) -> bool:
    """Whether weights (heads, n, m) lie as (heads, m, n): made so where the context is short."""
    return weights.stride(2) != 1 and weights.transpose(1, 2).is_contiguous()


def _item(tensor: Tensor, item: int) -> Tensor:
    return tensor[item] if tensor.shape[0] > 1 else tensor[0]


# ---------------------------------------------------------------------------------------------------------------- forward


def _attend_blocks(
    queries: Tensor, keys: Tensor, values: Tensor | None, mask: Tensor | None, live: Tensor | None, scale: float, sums_heads: bool
) -> tuple[Tensor, Tensor]:
    """The output (z, n, h or 1, w), and the log-sum-exp of the scores (z, h, n) where the context is read in parts (else zeros)."""
    z, n, heads, width = _output_sizes(queries, keys, values)
    out = queries.new_empty(z, n, 1 if sums_heads else heads, width)
    normaliser = torch.zeros(
        z, heads, n, dtype=torch.float32 if queries.dtype != torch.float64 else torch.float64, device=out.device
    )
    for item in range(z):
        work = _Work(item, queries, keys, values, mask, live, scale)
        if sums_heads:
            out[item, :, 0] = _read_summed(work)
        elif work.is_long and not work.shares_queries:
            _read_in_parts(work, out[item], normaliser[item])
        else:
            _read_whole_rows(work, out[item])
    return out, normaliser


def _output_sizes(queries: Tensor, keys: Tensor, values: Tensor | None) -> tuple[int, int, int, int]:
    values = keys if values is None else values
    heads = max(queries.shape[1], keys.shape[1], values.shape[1])
    return keys.shape[0], queries.shape[2], heads, values.shape[3]


def _read_whole_rows(work: _Work, out: Tensor) -> None:
    """Into out (n, h, w)."""
    everything = slice(0, work.context_length)
    for heads, queries in work.blocks():
        weights = work.weights(work.query_rows(heads, queries), work.key_rows(heads, everything), heads, queries)
        weights = weights.to(work.values.dtype)
        for inside, group in work.value_groups(heads):
            some = weights[inside]
            read = multiply(some.reshape(-1, work.context_length), work.value_rows(group, everything, work.values.dtype).t())
            here = slice(heads.start + inside.start, heads.start + inside.stop)
            out[queries, here] = read.view(some.shape[0], some.shape[1], -1).transpose(0, 1)


def _read_summed(work: _Work) -> Tensor:
    """The sum over heads of what they read, (n, w), not rounded before its end."""
    total = torch.zeros(work.length, work.values.shape[-1], dtype=work.dtype, device=work.values.device)
    everything = slice(0, work.context_length)
    for heads, queries in work.blocks():
        weights = work.weights(work.query_rows(heads, queries), work.key_rows(heads, everything), heads, queries)
        joined, values = _join_heads(work, weights, heads)
        total[queries] += multiply(joined, values.t())
    return total


def _join_heads(work: _Work, weights: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
    """Weights (n, heads x m) and values (heads x m, w), whose product sums over heads."""
    if _is_across(weights):
        joined = weights.transpose(1, 2).flatten(0, 1).t()
    else:
        joined = weights.transpose(0, 1).reshape(weights.shape[1], -1)
    return joined, work.values[heads].reshape(-1, work.values.shape[-1]).to(work.dtype)


def _read_in_parts(work: _Work, out: Tensor, normaliser: Tensor) -> None:
    """Into out (n, h, w): each part of the context is read once, by all rows, and joined with what earlier parts gave."""
    together = work.heads // work.keys.shape[0]
    for group in range(work.keys.shape[0]):
        heads = slice(group * together, (group + 1) * together)
        rows = [_Rows(work, head, queries) for head, queries in _row_blocks(work, heads)]
        for start in range(0, work.context_length, sizes_of.PART):
            part = slice(start, min(start + sizes_of.PART, work.context_length))
            keys = work.key_rows(heads, part)
            for some in rows:
                some.read(work, keys, part)
        for some in rows:
            out[some.queries, some.heads], normaliser[some.heads, some.queries] = some.result()


def _row_blocks(work: _Work, heads: slice) -> Iterator[tuple[slice, slice]]:
    """Heads and queries of blocks of some `sizes_of.PART_ROWS` rows."""
    step = max(1, sizes_of.PART_ROWS // work.length)
    for head in range(heads.start, heads.stop, step):
        for query in range(0, work.length, sizes_of.PART_ROWS):
            yield slice(head, min(head + step, heads.stop)), slice(query, min(query + sizes_of.PART_ROWS, work.length))


class _Rows:
    """Rows of queries on their way through the parts of a long context: their highest score, sum of exponentials, and result."""

    def __init__(self, work: _Work, heads: slice, queries: slice) -> None:
        self.heads, self.queries = heads, queries
        self.shape = (heads.stop - heads.start, queries.stop - queries.start)
        self.rows = work.query_rows(heads, queries)
        count, width = self.rows.shape[0], work.values.shape[-1]
        self.rows = torch.nn.functional.pad(self.rows, (0, work.keys.shape[-1] - self.rows.shape[-1]))
        self.highest = self.rows.new_full((count, 1), -torch.inf)
        self.total = self.rows.new_zeros(count, 1)
        self.sum = self.rows.new_zeros(count, width)

    def read(self, work: _Work, keys: Tensor, part: slice) -> None:
        """One more part of the context."""
        scores = multiply(self.rows, keys)
        work.mask_scores(scores.view(*self.shape, -1), self.heads, self.queries, part)
        highest = torch.maximum(self.highest, scores.amax(-1, keepdim=True))
        # A row that has met no live key yet stands at -inf; zero in its place keeps exp(-inf - -inf) from being NaN.
        base = highest if work.live is None and work.mask is None else highest.masked_fill(highest == -torch.inf, 0.0)
        scores.sub_(base).exp_()
        keep = (self.highest - base).exp_()
        self.total.mul_(keep).add_(scores.sum(-1, keepdim=True))
        self.sum.mul_(keep)
        for inside, group in work.value_groups(self.heads):
            values = work.value_rows(group, part, work.dtype)
            some = slice(inside.start * self.shape[1], inside.stop * self.shape[1])
            self.sum[some] += multiply(scores[some], values.t())
        self.highest = highest

    def result(self) -> tuple[Tensor, Tensor]:
        """Output (queries, heads, w) and log-sum-exp (heads, queries); +inf for an empty row, so that exp(score - it) is zero."""
        is_empty = self.total == 0
        out = (self.sum / self.total.masked_fill(is_empty, 1.0)).view(*self.shape, -1).transpose(0, 1)
        normaliser = (self.highest + self.total.log()).masked_fill_(is_empty, torch.inf)
        return out, normaliser.view(self.shape)


# --------------------------------------------------------------------------------------------------------------- backward


def _attend_blocks_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    live: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    scale: float,
    sums_heads: bool,
    for_queries: bool,
    for_keys: bool,
    for_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; empty where they are not asked for. Keys that are also the values get both's sum."""
    for_values = for_values if values is not None else for_keys
    dtype = normaliser.dtype
    grads = _Gradients(
        queries.new_zeros(queries.shape if for_queries else 0, dtype=dtype),
        keys.new_zeros(keys.shape if for_keys else 0, dtype=dtype),
        keys.new_zeros(values.shape if for_values and values is not None else 0, dtype=dtype),
        (for_queries, for_keys, for_values),
        values is None,
    )
    for item in range(keys.shape[0]):
        work = _Work(item, queries, keys, values, mask, live, scale)
        if work.is_long and not work.shares_queries and not sums_heads:
            _backward_in_parts(work, grads.of_item(item), grad[item], out[item], normaliser[item])
        else:
            _backward_whole_rows(work, grads.of_item(item), grad[item], sums_heads)
    return grads.queries.to(queries.dtype), grads.keys.to(keys.dtype), grads.values.to(keys.dtype)


class _Gradients:
    """Where gradients are summed: of a whole batch, or, by `of_item`, of one item of it."""

    def __init__(self, queries: Tensor, keys: Tensor, values: Tensor, wanted: tuple[bool, bool, bool], are_same: bool) -> None:
        self.queries, self.keys, self.values = queries, keys, values
        self.wanted, self.are_same = wanted, are_same

    def of_item(self, item: int) -> _Gradients:
        """Views of one item's gradients."""
        queries, keys, values = (t if t.numel() == 0 else _item(t, item) for t in (self.queries, self.keys, self.values))
        return _Gradients(queries, keys, values, self.wanted, self.are_same)

    def add_block(self, work: _Work, heads: slice, queries: slice, part: slice, block: _Block) -> None:
        """Add what one block of rows and context positions brings."""
        for_queries, for_keys, for_values = self.wanted
        if for_queries:
            rows = multiply(block.score_grads, block.keys.t()).mul_(work.scale)[:, : work.queries.shape[-1]]
            if work.queries.shape[0] == 1:
                self.queries[0, queries] += rows.view(-1, queries.stop - queries.start, rows.shape[-1]).sum(0)
            else:
                self.queries[heads, queries] += rows.view(heads.stop - heads.start, queries.stop - queries.start, -1)
        if for_keys:
            brought = multiply(block.score_grads.t(), block.rows.t())
            if work.shares_queries:
                self.keys[heads, part] += brought.view(heads.stop - heads.start, part.stop - part.start, -1)
            else:
                self.keys[heads.start * self.keys.shape[0] // work.heads, part] += brought
            del brought  # as large as the part itself, and the values' follows
        if for_values:
            into = self.keys if self.are_same else self.values
            for group, brought in block.value_grads(work, heads):
                into[group, part] += brought


class _Block:
    """One block in the backward pass: its rows, keys, weights, and the gradients of its output and scores."""

    def __init__(self, rows: Tensor, keys: Tensor, weights: Tensor, out_grads: Tensor) -> None:
        self.rows, self.keys, self.weights, self.out_grads = rows, keys, weights, out_grads
        self.score_grads = rows  # set once they are known

    def weight_grads(self, work: _Work, heads: slice, part: slice) -> Tensor:
        """Gradients of the weights (heads, queries, m), in memory of their own and in the weights' layout."""
        is_across, found = _is_across(self.weights), None
        for inside, group in work.value_groups(heads):
            grads = self.out_grads[inside]
            product = multiply(grads.reshape(-1, grads.shape[-1]), work.value_rows(group, part, work.dtype))
            product = product.view(grads.shape[0], grads.shape[1], -1)
            if product.shape[0] == self.weights.shape[0] and not is_across:
                return product  # one group's values are read by all: no second block is held
            found = torch.empty_like(self.weights) if found is None else found
            found[inside] = product
        assert found is not None
        return found

    def value_grads(self, work: _Work, heads: slice) -> Iterator[tuple[int, Tensor]]:
        """Group of values and what this block brings to its gradient, (m, w)."""
        for inside, group in work.value_groups(heads):
            weights, grads = self.weights[inside], self.out_grads[inside]
            flat = weights.reshape(-1, weights.shape[-1])
            yield group, multiply(flat.t(), grads.reshape(-1, grads.shape[-1]).t())


def _out_grads(work: _Work, grad: Tensor, heads: slice, queries: slice) -> Tensor:
    """(heads, queries, w) of the gradient (n, h or 1, w)."""
    grad = grad[queries].to(work.dtype)
    if grad.shape[1] == 1:
        return grad.transpose(0, 1).expand(heads.stop - heads.start, -1, -1)
    return grad[:, heads].transpose(0, 1)


def _flat_scores(work: _Work, scores: Tensor) -> Tensor:
    """Gradients of scores (heads, queries, m) as the product that made the scores gave them."""
    if work.shares_queries:
        return scores.transpose(0, 1).reshape(scores.shape[1], -1)
    return scores.reshape(-1, scores.shape[-1])


def _backward_whole_rows(work: _Work, grads: _Gradients, grad: Tensor, sums_heads: bool) -> None:
    everything = slice(0, work.context_length)
    for heads, queries in work.blocks():
        rows, keys = work.query_rows(heads, queries), work.key_rows(heads, everything)
        rows = torch.nn.functional.pad(rows, (0, keys.shape[-1] - rows.shape[-1]))
        weights = work.weights(rows, keys, heads, queries)
        block = _Block(rows, keys, weights, _out_grads(work, grad, heads, queries))
        if grads.wanted[0] or grads.wanted[1]:
            weight_grads = block.weight_grads(work, heads, everything)
            # In place: a row's sum is taken before any of it is written.
            into, first, second = _by_memory(weight_grads)
            made, dim = weights.transpose(first, second), 1 if (first, second) == (1, 2) else 2
            torch.ops.aten._softmax_backward_data.out(into, made, dim, made.dtype, grad_input=into)
            block.score_grads = _flat_scores(work, weight_grads)
            del weight_grads
        grads.add_block(work, heads, queries, everything, block)


def _by_memory(grads: Tensor) -> tuple[Tensor, int, int]:
    """Three-dimensional gradients with two dimensions swapped, so that they lie whole in memory, and which two.

    Torch writes the gradient of a softmax into a tensor of any other layout as if it were contiguous (2.11 and 2.14).
    """
    for first, second in ((0, 0), (1, 2), (0, 1)):
        laid = grads.transpose(first, second)
        if laid.is_contiguous():
            return laid, first, second
    raise AssertionError(f"a block of gradients has strides {grads.stride()}")


def _backward_in_parts(work: _Work, grads: _Gradients, grad: Tensor, out: Tensor, normaliser: Tensor) -> None:
    together = work.heads // work.keys.shape[0]
    for group in range(work.keys.shape[0]):
        heads = slice(group * together, (group + 1) * together)
        blocks = list(_row_blocks(work, heads))
        for start in range(0, work.context_length, sizes_of.PART):
            part = slice(start, min(start + sizes_of.PART, work.context_length))
            keys = work.key_rows(heads, part)
            for some, queries in blocks:
                rows = work.query_rows(some, queries)
                rows = torch.nn.functional.pad(rows, (0, keys.shape[-1] - rows.shape[-1]))
                weights = multiply(rows, keys).view(some.stop - some.start, queries.stop - queries.start, -1)
                work.mask_scores(weights, some, queries, part)
                weights.sub_(normaliser[some, queries].unsqueeze(-1)).exp_()
                out_grads = _out_grads(work, grad, some, queries)
                block = _Block(rows, keys, weights, out_grads)
                # Row sums of weights times their gradients, over the whole row, are what the output says of them.
                sums = (out_grads * out[queries, some].transpose(0, 1).to(work.dtype)).sum(-1, keepdim=True)
                block.score_grads = _flat_scores(work, block.weight_grads(work, some, part).sub_(sums).mul_(weights))
                grads.add_block(work, some, queries, part, block)


# -------------------------------------------------------------------------------------------------- the operator's other sides


def _shapes(
    queries: Tensor, keys: Tensor, values: Tensor | None, mask: Tensor | None, live: Tensor | None, scale: float, sums_heads: bool
) -> tuple[Tensor, Tensor]:
    z, n, heads, width = _output_sizes(queries, keys, values)
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    return queries.new_empty(z, n, 1 if sums_heads else heads, width), queries.new_empty(z, heads, n, dtype=dtype)


def _backward_shapes(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    live: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    scale: float,
    sums_heads: bool,
    for_queries: bool,
    for_keys: bool,
    for_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape if for_queries else 0),
        keys.new_empty(keys.shape if for_keys else 0),
        keys.new_empty(values.shape if for_values and values is not None else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.scale, ctx.sums_heads = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    queries, keys, values, mask, live, out, normaliser = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    found = torch.ops.crossattention.attend_blocks_backward(
        grad, queries, keys, values, mask, live, out, normaliser, ctx.scale, ctx.sums_heads, *wanted
    )
    return (*(g if is_wanted else None for g, is_wanted in zip(found, wanted, strict=True)), None, None, None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.scale, ctx.sums_heads = inputs[8:10]
    ctx.wanted = inputs[10:]


def _backward_of_backward(ctx: Any, *second: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives, by the explicit weights: rare, and then memory for n x m is what they cost everywhere."""
    from crossattention.attention.execute import attend_heads
    from crossattention.attention.masks import ScoreMask

    grad, queries, keys, values, mask, live = ctx.saved_tensors
    given = [grad, queries, keys] + ([] if values is None else [values])
    with torch.enable_grad():
        grad, queries, keys, *others = again = [tensor.detach().requires_grad_() for tensor in given]
        read, _ = attend_heads(
            queries,
            keys,
            others[0] if others else keys,
            ScoreMask(mask, live),
            scale=ctx.scale,
            kernel="explicit",
            sums_heads=ctx.sums_heads,
        )
        inputs = [t for t, is_wanted in zip((queries, keys, *others), ctx.wanted, strict=False) if is_wanted]
        first = torch.autograd.grad(read.transpose(1, 2), inputs, grad, create_graph=True)
        seconds = [s for s, is_wanted in zip(second, ctx.wanted, strict=False) if is_wanted][: len(inputs)]
        found = torch.autograd.grad(first, again, seconds, allow_unused=True)
    return (*found, *[None] * (13 - len(found)))


_LIBRARY.impl("attend_blocks", _attend_blocks, "CPU")
_LIBRARY.impl("attend_blocks", _attend_blocks, "CUDA")
_LIBRARY.impl("attend_blocks_backward", _attend_blocks_backward, "CPU")
_LIBRARY.impl("attend_blocks_backward", _attend_blocks_backward, "CUDA")
torch.library.register_fake("crossattention::attend_blocks", _shapes, lib=_LIBRARY)
torch.library.register_fake("crossattention::attend_blocks_backward", _backward_shapes, lib=_LIBRARY)
torch.library.register_autograd("crossattention::attend_blocks", _backward, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd(
    "crossattention::attend_blocks_backward", _backward_of_backward, setup_context=_save_backward, lib=_LIBRARY
)
