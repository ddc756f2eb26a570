"""The spectrogram: a tone stands in its band, at its time, at its loudness."""

import numpy as np
import pytest

from crossattention.views.pages import SoundSide
from crossattention.views.spectrum import BANDS, MOST_FRAMES, spectrogram
from view_samples import tone


@pytest.mark.parametrize("hertz", [300.0, 1000.0, 3500.0])
def test_a_tone_stands_in_its_band(hertz):
    found = spectrogram(SoundSide(tone(hertz), 8000, 4))
    assert found.highest_hertz == 4000
    loudest = found.levels[len(found.levels) // 2].argmax()
    assert abs((loudest + 0.5) * 4000 / BANDS - hertz) <= 4000 / BANDS


def test_silence_is_dark_and_the_second_half_is_heard_there():
    found = spectrogram(SoundSide(np.concatenate([np.zeros(4000), tone(seconds=0.5)]), 8000, 4)).levels
    assert found[: len(found) // 2 - 8].max() == 0
    assert found[len(found) // 2 + 8 :].max() == 255


def test_forty_decibels_are_half_of_the_scale():
    quiet = spectrogram(SoundSide(np.concatenate([tone(), 0.01 * tone()]), 8000, 4)).levels
    assert quiet[-10].max() == pytest.approx(127.5, abs=2)


def test_a_long_sound_has_no_more_frames_and_silence_no_fault():
    assert len(spectrogram(SoundSide(np.zeros(8000 * 600), 8000, 4)).levels) <= MOST_FRAMES
