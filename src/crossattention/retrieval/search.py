"""Nearest neighbours among stored embeddings, by FAISS: exact below a size, IVF-PQ above, with what must not be found left out.

What lives here: embeddings and queries in, numbers of chunks and squared distances out. What does not: files other than FAISS's
own, and which chunks a query must not find (`database` says it through an `Exclusion`).

Both ways give candidates; their distances are then computed from the stored embeddings, and the nearest are kept. Stored embeddings
are float16, and queries are rounded as they are, so the distance of a chunk to itself is 0.

Legend: q queries, k neighbours, d width, n stored embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from crossattention.retrieval.extras import need
from crossattention.retrieval.store import new_file

BLOCK_ROWS = 1 << 15
QUERY_ROWS = 4096
_SEED = 20211208

_MOST_EXACT = 64  # where more are excluded than that, every stored embedding is looked at, what is excluded left out
_MOST_PROBED = 1 << 14
_SCANNED = 1 << 22  # up to so many embeddings, looking at every one costs less than most of an approximate index's parts
_SPARE = 4  # distances by matrix products are rounded: what is nearly as near is looked at, too
_SLACK = 1e-5  # and what lies beyond a limit by less than that of the numbers that both were computed from
_SAMPLED, _SCANNED_TOGETHER = 4096, 512
_MANY = 64  # so many queries are looked up by matrix products at once where something is excluded

Candidates = Callable[[np.ndarray, int], np.ndarray]
"""Queries (q, d) and a number -> (q, number) nearest stored ones, nearest first or not; -1 where there are fewer."""


class Search:
    """The stored embeddings, and the way to their nearest.

    Args:
        vectors: (n, d) stored embeddings, in memory or mapped.
        index: the approximate index over all of them; None: every one is looked at.
    """

    def __init__(self, vectors: np.ndarray, index: IvfIndex | None = None) -> None:
        self.vectors, self.index = vectors, index

    def nearest(
        self, queries: np.ndarray, k: int, *, exclusion: Exclusion | None = None, begin: int = 0, probes: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of each query that it may find.

        Args:
            queries: (q, d) embeddings.
            k: how many.
            exclusion: what must not be found.
            begin: only stored embeddings from here on, every one of them looked at.
            probes: parts of the approximate index to look into; its own number where it is not given.

        Returns:
            (q, k) int64 numbers, nearest first, equal ones by number, -1 where there are fewer; (q, k) float32 squared
            distances, inf there.

        Raises:
            ValueError: queries of another width, or k below 1.
        """
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"expected queries of shape (q, {self.vectors.shape[1]}), got {queries.shape}")
        if k < 1:
            raise ValueError(f"expected at least 1 neighbour, got {k}")
        queries = np.ascontiguousarray(queries.astype(self.vectors.dtype), np.float32)
        if self.index is not None and begin == 0:
            config = self.index.config
            find, first = self.index.candidates(probes), max(config.candidates, 4 * k)
            is_scanned = exclusion is not None and len(self.vectors) <= _SCANNED
            most = first if exclusion is None or is_scanned else max(first, _MOST_PROBED)
        else:
            number = len(self.vectors) - begin
            if exclusion is not None and len(queries) >= _MANY:
                return exact_without(queries, np.arange(len(queries)), k, self.vectors, exclusion, begin)
            find, first = exact_candidates(self.vectors, begin), min(number, k + _SPARE + (0 if exclusion is None else 3 * k))
            most = min(number, max(_MOST_EXACT, 4 * k))
            is_scanned = exclusion is not None and most < number
        ids, distances = nearest(queries, k, self.vectors, find, exclusion=exclusion, first=first, most=most)
        rows = np.flatnonzero(ids[:, -1] < 0)
        if exclusion is not None and is_scanned and len(rows):
            ids[rows], distances[rows] = exact_without(queries, rows, k, self.vectors, exclusion, begin)
        return ids, distances


@dataclass(frozen=True)
class Exclusion:
    """What each query must not find.

    Args:
        is_out: numbers of queries (r,) and of chunks (r, j) -> (r, j) bool, True for those that may not be found.
    """

    is_out: Callable[[np.ndarray, np.ndarray], np.ndarray]


def nearest(
    queries: np.ndarray, k: int, vectors: np.ndarray, candidates: Candidates, *, exclusion: Exclusion | None, first: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest stored embeddings of each query that it may find.

    Args:
        queries: (q, d) float32.
        k: how many.
        vectors: (n, d) stored embeddings.
        candidates: finds some.
        exclusion: what must not be found.
        first: how many candidates are asked for at first; four times as many again for queries that find fewer than k.
        most: how many at the most.

    Returns:
        (q, k) int64 numbers, nearest first, equal ones by number, -1 where there are fewer; (q, k) float32 squared distances, inf
        there.
    """
    ids = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, np.float32)
    rows, asked = np.arange(len(queries)), min(first, most)
    while len(rows) and asked > 0:
        found = candidates(queries[rows], asked)
        if exclusion is not None:
            found = np.where((found >= 0) & ~exclusion.is_out(rows, found), found, -1)
        ids[rows], distances[rows] = ranked(queries[rows], found, k, vectors)
        rows = rows[ids[rows, -1] < 0]
        if asked >= most:
            break
        asked = min(asked * 4, most)
    return ids, distances


def ranked(queries: np.ndarray, ids: np.ndarray, k: int, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each query's candidates, by the distance to the stored embeddings; |q - x|^2 in float32."""
    best = np.full((len(queries), k), -1, np.int64)
    least = np.full((len(queries), k), np.inf, np.float32)
    step = max(1, (1 << 24) // max(1, ids.shape[1] * queries.shape[1]))  # some 64 MB at a time
    for begin in range(0, len(queries), step):
        here = ids[begin : begin + step]
        away = np.take(vectors, np.maximum(here, 0), axis=0).astype(np.float32)
        away -= queries[begin : begin + step, None]
        found = np.einsum("qjd,qjd->qj", away, away)
        found[here < 0] = np.inf
        here = np.where(here < 0, np.iinfo(np.int64).max, here)
        order = np.lexsort((here, found), axis=1)[:, :k]
        width = order.shape[1]
        chosen = np.take_along_axis(here, order, 1)
        best[begin : begin + step, :width] = np.where(chosen == np.iinfo(np.int64).max, -1, chosen)
        least[begin : begin + step, :width] = np.take_along_axis(found, order, 1)
    return best, least


# ------------------------------------------------------------------------------------------------------------ exact


def exact_candidates(vectors: np.ndarray, begin: int = 0, end: int | None = None) -> Candidates:
    """Candidates that are the nearest, of the stored embeddings from `begin` up to `end`.

    Cost: n d multiply-adds a query; memory of a block of 32,768 stored embeddings, whatever n.
    """
    need("faiss", "searches of a chunk database")
    import faiss

    end = len(vectors) if end is None else end

    def find(queries: np.ndarray, number: int) -> np.ndarray:
        ids = np.full((len(queries), number), -1, np.int64)
        distances = np.full((len(queries), number), np.inf, np.float32)
        for start in range(begin, end, BLOCK_ROWS):
            block = np.asarray(vectors[start : min(start + BLOCK_ROWS, end)], np.float32)
            for low in range(0, len(queries), QUERY_ROWS):
                rows = slice(low, low + QUERY_ROWS)
                near, where = faiss.knn(queries[rows], block, min(number, len(block)))
                both = np.concatenate([distances[rows], near], axis=1)
                names = np.concatenate([ids[rows], where + start], axis=1)
                order = np.argsort(both, axis=1, kind="stable")[:, :number]
                distances[rows] = np.take_along_axis(both, order, 1)
                ids[rows] = np.take_along_axis(names, order, 1)
        return ids

    return find


def exact_without(
    queries: np.ndarray, rows: np.ndarray, k: int, vectors: np.ndarray, exclusion: Exclusion, begin: int = 0, end: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of some queries, every stored embedding looked at and what may not be found passed over.

    A sample of the stored embeddings says how near the k-th is at most;
    only those nearer than that are asked about and sorted.

    Cost: n d multiply-adds a query, as a matrix product; memory of 512 queries by 32,768 stored embeddings, whatever n.
    """
    end = len(vectors) if end is None else end
    kept = k + _SPARE
    sampled = np.arange(begin, end, max(1, (end - begin) // _SAMPLED))
    sample = np.asarray(vectors[sampled], np.float32)
    ids = np.full((len(rows), kept), -1, np.int64)
    for low in range(0, len(rows), _SCANNED_TOGETHER):
        part = rows[low : low + _SCANNED_TOGETHER]
        asked = queries[part]
        size = np.einsum("qd,qd->q", asked, asked)
        away = _without_own_norm(asked, sample)
        away[exclusion.is_out(part, np.broadcast_to(sampled, away.shape))] = np.inf
        place = min(kept, away.shape[1]) - 1
        limit = np.partition(away, place, axis=1)[:, place] if place + 1 == kept else np.full(len(part), np.inf, np.float32)
        best = np.full((len(part), kept), -1, np.int64)
        least = np.full((len(part), kept), np.inf, np.float32)
        for start in range(begin, end, BLOCK_ROWS):
            away = _without_own_norm(asked, np.asarray(vectors[start : min(start + BLOCK_ROWS, end)], np.float32))
            # Of few that are near: one dimension is gone through in a fifth of the time of two.
            near_enough = np.flatnonzero(away <= (limit + _SLACK * (np.abs(limit) + size))[:, None])
            row, name = np.divmod(near_enough, away.shape[1])
            near, name = away[row, name], name + start
            may = ~exclusion.is_out(part[row], name[:, None])[:, 0]
            _keep_nearest(best, least, row[may], name[may], near[may])
            limit = np.minimum(limit, least[:, -1])
        ids[low : low + _SCANNED_TOGETHER] = best
    return ranked(queries[rows], ids, k, vectors)


def _without_own_norm(queries: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """|x|^2 - 2 q x (q, n): squared distances but for |q|^2, which does not change their order."""
    away: np.ndarray = queries @ (-2.0 * stored.T)
    away += np.einsum("nd,nd->n", stored, stored)
    return away


def _keep_nearest(best: np.ndarray, least: np.ndarray, rows: np.ndarray, names: np.ndarray, distances: np.ndarray) -> None:
    """Put pairs of a row and a name, at their distances, among the kept ones of their rows (q, kept), in place; nearest first."""
    order = np.lexsort((distances, rows))
    rows, names, distances = rows[order], names[order], distances[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)  # in its row's own
    is_first = place < best.shape[1]
    touched, within = np.unique(rows[is_first], return_inverse=True)
    new_names = np.full((len(touched), best.shape[1]), -1, np.int64)
    new_least = np.full(new_names.shape, np.inf, np.float32)
    new_names[within, place[is_first]], new_least[within, place[is_first]] = names[is_first], distances[is_first]
    both = np.concatenate([least[touched], new_least], axis=1)
    chosen = np.argsort(both, axis=1, kind="stable")[:, : best.shape[1]]
    best[touched] = np.take_along_axis(np.concatenate([best[touched], new_names], axis=1), chosen, 1)
    least[touched] = np.take_along_axis(both, chosen, 1)


# ------------------------------------------------------------------------------------------------------------ IVF-PQ


@dataclass(frozen=True)
class IvfConfig:
    """Sizes of an approximate index.

    Args:
        lists: parts that the space is divided into (IVF).
        code_bytes: bytes that stand for an embedding inside a part (PQ).
        probes: parts that are looked into.
        candidates: how many of what stands there have their distance computed from the stored embedding, at first.
        shard_rows: embeddings in one file.
        code_parts: stretches of an embedding that 4 bits each stand for; None, as in databases made before there were any, for
            `code_bytes` of 8 bits.
    """

    lists: int
    code_bytes: int
    probes: int = 64
    candidates: int = 256
    shard_rows: int = 1 << 20
    code_parts: int | None = None

    @classmethod
    def of(cls, rows: int, dim: int) -> IvfConfig:
        """The sizes for so many embeddings of this width: some 2 sqrt(n) lists, 4 bits for each 2 numbers."""
        lists = 1 << max(0, round(np.log2(2 * max(1, rows) ** 0.5)))
        parts = next(size for size in range(max(1, dim // 2), 0, -1) if dim % size == 0)
        return cls(lists=min(lists, max(1, rows // 39)), code_bytes=(parts + 1) // 2, code_parts=parts)


def train_index(vectors: np.ndarray, config: IvfConfig, path: Path) -> None:
    """Find the parts and the codes of an approximate index from a sample, and write it, empty, whole or not at all.

    Cost: k-means over at most 64 embeddings a list, 10 rounds; memory of these.
    """
    need("faiss", "searches of a chunk database")
    import faiss

    dim = vectors.shape[1]
    quantizer = faiss.IndexFlatL2(dim)
    if config.code_parts is None:
        index = faiss.IndexIVFPQ(quantizer, dim, config.lists, config.code_bytes, 8)
    else:  # codes of 4 bits are looked up inside registers, some ten times as fast
        index = faiss.IndexIVFPQFastScan(quantizer, dim, config.lists, config.code_parts, 4)
    index.cp.seed = index.pq.cp.seed = _SEED
    index.cp.max_points_per_centroid = 64
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # no warnings to stderr on small corpora
    index.cp.niter = index.pq.cp.niter = 10
    index.pq.cp.max_points_per_centroid = 128
    number = min(len(vectors), max(64 * config.lists, 1 << 16))
    chosen = np.sort(np.random.default_rng(_SEED).choice(len(vectors), number, replace=False))
    index.train(np.asarray(vectors[chosen], np.float32))
    _write(index, path)


def add_to_index(trained: Path, vectors: np.ndarray, begin: int, end: int, path: Path, on_rows: Callable[[int], None]) -> None:
    """Write one file of the index: the embeddings from `begin` up to `end`, whole or not at all."""
    import faiss

    index = faiss.read_index(str(trained))
    for start in range(begin, end, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, end)
        index.add_with_ids(np.asarray(vectors[start:stop], np.float32), np.arange(start, stop, dtype=np.int64))
        on_rows(stop)
    _write(index, path)


class IvfIndex:
    """The files of an approximate index, as one.

    Args:
        paths: its files; those with codes of 8 bits are memory-mapped by FAISS, those with codes of 4 bits read.
        config: its sizes.
    """

    def __init__(self, paths: Sequence[Path], config: IvfConfig) -> None:
        need("faiss", "searches of a chunk database")
        import faiss

        self.config = config
        self._parts: list[Any] = []
        for path in paths:
            try:
                self._parts.append(faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY))
            except RuntimeError as error:
                raise ValueError(f"{path} is damaged or no index of FAISS: {str(error).splitlines()[-1]}") from error

    @classmethod
    def of_parts(cls, index: IvfIndex, config: IvfConfig) -> IvfIndex:
        """The same files, looked into by other sizes."""
        found = cls((), config)
        found._parts = index._parts
        return found

    def candidates(self, probes: int | None = None) -> Candidates:
        """Candidates of all files."""
        import faiss

        def find(queries: np.ndarray, number: int) -> np.ndarray:
            # More is asked for where what was found is excluded: then further parts are looked into, too.
            wide = max(1, number // max(1, self.config.candidates))
            parameters = faiss.SearchParametersIVF(nprobe=min(self.config.lists, (probes or self.config.probes) * wide))
            found = [part.search(queries, number, params=parameters) for part in self._parts]
            if len(found) == 1:
                return found[0][1]
            distances = np.concatenate([near for near, _ in found], axis=1)
            ids = np.concatenate([where for _, where in found], axis=1)
            order = np.argsort(np.where(ids < 0, np.inf, distances), axis=1, kind="stable")[:, :number]
            return np.take_along_axis(ids, order, 1)

        return find


# ------------------------------------------------------------------------------------------------------------ how far to look

RECALL, _AIMED_AT = 0.95, 0.96
"""Of the ten nearest so many are to be found; so many of a sample's, which is off by about a hundredth."""

_TUNED_ON, _TUNED_K = 256, 10
_FEWEST_PROBES, _FEWEST_CANDIDATES, _MOST_CANDIDATES = 16, 128, 2048


def tuned(index: IvfIndex, vectors: np.ndarray, excluded: Callable[[np.ndarray], Exclusion]) -> tuple[IvfConfig, float]:
    """The sizes of an index with the fewest parts looked into, and then the fewest candidates, that find `RECALL` of the nearest.

    Vectors in clusters need a few parts, those of n-grams, most of whose neighbours are hardly nearer than chance, half of all or
    more; so the number is measured on a sample of the stored vectors, each with what it may not find excluded.

    Args:
        index: over all vectors.
        vectors: (n, d) stored embeddings.
        excluded: what stored rows (q,) may not find.

    Returns:
        The sizes, and the recall of the ten nearest with them on the sample.

    Cost: looking at every vector for 256 queries, and some ten searches with the index.
    """
    rows = np.sort(np.random.default_rng(_SEED).choice(len(vectors), min(_TUNED_ON, len(vectors)), replace=False))
    queries, exclusion = np.asarray(vectors[rows], np.float32), excluded(rows)
    _, truth = exact_without(queries, np.arange(len(rows)), _TUNED_K, vectors, exclusion)
    is_there = np.isfinite(truth)
    if not is_there.any():
        return index.config, 1.0

    def recall(config: IvfConfig) -> float:
        _, found = Search(vectors, IvfIndex.of_parts(index, config)).nearest(queries, _TUNED_K, exclusion=exclusion)
        limit = np.where(is_there, truth, -np.inf).max(1, keepdims=True)
        return float((found <= limit * (1 + 1e-6) + 1e-6).sum() / is_there.sum())

    config = replace(index.config, probes=min(_FEWEST_PROBES, index.config.lists), candidates=512)
    best = recall(config)
    while best < _AIMED_AT and (config.probes < config.lists or config.candidates < _MOST_CANDIDATES):
        if config.probes < config.lists:
            config = replace(config, probes=min(config.lists, 2 * config.probes))
        else:
            config = replace(config, candidates=2 * config.candidates)
        best = recall(config)
    while config.candidates > _FEWEST_CANDIDATES:
        fewer = replace(config, candidates=config.candidates // 2)
        found = recall(fewer)
        if found < min(best, _AIMED_AT):
            break
        config, best = fewer, found
    return config, best


def _write(index: Any, path: Path) -> None:
    import faiss

    with new_file(path) as beside:
        faiss.write_index(index, str(beside))
