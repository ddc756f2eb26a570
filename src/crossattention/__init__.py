"""Cross-attention between two sequences: exact, planned, prepared once and read often, visible, trainable."""

from crossattention.attention import (
    CrossAttention,
    KeyValueCache,
    MemoryAttention,
    PreparedContext,
    SelfAttention,
)
from crossattention.maps import attention_map
from crossattention.models.pretrained import load
from crossattention.plan import Plan, PlanError

__version__ = "0.1.0"

__all__ = [
    "CrossAttention",
    "KeyValueCache",
    "MemoryAttention",
    "Plan",
    "PlanError",
    "PreparedContext",
    "SelfAttention",
    "attention_map",
    "load",
]
