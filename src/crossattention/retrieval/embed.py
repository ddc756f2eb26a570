"""What turns a chunk into a vector: the protocol of an embedder, and the default one, which needs no weights and no download.

Legend: c chunks, m tokens of a chunk, d width of the embedding, B buckets, s slots of a feature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from crossattention.retrieval.chunks import Chunks

ROWS = 1024


@dataclass(frozen=True)
class ChunkTexts:
    """Chunks as an embedder sees them: their tokens, and their text where that is asked for.

    Args:
        chunks: the rows.
        tokenizer: what reads them.
    """

    chunks: Chunks
    tokenizer: Any

    def __len__(self) -> int:
        return len(self.chunks)

    @cached_property
    def texts(self) -> list[str]:
        """The text of each; a character of which a chunk has only some bytes is left out at its ends."""
        rows = zip(self.chunks.tokens.tolist(), self.chunks.lengths.tolist(), strict=True)
        texts = self.tokenizer.decode_batch([row[:length] for row, length in rows], skip_special_tokens=False)
        return [text.strip("\ufffd") for text in texts]


class Embedder(Protocol):
    """Turns chunks into vectors whose squared Euclidean distance says how near they are."""

    @property
    def dim(self) -> int:
        """Width d of the vectors."""
        ...

    @property
    def description(self) -> Mapping[str, Any]:
        """What it is, for JSON: all that its vectors depend on, weights by their hash."""
        ...

    def __call__(self, chunks: ChunkTexts) -> np.ndarray:
        """(c, d) float32, each row by itself: the same whatever stands beside it."""
        ...


def embedder_sha256(description: Mapping[str, Any]) -> str:
    """The hash that stands for an embedder: of its description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class NgramConfig:
    """Sizes of the default embedder.

    Args:
        dim: width d of the vectors.
        buckets: B, into which n-grams are hashed; a power of two.
        slots: s, numbers of a vector that a bucket counts in; divides `dim`.
        orders: lengths of the n-grams of tokens.

    Raises:
        ValueError: one out of range.
    """

    dim: int = 256
    buckets: int = 1 << 18
    slots: int = 8
    orders: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        if self.slots < 1 or self.dim < 1 or self.dim % self.slots:
            raise ValueError(f"expected slots that divide the width, got slots={self.slots} for dim={self.dim}")
        if self.buckets < 2 or self.buckets & (self.buckets - 1):
            raise ValueError(f"expected a power of two of buckets, got {self.buckets}")
        if not self.orders or min(self.orders) < 1:
            raise ValueError(f"expected lengths of n-grams of at least 1, got {self.orders}")


class NgramEmbedder:
    """N-grams of tokens, hashed, weighted by TF-IDF, projected at random, of length 1. In numpy; deterministic.

        x[f]  = (1 + ln tf[f]) (1 + ln((1 + c) / (1 + df[f])))       f: the bucket of an n-gram of 1, 2 or 3 tokens
        y     = S x / sqrt(s),   out = y / |y|                          S (d, B): s entries of +1 or -1 a column, by a hash

    tf counts the bucket in the chunk, df the chunks of the first indexed corpus that have it, c is how many these were: both stay
    as they are when documents are added. S keeps squared lengths in the mean; with d = 256 cosines are off by about 1/16. Defaults:
    B = 2^18, s = 8, d = 256.

    Args:
        counts: (B,) df.
        num_chunks: c.
        config: sizes.

    Cost: 3 m s additions a chunk; some 20,000 chunks a second on one core.
    Source: Salton and Buckley 1988 (TF-IDF); Weinberger et al. 2009, arXiv:0902.2206 (hashing); Kane and Nelson 2014,
    arXiv:1012.1577 (sparse projections).
    """

    def __init__(self, counts: np.ndarray, num_chunks: int, config: NgramConfig = NgramConfig()) -> None:
        if counts.shape != (config.buckets,):
            raise ValueError(f"expected counts of shape ({config.buckets},), got {counts.shape}")
        self.config, self.num_chunks = config, num_chunks
        self.counts = np.asarray(counts, "<i8")
        self._idf = 1.0 + np.log((1.0 + num_chunks) / (1.0 + self.counts))
        keys = np.arange(config.buckets, dtype=np.uint64)[:, None] * np.uint64(config.slots)
        mixed = mix(keys + np.arange(config.slots, dtype=np.uint64) + np.uint64(1 << 40))
        width = config.dim // config.slots
        self._places = ((mixed >> np.uint64(1)) % np.uint64(width)).astype(np.int64) + np.arange(config.slots) * width
        self._signs = np.where(mixed & np.uint64(1), 1.0, -1.0) / np.sqrt(config.slots)

    @property
    def dim(self) -> int:
        """Width d of the vectors."""
        return self.config.dim

    @property
    def description(self) -> dict[str, Any]:
        """Its sizes, and a hash of its counts."""
        return {
            "kind": "ngrams",
            "dim": self.config.dim,
            "buckets": self.config.buckets,
            "slots": self.config.slots,
            "orders": list(self.config.orders),
            "num_chunks": self.num_chunks,
            "counts_sha256": hashlib.sha256(self.counts.tobytes()).hexdigest(),
        }

    def __call__(self, chunks: ChunkTexts) -> np.ndarray:
        """(c, d) float32 of length 1; of 0 where a chunk has no tokens."""
        tokens, lengths = chunks.chunks.tokens, chunks.chunks.lengths
        found = np.empty((len(chunks), self.dim), np.float32)
        for begin in range(0, len(chunks), ROWS):
            rows = slice(begin, begin + ROWS)
            found[rows] = self._embed(tokens[rows], lengths[rows])
        return found

    def _embed(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        rows, buckets, counts = bucket_counts(tokens, lengths, self.config)
        weights = (1.0 + np.log(counts)) * self._idf[buckets]
        flat = (rows * self.dim)[:, None] + self._places[buckets]
        signed = weights[:, None] * self._signs[buckets]
        vectors = np.bincount(flat.reshape(-1), signed.reshape(-1), len(tokens) * self.dim).reshape(len(tokens), self.dim)
        norms = np.sqrt((vectors * vectors).sum(1, keepdims=True))
        return (vectors / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def bucket_counts(tokens: np.ndarray, lengths: np.ndarray, config: NgramConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which buckets each chunk has, and how often: rows, buckets and counts, by rows and then by buckets."""
    parts = []
    for order in config.orders:
        if order > tokens.shape[1]:
            continue
        hashes = np.full((len(tokens), tokens.shape[1] - order + 1), np.uint64(order))
        for shift in range(order):
            hashes = mix(hashes ^ tokens[:, shift : shift + hashes.shape[1]].astype(np.uint64))
        is_real = np.arange(hashes.shape[1]) + order <= lengths[:, None]
        buckets = (hashes & np.uint64(config.buckets - 1)).astype(np.int64)
        parts.append(np.where(is_real, buckets, config.buckets))  # one bucket more for what is not there
    found = np.sort(np.concatenate(parts, axis=1), axis=1)
    is_first = np.ones(found.shape, bool)
    is_first[:, 1:] = found[:, 1:] != found[:, :-1]
    starts = np.flatnonzero(is_first)
    counts = np.diff(starts, append=found.size)
    rows, buckets = starts // found.shape[1], found.reshape(-1)[starts]
    is_real = buckets < config.buckets
    return rows[is_real], buckets[is_real], counts[is_real]


def count_chunks(blocks: Iterable[tuple[np.ndarray, np.ndarray]], config: NgramConfig) -> tuple[np.ndarray, int]:
    """In how many chunks each bucket stands, and how many chunks there are, of blocks of tokens and lengths."""
    counts, total = np.zeros(config.buckets, np.int64), 0
    for tokens, lengths in blocks:
        for begin in range(0, len(tokens), ROWS):
            rows = slice(begin, begin + ROWS)
            _, buckets, _ = bucket_counts(np.asarray(tokens[rows]), np.asarray(lengths[rows]).astype(np.int64), config)
            counts += np.bincount(buckets, minlength=config.buckets)
        total += len(tokens)
    return counts, total


def mix(numbers: np.ndarray) -> np.ndarray:
    """64-bit numbers that look random, the same ones for the same `numbers`. Source: Steele et al. 2014, SplitMix64."""
    with np.errstate(over="ignore"):
        numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return numbers ^ (numbers >> np.uint64(31))


def check_embeddings(found: Any, rows: int, dim: int) -> np.ndarray:
    """What an embedder gave, as float32.

    Raises:
        ValueError: of another shape, or with a number that is not finite.
    """
    array = np.asarray(found, np.float32)
    if array.shape != (rows, dim):
        raise ValueError(f"expected embeddings of shape ({rows}, {dim}), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"the embedder gave a number that is not finite, in row {int(np.flatnonzero(~np.isfinite(array).all(1))[0])}"
        )
    return array


def names_of(description: Mapping[str, Any], keys: Sequence[str] = ("kind", "dim")) -> str:
    """An embedder in a few words."""
    return ", ".join(f"{key} {description[key]}" for key in keys if key in description)
