"""A sound as a picture: how loud each frequency is at each moment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crossattention.views.content import SoundSide

DECIBELS = 80.0
MOST_FRAMES = 1_200
BANDS = 128
WINDOW_SECONDS = 0.025


@dataclass(frozen=True, eq=False)
class Spectrogram:
    """Levels of a sound.

    Args:
        levels: (frames, bands) uint8, bands from 0 Hz upwards; 255 is the loudest, 0 is `decibels` or more below it.
        highest_hertz: the upper edge of the last band.
        decibels: from 0 to 255.
    """

    levels: np.ndarray
    highest_hertz: float
    decibels: float


def spectrogram(side: SoundSide) -> Spectrogram:
    """Short-time Fourier magnitudes of a sound in Hann windows of 25 ms, in decibels below the loudest.

    At most 1,200 frames of 128 bands, evenly spaced from 0 Hz to half the sample rate; each band is the loudest of the
    frequencies in it.
    """
    samples = np.asarray(side.samples, dtype=np.float64)
    width = max(2 * BANDS, round(WINDOW_SECONDS * side.sample_rate))
    hop = max(width // 4, -(-len(samples) // MOST_FRAMES))
    padded = np.pad(samples, (width // 2, width))
    starts = np.arange(0, len(samples), hop)
    frames = padded[starts[:, None] + np.arange(width)] * np.hanning(width)
    magnitudes = np.abs(np.fft.rfft(frames, axis=1))
    edges = np.linspace(0, magnitudes.shape[1], BANDS + 1).astype(int)
    bands = np.maximum.reduceat(magnitudes, edges[:-1], axis=1)
    loudest = bands.max()
    decibels = 20 * np.log10(np.maximum(bands / loudest, 1e-10)) if loudest > 0 else np.full_like(bands, -DECIBELS)
    levels = np.clip(1 + decibels / DECIBELS, 0, 1) * 255
    return Spectrogram(np.round(levels).astype(np.uint8), side.sample_rate / 2, DECIBELS)
