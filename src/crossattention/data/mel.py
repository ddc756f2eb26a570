"""Sounds as frames: how loud each band of pitch is at each moment, on logarithmic scales.

    power[t, f] = |STFT(samples)[f, t]|^2          Hann windows of 25 ms, one every 10 ms
    mel[t, b]   = sum over f of power[t, f] filters[f, b]
    out[t, b]   = 1 + max(log10(mel[t, b]) - top, -8) / 4,   top the largest log10 of the sound: from -1 (80 dB below) to 1

What does not live here: reading files (`sounds`), batches, models. Letters: m frames, f frequencies, b bands.
Source of the scale: O'Shaughnessy 1987, 2595 log10(1 + hertz / 700), as HTK has it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WINDOW_SECONDS = 0.025
HOP_SECONDS = 0.010
DECADES = 8.0


def mel_filters(num_frequencies: int, bands: int, sample_rate: int) -> Tensor:
    """Triangles that overlap by half, evenly spaced on the mel scale from 0 Hz to half the sample rate.

    Args:
        num_frequencies: frequencies of the transform, from 0 Hz to half the sample rate, both included.
        bands: triangles.
        sample_rate: samples a second.

    Returns:
        float32 (f, b); each triangle reaches 1 at its top.

    Raises:
        ValueError: so many bands that one of them would hold no frequency.
    """
    hertz = torch.linspace(0, sample_rate / 2, num_frequencies, dtype=torch.float64)
    highest = _to_mel(torch.tensor(sample_rate / 2, dtype=torch.float64))
    corners = _to_hertz(torch.linspace(0, float(highest), bands + 2, dtype=torch.float64))
    widths = corners.diff()
    slopes = corners.unsqueeze(0) - hertz.unsqueeze(1)
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    filters = torch.minimum(rising, falling).clamp(min=0)
    if bool((filters.amax(0) == 0).any()):
        raise ValueError(
            f"{bands} bands are too many for {num_frequencies} frequencies at a rate of {sample_rate}: some would hold none; "
            "take fewer bands"
        )
    return filters.float()


def log_mel(samples: Tensor, sample_rate: int, bands: int) -> Tensor:
    """The frames of one sound, the same whatever its loudness.

    Args:
        samples: one channel, (length,), floating.
        sample_rate: samples a second.
        bands: how many bands.

    Returns:
        float32 (m, b), m = 1 + length // hop, from -1 to 1; -1 throughout where all is silent.

    Raises:
        ValueError: not one channel, no samples, or samples that are not finite.

    Cost: some 0.3 ms for a word.

    Example:
        >>> log_mel(torch.sin(torch.arange(16_000) * 0.3), 16_000, 40).shape
        torch.Size([101, 40])
    """
    if samples.dim() != 1 or not samples.numel():
        raise ValueError(f"expected the samples of one channel, (length,), got shape {tuple(samples.shape)}")
    if not bool(samples.isfinite().all()):
        raise ValueError("expected finite samples, got one that is not")
    window, hop = round(WINDOW_SECONDS * sample_rate), round(HOP_SECONDS * sample_rate)
    hann, filters = _tables(window, bands, sample_rate)
    spectrum = torch.stft(samples.float(), window, hop, window=hann, center=True, pad_mode="constant", return_complex=True)
    levels = (spectrum.abs().square().T @ filters).clamp(min=1e-20).log10()
    top = levels.max()
    if float(top) <= -20:
        return torch.full_like(levels, -1.0)
    return 1 + (levels - top).clamp(min=-DECADES) * (2 / DECADES)


def resampled(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """The same sound at another sample rate, by cutting or filling up its spectrum; its first and last sample wrap around.

    Args:
        samples: (length,).
        rate: samples a second.
        new_rate: samples a second wanted.

    Returns:
        (round(length * new_rate / rate),), at least one sample.
    """
    if rate == new_rate:
        return samples
    length = max(1, round(samples.shape[0] * new_rate / rate))
    spectrum = torch.fft.rfft(samples)
    wanted = length // 2 + 1
    spectrum = spectrum[:wanted] if wanted <= len(spectrum) else torch.nn.functional.pad(spectrum, (0, wanted - len(spectrum)))
    return torch.fft.irfft(spectrum, n=length) * (length / samples.shape[0])


@lru_cache(maxsize=8)
def _tables(window: int, bands: int, sample_rate: int) -> tuple[Tensor, Tensor]:
    return torch.hann_window(window), mel_filters(window // 2 + 1, bands, sample_rate)


def _to_mel(hertz: Tensor) -> Tensor:
    return 2595 * torch.log10(1 + hertz / 700)


def _to_hertz(mel: Tensor) -> Tensor:
    return 700 * (10 ** (mel / 2595) - 1)
