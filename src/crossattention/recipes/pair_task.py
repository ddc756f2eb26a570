"""What learning pairs of texts has in common, whatever the texts are: model, batches, loss.

What lives here: the half of a task that knows ids only. What does not: where pairs come from and how predictions are
scored (`seq2seq`, `g2p`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crossattention.data.batches import Example, PairBatch, PairBatches
from crossattention.data.vocabulary import BEGIN, END, PAD, Tokenizer
from crossattention.models.transformer import Transformer, TransformerConfig, label_smoothed_cross_entropy
from crossattention.recipes.translator import Translator
from crossattention.training.together import ALONE, Together


@dataclass(frozen=True)
class ModelShape:
    """The size of the Transformer, as far as a recipe leaves it open.

    Args:
        dim: width of the model.
        heads: attention heads; divides dim.
        encoder_layers: layers that read the source.
        decoder_layers: layers that write the target.
        feed_forward_dim: inner width of the feed-forward layers.
        dropout: of embeddings and of each sub-layer's output.
        attention_dropout: of attention weights; above 0 it leaves the fused kernels.
        norm: "pre" (before each sub-layer; trains with large learning rates) or "post" (the paper's).
    """

    dim: int = 128
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    feed_forward_dim: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.0
    norm: Literal["pre", "post"] = "pre"


class PairLearner:
    """Pairs of id sequences, and a Transformer that learns to turn one into the other.

    Args:
        pairs: training texts, (source, target).
        source: tokenizer of the sources.
        target: tokenizer of the targets.
        shape: size of the model.
        tokens_per_batch: padded source and target tokens a step.
        label_smoothing: mass that the labels give to all other tokens.
        seed: of the batch order.

    Raises:
        ValueError: no pairs, or a pair longer than a batch may be.
        UnknownSymbol: a strict target tokenizer does not know a symbol.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        source: Tokenizer,
        target: Tokenizer,
        shape: ModelShape,
        *,
        tokens_per_batch: int,
        label_smoothing: float,
        seed: int,
    ) -> None:
        self.source = source
        self.target = target
        self.shape = shape
        self.label_smoothing = label_smoothing
        examples = self.encoded(pairs)
        self.batches = PairBatches(examples, tokens_per_batch, seed)
        self.longest_target = max(len(target_ids) for _, target_ids in examples)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every training pair once."""
        return self.batches.steps_per_epoch

    def build_model(self) -> Transformer:
        """A new model with random weights."""
        shape = self.shape
        config = TransformerConfig(
            source_vocab_size=self.source.size,
            target_vocab_size=self.target.size,
            dim=shape.dim,
            heads=shape.heads,
            encoder_layers=shape.encoder_layers,
            decoder_layers=shape.decoder_layers,
            feed_forward_dim=shape.feed_forward_dim,
            dropout=shape.dropout,
            attention_dropout=shape.attention_dropout,
            norm=shape.norm,
            tied="target",
            pad_id=PAD,
            begin_id=BEGIN,
            end_id=END,
        )
        return Transformer(config)

    def batch_at(self, step: int) -> PairBatch:
        """The batch of a step, a pure function of (seed, step)."""
        return self.batches.batch_at(step)

    def loss(self, model: nn.Module, batch: PairBatch) -> Tensor:
        """The label-smoothed cross-entropy, mean over the target tokens (END counted), in nats."""
        return self._loss(model, batch, self.label_smoothing)

    def held_out_loss(self, model: nn.Module, pairs: Sequence[tuple[str, str]], together: Together = ALONE) -> float:
        """The cross-entropy of held-out pairs without smoothing, mean over their target tokens, in nats."""
        examples = self.encoded(pairs)
        # A held-out pair may be longer than any that was trained on.
        longest = max(len(source_ids) + len(target_ids) + 1 for source_ids, target_ids in examples)
        batches = PairBatches(examples, max(self.batches.tokens_per_batch, longest))
        device = next(model.parameters()).device

        def score(step: int) -> tuple[float, int]:
            batch = batches.batch_at(step)
            tokens = int((batch.labels != PAD).sum())
            return float(self._loss(model, batch.to(device), 0.0)) * tokens, tokens

        with torch.no_grad():
            scored = together.map(score, range(batches.steps_per_epoch))
        return sum(nats for nats, _ in scored) / sum(tokens for _, tokens in scored)

    def encoded(self, pairs: Sequence[tuple[str, str]]) -> list[Example]:
        """The ids of pairs, without BEGIN and END."""
        return [(self.source.encode(source), self.target.encode(target)) for source, target in pairs]

    def translator(self, model: nn.Module) -> Translator:
        """The model with its vocabularies. No prediction is longer than half as much again as any training target."""
        return Translator(model, self.source, self.target, self.length_limit)

    @property
    def length_limit(self) -> int:
        """The most tokens of a prediction."""
        return self.longest_target + self.longest_target // 2 + 1

    def describe(self) -> dict[str, Any]:
        """What prediction needs beside the weights, for JSON."""
        return {
            "source_tokenizer": self.source.to_json(),
            "target_tokenizer": self.target.to_json(),
            "max_length": self.length_limit,
        }

    def _loss(self, model: nn.Module, batch: PairBatch, smoothing: float) -> Tensor:
        logits = model(batch.source_ids, batch.target_ids, batch.source_mask if batch.is_source_padded else None)
        return label_smoothed_cross_entropy(logits, batch.labels, pad_id=PAD, smoothing=smoothing)
