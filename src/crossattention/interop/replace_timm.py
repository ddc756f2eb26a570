"""`timm`'s modules that read with few queries, by plans: CrossViT's cross-attention, class attention, attention pooling by latents.

Legend: z batch, n queries, m positions, e width, h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.attention.products import is_plain_linear, is_watched
from crossattention.interop import timm as known
from crossattention.interop.borrowing import Borrowing, Norms, Weights, plain_weights
from crossattention.interop.reader import Reader
from crossattention.interop.replacement import LeftAlone, Replaceable, is_checking, note_live

_DROPOUT = "a class token's attention in timm runs its own forward while it trains with attention dropout"
_HOOKED = "AttentionPoolLatent of timm runs its own forward while hooks stand on its kv projection, which no plan calls as a module"


def find(model: nn.Module) -> Iterator[Replaceable | LeftAlone]:
    """Its attention modules; those that read their own sequence with as many queries are left."""
    from timm.layers import AttentionPoolLatent
    from timm.models.cait import ClassAttn
    from timm.models.crossvit import CrossAttention

    for module in model.modules():
        kind = type(module)
        if isinstance(module, AttentionPoolLatent) and kind.forward is AttentionPoolLatent.forward:
            yield _pool(module)
        elif isinstance(module, CrossAttention) and kind.forward is CrossAttention.forward:
            yield _class_token(module, "wq", "wk", "wv")
        elif isinstance(module, ClassAttn) and kind.forward is ClassAttn.forward:
            yield _class_token(module, "q", "k", "v")
    for module in known.attention_modules(model):
        if not isinstance(module, AttentionPoolLatent | CrossAttention | ClassAttn):
            yield LeftAlone(module, "it reads its own sequence, or in a way of its own")
        elif type(module).forward not in (AttentionPoolLatent.forward, CrossAttention.forward, ClassAttn.forward):
            yield LeftAlone(module, f"a {type(module).__name__} has a forward of its own, of which nothing is known here")


# ------------------------------------------------------------------------------------------------- one class token


def _class_token(module: Any, *names: str) -> Replaceable | LeftAlone:
    def projections() -> dict[str, nn.Module]:
        held = module._modules
        return {
            "out_proj": held["proj"],
            **{ours: held[name] for ours, name in zip(("q_proj", "k_proj", "v_proj"), names, strict=True)},
        }

    if (why := plain_weights(**projections())) is not None:
        return LeftAlone(module, why)
    e = module.proj.in_features
    borrowing = Borrowing(e, e, module.num_heads, e // module.num_heads, scale=module.scale, projections=projections)
    reader = Reader(module, borrowing, own_is_fused=getattr(module, "fused_attn", False), keeps=False)
    return Replaceable(module, partial(_run_class_token, module, reader), (reader,), notes=(_DROPOUT,))


def _run_class_token(module: Any, reader: Reader, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else kwargs.get("x")
    if isinstance(x, Tensor) and reader.is_small(x):
        return own(*args, **kwargs)
    drops = module.attn_drop.training and module.attn_drop.p > 0.0
    if len(args) + len(kwargs) != 1 or not isinstance(x, Tensor) or x.dim() != 3 or drops or is_watched(module.attn_drop):
        return own(*args, **kwargs)
    read = reader.read(x[:, 0:1], x)
    return own(*args, **kwargs) if read is None else module.proj_drop(read.out)


# ------------------------------------------------------------------------------------------------- learned latents


def _pool(module: Any) -> Replaceable | LeftAlone:
    if (why := plain_weights(q=module.q, kv=module.kv, proj=module.proj)) is not None:
        return LeftAlone(module, why)
    if type(module.kv) is not nn.Linear:
        return LeftAlone(module, f"its kv projection is a {type(module.kv).__name__}, which cannot be taken apart")
    has_norms = not (isinstance(module.q_norm, nn.Identity) and isinstance(module.k_norm, nn.Identity))
    e = module.kv.out_features // 2
    borrowing = Borrowing(
        query_dim=module.latent_dim,
        context_dim=module.kv.in_features,
        heads=module.num_heads,
        head_dim=module.head_dim,
        out_dim=module.out_features,
        scale=module.scale,
        projections=lambda: {"q_proj": module.q, "out_proj": module.proj},
        lend=partial(_lend_kv, module, e),
        sources=lambda: (module.kv.weight, module.kv.bias),
        qk_norm=Norms(module.q_norm, module.k_norm) if has_norms else None,
    )
    reader = Reader(module, borrowing, own_is_fused=module.fused_attn, keeps=False)
    return Replaceable(module, partial(_run_pool, module, reader), (reader,), notes=(_HOOKED,))


def _lend_kv(module: Any, e: int) -> Weights:
    weight, bias = module.kv.weight, module.kv.bias
    return {
        "k_proj": (weight[:e], None if bias is None else bias[:e]),
        "v_proj": (weight[e:], None if bias is None else bias[e:]),
    }


def _run_pool(module: Any, reader: Reader, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and reader.is_small(args[0]):
        return own(*args)
    given = dict(zip(("x", "attn_mask"), args, strict=False)) | kwargs
    x, attn_mask = given.get("x"), given.get("attn_mask")
    if not (isinstance(x, Tensor) and x.dim() == 3 and given.keys() <= {"x", "attn_mask"} and is_plain_linear(module.kv)):
        return own(*args, **kwargs)
    if attn_mask is not None and (not isinstance(attn_mask, Tensor) or not _broadcasts(attn_mask, module, x)):
        return own(*args, **kwargs)
    if attn_mask is not None and attn_mask.dtype == torch.bool and not module.fused_attn:  # added there, as ones
        return own(*args, **kwargs)
    b = x if module.pos_embed is None else x + module.pos_embed.unsqueeze(0).to(x.dtype)
    read = reader.read(module.latent[0], b, attn_mask=attn_mask, must=attn_mask is not None and not module.fused_attn)
    if read is None:
        return own(*args, **kwargs)
    out = module.proj_drop(read.out)
    if module.mlp is not None:
        out = out + module.mlp(module.norm(out))
    live = read.live_rows() if is_checking() else None
    if module.pool == "token":
        note_live(None if live is None else live.expand(-1, out.shape[1], 1)[:, 0])
        return out[:, 0]
    if module.pool == "avg":
        note_live(None if live is None else live.expand(-1, out.shape[1], 1).all(1))
        return out.mean(1)
    note_live(live)
    return out


def _broadcasts(mask: Tensor, module: Any, x: Tensor) -> bool:
    """Whether a mask is such as torch's kernel takes for (z, h, n, m)."""
    wanted = (x.shape[0], module.num_heads, module.latent_len, x.shape[1])
    right = mask.dtype == torch.bool or mask.is_floating_point()
    fits = mask.dim() <= 4 and all(size in (1, full) for size, full in zip(reversed(mask.shape), reversed(wanted), strict=False))
    return right and fits and mask.device == x.device
