"""The Transformer that listens: its encoder reads frames of sound in the place of embedded symbols, its decoder writes symbols.

    states = encoder(front(frames) + positions)          front: two convolutions of width 3, each with a GELU, that shorten time
    logits = decoder(E[target] sqrt(d) + positions, states) E^T

Vaswani et al. 2017, arXiv:1706.03762, for all but the front; convolutions before it: Dong et al. 2018 (Speech-Transformer), and
Radford et al. 2022, arXiv:2212.04356 (Whisper). Everything behind the front is `transformer.Transformer` itself.

Legend: z batch, m frames, s the front's reduction, n target length, d width, b bands, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention.prepared import PreparedContext
from crossattention.layers.positions import sinusoidal_positions
from crossattention.models.transformer import Transformer, TransformerConfig


@dataclass(frozen=True)
class ListenerConfig:
    """Sizes and choices of a `Listener`.

    Args:
        bands: numbers of a frame, b.
        vocab_size: symbols that it writes, V.
        reduction: frames that become one position, s: 1, 2 or 4.
        dim: width of the model, d; even.
        heads: attention heads.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        feed_forward_dim: width inside the feed-forward layers.
        dropout: on each sublayer's output and on what enters the stacks.
        attention_dropout: on the attention weights.
        norm: "pre" or "post", as in `TransformerConfig`.
        pad_id: symbol that fills short targets up.
        begin_id: symbol that starts every target.
        end_id: symbol that ends every target.

    Raises:
        ValueError: bands below 1, another reduction, and all that `TransformerConfig` refuses.
    """

    bands: int
    vocab_size: int
    reduction: int = 2
    dim: int = 128
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    feed_forward_dim: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.0
    norm: Literal["post", "pre"] = "pre"
    pad_id: int = 0
    begin_id: int = 1
    end_id: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.bands, int) or self.bands < 1:
            raise ValueError(f"bands must be an integer of at least 1, got {self.bands!r}")
        if self.reduction not in (1, 2, 4):
            raise ValueError(f"reduction must be 1, 2 or 4, got {self.reduction!r}")
        self.transformer()

    def transformer(self) -> TransformerConfig:
        """The config of all that lies behind the front. Its one table of symbols is the target's."""
        return TransformerConfig(
            source_vocab_size=self.vocab_size,
            target_vocab_size=self.vocab_size,
            dim=self.dim,
            heads=self.heads,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            feed_forward_dim=self.feed_forward_dim,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            norm=self.norm,
            tied="all",
            pad_id=self.pad_id,
            begin_id=self.begin_id,
            end_id=self.end_id,
        )


class FrameFront(nn.Module):
    """Frames to positions: x (z, m, b) -> (z, ceil(m / s), d). Position j stands on frame j s.

    What is beyond a sound's end is zero before each convolution, so a sound comes out the same alone and in a batch.
    """

    def __init__(self, bands: int, dim: int, reduction: int) -> None:
        super().__init__()
        self.strides = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[reduction]
        self.reduction = reduction
        self.first = nn.Conv1d(bands, dim, 3, stride=self.strides[0], padding=1)
        self.second = nn.Conv1d(dim, dim, 3, stride=self.strides[1], padding=1)

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """The positions; mask (z, m) is True at real frames."""
        x = frames.transpose(1, 2)
        if mask is not None:
            x = x * mask.unsqueeze(1)
        x = F.gelu(self.first(x))
        if mask is not None:
            x = x * mask[:, :: self.strides[0]].unsqueeze(1)
        return F.gelu(self.second(x)).transpose(1, 2)

    def reduced(self, mask: Tensor | None) -> Tensor | None:
        """The mask of the positions, (z, ceil(m / s))."""
        return None if mask is None else mask[:, :: self.reduction]


class Listener(Transformer):
    """A Transformer whose encoder reads frames; a mask of the source is always one of frames, (z, m).

    Args:
        config: sizes and choices.
        device: device of the weights.
        dtype: dtype of the weights.

    Example:
        >>> model = Listener(ListenerConfig(bands=40, vocab_size=30, dim=16, heads=2, feed_forward_dim=32))
        >>> model(torch.randn(2, 61, 40), torch.randint(3, 30, (2, 5))).shape
        torch.Size([2, 5, 30])
    """

    family: ClassVar[str] = "listener"
    config_class: ClassVar[type] = ListenerConfig

    def __init__(
        self, config: ListenerConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config.transformer())
        self.config = config  # type: ignore[assignment]
        self.front = FrameFront(config.bands, config.dim, config.reduction)
        self.to(device=device, dtype=dtype)

    def forward(
        self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (z, n, V) of every next symbol.

        Args:
            source_ids: frames (z, m, b), floating.
            target_ids: symbols (z, n), beginning with `begin_id`.
            source_mask: bool (z, m), True = a real frame; without it all are.
            target_mask: bool (z, n), likewise.

        Raises:
            ValueError: frames of another shape, batches that differ, a mask of another shape.
            TypeError: frames that are no floating numbers, a mask that is not bool.
        """
        if target_ids.shape[0] != source_ids.shape[0]:
            raise ValueError(
                f"frames and target_ids must have one batch size, got {tuple(source_ids.shape)} and {tuple(target_ids.shape)}"
            )
        states = self.encode(source_ids, source_mask)
        x = self._embed_target(target_ids, 0)
        mask = self.front.reduced(source_mask)
        return self._logits(self.decoder(x, states, source_mask=mask, target_mask=target_mask))

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """The encoder's output (z, ceil(m / s), d) for frames (z, m, b); Args and Raises as in `forward`."""
        self._check_frames(source_ids, source_mask)
        x = self.front(source_ids, source_mask)
        where = torch.arange(x.shape[1], device=x.device)
        x = self.embedding_dropout(x + sinusoidal_positions(where, self.config.dim, dtype=x.dtype))
        return self.encoder(x, self.front.reduced(source_mask))

    def prepare(
        self,
        states: Tensor,
        source_mask: Tensor | None = None,
        *,
        uses: int | None = None,
        query_length: int | None = None,
        repeats: int | None = None,
    ) -> tuple[PreparedContext, ...]:
        """Make of the encoder's output, once, what each decoder layer reads; as `Transformer.prepare`, with the mask of frames."""
        mask = self.front.reduced(source_mask)
        return super().prepare(states, mask, uses=uses, query_length=query_length, repeats=repeats)

    def _check_frames(self, frames: Tensor, mask: Tensor | None) -> None:
        shape = tuple(frames.shape)
        if len(shape) != 3 or shape[2] != self.config.bands or not shape[1]:
            raise ValueError(f"frames must be (batch, length, bands={self.config.bands}), at least one of them, got {shape}")
        if not frames.is_floating_point():
            raise TypeError(f"frames must be floating numbers, got {frames.dtype}")
        if mask is None:
            return
        if mask.dtype != torch.bool:
            raise TypeError(f"source_mask must be bool with True at real frames, got {mask.dtype}; pass mask.bool()")
        if tuple(mask.shape) != shape[:2]:
            raise ValueError(f"source_mask must be {shape[:2]}, one a frame, got {tuple(mask.shape)}")


def positions_of(num_frames: int, reduction: int) -> int:
    """How many positions the front makes of so many frames."""
    return -(-num_frames // reduction)


__all__: Sequence[str] = ["FrameFront", "Listener", "ListenerConfig", "positions_of"]
