"""Hugging Face's BERT (`BertModel`, `BertForMaskedLM`, `BertLMHeadModel`, `EncoderDecoderModel` of two BERTs) and ours.

The functions are the same; only names differ. Where a folder of theirs becomes which model of ours:

    BertModel                                     BertEncoder, with its pooler if the file has one
    BertModel with cross-attention                BertDecoder(head=False)
    BertForMaskedLM, BertForPreTraining           BertMaskedLM; the head for next sentences and the pooler under it are left behind.
                                                  Or, by `BertEncoder.from_pretrained`, what stands under the heads
    BertLMHeadModel                               BertDecoder
    EncoderDecoderModel                           EncoderDecoder

Not converted: relative position embeddings, several end symbols, halves of an encoder-decoder that are no BERT, activations other
than GELU (with erf or tanh), ReLU and SiLU; and of ours a decoder that reads states of another width than its own, which theirs
cannot. Each is refused with that reason.

Source: Devlin et al. 2019, arXiv:1810.04805; Rothe et al. 2020, arXiv:1907.12461; transformers, models/bert and
models/encoder_decoder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from crossattention.checkpoints.rules import Ignored, Rule, Rules, rename, under
from crossattention.models.bert import (
    BertConfig,
    BertDecoder,
    BertEncoder,
    BertMaskedLM,
    EncoderDecoder,
    EncoderDecoderConfig,
)

CLASSES: dict[str, type] = {
    "BertModel": BertEncoder,
    "BertForMaskedLM": BertMaskedLM,
    "BertForPreTraining": BertMaskedLM,
    "BertLMHeadModel": BertDecoder,
}
"""Their class -> ours; with cross-attention a BertModel is a BertDecoder without a head."""

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_THEIR_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
_SAME_VALUE = {  # theirs -> ours
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "feed_forward_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "max_position_embeddings": "max_length",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "norm_eps",
    "pad_token_id": "pad_id",
    "bos_token_id": "begin_id",
    "eos_token_id": "end_id",
    "is_decoder": "causal",
    "tie_word_embeddings": "tied",
}
# Sizes of a config of theirs that leaves them out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True, "position_embedding_type": "absolute",
    "cross_attention_hidden_size": None,
}  # fmt: skip


def recognises(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether a config is BERT's, or that of an encoder-decoder. Names alone do not tell it from RoBERTa's."""
    return config.get("model_type") in ("bert", "encoder-decoder")


def model_class(config: Mapping[str, Any], names: Collection[str], asked: type | None) -> type:
    """Our class for a config of theirs; an encoder, where that is asked for, also of a model with a head and no cross-attention."""
    if config.get("model_type") == "encoder-decoder":
        return EncoderDecoder
    has_context = bool(config.get("add_cross_attention"))
    if asked is BertEncoder and not has_context:
        return BertEncoder
    architecture = _architecture(config, names)
    if architecture not in CLASSES:
        raise ValueError(f"architectures must name one of {', '.join(CLASSES)}, got {config.get('architectures')!r}")
    return BertDecoder if has_context and architecture == "BertModel" else CLASSES[architecture]


def _architecture(config: Mapping[str, Any], names: Collection[str]) -> str:
    """Their class: as the config says, or as the names tell."""
    if config.get("architectures"):
        return config["architectures"][0]
    if not any(".predictions." in name for name in names):
        return "BertModel"
    return "BertLMHeadModel" if config.get("is_decoder") else "BertForMaskedLM"


def config_to_ours(config: Mapping[str, Any], *, names: Collection[str], model_class: type) -> BertConfig | EncoderDecoderConfig:
    """Our config of theirs.

    Args:
        config: theirs.
        names: of the tensors in the file: theirs does not say whether there is a pooler or a head.
        model_class: ours.

    Raises:
        ValueError: what ours cannot be, every reason.
    """
    has_pooler = any(name.endswith("pooler.dense.weight") for name in names)
    if model_class is EncoderDecoder:
        return _pair_to_ours(config, has_pooler)
    has_head = model_class is BertEncoder or any(".predictions." in name for name in names)
    return _to_ours(config, model_class, "BERT", has_pooler, has_head)


def _to_ours(config: Mapping[str, Any], cls: type, what: str, has_pooler: bool, has_head: bool = True) -> BertConfig:
    given = {**_DEFAULTS, **config}
    dim, has_context = given["hidden_size"], bool(given["add_cross_attention"])
    reasons = []
    if given["hidden_act"] not in _ACTIVATIONS:
        reasons.append(f"hidden_act is {given['hidden_act']!r}: here there are {', '.join(_ACTIVATIONS)}")
    if given["position_embedding_type"] not in (None, "absolute"):
        reasons.append(f"position_embedding_type is {given['position_embedding_type']!r}: positions are absolute here")
    if given["cross_attention_hidden_size"] not in (None, dim):
        wide = given["cross_attention_hidden_size"]
        reasons.append(f"cross_attention_hidden_size is {wide}: their layers read {dim} whatever it says")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if not isinstance(given[name], int | None):
            reasons.append(f"{name} is {given[name]!r}: one symbol is needed")
    if has_context and not given["is_decoder"]:
        reasons.append("add_cross_attention without is_decoder: theirs refuses it")
    if has_context and cls is not BertDecoder:
        reasons.append(f"add_cross_attention in a {cls.__name__}: here only a decoder has cross-attention")
    if cls is BertDecoder and not has_head and has_pooler:
        reasons.append("it has cross-attention and a pooler: a decoder has none here")
    if reasons:
        raise ValueError(f"this {what} cannot be one of ours:\n  " + "\n  ".join(reasons))
    return BertConfig(
        **{ours: given[theirs] for theirs, ours in _SAME_VALUE.items()},
        activation=_ACTIVATIONS[given["hidden_act"]],
        context_dim=dim if has_context else None,
        pooler=cls is BertEncoder and has_pooler,
        head=has_head,
    )


def _pair_to_ours(config: Mapping[str, Any], has_pooler: bool) -> EncoderDecoderConfig:
    reasons = [
        f"the {side} is a model of the type {config.get(side, {}).get('model_type')!r}: here it is a BERT"
        for side in ("encoder", "decoder")
        if config.get(side, {}).get("model_type") != "bert"
    ]
    if not reasons and not config["decoder"].get("add_cross_attention"):
        reasons.append("the decoder has no cross-attention")
    if reasons:
        raise ValueError("this EncoderDecoderModel cannot be an EncoderDecoder of ours:\n  " + "\n  ".join(reasons))
    # What the whole says of its symbols is what its `generate` goes by.
    whole = {
        "pad_token_id": config.get("pad_token_id"),
        "bos_token_id": config.get("decoder_start_token_id"),
        "eos_token_id": config.get("eos_token_id"),
    }
    decoder = {**config["decoder"], **{name: value for name, value in whole.items() if value is not None}}
    return EncoderDecoderConfig(
        BertEncoder.family,
        _to_ours(config["encoder"], BertEncoder, "EncoderDecoderModel's encoder", has_pooler),
        BertDecoder.family,
        _to_ours(decoder, BertDecoder, "EncoderDecoderModel's decoder", has_pooler=False),
    )


def config_to_theirs(config: BertConfig | EncoderDecoderConfig, *, model_class: type) -> dict[str, Any]:
    """Their config of ours.

    Raises:
        ValueError: what theirs cannot be, every reason.
    """
    if isinstance(config, BertConfig):
        return _to_theirs(config, model_class)
    reasons = [
        f"the {side} is of the family {getattr(config, f'{side}_family')!r}, theirs can be converted with a BERT alone"
        for side, family in (("encoder", BertEncoder.family), ("decoder", BertDecoder.family))
        if getattr(config, f"{side}_family") != family
    ]
    if reasons:
        raise ValueError("this EncoderDecoder cannot be Hugging Face's EncoderDecoderModel:\n  " + "\n  ".join(reasons))
    return {
        "model_type": "encoder-decoder",
        "architectures": ["EncoderDecoderModel"],
        "is_encoder_decoder": True,
        "encoder": _to_theirs(config.encoder, BertEncoder),
        "decoder": _to_theirs(config.decoder, BertDecoder),
        "pad_token_id": config.pad_id,
        "decoder_start_token_id": config.begin_id,
        "bos_token_id": config.begin_id,
        "eos_token_id": config.end_id,
    }


def _to_theirs(config: BertConfig, cls: type) -> dict[str, Any]:
    reasons = []
    if config.context_dim not in (None, config.dim):
        reasons.append(f"context_dim is {config.context_dim} and dim {config.dim}: theirs reads states of its own width")
    if config.context_dim is not None and not config.causal:
        reasons.append("causal is False: theirs has cross-attention in a causal decoder only")
    has_head = config.head and cls is not BertEncoder
    if cls is BertDecoder and not has_head and config.context_dim is None:
        reasons.append("it has neither a head nor cross-attention: build a BertEncoder")
    if reasons:
        raise ValueError("this BERT cannot be one of Hugging Face:\n  " + "\n  ".join(reasons))
    with_head = "BertForMaskedLM" if cls is BertMaskedLM else "BertLMHeadModel"
    return {
        "model_type": "bert",
        "architectures": [with_head if has_head else "BertModel"],
        "hidden_act": _THEIR_ACTIVATIONS[config.activation],
        "add_cross_attention": config.context_dim is not None,
        **{theirs: getattr(config, ours) for theirs, ours in _SAME_VALUE.items()},
    }


def rules(config: BertConfig | EncoderDecoderConfig, *, model_class: type) -> Rules:
    """Which of their tensors is which of ours."""
    computed = [
        Ignored(f"**.{name}", "0, 1, 2, ... or zeros: computed where it is used") for name in ("position_ids", "token_type_ids")
    ]
    old = [("**.LayerNorm.gamma", "**.LayerNorm.weight"), ("**.LayerNorm.beta", "**.LayerNorm.bias")]
    if isinstance(config, EncoderDecoderConfig):
        groups = [under("encoder.", "encoder.", _body(config.encoder)), under("decoder.bert.", "decoder.", _body(config.decoder))]
        groups.append(under("decoder.", "decoder.", _head(config.decoder)))
        if config.encoder.dim != config.decoder.context_dim:
            groups.append(rename("enc_to_dec_proj.{weight,bias}", "projection.{weight,bias}"))
        if not config.encoder.pooler:
            computed += _pooler_of_zeros(config.encoder.dim)
        return Rules(*groups, ignored=computed, tied=_tied(config.decoder, "decoder."), old_names=old)
    if model_class is BertEncoder or not config.head:
        # The base model's names have no prefix; those of a model with heads have one, and heads.
        computed.append(Ignored("cls.**", "a head, which this model does not have"))
        if not config.pooler:
            computed.append(Ignored("pooler.dense.*", "no head reads the pooled state"))
        return Rules(_body(config), ignored=computed, old_names=[*old, ("bert.**", "**")])
    at = "encoder." if model_class is BertMaskedLM else ""
    if model_class is BertMaskedLM:
        computed += [
            Ignored("cls.seq_relationship.*", "the head for next sentences, which a masked language model does not have"),
            Ignored("bert.pooler.dense.*", "only the head for next sentences reads the pooled state"),
        ]
    groups = [under("bert.", at, _body(config)), _head(config)]
    return Rules(*groups, ignored=computed, tied=_tied(config, ""), old_names=old)


def _body(config: BertConfig) -> list[Rule]:
    """Embeddings, layers and pooler."""
    attention = [
        rename(f"self.{theirs}.{{weight,bias}}", f"_attention.{ours}.{{weight,bias}}")
        for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    ]
    attention += [
        rename("output.dense.{weight,bias}", "_attention.out_proj.{weight,bias}"),
        rename("output.LayerNorm.{weight,bias}", "_attention_residual.norm.{weight,bias}"),
    ]
    layer = [
        under("attention.", "self", *attention),
        rename("intermediate.dense.{weight,bias}", "feed_forward.up_proj.{weight,bias}"),
        rename("output.dense.{weight,bias}", "feed_forward.down_proj.{weight,bias}"),
        rename("output.LayerNorm.{weight,bias}", "feed_forward_residual.norm.{weight,bias}"),
    ]
    if config.context_dim is not None:
        layer.append(under("crossattention.", "cross", *attention))
    made = under("encoder.layer.*.", "layers.*.", *layer)
    for theirs, ours in (("word", "words"), ("position", "positions"), ("token_type", "types")):
        made += rename(f"embeddings.{theirs}_embeddings.weight", f"embeddings.{ours}.weight")
    made += rename("embeddings.LayerNorm.{weight,bias}", "embeddings.norm.{weight,bias}")
    return made + (rename("pooler.dense.{weight,bias}", "pooler.{weight,bias}") if config.pooler else [])


def _head(config: BertConfig) -> list[Rule]:
    made = rename("cls.predictions.transform.dense.{weight,bias}", "head.dense.{weight,bias}")
    made += rename("cls.predictions.transform.LayerNorm.{weight,bias}", "head.norm.{weight,bias}")
    if config.tied:
        return made + rename("cls.predictions.bias", "head.bias")
    made += rename("cls.predictions.decoder.weight", "head.out_proj.weight")
    # Untied, their second bias is a parameter that nothing reads; earlier versions of the library held it equal to the first.
    both = ("cls.predictions.decoder.bias", "cls.predictions.bias")
    return [*made, Rule(both, ("head.bias",), lambda read, unread: (read,), lambda bias: (bias, bias))]


def _tied(config: BertConfig, at: str) -> list[tuple[str, str]]:
    """What is one tensor in theirs: (name, the name that a rule has)."""
    if not config.tied:
        return []
    return [
        (f"{at}cls.predictions.decoder.weight", f"{at}bert.embeddings.word_embeddings.weight"),
        (f"{at}cls.predictions.decoder.bias", f"{at}cls.predictions.bias"),
    ]


def _pooler_of_zeros(dim: int) -> list[Ignored]:
    reason = "their encoder always has a pooler; no decoder reads it, and this one has none"
    return [
        Ignored("encoder.pooler.dense.weight", reason, value=lambda: torch.zeros(dim, dim), is_written=True),
        Ignored("encoder.pooler.dense.bias", reason, value=lambda: torch.zeros(dim), is_written=True),
    ]
