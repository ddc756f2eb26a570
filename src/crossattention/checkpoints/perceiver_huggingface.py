"""Perceiver IO as `transformers` writes it: which of its tensors are which of ours, and which configurations either side can hold.

Six classes of theirs are told apart by the configuration's `architectures`; a seventh, `PerceiverForSequenceClassification`, is a
text input with a class output here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from crossattention.checkpoints.rules import Ignored, Rule, Rules, rename, under
from crossattention.models.perceiver import PerceiverIOConfig
from crossattention.models.perceiver_adapters import (
    ClassOutput,
    FlowInput,
    FlowOutput,
    ImageInput,
    TextInput,
    TokenOutput,
    VideoInput,
    VideoOutput,
)

LANGUAGE, TEXT_CLASSES = "PerceiverForMaskedLM", "PerceiverForSequenceClassification"
LEARNED, FOURIER = "PerceiverForImageClassificationLearned", "PerceiverForImageClassificationFourier"
CONV, FLOW = "PerceiverForImageClassificationConvProcessing", "PerceiverForOpticalFlow"
VIDEO = "PerceiverForMultimodalAutoencoding"
ARCHITECTURES = (LANGUAGE, TEXT_CLASSES, LEARNED, FOURIER, CONV, FLOW, VIDEO)

_DEFAULTS: dict[str, Any] = {
    "num_latents": 256,
    "d_latents": 1280,
    "d_model": 768,
    "num_blocks": 1,
    "num_self_attends_per_block": 26,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 8,
    "qk_channels": None,
    "v_channels": None,
    "cross_attention_shape_for_attention": "kv",
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
    "hidden_act": "gelu",
    "attention_probs_dropout_prob": 0.1,
    "use_query_residual": True,
    "vocab_size": 262,
    "max_position_embeddings": 2048,
    "image_size": 56,
    "train_size": [368, 496],
    "num_frames": 16,
    "audio_samples_per_frame": 1920,
    "samples_per_patch": 16,
    "output_shape": [1, 16, 224, 224],
    "output_num_channels": 512,
    "_label_trainable_num_channels": 1024,
}
"""What `PerceiverConfig` fills in where a file leaves a field out."""

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_SAME_NAME = {  # theirs -> ours
    "num_latents": "num_latents",
    "d_latents": "latent_dim",
    "num_blocks": "blocks",
    "num_self_attends_per_block": "layers_per_block",
    "num_self_attention_heads": "self_heads",
    "num_cross_attention_heads": "cross_heads",
    "qk_channels": "qk_dim",
    "v_channels": "value_dim",
    "cross_attention_shape_for_attention": "cross_width",
    "self_attention_widening_factor": "self_widening",
    "cross_attention_widening_factor": "cross_widening",
    "attention_probs_dropout_prob": "attention_dropout",
    "use_query_residual": "query_residual",
}


def recognises(config: dict[str, Any], names: Collection[str]) -> bool:
    """Whether a directory's configuration and tensor names are a Perceiver's of `transformers`."""
    return config.get("model_type") == "perceiver" and any(name.startswith("perceiver.") for name in names)


def config_to_ours(config: dict[str, Any]) -> PerceiverIOConfig:
    """Our configuration of theirs.

    Raises:
        ValueError: no architecture or an unknown one, an activation or a shape that there is no counterpart for.
    """
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architectures must name one of {', '.join(ARCHITECTURES)}, got {config.get('architectures')!r}")
    held = {**_DEFAULTS, **config}
    if held["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {held['hidden_act']!r}")
    inputs, outputs = _adapters(architecture, held)
    core = {ours: held[theirs] for theirs, ours in _SAME_NAME.items()}
    return PerceiverIOConfig(inputs, outputs, activation=_ACTIVATIONS[held["hidden_act"]], **core)


def _adapters(architecture: str, held: dict[str, Any]) -> tuple[Any, Any]:
    """Input and output of an architecture; what `transformers` writes into its code stands in their defaults."""
    text = TextInput(held["vocab_size"], held["d_model"], held["max_position_embeddings"])
    if architecture == LANGUAGE:
        return text, TokenOutput(held["max_position_embeddings"])
    if architecture == FLOW:
        return FlowInput(tuple(held["train_size"])), FlowOutput()
    if architecture == VIDEO:
        size, frames = _sides(held["image_size"]), held["num_frames"]
        if list(held["output_shape"])[1:] != [frames, *size]:
            raise ValueError(
                f"output_shape must be (1, frames, height, width) of the input, (1, {frames}, {size[0]}, {size[1]}), got "
                f"{held['output_shape']}: other ones have no counterpart here"
            )
        video = VideoInput(
            frames=frames,
            size=size,
            audio_samples=frames * held["audio_samples_per_frame"],
            audio_patch=held["samples_per_patch"],
            num_labels=_num_labels(held),
        )
        return video, VideoOutput(held["output_num_channels"], label_dim=held["_label_trainable_num_channels"])
    classes = ClassOutput(_num_labels(held))
    images = {
        LEARNED: ImageInput(_sides(held["image_size"]), stem="conv1x1", stem_dim=256, positions="learned"),
        FOURIER: ImageInput(),
        CONV: ImageInput(stem="conv"),
    }
    return images.get(architecture, text), classes


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _num_labels(held: dict[str, Any]) -> int:
    return len(held["id2label"]) if held.get("id2label") else held.get("num_labels", 2)


def architecture_of(config: PerceiverIOConfig) -> str:
    """Their class for a configuration of ours."""
    inputs, outputs = config.inputs, config.outputs
    if isinstance(inputs, TextInput):
        return LANGUAGE if isinstance(outputs, TokenOutput) else TEXT_CLASSES
    if isinstance(inputs, ImageInput):
        return LEARNED if inputs.positions == "learned" else CONV if inputs.stem == "conv" else FOURIER
    return FLOW if isinstance(outputs, FlowOutput) else VIDEO


def config_to_theirs(config: PerceiverIOConfig) -> dict[str, Any]:
    """Their configuration of ours: what `config.json` must hold.

    Raises:
        ValueError: fields of ours that their code has fixed otherwise; all are listed.
    """
    architecture, inputs, outputs = architecture_of(config), config.inputs, config.outputs
    made: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in _SAME_NAME.items()}
    made.update(
        model_type="perceiver",
        architectures=[architecture],
        hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
    )
    if isinstance(inputs, TextInput):
        made.update(vocab_size=inputs.vocab_size, d_model=inputs.dim, max_position_embeddings=inputs.max_length)
    elif isinstance(inputs, FlowInput):
        made.update(train_size=list(inputs.size))
    elif isinstance(inputs, VideoInput):
        made.update(
            num_frames=inputs.frames,
            image_size=inputs.size[0],
            audio_samples_per_frame=inputs.audio_samples // inputs.frames,
            samples_per_patch=inputs.audio_patch,
            output_shape=[1, inputs.frames, *inputs.size],
        )
        assert isinstance(outputs, VideoOutput)
        made.update(output_num_channels=outputs.dim, _label_trainable_num_channels=outputs.label_dim)
    else:
        made.update(image_size=inputs.size[0])
    labels = getattr(outputs, "num_labels", getattr(inputs, "num_labels", None))
    if labels is not None:
        made.update(id2label={str(i): f"LABEL_{i}" for i in range(labels)}, label2id={f"LABEL_{i}": i for i in range(labels)})
    _refuse_what_theirs_cannot_hold(config, made)
    return made


def _refuse_what_theirs_cannot_hold(config: PerceiverIOConfig, made: dict[str, Any]) -> None:
    back = config_to_ours(made)
    faults = []
    for name, ours, theirs in (
        ("", config, back),
        ("inputs.", config.inputs, back.inputs),
        ("outputs.", config.outputs, back.outputs),
    ):
        for key in vars(ours):
            if key not in ("inputs", "outputs") and getattr(ours, key) != getattr(theirs, key):
                faults.append(f"{name}{key}={getattr(ours, key)!r}, where theirs has {getattr(theirs, key)!r}")
    if faults:
        raise ValueError(f"{made['architectures'][0]} cannot hold this model: {'; '.join(faults)}")


# ------------------------------------------------------------------------------------------------------------ names


def _attention_layer(theirs: str, ours: str, *, is_cross: bool) -> list[Rule]:
    """One layer: attention with its norms, and its MLP."""
    first = "query_norm" if is_cross else "attention_norm"
    rules = [
        rename("attention.self.layernorm1.{weight,bias}", first + ".{weight,bias}"),
        rename("attention.self.query.{weight,bias}", "attention.q_proj.{weight,bias}"),
        rename("attention.self.key.{weight,bias}", "attention.k_proj.{weight,bias}"),
        rename("attention.self.value.{weight,bias}", "attention.v_proj.{weight,bias}"),
        rename("attention.output.dense.{weight,bias}", "attention.out_proj.{weight,bias}"),
        rename("layernorm.{weight,bias}", "norm.{weight,bias}"),
        rename("mlp.dense1.{weight,bias}", "feed_forward.up_proj.{weight,bias}"),
        rename("mlp.dense2.{weight,bias}", "feed_forward.down_proj.{weight,bias}"),
    ]
    if is_cross:
        rules.append(rename("attention.self.layernorm2.{weight,bias}", "context_norm.{weight,bias}"))
    return under(theirs, ours, *rules)


def rules(config: PerceiverIOConfig) -> Rules:
    """Which tensor of theirs is which of ours."""
    decoder = "perceiver.decoder." if isinstance(config.outputs, TokenOutput) else "perceiver.decoder.decoder."
    return Rules(
        rename("perceiver.embeddings.latents", "latents"),
        _attention_layer("perceiver.encoder.cross_attention.", "encoder.", is_cross=True),
        _attention_layer("perceiver.encoder.self_attends.*.", "layers.*.", is_cross=False),
        _attention_layer(decoder + "decoding_cross_attention.", "decoder.", is_cross=True),
        _input_rules(config),
        _output_rules(config, decoder),
        ignored=_COUNTERS if isinstance(config.inputs, ImageInput) and config.inputs.stem == "conv" else (),
    )


_COUNTER = "perceiver.input_preprocessor.convnet.batchnorm.num_batches_tracked"
_COUNTER_REASON = "batches seen: of use only to a batch norm without momentum, which this one is not"
# The first is met when reading, where any count is right; the second says what to write, as their library asks for one.
_COUNTERS = (
    Ignored(_COUNTER, _COUNTER_REASON),
    Ignored(_COUNTER, _COUNTER_REASON, value=lambda: torch.tensor(0), is_written=True),
)


def _input_rules(config: PerceiverIOConfig) -> list[Rule]:
    inputs = config.inputs
    if isinstance(inputs, TextInput):
        made = rename("embeddings.weight", "embedding.weight") + rename("position_embeddings.weight", "positions.weight")
    elif isinstance(inputs, FlowInput):
        made = rename("conv_after_patches.{weight,bias}", "proj.{weight,bias}")
    elif isinstance(inputs, VideoInput):
        made = rename("padding.*", "padding.*", _flat, _row) + rename("mask.*", "hidden.*", _flat, _row)
    else:
        made = []
        if inputs.stem == "conv1x1":
            made += rename("convnet_1x1.weight", "stem.weight", lambda t: t.flatten(1), lambda t: t[:, :, None, None])
            made += rename("convnet_1x1.bias", "stem.bias")
        if inputs.stem == "conv":
            made += rename("convnet.conv.weight", "stem.conv.weight")
            made += rename(
                "convnet.batchnorm.{weight,bias,running_mean,running_var}", "stem.norm.{weight,bias,running_mean,running_var}"
            )
        if inputs.positions == "learned":
            made += rename("position_embeddings.position_embeddings", "positions.table")
            made += rename("positions_projection.{weight,bias}", "positions.proj.{weight,bias}")
    return under("perceiver.input_preprocessor.", "inputs.", made)


def _output_rules(config: PerceiverIOConfig, decoder: str) -> list[Rule]:
    learned = "output_position_encodings.position_embeddings"
    if isinstance(config.outputs, TokenOutput):
        return rename(decoder + learned, "outputs.queries") + rename("embedding_decoder.bias", "outputs.bias")
    made = rename(decoder + "final_layer.{weight,bias}", "outputs.proj.{weight,bias}")
    if isinstance(config.outputs, ClassOutput):
        made += rename(decoder + learned, "outputs.queries")
    elif isinstance(config.outputs, VideoOutput):
        made += rename("perceiver.decoder.padding.*", "outputs.padding.*", _flat, _row)
        made += rename(f"perceiver.decoder.modalities.label.decoder.{learned}", "outputs.label_query")
        for kind in ("audio", "image", "label"):
            theirs = f"perceiver.output_postprocessor.modalities.{kind}.classifier."
            made += rename(theirs + "{weight,bias}", f"outputs.{kind}_proj." + "{weight,bias}")
    return made


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten()


def _row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[None]


__all__ = ["architecture_of", "config_to_ours", "config_to_theirs", "recognises", "rules"]
