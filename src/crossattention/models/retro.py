"""RETRO: a language model that reads, chunk by chunk, the neighbours of what it has just seen.

Borgeaud, Mensch, Hoffmann, Cai, Rutherford, Millican and others: "Improving language models by retrieving from trillions of
tokens", 2021, arXiv:2112.04426. Where neighbours come from is for `crossattention.retrieval`, or any callable, to say; here they
are tokens.

    h = sqrt(d) E[ids];  for each layer p:
                                     h = h + attention(norm(h))                causal, over the sequence
                                     if p is the first of P:  e = encoder(neighbours, h)
                                     if p is in P:            h = h + cca(norm(h), e)
                                     h = h + feed_forward(norm(h))
    logits = norm(h) E^T

Chunk u is the tokens u c ... u c + c - 1. Its neighbours can be looked up once it is whole, so its last token is the first that
reads them, and the last but one of the next chunk is the last:

    cca(a, e) at position i = attention(a_i, e_u),   u = (i + 1) // c - 1;   zero where u = -1, the first c - 1 positions

Each neighbour is a chunk and its continuation. The encoder reads it in both directions and, where the config says so, reads the
activations h of the chunk it was retrieved for; all k neighbours of a chunk are then one context of k r positions.

Positions are Transformer-XL's everywhere (`RelativeLogits`): by the distance i - j in the sequence, and with positions counted from
the beginning of chunk u in its neighbours, so that the k neighbours stand on the same places and their order says nothing.

Where the paper is silent, contradicts itself or its figures decide:
- the layers of P are every third from the sixth (section 2.4 and table 12; table 10 says from the ninth): with these the parameters
  of all four sizes come out as published (tests/models/test_retro.py);
- the encoder has 16 heads of width 64 beside all four decoders, for the same reason;
- every sublayer reads a root-mean-square norm of its input, as GPT-2, after which the paper builds, has norms; both stacks end with
  one, and the encoder reads a norm of the chunk's activations;
- projections have no biases but Transformer-XL's two (u, the query projection's, and v, the position part's); without one in the
  outputs, a token that may read nothing is updated by nothing;
- scores are divided by the square root of the head width, which the paper's equation and listing leave out;
- input and output embedding are one matrix (`tied`), so that its rows enter both stacks times the root of their width, as in the
  Transformer: beside sublayers' outputs of variance 1 a token would else hardly show; the encoder's is its own unless
  `shared_embedding`, the paper's ablation.

Legend: z batch, n length, t new tokens, c tokens of a chunk, l chunks, k neighbours, r their length, d/b widths of decoder and
encoder, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention.checks import check_switches
from crossattention.attention.cross_attention import CrossAttention
from crossattention.attention.prepared import PreparedContext
from crossattention.attention.products import is_plain_linear
from crossattention.attention.self_attention import KeyValueCache, SelfAttention
from crossattention.layers.cross_entropy import summed_cross_entropy
from crossattention.layers.dropout import Dropout
from crossattention.layers.feed_forward import ACTIVATIONS, FeedForward
from crossattention.layers.norms import RMSNorm
from crossattention.layers.positions import RelativeLogits
from crossattention.models.generate import draw_from
from crossattention.models.pretrained import Pretrained

Retrieve = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Tokens of chunks (z, c) to their neighbours (z, k, r) and which of those tokens are real (z, k, r), None if all are."""

# ------------------------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class RetroConfig:
    """Sizes and choices of a `Retro`; the defaults are the paper's smallest, but for the vocabulary.

    Args:
        vocab_size: number of symbols, V.
        dim: width of the decoder, d; even.
        heads: attention heads of the decoder, of self- and cross-attention.
        head_dim: their width; heads * head_dim need not be dim.
        layers: layers of the decoder.
        feed_forward_dim: width inside its feed-forward layers.
        cross_layers: the layers, counted from 1, that read the neighbours; none makes a plain language model.
        encoder_dim: width of the encoder, b; even.
        encoder_heads: its attention heads.
        encoder_head_dim: their width.
        encoder_layers: its layers.
        encoder_feed_forward_dim: width inside its feed-forward layers.
        encoder_cross_layers: its layers, counted from 1, that read the chunk's activations; none leaves it unconditioned.
        chunk_length: tokens of a chunk, c.
        neighbour_length: most tokens of a neighbour with its continuation, r; default two chunks.
        max_length: distances of tokens in the sequence beyond it count as it; sequences may be longer.
        activation: "gelu", "relu" or "silu", in the feed-forward layers.
        dropout: on embeddings and on each sublayer's output.
        tied: whether the output projection is the decoder's embedding.
        shared_embedding: whether the encoder uses the decoder's embedding; their widths must be equal.
        norm_eps: added to the mean square in each norm.

    Raises:
        ValueError: a size below 1, an odd width, layers that are not there or not in ascending order, an unknown activation, a
            dropout outside [0, 1), embeddings of two widths to be shared.
    """

    vocab_size: int
    dim: int = 896
    heads: int = 16
    head_dim: int = 64
    layers: int = 12
    feed_forward_dim: int = 3584
    cross_layers: tuple[int, ...] = (6, 9, 12)
    encoder_dim: int = 896
    encoder_heads: int = 16
    encoder_head_dim: int = 64
    encoder_layers: int = 2
    encoder_feed_forward_dim: int = 3584
    encoder_cross_layers: tuple[int, ...] = (1,)
    chunk_length: int = 64
    neighbour_length: int | None = None
    max_length: int = 2048
    activation: str = "gelu"
    dropout: float = 0.0
    tied: bool = True
    shared_embedding: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.neighbour_length is None:
            object.__setattr__(self, "neighbour_length", 2 * _checked_size("chunk_length", self.chunk_length))
        for name in (field.name for field in fields(self) if field.type in ("int", "int | None")):
            _checked_size(name, getattr(self, name))
        for name in ("dim", "encoder_dim"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name} must be even, as positions are sinusoids, got {getattr(self, name)}")
        for name, count in (("cross_layers", self.layers), ("encoder_cross_layers", self.encoder_layers)):
            object.__setattr__(self, name, _checked_layers(name, getattr(self, name), count))
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        check_switches(self)
        if self.shared_embedding and self.encoder_dim != self.dim:
            raise ValueError(
                f"shared_embedding needs one width, got dim={self.dim} and encoder_dim={self.encoder_dim}; make them equal or "
                "give the encoder an embedding of its own"
            )

    @property
    def furthest_place(self) -> int:
        """The largest distance between a token and a place in its neighbours, or between two places of one."""
        assert self.neighbour_length is not None
        return max(self.neighbour_length, 2 * self.chunk_length)


def _checked_size(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def _checked_layers(name: str, given: Any, count: int) -> tuple[int, ...]:
    """Numbers of layers, as a tuple whatever a file made of it."""
    if not isinstance(given, tuple | list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in given):
        raise ValueError(f"{name} must be a tuple of layers counted from 1, got {given!r}")
    if list(given) != sorted(set(given)) or (given and not 1 <= min(given) <= max(given) <= count):
        raise ValueError(f"{name} must be ascending numbers of layers from 1 to {count}, got {tuple(given)}")
    return tuple(given)


def retro_172m(vocab_size: int = 128_000, **changes: Any) -> RetroConfig:
    """The paper's smallest: 172.5 M parameters without embeddings, on a decoder of 132 M.

    Args:
        vocab_size: number of symbols.
        changes: fields of `RetroConfig` that shall differ; cross_layers=() gives the decoder alone.

    Source: Borgeaud et al. 2021, tables 2 and 10.
    """
    return RetroConfig(**{"vocab_size": vocab_size, **changes})


def retro_425m(vocab_size: int = 128_000, **changes: Any) -> RetroConfig:
    """425.5 M parameters without embeddings, on a decoder of 368 M; Args and Source as `retro_172m`."""
    sizes = {"dim": 1536, "heads": 12, "head_dim": 128, "layers": 12, "feed_forward_dim": 6144}
    return retro_172m(vocab_size, **{**sizes, **changes})


def retro_1_5b(vocab_size: int = 128_000, **changes: Any) -> RetroConfig:
    """1,451.4 M parameters without embeddings, on a decoder of 1,309 M; Args and Source as `retro_172m`."""
    sizes = {"dim": 2048, "heads": 16, "head_dim": 128, "layers": 24, "feed_forward_dim": 8192}
    return retro_172m(vocab_size, **{**sizes, "cross_layers": tuple(range(6, 25, 3)), **changes})


def retro_7_5b(vocab_size: int = 128_000, **changes: Any) -> RetroConfig:
    """7,531.5 M parameters without embeddings, on a decoder of 6,982 M; Args and Source as `retro_172m`."""
    sizes = {"dim": 4096, "heads": 32, "head_dim": 128, "layers": 32, "feed_forward_dim": 16384}
    return retro_172m(vocab_size, **{**sizes, "cross_layers": tuple(range(6, 33, 3)), **changes})


# ----------------------------------------------------------------------------------------------------------- blocks


class ChunkedCrossAttention(nn.Module):
    """Each chunk's neighbours, read from its last token on, up to the last but one of the next chunk.

    out_i = attention(a_i, the k r positions of e_u),   u = (i + 1) // c - 1;   zero for i < c - 1, and where nothing may be read

    A query at i stands at i - u c, a neighbour's positions at 0, 1, ... in every neighbour.

    Args:
        dim: width of the sequence, d.
        context_dim: width of the encoded neighbours, b.
        heads: attention heads.
        head_dim: their width.
        chunk_length: tokens of a chunk, c.
        furthest: largest distance of a query and a neighbour's position.

    Cost: with k neighbours of r positions a chunk, c k r (2 head_dim) multiply-adds a head and chunk, and two projections of the
        k r positions: linear in the length of the sequence.
    Source: Borgeaud et al. 2021, section 2.4, listing 1 and eq. 6.

    Example:
        >>> layer = ChunkedCrossAttention(12, 8, heads=3, head_dim=4, chunk_length=5, furthest=10)
        >>> out = layer(torch.randn(2, 13, 12), torch.randn(2, 2, 3, 10, 8))
        >>> out.shape, out[:, :4].any().item(), out[:, 4:].all().item()
        (torch.Size([2, 13, 12]), False, True)
    """

    def __init__(self, dim: int, context_dim: int, *, heads: int, head_dim: int, chunk_length: int, furthest: int) -> None:
        super().__init__()
        self.chunk_length = chunk_length
        positions = RelativeLogits(dim, heads, head_dim, max_distance=furthest)
        self.attention = CrossAttention(dim, context_dim, heads=heads, head_dim=head_dim, bias=("q_proj",), positions=positions)

    def forward(self, a: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """What a sequence reads of the encoded neighbours of its whole chunks.

        Args:
            a: the sequence (z, n, d).
            states: the neighbours (z, n // c, k, r, b).
            mask: bool (z, n // c, k, r), True = may be read.

        Returns:
            (z, n, d), zero in the first c - 1 positions.
        """
        before = min(a.shape[1], self.chunk_length - 1)
        read = [a.new_zeros(a.shape[0], before, a.shape[2])]
        if before < a.shape[1]:
            contexts, hints = self._contexts(states, mask)
            read.append(self._by_chunk(a[:, before:], lambda x, at: self.attention(x, contexts, query_positions=at, **hints)))
        return torch.cat(read, 1)

    def prepare(self, states: Tensor, mask: Tensor | None = None) -> PreparedContext:
        """Project the encoded neighbours (z, l, k, r, b) of chunks once: z l contexts for `attend` and `attend_chunks`."""
        contexts, hints = self._contexts(states, mask)
        return self.attention.prepare(contexts, **hints)

    def attend(self, a: Tensor, prepared: PreparedContext, place: int) -> Tensor:
        """What tokens (z, t, d) read of one chunk's neighbours; the first token stands `place` from that chunk's beginning."""
        at = torch.arange(place, place + a.shape[1], device=a.device)
        return self.attention.attend(a, prepared, query_positions=at)

    def attend_chunks(self, a: Tensor, prepared: PreparedContext) -> Tensor:
        """What tokens (z, t, d) read of l chunks' neighbours (z l contexts); the first token is the last of the first chunk."""
        return self._by_chunk(a, lambda x, at: self.attention.attend(x, prepared, query_positions=at))

    def _by_chunk(self, a: Tensor, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Tokens laid out as (z l, c, d), a row for each chunk's neighbours; the last is filled up, and what that reads dropped."""
        z, t, d = a.shape
        c = self.chunk_length
        chunks = -(-t // c)
        if chunks == 1:
            return read(a, torch.arange(c - 1, c - 1 + t, device=a.device))
        filled = F.pad(a, (0, 0, 0, chunks * c - t)).view(z * chunks, c, d)
        return read(filled, torch.arange(c - 1, 2 * c - 1, device=a.device)).view(z, chunks * c, -1)[:, :t]

    def _contexts(self, states: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """The neighbours of each chunk end to end, (z l, k r, b), and how they are masked and placed."""
        k, r = states.shape[2:4]
        places = torch.arange(r, device=states.device).repeat(k)
        real = None if mask is None else mask.reshape(-1, k * r)
        return states.reshape(-1, k * r, states.shape[4]), {"context_mask": real, "context_positions": places}


class RetroEncoderLayer(nn.Module):
    """Self-attention within a neighbour, in some layers cross-attention to the chunk that it is a neighbour of, feed-forward."""

    def __init__(self, config: RetroConfig, *, reads_chunk: bool) -> None:
        super().__init__()
        b, heads, head_dim, furthest = config.encoder_dim, config.encoder_heads, config.encoder_head_dim, config.furthest_place
        self.self_attention_norm = RMSNorm(b, eps=config.norm_eps)
        positions = RelativeLogits(b, heads, head_dim, max_distance=furthest)
        self.self_attention = SelfAttention(b, heads=heads, head_dim=head_dim, bias=("q_proj",), positions=positions)
        self.cross_attention_norm = self.chunk_norm = self.cross_attention = None
        if reads_chunk:
            self.cross_attention_norm = RMSNorm(b, eps=config.norm_eps)
            self.chunk_norm = RMSNorm(config.dim, eps=config.norm_eps)
            positions = RelativeLogits(b, heads, head_dim, max_distance=furthest)
            self.cross_attention = CrossAttention(
                b, config.dim, heads=heads, head_dim=head_dim, bias=("q_proj",), positions=positions
            )
        self.feed_forward_norm = RMSNorm(b, eps=config.norm_eps)
        self.feed_forward = FeedForward(b, config.encoder_feed_forward_dim, activation=config.activation, bias=False)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, chunks: Tensor, mask: Tensor | None) -> Tensor:
        """One layer on neighbours (y, k, r, b) of y chunks (y, c, d), reading where mask (y k, r) is True."""
        flat = x.flatten(0, 1)
        x = self.dropout(self.self_attention(self.self_attention_norm(flat), mask=mask), flat).view_as(x)
        if self.cross_attention is not None:  # the k neighbours read one chunk, which is projected once
            assert self.cross_attention_norm is not None and self.chunk_norm is not None
            x = self.dropout(self.cross_attention(self.cross_attention_norm(x), self.chunk_norm(chunks)), x)
        return self.dropout(self.feed_forward(self.feed_forward_norm(x)), x)


class RetroEncoder(nn.Module):
    """Neighbours to states that the decoder reads.

    Args:
        config: sizes and choices.
    """

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.embedding = None if config.shared_embedding else nn.Embedding(config.vocab_size, config.encoder_dim)
        self.embedding_dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(
            RetroEncoderLayer(config, reads_chunk=number in config.encoder_cross_layers)
            for number in range(1, config.encoder_layers + 1)
        )
        self.norm = RMSNorm(config.encoder_dim, eps=config.norm_eps)

    def forward(self, ids: Tensor, chunks: Tensor, mask: Tensor | None, table: nn.Embedding) -> Tensor:
        """States (z, l, k, r, b) of neighbours (z, l, k, r) of chunks (z, l, c, d); `table` is the decoder's embedding.

        A neighbour's state depends on that neighbour and its chunk alone.
        """
        embedding = table if self.embedding is None else self.embedding
        x = self.embedding_dropout(embedding(ids.flatten(0, 1)) * embedding.embedding_dim**0.5)
        chunks, mask = chunks.flatten(0, 1), None if mask is None else mask.flatten(0, 2)
        for layer in self.layers:
            x = layer(x, chunks, mask)
        return self.norm(x).unflatten(0, ids.shape[:2])


class RetroLayer(nn.Module):
    """Causal self-attention, in some layers chunked cross-attention to the neighbours, feed-forward."""

    def __init__(self, config: RetroConfig, *, reads_neighbours: bool) -> None:
        super().__init__()
        d, heads, head_dim = config.dim, config.heads, config.head_dim
        self.self_attention_norm = RMSNorm(d, eps=config.norm_eps)
        positions = RelativeLogits(d, heads, head_dim, max_distance=config.max_length)
        self.self_attention = SelfAttention(d, heads=heads, head_dim=head_dim, bias=("q_proj",), positions=positions, causal=True)
        self.cross_attention_norm = self.cross_attention = None
        if reads_neighbours:
            self.cross_attention_norm = RMSNorm(d, eps=config.norm_eps)
            self.cross_attention = ChunkedCrossAttention(
                d,
                config.encoder_dim,
                heads=heads,
                head_dim=head_dim,
                chunk_length=config.chunk_length,
                furthest=config.furthest_place,
            )
        self.feed_forward_norm = RMSNorm(d, eps=config.norm_eps)
        self.feed_forward = FeedForward(d, config.feed_forward_dim, activation=config.activation, bias=False)
        self.dropout = Dropout(config.dropout)

    def read_itself(self, x: Tensor) -> Tensor:
        """The sequence x (z, n, d) after its self-attention."""
        return self.dropout(self.self_attention(self.self_attention_norm(x)), x)

    def step_itself(self, x: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        """The same of the next tokens alone."""
        update, cache = self.self_attention.step(self.self_attention_norm(x), cache)
        return self.dropout(update, x), cache

    def transform(self, x: Tensor) -> Tensor:
        """The sequence after its feed-forward layer."""
        return self.dropout(self.feed_forward(self.feed_forward_norm(x)), x)


# ------------------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True)
class RetroState:
    """What a `Retro` remembers of a sequence between two steps: passed in, returned longer, never changed.

    Of all neighbours that were read it keeps those that the next token may read, projected; its size grows with the tokens alone.

    Args:
        caches: keys and values of the tokens so far, one a layer.
        unfinished: activations (z, length % c, d) of the tokens of the chunk that is not whole yet, which its neighbours will be
            conditioned on.
        prepared: the last whole chunk's neighbours, one a layer that reads them; None if it has none.
    """

    caches: tuple[KeyValueCache, ...]
    unfinished: Tensor
    prepared: tuple[PreparedContext, ...] | None

    @property
    def length(self) -> int:
        """Number of tokens seen."""
        return self.caches[0].length

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps alive."""
        kept = [self.unfinished, *(t for cache in self.caches for t in (cache.keys, cache.values))]
        return sum(t.numel() * t.element_size() for t in kept) + sum(p.nbytes for p in self.prepared or ())


class _Found(NamedTuple):
    """The neighbours of the chunks that are whole now."""

    ids: Tensor  # (z, l, k, r)
    mask: Tensor | None


class Retro(Pretrained, nn.Module):
    """A decoder that reads the neighbours of its own chunks.

    Without neighbours it is the plain language model of the same weights, to the bit; with `cross_layers=()` it is nothing else.

    Args:
        config: sizes and choices.
        device: device of the weights.
        dtype: dtype of the weights.

    Cost: the encoder's tokens are k r / c times the decoder's, read in a narrower and shallower stack; cross-attention is linear in
        the length.
    Source: Borgeaud et al. 2021, algorithm 1.

    Example:
        >>> config = RetroConfig(30, dim=16, heads=2, head_dim=8, layers=3, feed_forward_dim=32, cross_layers=(2,), encoder_dim=12,
        ...     encoder_heads=2, encoder_head_dim=6, encoder_layers=1, encoder_feed_forward_dim=24, chunk_length=4)
        >>> model = Retro(config)
        >>> ids, neighbours = torch.randint(30, (2, 11)), torch.randint(30, (2, 2, 3, 8))
        >>> model(ids, neighbours).shape  # two whole chunks of 4, three neighbours of 8 tokens each
        torch.Size([2, 11, 30])
    """

    family: ClassVar[str] = "retro"
    config_class: ClassVar[type] = RetroConfig

    def __init__(
        self,
        config: RetroConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.embedding_dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(
            RetroLayer(config, reads_neighbours=number in config.cross_layers) for number in range(1, config.layers + 1)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.out_proj = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.encoder = RetroEncoder(config) if config.cross_layers else None
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew. The whole policy stands here.

        embeddings               normal, deviation 1/sqrt(width): as output projection they give logits of variance 1
        outputs of sublayers     normal, deviation 1/sqrt(inputs) / sqrt(number of sublayers of the stack), as in GPT-2
        every other matrix       normal, deviation 1/sqrt(inputs)
        biases                   0, of queries and of positions
        norms                    1
        head 0 of the decoder's first self-attention looks at the token before (`RelativeLogits.begin_at`); in the encoder's first,
        head 0 at the token before and head 1, where there is one, at the token behind
        keys of cross-attention  as the queries, where decoder and encoder are of one width and heads

        The last two give a token's own reading of a neighbour a start: queries and keys begin alike, so a token finds where it, and
        what stood before it, stands in a neighbour; and what it reads there holds the token behind. Without them the reading of
        neighbours begins as noise, and a small model takes many times the steps to learn that text can be copied (dev/LOG.md).

        Source: the paper gives none; the division: Radford et al. 2019, section 2.3; heads that look at the token before are what
        copying is built on: Olsson et al. 2022, arXiv:2209.11895.
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RelativeLogits) and module.bias is not None:
                nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for stack in (self, self.encoder):
            if stack is not None:
                outputs = [weight for name, weight in stack.layers.named_parameters() if name.endswith(_OUTPUTS)]
                for weight in outputs:
                    weight.div_(len(outputs) ** 0.5)
        if self.encoder is not None:
            self._begin_to_copy()

    def _begin_to_copy(self) -> None:
        assert self.encoder is not None
        self.layers[0].self_attention.positions.begin_at(0, 1)
        positions = self.encoder.layers[0].self_attention.positions
        for head, distance in zip(range(positions.heads), (1, -1), strict=False):
            positions.begin_at(head, distance)
        for layer in self.layers:
            if layer.cross_attention is not None:
                attention = layer.cross_attention.attention
                if attention.k_proj.weight.shape == attention.q_proj.weight.shape:
                    attention.k_proj.weight.copy_(attention.q_proj.weight)

    # --------------------------------------------------------------------------------------------------- running

    def forward(
        self,
        ids: Tensor,
        neighbours: Tensor | None = None,
        neighbour_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits of every next token, or what they cost.

        Args:
            ids: tokens (z, n); any length.
            neighbours: tokens (z, n // c, k, r) of the k neighbours of each whole chunk, each with its continuation. None turns
                retrieval off.
            neighbour_mask: bool, of the same shape, True = a real token; a neighbour without one is none, and a chunk may have no
                neighbour at all. Without a mask all are real.
            labels: the next tokens (z, n), -100 where none is scored: the sum of their cross-entropies in nats is returned, and
                the logits are never whole (`layers.cross_entropy`).

        Returns:
            Logits (z, n, V), or with labels one number; those at position i are for token i + 1. The neighbours of chunk u bear on
            positions u c + c - 1 to u c + 2 c - 2.

        Raises:
            ValueError: ids that are not integers of these shapes, neighbours longer than the config's, neighbours for a model that
                reads none, a mask of another shape or without neighbours.
            TypeError: a mask that is not bool.
        """
        _check_ids("ids", ids, 2, "(batch, length)")
        found = self._checked(ids, neighbours, neighbour_mask, 0)
        x, states = self._embedded(ids), None
        for layer in self.layers:
            x = layer.read_itself(x)
            if found is not None and layer.cross_attention is not None:
                if states is None:
                    whole = x[:, : found.ids.shape[1] * self.config.chunk_length]
                    states = self._encoded(found, whole)
                update = layer.cross_attention(layer.cross_attention_norm(x), states, found.mask)
                x = layer.dropout(update, x)
            x = layer.transform(x)
        return self._logits(x) if labels is None else self._nats(x, labels)

    def step(
        self,
        ids: Tensor,
        state: RetroState | None = None,
        neighbours: Tensor | None = None,
        neighbour_mask: Tensor | None = None,
    ) -> tuple[Tensor, RetroState]:
        """Logits after each of the next tokens; all earlier ones, and the neighbours that may still be read, are in the state.

        Args:
            ids: the next tokens (z, t), one or more.
            state: what the last `step` returned; None at the beginning. Not changed.
            neighbours: tokens (z, l, k, r) of the neighbours of the l chunks that these tokens make whole, l = (length + t) // c -
                length // c; None leaves those chunks without.
            neighbour_mask: bool, of the same shape, True = a real token.

        Returns:
            Logits (z, t, V), the same as `forward` gives for the whole sequence; the state with these tokens in it.

        Raises:
            ValueError: as `forward`; also a state of another batch or another model.

        Cost: that of t tokens; the neighbours of a chunk are encoded and projected once, in the step that makes it whole.
        """
        _check_ids("ids", ids, 2, "(batch, tokens)")
        start, c = 0 if state is None else state.length, self.config.chunk_length
        if not ids.shape[1]:
            raise ValueError(f"step needs at least one token, got ids of shape {tuple(ids.shape)}")
        self._check_state(state, ids)
        found = self._checked(ids, neighbours, neighbour_mask, start)
        before = min(ids.shape[1], c - 1 - start % c)  # tokens that still read what the state has prepared
        x, states, unfinished = self._embedded(ids), None, None
        caches: list[KeyValueCache] = []
        prepared: list[PreparedContext] = []
        olds = iter(() if state is None or state.prepared is None else state.prepared)
        for layer, cache in zip(self.layers, state.caches if state else (None,) * len(self.layers), strict=True):
            x, cache = layer.step_itself(x, cache)
            caches.append(cache)
            if layer.cross_attention is not None:
                if unfinished is None:
                    unfinished = x if state is None else torch.cat((state.unfinished, x), 1)
                    whole = unfinished[:, : unfinished.shape[1] // c * c]
                    unfinished = unfinished[:, whole.shape[1] :].clone()
                    states = None if found is None else self._encoded(found, whole)
                old = next(olds, None)
                new = None if states is None or found is None else layer.cross_attention.prepare(states, found.mask)
                x = self._read_neighbours(layer, x, before, old, new, start % c + c)
                kept = new if before < x.shape[1] else old
                if kept is not None:
                    prepared.append(_last_chunk_of(kept, x.shape[0]))
            x = layer.transform(x)
        if unfinished is None:
            unfinished = x[:, :0]
        return self._logits(x), RetroState(tuple(caches), unfinished, tuple(prepared) or None)

    def _read_neighbours(
        self, layer: Any, x: Tensor, before: int, old: PreparedContext | None, new: PreparedContext | None, place: int
    ) -> Tensor:
        """The next tokens after their cross-attention: `before` of them read old neighbours, the rest new ones."""
        if old is None and new is None:
            return x
        a = layer.cross_attention_norm(x)
        read = []
        if before:
            first = a[:, :before]
            read.append(torch.zeros_like(first) if old is None else layer.cross_attention.attend(first, old, place))
        if before < a.shape[1]:
            rest = a[:, before:]
            read.append(torch.zeros_like(rest) if new is None else layer.cross_attention.attend_chunks(rest, new))
        return layer.dropout(torch.cat(read, 1), x)

    def _embedded(self, ids: Tensor) -> Tensor:
        return self.embedding_dropout(self.embedding(ids) * self.config.dim**0.5)

    def _encoded(self, found: _Found, whole: Tensor) -> Tensor:
        """States (z, l, k, r, b) of neighbours, conditioned on their chunks' activations (z, l c, d)."""
        assert self.encoder is not None
        chunks = whole.unflatten(1, (found.ids.shape[1], self.config.chunk_length))
        states: Tensor = self.encoder(found.ids, chunks, found.mask, self.embedding)
        return states

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.out_proj is None else self.out_proj(x)

    def _nats(self, x: Tensor, labels: Tensor) -> Tensor:
        """The summed cross-entropy of what `_logits` gives."""
        _check_ids("labels", labels, 2, "(batch, length)")
        if labels.shape != x.shape[:2]:
            raise ValueError(f"labels must be one for each token, {tuple(x.shape[:2])}, got {tuple(labels.shape)}")
        if self.out_proj is not None and not is_plain_linear(self.out_proj):
            logits = self._logits(x)
            wide = torch.promote_types(logits.dtype, torch.float32)
            return F.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten().long(), reduction="sum")
        return summed_cross_entropy(self.norm(x), self.embedding.weight if self.out_proj is None else self.out_proj.weight, labels)

    # ---------------------------------------------------------------------------------------------- continuation

    @torch.no_grad()
    def greedy(self, ids: Tensor, retrieve: Retrieve | None = None, *, new_tokens: int, end_id: int | None = None) -> Tensor:
        """Continue texts by the most probable token at every step.

        Args:
            ids: their tokens so far, (z, n), one or more.
            retrieve: gets the tokens (z, c) of each chunk once, as soon as it is whole, in order, and returns their neighbours
                (z, k, r) and which tokens of them are real, bool (z, k, r) or None; None turns retrieval off.
            new_tokens: how many tokens to add.
            end_id: a token after which a text ends; the rest is filled up with it, and when all have ended, nothing more is added.

        Returns:
            The texts (z, n + new_tokens), or shorter where all ended. They are what `forward` would choose, given the same
            neighbours.

        Raises:
            ValueError: a model in training mode, no token to begin with, `new_tokens` below 1, retrieval for a model that reads no
                neighbours, and what `forward` refuses.

        Cost: one step a token (see `step`); the neighbours of one chunk are kept at a time.
        """
        return self._continue(ids, retrieve, new_tokens, end_id, lambda logits: logits.argmax(-1))

    @torch.no_grad()
    def sample(
        self,
        ids: Tensor,
        retrieve: Retrieve | None = None,
        *,
        new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        end_id: int | None = None,
    ) -> Tensor:
        """Continue texts by tokens that are drawn.

        Args:
            ids: as in `greedy`; a text given several times gets several continuations.
            retrieve: as in `greedy`.
            new_tokens: as in `greedy`.
            temperature: divides the logits; below 1 sharper, above 1 flatter.
            top_k: draw from the k most probable tokens only.
            top_p: draw from the fewest tokens whose probability reaches p only (after `temperature` and `top_k`).
            generator: source of randomness, on the device of the logits.
            end_id: as in `greedy`.

        Returns:
            The texts, as `greedy`.

        Raises:
            ValueError: as `greedy`; a temperature not above 0, `top_k` below 1, `top_p` outside (0, 1].

        Cost: as `greedy`.
        """
        draw = draw_from(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        return self._continue(ids, retrieve, new_tokens, end_id, lambda logits: draw(logits.unsqueeze(1)).squeeze(1))

    def _continue(
        self, ids: Tensor, retrieve: Retrieve | None, new_tokens: int, end_id: int | None, choose: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Add tokens that `choose` takes of logits (z, V)."""
        _check_ids("ids", ids, 2, "(batch, length)")
        if self.training:
            raise ValueError("the model is in training mode, so dropout would change what it writes; call model.eval() first")
        if not ids.shape[1]:
            raise ValueError(f"a text must have a token to begin with, got ids of shape {tuple(ids.shape)}")
        _checked_size("new_tokens", new_tokens)
        if retrieve is not None and self.encoder is None:
            raise ValueError("this model has no cross_layers, so it reads no neighbours; leave retrieve out")
        logits, state = self.step(ids, None, *self._retrieved(ids, 0, retrieve))
        has_ended = torch.zeros_like(ids[:, 0], dtype=torch.bool)
        for added in range(1, new_tokens + 1):
            chosen = choose(logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32))).to(ids.dtype)
            if end_id is not None:
                chosen = chosen.masked_fill(has_ended, end_id)
                has_ended = has_ended | (chosen == end_id)
            ids = torch.cat((ids, chosen.unsqueeze(1)), 1)
            if added == new_tokens or bool(has_ended.all()):
                break
            logits, state = self.step(ids[:, -1:], state, *self._retrieved(ids, state.length, retrieve))
        return ids

    def _retrieved(self, ids: Tensor, start: int, retrieve: Retrieve | None) -> tuple[Tensor | None, Tensor | None]:
        """The neighbours of the chunks that become whole after the first `start` tokens, asked for one by one."""
        c = self.config.chunk_length
        chunks = range(start // c, ids.shape[1] // c)
        if retrieve is None or not chunks:
            return None, None
        found = [retrieve(ids[:, u * c : u * c + c]) for u in chunks]
        neighbours = torch.stack([ids for ids, _ in found], 1)
        if all(mask is None for _, mask in found):
            return neighbours, None
        masks = [torch.ones_like(ids, dtype=torch.bool) if mask is None else mask for ids, mask in found]
        return neighbours, torch.stack(masks, 1)

    # -------------------------------------------------------------------------------------------------- border

    def _checked(self, ids: Tensor, neighbours: Tensor | None, mask: Tensor | None, start: int) -> _Found | None:
        """The neighbours of the chunks that tokens make whole which follow `start` others; None without any."""
        if neighbours is None:
            if mask is not None:
                raise ValueError("neighbour_mask was passed without neighbours; pass both, or neither to turn retrieval off")
            return None
        if self.encoder is None:
            raise ValueError("neighbours were passed, but this model has no cross_layers to read them; leave them out")
        _check_ids("neighbours", neighbours, 4, "(batch, whole chunks, neighbours, their length)")
        c, furthest = self.config.chunk_length, self.config.neighbour_length
        whole = (start + ids.shape[1]) // c - start // c
        if tuple(neighbours.shape[:2]) != (ids.shape[0], whole):
            after = f" after {start} others" if start else ""
            raise ValueError(
                f"{ids.shape[1]} tokens{after} make {whole} chunks of {c} whole, so neighbours must be ({ids.shape[0]}, {whole}, "
                f"k, r), got {tuple(neighbours.shape)}"
            )
        if neighbours.shape[3] > furthest:
            raise ValueError(
                f"neighbours are {neighbours.shape[3]} tokens long, but the config's neighbour_length is {furthest}; cut them, or "
                "build the model with a larger one"
            )
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"neighbour_mask must be bool with True at real tokens, got {given}; pass mask.bool()")
            if mask.shape != neighbours.shape:
                raise ValueError(
                    f"neighbour_mask must have the shape of neighbours, {tuple(neighbours.shape)}, got {tuple(mask.shape)}"
                )
        return _Found(neighbours, mask) if neighbours.numel() else None

    def _check_state(self, state: RetroState | None, ids: Tensor) -> None:
        if state is None:
            return
        if len(state.caches) != len(self.layers):
            raise ValueError(f"the state is of a model of {len(state.caches)} layers, this one has {len(self.layers)}")
        if state.caches[0].keys.shape[0] != ids.shape[0]:
            raise ValueError(f"ids have batch {ids.shape[0]} but the state has batch {state.caches[0].keys.shape[0]}")

    # ---------------------------------------------------------------------------------------------- retro-fitting

    def freeze_language_model(self) -> Retro:
        """Let only the encoder and cross-attention train, so that without retrieval the model stays what it is, to the bit.

        Returns:
            The model itself.

        Raises:
            ValueError: a model without cross-attention, of which nothing would be left to train.

        Source: Borgeaud et al. 2021, section 4.1 ("Retro-fitting").
        """
        if self.encoder is None:
            raise ValueError("this model has no cross_layers, so nothing would be left to train; retro_fit(model, ...) adds some")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_of_retrieval(name))
        return self


_OUTPUTS = ("out_proj.weight", "down_proj.weight")


def is_of_retrieval(name: str) -> bool:
    """Whether a parameter's name is of the encoder or of cross-attention in the decoder, its norm included."""
    return name.startswith("encoder.") or ".cross_attention" in name


def retro_fit(model: Retro, *, cross_layers: tuple[int, ...], **changes: Any) -> Retro:
    """Add retrieval to a trained language model: its own weights, frozen, with an encoder and cross-attention to be trained.

    The outputs of the new cross-attention start at zero, so that the model begins as what it was, with retrieval as without;
    without, it stays so to the bit whatever is trained.

    Args:
        model: a `Retro` without cross-attention, which is a plain decoder-only language model. Not changed; its weights are copied.
        cross_layers: the layers, counted from 1, that shall read neighbours.
        changes: fields of `RetroConfig` that concern retrieval: those of the encoder, `chunk_length`, `neighbour_length`,
            `shared_embedding`; also `dropout`.

    Returns:
        The new model, on the same device in the same dtype, in which only what is new requires a gradient. After loading one from a
        file, `freeze_language_model()` freezes it again.

    Raises:
        ValueError: a model that has cross-attention already, no `cross_layers`, a field of the language model itself.

    Source: Borgeaud et al. 2021, section 4.1: 3 % of the tokens of pre-training sufficed.

    Example:
        >>> sizes = {"dim": 16, "heads": 2, "head_dim": 8, "layers": 2, "feed_forward_dim": 32, "chunk_length": 4}
        >>> model = Retro(RetroConfig(30, cross_layers=(), **sizes))
        >>> fitted = retro_fit(model, cross_layers=(2,), encoder_dim=12, encoder_heads=2, encoder_head_dim=6)
        >>> ids = torch.randint(30, (2, 11))
        >>> torch.equal(fitted(ids), model(ids))
        True
    """
    if model.config.cross_layers:
        raise ValueError(
            f"this model has cross-attention already, in layers {model.config.cross_layers}; its freeze_language_model() lets only "
            "that and the encoder train"
        )
    if not cross_layers:
        raise ValueError("cross_layers must name at least one layer that shall read neighbours, got none")
    allowed = {f.name for f in fields(RetroConfig) if f.name.startswith("encoder_")}
    allowed |= {"chunk_length", "neighbour_length", "shared_embedding", "dropout"}
    if unknown := sorted(set(changes) - allowed):
        raise ValueError(
            f"retro_fit keeps the language model as it is, so it takes {', '.join(sorted(allowed))}; got {', '.join(unknown)}"
        )
    if "chunk_length" in changes:
        changes = {"neighbour_length": None, **changes}
    weight = model.embedding.weight
    fitted = Retro(replace(model.config, cross_layers=cross_layers, **changes), device=weight.device, dtype=weight.dtype)
    missing, unexpected = fitted.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(is_of_retrieval(name) for name in missing)
    for layer in fitted.layers:
        if layer.cross_attention is not None:
            nn.init.zeros_(layer.cross_attention.attention.out_proj.weight)
    return fitted.freeze_language_model().train(model.training)


def _last_chunk_of(prepared: PreparedContext, batch: int) -> PreparedContext:
    """Of z l contexts the last of each of z sequences."""
    chunks = prepared.batch // batch
    if chunks == 1:
        return prepared
    return prepared.select(torch.arange(chunks - 1, prepared.batch, chunks, device=prepared.keys.device))


def _check_ids(name: str, ids: Tensor, dim: int, shape: str) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != dim or ids.dtype not in (torch.int64, torch.int32):
        given = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} must be int64 or int32 of shape {shape}, got {given}")
