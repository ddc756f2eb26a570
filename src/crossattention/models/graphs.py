"""What of each model stands alone as a graph of plain tensors: the whole, the encoder, what is prepared of a source, one step.

A graph holds no loop over symbols: whoever generates runs "prepare" once a source and "step" once a symbol, as `generate` does.

    prepare    source -> context_mask, keys and values of every cross-attention                    once a source
    step       the next symbols, what "prepare" gave, the target's own keys and values so far
               -> logits of the symbols after them, keys and values with these positions in them      once a symbol

Legend: z batch, r targets (beams, samples) that read one source, m source length, n target length, t positions of a target so far,
g key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.attention.graphs import Axes, Graph
from crossattention.attention.prepared import UNCHECKED, PreparedContext
from crossattention.attention.self_attention import KeyValueCache
from crossattention.models.bert import BertDecoder, BertEncoder, BertMaskedLM, EncoderDecoder
from crossattention.models.crossvit import CrossViT
from crossattention.models.listener import Listener
from crossattention.models.perceiver import PerceiverIO
from crossattention.models.perceiver_adapters import VIDEO_KINDS, FlowInput, ImageInput, TextInput
from crossattention.models.picture_reader import PictureReader
from crossattention.models.transformer import Transformer

BATCH, TARGETS, SOURCE, TARGET, PAST = 2, 3, 7, 5, 4
"""Lengths of the examples: no two alike and none 1, as an exporter takes a 1, or two that are alike, for fixed."""


def graphs_of(model: nn.Module) -> dict[str, Graph]:
    """The graphs of a model by name; the first is its `forward`.

    Raises:
        ValueError: a family that has none, a video model that draws what it hides.
    """
    for kind, make in _MAKERS.items():
        if isinstance(model, kind):
            return make(model)
    raise ValueError(f"no graphs are known of a {type(model).__name__}; known are {', '.join(kind.__name__ for kind in _MAKERS)}")


# ------------------------------------------------------------------------------------------------------ encoder-decoders


class Around(nn.Module):
    """What stands around a model that its `forward` does not do; it trains where the model does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.training = model.training


class Encodes(Around):
    """Source to states."""

    def forward(self, source_ids: Tensor, source_mask: Tensor) -> Tensor:
        """States (z, m, d)."""
        return self.model.encode(source_ids, source_mask)


class Prepares(Around):
    """Source, or the states that a decoder reads, to the mask, keys and values of every cross-attention."""

    def forward(self, source: Tensor, source_mask: Tensor) -> tuple[Tensor, ...]:
        """The mask (z, m), then keys (z, g, m, k) of each layer, then values."""
        states = self.model.encode(source, source_mask) if hasattr(self.model, "encode") else source
        return _flattened(self.model.prepare(states, source_mask))


class Steps(Around):
    """The next symbol of each target to the logits of the one after it; `plan` is the one whose keys and values come in."""

    def __init__(self, model: Any, plan: Any) -> None:
        super().__init__(model)
        self.plan = plan

    def forward(
        self,
        ids: Tensor,
        context_mask: Tensor,
        cross_keys: list[Tensor],
        cross_values: list[Tensor],
        past_keys: list[Tensor],
        past_values: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Logits (z, r, V), then keys (z, r, g, t + 1, k) of each layer, then values."""
        pairs = zip(cross_keys, cross_values, strict=True)
        prepared = [PreparedContext(keys, values, None, context_mask, None, self.plan, UNCHECKED) for keys, values in pairs]
        past = zip(past_keys, past_values, strict=True)
        caches = [KeyValueCache(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in past]
        logits, caches = self.model.step(ids, prepared, caches)
        return logits, *_unflattened(caches, ids)


def _flattened(prepared: Any) -> tuple[Tensor, ...]:
    """The mask, all keys and all values of prepared contexts."""
    return prepared[0].mask, *(one.keys for one in prepared), *(one.values for one in prepared)


def _unflattened(caches: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """All keys, then all values, of caches of z r rows, as (z, r, g, t, width)."""
    return *(one.keys.unflatten(0, ids.shape) for one in caches), *(one.values.unflatten(0, ids.shape) for one in caches)


def _of_transformer(model: Any) -> dict[str, Graph]:
    """Of a model with `encode`, `prepare` and `step`."""
    source, axes = _source_of(model)
    mask = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
    vocab, length = _target_of(model)
    target = _ids(vocab, BATCH, min(TARGET, length), like=mask)
    target_mask = torch.ones_like(target, dtype=torch.bool)
    whole = Graph(
        model,
        {"source_ids": source, "target_ids": target, "source_mask": mask, "target_mask": target_mask},
        {"source_ids": axes, "target_ids": ("batch", "target"), "source_mask": axes[:2], "target_mask": ("batch", "target")},
        ("logits",),
    )
    encode = Graph(
        Encodes(model), {"source_ids": source, "source_mask": mask}, {"source_ids": axes, "source_mask": axes[:2]}, ("states",)
    )
    with torch.no_grad():
        states = model.encode(source, mask)
    return {"forward": whole, "encode": encode, **_generating(model, source, axes, mask, states, vocab, length)}


def _generating(model: Any, source: Tensor, axes: Axes, mask: Tensor, states: Tensor, vocab: int, limit: int) -> dict[str, Graph]:
    """The two graphs that generation needs, with examples of what goes from the one to the other.

    None of a model of two symbols, and none where a cross-attention is pinned to a plan that keeps no keys and values.
    """
    if limit < 3 or any(not one.plan.is_textbook for one in model.prepare(states, mask)):
        return {}
    with torch.no_grad():
        context_mask, *made = _flattened(model.prepare(states, mask))
        prepared, caches = model.prepare(states, mask), None
        ids = _ids(vocab, BATCH, TARGETS, like=mask)
        for _ in range(min(PAST, limit - 1)):
            _, caches = model.step(ids, prepared, caches)
    # A cache may lie in room for more; written out, an example has the strides of a plain tensor, to which graphs are bound.
    layers, past = len(made) // 2, [tensor.contiguous() for tensor in _unflattened(caches, ids)]
    numbers = range(layers)
    prepare = Graph(
        Prepares(model),
        {"source": source, "source_mask": mask},
        {"source": axes, "source_mask": axes[:2]},
        ("context_mask", *(f"cross_keys.{i}" for i in numbers), *(f"cross_values.{i}" for i in numbers)),
    )
    read, kept = ("batch", None, "context", None), ("batch", "targets", None, "past", None)
    step = Graph(
        Steps(model, prepared[0].plan),
        {
            "ids": ids,
            "context_mask": context_mask,
            "cross_keys": made[:layers],
            "cross_values": made[layers:],
            "past_keys": past[:layers],
            "past_values": past[layers:],
        },
        {
            "ids": ("batch", "targets"),
            "context_mask": ("batch", "context"),
            "cross_keys": read,
            "cross_values": read,
            "past_keys": kept,
            "past_values": kept,
        },
        ("logits", *(f"keys.{i}" for i in numbers), *(f"values.{i}" for i in numbers)),
    )
    return {"prepare": prepare, "step": step}


def _source_of(model: Any) -> tuple[Tensor, Axes]:
    """An example of what a model reads, the names of its axes."""
    weight = next(model.parameters())
    encoder = model.encoder if isinstance(model, EncoderDecoder) else model
    if isinstance(encoder, Listener):
        return torch.randn(BATCH, 4 * SOURCE + 1, encoder.config.bands).to(weight), ("batch", "source", None)
    config = encoder.config
    is_limited = not isinstance(encoder, Transformer) or config.positions == "learned"
    length = min(SOURCE, config.max_length) if is_limited else SOURCE
    vocab = config.source_vocab_size if isinstance(encoder, Transformer) else config.vocab_size
    return _ids(vocab, BATCH, length, like=weight), ("batch", "source")


def _target_of(model: Any) -> tuple[int, int]:
    """Symbols that a model writes, and how many at most."""
    decoder = model.decoder if isinstance(model, EncoderDecoder) else model
    config = decoder.config.transformer() if isinstance(decoder, Listener) else decoder.config
    if isinstance(decoder, Transformer):
        return config.target_vocab_size, config.max_length if config.positions == "learned" else TARGET
    return config.vocab_size, config.max_length


def _ids(vocab: int, *shape: int, like: Tensor) -> Tensor:
    """Symbols, the same at each call and without touching the generator."""
    count = int(torch.tensor(shape).prod())
    return (torch.arange(count, device=like.device) * 7 % vocab).view(shape)


# ------------------------------------------------------------------------------------------------------------------ BERT


def _of_bert_encoder(model: BertEncoder | BertMaskedLM) -> dict[str, Graph]:
    config = model.config
    ids = _ids(config.vocab_size, BATCH, min(SOURCE, config.max_length), like=next(model.parameters()))
    inputs = {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "types": ids % config.type_vocab_size}
    axes = dict.fromkeys(inputs, ("batch", "length"))
    outputs = ("states",) if isinstance(model, BertEncoder) else ("logits",)
    graphs = {"forward": Graph(model, inputs, axes, outputs)}
    if isinstance(model, BertEncoder) and model.pooler is not None:
        graphs["pool"] = Graph(Pools(model), inputs, axes, ("states", "pooled"))
    return graphs


class Pools(Around):
    """A BERT encoder's states and what its pooler makes of them."""

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        """States (z, m, d) and the pooled state (z, d)."""
        states = self.model(ids, mask, types=types)
        return states, self.model.pool(states)


def _of_bert_decoder(model: BertDecoder) -> dict[str, Graph]:
    config, weight = model.config, next(model.parameters())
    ids = _ids(config.vocab_size, BATCH, min(TARGET, config.max_length), like=weight)
    inputs: dict[str, Any] = {"ids": ids}
    axes: dict[str, Any] = {"ids": ("batch", "target"), "target_mask": ("batch", "target")}
    states = mask = None
    if config.context_dim is not None:
        states = torch.randn(BATCH, SOURCE, config.context_dim).to(weight)
        mask = torch.ones(BATCH, SOURCE, dtype=torch.bool, device=weight.device)
        inputs |= {"encoder_states": states, "source_mask": mask}
        axes |= {"encoder_states": ("batch", "source", None), "source_mask": ("batch", "source")}
    inputs["target_mask"] = torch.ones_like(ids, dtype=torch.bool)
    module = model if config.head else States(model)
    graphs = {"forward": Graph(module, inputs, axes, ("logits" if config.head else "states",))}
    if states is None or mask is None or not config.causal or not config.head:
        return graphs
    axes_of_states = ("batch", "source", None)
    return {**graphs, **_generating(model, states, axes_of_states, mask, states, config.vocab_size, config.max_length)}


class States(Around):
    """The states of a BERT decoder without a head."""

    def forward(
        self,
        ids: Tensor,
        encoder_states: Tensor | None = None,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """States (z, n, d)."""
        return self.model.states(ids, encoder_states, source_mask=source_mask, target_mask=target_mask)


# -------------------------------------------------------------------------------------------------------------- pictures


def _of_crossvit(model: CrossViT) -> dict[str, Graph]:
    config = model.config
    images = torch.randn(BATCH, config.channels, *config.image_size).to(model.positions[0])  # type: ignore[misc]
    return {"forward": Graph(model, {"images": images}, {"images": ("batch", None, None, None)}, ("logits",))}


def _of_picture_reader(model: PictureReader) -> dict[str, Graph]:
    config, weight = model.config, next(model.parameters())
    ids = _ids(config.decoder.vocab_size, BATCH, min(TARGET, config.decoder.max_length), like=weight)
    images = torch.randn(BATCH, 3, config.height, config.width).to(weight)
    inputs = {"images": images, "ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}
    words = ("batch", "words")
    return {"forward": Graph(model, inputs, {"images": ("batch", None, None, None), "ids": words, "mask": words}, ("logits",))}


# ------------------------------------------------------------------------------------------------------------- Perceiver


class ReadsVideo(Around):
    """A Perceiver IO of videos with an argument for each kind of input, and a tensor for each kind of output."""

    def forward(self, audio: Tensor, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """Sound, video and label, or logits of classes."""
        made = self.model({"audio": audio, "image": image, "label": label})
        return tuple(made[kind] for kind in VIDEO_KINDS) if isinstance(made, dict) else (made,)


def _of_perceiver(model: PerceiverIO) -> dict[str, Graph]:
    inputs, weight = model.config.inputs, model.latents
    name = {"tokens": "logits", "class": "logits", "flow": "flow"}.get(model.config.outputs.kind)
    if isinstance(inputs, TextInput):
        return _of_text_perceiver(model, inputs)
    if isinstance(inputs, ImageInput | FlowInput):
        frames = () if isinstance(inputs, ImageInput) else (2,)
        images = torch.randn(BATCH, *frames, inputs.channels, *inputs.size).to(weight)
        axes = ("batch", *(None,) * (images.dim() - 1))
        return {"forward": Graph(model, {"inputs": images}, {"inputs": axes}, (str(name),))}
    if any(0.0 < p < 1.0 for p in inputs.mask_probs):
        raise ValueError(
            f"this model hides rows of its input at random, with probabilities {inputs.mask_probs}, which no graph repeats; "
            "load it with mask_probs of 0 and 1"
        )
    given = {
        "audio": torch.randn(BATCH, inputs.audio_samples, 1).to(weight),
        "image": torch.randn(BATCH, inputs.frames, inputs.channels, *inputs.size).to(weight),
        "label": torch.randn(BATCH, inputs.num_labels).to(weight),
    }
    axes_of = {kind: ("batch", *(None,) * (given[kind].dim() - 1)) for kind in given}
    outputs = ("logits",) if name == "logits" else tuple(f"{kind}_out" for kind in VIDEO_KINDS)  # inputs have the kinds' names
    return {"forward": Graph(ReadsVideo(model), given, axes_of, tuple(outputs))}


def _of_text_perceiver(model: PerceiverIO, inputs: TextInput) -> dict[str, Graph]:
    ids = _ids(inputs.vocab_size, BATCH, min(SOURCE, inputs.max_length), like=model.latents)
    given = {"inputs": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}
    axes = dict.fromkeys(given, ("batch", "length"))
    graphs = {"forward": Graph(model, given, axes, ("logits",))}
    if model.config.outputs.kind == "tokens":
        where = _ids(model.config.outputs.num_queries, BATCH, min(TARGET, model.config.outputs.num_queries), like=ids)
        graphs["some"] = Graph(model, {**given, "outputs": where}, {**axes, "outputs": ("batch", "wanted")}, ("logits",))
    return graphs


_MAKERS: dict[type, Callable[[Any], dict[str, Graph]]] = {
    Transformer: _of_transformer,
    EncoderDecoder: _of_transformer,
    BertEncoder: _of_bert_encoder,
    BertMaskedLM: _of_bert_encoder,
    BertDecoder: _of_bert_decoder,
    CrossViT: _of_crossvit,
    PictureReader: _of_picture_reader,
    PerceiverIO: _of_perceiver,
}
