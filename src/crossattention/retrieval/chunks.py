"""Chunks: documents as rows of so many tokens, neighbours with their continuations, and runs of tokens that two texts share.

What lives here: tokens in and arrays out, in memory. What does not: files (`store`, `documents`), embeddings (`embed`), neighbours
(`search`).

Legend: c chunks, m tokens of a chunk (64), k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crossattention.retrieval.documents import pieces_of

ENCODE_CHARACTERS = 1 << 20
_RUN_PAIRS = 4096


@dataclass(frozen=True)
class Chunks:
    """Rows of tokens.

    Args:
        tokens: (c, m) ids; behind the last token of a document, the padding.
        lengths: (c,) how many of a row's tokens are real.
        num_bytes: (c,) bytes of UTF-8 that these tokens stand for; they sum to those of the text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mask(self) -> np.ndarray:
        """(c, m) bool, True where a token is real."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]


@dataclass
class Chunker:
    """Cuts one document into chunks while its tokens come.

    Args:
        length: tokens of a chunk.
        pad_id: what fills the last one up.
    """

    length: int
    pad_id: int
    _tokens: list[np.ndarray] = field(default_factory=list)
    _begins: list[int] = field(default_factory=list)  # where in the text each chunk begins, in bytes
    _count: int = 0
    _given: int = 0
    _bytes: int = 0

    def add(self, text: str, encoding: Any) -> None:
        """Take the next piece of the document: its text, and what a tokenizer made of it."""
        ids = np.asarray(encoding.ids, dtype=np.int64)
        first = -self._count % self.length
        if first < len(ids):
            starts = [encoding.token_to_chars(place)[0] for place in range(first, len(ids), self.length)]
            self._begins += [self._bytes + place for place in _byte_places(text, starts)]
        self._tokens.append(ids)
        self._count += len(ids)
        self._bytes += len(text) if text.isascii() else len(text.encode("utf-8"))

    def ready(self) -> Chunks:
        """The chunks that are full, once; the newest stays until another begins, because its bytes end there."""
        return self._take(max(0, len(self._begins) - 1), is_last=False)

    def rest(self) -> Chunks:
        """All chunks that are left, at the end of the document."""
        return self._take(len(self._begins), is_last=True)

    def _take(self, num: int, *, is_last: bool) -> Chunks:
        tokens = np.full((num, self.length), self.pad_id, np.int64)
        lengths = np.full(num, self.length, np.int64)
        if num == 0:
            return Chunks(tokens, lengths, np.zeros(0, np.int64))
        waiting = np.concatenate(self._tokens)
        taken = waiting[: num * self.length]
        tokens.reshape(-1)[: len(taken)] = taken
        lengths[-1] = len(taken) - (num - 1) * self.length
        begins = self._begins[:num]
        if self._given == 0:
            begins[0] = 0  # what a tokenizer drops before its first token is the first chunk's
        ends = [*begins[1:], self._bytes if is_last else self._begins[num]]
        self._tokens, self._begins = [waiting[len(taken) :]], self._begins[num:]
        self._given += num
        return Chunks(tokens, lengths, np.asarray(ends, np.int64) - np.asarray(begins, np.int64))


def cut(text: str, tokenizer: Any, *, length: int = 64, pad_id: int = 0) -> Chunks:
    """Cut a text as a document of a database is cut.

    Args:
        text: any text.
        tokenizer: as `load_tokenizer` gives it.
        length: tokens of a chunk.
        pad_id: what fills the last one up.

    Returns:
        Its chunks; none of a text without tokens.
    """
    chunker = Chunker(length, pad_id)
    pieces = list(pieces_of(iter((text,))))
    for piece, encoding in zip(pieces, tokenizer.encode_batch(pieces, add_special_tokens=False), strict=True):
        chunker.add(piece, encoding)
    return chunker.rest()


def encoded(pieces: Iterable[str | None], tokenizer: Any) -> Iterator[tuple[str, Any] | None]:
    """Each piece with its encoding, many encoded at once; None, which ends a document, stays where it is."""
    waiting: list[str | None] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece or "")
        if size >= ENCODE_CHARACTERS or len(waiting) >= ENCODE_CHARACTERS // 64:
            yield from _encode_waiting(waiting, tokenizer)
            waiting, size = [], 0
    yield from _encode_waiting(waiting, tokenizer)


def with_continuation(
    ids: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, documents: np.ndarray, *, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of chunks, each followed by those of the next chunk of its document.

    Args:
        ids: (...) numbers of chunks; -1 for none.
        tokens: (c, m) of all chunks.
        lengths: (c,) real tokens of each.
        documents: (c,) the document of each.
        pad_id: what stands where there is no token.

    Returns:
        (..., 2 m) int64, and (..., 2 m) bool, True where a token is real.
    """
    ids = np.asarray(ids)
    flat, length = ids.reshape(-1), tokens.shape[1]
    found = np.full((flat.size, 2 * length), pad_id, np.int64)
    mask = np.zeros(found.shape, bool)
    places = np.arange(length)
    here = np.flatnonzero(flat >= 0)
    follows = here[flat[here] + 1 < len(tokens)]
    follows = follows[documents[flat[follows] + 1] == documents[flat[follows]]]
    for rows, chunks, begin in ((here, flat[here], 0), (follows, flat[follows] + 1, length)):
        real = places < np.asarray(lengths[chunks]).astype(np.int64)[:, None]
        found[rows, begin : begin + length] = np.where(real, tokens[chunks], pad_id)
        mask[rows, begin : begin + length] = real
    return found.reshape(*ids.shape, 2 * length), mask.reshape(*ids.shape, 2 * length)


def longest_common_run(first: np.ndarray, second: np.ndarray, first_mask: np.ndarray, second_mask: np.ndarray) -> np.ndarray:
    """How many tokens the longest run has that stands in both of two rows.

        run[i, j] = run[i - 1, j - 1] + 1 where first[i] = second[j], else 0; the result is the greatest

    Args:
        first: (p, s) tokens.
        second: (p, t) tokens.
        first_mask: (p, s) bool, True = real; other places equal nothing.
        second_mask: (p, t) bool.

    Returns:
        (p,) int64.

    Cost: s t comparisons a pair, in blocks of 4,096 pairs: about a million pairs of 64 and 128 tokens in ten seconds.

    Example:
        >>> real = np.ones((1, 4), bool)
        >>> longest_common_run(np.array([[1, 2, 3, 9]]), np.array([[7, 1, 2, 3]]), real, real)
        array([3])
    """
    found = np.zeros(len(first), np.int64)
    for begin in range(0, len(first), _RUN_PAIRS):
        rows = slice(begin, begin + _RUN_PAIRS)
        a = np.where(first_mask[rows], first[rows], -1).astype(np.int32)
        b = np.where(second_mask[rows], second[rows], -2).astype(np.int32)
        # Transposed: each step then works on whole stretches of memory.
        a, b = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        dtype = np.uint8 if min(len(a), len(b)) < 256 else np.uint16
        run = np.zeros((len(b) + 1, a.shape[1]), dtype)
        longest = np.zeros(a.shape[1], dtype)
        for token in a:
            run[1:] = (run[:-1] + dtype(1)) * (b == token)
            np.maximum(longest, run.max(0), out=longest)
        found[rows] = longest
    return found


def _byte_places(text: str, starts: Sequence[int]) -> list[int]:
    """Where in UTF-8 the characters at these rising places begin."""
    if text.isascii():
        return list(starts)
    places, done, size = [], 0, 0
    for start in starts:
        size += len(text[done:start].encode("utf-8"))
        done = max(done, start)
        places.append(size)
    return places


def _encode_waiting(waiting: list[str | None], tokenizer: Any) -> Iterator[tuple[str, Any] | None]:
    texts = [piece for piece in waiting if piece is not None]
    encodings = iter(tokenizer.encode_batch(texts, add_special_tokens=False) if texts else ())
    for piece in waiting:
        yield None if piece is None else (piece, next(encodings))
