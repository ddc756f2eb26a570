"""Our own layers, looked into: by the scores that they compute themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from crossattention.attention import CrossAttention, MemoryAttention, SelfAttention, execute
from crossattention.attention.ragged import PreparedRagged, ragged_rows
from crossattention.attention.sequences import is_ragged
from crossattention.interop.rows import KernelRows
from crossattention.interop.seats import Look

_busy = threading.local()
"""In `layer`: the layer whose `attend` runs in this thread, so that what it calls is not told of twice."""


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Our layers in a model; of a memory with an elementwise activation there are no weights to show."""
    kinds = (CrossAttention, SelfAttention, MemoryAttention)
    return [m for m in model.modules() if isinstance(m, kinds) and getattr(m, "activation", "softmax") == "softmax"]


def looks(module: nn.Module) -> Iterator[Look]:
    """How to look into a layer."""
    if isinstance(module, CrossAttention):
        yield Look("attend", partial(_run_attend, module), module)
        yield Look("_attend", partial(_run_forward, module), module)
    elif isinstance(module, SelfAttention):
        yield Look("_attend", partial(_run_self, module), module)
    elif isinstance(module, MemoryAttention):
        yield Look("forward", partial(_run_memory, module), module)


def _run_attend(layer: CrossAttention, listeners: Sequence[Any], attend: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
    before, _busy.layer = getattr(_busy, "layer", None), layer
    try:
        out = attend(*args, **kwargs)
    finally:
        _busy.layer = before
    _tell(layer, listeners, *args, **kwargs)
    return out


def _run_forward(layer: CrossAttention, listeners: Sequence[Any], attend: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
    out = attend(*args, **kwargs)
    if getattr(_busy, "layer", None) is not layer:
        _tell(layer, listeners, *args, **kwargs)
    return out


def _tell(
    layer: CrossAttention,
    listeners: Sequence[Any],
    a: Tensor,
    prepared: Any,
    attn_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    context_mask: None = None,
) -> None:
    if is_ragged(a) or isinstance(prepared, PreparedRagged):  # one call an item
        for rows in ragged_rows(layer, a, prepared, attn_mask=attn_mask, query_positions=query_positions):
            for listener in listeners:
                listener.take(layer, "cross", lambda rows=rows: rows)
        return
    for listener in listeners:
        listener.take(layer, "cross", lambda: layer.score_rows(a, prepared, attn_mask=attn_mask, query_positions=query_positions))


def _run_self(layer: SelfAttention, listeners: Sequence[Any], attend: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
    out = attend(*args, **kwargs)
    for listener in listeners:
        if listener.wants("self"):
            listener.take(layer, "self", lambda: _self_rows(layer, *args, **kwargs))
    return out


def _self_rows(
    layer: SelfAttention,
    x: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    attn_mask: Tensor | None,
    offset: int,
) -> KernelRows:
    scores = layer._mask(x, queries, keys, mask, attn_mask, offset)
    placed = execute.place_queries(layer, queries, layer._positions(x, offset, x.shape[1]))
    return KernelRows(placed, keys, scores.tensor, scale=layer.scale)


def _run_memory(layer: MemoryAttention, listeners: Sequence[Any], forward: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
    out = forward(*args, **kwargs)
    for listener in listeners:
        if listener.wants("memory"):
            listener.take(layer, "memory", lambda: _memory_rows(layer, *args, **kwargs))
    return out


def _memory_rows(layer: MemoryAttention, x: Tensor) -> KernelRows:
    rows = x.reshape(-1, *x.shape[-2:]) if x.dim() > 1 else x.view(1, 1, -1)
    queries = rows.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    bias = None if layer.key_bias is None else layer.key_bias[None, :, None, :]
    return KernelRows(queries, layer.keys.unsqueeze(0), bias, scale=layer.scale)


def generating_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that `crossattention.models.generate` can make sequences with, which tell of it those who ask."""
    return [m for m in model.modules() if all(callable(getattr(m, name, None)) for name in ("encode", "prepare", "step"))]


__all__ = ["attention_modules", "generating_modules", "looks"]
