"""Batches of sounds and what is said in them: the batches of `batches`, with frames in the place of source ids.

Letters: z batch, m frames, b bands, n target length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crossattention.data.batches import PairBatches
from crossattention.data.speech import FrameSet


@dataclass(frozen=True)
class SoundBatch:
    """One batch of sounds, filled up with silence that the mask leaves out.

    Args:
        frames: (z, m, b) float32, zero beyond each sound's end.
        source_mask: (z, m) bool, True where there is sound.
        target_ids: (z, n) int64, what the decoder is given: BEGIN, then the target; PAD beyond.
        labels: (z, n) int64, what it shall answer: the target, then END; PAD beyond.
        indices: which examples these are, one a row.
        num_tokens: real frames plus real labels.
        is_source_padded: whether the mask is False anywhere.
    """

    frames: Tensor
    source_mask: Tensor
    target_ids: Tensor
    labels: Tensor
    indices: tuple[int, ...]
    num_tokens: int
    is_source_padded: bool

    def to(self, device: torch.device | str) -> SoundBatch:
        """The same batch on another device."""
        names = ("frames", "source_mask", "target_ids", "labels")
        moved = (getattr(self, name).to(device, non_blocking=True) for name in names)
        return replace(self, **dict(zip(names, moved, strict=True)))


class SoundBatches:
    """All batches of some sounds; order, cuts and Raises as in `PairBatches`, a frame counting as a token.

    Args:
        sounds: the frames.
        targets: the ids of what is said in each, without BEGIN and END.
        tokens_per_batch: the most frames and labels of a batch, padding included.
        seed: of the order.
    """

    def __init__(self, sounds: FrameSet, targets: Sequence[Sequence[int]], tokens_per_batch: int, seed: int = 0) -> None:
        ends = torch.tensor(sounds.lengths).cumsum(0).tolist()
        # The "ids" of a sound are the places of its frames: batches are made of these, and the frames looked up last.
        places = [range(end - length, end) for end, length in zip(ends, sounds.lengths, strict=True)]
        self._frames = sounds.frames
        self._batches = PairBatches(list(zip(places, targets, strict=True)), tokens_per_batch, seed)

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches that hold every sound once."""
        return self._batches.steps_per_epoch

    def batch_at(self, step: int) -> SoundBatch:
        """The batch of a step, a pure function of (seed, step)."""
        found = self._batches.batch_at(step)
        frames = self._frames[found.source_ids].float() * found.source_mask.unsqueeze(-1)
        return SoundBatch(
            frames, found.source_mask, found.target_ids, found.labels, found.indices, found.num_tokens, found.is_source_padded
        )
