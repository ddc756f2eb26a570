"""What A looks at in B: the whole map, or summaries of one that is never held whole."""

from crossattention.maps.blocks import Block
from crossattention.maps.compute import attention_map
from crossattention.maps.feed_forward import FeedForwardMemory, Promoted, Triggers, feed_forward_layers, feed_forward_memories
from crossattention.maps.streamed import attention_map_blocks
from crossattention.maps.summaries import Aligned, Alignment, Argmax, Entropy, Highlight, Rows, Summary, Top, TopK

__all__ = [
    "Aligned",
    "Alignment",
    "Argmax",
    "Block",
    "Entropy",
    "FeedForwardMemory",
    "Highlight",
    "Promoted",
    "Rows",
    "Summary",
    "Top",
    "TopK",
    "Triggers",
    "attention_map",
    "attention_map_blocks",
    "feed_forward_layers",
    "feed_forward_memories",
]
