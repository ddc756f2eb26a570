"""Text as bytes in windows of one length, words of them masked: batches for a masked language model, never the text as a whole.

What lives here: the vocabulary (256 bytes and six special ids), files strung together, which window stands at which step, which
bytes of it are masked. What does not: which files there are (`text_folder`), models, scores.
Letters: z batch, m bytes in a window, q masked ones of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from crossattention.data.text_folder import TextFolder

PAD, BEGIN, END, MASK, CLASS, SEPARATOR = range(6)
"""The special ids, in the order of DeepMind's byte tokenizer; a byte's id is its value plus `OFFSET`."""
OFFSET = 6
VOCAB_SIZE = OFFSET + 256

LONGEST_PIECE = 16
"""Longer words are masked in pieces of so many bytes: a line of code without blanks may be as long as a window."""

_SHORT_SHARE = 0.25
BLANKS = b" \t\n\r\v\f"
"""The bytes that divide words."""

_IS_BLANK = np.zeros(VOCAB_SIZE, bool)
_IS_BLANK[[OFFSET + byte for byte in BLANKS]] = True
_IS_BLANK[:OFFSET] = True


def encode(text: bytes) -> np.ndarray:
    """The ids of bytes, int64.

    Example:
        >>> encode(b"AB").tolist()
        [71, 72]
    """
    return np.frombuffer(text, np.uint8).astype(np.int64) + OFFSET


def decode(ids: Sequence[int] | np.ndarray) -> bytes:
    """The bytes of ids.

    Raises:
        ValueError: an id that stands for no byte.
    """
    values = np.asarray(ids, np.int64) - OFFSET
    if values.size and (values.min() < 0 or values.max() > 255):
        wrong = values[(values < 0) | (values > 255)][0] + OFFSET
        raise ValueError(f"expected ids of bytes, from {OFFSET} to {VOCAB_SIZE - 1}, got {wrong}")
    return values.astype(np.uint8).tobytes()


class ByteStream:
    """Files of a folder strung together, an END after each: a long sequence of ids of which stretches are read when asked for.

    Args:
        folder: where the files are.
        indices: which of `folder.files`, in this order.

    Raises:
        ValueError: no files.

    Cost: 8 bytes a file.
    """

    def __init__(self, folder: TextFolder, indices: Sequence[int]) -> None:
        if not indices:
            raise ValueError("expected at least one file to read, got none")
        self.folder = folder
        self.indices = tuple(indices)
        self._ends = np.cumsum([folder.files[index].size + 1 for index in self.indices])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, begin: int, length: int) -> np.ndarray:
        """`length` ids from place `begin` on; after the last file comes the first again.

        Raises:
            ValueError: a place outside the stream, more than the stream has, or a file that has changed.
        """
        if not 0 <= begin < len(self) or not 0 <= length <= len(self):
            raise ValueError(f"expected a stretch of a stream of {len(self):,} ids, got {length:,} from {begin:,} on")
        ids = np.empty(length, np.int64)
        filled = 0
        number = int(np.searchsorted(self._ends, begin, side="right"))
        within = begin - (int(self._ends[number - 1]) if number else 0)
        while filled < length:
            index = self.indices[number]
            size = self.folder.files[index].size
            taken = min(size - within, length - filled)
            if taken:
                ids[filled : filled + taken] = encode(self.folder.read(index, within, within + taken))
                filled += taken
            if filled < length:
                ids[filled] = END
                filled += 1
            number, within = (number + 1) % len(self.indices), 0
        return ids

    def name_at(self, place: int) -> str:
        """The name of the file that a place of the stream lies in."""
        return self.folder.files[self.indices[int(np.searchsorted(self._ends, place, side="right"))]].label


@dataclass(frozen=True)
class MaskedBatch:
    """Windows with masked bytes.

    Args:
        ids: (z, m) int64, MASK in the place of what is hidden.
        positions: (z, q) int64, the masked places, rising.
        labels: (z, q) int64, what stood there.
        indices: the places of the windows in their stream.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    indices: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Bytes that are read."""
        return self.ids.numel()

    def to(self, device: torch.device | str) -> MaskedBatch:
        """The same batch on another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("ids", "positions", "labels")}
        return replace(self, **moved)


class MaskedWindows:
    """All batches of a stream.

    Every epoch takes each byte of the stream once (the last window may overlap the first): it is cut into windows at a place that
    differs from epoch to epoch, and the windows come in an order of their own. Of each window the same number of bytes is masked,
    in whole words: a word is what stands between blanks, drawn words are masked until the number is reached, and of the last one
    only the first bytes are; words over 16 bytes come in pieces of 16. Every masked byte becomes MASK.

    Args:
        stream: what is read.
        length: bytes in a window, m.
        batch_size: windows in a batch, z.
        mask_share: share of a window that is masked, above 0 and at most 0.5.
        seed: of order, cuts and masks.
        shortest: if given, one batch in four has windows of a length from this up to `length`, so that short texts are learned too;
            what is cut off is not read in that epoch.

    Raises:
        ValueError: a setting out of range, or a stream shorter than a window.

    Cost: no memory beyond a batch, however long the stream: the order is computed, not stored. Per window one or more file reads
        and some 50 us.
    Source: Jaegle et al. 2022, arXiv:2107.14795, section 4.1: 15 % of the words, space-delimited; the order is a Feistel network
        (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking).
    """

    def __init__(
        self,
        stream: ByteStream,
        *,
        length: int,
        batch_size: int,
        mask_share: float = 0.15,
        seed: int = 0,
        shortest: int | None = None,
    ) -> None:
        check_window(length, mask_share)
        if shortest is not None and not 2 <= shortest <= length:
            raise ValueError(f"expected a shortest window of 2 to {length} bytes, got {shortest}")
        if batch_size < 1:
            raise ValueError(f"expected a batch of at least 1 window, got {batch_size}")
        if len(stream) < length:
            raise ValueError(
                f"expected at least one window of {length} bytes, got {len(stream)} with the files' ends; give more text, or a "
                "shorter window (--length)"
            )
        self.stream = stream
        self.length = length
        self.batch_size = batch_size
        self.mask_share = mask_share
        self.seed = seed
        self.shortest = shortest

    @property
    def num_windows(self) -> int:
        """Windows in an epoch."""
        return -(-len(self.stream) // self.length)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every window once."""
        return -(-self.num_windows // self.batch_size)

    def batch_at(self, step: int) -> MaskedBatch:
        """The batch of a step, a pure function of (seed, step); batches go on from one epoch into the next.

        Raises:
            ValueError: a negative step, or a file that has changed since the folder was listed.
        """
        if step < 0:
            raise ValueError(f"expected a step from 0 on, got {step}")
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        return self.batch_of([self.place(number) for number in numbers], seed=step)

    def batch_of(self, places: Sequence[int], *, seed: int) -> MaskedBatch:
        """The windows that begin at these places of the stream, masks drawn by (the windows' seed, `seed`)."""
        random = np.random.default_rng((self.seed, 1, seed))
        length = self.length
        if self.shortest is not None and random.random() < _SHORT_SHARE:
            length = int(random.integers(self.shortest, self.length + 1))
        num_masked = count_masked(length, self.mask_share)
        windows = np.stack([self.stream.read(place, length) for place in places])
        positions = np.stack([masked_positions(window, num_masked, random) for window in windows])
        labels = np.take_along_axis(windows, positions, axis=1)
        np.put_along_axis(windows, positions, MASK, axis=1)
        return MaskedBatch(*map(torch.from_numpy, (windows, positions, labels)), indices=tuple(places))

    def place(self, number: int) -> int:
        """Where in the stream the window stands that is the `number`-th of all epochs."""
        epoch, within = divmod(number, self.num_windows)
        shuffled = permuted(within, self.num_windows, key=mixed(mixed(self.seed) ^ epoch))
        shift = mixed(mixed(self.seed + 1) ^ epoch) % self.length if self.num_windows > 1 else 0
        return (shift + shuffled * self.length) % len(self.stream)


def check_window(length: int, mask_share: float) -> None:
    """Check the length of a window and the share of it that is masked.

    Raises:
        ValueError: one out of range.
    """
    if length < 2:
        raise ValueError(f"expected windows of at least 2 bytes, got {length}")
    if not 0 < mask_share <= 0.5:
        raise ValueError(f"expected a masked share above 0 and at most 0.5, got {mask_share}")


def count_masked(length: int, mask_share: float) -> int:
    """How many bytes of a window are masked; at least one.

    Example:
        >>> count_masked(256, 0.15)
        38
    """
    return min(max(1, round(length * mask_share)), length // 2)


def masked_positions(ids: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Places in a window to mask: whole words, drawn until there are `count` bytes; (count,) rising.

    Where all words have fewer bytes, blanks are taken too; special ids never are. Of the last word drawn only the first bytes are
    masked, if all of it would be too many.

    Raises:
        ValueError: the window has fewer bytes than that.
    """
    starts, ends = word_pieces(ids)
    order = random.permutation(len(starts))
    lengths = (ends - starts)[order]
    num_drawn = int(np.searchsorted(np.cumsum(lengths), count)) + 1
    drawn = order[:num_drawn]
    found = _stretches(starts[drawn], ends[drawn])[:count]
    if len(found) < count:
        blanks = np.flatnonzero(_IS_BLANK[ids] & (ids >= OFFSET))
        if len(found) + len(blanks) < count:
            raise ValueError(f"expected a window of at least {count} bytes to mask, got {len(found) + len(blanks)}")
        found = np.concatenate([found, random.permutation(blanks)[: count - len(found)]])
    return np.sort(found)


def word_pieces(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the words of a window begin and end, those over 16 bytes in pieces."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], _IS_BLANK[ids], [True]]).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    pieces = -(-(ends - starts) // LONGEST_PIECE)
    first = np.repeat(starts, pieces)
    number = np.arange(len(first)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = first + number * LONGEST_PIECE
    return begin, np.minimum(begin + LONGEST_PIECE, np.repeat(ends, pieces))


def mixed(number: int) -> int:
    """A 64-bit number that looks random, the same one for the same `number`. Source: Steele et al. 2014, SplitMix64."""
    number = (number + 0x9E3779B97F4A7C15) & _WORD
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _WORD
    return number ^ (number >> 31)


def permuted(index: int, size: int, *, key: int) -> int:
    """The place of an index in a random order of 0 .. size - 1, without the order in memory.

    A Feistel network of four rounds on the smallest even number of bits that holds `size`, applied until the result is below
    `size`: a bijection for every key. Fewer than four applications are needed on average.

    Example:
        >>> sorted(permuted(index, 5, key=7) for index in range(5))
        [0, 1, 2, 3, 4]
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for step in range(4):
            left, right = right, left ^ (mixed(key ^ mixed((step << 56) ^ right)) & low)
        index = left << half | right
        if index < size:
            return index


def _stretches(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """All places from each start up to its end, in this order."""
    lengths = ends - starts
    first = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return first + np.arange(int(lengths.sum()))


_WORD = (1 << 64) - 1
