"""Windows of a chunk database: what RETRO is trained and scored on, with the neighbours of each chunk.

What lives here: which documents are held out, which chunks stand in a window, at which step, and with which neighbours. What does
not: making and searching the database (`retrieval`), the loss.

A window is some consecutive chunks of one document. The last token's successor is not in it, so the neighbours of its last chunk
bear on nothing and are left out.

Legend: z windows of a batch, w chunks of a window, c tokens of a chunk, k neighbours, r = 2 c their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from crossattention.retrieval import Database

Part = Literal["train", "valid", "test"]
HELD_OUT: dict[Part, float] = {"valid": 0.02, "test": 0.08}
"""Shares of the groups of documents that training never sees."""


def parts_of(database: Database) -> dict[Part, np.ndarray]:
    """The documents in three parts by their groups: no group, and so no document, stands in two of them.

    2 % of all groups are for validation, 8 % for test; where a part would be empty it takes the group that is nearest. A document
    keeps its part whatever is added later, unless it was taken so.

    Returns:
        Part -> numbers of documents, rising.

    Raises:
        ValueError: fewer than three groups.
    """
    groups = np.asarray(database.document_groups)
    unique = np.unique(groups)  # hashes, so that their order is as good as drawn
    if len(unique) < 3:
        raise ValueError(
            f"the database in {database.path} has {len(unique)} groups of documents, and a group stands in one part only "
            "(training, validation, test): expected at least 3; index more files, or another pattern of --same"
        )
    places = unique / 2.0**64
    below_valid = int((places < HELD_OUT["valid"]).sum())
    below_test = int((places < HELD_OUT["valid"] + HELD_OUT["test"]).sum())
    num_valid = min(max(1, below_valid), len(unique) - 2)
    num_test = min(max(1, below_test - num_valid), len(unique) - 1 - num_valid)
    place = np.searchsorted(unique, groups)
    return {
        "train": np.flatnonzero(place >= num_valid + num_test),
        "valid": np.flatnonzero(place < num_valid),
        "test": np.flatnonzero((place >= num_valid) & (place < num_valid + num_test)),
    }


@dataclass(frozen=True)
class ChunkBatch:
    """Windows with their neighbours.

    Args:
        ids: (z, w c) int64 tokens, padding behind the end of a document.
        real: (z, w c) bool, True where a token is real.
        neighbours: (z, w - 1, k, r) int64 tokens.
        neighbour_mask: (z, w - 1, k, r) bool, True where they are real; all False of no neighbour.
        indices: which windows these are, one a row.
        num_tokens: real tokens.
    """

    ids: Tensor
    real: Tensor
    neighbours: Tensor
    neighbour_mask: Tensor
    indices: tuple[int, ...]
    num_tokens: int

    def to(self, device: torch.device | str) -> ChunkBatch:
        """The same batch on another device."""
        names = ("ids", "real", "neighbours", "neighbour_mask")
        moved = (getattr(self, name).to(device, non_blocking=True) for name in names)
        return replace(self, **dict(zip(names, moved, strict=True)))


@dataclass(frozen=True)
class Window:
    """Some chunks of a document, and those of them that are scored.

    Args:
        first: its first chunk.
        count: how many.
        scored_from: the first chunk of it that no window before scored, counted within it.
        is_start: whether it begins its document.
    """

    first: int
    count: int
    scored_from: int = 0
    is_start: bool = False


class Neighbourhood:
    """The neighbours that chunks may read: those of the table that lie in allowed documents, the nearest first.

    Args:
        database: it has a table.
        documents: numbers of the allowed documents: those of the training part, so that nothing held out is ever read.

    Raises:
        ValueError: a database without a table.
    """

    def __init__(self, database: Database, documents: np.ndarray) -> None:
        self.database = database
        self.is_allowed = np.zeros(database.num_documents, bool)
        self.is_allowed[documents] = True
        self.table = database.table
        self._ends = np.asarray(database.document_ends).astype(np.int64)
        self._allowed_documents = np.asarray(documents)

    def nearest(self, chunks: np.ndarray, k: int) -> np.ndarray:
        """(..., k) numbers of the neighbours of chunks (...), -1 for none; a chunk of -1 has none."""
        ids, allowed = self._of_table(chunks)
        order = np.argsort(~allowed, axis=-1, kind="stable")[..., :k]
        found = np.where(np.take_along_axis(allowed, order, -1), np.take_along_axis(ids, order, -1), -1)
        if found.shape[-1] < k:
            found = np.concatenate((found, np.full((*found.shape[:-1], k - found.shape[-1]), -1)), -1)
        return found

    def overlap(self, chunks: np.ndarray) -> np.ndarray:
        """(...) how much of each chunk stands in its allowed neighbours word for word: the longest run in common, over c."""
        _, allowed = self._of_table(chunks)
        runs = np.where(allowed, self.table.runs[np.maximum(chunks, 0)], 0)
        return runs.max(-1) / self.database.chunk_length

    def random(self, shape: Sequence[int], generator: np.random.Generator) -> np.ndarray:
        """Numbers of chunks drawn of all allowed ones."""
        begins = np.concatenate(([0], self._ends[:-1]))[self._allowed_documents]
        sizes = self._ends[self._allowed_documents] - begins
        bounds = np.cumsum(sizes)
        drawn = generator.integers(bounds[-1], size=tuple(shape))
        document = np.searchsorted(bounds, drawn, side="right")
        return begins[document] + drawn - (bounds - sizes)[document]

    def _of_table(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = self.table.ids[np.maximum(chunks, 0)].astype(np.int64)
        documents = np.asarray(self.database.documents)[np.maximum(ids, 0)]
        return ids, (ids >= 0) & self.is_allowed[documents] & (chunks >= 0)[..., None]


class ChunkWindows:
    """Windows of some documents, in an order that is a pure function of (seed, step).

    Args:
        database: where they lie.
        documents: numbers of the documents.
        chunks: chunks of a window, w; a shorter document is filled up.
        batch_size: windows a step.
        neighbourhood: where their neighbours come from.
        k: neighbours of each chunk; 0 for none.
        unread: share of the windows that get no neighbours, so that a model learns to do without too.
        seed: of the order.

    Raises:
        ValueError: a size below 1, documents without a chunk.
    """

    def __init__(
        self,
        database: Database,
        documents: np.ndarray,
        *,
        chunks: int,
        batch_size: int,
        neighbourhood: Neighbourhood | None,
        k: int,
        unread: float = 0.0,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("chunks", chunks, 1), ("batch_size", batch_size, 1), ("k", k, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.database, self.chunks, self.batch_size = database, chunks, batch_size
        self.neighbourhood, self.k, self.unread, self.seed = neighbourhood, k, unread, seed
        firsts, counts = [], []
        for document in documents.tolist():
            held = database.document_chunks(document)
            # The last window is drawn back so that it is whole: no token is padding where a document has enough.
            begins = [*range(held.start, max(held.start + 1, held.stop - chunks), chunks)]
            if len(held) > chunks:
                begins.append(held.stop - chunks)
            begins = [begin for begin in dict.fromkeys(begins) if len(held)]
            firsts += begins
            counts += [min(chunks, held.stop - begin) for begin in begins]
        if not firsts:
            raise ValueError(f"the {len(documents)} documents hold no chunk")
        self._firsts, self._counts = np.asarray(firsts), np.asarray(counts)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._firsts)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every window once."""
        return -(-len(self) // self.batch_size)

    def batch_at(self, step: int) -> ChunkBatch:
        """The batch of a step, counted from 0; the last of an epoch is filled up from its beginning."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order, is_read = self._order_of(epoch)
        rows = order[np.arange(place * self.batch_size, (place + 1) * self.batch_size) % len(self)]
        numbers = _numbers(self._firsts[rows], self._counts[rows], self.chunks)
        ids = None
        if self.neighbourhood is not None and self.k:
            ids = self.neighbourhood.nearest(np.where(is_read[rows, None], numbers[:, :-1], -1), self.k)
        return batch_of(self.database, numbers, ids, indices=rows.tolist())

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows' order in an epoch, and which of them read; kept, so that a step costs the same whatever their number."""
        held = self._epoch
        if held is None or held[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            order = generator.permutation(len(self))
            self._epoch = held = (epoch, order, generator.random(len(self)) >= self.unread)
        return held[1], held[2]


def windows_of(database: Database, documents: np.ndarray, *, chunks: int, stride: int) -> Iterator[Window]:
    """Windows that score every chunk of some documents once, each but the first of a document with `chunks - stride` before it."""
    for document in documents.tolist():
        held = database.document_chunks(document)
        scored = held.start
        while scored < held.stop:
            is_start = scored == held.start
            first = scored if is_start else max(held.start, scored + stride - chunks)
            count = min(chunks, held.stop - first)
            yield Window(first, count, scored - first, is_start)
            scored = first + count


def window_numbers(windows: Sequence[Window], chunks: int) -> np.ndarray:
    """(z, w) numbers of the chunks of windows; -1 behind a shorter one."""
    return _numbers(np.array([w.first for w in windows]), np.array([w.count for w in windows]), chunks)


def batch_of(database: Database, numbers: np.ndarray, ids: np.ndarray | None, *, indices: Sequence[int] = ()) -> ChunkBatch:
    """A batch of chunks (z, w), -1 for none, whose first w - 1 have the neighbours `ids` (z, w - 1, k); None for k = 0."""
    places = np.maximum(numbers, 0)
    tokens = np.asarray(database.tokens[places]).astype(np.int64)
    lengths = np.where(numbers >= 0, database.lengths[places], 0)
    real = np.arange(database.chunk_length) < lengths[..., None]
    tokens = np.where(real, tokens, database.pad_id)
    if ids is None:
        ids = np.full((numbers.shape[0], numbers.shape[1] - 1, 0), -1)
    neighbours, mask = database.neighbour_tokens(ids)
    z = len(numbers)
    return ChunkBatch(
        torch.from_numpy(tokens.reshape(z, -1)),
        torch.from_numpy(real.reshape(z, -1)),
        torch.from_numpy(neighbours),
        torch.from_numpy(mask),
        tuple(indices),
        int(real.sum()),
    )


def _numbers(firsts: np.ndarray, counts: np.ndarray, chunks: int) -> np.ndarray:
    steps = np.arange(chunks)
    return np.where(steps < counts[:, None], firsts[:, None] + steps, -1)
