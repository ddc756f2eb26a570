"""The attention modules of `diffusers`: known only here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from crossattention.interop.kernels import watch_kernel
from crossattention.interop.seats import Look


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Its modules whose processors run a kernel."""
    return [module for module in model.modules() if _is_attention(module)]


def can_cross(module: nn.Module) -> bool:
    """Whether it may read another sequence: any may, if its call brings one."""
    return bool(getattr(module, "is_cross_attention", True))


def look(module: nn.Module) -> Look:
    """How to look into an attention module."""
    return Look("forward", partial(_run, module), module)


def _run(module: nn.Module, listeners: Sequence[Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    states = args[0] if args else kwargs["hidden_states"]
    context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    kind = "self" if context is None else "cross"
    return watch_kernel(listeners, module, kind, lambda: forward(*args, **kwargs), batch=states.shape[0])


def _is_attention(module: nn.Module) -> bool:
    is_theirs = any(kind.__module__.startswith("diffusers.") for kind in type(module).__mro__)
    return is_theirs and type(module).__name__.endswith("Attention") and hasattr(module, "processor")
