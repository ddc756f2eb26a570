"""A trained model that listens: sounds in, predicted texts and alignments out.

What lives here: what differs from a `Translator` where the source is a sound. What does not: training and data (`listen`).
Letters: z batch, m frames, n target length, s the model's reduction of frames to positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from crossattention.data.mel import HOP_SECONDS, log_mel
from crossattention.data.sounds import read_sound
from crossattention.models.listener import positions_of
from crossattention.recipes.translator import Translator
from crossattention.views.content import AttentionLayer, AttentionView, SoundSide, TextSide

Sound = str | Path | Tensor
"""A file, or frames (m, bands) that were made of one."""


@dataclass(frozen=True)
class SoundReader:
    """Turns sounds into frames: what the tokenizer of the source is to a translator of texts.

    Args:
        sample_rate: samples a second that the frames are made of.
        bands: of the frames.
        reduction: frames of one position of the model.
    """

    sample_rate: int
    bands: int
    reduction: int

    @property
    def seconds_per_position(self) -> float:
        """The stretch of time that one position stands on."""
        return HOP_SECONDS * self.reduction

    def samples(self, path: str | Path) -> Tensor:
        """The samples of a file; Raises as `read_sound`."""
        return read_sound(path, self.sample_rate)

    def encode(self, sound: Sound) -> Tensor:
        """The frames of a sound (m, bands).

        Raises:
            ValueError: as `read_sound`; a text that is no file is said to be none.
        """
        if isinstance(sound, Tensor):
            return sound
        try:
            return log_mel(self.samples(sound), self.sample_rate, self.bands)
        except FileNotFoundError as fault:
            raise ValueError(str(fault)) from fault  # a question that cannot be read, of many perhaps

    def tokens(self, frames: Tensor) -> list[str]:
        """A name a position: the digit of each tenth of a second, dots between them."""
        starts = [
            round(position * self.seconds_per_position * 100) for position in range(positions_of(len(frames), self.reduction))
        ]
        tenths = [start // 10 for start in starts]
        is_new = [at == 0 or tenths[at] != tenths[at - 1] for at in range(len(tenths))]
        return [str(tenth % 10) if new else "." for tenth, new in zip(tenths, is_new, strict=True)]


@dataclass(frozen=True)
class SoundTranslator(Translator):
    """A `Listener` with its reader of sounds and its target vocabulary: a `Translator` whose texts are sounds.

    Args:
        model: a `Listener`, on any device.
        source: a `SoundReader`.
        target: the tokenizer of what it writes.
        max_length: the most tokens of a prediction.
    """

    def view(self, path: str | Path, predicted: str) -> AttentionView:
        """What each token of a prediction read of a sound, in every cross-attention of the decoder.

        Raises:
            ValueError: no such sound, or an empty prediction.
            UnknownSymbol: a symbol of the prediction was never seen in training.
        """
        reader: Any = self.source
        samples = reader.samples(path)
        maps = self.layer_maps(log_mel(samples, reader.sample_rate, reader.bands), predicted)  # type: ignore[arg-type]
        if not maps.rows:
            raise ValueError(
                f"nothing was written for {path}, so nothing read it; give an answer to look at (--answer), or train longer"
            )
        layers = tuple(
            AttentionLayer.of_weights(f"decoder.layers.{index}.cross_attention", "cross-attention", weights.cpu().numpy())
            for index, weights in enumerate(maps.weights)
        )
        loudest = max(1.0, float(samples.abs().max()))
        side = SoundSide((samples / loudest).numpy(), reader.sample_rate, maps.weights.shape[-1], reader.seconds_per_position)
        return AttentionView(f"{Path(path).name} → {predicted}", TextSide(tuple(maps.rows)), side, layers)

    def diagonality(self, sound: Sound, text: str) -> float | None:
        """How straight the alignment of a text runs over a sound: the correlation of place in the text and time that was read.

        Each token's time is the centre of what it read, the mean over all layers and heads. 1 is a straight line, 0 none. None for
        a text of fewer than three tokens.
        """
        weights = self.layer_maps(sound, text).weights.mean((0, 1)).double().cpu()  # type: ignore[arg-type]
        if len(weights) < 3:
            return None
        times = weights @ torch.arange(weights.shape[1], dtype=torch.float64)
        found = torch.corrcoef(torch.stack((torch.arange(len(times), dtype=torch.float64), times)))[0, 1]
        return float(found.nan_to_num())

    def _padded(self, sources: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(source) for source in sources])
        frames = pad_sequence([source.float() for source in sources], batch_first=True).to(device)
        is_full = bool((lengths == frames.shape[1]).all())
        return frames, None if is_full else (torch.arange(frames.shape[1]) < lengths.unsqueeze(1)).to(device)
