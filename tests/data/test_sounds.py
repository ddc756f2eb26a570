"""Sound files and folders of them, and their batches."""

import sys
import wave

import numpy as np
import pytest
import torch

from crossattention.data.sound_batches import SoundBatches
from crossattention.data.sounds import read_folder, read_sound, write_wav
from crossattention.data.speech import FrameSet

RAMP = np.array([-1.0, -0.5, 0.0, 0.25, 0.5])


def write(path, width, channels=1):
    whole = np.repeat(np.round(RAMP * 2 ** (8 * width - 1)).astype(np.int64), channels)
    whole = whole + 128 if width == 1 else whole
    data = b"".join(int(number).to_bytes(width, "little", signed=width > 1) for number in whole)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(16_000)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_pcm_of_every_width_is_read_without_any_library(width, channels, tmp_path):
    found = read_sound(write(tmp_path / "a.wav", width, channels), 16_000)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor(RAMP, dtype=torch.float32), atol=1e-6)


def test_what_is_written_is_read_back_also_at_another_rate(tmp_path):
    samples = torch.sin(torch.arange(1600) * 0.1) * 0.5
    path = write_wav(tmp_path / "new" / "a.wav", samples, 16_000)
    assert torch.allclose(read_sound(path, 16_000), samples, atol=1e-4)
    assert len(read_sound(path, 8_000)) == 800


def test_files_that_are_no_sound_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.flac").write_bytes(b"fLaC....")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ModuleNotFoundError, match=r"a\.flac is no PCM WAV.*pip install 'crossattention\[audio\]'"):
        read_sound(tmp_path / "a.flac", 16_000)
    with pytest.raises(FileNotFoundError, match="found nothing"):
        read_sound(tmp_path / "none.wav", 16_000)
    write_wav(tmp_path / "empty.wav", torch.zeros(0), 16_000)
    with pytest.raises(ValueError, match=r"empty\.wav has no samples"):
        read_sound(tmp_path / "empty.wav", 16_000)
    write_wav(tmp_path / "long.wav", torch.zeros(61 * 100), 100)
    with pytest.raises(ValueError, match=r"long\.wav lasts 61 s, expected at most 60 s"):
        read_sound(tmp_path / "long.wav", 16_000)
    content = write_wav(tmp_path / "part.wav", torch.zeros(100), 16_000).read_bytes()
    (tmp_path / "part.wav").write_bytes(content[:12] + b"LIST" + bytes([255, 255, 0, 0]) + content[12:])
    with pytest.raises((ValueError, ModuleNotFoundError), match=r"part\.wav is no"):
        read_sound(tmp_path / "part.wav", 16_000)
    content = write_wav(tmp_path / "still.wav", torch.zeros(100), 16_000).read_bytes()
    (tmp_path / "still.wav").write_bytes(content[:24] + bytes(4) + content[28:])
    with pytest.raises(ValueError, match=r"still\.wav says that it has 0 samples a second"):
        read_sound(tmp_path / "still.wav", 16_000)


def test_samples_that_are_no_numbers_are_refused(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="needs the extra audio")
    soundfile.write(tmp_path / "a.wav", np.array([0.0, np.nan, 0.5]), 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav has samples that are no finite numbers"):
        read_sound(tmp_path / "a.wav", 16_000)


def test_floats_and_flac_are_read_by_soundfile(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="needs the extra audio")
    samples = np.stack([RAMP * 0.5, RAMP], 1)
    soundfile.write(tmp_path / "a.flac", samples, 16_000)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    for name in ("a.flac", "a.wav"):
        assert torch.allclose(read_sound(tmp_path / name, 16_000), torch.tensor(RAMP * 0.75, dtype=torch.float32), atol=1e-3)
    (tmp_path / "b.wav").write_bytes(b"no sound at all")
    with pytest.raises(ValueError, match=r"b\.wav is no sound that can be read"):
        read_sound(tmp_path / "b.wav", 16_000)


def test_a_folder_is_read_by_its_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a table of what is said in .*transcripts\.tsv"):
        read_folder(tmp_path)
    write_wav(tmp_path / "a.wav", torch.zeros(10), 100)
    (tmp_path / "transcripts.tsv").write_text("a.wav\tone two\nb.wav\tthree\n")
    with pytest.raises(FileNotFoundError, match=r"names .*b\.wav, which is not there"):
        read_folder(tmp_path)
    found = read_folder(tmp_path, skip_bad=True)
    assert (found.files, found.texts, found.skipped) == ((tmp_path / "a.wav",), ("one two",), 1)
    other = tmp_path / "other.csv"
    other.write_text("a.wav,four\n")
    assert read_folder(tmp_path, table=other).texts == ("four",)
    with pytest.raises(FileNotFoundError, match=r"a folder of sound files at .*none, found nothing"):
        read_folder(tmp_path / "none")


def test_a_batch_holds_the_frames_of_its_examples():
    sounds = [torch.full((length, 3), float(length)) for length in (4, 7, 2, 5, 4)]
    targets = [[5], [6, 7], [8], [9], [5, 6, 7]]
    batches = SoundBatches(FrameSet.of(sounds), targets, tokens_per_batch=22)
    seen = []
    for step in range(batches.steps_per_epoch):
        batch = batches.batch_at(step)
        for row, index in enumerate(batch.indices):
            length = len(sounds[index])
            assert batch.source_mask[row].sum() == length
            assert torch.equal(batch.frames[row, :length], sounds[index])
            assert not batch.frames[row, length:].any()
            assert batch.labels[row, : len(targets[index])].tolist() == targets[index]
        seen += batch.indices
        assert batch.num_tokens == sum(len(sounds[i]) + len(targets[i]) + 1 for i in batch.indices)
    assert sorted(seen) == [0, 1, 2, 3, 4]
