"""Whole architectures, one a file, and what they share: generation, saving and loading."""

from crossattention.models.bert import (
    BertConfig,
    BertDecoder,
    BertEncoder,
    BertMaskedLM,
    EncoderDecoder,
    EncoderDecoderConfig,
    mean_of_states,
)
from crossattention.models.crossvit import CrossViT, CrossViTConfig
from crossattention.models.generate import Hypothesis, beam_search, greedy, sample
from crossattention.models.perceiver import PerceiverIO, PerceiverIOConfig
from crossattention.models.pretrained import load
from crossattention.models.transformer import Transformer, TransformerConfig, label_smoothed_cross_entropy

__all__ = [
    "CrossViT",
    "CrossViTConfig",
    "BertConfig",
    "BertDecoder",
    "BertEncoder",
    "BertMaskedLM",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Hypothesis",
    "PerceiverIO",
    "PerceiverIOConfig",
    "Transformer",
    "TransformerConfig",
    "beam_search",
    "greedy",
    "label_smoothed_cross_entropy",
    "load",
    "mean_of_states",
    "sample",
]
