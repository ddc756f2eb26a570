"""What counting alone says of a masked byte: unigrams and n-grams, of what stands left of it and of what stands on both sides.

What lives here: counts of a text and the probabilities made of them, exact and normalised, in bounded memory. What does not: which
text, which bytes are masked (`data.byte_windows`), the model that is compared with these.

A text is an array of bytes in which 0 stands for the end of a file: no file of text has a NUL byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from crossattention.data.byte_windows import BLANKS, END, MASK, OFFSET, ByteStream

CONTEXT = 4
"""The most bytes that a context has on one side: with the byte itself they are 5-grams."""

MOST_BYTES = 32 << 20
"""Longer texts are read in parts, evenly spread over them."""

MOST_OCCURRENCES = 1 << 16
"""Of a context that occurs more often, so many occurrences, evenly spread, are counted."""

_SHORTER_MASS = 8
_BLOCK_BYTES = 1 << 16
_END_OF_FILE = 0
_KEPT_RESULTS = 1 << 14

_IS_BLANK = np.isin(np.arange(256), [_END_OF_FILE, *BLANKS])

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ByteScores:
    """How well bytes were predicted.

    Args:
        bits_per_byte: mean of -log2 of the probability that the right byte was given.
        accuracy: share of bytes of which the most probable one was right.
    """

    bits_per_byte: float
    accuracy: float


class ByteNGrams:
    """Interpolated n-grams of a text, for bytes of which some neighbours are not known.

    P(x | context) = (count(context, x) + 8 types(context) P(x | shorter context)) / (count(context) + 8 types(context))

    where count(context) is how often the context occurs, types(context) how many different bytes stand there, and the shortest
    context is none, whose own shorter one is 1/256 for all. A context is what is known around the byte, at its distance: so a byte
    inside a masked word is predicted of the bytes before the word, by counts of what stands that far behind them. As only words are
    masked, only stretches without a blank are counted as standing there.

    Args:
        text: (length,) uint8, 0 for the end of a file.

    Raises:
        ValueError: an empty text, or more than `MOST_BYTES`.

    Cost: 10 bytes a byte of text, 17 while it is sorted: 560 MB for 32 MiB; some 4 s.
    Source: Witten & Bell 1991, "The zero-frequency problem", method C, interpolated as in Chen & Goodman 1999; 8 where these have
        1, since contexts on two sides are sparse (dev/LOG.md).

    Example:
        >>> counts = ByteNGrams(np.frombuffer(b"abcabcabd", np.uint8))
        >>> "%.2f" % counts.after(b"ab")[ord("c")]
        '0.23'
    """

    def __init__(self, text: np.ndarray) -> None:
        if not 1 <= len(text) <= MOST_BYTES:
            raise ValueError(f"expected a text of 1 to {MOST_BYTES:,} bytes, got {len(text):,}; take parts of it")
        self._text = text
        self._contexts, self._places = _sorted_contexts(text)
        self._word_bytes = _word_bytes_from(text)
        counts = np.bincount(text[self._word_bytes[:-1] > 0], minlength=256)
        self.unigram = _interpolated(counts, np.full(256, 1 / 256))
        # Of each n-gram object its own: a cache of a method of the class would keep every one alive.
        self.after = lru_cache(_KEPT_RESULTS)(self._after)
        self.between = lru_cache(_KEPT_RESULTS)(self._between)

    def _after(self, left: bytes, distance: int = 1) -> np.ndarray:
        """(256,) probabilities of the byte that stands `distance` places behind the end of `left`."""
        if not left:
            return self.unigram
        places = self._occurrences(left)
        places = places[self._word_bytes[places + 1] >= distance]
        return _interpolated(np.bincount(self._text[places + distance], minlength=256), self.after(left[1:], distance))

    def _between(self, left: bytes, right: bytes, width: int) -> np.ndarray:
        """(width, 256) probabilities of each of `width` bytes that stand between `left` and `right`."""
        if not left and not right:
            return np.tile(self.unigram, (width, 1))
        shorter = self.between(left[1:], right, width) if len(left) > len(right) else self.between(left, right[:-1], width)
        places = self._occurrences(left)
        places = places[(self._word_bytes[places + 1] >= width) & (places < len(self._text) - width - len(right))]
        for distance, byte in enumerate(right, start=width + 1):
            places = places[self._text[places + distance] == byte]
        found = self._text[places[:, None] + np.arange(1, width + 1)].astype(np.int64)
        counts = np.bincount((found + 256 * np.arange(width)).ravel(), minlength=256 * width)
        return _interpolated(counts.reshape(width, 256), shorter)

    def _occurrences(self, left: bytes) -> np.ndarray:
        """Where contexts end that end in `left`, thinned evenly if there are too many; int64."""
        least = int.from_bytes(left[::-1].ljust(CONTEXT, b"\0"), "big")
        most = int.from_bytes(left[::-1].ljust(CONTEXT, b"\xff"), "big")
        begin = int(np.searchsorted(self._contexts, np.uint32(least), side="left"))
        end = int(np.searchsorted(self._contexts, np.uint32(most), side="right"))
        count = end - begin
        if count <= MOST_OCCURRENCES:
            return self._places[begin:end].astype(np.int64)
        return self._places[begin + np.arange(MOST_OCCURRENCES) * count // MOST_OCCURRENCES].astype(np.int64)


def read_text(stream: ByteStream, *, most: int = MOST_BYTES) -> np.ndarray:
    """A stream as a text to count, or, where it is longer than `most`, blocks of 64 KiB evenly spread over it."""
    if len(stream) <= most:
        starts, length = range(0, len(stream), _BLOCK_BYTES), len(stream)
    else:
        num_blocks = max(1, most // _BLOCK_BYTES)
        starts, length = [index * len(stream) // num_blocks for index in range(num_blocks)], num_blocks * _BLOCK_BYTES
    text = np.empty(length, np.uint8)
    filled = 0
    for start in starts:
        size = min(_BLOCK_BYTES, length - filled, len(stream) - start)
        text[filled : filled + size] = _as_text(stream.read(start, size))
        filled += size
    return text[:filled]


def score_masked(
    ngrams: ByteNGrams, ids: np.ndarray, positions: np.ndarray, labels: np.ndarray, *, on_progress: Progress | None = None
) -> dict[str, ByteScores]:
    """Score counts on masked bytes.

    Args:
        ngrams: counts of a training text.
        ids: (z, m) windows, MASK where a byte is hidden.
        positions: (z, q) these places, rising in each row.
        labels: (z, q) ids of the bytes that are hidden there.
        on_progress: called after each window.

    Returns:
        unigram: whatever stands around.
        ngram_left: up to 4 visible bytes before the masked ones.
        ngram_both: up to 4 visible bytes on either side of them.
        ngram_told: the 4 bytes before each, also where these are masked: more than a model of masked bytes is shown.
    """
    rows = {name: np.empty((labels.size, 2)) for name in ("unigram", "ngram_left", "ngram_both", "ngram_told")}
    done = 0
    for number, (row, places, hidden) in enumerate(zip(ids, positions, labels, strict=True), start=1):
        whole = row.copy()
        whole[places] = hidden
        for begin, end in _runs(places):
            left, right = _visible(row, begin, -1)[::-1], _visible(row, end - 1, 1)
            both = ngrams.between(left, right, end - begin)
            for place in range(begin, end):
                told = _as_text(whole[max(0, place - CONTEXT) : place]).tobytes()
                given = {
                    "unigram": ngrams.unigram,
                    "ngram_left": ngrams.after(left, place - begin + 1),
                    "ngram_both": both[place - begin],
                    "ngram_told": ngrams.after(told, 1),
                }
                right_byte = int(whole[place]) - OFFSET
                for name, probabilities in given.items():
                    rows[name][done] = -np.log2(probabilities[right_byte]), probabilities.argmax() == right_byte
                done += 1
        if on_progress is not None:
            on_progress(number, len(ids))
    return {name: ByteScores(*map(float, found.mean(axis=0))) for name, found in rows.items()}


def _sorted_contexts(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 4 bytes up to each place, the nearest first, as one number, sorted; and the places in this order."""
    keys = np.arange(len(text), dtype=np.uint64)
    for begin in range(0, len(text), _BLOCK_BYTES):  # a block at a time: numbers of eight bytes for all of it are large
        end = min(begin + _BLOCK_BYTES, len(text))
        for back in range(CONTEXT):
            first = min(max(begin, back), end)
            keys[first:end] |= text[first - back : end - back].astype(np.uint64) << np.uint64(8 * (7 - back))
    keys.sort()
    places = keys.astype(np.uint32)
    keys >>= np.uint64(32)
    return keys.astype(np.uint32), places


def _word_bytes_from(text: np.ndarray) -> np.ndarray:
    """How many bytes of a word follow from each place on, itself counted, at most 255; one place more than the text has."""
    ends = np.flatnonzero(_IS_BLANK[text])
    following = np.empty(len(text) + 1, np.uint8)
    following[-1] = 0
    for begin in range(0, len(text), _BLOCK_BYTES):
        places = np.arange(begin, min(begin + _BLOCK_BYTES, len(text)))
        after = np.searchsorted(ends, places)
        nearest = np.where(after < len(ends), ends[np.minimum(after, len(ends) - 1)], len(text)) if len(ends) else len(text)
        following[begin : begin + len(places)] = np.minimum(nearest - places, 255)
    return following


def _interpolated(counts: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """Witten-Bell, along the last axis; the shorter context's where nothing was counted."""
    total = counts.sum(-1, keepdims=True)
    types = (counts > 0).sum(-1, keepdims=True)
    mass = _SHORTER_MASS * types
    return np.where(total > 0, (counts + mass * shorter) / np.maximum(1, total + mass), shorter)


def _runs(places: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches of neighbouring places, from a place up to an end."""
    cuts = np.flatnonzero(np.diff(places) > 1) + 1
    for stretch in np.split(places, cuts):
        yield int(stretch[0]), int(stretch[-1]) + 1


def _visible(row: np.ndarray, place: int, step: int) -> bytes:
    """Up to 4 bytes beside a place, the nearest first, as far as they are not masked."""
    found = []
    place += step
    while len(found) < CONTEXT and 0 <= place < len(row) and row[place] != MASK:
        found.append(row[place])
        place += step
    return _as_text(np.array(found, np.int64)).tobytes()


def _as_text(ids: np.ndarray) -> np.ndarray:
    return np.where(ids == END, _END_OF_FILE, ids - OFFSET).astype(np.uint8)
