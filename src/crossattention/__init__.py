"""Cross-attention between two sequences: exact, planned, prepared once and read often, visible, trainable.

Public names only. They are imported when first used, so that `crossattention --help` need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossattention.attention import CrossAttention as CrossAttention
    from crossattention.attention import KeyValueCache as KeyValueCache
    from crossattention.attention import MemoryAttention as MemoryAttention
    from crossattention.attention import PreparedContext as PreparedContext
    from crossattention.attention import SelfAttention as SelfAttention
    from crossattention.interop import record_attention as record_attention
    from crossattention.interop import speed_up as speed_up
    from crossattention.layers import AttentionPool as AttentionPool
    from crossattention.layers import CrossAttentionBlock as CrossAttentionBlock
    from crossattention.layers import Resampler as Resampler
    from crossattention.maps import attention_map as attention_map
    from crossattention.models import load as load
    from crossattention.plan import Plan as Plan
    from crossattention.plan import PlanError as PlanError

__version__ = "0.1.0"

_ROOM_OF = {
    "AttentionPool": "layers",
    "CrossAttention": "attention",
    "CrossAttentionBlock": "layers",
    "KeyValueCache": "attention",
    "MemoryAttention": "attention",
    "PreparedContext": "attention",
    "Resampler": "layers",
    "SelfAttention": "attention",
    "attention_map": "maps",
    "load": "models",
    "Plan": "plan",
    "PlanError": "plan",
    "record_attention": "interop",
    "speed_up": "interop",
}
_ROOMS = ("attention", "interop", "layers", "maps", "models", "plan")

__all__ = [*_ROOM_OF]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOM_OF, *_ROOMS})
