"""Frames of sounds: the filters, the scale, another sample rate."""

import math

import pytest
import torch

from crossattention.data.mel import log_mel, mel_filters, resampled


def tone(hertz, rate=16_000, seconds=0.5):
    return torch.sin(2 * math.pi * hertz * torch.arange(round(rate * seconds), dtype=torch.float64) / rate).float()


@pytest.mark.slow  # importing transformers takes seconds
def test_the_filters_are_those_of_another_library():
    from transformers.audio_utils import mel_filter_bank

    for bands, rate in ((40, 16_000), (23, 8_000), (64, 22_050)):
        theirs = mel_filter_bank(201, bands, 0.0, rate / 2, rate, norm=None, mel_scale="htk")
        assert torch.allclose(mel_filters(201, bands, rate), torch.tensor(theirs, dtype=torch.float32), atol=1e-6)


@pytest.mark.slow
def test_the_frames_are_those_of_another_library():
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    samples = torch.randn(4_000, generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    filters = mel_filter_bank(201, 40, 0.0, 8_000, 16_000, norm=None, mel_scale="htk")
    window = window_function(400, "hann")
    theirs = spectrogram(
        samples.numpy(), window, 400, 160, power=2.0, pad_mode="constant", mel_filters=filters, log_mel="log10", mel_floor=1e-20
    )
    expected = torch.tensor(theirs).T
    expected = 1 + (expected - expected.max()).clamp(min=-8) / 4
    assert torch.allclose(log_mel(samples, 16_000, 40), expected.float(), atol=1e-4)


def test_a_tone_is_loudest_in_its_band():
    loudest = [int(log_mel(tone(hertz), 16_000, 40)[25].argmax()) for hertz in (200, 400, 1000, 3000)]
    assert loudest == sorted(loudest) and len(set(loudest)) == 4
    filters = mel_filters(201, 40, 16_000)
    assert loudest[2] == int(filters[25].argmax())  # 1000 Hz is frequency 25 of 40 Hz each


def test_frames_do_not_depend_on_loudness_and_silence_is_minus_one():
    frames = log_mel(tone(440), 16_000, 40)
    assert frames.shape == (51, 40)
    assert torch.allclose(frames, log_mel(tone(440) * 0.01, 16_000, 40), atol=1e-3)
    assert (float(frames.max()), float(frames.min())) == (1.0, pytest.approx(-1.0))
    assert bool((log_mel(torch.zeros(1000), 16_000, 40) == -1).all())


@pytest.mark.parametrize(("rate", "new_rate"), [(22_050, 16_000), (8_000, 16_000), (16_000, 16_000)])
def test_a_tone_is_the_same_tone_at_another_rate(rate, new_rate):
    assert torch.allclose(resampled(tone(400, rate), rate, new_rate), tone(400, new_rate), atol=1e-4)


def test_faults_are_named():
    with pytest.raises(ValueError, match=r"one channel, \(length,\), got shape \(2, 5\)"):
        log_mel(torch.zeros(2, 5), 16_000, 40)
    with pytest.raises(ValueError, match="finite samples"):
        log_mel(torch.tensor([0.0, math.nan]), 16_000, 40)
    with pytest.raises(ValueError, match="400 bands are too many for 201 frequencies"):
        mel_filters(201, 400, 16_000)
