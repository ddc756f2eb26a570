"""Words spoken offline by eSpeak NG, as frames, kept in a cache.

What lives here: having words spoken in a process of its own (`speaker`), the frames of them, the cache with its digests. What does
not: which words and voices (recipes). Needs the extra `speech` (`espeakng-loader`, GPL).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crossattention.data.cache import user_cache
from crossattention.data.mel import DECADES, HOP_SECONDS, WINDOW_SECONDS, log_mel, resampled

Spoken = tuple[str, str]
"""A voice, and the word that it says."""

_FORMAT = 1
_TOGETHER = 2000
"""Words that one process speaks: 40 MB of samples."""


@dataclass(frozen=True, eq=False)
class FrameSet:
    """The frames of many sounds in one array.

    Args:
        frames: float16 (sum of the lengths, bands).
        lengths: frames of each sound.
    """

    frames: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, sounds: Sequence[Tensor]) -> FrameSet:
        """The set of some sounds' frames (m, bands)."""
        return cls(torch.cat([sound.half() for sound in sounds]), tuple(len(sound) for sound in sounds))

    def each(self) -> list[Tensor]:
        """The frames of each sound, float32."""
        return [part.float() for part in self.frames.split(self.lengths)]


def cache_folder() -> Path:
    """Where spoken words are kept."""
    return user_cache("speech")


def speech_digest(spoken: Sequence[Spoken], *, sample_rate: int, bands: int) -> str:
    """The sha256 of all that the frames of spoken words follow from: words, voices, the library, the settings.

    Raises:
        ModuleNotFoundError: without `pip install 'crossattention[speech]'`.
    """
    settings = [_FORMAT, sample_rate, bands, WINDOW_SECONDS, HOP_SECONDS, DECADES, _library_sha256()]
    return hashlib.sha256(json.dumps([settings, list(spoken)]).encode()).hexdigest()


def spoken_frames(
    spoken: Sequence[Spoken], *, sample_rate: int, bands: int, on_progress: Callable[[int, int], None] | None = None
) -> FrameSet:
    """The frames of words, spoken now or taken from the cache.

    Args:
        spoken: voices and words, at least one.
        sample_rate: samples a second, to which they are resampled.
        bands: of the frames.
        on_progress: told now and then how many are spoken, and how many there are.

    Raises:
        ModuleNotFoundError: without `pip install 'crossattention[speech]'`.
        ValueError: a voice that there is not, or a damaged file in the cache, which is named.

    Cost: about 1.5 ms a word the first time (half of it eSpeak's), then the reading of 160 bytes a frame and band pair of bytes.
    """
    digest = speech_digest(spoken, sample_rate=sample_rate, bands=bands)
    path = cache_folder() / f"{digest[:24]}.safetensors"
    if path.is_file():
        return _read(path, digest)
    sounds = []
    for number, samples in enumerate(speak(spoken, sample_rate=sample_rate), start=1):
        sounds.append(log_mel(samples, sample_rate, bands))
        if on_progress is not None and (number % 200 == 0 or number == len(spoken)):
            on_progress(number, len(spoken))
    made = FrameSet.of(sounds)
    _write(path, made, digest)
    return made


def speak(spoken: Sequence[Spoken], *, sample_rate: int) -> Iterator[Tensor]:
    """The samples of words as they are spoken, float32 (length,) from -1 to 1.

    Raises:
        ModuleNotFoundError: without `pip install 'crossattention[speech]'`.
        ValueError: a voice that there is not, or a word that has a line end or a tab in it or gives no sound.
    """
    for voice, word in spoken:
        if not word.strip() or any(mark in voice + word for mark in "\t\n\r"):
            raise ValueError(f"expected a word without tabs and line ends to be spoken, got {word!r} (voice {voice!r})")
    library, data = _library()
    command = [sys.executable, "-m", "crossattention.data.speaker", library, data]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    for begin in range(0, len(spoken), _TOGETHER):
        part = spoken[begin : begin + _TOGETHER]
        lines = "".join(f"{voice}\t{word}\n" for voice, word in part)
        # Through a file: two processes that wait for each other at a pipe take many times as long on a busy machine.
        with tempfile.TemporaryFile() as heard:
            ended = subprocess.run(
                command,
                input=lines.encode(),
                stdout=heard,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
                check=False,
            )
            if ended.returncode:
                said = ended.stderr.decode(errors="replace").strip() or f"it ended with code {ended.returncode}"
                raise ValueError(f"the process that speaks stopped: {said.splitlines()[-1]}")
            heard.seek(0)
            (rate,) = struct.unpack("<i", heard.read(4))
            for voice, word in part:
                (count,) = struct.unpack("<i", heard.read(4))
                if not count:
                    raise ValueError(f"eSpeak NG gave no sound for {word!r} in the voice {voice!r}")
                samples = torch.frombuffer(bytearray(heard.read(2 * count)), dtype=torch.int16)
                yield resampled(samples.float() / 32768, rate, sample_rate)


def _library() -> tuple[str, str]:
    """Paths of the library and of its voices."""
    try:
        import espeakng_loader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "words spoken by eSpeak NG need espeakng_loader (GPL); install it with: pip install 'crossattention[speech]'; "
            "a folder of your own sounds needs no such thing (--data FOLDER)"
        ) from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


@cache
def _library_sha256() -> str:
    return hashlib.sha256(Path(_library()[0]).read_bytes()).hexdigest()


def _content_sha256(made: FrameSet) -> str:
    found = hashlib.sha256(json.dumps(made.lengths).encode())
    found.update(made.frames.numpy().tobytes())
    return found.hexdigest()


def _write(path: Path, made: FrameSet, digest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    facts = {"digest": digest, "content": _content_sha256(made)}
    try:
        save_file({"frames": made.frames.contiguous(), "lengths": torch.tensor(made.lengths)}, beside, metadata=facts)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path, digest: str) -> FrameSet:
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            made = FrameSet(file.get_tensor("frames"), tuple(file.get_tensor("lengths").tolist()))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}; delete it, and the words are spoken again") from error
    if facts.get("digest") != digest or facts.get("content") != _content_sha256(made):
        raise ValueError(f"{path} is damaged: its checksum does not fit; delete it, and the words are spoken again")
    return made
