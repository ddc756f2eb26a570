"""Sound files: reading one into samples, and a folder of them with a table of what is said in each.

What lives here: WAV by the standard library, other files by the library soundfile (the extra `audio`), the table. What does not:
frames (`mel`), spoken words (`speech`), parts and models (recipes).
"""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crossattention.data.mel import resampled
from crossattention.data.pairs import read_pairs

TABLES = ("transcripts.tsv", "transcripts.csv", "transcripts.jsonl", "metadata.csv")
"""Names of the table that are looked for in a folder, in this order."""

LONGEST_SECONDS = 60.0
"""A longer sound is an error: every letter reads all of it, and cutting it is for whoever knows where words end."""


@dataclass(frozen=True)
class SpokenFolder:
    """Sound files with what is said in each.

    Args:
        table: the file that says it.
        files: the sounds.
        texts: one a file.
        problems: bad lines that were left out, each with its number.
    """

    table: Path
    files: tuple[Path, ...]
    texts: tuple[str, ...]
    skipped: int = 0
    problems: tuple[str, ...] = ()


def read_sound(path: str | Path, sample_rate: int) -> Tensor:
    """Read a sound: its channels averaged, at the sample rate that is asked for.

    PCM WAV of 8, 16, 24 or 32 bits is read by Python itself. All else (FLAC, Ogg, WAV of floats) needs the library soundfile.

    Args:
        path: the file.
        sample_rate: samples a second wanted; a file of another rate is resampled.

    Returns:
        float32 (length,), from -1 to 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no sound, has no samples or some that are no numbers, or lasts longer than `LONGEST_SECONDS`.
        ModuleNotFoundError: no PCM WAV, without `pip install 'crossattention[audio]'`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a sound file at {path}, found {'a folder' if path.is_dir() else 'nothing'}")
    samples, rate = _read_wav(path)
    if samples is None:
        samples, rate = _read_by_soundfile(path)
    if not len(samples):
        raise ValueError(f"{path} has no samples; expected a sound")
    if rate < 1:
        raise ValueError(f"{path} says that it has {rate} samples a second; expected a sound")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} has samples that are no finite numbers; expected them from -1 to 1")
    if len(samples) > LONGEST_SECONDS * rate:
        raise ValueError(f"{path} lasts {len(samples) / rate:.0f} s, expected at most {LONGEST_SECONDS:.0f} s; cut it into phrases")
    return resampled(torch.from_numpy(samples), rate, sample_rate)


def write_wav(path: Path, samples: Tensor, sample_rate: int) -> Path:
    """Write samples (length,) from -1 to 1 as a WAV file of 16 bits."""
    whole = (samples.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(whole.astype("<i2").tobytes())
    return path


def read_folder(folder: str | Path, *, table: str | Path | None = None, skip_bad: bool = False) -> SpokenFolder:
    """Read the table of a folder of sounds; the sounds themselves are not read yet.

    Args:
        folder: the folder.
        table: a two-column file, name of a sound (within the folder) and what is said; None looks for `TABLES`.
        skip_bad: leave bad lines and missing sounds out and count them, where otherwise the first of them is an error.

    Raises:
        FileNotFoundError: no such folder, no table in it, or a sound that it names is missing.
        ValueError: as `data.pairs.read_pairs`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise FileNotFoundError(f"expected a folder of sound files at {folder}, found {found}")
    found_tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if table is None and not found_tables:
        raise FileNotFoundError(f"expected a table of what is said in {folder}: {', '.join(TABLES)}; or name one (--transcripts)")
    path = found_tables[0] if table is None else Path(table)
    read = read_pairs(path, skip_bad=skip_bad)
    pairs = [(folder / name, text) for name, text in read.pairs]
    missing = [file for file, _ in pairs if not file.is_file()]
    if missing and not skip_bad:
        raise FileNotFoundError(
            f"{path} names {missing[0]}, which is not there; correct it, or leave such lines out with --skip-bad"
        )
    pairs = [(file, text) for file, text in pairs if file.is_file()]
    if not pairs:
        raise FileNotFoundError(f"none of {len(missing)} sounds that {path} names is in {folder}")
    problems = (*read.problems, *(f"{file} is not there" for file in missing))
    files, texts = zip(*pairs, strict=True)
    return SpokenFolder(path, files, texts, read.skipped + len(missing), problems)


def _read_wav(path: Path) -> tuple[np.ndarray | None, int]:
    """Samples and rate of PCM WAV; None for anything else."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError):  # the last without a word, where a part claims to end behind the file's end
        return None, 0
    data = data[: len(data) // (channels * width) * channels * width]  # a file cut short ends in a broken sample
    if width == 1:
        numbers = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        parts = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int32)
        numbers = ((parts[:, 0] << 8 | parts[:, 1] << 16 | parts[:, 2] << 24).astype(np.float64) / 2**31).astype(np.float32)
    elif width in (2, 4):
        numbers = (np.frombuffer(data, f"<i{width}").astype(np.float64) / 2 ** (8 * width - 1)).astype(np.float32)
    else:
        raise ValueError(f"expected PCM samples of 1 to 4 bytes in {path}, got {width}")
    return numbers.reshape(-1, channels).mean(1), rate


def _read_by_soundfile(path: Path) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is no PCM WAV, and other sounds need soundfile; install it with: pip install 'crossattention[audio]'"
        ) from error
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is no sound that can be read: {error}") from error
    return np.ascontiguousarray(samples.mean(1)), int(rate)
