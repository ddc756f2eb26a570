"""Cross-attention, self-attention and memory attention: checked at the border, planned by `plan`, run by `execute`."""

from crossattention.attention.cross_attention import CrossAttention
from crossattention.attention.memory_attention import MemoryAttention
from crossattention.attention.once import Once
from crossattention.attention.partial import Part, Partial, attend_parts, merge_partials
from crossattention.attention.parts import PositionPart, QueryKeyNorm
from crossattention.attention.prepared import PreparedContext, PreparedQueries
from crossattention.attention.ragged import PreparedRagged
from crossattention.attention.reference import reference_attention
from crossattention.attention.self_attention import KeyValueCache, SelfAttention
from crossattention.attention.sharded import ContextShard, PreparedShard, Traffic, count_traffic
from crossattention.plan import Plan

__all__ = [
    "ContextShard",
    "CrossAttention",
    "KeyValueCache",
    "MemoryAttention",
    "Once",
    "Part",
    "Partial",
    "Plan",
    "PositionPart",
    "PreparedContext",
    "PreparedQueries",
    "PreparedRagged",
    "PreparedShard",
    "QueryKeyNorm",
    "SelfAttention",
    "Traffic",
    "attend_parts",
    "count_traffic",
    "merge_partials",
    "reference_attention",
]
