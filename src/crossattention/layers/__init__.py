"""What models share and is not attention: feed-forward layers, norms, positions; among them the parts that go into attention."""

from crossattention.layers.dropout import Dropout
from crossattention.layers.feed_forward import FeedForward
from crossattention.layers.norms import QueryKeyLayerNorm, QueryKeyRMSNorm, RMSNorm
from crossattention.layers.positions import ALiBi, RelativeLogits, Rotary, T5Bias, sinusoidal_positions

__all__ = [
    "ALiBi",
    "Dropout",
    "FeedForward",
    "QueryKeyLayerNorm",
    "QueryKeyRMSNorm",
    "RMSNorm",
    "RelativeLogits",
    "Rotary",
    "T5Bias",
    "sinusoidal_positions",
]
