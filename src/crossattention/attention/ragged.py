"""Ragged cross-attention: items of unlike lengths, of which no padded position is computed.

Projections run once over all items' rows, laid end to end. Items are sorted by length where several have the same one; these are a
dense batch that lies whole in memory: attention runs on one such group after the other, by the plan's own functions and kernels. On
CUDA in half precision all groups are one call of `torch.nn.attention.varlen` where it applies.

Legend: z items, r repeats on one context, n queries and m context positions of one item, t rows of all items together, h heads,
g items of one group, c/w widths in which scores and values meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crossattention.attention import attend_varlen, execute
from crossattention.attention.fused import to_one_width
from crossattention.attention.masks import check_attn_mask, combine_masks, fold_repeats
from crossattention.attention.prepared import KEPT_CONTEXT, UNCHECKED, PreparedContext, PreparedQueries, Stamp, bytes_of
from crossattention.attention.score_rows import ScoreRows
from crossattention.attention.sequences import Sequences, check_is_tensor, is_ragged, rows_at, starts_of
from crossattention.plan import Plan

if TYPE_CHECKING:
    from crossattention.attention.cross_attention import CrossAttention


@dataclass(frozen=True, repr=False)
class PreparedRagged:
    """What a plan makes of contexts of unlike lengths: a value that `attend` reads any number of times and never changes.

    It belongs to one layer and its weights, as a `PreparedContext` does. Where the plan keeps B itself, it keeps the caller's
    memory only if that was a jagged tensor whose items were sorted by length; else a copy, which edits of B do not reach.

    Args:
        keys: (1, h or g or 1, t, c), of all items end to end.
        values: the same with the values' width; the same tensor as `keys` where both are B.
        key_bias: (1, h, t), one extra score for each key, in the "query" space of scores only.
        mask: bool (t,), True = may be attended; None if all may.
        positions: integers (t,) where the caller gave some; None where each item counts from 0.
        lengths: of each context, in the caller's order.
        order: the items in the order in which they lie.
        plan: the plan it was made by.
        stamp: which layer and weights made it.

    Example:
        >>> import torch, crossattention
        >>> layer = crossattention.CrossAttention(48, 32, heads=4)
        >>> prepared = layer.prepare([torch.randn(7, 32), torch.randn(0, 32), torch.randn(3, 32)])
        >>> prepared.lengths
        (7, 0, 3)
        >>> layer.attend(torch.randn(3, 2, 5, 48), prepared).shape  # 2 beams on each
        torch.Size([3, 2, 5, 48])
    """

    keys: Tensor
    values: Tensor
    key_bias: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    lengths: tuple[int, ...]
    order: tuple[int, ...]
    plan: Plan
    stamp: Stamp

    @property
    def batch(self) -> int:
        """Number of contexts, z."""
        return len(self.lengths)

    @property
    def context_length(self) -> int:
        """Length of the longest context; 0 without any."""
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that the prepared contexts keep alive; B counts once where keys and values are both B."""
        return bytes_of(self.keys, self.values, self.key_bias, self.mask, self.positions)

    def __repr__(self) -> str:
        return (
            f"PreparedRagged(batch={self.batch}, positions={sum(self.lengths)}, longest={self.context_length}, plan={self.plan}, "
            f"nbytes={self.nbytes}, {self.keys.dtype} on {self.keys.device})"
        )

    def select(self, rows: Tensor) -> PreparedRagged:
        """The prepared contexts of some items, in the given order (as when finished items are dropped).

        Args:
            rows: integer indices of items, (any number,).

        Cost: one copy of what is kept.
        """
        picked = [int(row) for row in rows.tolist()]
        wrong = next((row for row in picked if not 0 <= row < self.batch), None)
        if wrong is not None:
            raise ValueError(f"rows must be indices of the {self.batch} items, from 0 to {self.batch - 1}, got {wrong}")
        order = sorted(range(len(picked)), key=lambda place: self.lengths[picked[place]])
        moved = self._rearranged([picked[place] for place in order])
        lengths = tuple(self.lengths[row] for row in picked)
        return replace(moved, lengths=lengths, order=tuple(order), stamp=self.stamp.without(KEPT_CONTEXT))

    def in_order(self, order: tuple[int, ...]) -> PreparedRagged:
        """The same contexts laid in another order; a copy where it is another."""
        return self if order == self.order else replace(self._rearranged(order), order=order)

    def _rearranged(self, items: Sequence[int]) -> PreparedRagged:
        """What is kept of these items, one after the other; lengths and order are left to the caller."""
        where = dict(zip(self.order, starts_of([self.lengths[i] for i in self.order]), strict=True))
        rows = rows_at([where[i] for i in items], [self.lengths[i] for i in items], self.keys.device)
        keys = self.keys.index_select(2, rows)
        return replace(
            self,
            keys=keys,
            values=keys if self.values is self.keys else self.values.index_select(2, rows),
            key_bias=None if self.key_bias is None else self.key_bias.index_select(2, rows),
            mask=None if self.mask is None else self.mask[rows],
            positions=None if self.positions is None else self.positions[rows],
        )


# ---------------------------------------------------------------------------------------------------------------------------
# What `CrossAttention` calls
# ---------------------------------------------------------------------------------------------------------------------------


def forward_ragged(
    layer: CrossAttention, a: Any, b: Any, *, context_mask: Any, attn_mask: Any, query_positions: Any, context_positions: Any
) -> Tensor | list[Tensor]:
    """`layer(a, b)` where A, B or both are ragged: dense where all lengths are equal, else `attend(a, prepare(b))`."""
    contexts = _contexts(layer, b)
    asking = _asking(layer, a, len(contexts.lengths))
    if attn_mask is None and contexts.are_equal and (asking is None or asking.are_equal):
        dense: Tensor = layer(
            a if asking is None else asking.dense(),
            contexts.dense(),
            context_mask=_dense_rows("context_mask", context_mask, contexts),
            query_positions=query_positions if asking is None else _dense_rows("query_positions", query_positions, asking),
            context_positions=_dense_rows("context_positions", context_positions, contexts),
        )
        return dense if asking is None else asking.of_equal(dense)
    lengths = asking.lengths if asking is not None else (a.shape[-2],) * len(contexts.lengths)
    order = _grouped(range(len(lengths)), list(zip(contexts.lengths, lengths, strict=True)))
    plan = _plan(layer, a, asking, contexts)
    prepared = _prepare(layer, contexts, context_mask, context_positions, plan, order, stamped=False)
    found: Tensor | list[Tensor] = layer.attend(a, prepared, attn_mask=attn_mask, query_positions=query_positions)
    return found


def prepare_ragged(
    layer: CrossAttention, contexts: Sequences, context_mask: Any, context_positions: Any, plan: Plan
) -> PreparedRagged:
    """`layer.prepare(b)` of ragged contexts, by a plan."""
    order = tuple(sorted(range(len(contexts.lengths)), key=lambda i: contexts.lengths[i]))
    return _prepare(layer, contexts, context_mask, context_positions, plan, order, stamped=True)


def contexts_of(layer: CrossAttention, b: Any) -> tuple[Sequences, Tensor]:
    """Ragged contexts, checked, and a tensor of no memory that has their batch, mean length and width, to plan with."""
    contexts = _contexts(layer, b)
    return contexts, _stand_in(contexts, layer)


def attend_ragged(
    layer: CrossAttention, a: Any, prepared: PreparedContext | PreparedRagged, attn_mask: Any, query_positions: Any
) -> Tensor | list[Tensor]:
    """`layer.attend(a, prepared)` where A, the prepared contexts, or both are ragged."""
    reading = _Reading(layer, a, prepared, attn_mask, query_positions)
    return reading.result()


def ragged_rows(
    layer: CrossAttention,
    a: Any,
    b: Any,
    *,
    context_mask: Any = None,
    attn_mask: Any = None,
    query_positions: Any = None,
    context_positions: Any = None,
) -> Iterator[ScoreRows]:
    """The weights of each item of a ragged call, in the items' order, as rows that are made when they are asked for.

    `crossattention.attention_map` is the public way here.
    """
    if not isinstance(b, PreparedContext | PreparedRagged):
        contexts = _contexts(layer, b)
        plan = _plan(layer, a, _asking(layer, a, len(contexts.lengths)), contexts)
        b = _prepare(layer, contexts, context_mask, context_positions, plan, None, stamped=False, only_keys=True)
    return _Reading(layer, a, b, attn_mask, query_positions).rows()


# ---------------------------------------------------------------------------------------------------------------------------
# B
# ---------------------------------------------------------------------------------------------------------------------------


def _contexts(layer: CrossAttention, b: Any) -> Sequences:
    if is_ragged(b):
        contexts = Sequences.of("context", b)
    else:
        check_is_tensor("context", b)
        layer._check_context(tuple(b.shape))
        contexts = Sequences.of_dense(b)
    _check_width(layer, "context", contexts, layer.context_dim)
    return contexts


def _check_width(layer: CrossAttention, name: str, sequences: Sequences, width: int) -> None:
    sample = sequences.sample()
    if sample is None:
        return
    if sample.shape[-1] != width:
        argument = "context_dim" if name == "context" else "query_dim"
        raise ValueError(
            f"{name} has width {sample.shape[-1]} but this layer was built with {argument}={width}; project it first or build "
            f"CrossAttention({argument}={sample.shape[-1]})"
        )
    layer._check_tensor(name, sample)


def _stand_in(contexts: Sequences, layer: CrossAttention) -> Tensor:
    """A tensor of no memory with the number of contexts, their mean length and width: what the planner asks of B."""
    count = len(contexts.lengths)
    mean = round(contexts.total / count) if count else 0
    return torch.empty(1, requires_grad=contexts.requires_grad()).expand(count, mean, layer.context_dim)


def _plan(layer: CrossAttention, a: Any, asking: Sequences | None, contexts: Sequences) -> Plan:
    """The plan of one read: as of a dense batch of the same mean lengths, which has as many rows to project."""
    if asking is not None:
        length = round(asking.total / len(asking.lengths)) if asking.lengths else 0
        return layer._plan_of(_stand_in(contexts, layer), length, None, 1)
    repeats = a.shape[1] if a.dim() == 4 else None
    return layer._plan_of(_stand_in(contexts, layer), a.shape[-2], repeats, 1, a.dim() == 2)


def _prepare(
    layer: CrossAttention,
    contexts: Sequences,
    context_mask: Any,
    context_positions: Any,
    plan: Plan,
    order: tuple[int, ...] | None,
    *,
    stamped: bool,
    only_keys: bool = False,
) -> PreparedRagged:
    if order is None:
        order = tuple(sorted(range(len(contexts.lengths)), key=lambda i: contexts.lengths[i]))
    b = _packed(layer, contexts, order, layer.context_dim).unsqueeze(0)
    mask = _by_row("context_mask", context_mask, contexts, order, b.device)
    given = _by_row("context_positions", context_positions, contexts, order, b.device)
    if given is not None and layer.positions is None:
        raise ValueError(
            "context_positions were passed but the layer has no position part to use them; build it with positions=..."
        )
    positions = given
    if given is None and layer.positions is not None:
        positions = _counted([contexts.lengths[i] for i in order], b.device)
    if not stamped and not only_keys and _leaves_out_key_bias(layer, plan):
        keys = execute.make_some_keys(layer, b, slice(0, layer.kv_heads), biased=False)
        values, key_bias = execute.make_values(layer, plan.values, b), None
        if plan.kernel == "fused":
            keys, values = to_one_width(keys, values)
    else:
        keys, values, key_bias = execute.make_keys_and_values(layer, plan, b, positions, only_keys=only_keys)
    stamp = Stamp.of(layer._token, layer._made_of(plan, keys, values)) if stamped else UNCHECKED
    return PreparedRagged(keys, values, key_bias, mask, given, contexts.lengths, order, plan, stamp)


def _grouped(order: Sequence[int], lengths: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Items in an order in which those of the same lengths follow each other, shortest first; as they are where that helps little.

    An order that stays needs no copy of rows, and where few items have the same lengths there are hardly fewer groups after it.
    """
    grouped = sorted(order, key=lengths.__getitem__)  # stable
    given = sum(lengths[i] != lengths[j] for i, j in pairwise(order))
    after = sum(lengths[i] != lengths[j] for i, j in pairwise(grouped))
    return tuple(order) if 2 * given <= 3 * after else tuple(grouped)


def _leaves_out_key_bias(layer: CrossAttention, plan: Plan) -> bool:
    """Whether the key bias, which adds the same to all scores of a row, need not be added to every key: without gradients."""
    has_parts = layer.qk_norm is not None or layer.positions is not None
    return (
        plan.scores == "head" and not has_parts and not torch.is_grad_enabled() and execute.linear_reason(layer.k_proj, "") is None
    )


def _packed(layer: CrossAttention, sequences: Sequences, order: Sequence[int], width: int) -> Tensor:
    """All rows in an order, (t, width); of an empty list, none, of the weights' dtype."""
    sample = sequences.sample()
    if sample is not None:
        return sequences.packed(order)
    return next(layer.parameters()).new_empty(0, width)


def _counted(lengths: Sequence[int], device: torch.device) -> Tensor:
    """0, 1, ... within each item, (t,)."""
    return rows_at([0] * len(lengths), lengths, device)


def _dense_rows(name: str, given: Any, sequences: Sequences) -> Tensor | None:
    """What `_by_row` gives, of sequences of one length as (z, m)."""
    sample = sequences.sample()
    if given is None or sample is None:
        return None
    rows = _by_row(name, given, sequences, range(len(sequences.lengths)), sample.device)
    return None if rows is None else rows.view(len(sequences.lengths), sequences.lengths[0])


def _by_row(name: str, given: Any, sequences: Sequences, order: Sequence[int], device: torch.device) -> Tensor | None:
    """A bool or an integer for each row (t,), from a list of tensors (m,), a jagged tensor, or, of dense sequences, a tensor."""
    if given is None:
        return None
    is_mask = name == "context_mask"
    if is_ragged(given):
        found = Sequences.of(name, given, dims=1)
    else:
        if sequences.form != "dense" or not isinstance(given, Tensor):
            raise TypeError(
                f"{name} of ragged sequences must be a list with one tensor (length,) an item, or a jagged tensor, got "
                f"{type(given).__name__}; a dense one would speak of positions that are not there"
            )
        count, length = len(sequences.lengths), sequences.longest
        if given.dim() == 1 and given.shape[0] == length and not is_mask:
            given = given.expand(count, -1)
        if tuple(given.shape) != (count, length):
            raise ValueError(f"{name} must have shape ({count}, {length}), got {tuple(given.shape)}")
        found = Sequences.of_dense(given)
    if len(found.lengths) != len(sequences.lengths):
        raise ValueError(
            f"{name} has {len(found.lengths)} items but there are {len(sequences.lengths)} sequences; pass one for each"
        )
    wrong = next((i for i, (f, s) in enumerate(zip(found.lengths, sequences.lengths, strict=True)) if f != s), None)
    if wrong is not None:
        raise ValueError(
            f"{name}[{wrong}] has length {found.lengths[wrong]} but the sequence has {sequences.lengths[wrong]}; it needs a value "
            "for each position"
        )
    sample = found.sample()
    if sample is None:
        return None
    if is_mask and sample.dtype != torch.bool:
        raise TypeError(
            f"context_mask must be bool with True = may be attended, got {sample.dtype}; for a 0/1 mask pass mask.bool()"
        )
    if not is_mask and (sample.dtype.is_floating_point or sample.dtype == torch.bool):
        raise ValueError(f"{name} must be integers, got {sample.dtype}")
    if sample.device != device:
        raise ValueError(f"{name} is on {sample.device} but what it speaks of is on {device}; move it there")
    return found.packed(order)


# ---------------------------------------------------------------------------------------------------------------------------
# A, and where the two meet
# ---------------------------------------------------------------------------------------------------------------------------


def _asking(layer: CrossAttention, a: Any, batch: int) -> Sequences | None:
    """Ragged queries, checked; None where A is dense, which the layer checks."""
    if not is_ragged(a):
        if not isinstance(a, PreparedQueries):
            check_is_tensor("queries", a)
            layer._check_shapes(tuple(a.shape), (batch, 0, layer.context_dim))
            layer._check_tensor("queries", a)
        return None
    asking = Sequences.of("queries", a)
    _check_width(layer, "queries", asking, layer.query_dim)
    if len(asking.lengths) != batch:
        raise ValueError(f"there are {len(asking.lengths)} sequences of queries but {batch} contexts; pass one for each")
    return asking


@dataclass(frozen=True)
class _Group:
    """Items whose contexts have one length and whose queries have one: a dense batch.

    Args:
        items: which they are, in the caller's order of items.
        context: of these items, views of what was prepared.
        queries: (g or 1, h or 1, r n, c).
        projected: the projected queries where a part reads them.
        positions: of the queries, (r n,) or (g, r n), where a part wants them.
        attn_mask: broadcastable to (g, h, n, m), or (g, r, h, n, m) with repeats.
        length: n.
    """

    items: tuple[int, ...]
    context: PreparedContext
    queries: Tensor
    projected: Tensor | None
    positions: Tensor | None
    attn_mask: Tensor | None
    length: int


class _Reading:
    """One call of `attend`: queries brought to the meeting space, all at once, and cut into groups with their contexts."""

    def __init__(
        self, layer: CrossAttention, a: Any, prepared: PreparedContext | PreparedRagged, attn_mask: Any, query_positions: Any
    ) -> None:
        self.layer = layer
        self._is_learned = False
        self.asking = _asking(layer, a, prepared.batch)
        if self.asking is None:
            layer._check_attendable(a, prepared)
        else:
            layer._check_prepared(prepared)
            sample = self.asking.sample()
            if sample is not None:
                layer._check_dtype(sample, prepared)
        prepared = prepared if isinstance(prepared, PreparedRagged) else _as_ragged(prepared)
        self.repeats = a.shape[1] if self.asking is None and a.dim() == 4 else None
        self.length = 0 if self.asking is not None else a.shape[-2]  # of dense queries, prepared or not
        self.lengths = (self.length,) * prepared.batch if self.asking is None else self.asking.lengths
        order = _grouped(prepared.order, list(zip(prepared.lengths, self.lengths, strict=True)))
        self.prepared = prepared.in_order(order)
        self.device = prepared.keys.device
        self.positions, self.positions_by_row = self._positions(query_positions)
        self.queries, self.projected = self._bring(a)
        self.attn_mask = self._pairs(attn_mask)

    # ------------------------------------------------------------------------------------------------- queries

    @property
    def order(self) -> tuple[int, ...]:
        return self.prepared.order

    def _positions(self, given: Any) -> tuple[Tensor | None, bool]:
        """Positions of all rows of queries (t,), or of one item's (n,) that serves all; and whether the caller gave some by row."""
        if self.layer.positions is None:
            if given is not None:
                raise ValueError(
                    "query_positions were passed but the layer has no position part to use them; build it with positions=..."
                )
            return None, False
        if given is None:
            return None, False
        if self.asking is not None:
            return _by_row("query_positions", given, self.asking, self.order, self.device), True
        checked = self.layer._positions_of("query_positions", given, self.prepared.batch, self.length, self.device)
        assert checked is not None
        if checked.dim() == 1:
            return checked.repeat(self.repeats or 1), False
        laid = checked[list(self.order)].repeat(1, self.repeats or 1)
        return laid.flatten(), True

    def _bring(self, a: Any) -> tuple[Tensor, Tensor | None]:
        """Queries (1, h or 1, t, c) of all items in the groups' order, or of the one item that serves all; and projected ones."""
        if isinstance(a, PreparedQueries):
            if self.positions is not None:
                raise ValueError(
                    "query_positions were passed but prepared queries have none to place; attend with the queries themselves"
                )
            self._is_learned = a.dim() == 2
            if self._is_learned:
                return a.queries, None
            laid = a.queries.index_select(0, torch.tensor(self.order, device=self.device))
            return laid.transpose(0, 1).reshape(1, laid.shape[1], -1, laid.shape[3]), None
        if self.asking is not None:
            rows = _packed(self.layer, self.asking, self.order, self.layer.query_dim)
        elif a.dim() == 2 and not self.positions_by_row:
            self._is_learned = True
            rows = a
        else:
            a = a.expand(self.prepared.batch, -1, -1) if a.dim() == 2 else a
            is_sorted = self.order == tuple(range(len(self.order)))
            a = a if is_sorted else a.index_select(0, torch.tensor(self.order, device=a.device))
            rows = a.flatten(0, -2)
        positions = self.positions
        if self.layer.positions is not None:
            if positions is None:
                counted = [self.lengths[i] for i in self.order for _ in range(self.repeats or 1)]
                positions = _counted([rows.shape[0]] if self._is_learned else counted, self.device)
            elif not self.positions_by_row and not self._is_learned:
                positions = positions.repeat(self.prepared.batch)
        return execute.make_queries(self.layer, self.prepared.plan.scores, rows.unsqueeze(0), positions)

    # ------------------------------------------------------------------------------------------------- masks of pairs

    def _pairs(self, given: Any) -> list[Tensor] | None:
        """A mask of pairs for each item, checked."""
        if given is None:
            return None
        if not isinstance(given, list | tuple):
            raise TypeError(
                f"attn_mask of ragged sequences must be a list with one mask an item, each broadcasting to its (heads, queries, "
                f"context), got {type(given).__name__}; a dense one would speak of pairs that are not there"
            )
        if len(given) != self.prepared.batch:
            raise ValueError(f"attn_mask has {len(given)} items but there are {self.prepared.batch} contexts; pass one for each")
        repeats = () if self.repeats is None else (self.repeats,)
        for item, mask in enumerate(given):
            target = (1, *repeats, self.layer.heads, self.lengths[item], self.prepared.lengths[item])
            try:
                check_attn_mask(mask, target, self.device)
            except (TypeError, ValueError) as error:
                raise type(error)(f"attn_mask[{item}]: {error}") from None
            if mask.dtype != given[0].dtype:
                raise ValueError(f"attn_mask[{item}] is {mask.dtype} but attn_mask[0] {given[0].dtype}; all must have one dtype")
        return list(given)

    def _mask_of(self, items: Sequence[int]) -> Tensor | None:
        """The masks of pairs of some items as one, (g, h or 1, n, m) or (g, r or 1, h or 1, n, m)."""
        if self.attn_mask is None:
            return None
        dims = 3 if self.repeats is None else 4
        masks = [self.attn_mask[i] for i in items]
        masks = [mask.reshape((1,) * max(0, dims + 1 - mask.dim()) + tuple(mask.shape))[0] for mask in masks]
        # Pairs are written out, so that masks of unlike shapes are one tensor; heads and repeats only where one differs by them.
        wanted = [max(mask.shape[d] for mask in masks) for d in range(dims - 2)]
        n, m = self.lengths[items[0]], self.prepared.lengths[items[0]]
        return torch.stack([mask.expand(*wanted, n, m) for mask in masks])

    # ------------------------------------------------------------------------------------------------- groups

    def groups(self, prepared: PreparedRagged, queries: Tensor, *, single: bool = False) -> Iterator[_Group]:
        """Items of one length of context and one of queries, dense; one by one if `single`."""
        if not self.order:
            return
        keyed = [(prepared.lengths[i], self.lengths[i]) for i in self.order]
        if single:
            runs = [(key, 1) for key in keyed]
        else:
            runs = [(key, len(list(some))) for key, some in groupby(keyed)]
        taken = [count * m for (m, _), count in runs]
        asked = [count * n * (self.repeats or 1) for (_, n), count in runs]
        # Cut by `split`: the backward pass of each slice would fill a tensor as large as the whole.
        keys = prepared.keys.split(taken, 2)
        values = keys if prepared.values is prepared.keys else prepared.values.split(taken, 2)
        biases = _cut(prepared.key_bias, taken, 2)
        masks, places = _cut(prepared.mask, taken, 0), _cut(prepared.positions, taken, 0)
        cut = [queries] * len(runs) if self._is_learned else queries.split(asked, 2)
        projected = [self.projected] * len(runs) if self._is_learned else _cut(self.projected, asked, 2)
        positions = _cut(self.positions, asked, 0) if self.positions_by_row else [self.positions] * len(runs)
        first = 0
        for index, ((m, n), count) in enumerate(runs):
            items = self.order[first : first + count]
            first += count
            key = _by_item(keys[index], count)
            bias, mask, place, asked_at = biases[index], masks[index], places[index], positions[index]
            if self.layer.positions is not None:
                place = torch.arange(m, device=self.device) if place is None else place.view(count, m)
                if asked_at is None:
                    asked_at = torch.arange(n, device=self.device).repeat(self.repeats or 1)
                elif self.positions_by_row:
                    asked_at = asked_at.view(count, -1)
            context = PreparedContext(
                key,
                key if values is keys else _by_item(values[index], count),
                None if bias is None else bias[0].unflatten(1, (count, m)).transpose(0, 1),
                None if mask is None else mask.view(count, m),
                place,
                prepared.plan,
                UNCHECKED,
            )
            read = projected[index]
            yield _Group(
                items,
                context,
                cut[index] if self._is_learned else _by_item(cut[index], count),
                read if read is None or self._is_learned else _by_item(read, count),
                asked_at,
                self._mask_of(items),
                n,
            )

    # ------------------------------------------------------------------------------------------------- results

    def result(self) -> Tensor | list[Tensor]:
        """The layer's output in the form of A."""
        layer, prepared, queries = self.layer, self.prepared, self.queries
        plan = prepared.plan
        if layer._joins_key_bias(prepared):
            assert prepared.key_bias is not None
            queries, keys = execute.join_key_bias(queries, prepared.keys, prepared.key_bias / layer.scale)
            prepared = replace(prepared, keys=keys, key_bias=None)
        read, row_sums = self._read(prepared, queries)
        width = {"head": layer.value_head_dim, "context": layer.context_dim, "output": layer.out_dim}[plan.values]
        dtype = execute.to_autocast_dtype(prepared.values)[0].dtype
        rows = execute.finish(layer, plan.values, read[..., :width], row_sums, dtype)[0]
        if self.asking is not None:
            return self.asking.like(rows, self.order)
        laid = rows.view(prepared.batch, *(() if self.repeats is None else (self.repeats,)), self.length, rows.shape[-1])
        where = sorted(range(prepared.batch), key=self.order.__getitem__)
        return laid if where == list(range(len(where))) else laid.index_select(0, torch.tensor(where, device=self.device))

    def _read(self, prepared: PreparedRagged, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the heads read, (1, h or 1, t, w), and the sums of rows of weights, (1, h or 1, t, 1), None where all are one."""
        layer, plan = self.layer, prepared.plan
        dropout = layer.dropout if layer.training else 0.0
        wants_row_sums = plan.values == "context" and layer.v_proj.bias is not None
        if attend_varlen.takes(layer, prepared, queries, self.attn_mask, dropout):
            keys, values = prepared.keys, prepared.values
            rows = queries.expand(prepared.batch, -1, -1, -1).transpose(0, 1).flatten(1, 2) if self._is_learned else queries[0]
            taken = [prepared.lengths[i] for i in self.order]
            asked = [self.lengths[i] * (self.repeats or 1) for i in self.order]
            return attend_varlen.read(rows, keys[0], values[0], asked, taken, layer.scale)
        found: list[Tensor] = []
        sums: list[Tensor | None] = []
        for group in self.groups(prepared, queries):
            context = group.context
            attn_mask = group.attn_mask
            if attn_mask is not None and self.repeats is not None:
                attn_mask = fold_repeats(attn_mask, self.repeats, group.length)
            bias = None if context.key_bias is None else context.key_bias.unsqueeze(2)
            if layer.positions is not None and layer.positions.adds_to_scores:
                assert group.positions is not None and context.positions is not None
                read = group.projected if layer.positions.reads_queries else None
                added = layer.positions.score_bias(read, group.positions, context.positions, layer.scale)
                bias = added if bias is None else bias + added
            mask = combine_masks(context.mask, attn_mask, bias, context.context_length, group.queries.dtype)
            out, row_sums = execute.attend_heads(
                group.queries,
                context.keys,
                context.values,
                mask,
                scale=layer.scale,
                dropout=dropout,
                kernel=plan.kernel,
                sums_heads=plan.values == "output",
                wants_row_sums=wants_row_sums,
            )
            found.append(out.transpose(1, 2).flatten(0, 1))
            if row_sums is not None:
                row_sums = row_sums.expand(len(group.items), row_sums.shape[1], out.shape[2], 1).transpose(1, 2).flatten(0, 1)
            sums.append(row_sums)
        if not found:
            heads = 1 if plan.values == "output" else layer.heads
            return prepared.values.new_zeros(1, heads, 0, prepared.values.shape[3]), None
        read = found[0] if len(found) == 1 else torch.cat(found)
        return read.transpose(0, 1).unsqueeze(0), _joined_sums(sums, found) if wants_row_sums else None

    def rows(self) -> Iterator[ScoreRows]:
        """The rows of each item's map, in the caller's order of items."""
        reads = self.layer.positions is not None and self.layer.positions.reads_queries
        groups = {group.items[0]: group for group in self.groups(self.prepared, self.queries, single=True)}
        for item in range(self.prepared.batch):
            group = groups[item]
            projected = group.projected if reads else None
            yield ScoreRows(
                self.layer, group.context, group.queries, projected, group.positions, group.attn_mask, self.repeats, group.length
            )


def _as_ragged(prepared: PreparedContext) -> PreparedRagged:
    """A dense prepared context as one of items of equal length, end to end."""
    z, m = prepared.batch, prepared.context_length
    keys = _end_to_end(prepared.keys)
    positions = prepared.positions
    counts = positions is not None and positions.dim() == 1 and torch.equal(positions, torch.arange(m, device=positions.device))
    return PreparedRagged(
        keys,
        keys if prepared.values is prepared.keys else _end_to_end(prepared.values),
        None if prepared.key_bias is None else prepared.key_bias.transpose(0, 1).reshape(1, -1, z * m),
        None if prepared.mask is None else prepared.mask.flatten(),
        None if positions is None or counts else positions.expand(z, m).flatten(),
        (m,) * z,
        tuple(range(z)),
        prepared.plan,
        prepared.stamp,
    )


def _end_to_end(tensor: Tensor) -> Tensor:
    """(z, h, m, c) as (1, h, z m, c); a view of keys and values as projections leave them."""
    return tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _by_item(tensor: Tensor, count: int) -> Tensor:
    """(1, h, g m, c) of items of one length as (g, h, m, c)."""
    heads, rows, width = tensor.shape[1:]
    length = rows // count
    if heads == 1:  # strides of dimensions of one are those of a plain tensor: fused kernels look at them
        return tensor[0, 0].reshape(count, 1, length, width)
    return tensor[0].view(heads, count, length, width).transpose(0, 1)


def _cut(tensor: Tensor | None, lengths: Sequence[int], dim: int) -> Sequence[Tensor | None]:
    return [None] * len(lengths) if tensor is None else tensor.split(list(lengths), dim)


def _joined_sums(sums: Sequence[Tensor | None], found: Sequence[Tensor]) -> Tensor | None:
    """Row sums (rows, h or 1, 1) of each group as one (1, h or 1, t, 1); None where all are one."""
    if all(one is None for one in sums):
        return None
    heads = max(one.shape[1] for one in sums if one is not None)
    filled = [
        (rows.new_ones(rows.shape[0], 1, 1) if one is None else one.to(rows.dtype)).expand(-1, heads, 1)
        for one, rows in zip(sums, found, strict=True)
    ]
    return torch.cat(filled).transpose(0, 1).unsqueeze(0)
