"""BERT: an encoder, a decoder that reads other states through cross-attention, and an encoder-decoder of any two models.

Devlin, Chang, Lee, Toutanova: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019,
arXiv:1810.04805. As a decoder, with cross-attention between self-attention and feed-forward layer: Rothe, Narayan, Severyn:
"Leveraging Pre-trained Checkpoints for Sequence Generation Tasks", 2020, arXiv:1907.12461, section 2.

Where the papers are silent this file follows the authors' code and Hugging Face's `transformers`, whose weights it takes
(`checkpoints.bert_huggingface`):
- the norms stand after each residual sum and add 1e-12 to the variance; a norm also follows the sum of the embeddings;
- a dense layer, an activation and a norm stand before the output projection, which is the word embedding, transposed, plus a bias;
- positions are 0, 1, 2, ... whatever the padding, token types 0;
- states of another width than the decoder reads pass a projection, which that library computes at every step and this file once;
- a decoder with cross-attention refuses to run without states, where that library skips the cross-attention in silence;
- a position that may attend nothing reads zeros, so it gets the output bias, where that library reads the mean of all values.

Legend: z batch, m source length, n target length, r target sequences (beams, samples) that read one source, d width, c width of the
states that a decoder reads, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention.checks import check_switches, look_up
from crossattention.attention.cross_attention import CrossAttention
from crossattention.attention.prepared import PreparedContext
from crossattention.attention.self_attention import KeyValueCache, SelfAttention
from crossattention.layers.dropout import Dropout
from crossattention.layers.feed_forward import FeedForward
from crossattention.models.pretrained import FAMILIES, Pretrained

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")

# ------------------------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class BertConfig:
    """Sizes and choices of a BERT; the defaults are those of the base model, uncased, as an encoder.

    Args:
        vocab_size: number of symbols, V.
        dim: width of the model, d.
        layers: number of layers.
        heads: attention heads, each of width dim / heads.
        feed_forward_dim: width inside the feed-forward layers.
        max_length: number of learned positions.
        type_vocab_size: number of token types.
        activation: "gelu" (with erf), "gelu_tanh" (its approximation), "relu" or "silu", in the feed-forward layers and the head.
        dropout: on the embeddings and on each sublayer's output.
        attention_dropout: on the attention weights.
        norm_eps: added to the variance in each norm.
        causal: whether a position attends only to itself and those before it.
        context_dim: width c of the states that a decoder reads; None: a model without cross-attention.
        pooler: whether an encoder has the dense layer over the first state.
        head: whether a decoder has the layers that make logits; without them it gives states.
        tied: whether the output projection is the word embedding.
        pad_id: symbol that fills short sequences up; its embedding gets no gradient where it is read.
        begin_id: symbol that starts every target ([CLS]); None where nothing is generated, as for the other two.
        end_id: symbol that ends every target ([SEP]).

    Raises:
        ValueError: a size below 1, heads that do not divide, an unknown activation, a symbol outside the vocabulary, an end that is
            the padding.
        TypeError: a number or a truth value of another kind.
    """

    vocab_size: int = 30_522
    dim: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward_dim: int = 3072
    max_length: int = 512
    type_vocab_size: int = 2
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_eps: float = 1e-12
    causal: bool = False
    context_dim: int | None = None
    pooler: bool = False
    head: bool = True
    tied: bool = True
    pad_id: int | None = 0
    begin_id: int | None = 101
    end_id: int | None = 102

    def __post_init__(self) -> None:
        field_types = {field.name: field.type for field in fields(self)}
        for name in (name for name, kind in field_types.items() if kind in ("int", "int | None")):
            value, lowest = getattr(self, name), 0 if name.endswith("_id") else 1
            if value is None and field_types[name] == "int | None":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got heads={self.heads} for dim={self.dim}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        check_switches(self)
        for name in ("pad_id", "begin_id", "end_id"):
            if (getattr(self, name) or 0) >= self.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} is outside the {self.vocab_size} symbols")
        if self.end_id is not None and self.end_id == self.pad_id:
            raise ValueError(f"end_id and pad_id must differ, got {self.end_id} for both")


def base(**changes: Any) -> BertConfig:
    """BERT base, uncased: 12 layers of width 768, 109.5 M parameters as an encoder with pooler.

    Args:
        changes: fields of `BertConfig` that shall differ.

    Source: Devlin et al. 2019, section 3.
    """
    return BertConfig(**changes)


def large(**changes: Any) -> BertConfig:
    """BERT large, uncased: 24 layers of width 1024, 335.1 M parameters as an encoder with pooler.

    Args:
        changes: fields of `BertConfig` that shall differ.

    Source: Devlin et al. 2019, section 3.
    """
    return BertConfig(**{"dim": 1024, "layers": 24, "heads": 16, "feed_forward_dim": 4096, **changes})


# ----------------------------------------------------------------------------------------------------------- blocks


class Embeddings(nn.Module):
    """x = dropout(norm(words[ids] + types[types] + positions[positions]))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.dim, padding_idx=config.pad_id)
        self.positions = nn.Embedding(config.max_length, config.dim)
        self.types = nn.Embedding(config.type_vocab_size, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        ids: Tensor | None,
        *,
        types: Tensor | None = None,
        positions: Tensor | None = None,
        embeddings: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """Embeddings (..., n, d) of symbols (..., n), or of word embeddings (..., n, d) in their place; positions from `start`."""
        words = look_up("ids", ids, self.words) if embeddings is None else embeddings
        end = start + words.shape[-2]
        if positions is None and end > self.positions.num_embeddings:
            raise ValueError(
                f"a sequence of length {end} is longer than the max_length={self.positions.num_embeddings} learned positions; "
                "shorten it, or build the model with a larger max_length"
            )
        typed = self.types.weight[0] if types is None else look_up("types", types, self.types)
        placed = self.positions.weight[start:end] if positions is None else look_up("positions", positions, self.positions)
        return self.dropout(self.norm(words + typed + placed))


class Residual(nn.Module):
    """What stands around a sublayer: x <- norm(x + dropout(update))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """The sublayer's input and its result, summed and normalised."""
        return self.norm(self.dropout(update, x))


class BertLayer(nn.Module):
    """Self-attention, cross-attention if the config names a `context_dim`, and a feed-forward layer.

    Three ways in, one function: `forward` with the states themselves, `attend` with what was prepared of them, `step` with what was
    prepared and one position at a time. Without cross-attention there are no states and nothing is prepared.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        sizes = {"heads": config.heads, "dropout": config.attention_dropout}
        self.self_attention = SelfAttention(config.dim, causal=config.causal, **sizes)
        self.self_attention_residual = Residual(config)
        has_context = config.context_dim is not None
        self.cross_attention = CrossAttention(config.dim, config.context_dim, **sizes) if has_context else None
        self.cross_attention_residual = Residual(config) if has_context else None
        self.feed_forward = FeedForward(config.dim, config.feed_forward_dim, activation=_activation(config))
        self.feed_forward_residual = Residual(config)

    def prepare(self, states: Tensor, source_mask: Tensor | None = None, **hints: int | None) -> PreparedContext:
        """What `decode` reads of the states; a way in of its own, for engines that gather a layer's weights when it is called."""
        assert self.cross_attention is not None
        prepared: Any = self.cross_attention.prepare(states, context_mask=source_mask, **hints)
        made: PreparedContext = prepared
        return made

    def forward(
        self, x: Tensor, states: Tensor | None = None, *, source_mask: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """One layer on x (z, n, d), reading states (z, m, c)."""
        x = self._read_itself(x, mask)
        if self.cross_attention is not None:
            x = self.cross_attention_residual(x, self.cross_attention(x, states, context_mask=source_mask))
        return self.feed_forward_residual(x, self.feed_forward(x))

    def attend(self, x: Tensor, prepared: PreparedContext | None, *, mask: Tensor | None = None) -> Tensor:
        """The same on x (z, n, d) or (z, r, n, d), reading prepared states."""
        return self._transform(self._read_itself(x, mask), prepared)

    def step(self, x: Tensor, prepared: PreparedContext | None, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        """The same on the next position alone, x (z, r, 1, d); the cache has z r rows."""
        update, cache = self.self_attention.step(x.flatten(0, 1), cache)
        x = self.self_attention_residual(x, update.unflatten(0, x.shape[:2]))
        return self._transform(x, prepared), cache

    def _read_itself(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if x.dim() == 3:
            return self.self_attention_residual(x, self.self_attention(x, mask=mask))
        update = self.self_attention(x.flatten(0, 1), mask=None if mask is None else mask.flatten(0, 1))
        return self.self_attention_residual(x, update.unflatten(0, x.shape[:2]))

    def _transform(self, x: Tensor, prepared: PreparedContext | None) -> Tensor:
        if self.cross_attention is not None:
            x = self.cross_attention_residual(x, self.cross_attention.attend(x, prepared))
        return self.feed_forward_residual(x, self.feed_forward(x))


class Head(nn.Module):
    """logits = norm(activation(x W + b)) E^T + bias, where E is the word embedding unless the config unties them."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.dim, config.dim)
        self.activation = _activation(config)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.out_proj = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, words: nn.Embedding) -> Tensor:
        """Logits (..., V) of states x (..., d)."""
        x = self.norm(self.activation(self.dense(x)))
        return F.linear(x, words.weight if self.out_proj is None else self.out_proj.weight, self.bias)


def _activation(config: BertConfig) -> nn.Module:
    if config.activation in ("relu", "silu"):
        return nn.ReLU() if config.activation == "relu" else nn.SiLU()
    return nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")


@torch.no_grad()
def _reset_parameters(model: nn.Module) -> None:
    """Draw all weights anew: matrices and embeddings normal with deviation 0.02, biases and padding 0, norms 1 and 0.

    Source: the authors' code ("initializer_range"), which cuts the normal at two deviations.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if getattr(module, "padding_idx", None) is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, Head):
            nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------------- encoder


class BertEncoder(Pretrained, nn.Module):
    """BERT: states of a sequence whose positions attend to each other.

    states = layers(norm(words[ids] + types + positions));   pooled = tanh(states[:, 0] W + b)

    Args:
        config: sizes and choices; without `context_dim`.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        ValueError: a config with a `context_dim`.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.

    Example:
        >>> model = BertEncoder(BertConfig(50, dim=16, layers=2, heads=2, feed_forward_dim=32, begin_id=1, end_id=2))
        >>> model(torch.randint(3, 50, (2, 7))).shape
        torch.Size([2, 7, 16])
    """

    family: ClassVar[str] = "bert_encoder"
    config_class: ClassVar[type] = BertConfig

    def __init__(
        self,
        config: BertConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.context_dim is not None:
            raise ValueError(
                f"an encoder reads no other states, got context_dim={config.context_dim}; leave it out, or build a BertDecoder"
            )
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.layers))
        self.pooler = nn.Linear(config.dim, config.dim) if config.pooler else None
        _reset_parameters(self)
        self.to(device=device, dtype=dtype)

    def forward(
        self,
        ids: Tensor | None,
        mask: Tensor | None = None,
        *,
        types: Tensor | None = None,
        positions: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """The states of every symbol.

        Args:
            ids: symbols (z, m); None where `embeddings` are given.
            mask: bool (z, m), True = a real symbol; without it all are.
            types: token types (z, m); without them all 0.
            positions: integers (z, m); without them 0, 1, 2, ... whatever the padding.
            embeddings: word embeddings (z, m, d) in place of ids.

        Returns:
            States (z, m, d).

        Raises:
            ValueError: ids that are not integers of shape (z, length), both or neither of ids and embeddings, a mask, types or
                positions of another shape, more symbols than learned positions.
            TypeError: a mask that is not bool.
        """
        _check_input(self.config, "ids", ids, embeddings, (2,), {"types": types, "positions": positions})
        length = ids if embeddings is None else embeddings[..., 0]
        _check_mask("mask", mask, tuple(length.shape))
        x = self.embeddings(ids, types=types, positions=positions, embeddings=embeddings)
        for layer in self.layers:
            x = layer(x, mask=mask)
        return x

    encode = forward

    def pool(self, states: Tensor) -> Tensor:
        """The dense layer and tanh over the first state, (z, d), of states (z, m, d).

        Raises:
            ValueError: the model has no pooler.
        """
        if self.pooler is None:
            raise ValueError("this encoder has no pooler; build it with BertConfig(pooler=True), or take mean_of_states")
        return torch.tanh(self.pooler(states[:, 0]))


class BertMaskedLM(Pretrained, nn.Module):
    """BERT with the head that it is pre-trained with: at every position, logits of the symbol that stands there.

    Args:
        config: sizes and choices; without `context_dim`.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        ValueError: a config with a `context_dim`, or without a head.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1, task 1.
    """

    family: ClassVar[str] = "bert_masked_lm"
    config_class: ClassVar[type] = BertConfig

    def __init__(
        self,
        config: BertConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not config.head:
            raise ValueError("a masked language model needs its head, got head=False; leave it out, or build a BertEncoder")
        self.config = config
        self.encoder = BertEncoder(config)
        self.head = Head(config)
        _reset_parameters(self)
        self.to(device=device, dtype=dtype)

    def forward(
        self,
        ids: Tensor | None,
        mask: Tensor | None = None,
        *,
        types: Tensor | None = None,
        positions: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Logits (z, m, V); Args and Raises as of `BertEncoder`."""
        states = self.encoder(ids, mask, types=types, positions=positions, embeddings=embeddings)
        return self.head(states, self.encoder.embeddings.words)


def mean_of_states(states: Tensor, mask: Tensor | None = None, *, normalised: bool = True) -> Tensor:
    """One vector a sequence: the mean of the states of its real symbols, of length 1.

    out = mean / |mean|,   mean = sum over real i of states[:, i] / (number of real i)

    Args:
        states: (z, m, d).
        mask: bool (z, m), True = a real symbol.
        normalised: whether to divide by the Euclidean length, so that dot products are cosines.

    Returns:
        (z, d); zeros for a sequence without a real symbol.

    Raises:
        ValueError: a mask of another shape.
        TypeError: a mask that is not bool.

    Source: Reimers and Gurevych 2019, arXiv:1908.10084, section 3 ("MEAN").

    Example:
        >>> mean_of_states(torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[True, False]]))
        tensor([[0.6000, 0.8000]])
    """
    _check_mask("mask", mask, tuple(states.shape[:2]))
    if mask is None:
        mean = states.mean(1)
    else:
        real = mask.unsqueeze(-1)
        mean = states.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
    return F.normalize(mean, dim=-1) if normalised else mean


# ---------------------------------------------------------------------------------------------------------- decoder


class BertDecoder(Pretrained, nn.Module):
    """BERT as a decoder: it reads states of any length and of width `context_dim` between self-attention and feed-forward layer.

    states = layers(norm(words[ids] + types + positions), encoder_states);   logits = norm(activation(states W + b)) E^T + bias

    The target is given shifted right: it starts with `begin_id`, and logits[:, i] are for the symbol after target[:, i].
    With `causal=False` every position reads the whole target, as the words of a question that read a picture do; such a decoder
    gives states and logits, but cannot step. Without `context_dim` it is a language model that reads itself alone.

    Args:
        config: sizes and choices.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        ValueError: a config with a pooler.

    Source: Rothe et al. 2020, arXiv:1907.12461, section 2.

    Example:
        >>> sizes = {"dim": 16, "layers": 2, "heads": 2, "feed_forward_dim": 32, "begin_id": 1, "end_id": 2}
        >>> config = BertConfig(50, **sizes, causal=True, context_dim=24)
        >>> model = BertDecoder(config)
        >>> target, patches = torch.randint(3, 50, (2, 5)), torch.randn(2, 9, 24)
        >>> model(target, patches).shape
        torch.Size([2, 5, 50])
        >>> prepared = model.prepare(patches)  # once a source
        >>> model.decode(target[:, None].expand(-1, 3, -1), prepared).shape  # three targets read each source, no copies
        torch.Size([2, 3, 5, 50])
    """

    family: ClassVar[str] = "bert_decoder"
    config_class: ClassVar[type] = BertConfig

    def __init__(
        self,
        config: BertConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.pooler:
            raise ValueError("a decoder has no pooler, got pooler=True; leave it out, or build a BertEncoder")
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.layers))
        self.head = Head(config) if config.head else None
        _reset_parameters(self)
        self.to(device=device, dtype=dtype)

    @property
    def context_dim(self) -> int | None:
        """Width of the states that it reads."""
        return self.config.context_dim

    def forward(
        self,
        ids: Tensor | None,
        encoder_states: Tensor | None = None,
        *,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        types: Tensor | None = None,
        positions: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Logits of every next symbol.

        Args:
            ids: symbols (z, n), beginning with `begin_id`; None where `embeddings` are given.
            encoder_states: what it reads, (z, m, c); None for a model without cross-attention, and only there.
            source_mask: bool (z, m), True = may be read.
            target_mask: bool (z, n), True = a real symbol.
            types: token types (z, n); without them all 0.
            positions: integers (z, n); without them 0, 1, 2, ...
            embeddings: word embeddings (z, n, d) in place of ids.

        Returns:
            Logits (z, n, V).

        Raises:
            ValueError: states missing where the model has cross-attention, or given where it has none; ids that are not integers of
                shape (z, length), both or neither of ids and embeddings, batches that differ, a mask, types or positions of another
                shape, more symbols than learned positions; a model without a head.
            TypeError: a mask that is not bool.
        """
        self._check_head()
        states = self.states(
            ids,
            encoder_states,
            source_mask=source_mask,
            target_mask=target_mask,
            types=types,
            positions=positions,
            embeddings=embeddings,
        )
        return self._logits(states)

    def states(
        self,
        ids: Tensor | None,
        encoder_states: Tensor | None = None,
        *,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        types: Tensor | None = None,
        positions: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """The states (z, n, d) that the head makes logits of; Args and Raises as in `forward`."""
        _check_input(self.config, "ids", ids, embeddings, (2,), {"types": types, "positions": positions})
        self._check_states(encoder_states, source_mask)
        length = ids if embeddings is None else embeddings[..., 0]
        _check_mask("target_mask", target_mask, tuple(length.shape))
        x = self.embeddings(ids, types=types, positions=positions, embeddings=embeddings)
        for layer in self.layers:
            x = layer(x, encoder_states, source_mask=source_mask, mask=target_mask)
        return x

    def prepare(
        self,
        encoder_states: Tensor,
        source_mask: Tensor | None = None,
        *,
        uses: int | None = None,
        query_length: int | None = None,
        repeats: int | None = None,
    ) -> tuple[PreparedContext, ...]:
        """Make of the states, once, what each layer reads any number of times.

        Args:
            encoder_states: (z, m, c).
            source_mask: bool (z, m), True = may be read.
            uses: hint: how many times they will be read. Without hints: the key-value cache of the textbook.
            query_length: hint: length of each target that reads them (1 where they are read step by step).
            repeats: hint: how many targets read each source together.

        Returns:
            One prepared context a layer.

        Raises:
            ValueError: a model without cross-attention; states of another width; a mask of another shape.
        """
        self._check_states(encoder_states, source_mask)
        hints = {"uses": uses, "query_length": query_length, "repeats": repeats}
        return tuple(layer.prepare(encoder_states, source_mask, **hints) for layer in self.layers)

    def decode(
        self, target_ids: Tensor, prepared: Sequence[PreparedContext] | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """Logits of every next symbol, reading prepared states.

        Args:
            target_ids: symbols (z, n), or (z, r, n): r targets that read each source, which is not copied.
            prepared: what `prepare` returned, for z sources; None for a model without cross-attention, and only there.
            target_mask: bool of the same shape, True = a real symbol.

        Returns:
            Logits (z, n, V) or (z, r, n, V).

        Raises:
            ValueError: as `forward`; also prepared states of other weights or of another model.
        """
        self._check_head()
        _check_input(self.config, "target_ids", target_ids, None, (2, 3), {})
        _check_mask("target_mask", target_mask, tuple(target_ids.shape))
        x = self.embeddings(target_ids)
        for layer, context in zip(self.layers, self._contexts(prepared), strict=True):
            x = layer.attend(x, context, mask=target_mask)
        return self._logits(x)

    def step(
        self,
        ids: Tensor,
        prepared: Sequence[PreparedContext] | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> tuple[Tensor, tuple[KeyValueCache, ...]]:
        """Logits of the symbol after the next one, given that one; all earlier ones are in the caches.

        Args:
            ids: the next symbol of each target, (z, r).
            prepared: what `prepare` returned, for z sources; None for a model without cross-attention, and only there.
            caches: what the last `step` returned; None at the beginning. Not changed. Each has z r rows, row z' r + r' for target
                r' of source z'; `cache.select(rows)` keeps some, copies or reorders them.

        Returns:
            Logits (z, r, V), and the caches with this position in them.

        Raises:
            ValueError: as `decode`; a model that is not causal; caches of another number of targets or layers.
        """
        self._check_head()
        if not self.config.causal:
            raise ValueError("step needs BertConfig(causal=True): without it earlier outputs depend on later symbols")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            given = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"ids must be int64 or int32 of shape (batch, targets of each source), got {given}")
        if caches is not None and len(caches) != len(self.layers):
            raise ValueError(f"caches must be one a layer, {len(self.layers)}, got {len(caches)}")
        x = self.embeddings(ids.unsqueeze(-1), start=caches[0].length if caches else 0)
        longer = []
        held = caches or (None,) * len(self.layers)
        for layer, context, cache in zip(self.layers, self._contexts(prepared), held, strict=True):
            x, cache = layer.step(x, context, cache)
            longer.append(cache)
        return self._logits(x.squeeze(-2)), tuple(longer)

    def _logits(self, states: Tensor) -> Tensor:
        return self.head(states, self.embeddings.words)

    def _check_head(self) -> None:
        if self.head is None:
            raise ValueError("this decoder was built with head=False and gives no logits; call its states(...)")

    def _check_states(self, states: Tensor | None, source_mask: Tensor | None) -> None:
        width = self.config.context_dim
        if width is None:
            if states is not None or source_mask is not None:
                given = "states" if states is not None else "a source_mask"
                raise ValueError(
                    f"this decoder has no cross-attention, so {given} would not be read; build it with BertConfig(context_dim=...)"
                )
        elif states is None:
            raise ValueError(
                f"this decoder has cross-attention and reads states (batch, length, {width}), got none; pass encoder_states, or "
                "build it with BertConfig(context_dim=None)"
            )

    def _contexts(self, prepared: Sequence[PreparedContext] | None) -> Sequence[PreparedContext | None]:
        """One prepared context a layer, or None for each."""
        if self.config.context_dim is None:
            if prepared is not None:
                raise ValueError(
                    "this decoder has no cross-attention, so prepared states would not be read; build it with "
                    "BertConfig(context_dim=...)"
                )
            return (None,) * len(self.layers)
        if prepared is None or isinstance(prepared, PreparedContext) or len(prepared) != len(self.layers):
            given = "none" if prepared is None else "a single one" if isinstance(prepared, PreparedContext) else str(len(prepared))
            raise ValueError(
                f"prepared must hold one prepared context a layer, {len(self.layers)}, got {given}; pass what this model's "
                "prepare(states) returned"
            )
        return prepared


def _check_input(
    config: BertConfig,
    name: str,
    ids: Tensor | None,
    embeddings: Tensor | None,
    dims: tuple[int, ...],
    beside: dict[str, Tensor | None],
) -> None:
    """Refuse ids that are no integers or of a wrong number of dimensions, and types or positions that are not theirs."""
    if (ids is None) == (embeddings is None):
        raise ValueError(f"pass {name} or embeddings, got {'neither' if ids is None else 'both'}")
    given = {name: ids, "embeddings": embeddings, **beside}
    for what, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{what} must be a tensor, got {type(value).__name__}")
    if embeddings is not None:
        if embeddings.dim() != 3 or embeddings.shape[-1] != config.dim:
            raise ValueError(f"embeddings must be (batch, length, {config.dim}), got shape {tuple(embeddings.shape)}")
        shape = tuple(embeddings.shape[:2])
    else:
        if ids.dim() not in dims or ids.dtype not in (torch.int64, torch.int32):
            shapes = " or ".join({2: "(batch, length)", 3: "(batch, targets, length)"}[dim] for dim in dims)
            raise ValueError(f"{name} must be int64 or int32 of shape {shapes}, got {ids.dtype} of shape {tuple(ids.shape)}")
        shape = tuple(ids.shape)
    for what, value in beside.items():
        if value is not None and (value.shape != shape or value.dtype not in (torch.int64, torch.int32)):
            raise ValueError(f"{what} must be int64 or int32 of shape {shape}, got {value.dtype} of shape {tuple(value.shape)}")


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given, remedy = (f"{mask.dtype}", f"; pass {name}.bool()") if isinstance(mask, Tensor) else (type(mask).__name__, "")
        raise TypeError(f"{name} must be bool with True at real symbols, got {given}{remedy}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(mask.shape)}")


# -------------------------------------------------------------------------------------------------- encoder-decoder


class Encodes(Protocol):
    """A model whose states can be read: `BertEncoder`, `Transformer`."""

    config: Any

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Tensor: ...  # noqa: D102


class Decodes(Protocol):
    """A model that reads prepared states: `BertDecoder`, `Transformer`."""

    config: Any

    def prepare(self, states: Tensor, source_mask: Tensor | None = None, **hints: int | None) -> Sequence[Any]: ...  # noqa: D102
    def decode(self, target_ids: Tensor, prepared: Sequence[Any], target_mask: Tensor | None = None) -> Tensor: ...  # noqa: D102
    def step(self, ids: Tensor, prepared: Sequence[Any], caches: Sequence[Any] | None = None) -> tuple[Tensor, Any]: ...  # noqa: D102


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """What an `EncoderDecoder` is made of.

    Args:
        encoder_family: family of the encoder, as in `config.json`: "bert_encoder", "transformer".
        encoder: its config; or the fields of one, as they stand in a file.
        decoder_family: family of the decoder.
        decoder: its config, likewise.

    Raises:
        ValueError: an unknown family, fields that its config does not know.
    """

    encoder_family: str
    encoder: Any
    decoder_family: str
    decoder: Any

    def __post_init__(self) -> None:
        for side in ("encoder", "decoder"):
            held = getattr(self, side)
            if isinstance(held, dict):
                cls = _class_of(getattr(self, f"{side}_family")).config_class
                if unknown := sorted(set(held) - {field.name for field in fields(cls)}):
                    raise ValueError(f"the {side} has fields that {cls.__name__} does not know: {', '.join(unknown)}")
                object.__setattr__(self, side, cls(**held))

    @property
    def pad_id(self) -> int:
        """The decoder's."""
        return self.decoder.pad_id

    @property
    def begin_id(self) -> int:
        """The decoder's."""
        return self.decoder.begin_id

    @property
    def end_id(self) -> int:
        """The decoder's."""
        return self.decoder.end_id


class EncoderDecoder(Pretrained, nn.Module):
    """An encoder whose states a decoder reads through cross-attention; any two of this package, of any widths.

    states = encoder(source) [W + b where the widths differ];   logits = decoder(target, states)

    The projection is part of `encode`: it is computed once a source, whatever is generated from it.
    Of a `Transformer` as encoder only `encode` is used, of one as decoder all but that; its other half stays where it is.

    Args:
        encoder: a model with `encode`; or the whole config, for two new models.
        decoder: a model with `prepare`, `decode` and `step`.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        TypeError: a model without these methods, a decoder missing or given beside a config.
        ValueError: a decoder without cross-attention, or that is not causal or has no head.

    Source: Rothe et al. 2020, arXiv:1907.12461, section 2; transformers, models/encoder_decoder.

    Example:
        >>> sizes = {"heads": 2, "layers": 2, "feed_forward_dim": 32, "begin_id": 1, "end_id": 2}
        >>> encoder = BertEncoder(BertConfig(50, dim=24, **sizes))
        >>> decoder = BertDecoder(BertConfig(40, dim=16, causal=True, context_dim=16, **sizes))
        >>> model = EncoderDecoder(encoder, decoder).eval()  # 24 -> 16 by a projection
        >>> source, target = torch.randint(3, 50, (2, 7)), torch.randint(3, 40, (2, 5))
        >>> model(source, target).shape
        torch.Size([2, 5, 40])
        >>> from crossattention.models import beam_search
        >>> best = beam_search(model, source, beams=3, max_length=8)
        >>> len(best), len(best[0][0].ids) <= 8
        (2, True)
    """

    family: ClassVar[str] = "encoder_decoder"
    config_class: ClassVar[type] = EncoderDecoderConfig

    def __init__(
        self,
        encoder: Encodes | EncoderDecoderConfig,
        decoder: Decodes | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(encoder, EncoderDecoderConfig):
            if decoder is not None:
                raise TypeError("pass a config, or an encoder and a decoder, got a config and a decoder")
            config = encoder
            encoder, decoder = (_class_of(getattr(config, f"{s}_family"))(getattr(config, s)) for s in ("encoder", "decoder"))
        self._check_parts(encoder, decoder)
        self.config = EncoderDecoderConfig(encoder.family, encoder.config, decoder.family, decoder.config)
        self.encoder, self.decoder = encoder, decoder
        given, read = encoder.config.dim, _width_read(decoder)
        self.projection = None
        if given != read:
            self.projection = nn.Linear(given, read)
            _reset_parameters(self.projection)
            weight = next(decoder.parameters())
            self.projection.to(weight.device, weight.dtype)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def forward(
        self,
        source_ids: Tensor,
        target_ids: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of every next target symbol: `decode(target_ids, prepare(encode(source_ids)))`.

        Args:
            source_ids: what the encoder takes, z sources.
            target_ids: symbols (z, n), beginning with `begin_id`.
            source_mask: bool (z, m), True = a real symbol; without it all are.
            target_mask: bool (z, n), likewise. Padding on the right is never read by a real symbol before it.

        Returns:
            Logits (z, n, V).

        Raises:
            ValueError: what the two models refuse; batches that differ.
            TypeError: a mask that is not bool.
        """
        for name, ids in (("source_ids", source_ids), ("target_ids", target_ids)):
            if not isinstance(ids, Tensor) or not ids.dim():
                raise TypeError(f"{name} must be a tensor with a batch, got {type(ids).__name__}")
        if target_ids.shape[0] != source_ids.shape[0]:
            raise ValueError(
                f"source_ids and target_ids must have one batch size, got {tuple(source_ids.shape)} and {tuple(target_ids.shape)}; "
                "several targets for one source go through decode, as (batch, targets, length)"
            )
        prepared = self.prepare(self.encode(source_ids, source_mask), source_mask, uses=1, query_length=target_ids.shape[1])
        return self.decode(target_ids, prepared, target_mask)

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """The states (z, m, c) that the decoder reads: the encoder's, through the projection where the widths differ."""
        states = self.encoder.encode(source_ids, source_mask)
        return states if self.projection is None else self.projection(states)

    def prepare(
        self,
        states: Tensor,
        source_mask: Tensor | None = None,
        *,
        uses: int | None = None,
        query_length: int | None = None,
        repeats: int | None = None,
    ) -> Sequence[PreparedContext]:
        """What the decoder's layers read of states that `encode` returned, and of the mask that it got; hints as the decoder's."""
        return self.decoder.prepare(states, source_mask, uses=uses, query_length=query_length, repeats=repeats)

    def decode(self, target_ids: Tensor, prepared: Sequence[PreparedContext], target_mask: Tensor | None = None) -> Tensor:
        """The decoder's logits (z, n, V) or (z, r, n, V) of every next symbol, reading a prepared source."""
        return self.decoder.decode(target_ids, prepared, target_mask)

    def step(
        self, ids: Tensor, prepared: Sequence[PreparedContext], caches: Sequence[KeyValueCache] | None = None
    ) -> tuple[Tensor, Sequence[KeyValueCache]]:
        """The decoder's logits (z, r, V) of the symbol after the next one, and the caches with this position in them."""
        return self.decoder.step(ids, prepared, caches)

    @staticmethod
    def _check_parts(encoder: Any, decoder: Any) -> None:
        for side, model, methods in (("encoder", encoder, ("encode",)), ("decoder", decoder, ("prepare", "decode", "step"))):
            missing = [name for name in methods if not callable(getattr(model, name, None))]
            if not isinstance(model, Pretrained) or missing:
                without = f" without {', '.join(missing)}" if missing else ""
                raise TypeError(
                    f"the {side} must be a model of this package with {', '.join(methods)}, got {type(model).__name__}{without}"
                )
        if isinstance(decoder, BertDecoder):
            config = decoder.config
            if config.context_dim is None or not config.causal or not config.head:
                raise ValueError(
                    f"the decoder must read states, be causal and have a head, got context_dim={config.context_dim}, "
                    f"causal={config.causal}, head={config.head}; build it with BertConfig(context_dim=..., causal=True)"
                )


def _class_of(family: str) -> Any:
    if family not in FAMILIES:
        raise ValueError(f'there is no family "{family}"; known are {", ".join(sorted(FAMILIES))}')
    module, name = FAMILIES[family]
    return getattr(importlib.import_module(module), name)


def _width_read(decoder: Any) -> int:
    """Width of the states that a decoder reads."""
    return decoder.config.context_dim if isinstance(decoder, BertDecoder) else decoder.config.dim
