"""A chunk database, opened: tokens, neighbours with their continuations, and searches. `building` makes one.

    DB/
      database.json     what counts: sizes, settings, rows and checksums of each array, the index's files, its own SHA-256
      tokenizer.json    the tokenizer
      tokens.bin        (chunks, 64) tokens, uint16 or uint32; beside it per chunk: lengths.bin, bytes.bin, documents.bin
      names.bin ...     per document: its name, its last chunk, its group
      embeddings.bin    (chunks, d) float16
      index-*.faiss     the approximate index; none where every embedding is looked at
      neighbours-N.*    the table: (chunks, k) numbers, squared distances, longest common runs
      building.json     only while something is added: how far that has come

Legend: c chunks, m tokens of a chunk (64), k neighbours, q queries, d width of the embeddings.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crossattention.retrieval import chunks as cutting
from crossattention.retrieval.chunks import Chunks, longest_common_run, with_continuation
from crossattention.retrieval.embed import (
    ChunkTexts,
    Embedder,
    NgramConfig,
    NgramEmbedder,
    check_embeddings,
    embedder_sha256,
    names_of,
)
from crossattention.retrieval.search import Exclusion, IvfConfig, IvfIndex, Search
from crossattention.retrieval.store import ArrayFile, Extent, check_file, read_json, sha256_of
from crossattention.retrieval.tokenizer import load_tokenizer

FORMAT = 1
STATE_FILE = "database.json"
BUILDING_FILE = "building.json"
TOKENIZER_FILE = "tokenizer.json"
INDEX_COMMAND = "crossattention index FOLDER... --out DB"


@dataclass(frozen=True)
class Neighbours:
    """What chunks find.

    Args:
        ids: (c, k) int64 numbers of chunks, nearest first; -1 for none.
        distances: (c, k) float32, squared Euclidean; inf for none.
        runs: (c, k) int64, tokens of the longest run that the chunk has in common with the neighbour and its continuation; 0 for
            none.
    """

    ids: np.ndarray
    distances: np.ndarray
    runs: np.ndarray

    def without_copies(self, most: int, k: int | None = None) -> Neighbours:
        """Without neighbours that have a longer run in common than `most`; the next ones move up.

        Args:
            most: the longest run that stays.
            k: how many stay at the most; all where it is not given.

        Raises:
            ValueError: `most` is negative, or k is more than there are.
        """
        width = self.ids.shape[1]
        if most < 0:
            raise ValueError(f"expected a longest run of at least 0, got {most}")
        if k is not None and not 1 <= k <= width:
            raise ValueError(f"expected 1 to {width} neighbours, as many as were found, got {k}")
        stays = (self.ids >= 0) & (self.runs <= most)
        order = np.argsort(~stays, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(stays, order, 1)
        return Neighbours(
            np.where(kept, np.take_along_axis(self.ids, order, 1), -1),
            np.where(kept, np.take_along_axis(self.distances, order, 1), np.inf).astype(np.float32),
            np.where(kept, np.take_along_axis(self.runs, order, 1), 0),
        )


class Database:
    """A chunk database on disk, opened for reading; make one with `Database.open`.

    Arrays are memory-mapped: only what is asked for is read.

    Args:
        path: its folder.
        state: the content of database.json.
    """

    def __init__(self, path: Path, state: Mapping[str, Any]) -> None:
        self.path, self.state = path, state
        self._embedder: Embedder | None = None

    @classmethod
    def open(
        cls, path: str | Path, *, verify: bool = True, embedder: Embedder | None = None, tokenizer_sha256: str | None = None
    ) -> Database:
        """Open a database, or say what is wrong with it.

        Args:
            path: its folder.
            verify: compare the checksums of all its files; without it only headers and sizes.
            embedder: what turns chunks into vectors, for a database that was made with one of the caller's; it must be that one.
            tokenizer_sha256: the hash of the tokenizer that the caller's model reads; it must be the database's.

        Raises:
            FileNotFoundError: there is no database.
            ValueError: it is unfinished, damaged, of another format, or was made with another tokenizer or embedder.
            ImportError: without the packages of the extra `retro`.

        Cost: with `verify` one pass over the files, about a gigabyte a second; without it nothing that grows with them.
        """
        path = Path(path)
        if not (path / STATE_FILE).is_file():
            if (path / BUILDING_FILE).is_file():
                raise ValueError(
                    f"the database in {path} is not finished: run the `crossattention index` that began it again, it goes on"
                )
            raise FileNotFoundError(f"expected a chunk database at {path}, found no {STATE_FILE} in it; make one: {INDEX_COMMAND}")
        state = read_json(path / STATE_FILE)
        if state.get("format") != FORMAT:
            raise ValueError(f"{path / STATE_FILE} has format {state.get('format')!r}, this version reads format {FORMAT}")
        database = cls(path, state)
        database.check(verify=verify)
        database.require(tokenizer_sha256=tokenizer_sha256)
        if embedder is not None:
            database.use_embedder(embedder)
        return database

    def check(self, *, verify: bool) -> None:
        """Compare every file with what database.json says of it.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: one is damaged; the message names it and what is wrong.
        """
        is_growing = (self.path / BUILDING_FILE).is_file()
        for name in self.state["arrays"]:
            file, extent = array_of(self.path, self.state, name)
            file.check(extent, may_be_longer=is_growing)
            if verify:
                file.verify(extent)
        if (found := sha256_of(self.path / TOKENIZER_FILE)) != self.tokenizer_sha256:
            raise ValueError(
                f"{self.path / TOKENIZER_FILE} is not the tokenizer of this database: its SHA-256 is {found[:12]}..., expected "
                f"{self.tokenizer_sha256[:12]}...; it was altered or replaced"
            )
        for part in index_files(self.state):
            check_file(self.path / part["file"], part["size"], part["sha256"], verify=verify)

    def require(self, *, tokenizer_sha256: str | None = None, embedder_sha256: str | None = None) -> None:
        """Refuse the database where a model was made with another tokenizer or embedder.

        Raises:
            ValueError: it is another; both hashes are named.
        """
        for what, asked, own in (
            ("tokenizer", tokenizer_sha256, self.tokenizer_sha256),
            ("embedder", embedder_sha256, self.embedder_sha256),
        ):
            if asked is not None and asked != own:
                raise ValueError(
                    f"the database in {self.path} was made with another {what} than asked for: its hash is "
                    f"{own[:12]}..., asked for was "
                    f"{asked[:12]}...; use the database that the model was trained with, or index the text again with that {what}"
                )

    # ------------------------------------------------------------------------------------------------------ what it holds

    def __len__(self) -> int:
        return self.num_chunks

    @property
    def chunk_length(self) -> int:
        """Tokens of a chunk, m."""
        return int(self.state["chunk_length"])

    @property
    def num_chunks(self) -> int:
        """How many chunks, c."""
        return int(self.state["arrays"]["tokens"]["rows"])

    @property
    def num_documents(self) -> int:
        """How many documents."""
        return int(self.state["arrays"]["document_ends"]["rows"])

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return int(self.state["tokenizer"]["vocab_size"])

    @property
    def pad_id(self) -> int:
        """What fills short chunks up; `lengths` and masks say what is real."""
        return int(self.state["tokenizer"]["pad_id"])

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of tokenizer.json."""
        return str(self.state["tokenizer"]["sha256"])

    @property
    def embedder_sha256(self) -> str:
        """Hash of the embedder's description."""
        return str(self.state["embedder"]["sha256"])

    @property
    def embedder_description(self) -> dict[str, Any]:
        """What the embedder is."""
        return dict(self.state["embedder"]["description"])

    @property
    def index_kind(self) -> str:
        """How it is searched: "exact" or "ivf-pq"."""
        return str(self.state["index"]["kind"])

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, a `tokenizers.Tokenizer`."""
        return load_tokenizer(self.path / TOKENIZER_FILE)

    @cached_property
    def tokens(self) -> np.ndarray:
        """(c, m) tokens, padded; memory-mapped."""
        return self._array("tokens")

    @cached_property
    def lengths(self) -> np.ndarray:
        """(c,) real tokens of each chunk; memory-mapped."""
        return self._array("lengths")

    @cached_property
    def num_bytes(self) -> np.ndarray:
        """(c,) bytes of UTF-8 of each chunk; they sum to those of the documents; memory-mapped."""
        return self._array("bytes")

    @cached_property
    def documents(self) -> np.ndarray:
        """(c,) the document of each chunk; memory-mapped."""
        return self._array("documents")

    @cached_property
    def document_ends(self) -> np.ndarray:
        """(documents,) the chunk behind each document's last; memory-mapped."""
        return self._array("document_ends")

    @cached_property
    def document_groups(self) -> np.ndarray:
        """(documents,) uint64: documents of one group do not find each other (see `group_of`); memory-mapped."""
        return self._array("document_groups")

    @cached_property
    def embeddings(self) -> np.ndarray:
        """(c, d) float16; memory-mapped."""
        return self._array("embeddings")

    def document_name(self, document: int) -> str:
        """The name of a document.

        Raises:
            IndexError: there is none of that number.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"expected a document from 0 to {self.num_documents - 1}, got {document}")
        begin = int(self._name_ends[document - 1]) if document else 0
        return self._names[begin : int(self._name_ends[document])].tobytes().decode("utf-8")

    def document_chunks(self, document: int) -> range:
        """The chunks of a document."""
        begin = int(self.document_ends[document - 1]) if document else 0
        return range(begin, int(self.document_ends[document]))

    def documents_where(self, holds: Callable[[str], bool]) -> np.ndarray:
        """(documents,) bool: for which names a condition holds."""
        return np.fromiter((holds(self.document_name(number)) for number in range(self.num_documents)), bool, self.num_documents)

    def group_of(self, name: str) -> int:
        """The group that a document of this name belongs to, also of one that the database does not hold."""
        return group_of(name, self.state["settings"]["same"])

    def text(self, chunk: int, *, with_next: bool = False) -> str:
        """The text of a chunk, or of it and its continuation."""
        tokens, mask = self.neighbour_tokens(np.array([chunk]))
        real = tokens[0][mask[0]] if with_next else tokens[0, : self.chunk_length][mask[0, : self.chunk_length]]
        return self.tokenizer.decode(real.tolist(), skip_special_tokens=False)

    # ------------------------------------------------------------------------------------------------------ neighbours

    def neighbour_tokens(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that a model reads of neighbours: chunk and continuation.

        Args:
            ids: (...) numbers of chunks, -1 for no neighbour.

        Returns:
            (..., 2 m) int64 tokens, and (..., 2 m) bool, True where a token is real: all False of no neighbour, and in the second
            half where the chunk is the last of its document.

        Raises:
            ValueError: a number that is no chunk's.
        """
        ids = np.asarray(ids)
        if ids.size and (ids.min() < -1 or ids.max() >= self.num_chunks):
            raise ValueError(f"expected chunks from 0 to {self.num_chunks - 1}, or -1 for none, got {ids.min()} to {ids.max()}")
        return with_continuation(ids, self.tokens, self.lengths, self.documents, pad_id=self.pad_id)

    @property
    def table_width(self) -> int:
        """How many neighbours of each chunk the table holds; 0 without one."""
        return int(self.state["neighbours"]["k"])

    @cached_property
    def table(self) -> Neighbours:
        """The neighbours of all chunks, precomputed; memory-mapped. A chunk's own document, or group, is not among them.

        Raises:
            ValueError: the database was made without.
        """
        if not self.table_width:
            raise ValueError(f"the database in {self.path} has no table of neighbours: index again with --neighbours 10")
        return Neighbours(*(self._array(f"neighbours_{part}") for part in ("ids", "distances", "runs")))

    def neighbours(self, chunks: np.ndarray, k: int, *, longest_run: int | None = None) -> Neighbours:
        """The neighbours of chunks of this database, from the table.

        Args:
            chunks: (c,) their numbers.
            k: how many; at most as many as the table holds.
            longest_run: neighbours with a longer run in common than that are passed over, and the table's next ones move up.

        Raises:
            ValueError: more than the table holds.
        """
        if not 1 <= k <= self.table_width:
            raise ValueError(f"expected 1 to {self.table_width} neighbours, as many as the table holds, got {k}")
        chunks = np.asarray(chunks)
        found = Neighbours(
            self.table.ids[chunks].astype(np.int64), self.table.distances[chunks], self.table.runs[chunks].astype(np.int64)
        )
        if longest_run is not None:
            return found.without_copies(longest_run, k)
        return Neighbours(found.ids[:, :k], found.distances[:, :k], found.runs[:, :k])

    # ------------------------------------------------------------------------------------------------------ searches

    def cut(self, text: str) -> Chunks:
        """Cut a text as the documents of the database were cut."""
        return cutting.cut(text, self.tokenizer, length=self.chunk_length, pad_id=self.pad_id)

    def use_embedder(self, embedder: Embedder) -> None:
        """Search with this embedder.

        Raises:
            ValueError: it is not the one that the database was made with; says how they differ.
        """
        found = embedder_sha256(embedder.description)
        if found != self.embedder_sha256:
            raise ValueError(
                f"the database in {self.path} was made with another embedder: its own is {names_of(self.embedder_description)} "
                f"({self.embedder_sha256[:12]}...), given was {names_of(embedder.description)} ({found[:12]}...); their "
                "vectors do not "
                f"compare: give the database's own, or index the text again with this one"
            )
        self._embedder = embedder

    @property
    def has_embedder(self) -> bool:
        """Whether it can embed texts: by its own stored counts, or by an embedder that was given."""
        return self._embedder is not None or "counts" in self.state["arrays"]

    @property
    def embedder(self) -> Embedder:
        """What turns chunks into vectors: the default one, made again from its stored counts, or the one that was given.

        Raises:
            ValueError: the database was made with an embedder of the caller's, and none was given.
        """
        if self._embedder is None:
            description = self.embedder_description
            if "counts" not in self.state["arrays"]:
                raise ValueError(
                    f"the database in {self.path} was made with an embedder that it does not hold "
                    f"({names_of(description)}): give it "
                    "(--embedder PATH, or Database.open(path, embedder=...))"
                )
            self._embedder = stored_ngrams(self.path, self.state)
        return self._embedder

    def embed(self, chunks: Chunks) -> np.ndarray:
        """(c, d) float32 embeddings of chunks, by the database's embedder."""
        return check_embeddings(self.embedder(ChunkTexts(chunks, self.tokenizer)), len(chunks), self.embedder.dim)

    def search(
        self,
        embeddings: np.ndarray,
        k: int,
        *,
        exclude_document: np.ndarray | int | None = None,
        exclude_group: np.ndarray | int | None = None,
        exclude: np.ndarray | None = None,
        probes: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest chunks of each embedding.

        Args:
            embeddings: (q, d).
            k: how many.
            exclude_document: (q,) a document of the database that the query must not find, or one for all; -1 for none.
            exclude_group: (q,) uint64, a group of documents that it must not find; see `group_of`.
            exclude: (documents,) bool, True for documents that no query may find; see `documents_where`.
            probes: parts of an approximate index to look into; more of them find more and take longer.

        Returns:
            (q, k) int64 numbers of chunks, nearest first, -1 where there are fewer; (q, k) float32 squared Euclidean distances, inf
            where there is none.

        Raises:
            ValueError: a shape that does not fit.

        Cost: c d multiply-adds a query where `index_kind` is "exact"; else docs/retrieval.md has the figures.
        """
        exclusion = self._exclusion(len(embeddings), exclude_document, exclude_group, exclude)
        return self.searcher.nearest(embeddings, k, exclusion=exclusion, probes=probes)

    def retrieve(
        self,
        chunks: Chunks,
        k: int,
        *,
        longest_run: int | None = None,
        exclude_document: np.ndarray | int | None = None,
        exclude_group: np.ndarray | int | None = None,
        exclude: np.ndarray | None = None,
        probes: int | None = None,
    ) -> Neighbours:
        """The neighbours of any chunks, of this database or not, with their runs in common.

        Args:
            chunks: what `cut` gives, or any rows of this database's tokens.
            k: how many.
            longest_run: neighbours with a longer run in common than that are passed over, and others are looked for.
            exclude_document: as `search` has it.
            exclude_group: as `search` has it.
            exclude: as `search` has it.
            probes: as `search` has it.

        Raises:
            ValueError: a value out of range.
        """
        embeddings = self.embed(chunks)
        options = {"exclude_document": exclude_document, "exclude_group": exclude_group, "exclude": exclude}
        asked = k
        while True:
            ids, distances = self.search(embeddings, asked, **options, probes=probes)
            found = Neighbours(ids, distances, self.runs(chunks, ids))
            if longest_run is None:
                return found
            kept = found.without_copies(longest_run, k)
            # Fewer than k were kept of a row whose every place is filled: there may be others behind these.
            is_short = (kept.ids[:, -1] < 0) & (found.ids[:, -1] >= 0)
            if not is_short.any() or asked >= min(64 * k, self.num_chunks):
                return kept
            asked = min(4 * asked, self.num_chunks)

    def runs(self, chunks: Chunks, ids: np.ndarray) -> np.ndarray:
        """(c, k): tokens of the longest run that each chunk has in common with each neighbour and its continuation."""
        tokens, mask = self.neighbour_tokens(ids)
        rows, k = ids.shape
        repeated = np.repeat(np.asarray(chunks.tokens), k, 0), np.repeat(chunks.mask, k, 0)
        found = longest_common_run(repeated[0], tokens.reshape(rows * k, -1), repeated[1], mask.reshape(rows * k, -1))
        return found.reshape(rows, k)

    def overlap(self, chunks: Chunks, k: int = 10, **exclusions: Any) -> np.ndarray:
        """How much of each chunk stands in the database word for word: the longest run in common with its k neighbours, over m.

        Returns:
            (c,) float64 from 0 to 1.

        Source: Borgeaud et al. 2022, arXiv:2112.04426v3, section 2.6: the 10 nearest, with their continuations.
        """
        return self.retrieve(chunks, k, **exclusions).runs.max(1) / self.chunk_length

    @cached_property
    def searcher(self) -> Search:
        """What searches the embeddings."""
        return searcher_of(self.path, self.state)

    def chunks(self, ids: np.ndarray | slice) -> Chunks:
        """Chunks of this database, in memory."""
        parts = (self.tokens, self.lengths, self.num_bytes)
        return Chunks(*(np.asarray(part[ids]).astype(np.int64) for part in parts))

    # ------------------------------------------------------------------------------------------------------ inside

    def _array(self, name: str) -> np.ndarray:
        file, extent = array_of(self.path, self.state, name)
        return file.read(extent)

    @cached_property
    def _names(self) -> np.ndarray:
        return self._array("names")

    @cached_property
    def _name_ends(self) -> np.ndarray:
        return self._array("name_ends")

    def _exclusion(
        self, rows: int, document: np.ndarray | int | None, group: np.ndarray | int | None, exclude: np.ndarray | None
    ) -> Exclusion | None:
        if document is None and group is None and exclude is None:
            return None
        document = None if document is None else _per_query(document, rows, np.int64, "exclude_document")
        group = None if group is None else _per_query(group, rows, np.uint64, "exclude_group")
        if exclude is not None:
            exclude = np.asarray(exclude)
            if exclude.dtype != np.bool_ or exclude.shape != (self.num_documents,):
                raise ValueError(
                    f"expected exclude as ({self.num_documents},) bool, one for each document, got {exclude.shape} {exclude.dtype}"
                )
        return exclusion_of(self.documents, self.document_groups, document, group, exclude)


def exclusion_of(
    documents: np.ndarray,
    groups: np.ndarray,
    document: np.ndarray | None = None,
    group: np.ndarray | None = None,
    exclude: np.ndarray | None = None,
) -> Exclusion:
    """What queries must not find: a document each, a group each, or documents for all."""

    def is_out(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        theirs = documents[np.maximum(ids, 0)]
        out = np.zeros(ids.shape, bool)
        if document is not None:
            out |= theirs == document[rows][:, None]
        if group is not None:
            out |= groups[theirs] == group[rows][:, None]
        if exclude is not None:
            out |= exclude[theirs]
        return out

    return Exclusion(is_out)


def group_of(name: str, same: str | None) -> int:
    """The group of a document: a hash of what a pattern finds in its name, else of its name.

    Example:
        >>> same = r"models/([^/]+)/"
        >>> group_of("models/bert/a.py", same) == group_of("models/bert/b.py", same)
        True
        >>> group_of("a.py", same) == group_of("b.py", same)
        False
    """
    found = re.search(same, name) if same else None
    key = f"name:{name}" if found is None else f"same:{'/'.join(part or '' for part in found.groups()) or found[0]}"
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "little")


def array_of(path: Path, state: Mapping[str, Any], name: str) -> tuple[ArrayFile, Extent]:
    """An array of a database and its rows that count."""
    entry = state["arrays"][name]
    file = ArrayFile(path / entry["file"], np.dtype(entry["dtype"]), tuple(entry["row_shape"]), entry["facts"])
    return file, Extent.from_json(entry)


def index_files(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The files of the approximate index."""
    index = state["index"]
    return [part for part in (index.get("trained"), *index.get("shards", ())) if part]


def searcher_of(path: Path, state: Mapping[str, Any]) -> Search:
    """What searches the embeddings of a database."""
    file, extent = array_of(path, state, "embeddings")
    index = state["index"]
    if index["kind"] == "exact":
        return Search(file.read(extent))
    return Search(file.read(extent), IvfIndex([path / part["file"] for part in index["shards"]], IvfConfig(**index["config"])))


def stored_ngrams(path: Path, state: Mapping[str, Any]) -> NgramEmbedder:
    """The default embedder of a database, of its stored counts."""
    description = state["embedder"]["description"]
    file, extent = array_of(path, state, "counts")
    sizes = {name: description[name] for name in ("dim", "buckets", "slots")}
    return NgramEmbedder(
        file.read_all(extent), description["num_chunks"], NgramConfig(**sizes, orders=tuple(description["orders"]))
    )


def _per_query(values: np.ndarray | Sequence[int] | int, rows: int, dtype: Any, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape == ():
        array = np.broadcast_to(array, (rows,))
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise ValueError(f"expected {name} as ({rows},) integers, one for each query, got {array.shape} {array.dtype}")
    return array.astype(dtype)
