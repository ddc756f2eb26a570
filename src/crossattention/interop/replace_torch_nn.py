"""`torch.nn.MultiheadAttention` by plans, and so the decoder layers of `torch.nn`, whose cross-attention it is.

Legend: z batch, n queries, m context length, e width of queries and output, h heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.interop.borrowing import Borrowing, Weights, plain_weight
from crossattention.interop.reader import Reader
from crossattention.interop.replacement import LeftAlone, Replaceable, is_checking, note_live

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)
_NOTES = (
    "torch.nn.MultiheadAttention runs its own forward where its key is its query (self-attention) and while it trains with dropout",
)


def find(model: nn.Module) -> Iterator[Replaceable | LeftAlone]:
    """Its modules of this kind; those of encoders and the self-attention of decoders are left."""
    own = {
        id(layer.self_attn): type(layer).__name__
        for layer in model.modules()
        if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    }
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            why = f"self-attention of a {own[id(module)]}: reads its own sequence" if id(module) in own else _why_not(module)
            yield LeftAlone(module, why) if why is not None else _replaceable(module)


def _why_not(mha: nn.MultiheadAttention) -> str | None:
    if type(mha).forward is not nn.MultiheadAttention.forward:
        return f"a {type(mha).__name__} has a forward of its own, of which nothing is known here"
    if mha.bias_k is not None or mha.bias_v is not None:
        return "add_bias_kv=True appends a learned key and value to every context, and no plan has a place for them"
    if mha.add_zero_attn:
        return "add_zero_attn=True appends a zero key and value to every context, and no plan has a place for them"
    for name, weight in zip(("in_proj_weight", "q_proj_weight", "in_proj_bias", "out_proj.weight"), _sources(mha), strict=False):
        if (why := plain_weight(name, weight)) is not None:
            return why
    return None


def _replaceable(mha: nn.MultiheadAttention) -> Replaceable:
    lender = _Lender(mha)
    borrowing = Borrowing(
        query_dim=mha.embed_dim,
        context_dim=mha.kdim,
        value_context_dim=mha.vdim,
        heads=mha.num_heads,
        head_dim=mha.head_dim,
        lend=lender,
        sources=partial(_sources, mha),
        forget_lent=lender.forget,
    )
    reader = Reader(mha, borrowing)
    return Replaceable(mha, partial(_run, mha, reader), (reader,), notes=_NOTES)


def _sources(mha: nn.MultiheadAttention) -> tuple[Tensor | None, ...]:
    if mha._qkv_same_embed_dim:
        packed: tuple[Tensor | None, ...] = (mha.in_proj_weight,)
    else:
        packed = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
    return (*packed, mha.in_proj_bias, mha.out_proj.weight, mha.out_proj.bias)


class _Lender:
    """The module's weights as our four projections; views of packed ones are kept while nothing asks for their gradient."""

    def __init__(self, mha: nn.MultiheadAttention) -> None:
        self._mha = mha
        self._last: tuple[Any, Weights] | None = None

    def __call__(self) -> Weights:
        sources = _sources(self._mha)
        if torch.is_grad_enabled():
            return self._lend(sources)
        key = (torch.is_inference_mode_enabled(), *((id(source), source.data_ptr()) for source in sources if source is not None))
        last = self._last
        if last is None or last[0] != (key, sources):
            self._last = last = ((key, sources), self._lend(sources))
        return last[1]

    def forget(self) -> None:
        """Drop the views that are kept."""
        self._last = None

    @staticmethod
    def _lend(sources: tuple[Tensor | None, ...]) -> Weights:
        *projected, in_bias, out_weight, out_bias = sources
        weights = projected if len(projected) == 3 else projected[0].chunk(3)  # type: ignore[union-attr]
        biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
        assert out_weight is not None
        return {
            "q_proj": (weights[0], biases[0]),  # type: ignore[dict-item]
            "k_proj": (weights[1], biases[1]),  # type: ignore[dict-item]
            "v_proj": (weights[2], biases[2]),  # type: ignore[dict-item]
            "out_proj": (out_weight, out_bias),
        }


def _run(mha: nn.MultiheadAttention, reader: Reader, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) >= 3 and (args[0] is args[1] or _is_for_own(mha, reader, args, kwargs)):
        return own(*args, **kwargs)  # self-attention, or nothing to gain
    given = _arguments(args, kwargs)
    if given is None:
        return own(*args, **kwargs)
    out = _read(mha, reader, **given)
    return own(*args, **kwargs) if out is None else out


def _is_for_own(mha: nn.MultiheadAttention, reader: Reader, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call without masks has a small context, or is of sizes that were left to the module before."""
    if len(args) != 3 or kwargs.get("key_padding_mask") is not None or kwargs.get("attn_mask") is not None:
        return False
    query, key, value = args
    if not (isinstance(query, Tensor) and isinstance(key, Tensor)):
        return False
    if reader.is_small(key):
        return True
    if value is not key or query.dim() != 3 or key.dim() != 3 or not reader.leaves_any:
        return False
    of_query, of_key = query.shape, key.shape
    if not mha.batch_first:
        of_query, of_key = (of_query[1], of_query[0], of_query[2]), (of_key[1], of_key[0], of_key[2])  # type: ignore[assignment]
    return reader.passes(of_query, key, of_key, kwargs.get("need_weights", True))


_NAMES = tuple(_SIGNATURE.parameters)[1:]


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The call's arguments by name; None if they are not what the method takes, which it will say itself."""
    if len(args) > len(_NAMES):
        return None
    given = dict(zip(_NAMES, args, strict=False))
    if not (given.keys() & kwargs.keys()) and kwargs.keys() <= set(_NAMES):
        given.update(kwargs)
        if {"query", "key", "value"} <= given.keys():
            return given
    return None


def _read(
    mha: nn.MultiheadAttention,
    reader: Reader,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """What the module would give, or None if it is to run itself."""
    if key is query or value is query or is_causal or (mha.training and mha.dropout > 0.0):
        return None
    if not all(isinstance(x, Tensor) and not x.is_nested and x.dim() == query.dim() for x in (query, key, value)):
        return None
    if query.dim() not in (2, 3):
        return None
    masks = _masks(mha, query, key, key_padding_mask, attn_mask)
    if masks is None:
        return None
    is_batched = query.dim() == 3
    a, b, c = (_batch_first(mha, x, is_batched) for x in (query, key, value))
    if value is key:
        c = b
    is_masked = masks[0] is not None or masks[1] is not None
    read = reader.read(
        a,
        b,
        c,
        arrived=(key,) if value is key else (key, value),
        context_mask=masks[0],
        attn_mask=masks[1],
        wants_weights=need_weights,
        must=need_weights and is_masked,
    )
    if read is None:
        return None
    out, weights, live = read.out, read.weights, read.live_rows()
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if is_checking() and live is not None:
        _note(mha, live, weights, is_batched)
    if not is_batched:
        return out[0], None if weights is None else weights[0]
    return out if mha.batch_first else out.transpose(0, 1).contiguous(), weights  # as torch gives it, so that `view` works


def _note(mha: nn.MultiheadAttention, live: Tensor, weights: Tensor | None, is_batched: bool) -> None:
    """Say which rows of the output and of the weights had a live key."""
    rows = live[0] if not is_batched else live if mha.batch_first else live.transpose(0, 1)
    if weights is None:
        note_live(rows)
    else:
        of_weights = live if weights.dim() == 3 else live.unsqueeze(1)
        note_live(rows, of_weights[0] if not is_batched else of_weights)


def _batch_first(mha: nn.MultiheadAttention, x: Tensor, is_batched: bool) -> Tensor:
    if not is_batched:
        return x.unsqueeze(0)
    return x if mha.batch_first else x.transpose(0, 1)


def _masks(
    mha: nn.MultiheadAttention, query: Tensor, key: Tensor, padding: Tensor | None, pairs: Tensor | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """A context mask and a pair mask in our sense, True = may be attended; None if they are not such as the module takes.

    torch's bool masks say True = may not be attended; its floating ones are added, as ours are.
    """
    if padding is None and pairs is None:
        return None, None
    if query.dim() == 2:
        z, n, m = 1, query.shape[0], key.shape[0]
    else:
        z, n, m = (
            (query.shape[0], query.shape[1], key.shape[1]) if mha.batch_first else (query.shape[1], query.shape[0], key.shape[0])
        )
    context_mask = None
    if padding is not None:
        if tuple(padding.shape) != ((z, m) if query.dim() == 3 else (m,)) or padding.device != query.device:
            return None
        padding = padding.view(z, m)
        if padding.dtype == torch.bool:
            context_mask = ~padding
        elif padding.is_floating_point():
            padding = padding[:, None, None, :]
        else:
            return None
    if pairs is None:
        return context_mask, (None if context_mask is not None else padding)
    if tuple(pairs.shape) == (n, m):
        pairs = pairs[None, None]
    elif tuple(pairs.shape) == (z * mha.num_heads, n, m):
        pairs = pairs.view(z, mha.num_heads, n, m)
    else:
        return None
    if pairs.device != query.device or not (pairs.dtype == torch.bool or pairs.is_floating_point()):
        return None
    if pairs.dtype == torch.bool:
        pairs = ~pairs
        if padding is not None and context_mask is None:
            pairs = torch.where(pairs, padding, -torch.inf)
    elif padding is not None and context_mask is None:
        pairs = pairs + padding
    return context_mask, pairs
