"""The attention modules of `timm`: known only here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from crossattention.interop.kernels import innermost, watch_kernel
from crossattention.interop.seats import Look

CROSS = ("CrossAttention", "AttentionPoolLatent")
"""The class token of CrossViT reads the tokens of the other branch, and itself; latents read what they pool."""


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Its modules that run a kernel: of those named Attention, the innermost."""
    return innermost(model, _is_attention)


def can_cross(module: nn.Module) -> bool:
    """Whether it reads another sequence."""
    return type(module).__name__ in CROSS


def look(module: nn.Module) -> Look:
    """How to look into an attention module."""
    return Look("forward", partial(_run, module), module)


def _run(module: nn.Module, listeners: Sequence[Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs["x"]
    kind = "cross" if can_cross(module) else "self"
    return watch_kernel(listeners, module, kind, lambda: forward(*args, **kwargs), batch=x.shape[0])


def _is_attention(module: nn.Module) -> bool:
    is_theirs = any(kind.__module__.startswith("timm.") for kind in type(module).__mro__)
    return is_theirs and any(word in type(module).__name__ for word in ("Attention", "Attn"))
