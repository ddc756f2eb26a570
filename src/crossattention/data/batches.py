"""Batches of pairs of id sequences: bucketed by length, their order a pure function of (seed, step).

What lives here: which examples stand together at which step, and their padding into tensors.
What does not: text (`vocabulary`), the loss, devices beyond `.to(device)`.
Letters: z batch, m source length, n target length (with BEGIN or END), N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from crossattention.data.vocabulary import BEGIN, END, PAD

Example = tuple[Sequence[int], Sequence[int]]
"""Source and target ids, without BEGIN and END."""


@dataclass(frozen=True)
class PairBatch:
    """One batch of padded pairs.

    Args:
        source_ids: (z, m) int64, PAD beyond each source's end.
        source_mask: (z, m) bool, True where the source is real.
        target_ids: (z, n) int64, what the decoder is given: BEGIN, then the target; PAD beyond.
        labels: (z, n) int64, what it shall answer: the target, then END; PAD beyond.
        indices: which examples these are, one a row.
        num_tokens: real source ids plus real labels.
        is_source_padded: whether the mask is False anywhere; attention without a mask is cheaper.
    """

    source_ids: Tensor
    source_mask: Tensor
    target_ids: Tensor
    labels: Tensor
    indices: tuple[int, ...]
    num_tokens: int
    is_source_padded: bool = True

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch on another device."""
        names = ("source_ids", "source_mask", "target_ids", "labels")
        moved = (getattr(self, name).to(device, non_blocking=True) for name in names)
        return replace(self, **dict(zip(names, moved, strict=True)))


class _Ragged:
    """N sequences of ids in one flat array: small, and padded by one indexing."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.lengths = np.fromiter((len(sequence) for sequence in sequences), np.int64, len(sequences))
        self.starts = np.cumsum(self.lengths) - self.lengths
        # One spare element at the end, so that padding may point beyond the last sequence.
        self.flat = np.zeros(int(self.lengths.sum()) + 1, np.int64)
        self.flat[:-1] = np.fromiter((number for sequence in sequences for number in sequence), np.int64)

    def padded(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows as (z, width) ids with PAD beyond each end, and (z, width) True where they are real."""
        is_real = np.arange(width) < self.lengths[rows, None]
        positions = np.where(is_real, self.starts[rows, None] + np.arange(width), len(self.flat) - 1)
        return np.where(is_real, self.flat[positions], PAD), is_real


class PairBatches:
    """All batches of a training part.

    Step s lies in epoch s // steps_per_epoch. Every epoch holds each example exactly once: examples are ordered by
    (source length, target length), equals shuffled anew each epoch, cut where a batch would exceed the budget, and the
    batches shuffled. The cuts depend on the lengths only, so every epoch has the same number of steps.

    Args:
        examples: (source ids, target ids) without BEGIN and END; sources not empty.
        tokens_per_batch: the most that a batch may hold, padding included: z * (m + n).
        seed: of the order; the same seed and step give the same batch, whatever was asked before.

    Raises:
        ValueError: no examples; an empty source; an example that alone exceeds the budget.

    Cost: 8 bytes an id; one sort an epoch (some 50 ms for 120,000 examples), then a few array operations a batch.

    Example:
        >>> batches = PairBatches([([5, 6], [7]), ([5], [8, 9])], tokens_per_batch=10, seed=0)
        >>> batches.steps_per_epoch
        1
        >>> batches.batch_at(0).labels
        tensor([[8, 9, 2],
                [7, 2, 0]])
    """

    def __init__(self, examples: Sequence[Example], tokens_per_batch: int, seed: int = 0) -> None:
        if not examples:
            raise ValueError("expected at least one example to make batches of, got none")
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self._sources = _Ragged([source for source, _ in examples])
        self._targets = _Ragged([target for _, target in examples])
        self._check(tokens_per_batch)
        by_length = self._order(np.arange(len(examples)))
        self._cuts = self._cut(self._sources.lengths[by_length], self._targets.lengths[by_length] + 1)
        self._epoch = -1
        self._epoch_batches: list[np.ndarray] = []

    def __len__(self) -> int:
        """The number of examples."""
        return len(self._sources.lengths)

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches that hold every example once."""
        return len(self._cuts) + 1

    def batch_at(self, step: int) -> PairBatch:
        """The batch of a step, a pure function of (seed, step).

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"expected a step from 0 on, got {step}")
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch_batches = self._shuffled_batches(epoch)
            self._epoch = epoch
        return self._collate(self._epoch_batches[within])

    def _check(self, tokens_per_batch: int) -> None:
        empty = np.flatnonzero(self._sources.lengths == 0)
        if len(empty):
            raise ValueError(f"expected sources of at least one id, got an empty one at example {empty[0]}")
        costs = self._sources.lengths + self._targets.lengths + 1
        longest = int(costs.argmax())
        if costs[longest] > tokens_per_batch:
            raise ValueError(
                f"example {longest} has {costs[longest]} tokens, more than tokens_per_batch={tokens_per_batch}; "
                f"raise tokens_per_batch to at least {costs[longest]}, or leave so long an example out"
            )

    def _order(self, shuffled: np.ndarray) -> np.ndarray:
        """Sort examples by (source length, target length), equals staying in the order given."""
        return shuffled[np.lexsort((self._targets.lengths[shuffled], self._sources.lengths[shuffled]))]

    def _cut(self, source_lengths: np.ndarray, target_lengths: np.ndarray) -> np.ndarray:
        """Where batches begin (after the first), each as full as the budget allows."""
        cuts, begin, widest = [], 0, 0
        for index, (source, target) in enumerate(zip(source_lengths.tolist(), target_lengths.tolist(), strict=True)):
            # Sources come in rising order, so the newest is the widest; targets do not.
            widest = max(widest, target)
            if (index + 1 - begin) * (source + widest) > self.tokens_per_batch:
                cuts.append(index)
                begin, widest = index, target
        return np.array(cuts, np.int64)

    def _shuffled_batches(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng((self.seed, epoch))
        batches = np.split(self._order(random.permutation(len(self))), self._cuts)
        return [batches[index] for index in random.permutation(len(batches))]

    def _collate(self, rows: np.ndarray) -> PairBatch:
        source_lengths, target_lengths = self._sources.lengths[rows], self._targets.lengths[rows]
        source_ids, source_mask = self._sources.padded(rows, int(source_lengths.max()))
        targets, _ = self._targets.padded(rows, int(target_lengths.max()) + 1)
        labels = targets
        target_ids = np.empty_like(targets)
        target_ids[:, 0] = BEGIN
        target_ids[:, 1:] = targets[:, :-1]
        labels[np.arange(len(rows)), target_lengths] = END
        return PairBatch(
            source_ids=torch.from_numpy(source_ids),
            source_mask=torch.from_numpy(source_mask),
            target_ids=torch.from_numpy(target_ids),
            labels=torch.from_numpy(labels),
            indices=tuple(rows.tolist()),
            num_tokens=int(source_lengths.sum() + target_lengths.sum()) + len(rows),
            is_source_padded=bool(source_lengths.min() < source_lengths.max()),
        )
