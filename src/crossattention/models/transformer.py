"""The Transformer: an encoder-decoder whose decoder reads the encoder's output through cross-attention.

Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin: "Attention Is All You Need", 2017, arXiv:1706.03762.
The model, its loss and the paper's two sizes; generation is in `generate`, the learning rate's schedule in `training`.

Where this file follows the authors' code (tensor2tensor) because the paper is silent, or offers more than the paper:
- weights start Xavier-uniform and embeddings normal with variance 1/d, as in that code (`Transformer.reset_parameters`);
- dropout on the attention weights, which that code has and the paper does not list, is a field and off by default;
- `norm="pre"` (a norm before each sublayer and one after each stack), learned positions, GELU and SiLU, a bias on the logits, and
  embeddings tied in part or not at all are fields, because published models need them; the defaults are the paper's;
- a position that may attend nothing (a source of padding alone) reads zeros, so it gets the output bias; the paper does not say.

Legend: z batch, m source length, n target length, r target sequences (beams, samples) that read one source, d width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention.checks import check_switches
from crossattention.attention.cross_attention import CrossAttention
from crossattention.attention.prepared import PreparedContext
from crossattention.attention.self_attention import KeyValueCache, SelfAttention
from crossattention.layers.dropout import Dropout
from crossattention.layers.feed_forward import ACTIVATIONS, FeedForward
from crossattention.layers.positions import sinusoidal_positions
from crossattention.models.pretrained import Pretrained

# ------------------------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of a `Transformer`; the defaults are the paper's base model.

    Args:
        source_vocab_size: number of source symbols.
        target_vocab_size: number of target symbols, V.
        dim: width of the model, d.
        heads: attention heads, each of width dim / heads.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        feed_forward_dim: width inside the feed-forward layers.
        dropout: on each sublayer's output and on the sum of embedding and position.
        attention_dropout: on the attention weights.
        norm: "post" normalises after each residual sum (the paper), "pre" each sublayer's input and each stack's output.
        positions: "sinusoidal" (the paper; any length) or "learned" (`max_length` positions a side).
        activation: "relu" (the paper), "gelu" or "silu", in the feed-forward layers.
        max_length: number of learned positions; sinusoidal ones do not use it.
        tied: "all" source embedding, target embedding and output projection are one matrix (the paper), "target" the latter
            two, "none" each its own.
        pad_id: symbol that fills short sequences up; no label and no probability of the smoothed labels.
        begin_id: symbol that starts every target.
        end_id: symbol that ends every target.
        norm_eps: added to the variance in each norm.
        output_bias: a learned bias on the logits, one a target symbol (Marian's translators have it; the paper not).

    Raises:
        ValueError: a size below 1, heads that do not divide, an unknown choice, a symbol outside its vocabulary, two
            vocabularies of different size to be tied, an end that is the padding.
    """

    source_vocab_size: int
    target_vocab_size: int
    dim: int = 512
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feed_forward_dim: int = 2048
    dropout: float = 0.1
    attention_dropout: float = 0.0
    norm: Literal["post", "pre"] = "post"
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    max_length: int = 512
    tied: Literal["all", "target", "none"] = "all"
    pad_id: int = 0
    begin_id: int = 1
    end_id: int = 2
    norm_eps: float = 1e-5
    output_bias: bool = False

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.type == "int"):
            value, lowest = getattr(self, name), 0 if name.endswith("_id") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got heads={self.heads} for dim={self.dim}")
        if self.positions == "sinusoidal" and self.dim % 2:
            raise ValueError(f'sinusoidal positions need an even dim, got dim={self.dim}; or take positions="learned"')
        for name, choices in (
            ("norm", ("post", "pre")),
            ("positions", ("sinusoidal", "learned")),
            ("activation", tuple(ACTIVATIONS)),
            ("tied", ("all", "target", "none")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        check_switches(self)
        if self.tied == "all" and self.source_vocab_size != self.target_vocab_size:
            raise ValueError(
                f'tied="all" needs one vocabulary, got source_vocab_size={self.source_vocab_size} and '
                f'target_vocab_size={self.target_vocab_size}; take tied="target" or a joint vocabulary'
            )
        for name in ("pad_id", "begin_id", "end_id"):
            if getattr(self, name) >= self.target_vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} is outside the target's {self.target_vocab_size} symbols")
        if self.end_id == self.pad_id:
            raise ValueError(f"end_id and pad_id must differ, got {self.end_id} for both: the loss would never see an end")


def base(vocab_size: int = 37_000, **changes: Any) -> TransformerConfig:
    """The paper's base model: 63.1 M parameters with its English-German vocabulary (it says 65 M).

    Args:
        vocab_size: size of the vocabulary that source and target share.
        changes: fields of `TransformerConfig` that shall differ.

    Source: Vaswani et al. 2017, table 3.
    """
    return TransformerConfig(**{"source_vocab_size": vocab_size, "target_vocab_size": vocab_size, **changes})


def big(vocab_size: int = 37_000, **changes: Any) -> TransformerConfig:
    """The paper's big model: 214.2 M parameters with its English-German vocabulary (it says 213 M).

    Args:
        vocab_size: size of the vocabulary that source and target share.
        changes: fields of `TransformerConfig` that shall differ; for English-French the paper used dropout=0.1.

    Source: Vaswani et al. 2017, table 3.
    """
    return base(vocab_size, **{"dim": 1024, "heads": 16, "feed_forward_dim": 4096, "dropout": 0.3, **changes})


# ----------------------------------------------------------------------------------------------------------- blocks


class Residual(nn.Module):
    """The dropout, the sum and the norm around a sublayer.

    post:  x <- norm(x + dropout(sublayer(x)))         pre:  x <- x + dropout(sublayer(norm(x)))
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.is_pre = config.norm == "pre"
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def enter(self, x: Tensor) -> Tensor:
        """What the sublayer reads."""
        return self.norm(x) if self.is_pre else x

    def leave(self, x: Tensor, update: Tensor) -> Tensor:
        """What the next sublayer gets, from this one's input and its result."""
        x = self.dropout(update, x)
        return x if self.is_pre else self.norm(x)


class EncoderLayer(nn.Module):
    """Self-attention over the whole source, then a feed-forward layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config.dim, heads=config.heads, dropout=config.attention_dropout)
        self.self_attention_residual = Residual(config)
        self.feed_forward = FeedForward(config.dim, config.feed_forward_dim, activation=config.activation)
        self.feed_forward_residual = Residual(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """One layer on x (z, m, d), reading where mask (z, m) is True."""
        around = self.self_attention_residual
        x = around.leave(x, self.self_attention(around.enter(x), mask=mask))
        around = self.feed_forward_residual
        return around.leave(x, self.feed_forward(around.enter(x)))


class DecoderLayer(nn.Module):
    """Causal self-attention over the target, cross-attention to the source, then a feed-forward layer.

    Three ways in, one function: `forward` with the encoder's output itself, `attend` with what was prepared of it, `step` with what
    was prepared and one position at a time.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config.dim, heads=config.heads, dropout=config.attention_dropout, causal=True)
        self.self_attention_residual = Residual(config)
        self.cross_attention = CrossAttention(config.dim, heads=config.heads, dropout=config.attention_dropout)
        self.cross_attention_residual = Residual(config)
        self.feed_forward = FeedForward(config.dim, config.feed_forward_dim, activation=config.activation)
        self.feed_forward_residual = Residual(config)

    def forward(self, x: Tensor, states: Tensor, *, source_mask: Tensor | None = None, target_mask: Tensor | None = None) -> Tensor:
        """One layer on x (z, n, d), reading states (z, m, d)."""
        x = self._read_itself(x, target_mask)
        around = self.cross_attention_residual
        x = around.leave(x, self.cross_attention(around.enter(x), states, context_mask=source_mask))
        return self._transform(x)

    def attend(self, x: Tensor, prepared: PreparedContext, *, target_mask: Tensor | None = None) -> Tensor:
        """The same on x (z, n, d) or (z, r, n, d), reading a prepared source."""
        return self._transform(self._read_source(self._read_itself(x, target_mask), prepared))

    def step(self, x: Tensor, prepared: PreparedContext, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        """The same on the next position alone, x (z, r, 1, d); the cache has z r rows."""
        around = self.self_attention_residual
        update, cache = self.self_attention.step(around.enter(x).flatten(0, 1), cache)
        x = around.leave(x, update.unflatten(0, x.shape[:2]))
        return self._transform(self._read_source(x, prepared)), cache

    def _read_itself(self, x: Tensor, mask: Tensor | None) -> Tensor:
        around = self.self_attention_residual
        if x.dim() == 3:
            return around.leave(x, self.self_attention(around.enter(x), mask=mask))
        mask = None if mask is None else mask.flatten(0, 1)
        update = self.self_attention(around.enter(x).flatten(0, 1), mask=mask)
        return around.leave(x, update.unflatten(0, x.shape[:2]))

    def _read_source(self, x: Tensor, prepared: PreparedContext) -> Tensor:
        around = self.cross_attention_residual
        return around.leave(x, self.cross_attention.attend(around.enter(x), prepared))

    def _transform(self, x: Tensor) -> Tensor:
        around = self.feed_forward_residual
        return around.leave(x, self.feed_forward(around.enter(x)))


class Encoder(nn.Module):
    """A stack of encoder layers; with `norm="pre"` a norm after the last."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = _final_norm(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The encoded source (z, m, d) of embeddings x (z, m, d)."""
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class Decoder(nn.Module):
    """A stack of decoder layers, all reading the encoder's last output; with `norm="pre"` a norm after the last."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = _final_norm(config)

    def forward(self, x: Tensor, states: Tensor, *, source_mask: Tensor | None = None, target_mask: Tensor | None = None) -> Tensor:
        """Outputs (z, n, d) of embeddings x (z, n, d), reading states (z, m, d)."""
        for layer in self.layers:
            x = layer(x, states, source_mask=source_mask, target_mask=target_mask)
        return self.norm(x)

    def attend(self, x: Tensor, prepared: Sequence[PreparedContext], *, target_mask: Tensor | None = None) -> Tensor:
        """The same on x (z, n, d) or (z, r, n, d), each layer reading its own prepared source."""
        for layer, context in zip(self.layers, prepared, strict=True):
            x = layer.attend(x, context, target_mask=target_mask)
        return self.norm(x)

    def step(
        self, x: Tensor, prepared: Sequence[PreparedContext], caches: Sequence[KeyValueCache | None]
    ) -> tuple[Tensor, tuple[KeyValueCache, ...]]:
        """The same on the next position alone, x (z, r, 1, d)."""
        longer = []
        for layer, context, cache in zip(self.layers, prepared, caches, strict=True):
            x, cache = layer.step(x, context, cache)
            longer.append(cache)
        return self.norm(x), tuple(longer)


def _final_norm(config: TransformerConfig) -> nn.Module:
    return nn.LayerNorm(config.dim, eps=config.norm_eps) if config.norm == "pre" else nn.Identity()


# ------------------------------------------------------------------------------------------------------------ model


class Transformer(Pretrained, nn.Module):
    """The encoder-decoder of "Attention Is All You Need".

    states = encoder(E_source[source] sqrt(d) + positions)
    logits = decoder(E_target[target] sqrt(d) + positions, states) W_out (+ b_out),   W_out = E_target^T where tied

    The target is given shifted right: it starts with `begin_id`, and logits[:, i] are for the symbol after target[:, i].
    Sequences are filled up with padding on the right. A mask is True at real symbols; without one, all are real.

    Args:
        config: sizes and choices.
        device: device of the weights.
        dtype: dtype of the weights.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.

    Example:
        >>> model = Transformer(TransformerConfig(30, 40, dim=16, heads=2, feed_forward_dim=32, tied="target"))
        >>> source, target = torch.randint(3, 30, (2, 7)), torch.randint(3, 40, (2, 5))
        >>> model(source, target).shape
        torch.Size([2, 5, 40])
        >>> prepared = model.prepare(model.encode(source))  # once a source
        >>> model.decode(target[:, None].expand(-1, 3, -1), prepared).shape  # three targets read each source, no copies
        torch.Size([2, 3, 5, 40])
    """

    family: ClassVar[str] = "transformer"
    config_class: ClassVar[type] = TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        is_learned = config.positions == "learned"
        # One matrix has one name, so that no tied weight is stored or optimised twice.
        self.source_embedding = nn.Embedding(config.source_vocab_size, config.dim) if config.tied != "all" else None
        self.target_embedding = nn.Embedding(config.target_vocab_size, config.dim)
        self.source_positions = nn.Embedding(config.max_length, config.dim) if is_learned else None
        self.target_positions = nn.Embedding(config.max_length, config.dim) if is_learned else None
        self.embedding_dropout = Dropout(config.dropout)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.out_proj = nn.Linear(config.dim, config.target_vocab_size, bias=False) if config.tied == "none" else None
        self.out_bias = nn.Parameter(torch.zeros(config.target_vocab_size)) if config.output_bias else None
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew. The whole policy stands here.

        embeddings and learned positions      normal, deviation 1/sqrt(d): embeddings enter the model with variance 1 (after their
                                              scaling by sqrt(d)), and as output projection give logits of variance about 1
        every other matrix                    uniform within sqrt(6 / (inputs + outputs)) (Xavier), Q, K and V each by itself
        biases                                0
        norms                                 weight 1, bias 0

        Source: the paper gives none; tensor2tensor's transformer_base (initializer "uniform_unit_scaling").
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.dim**-0.5)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(
        self,
        source_ids: Tensor,
        target_ids: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of every next target symbol: `decode(target_ids, prepare(encode(source_ids)))`.

        Args:
            source_ids: symbols (z, m).
            target_ids: symbols (z, n), beginning with `begin_id`.
            source_mask: bool (z, m), True = a real symbol; without it all are.
            target_mask: bool (z, n), likewise. Padding on the right is never read by a real symbol before it, so targets that are
                only filled up need none.

        Returns:
            Logits (z, n, V).

        Raises:
            ValueError: ids that are not integers of shape (z, length), batches that differ, a mask of another shape, more
                symbols than learned positions.
            TypeError: a mask that is not bool.
        """
        _check_ids("target_ids", target_ids, (2,), target_mask)
        if target_ids.shape[0] != source_ids.shape[0]:
            raise ValueError(
                f"source_ids and target_ids must have one batch size, got {tuple(source_ids.shape)} and {tuple(target_ids.shape)}; "
                "several targets for one source go through decode, as (batch, targets, length)"
            )
        states = self.encode(source_ids, source_mask)
        x = self._embed_target(target_ids, 0)
        return self._logits(self.decoder(x, states, source_mask=source_mask, target_mask=target_mask))

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """The encoder's output (z, m, d) for symbols (z, m); Args and Raises as in `forward`."""
        _check_ids("source_ids", source_ids, (2,), source_mask)
        table = self.target_embedding if self.source_embedding is None else self.source_embedding
        return self.encoder(self._embed(source_ids, table, self.source_positions, 0), source_mask)

    def prepare(
        self,
        states: Tensor,
        source_mask: Tensor | None = None,
        *,
        uses: int | None = None,
        query_length: int | None = None,
        repeats: int | None = None,
    ) -> tuple[PreparedContext, ...]:
        """Make of the encoder's output, once, what each decoder layer reads any number of times.

        Args:
            states: what `encode` returned, (z, m, d).
            source_mask: the mask that `encode` got.
            uses: hint: how many times it will be read. Without hints: the key-value cache of the textbook.
            query_length: hint: length of each target that reads it (1 where it is read step by step).
            repeats: hint: how many targets read each source together.

        Returns:
            One prepared context a decoder layer.
        """
        hints = {"uses": uses, "query_length": query_length, "repeats": repeats}
        return tuple(layer.cross_attention.prepare(states, context_mask=source_mask, **hints) for layer in self.decoder.layers)

    def decode(self, target_ids: Tensor, prepared: Sequence[PreparedContext], target_mask: Tensor | None = None) -> Tensor:
        """Logits of every next target symbol, reading a prepared source.

        Args:
            target_ids: symbols (z, n), or (z, r, n): r targets that read each source, which is not copied.
            prepared: what `prepare` returned, for z sources.
            target_mask: bool of the same shape, True = a real symbol.

        Returns:
            Logits (z, n, V) or (z, r, n, V).

        Raises:
            ValueError: as `forward`; also a prepared source of other weights or of another model.
        """
        _check_ids("target_ids", target_ids, (2, 3), target_mask)
        self._check_prepared(prepared)
        x = self._embed_target(target_ids, 0)
        return self._logits(self.decoder.attend(x, prepared, target_mask=target_mask))

    def step(
        self,
        ids: Tensor,
        prepared: Sequence[PreparedContext],
        caches: Sequence[KeyValueCache] | None = None,
    ) -> tuple[Tensor, tuple[KeyValueCache, ...]]:
        """Logits of the symbol after the next one, given that one; all earlier ones are in the caches.

        Args:
            ids: the next symbol of each target, (z, r).
            prepared: what `prepare` returned, for z sources.
            caches: what the last `step` returned; None at the beginning. Not changed. Each has z r rows, row z' r + r' for target
                r' of source z'; `cache.select(rows)` keeps some, copies or reorders them.

        Returns:
            Logits (z, r, V), and the caches with this position in them.

        Raises:
            ValueError: as `decode`; also caches of another number of targets or layers.
        """
        if ids.dim() != 2:
            raise ValueError(f"ids must be (batch, targets of each source), got shape {tuple(ids.shape)}")
        self._check_prepared(prepared)
        if caches is not None and len(caches) != len(self.decoder.layers):
            raise ValueError(f"caches must be one a decoder layer, {len(self.decoder.layers)}, got {len(caches)}")
        start = caches[0].length if caches else 0
        x = self._embed_target(ids.unsqueeze(-1), start)
        x, caches = self.decoder.step(x, prepared, caches or (None,) * len(self.decoder.layers))
        return self._logits(x.squeeze(-2)), caches

    def _embed_target(self, ids: Tensor, start: int) -> Tensor:
        return self._embed(ids, self.target_embedding, self.target_positions, start)

    def _embed(self, ids: Tensor, table: nn.Embedding, learned: nn.Embedding | None, start: int) -> Tensor:
        """Scaled embeddings plus the encodings of positions start, start + 1, ..."""
        end = start + ids.shape[-1]
        if learned is not None and end > self.config.max_length:
            raise ValueError(
                f"a sequence of length {end} is longer than the max_length={self.config.max_length} learned positions; "
                'shorten it, or build the model with a larger max_length or positions="sinusoidal"'
            )
        where = torch.arange(start, end, device=ids.device)
        x = table(ids) * math.sqrt(self.config.dim)
        added = sinusoidal_positions(where, self.config.dim, dtype=x.dtype) if learned is None else learned(where)
        return self.embedding_dropout(x + added)

    def _logits(self, x: Tensor) -> Tensor:
        if self.out_proj is None:
            return F.linear(x, self.target_embedding.weight, self.out_bias)
        return self.out_proj(x) if self.out_bias is None else self.out_proj(x) + self.out_bias

    def _check_prepared(self, prepared: Sequence[PreparedContext]) -> None:
        if isinstance(prepared, PreparedContext) or len(prepared) != len(self.decoder.layers):
            given = "a single one" if isinstance(prepared, PreparedContext) else str(len(prepared))
            raise ValueError(
                f"prepared must hold one prepared context a decoder layer, {len(self.decoder.layers)}, got {given}; "
                "pass what this model's prepare(states) returned"
            )


def _check_ids(name: str, ids: Tensor, dims: tuple[int, ...], mask: Tensor | None) -> None:
    """Refuse ids that are no integers or of a wrong number of dimensions, and a mask that is not theirs."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.dim() not in dims or ids.dtype not in (torch.int64, torch.int32):
        shapes = " or ".join({2: "(batch, length)", 3: "(batch, targets, length)"}[dim] for dim in dims)
        raise ValueError(f"{name} must be int64 or int32 of shape {shapes}, got {ids.dtype} of shape {tuple(ids.shape)}")
    if mask is None:
        return
    mask_name = name.replace("_ids", "_mask")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given, remedy = (f"{mask.dtype}", "; pass mask.bool()") if isinstance(mask, Tensor) else (type(mask).__name__, "")
        raise TypeError(f"{mask_name} must be bool with True at real symbols, got {given}{remedy}")
    if mask.shape != ids.shape:
        raise ValueError(f"{mask_name} must have the shape of {name}, {tuple(ids.shape)}, got {tuple(mask.shape)}")


# ------------------------------------------------------------------------------------------------------------- loss


def label_smoothed_cross_entropy(logits: Tensor, labels: Tensor, *, pad_id: int, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy against smoothed labels, mean over the real ones.

    -sum over v of q(v) log softmax(logits)(v),   q = (1 - smoothing) at the label + smoothing / (V - 1) at every symbol but padding

    Args:
        logits: (..., V).
        labels: symbols (...); `pad_id` where there is none.
        pad_id: the symbol that is no label and gets no share of the smoothing.
        smoothing: share of the probability that is spread evenly.

    Returns:
        A scalar, computed in float32 at least; 0 if no label is real.

    Raises:
        ValueError: shapes that do not match, a smoothing outside [0, 1), a `pad_id` outside the vocabulary.

    Source: Vaswani et al. 2017, section 5.4; Szegedy et al. 2016, arXiv:1512.00567, section 7. Without padding it equals
        `torch.nn.functional.cross_entropy(label_smoothing=...)`, whose share for padding is spread over the others here.

    Example:
        >>> label_smoothed_cross_entropy(torch.zeros(1, 2, 5), torch.tensor([[3, 0]]), pad_id=0)  # log 5
        tensor(1.6094)
    """
    vocab_size = logits.shape[-1]
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits must be (*labels, V), got {tuple(logits.shape)} for labels {tuple(labels.shape)}")
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
    if not 0 <= pad_id < vocab_size:
        raise ValueError(f"pad_id={pad_id} is outside the {vocab_size} symbols")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    share = smoothing / (vocab_size - 1)
    q = torch.full_like(logits, share, requires_grad=False)
    q[..., pad_id] = 0.0
    q.scatter_(-1, labels.unsqueeze(-1), 1.0 - smoothing + share)
    losses = F.cross_entropy(logits.flatten(0, -2), q.flatten(0, -2), reduction="none")
    is_real = (labels != pad_id).flatten()
    return losses.masked_fill(~is_real, 0.0).sum() / is_real.sum().clamp(min=1)
