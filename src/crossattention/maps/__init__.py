"""What A looks at in B: the whole map, or summaries of one that is never held whole."""

from crossattention.maps.blocks import Block
from crossattention.maps.compute import attention_map
from crossattention.maps.summaries import Aligned, Alignment, Argmax, Entropy, Highlight, Rows, Summary, Top, TopK

__all__ = [
    "Aligned",
    "Alignment",
    "Argmax",
    "Block",
    "Entropy",
    "Highlight",
    "Rows",
    "Summary",
    "Top",
    "TopK",
    "attention_map",
]
