"""`diffusers`' `Attention` by plans: image positions read a text that stays the same over the denoising steps.

Legend: z batch, n image positions, m tokens of the text, h heads, k head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.interop.borrowing import Borrowing, Norms, plain_weights
from crossattention.interop.reader import Reader
from crossattention.interop.replacement import LeftAlone, Replaceable, is_checking, note_live

_NOTES = (
    "an Attention of diffusers runs its own forward where it gets no second sequence, another processor, or arguments for one",
)


def find(model: nn.Module) -> Iterator[Replaceable | LeftAlone]:
    """Its modules of this kind, and other attention modules of the library, which are left."""
    from diffusers.models.attention_processor import Attention

    for module in model.modules():
        if isinstance(module, Attention):
            why = _why_not(module)
            yield _replaceable(module) if why is None else LeftAlone(module, why)
        elif type(module).__module__.startswith("diffusers.") and type(module).__name__.endswith("Attention"):
            yield LeftAlone(module, f"a {type(module).__name__} joins or reads sequences in a way of its own")


def _processors() -> tuple[type, ...]:
    from diffusers.models import attention_processor

    return attention_processor.AttnProcessor2_0, attention_processor.AttnProcessor


def _why_not(module: Any) -> str | None:
    from diffusers.models.attention_processor import Attention

    if type(module).forward is not Attention.forward:
        return f"a {type(module).__name__} has a forward of its own, of which nothing is known here"
    if type(module.processor) not in _processors():
        return f"its processor is {type(module.processor).__name__}, which attends in a way of its own"
    if not module.is_cross_attention:
        return "self-attention: it was built to read its own sequence"
    if module.spatial_norm is not None or module.norm_cross is not None:
        return "a norm stands between the context and its projections, so the context is another one at each call"
    if module.added_kv_proj_dim is not None or module.to_out is None or module.to_k is None:
        return "it joins keys and values of two sequences"
    if module.is_causal or module.upcast_attention or module.upcast_softmax:
        return "it is causal, or takes its scores in another dtype"
    if module.to_k.out_features != module.to_q.out_features or module.to_v.out_features != module.to_q.out_features:
        return "its heads share keys and values, which its processor does not do with this module"
    return plain_weights(to_q=module.to_q, to_k=module.to_k, to_v=module.to_v, to_out=module.to_out[0])


def _replaceable(module: Any) -> Replaceable:
    k = module.to_q.out_features // module.heads
    is_fused = type(module.processor) is _processors()[0]
    has_norms = is_fused and (module.norm_q is not None or module.norm_k is not None)  # the other processor knows none
    borrowing = Borrowing(
        query_dim=module.to_q.in_features,
        context_dim=module.to_k.in_features,
        heads=module.heads,
        head_dim=k,
        out_dim=module.to_out[0].out_features,
        scale=k**-0.5 if is_fused else module.scale,
        projections=lambda: {"q_proj": module.to_q, "k_proj": module.to_k, "v_proj": module.to_v, "out_proj": module.to_out[0]},
        qk_norm=Norms(module.norm_q, module.norm_k) if has_norms else None,
    )
    reader = Reader(module, borrowing, own_is_fused=is_fused)
    return Replaceable(module, partial(_run, module, reader, type(module.processor)), (reader,), notes=_NOTES)


def _run(
    module: Any, reader: Reader, processor: type, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    given = dict(zip(("hidden_states", "encoder_hidden_states", "attention_mask"), args, strict=False)) | kwargs
    states, text, mask = (given.pop(name, None) for name in ("hidden_states", "encoder_hidden_states", "attention_mask"))
    out = None
    if type(module.processor) is processor and all(value is None for value in given.values()):
        out = _read(module, reader, states, text, mask)
    return own(*args, **kwargs) if out is None else out


def _read(module: Any, reader: Reader, states: Any, text: Any, mask: Any) -> Tensor | None:
    if not (isinstance(states, Tensor) and isinstance(text, Tensor)) or states.dim() not in (3, 4) or text.dim() != 3:
        return None
    rows = states if states.dim() == 3 else states.flatten(2).transpose(1, 2)
    if mask is not None:
        if not reader.own_is_fused and mask.dtype == torch.bool:
            return None
        mask = _mask(module, mask, text)
        if mask is None:
            return None
    if module.group_norm is not None:
        rows = module.group_norm(rows.transpose(1, 2)).transpose(1, 2)
    read = reader.read(rows, text, attn_mask=mask, must=mask is not None and not reader.own_is_fused)
    if read is None:
        return None
    out = module.to_out[1](read.out)
    live = read.live_rows() if is_checking() else None
    if states.dim() == 4:
        out = out.transpose(-1, -2).reshape(out.shape[0], out.shape[2], *states.shape[2:])
        live = None if live is None else live.transpose(1, 2).expand(-1, 1, rows.shape[1]).unflatten(2, states.shape[2:])
    if is_checking():
        note_live(live)
    if module.residual_connection:
        out = out + states
    return out / module.rescale_output_factor


def _mask(module: Any, mask: Any, text: Tensor) -> Tensor | None:
    """A mask as (z, h, 1 or n, m), as the module itself prepares it; None if it is not such as the module takes."""
    if (
        not isinstance(mask, Tensor)
        or not (mask.dtype == torch.bool or mask.is_floating_point())
        or mask.shape[-1] != text.shape[1]
    ):
        return None
    prepared = module.prepare_attention_mask(mask, text.shape[1], text.shape[0])
    if prepared.shape[0] != text.shape[0] * module.heads:
        return None
    shaped: Tensor = prepared.view(text.shape[0], module.heads, -1, text.shape[1])
    return shaped
