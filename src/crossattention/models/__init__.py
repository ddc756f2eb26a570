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
from crossattention.models.generate import BeamRules, Hypothesis, beam_search, greedy, sample
from crossattention.models.perceiver import PerceiverIO, PerceiverIOConfig
from crossattention.models.picture_reader import PictureReader, PictureReaderConfig
from crossattention.models.pretrained import load
from crossattention.models.retro import Retro, RetroConfig, RetroState, retro_fit
from crossattention.models.transformer import Transformer, TransformerConfig, label_smoothed_cross_entropy

__all__ = [
    "BeamRules",
    "BertConfig",
    "BertDecoder",
    "BertEncoder",
    "BertMaskedLM",
    "CrossViT",
    "CrossViTConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Hypothesis",
    "PerceiverIO",
    "PerceiverIOConfig",
    "PictureReader",
    "PictureReaderConfig",
    "Retro",
    "RetroConfig",
    "RetroState",
    "Transformer",
    "TransformerConfig",
    "beam_search",
    "greedy",
    "label_smoothed_cross_entropy",
    "load",
    "mean_of_states",
    "retro_fit",
    "sample",
]
