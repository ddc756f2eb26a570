"""Attention maps: what A looks at in B, from the layer's own scores, without touching how the layer runs.

Legend: z batch, r repeats on one context, h heads, n queries, m context positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, get_args, overload

import torch
from torch import Tensor

from crossattention.attention import CrossAttention, PreparedContext, PreparedQueries, PreparedShard
from crossattention.attention.ragged import PreparedRagged, ragged_rows
from crossattention.attention.sequences import check_is_tensor, is_ragged
from crossattention.attention.sharded import RAGGED_ON_SHARDS, is_sharded
from crossattention.maps.blocks import Heads, MapRows, blocks_of
from crossattention.maps.shards import map_of_shard, mergeable, merged
from crossattention.maps.summaries import Summary


class Reader(Protocol):
    """A part around one attention, as those of `crossattention.layers`: what it asks is what the map is of."""

    def reading(self, a: Any, b: Any) -> tuple[CrossAttention, Tensor, Tensor | PreparedContext]:
        """The attention inside, and what it gets as A and B."""


@overload
def attention_map(
    layer: CrossAttention | Reader,
    a: Tensor | None,
    b: Any,
    summaries: None = None,
    *,
    context_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    context_positions: Tensor | None = None,
) -> Tensor: ...


@overload
def attention_map(
    layer: CrossAttention | Reader,
    a: Tensor | None,
    b: Any,
    summaries: Sequence[Summary],
    *,
    context_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    context_positions: Tensor | None = None,
) -> list[Any]: ...


def attention_map(
    layer: CrossAttention | Reader,
    a: Tensor | None,
    b: Any,
    summaries: Sequence[Summary] | None = None,
    *,
    context_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    context_positions: Tensor | None = None,
) -> Tensor | list[Any]:
    """The weights with which every query reads every context position, or summaries of them.

    weights[z, h, n, m] = softmax over m of (A Wq + bq)(B Wk + bk)^T scale, zero in rows that may attend nothing

    Args:
        layer: the layer whose weights are asked for; or a part around one, as `CrossAttentionBlock`, `AttentionPool` or `Resampler`
            (of which it is the last layer), whose norms are then applied.
        a: queries (z, n, a), learned queries (n, a), or (z, r, n, a); None for a part that has queries of its own.
        b: context (z, m, b), or what `layer.prepare` made of it; its plan's scores are then used. A and B may be ragged, as the
            layer takes them.
        summaries: what to keep in the place of the weights: `TopK`, `Highlight`, `Entropy`, `Argmax`, `Alignment`, `Rows` of
            `crossattention.maps`, or objects of your own with `update(block)` and `result()`. Each works on a copy, so that the
            objects that are passed stay as they are.
        context_mask: bool (z, m), True = may be attended; only with a raw context.
        attn_mask: bool, or floating and added to the scaled scores; broadcasts to (z, h, n, m), or (z, r, h, n, m).
        query_positions: integers (n,) or (z, n), for a position part; default 0, 1, ...
        context_positions: integers (m,) or (z, m), likewise; only with a raw context.

    Returns:
        Without summaries the weights (z, h, n, m), or (z, r, h, n, m); each row sums to one, or is zero where nothing may be
        attended. With summaries a list with the result of each, without gradients. Never with dropout. Where A or B is ragged, a
        list with the weights (h, n, m) of each item stands in the place of the weights, and a list with each item's result, without
        z, in the place of a summary's. Of a sharded context what goes by its positions (the weights, `Highlight`, `Rows`) is
        sharded like it, and nothing has gradients (docs/scale.md).

    Raises:
        ValueError: as `CrossAttention.attend`; a `context_mask` or `context_positions` with an already prepared context; an empty
            list of summaries.
        TypeError: `layer` is no CrossAttention and no part around one, a mask of a wrong dtype, or something that is no summary.

    Cost: without summaries, the whole z h n m matrix in memory. With them, a block of 1.5 million scores, or of one row where that
        is longer, the keys of a head, and what the summaries keep. Of a raw context keys are made, no values; one head after the
        other where no summary is of the mean.

    Example:
        >>> import torch
        >>> from crossattention.maps import Highlight
        >>> layer = CrossAttention(48, 32, heads=4)
        >>> a, b = torch.randn(2, 5, 48), torch.randn(2, 7, 32)
        >>> attention_map(layer, a, b).shape
        torch.Size([2, 4, 5, 7])
        >>> [mass] = attention_map(layer, a, b, [Highlight()])
        >>> mass.shape
        torch.Size([2, 4, 7])
    """
    if summaries is not None:
        check_summaries(summaries)
    if not isinstance(layer, CrossAttention):
        if not callable(getattr(layer, "reading", None)):
            raise TypeError(
                f"attention_map expects a CrossAttention, or a part around one, got {type(layer).__name__}; "
                "record_attention(model) sees the layers inside a model"
            )
        layer, a, b = layer.reading(a, b)
    of_context: dict[str, Any] = {"context_mask": context_mask, "context_positions": context_positions}
    of_queries: dict[str, Any] = {"attn_mask": attn_mask, "query_positions": query_positions}
    if isinstance(b, PreparedContext | PreparedRagged | PreparedShard):
        for name, given in (("context_mask", context_mask), ("context_positions", context_positions)):
            if given is not None:
                raise ValueError(f"{name} belongs to the prepared context and would be ignored here; pass it to prepare(b, ...)")
    if is_ragged(a) or is_ragged(b) or isinstance(b, PreparedRagged):
        if is_sharded(b):
            raise TypeError(RAGGED_ON_SHARDS)
        return ragged_map(layer, a, b, summaries, **of_context, **of_queries)
    if not isinstance(a, PreparedQueries):
        check_is_tensor("queries", a)
    if is_sharded(b):
        workers = None if summaries is None else mergeable(summaries)
        rows, shards = map_of_shard(layer, a, b, **of_context, **of_queries)
        if workers is None:
            return shards.along_context(rows.whole(), -1)
        return merged(summaries, summarise(rows, workers), shards)
    if summaries is not None:
        with torch.no_grad():
            in_turn = all(_heads_of(summary) == "each" for summary in summaries)  # the order that `blocks_of` then takes
            return summarise(layer.score_rows(a, b, **of_context, **of_queries, takes_heads_in_turn=in_turn), summaries)
    prepared = b if isinstance(b, PreparedContext) else layer.prepare(b, query_length=a.shape[-2], uses=1, **of_context)
    return layer.score_map(a, prepared, **of_queries)


def ragged_map(layer: CrossAttention, a: Any, b: Any, summaries: Sequence[Summary] | None, **options: Any) -> list[Any]:
    """The weights of each item of a ragged call, or for each summary a list with what it gives of each item."""
    if summaries is None:
        return [weights_of(rows) for rows in ragged_rows(layer, a, b, **options)]
    with torch.no_grad():
        by_item = [summarise(rows, summaries) for rows in ragged_rows(layer, a, b, **options)]
    return [[_of_one_item(results[place]) for results in by_item] for place in range(len(summaries))]


def weights_of(rows: MapRows) -> Tensor:
    """All rows of one item, without its dimension z."""
    _, r, h, n, _ = rows.sizes
    return rows.weights(slice(0, 1), slice(0, r), slice(0, h), slice(0, n))[0]


def _of_one_item(result: Any) -> Any:
    """A summary's result of a batch of one without the dimension z; one that is no tensor and holds none as it is."""
    if isinstance(result, Tensor):
        return result[0]
    if is_dataclass(result) and not isinstance(result, type):
        held = {field.name: getattr(result, field.name) for field in fields(result)}
        return replace(result, **{name: value[0] for name, value in held.items() if isinstance(value, Tensor)})
    return result


def summarise(rows: MapRows, summaries: Sequence[Summary]) -> list[Any]:
    """The result of each summary over all rows."""
    working = [copy.deepcopy(summary) for summary in summaries]
    kinds: dict[Heads, list[Summary]] = {}
    for summary in working:
        kinds.setdefault(_heads_of(summary), []).append(summary)
    for kind, block in blocks_of(rows, kinds):
        for summary in kinds[kind]:
            summary.update(block)
        del block  # before the next is made, so that two are never held
    return [summary.result() for summary in working]


def _heads_of(summary: Summary) -> Heads:
    return getattr(summary, "heads", "each")


def check_summaries(summaries: Sequence[Summary]) -> None:
    """Refuse what is no list of summaries."""
    if isinstance(summaries, Tensor):
        raise TypeError("summaries must be a list such as [TopK(8), Highlight()], got a Tensor; masks are passed by name")
    if not isinstance(summaries, Sequence):
        raise TypeError(
            f"summaries must be a list such as [TopK(8), Highlight()], got {type(summaries).__name__}; put it in a list"
        )
    if not summaries:
        raise ValueError("summaries is empty; name what to keep, as [TopK(8)], or leave it out to get the whole weights")
    for summary in summaries:
        if isinstance(summary, type):
            raise TypeError(f"summaries holds the class {summary.__name__}; make one of it, as [TopK(8), Highlight()]")
        missing = [name for name in ("update", "result") if not callable(getattr(summary, name, None))]
        if missing:
            raise TypeError(
                f"a summary has update(block) and result(), but {type(summary).__name__} has no {' and no '.join(missing)}; "
                "those of this library are in crossattention.maps"
            )
        heads = _heads_of(summary)
        if heads not in get_args(Heads):
            raise ValueError(f'the heads of a summary must be "each" or "mean", got {heads!r} from {type(summary).__name__}')
