"""Hugging Face's Marian translators (`MarianMTModel`, `MarianModel`) and our `Transformer`.

Marian is the 2017 model after the paper: post-norm, sinusoidal positions, embeddings times sqrt(d). It puts all sines before all
cosines, where the paper interleaves them; at the paper's frequencies that is a permutation of the model's channels, so the same
function comes out once every weight that reads or writes the model's width has its channels permuted alike.

Converted: one vocabulary or two, the output tied to the target embedding or not, ReLU, GELU or SiLU ("swish"), the bias on the
logits. Not: `scale_embedding=false` (our embeddings are always scaled), stacks of unlike widths or heads, one vocabulary with an
output of its own, dropout inside the feed-forward layers, dropped layers; and of ours a norm before each sublayer and learned
positions. Each is refused with that reason.

Source: Junczys-Dowmunt et al. 2018, arXiv:1804.00344; transformers, models/marian.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from crossattention.checkpoints.rules import Absent, Ignored, Rules, rename, under
from crossattention.models.transformer import TransformerConfig

LIBRARY = "huggingface"

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"}
_NORM_EPS = 1e-5  # torch's default, which Marian does not change


def recognises(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether a config is Marian's. Names alone do not tell it from BART's, so a file without a config is not taken."""
    return config.get("model_type") == "marian"


def config_to_ours(config: Mapping[str, Any]) -> TransformerConfig:
    """Our config of a Marian config.

    Raises:
        ValueError: what our `Transformer` cannot be, every reason; or a field that is missing.
    """
    given = {**_DEFAULTS, **config}
    is_shared, is_tied = given["share_encoder_decoder_embeddings"], given["tie_word_embeddings"]
    reasons = [
        f"{name} is {given[name]!r}, here it is {wanted!r}: {why}"
        for name, wanted, why in (
            ("scale_embedding", True, "embeddings are always multiplied by sqrt(d)"),
            ("activation_dropout", 0.0, "there is no dropout inside the feed-forward layers"),
            ("encoder_layerdrop", 0.0, "no layers are left out in training"),
            ("decoder_layerdrop", 0.0, "no layers are left out in training"),
        )
        if given[name] != wanted
    ]
    for name in ("attention_heads", "ffn_dim"):
        encoder, decoder = given[f"encoder_{name}"], given[f"decoder_{name}"]
        if encoder != decoder:
            reasons.append(f"encoder_{name} is {encoder} and decoder_{name} {decoder}: both stacks are alike here")
    if given["activation_function"] not in _ACTIVATIONS:
        reasons.append(f"activation_function is {given['activation_function']!r}: here there are {', '.join(_ACTIVATIONS)}")
    if is_shared and not is_tied:
        reasons.append("tie_word_embeddings is false with one vocabulary for both sides: here the output then is that embedding")
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        if not isinstance(given[name], int):
            reasons.append(f"{name} is {given[name]!r}: one symbol is needed")
    if reasons:
        raise ValueError("this Marian model cannot be a Transformer of ours:\n  " + "\n  ".join(reasons))
    source_size = given["vocab_size"]
    return TransformerConfig(
        source_vocab_size=source_size,
        target_vocab_size=source_size if is_shared else given["decoder_vocab_size"] or source_size,
        dim=given["d_model"],
        heads=given["encoder_attention_heads"],
        encoder_layers=given["encoder_layers"],
        decoder_layers=given["decoder_layers"],
        feed_forward_dim=given["encoder_ffn_dim"],
        dropout=given["dropout"],
        attention_dropout=given["attention_dropout"],
        activation=_ACTIVATIONS[given["activation_function"]],  # type: ignore[arg-type]
        max_length=given["max_position_embeddings"],
        tied="all" if is_shared else "target" if is_tied else "none",
        pad_id=given["pad_token_id"],
        begin_id=given["decoder_start_token_id"],
        end_id=given["eos_token_id"],
        norm_eps=_NORM_EPS,
        output_bias=True,
    )


def config_to_theirs(config: TransformerConfig) -> dict[str, Any]:
    """Marian's config of ours.

    Raises:
        ValueError: what Marian cannot be, every reason.
    """
    reasons = [
        f"{name} is {getattr(config, name)!r}, Marian's is {wanted!r}"
        for name, wanted in (("norm", "post"), ("positions", "sinusoidal"), ("norm_eps", _NORM_EPS))
        if getattr(config, name) != wanted
    ]
    if reasons:
        raise ValueError("this Transformer cannot be a Marian model of Hugging Face:\n  " + "\n  ".join(reasons))
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "is_encoder_decoder": True,
        "vocab_size": config.source_vocab_size,
        "decoder_vocab_size": config.target_vocab_size,
        "share_encoder_decoder_embeddings": config.tied == "all",
        "tie_word_embeddings": config.tied != "none",
        "d_model": config.dim,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_ffn_dim": config.feed_forward_dim,
        "decoder_ffn_dim": config.feed_forward_dim,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": 0.0,
        "activation_function": config.activation,
        "max_position_embeddings": config.max_length,
        "scale_embedding": True,
        "pad_token_id": config.pad_id,
        "bos_token_id": config.begin_id,
        "eos_token_id": config.end_id,
        "decoder_start_token_id": config.begin_id,
        "forced_eos_token_id": config.end_id,
    }


def rules(config: TransformerConfig) -> Rules:
    """Which of Marian's tensors is which of ours."""
    names = [_embeddings(config), _stack("encoder", ["self"]), _stack("decoder", ["self", "cross"])]
    ignored = [
        Ignored(
            f"model.{stack}.embed_positions.weight",
            "sines and cosines, computed where they are used",
            value=lambda: _their_positions(config),
            is_written=True,
            tolerance=1e-4,  # of angles up to the longest position, in float32
        )
        for stack in ("encoder", "decoder")
    ]
    absent = []
    if config.output_bias:
        names.append(rename("final_logits_bias", "out_bias", lambda row: row[0], lambda bias: bias[None]))
        absent.append(Absent("final_logits_bias", "Marian's is zero where a file has none"))
    else:
        zeros = lambda: torch.zeros(1, config.target_vocab_size)  # noqa: E731
        ignored.append(Ignored("final_logits_bias", "zero, and this model has no bias there", value=zeros, is_written=True))
    first = "model.shared.weight" if config.tied == "all" else "model.decoder.embed_tokens.weight"
    copies = [f"model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")] if config.tied == "all" else []
    tied = [] if config.tied == "none" else [*copies, "lm_head.weight"]
    return Rules(*names, ignored=ignored, absent=absent, tied=[(name, first) for name in tied], prefixes=["model."])


def interleaved(tensor: Tensor, dim: int) -> Tensor:
    """Channels along `dim` from Marian's order to ours: channel 2i is their sine i, channel 2i + 1 their cosine i."""
    return tensor.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def in_halves(tensor: Tensor, dim: int) -> Tensor:
    """The way back: all sines, then all cosines."""
    return tensor.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


# Sizes of a MarianConfig that leaves them out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 58101, "decoder_vocab_size": None, "max_position_embeddings": 1024, "d_model": 1024,
    "encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096,
    "encoder_attention_heads": 16, "decoder_attention_heads": 16, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    "activation_function": "gelu", "dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "decoder_start_token_id": 58100, "pad_token_id": 58100, "eos_token_id": 0, "scale_embedding": False,
    "share_encoder_decoder_embeddings": True, "tie_word_embeddings": True,
}  # fmt: skip


def _reads(theirs: str, ours: str) -> list[Any]:
    """A matrix whose inputs are the model's channels."""
    return rename(theirs, ours, lambda t: interleaved(t, 1), lambda t: in_halves(t, 1))


def _writes(theirs: str, ours: str) -> list[Any]:
    """A matrix or vector whose outputs are the model's channels."""
    return rename(theirs, ours, lambda t: interleaved(t, 0), lambda t: in_halves(t, 0))


def _embeddings(config: TransformerConfig) -> list[Any]:
    if config.tied == "all":
        return _reads("model.shared.weight", "target_embedding.weight")
    made = _reads("model.encoder.embed_tokens.weight", "source_embedding.weight")
    made += _reads("model.decoder.embed_tokens.weight", "target_embedding.weight")
    return made + (_reads("lm_head.weight", "out_proj.weight") if config.tied == "none" else [])


def _stack(stack: str, attentions: list[str]) -> list[Any]:
    layer = [
        _reads("fc1.weight", "feed_forward.up_proj.weight"),
        rename("fc1.bias", "feed_forward.up_proj.bias"),
        _writes("fc2.{weight,bias}", "feed_forward.down_proj.{weight,bias}"),
        _writes("final_layer_norm.{weight,bias}", "feed_forward_residual.norm.{weight,bias}"),
    ]
    for kind in attentions:
        theirs, ours = {"self": "self_attn", "cross": "encoder_attn"}[kind], f"{kind}_attention"
        for part in ("q_proj", "k_proj", "v_proj"):
            layer += [_reads(f"{theirs}.{part}.weight", f"{ours}.{part}.weight")]
            layer += [rename(f"{theirs}.{part}.bias", f"{ours}.{part}.bias")]
        layer += [_writes(f"{theirs}.out_proj.{{weight,bias}}", f"{ours}.out_proj.{{weight,bias}}")]
        layer += [_writes(f"{theirs}_layer_norm.{{weight,bias}}", f"{ours}_residual.norm.{{weight,bias}}")]
    return under(f"model.{stack}.layers.*.", f"{stack}.layers.*.", *layer)


def _their_positions(config: TransformerConfig) -> Tensor:
    frequencies = 10000 ** (torch.arange(0, config.dim, 2, dtype=torch.float64) / config.dim)
    angles = torch.arange(config.max_length, dtype=torch.float64)[:, None] / frequencies
    return torch.cat((angles.sin(), angles.cos()), 1).float()
