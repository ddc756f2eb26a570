"""What models share: feed-forward layers, norms, positions, parts that go into attention, and ready parts around it."""

from crossattention.layers.blocks import CrossAttentionBlock
from crossattention.layers.dropout import Dropout
from crossattention.layers.feed_forward import FeedForward
from crossattention.layers.norms import QueryKeyLayerNorm, QueryKeyRMSNorm, RMSNorm
from crossattention.layers.pooling import AttentionPool, Resampler
from crossattention.layers.positions import ALiBi, RelativeLogits, Rotary, T5Bias, sinusoidal_positions

__all__ = [
    "ALiBi",
    "AttentionPool",
    "CrossAttentionBlock",
    "Dropout",
    "FeedForward",
    "QueryKeyLayerNorm",
    "QueryKeyRMSNorm",
    "RMSNorm",
    "RelativeLogits",
    "Resampler",
    "Rotary",
    "T5Bias",
    "sinusoidal_positions",
]
