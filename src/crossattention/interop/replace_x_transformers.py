"""`x-transformers`' cross-attention by plans: its order of heads that share keys, and its intermediates, live only here.

Of its many options those are replaced that change nothing between projections and softmax. Which ones a module has is seen by what
it holds: a module with a part that is not known here is left.

Legend: z batch, n queries, m context length, h heads, g key-value heads, r = h / g, k/v head widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.attention import Once
from crossattention.attention.products import is_plain_linear, is_watched
from crossattention.interop.borrowing import Borrowing, Weights, plain_weights
from crossattention.interop.reader import Reader
from crossattention.interop.replacement import LeftAlone, Replaceable, is_checking, note_live

_KNOWN_PARTS = {"to_q", "to_k", "to_v", "to_out", "attend", "split_q_heads", "split_k_heads", "split_v_heads", "merge_heads"}
_KNOWN_PARTS |= {"to_head_space_headwise", "to_head_space_dimwise", "to_v_gate_head_space", "to_output_gate_head_space"}
_OF_ATTEND = ("sparse_topk", "l2_distance", "selective", "cog_signed", "add_zero_kv", "head_learned_sink", "softclamp_logits")
_OF_ATTEND += ("inverted_attention", "flash_pack_seq", "causal", "cope")
_OPTIONS = ("causal", "max_attend_past", "head_scale", "sparse_topk", "num_mem_kv", "attn_on_attn", "orthog_projected_values")
_OPTIONS += ("orthog_projected_values_per_head", "laser", "qk_norm", "use_latent_q", "use_latent_kv", "qkv_receive_diff_residuals")
_NOTES = (
    "x-transformers' intermediates of a replaced call (scores, weights, keys and values) are made when they are asked for",
    "an Attention of x-transformers runs its own forward without a context, with a cache, rotary or other further arguments, and "
    "while it trains with dropout",
)


def find(model: nn.Module) -> Iterator[Replaceable | LeftAlone]:
    """Its attention modules. Which are for cross-attention is known of the stacks; others tell by their calls."""
    from x_transformers.x_transformers import Attention, AttentionLayers

    own: set[int] = set()
    residual: set[int] = set()
    for stack in model.modules():
        if isinstance(stack, AttentionLayers):
            of_kind = [(str(kind), layer[1]) for kind, layer in zip(stack.layer_types, stack.layers, strict=True)]
            own |= {id(block) for kind, block in of_kind if kind == "a"}
            if stack.cross_residual_attn or stack.add_value_residual:
                residual |= {id(block) for kind, block in of_kind if kind == "c"}
    for module in model.modules():
        if not isinstance(module, Attention):
            continue
        why = _why_not(module)
        if id(module) in own:
            why = "self-attention of a stack of layers: reads its own sequence"
        elif id(module) in residual:
            why = "its stack hands scores or values of one layer on to the next"
        yield _replaceable(module) if why is None else LeftAlone(module, why)


def _why_not(module: Any) -> str | None:
    from x_transformers.x_transformers import Attend, Attention

    if type(module).forward is not Attention.forward or type(module.attend).forward is not Attend.forward:
        return f"a {type(module).__name__} has a forward of its own, of which nothing is known here"
    unknown = sorted({name for name, part in module.named_children() if part is not None} - _KNOWN_PARTS)
    unknown += [name for name, _ in module.named_parameters() if name.split(".")[0] not in _KNOWN_PARTS]
    options = [name for name in _OPTIONS if getattr(module, name, None)]
    options += [name for name in _OF_ATTEND if getattr(module.attend, name, None)]
    inner = [n for n, part in module.attend.named_children() if not isinstance(part, nn.Dropout)]
    inner += [n for n, _ in module.attend.named_parameters()]
    if unknown or options or inner:
        return f"it has {', '.join(dict.fromkeys([*options, *unknown, *inner]))}, which no plan has a place for"
    softmax: Any = module.attend.attn_fn
    while isinstance(softmax, partial):
        if softmax.keywords.get("dim", -1) != -1:
            return "its softmax runs over queries"
        softmax = softmax.func
    if softmax is not torch.nn.functional.softmax:
        return "its weights are no softmax of the scores"
    if not isinstance(module.to_out, nn.Linear | nn.Identity):
        return f"its output goes through a {type(module.to_out).__name__}"
    if any(type(p) is not nn.Linear for p in (module.to_q, module.to_k, module.to_v)):
        return "a projection is no plain nn.Linear"
    return plain_weights(to_q=module.to_q, to_k=module.to_k, to_v=module.to_v, to_out=module.to_out)


def _replaceable(module: Any) -> Replaceable:
    h, g = module.heads, module.kv_heads
    k, v = module.to_k.out_features // g, module.to_v.out_features // g
    permutes = 1 < g < h
    names = {"k_proj": "to_k", "v_proj": "to_v"} | ({} if permutes else {"q_proj": "to_q", "out_proj": "to_out"})
    is_identity = isinstance(module.to_out, nn.Identity)
    permuted = _Permuted(module, k, v) if permutes else None
    borrowing = Borrowing(
        query_dim=module.to_q.in_features,
        context_dim=module.to_k.in_features,
        heads=h,
        head_dim=k,
        out_dim=h * v if is_identity else module.to_out.out_features,
        value_head_dim=v,
        kv_heads=g,
        scale=module.attend.scale if module.attend.scale is not None else k**-0.5,
        projections=lambda: {ours: module._modules[theirs] for ours, theirs in names.items()},
        lend=permuted,
        sources=(lambda: (module.to_q.weight, module.to_out.weight)) if permutes else None,
        forget_lent=None if permuted is None else permuted.forget,
    )
    reader = Reader(module, borrowing, own_is_fused=module.attend.flash)
    return Replaceable(module, partial(_run, module, reader, permutes), (reader,), notes=_NOTES)


class _Permuted:
    """Weights of queries and output in our order of heads.

    Where heads share keys and values, the library's query head i reads key-value head i mod g, ours i // r.
    """

    def __init__(self, module: Any, key_width: int, value_width: int) -> None:
        self._module, self._widths = module, (key_width, value_width)
        self._once: Once[tuple[Tensor, Tensor]] = Once()

    def __call__(self) -> Weights:
        module = self._module
        weights = module.to_q.weight, module.to_out.weight
        of_queries, of_output = self._once.get(weights, lambda: self._permute(*weights))
        return {"q_proj": (of_queries, None), "out_proj": (of_output, None)}

    def forget(self) -> None:
        """Drop what was made of weights."""
        self._once.forget()

    def _permute(self, of_queries: Tensor, of_output: Tensor) -> tuple[Tensor, Tensor]:
        g, (k, v) = self._module.kv_heads, self._widths
        rows = of_queries.unflatten(0, (-1, g, k)).transpose(0, 1).flatten(0, 2)
        columns = of_output.unflatten(1, (-1, g, v)).transpose(1, 2).flatten(1, 3)
        return rows, columns


def _run(
    module: Any, reader: Reader, permutes: bool, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    given = dict(zip(("x", "context", "mask", "context_mask", "attn_mask"), args, strict=False)) | kwargs
    names = ("x", "context", "mask", "context_mask", "attn_mask", "return_intermediates")
    x, context, mask, context_mask, attn_mask, wants_more = (given.pop(name, None) for name in names)
    is_plain = len(args) <= 5 and all(value is None or value is False for value in given.values())
    attend, dropout = module.attend, module.attend.attn_dropout  # one kernel of theirs drops by itself, one calls the module
    drops = (attend.training or dropout.training) and attend.dropout > 0.0
    drops = drops or is_watched(attend) or is_watched(dropout)
    if not (is_plain and isinstance(x, Tensor) and isinstance(context, Tensor)) or drops or x.dim() != 3:
        return own(*args, **kwargs)
    if permutes and not (is_plain_linear(module.to_q) and is_plain_linear(module.to_out)):
        return own(*args, **kwargs)
    pairs = _pairs(attn_mask)
    if (
        (attn_mask is not None and pairs is None)
        or not _is_mask(context_mask, context.shape[:2])
        or not _is_mask(mask, x.shape[:2])
    ):
        return own(*args, **kwargs)
    read = reader.read(x, context, context_mask=context_mask, attn_mask=pairs)
    if read is None:
        return own(*args, **kwargs)
    out = read.out
    if is_checking():
        note_live(read.live_rows())
    if mask is not None:
        out = out.masked_fill(~mask.unsqueeze(-1), 0.0)
    return (out, _later(module, context, lambda: own(*args, **kwargs)[1])) if wants_more else out


def _is_mask(mask: Any, shape: torch.Size) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == shape)


def _pairs(mask: Any) -> Tensor | None:
    """A mask (n, m), (h, n, m) or (z, h, n, m), True = may be attended, as one of four dimensions."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (2, 3, 4):
        return None
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _later(module: Any, context: Tensor, run: Callable[[], Any]) -> Any:
    """The intermediates of a call, made when they are asked for: keys and values by their projections, the rest by the own pass."""
    from x_transformers.attend import Intermediates

    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name in ("cached_kv", "values"):
            if "keys" not in made:
                made["keys"] = module.split_k_heads(module.to_k(context))
                made["values"] = module.split_v_heads(module.to_v(context))
            return made["values"] if name == "values" else (made["keys"], made["values"])
        if "own" not in made:
            made["own"] = run()
        return getattr(made["own"], name)

    def of(name: str) -> property:
        def get(self: Any) -> Any:
            return made[f"set {name}"] if f"set {name}" in made else make(name)

        def put(self: Any, value: Any) -> None:
            made[f"set {name}"] = value

        return property(get, put)

    names = ("qk_similarities", "pre_softmax_attn", "post_softmax_attn", "values", "cached_kv")
    kind = type("Intermediates", (Intermediates,), {name: of(name) for name in names})
    return kind.__new__(kind)
