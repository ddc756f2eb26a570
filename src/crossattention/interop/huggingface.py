"""The attention modules of Hugging Face's `transformers`, and how its `generate` follows beams: known only here.

Whether a module reads another sequence is seen in its call: no attribute tells, and shapes do not either. Its kernel is seen where
it is called, so that nothing is registered, no configuration changes, and masks are made as they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.interop.kernels import innermost, watch_kernel
from crossattention.interop.seats import Look

CONTEXTS = ("key_value_states", "encoder_hidden_states", "inputs", "cross_attention_states", "image_hidden_states")
"""What modules call the other sequence."""
MASKS = ("attention_mask", "mask", "encoder_attention_mask", "inputs_mask")
"""What they call what is added to the scores."""


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `transformers` that run a kernel: of those named Attention, the innermost."""
    return innermost(model, lambda module: _is_theirs(module, "transformers.models.") and _is_attention(module))


def can_cross(module: nn.Module) -> bool:
    """Whether it may read another sequence."""
    return _reads_another(module) or bool(_context_names(type(module)))


def look(module: nn.Module) -> Look:
    """How to look into an attention module."""
    return Look("forward", partial(_run, module), module)


def generation_looks(model: nn.Module) -> Iterator[Look]:
    """How to look into `generate` of each module that has it, and into its beams."""
    for module in model.modules():
        if _is_theirs(module, "transformers.") and callable(getattr(module, "generate", None)):
            yield Look("generate", _run_generate, module)
            if hasattr(module, "_update_finished_beams"):
                yield Look("_update_finished_beams", _run_beams, module)


def _run(module: nn.Module, listeners: Sequence[Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    given = bound_arguments(type(module), args, kwargs)
    contexts = [given.get(name) for name in _context_names(type(module))]
    kind = "cross" if _reads_another(module) or any(context is not None for context in contexts) else "self"
    states = next(value for value in given.values() if isinstance(value, Tensor))
    return watch_kernel(
        listeners,
        module,
        kind,
        lambda: forward(*args, **kwargs),
        batch=states.shape[0],
        length=states.shape[1] if states.dim() == 3 else None,
        mask=next((mask for name in MASKS if _can_be_added(mask := given.get(name))), None),
        cache=next((value for value in given.values() if hasattr(value, "is_updated")), None),
    )


def _can_be_added(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() <= 4 and (mask.dtype == torch.bool or mask.is_floating_point())


def _run_generate(listeners: Sequence[Any], generate: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    for listener in listeners:
        listener.begin()
    sequences = None
    try:
        out = generate(*args, **kwargs)
        sequences = getattr(out, "sequences", out)
    finally:
        for listener in listeners:
            listener.end(len(sequences) if isinstance(sequences, Tensor) else None)
    return out


def _run_beams(listeners: Sequence[Any], update: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    out = update(*args, **kwargs)
    for listener in listeners:
        listener.follow(
            out[2]
        )  # (z, beams, t): the rows whose steps gave the best hypotheses so far their symbols; -1 after the end
    return out


def _is_theirs(module: nn.Module, package: str) -> bool:
    return any(kind.__module__.startswith(package) for kind in type(module).__mro__)


def _is_attention(module: nn.Module) -> bool:
    return any(word in type(module).__name__ for word in ("Attention", "Attn"))


def _reads_another(module: nn.Module) -> bool:
    return "CrossAttention" in type(module).__name__


@lru_cache(maxsize=512)
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of what its forward pass takes, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _context_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(name for name in CONTEXTS if name in _parameters(kind))


def bound_arguments(kind: type[nn.Module], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return {**dict(zip(_parameters(kind), args, strict=False)), **kwargs}
