"""A process that speaks: words in on standard input, samples out on standard output, by the eSpeak NG library.

    python -m crossattention.data.speaker        in: VOICE tab WORD, a line each       out: sample rate, then for each its samples

The library is licensed under the GPL and keeps its state in globals, so it is loaded here, in a process of its own, and never in
the user's. It comes with the package `espeakng_loader`. What does not live here: which words, and what becomes of the samples
(`speech`). Only the standard library is imported.

Format of the output, little-endian: int32 sample rate; then for each line int32 number of samples and these as int16.
"""

from __future__ import annotations

import array
import ctypes
import struct
import sys

_SYNCHRONOUS = 2
_POSITION_OF_CHARACTER = 1
_UTF8 = 1


class Speaker:
    """The library, ready to speak.

    Args:
        library: path of the shared library.
        data: path of its folder of voices.

    Raises:
        OSError: the library or its data cannot be loaded.
    """

    def __init__(self, library: str, data: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_void_p),
        ]
        self.sample_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), 0)
        if self.sample_rate <= 0:
            raise OSError(f"eSpeak NG could not read its voices in {data}")
        self._heard = array.array("h")
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._hear)  # kept: the library holds no reference
        self._library.espeak_SetSynthCallback(self._callback)
        self._voice = ""
        self._can_seed = hasattr(self._library, "espeak_ng_SetRandSeed")
        if self._can_seed:
            self._library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]

    def speak(self, voice: str, text: str) -> array.array:
        """The samples of a text.

        Raises:
            ValueError: there is no such voice.
        """
        if voice != self._voice:
            if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise ValueError(f"eSpeak NG has no voice {voice!r}; its names are such as en-us, en-gb-x-rp, en-us+f2")
            self._voice = voice
        self._heard = array.array("h")
        if self._can_seed:
            self._library.espeak_ng_SetRandSeed(1)  # of the noise in hisses: the same words in the same order sound the same
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, _POSITION_OF_CHARACTER, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        return self._heard

    def _hear(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: int | None) -> int:
        if samples and count > 0:
            self._heard.frombytes(ctypes.string_at(samples, 2 * count))
        return 0


def main() -> int:
    """Speak every line of standard input; the paths of library and data are the two arguments."""
    out = sys.stdout.buffer
    try:
        speaker = Speaker(sys.argv[1], sys.argv[2])
        out.write(struct.pack("<i", speaker.sample_rate))
        for line in sys.stdin.buffer:
            voice, _, text = line.decode().rstrip("\n").partition("\t")
            samples = speaker.speak(voice, text)
            if sys.byteorder == "big":
                samples.byteswap()
            out.write(struct.pack("<i", len(samples)))
            out.write(samples.tobytes())
    except (OSError, ValueError) as fault:
        print(fault, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
