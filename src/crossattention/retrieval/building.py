"""Making a chunk database, and adding to one: six steps, each going on where a killed process left it.

    list        find the files, read each once: sizes, hashes, what is not UTF-8
    tokenizer   train a BPE on a sample of the text, or take a given file
    tokens      documents to chunks
    embeddings  chunks to vectors (before them, for the default embedder, a count of its n-grams)
    index       FAISS: nothing below a size, IVF-PQ above it
    neighbours  the table of each chunk's neighbours, its own document left out

`building.json` says how far it has come: which step, where in the documents, how many rows of each array count. It is replaced, in
one step, each time some thousands of rows have been flushed to the disk; the list of files, which may be long, is written once,
beside it. At the end its state becomes `database.json`, in one step; until then readers see the database as it was before. Nothing
but a list of files is held in memory whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossattention.retrieval.chunks import Chunker, Chunks, encoded, longest_common_run, with_continuation
from crossattention.retrieval.database import (
    BUILDING_FILE,
    FORMAT,
    STATE_FILE,
    TOKENIZER_FILE,
    Database,
    array_of,
    exclusion_of,
    group_of,
    searcher_of,
    stored_ngrams,
)
from crossattention.retrieval.documents import Document, Listing, Problems, Source, list_sources, read_documents
from crossattention.retrieval.embed import (
    ChunkTexts,
    Embedder,
    NgramConfig,
    NgramEmbedder,
    check_embeddings,
    count_chunks,
    embedder_sha256,
)
from crossattention.retrieval.extras import need
from crossattention.retrieval.search import IvfConfig, IvfIndex, Search, add_to_index, train_index, tuned
from crossattention.retrieval.store import ArrayWriter, Extent, flush_folder, locked, new_file, read_json, sha256_of, write_json
from crossattention.retrieval.tokenizer import load_tokenizer, pad_id_of, train_tokenizer

STEPS = ("tokenizer", "tokens", "counts", "embeddings", "index", "neighbours", "done")
SOURCES_FILE = "building-sources.json"
COMMIT_ROWS = 1 << 16
COMMIT_QUERIES = 1 << 14
EMBED_ROWS = 4096
QUERY_ROWS = 2048
SHARD_ROWS = 1 << 20
RETRAIN_GROWTH = 4
"""An approximate index is trained anew when the database has so many times the chunks that it was trained on."""

OnProgress = Callable[[str, int, int], None]
"""Is told the step, how much of it is done, and how much there is: bytes for list, tokenizer and tokens, chunks for the others."""


@dataclass(frozen=True)
class Settings:
    """How a database is made. None: as the database has it, or, for a new one, the default that is named.

    Args:
        chunk_length: tokens of a chunk; 64, the paper's.
        vocab_size: tokens of the BPE that is trained; 16,384.
        tokenizer_bytes: bytes of text at most that it is trained on; 2^28.
        text_field: field of JSONL lines and column of Parquet files that holds the text; "text".
        pattern: what the name of a file must match; "*".
        same: pattern (re.search) on document names: what its groups find is one for documents that shall not find each other;
            without it each document is by itself.
        neighbours: width of the table; 10; 0 for none.
        exact_below: chunks up to which every embedding is looked at; 200,000.
        strict: whether a file or document that cannot be read is an error; else it is left out and named; no.
    """

    chunk_length: int | None = None
    vocab_size: int | None = None
    tokenizer_bytes: int | None = None
    text_field: str | None = None
    pattern: str | None = None
    same: str | None = None
    neighbours: int | None = None
    exact_below: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        lowest = {"chunk_length": 1, "vocab_size": 258, "tokenizer_bytes": 1, "neighbours": 0, "exact_below": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"expected {name} as an integer of at least {least}, got {value!r}")
        if self.chunk_length is not None and self.chunk_length > 65_535:
            raise ValueError(f"expected chunks of at most 65,535 tokens, got {self.chunk_length}")
        try:
            re.compile(self.same or "")
        except re.error as error:
            raise ValueError(
                f"expected a pattern for names of documents that belong together, got {self.same!r}: {error}"
            ) from error


DEFAULTS: dict[str, Any] = {
    "chunk_length": 64,
    "vocab_size": 16_384,
    "tokenizer_bytes": 1 << 28,
    "text_field": "text",
    "pattern": "*",
    "same": None,
    "neighbours": 10,
    "exact_below": 200_000,
}
_FIXED = ("chunk_length", "vocab_size", "tokenizer_bytes", "same")  # what documents that are added later cannot change


@dataclass(frozen=True)
class Built:
    """What a build did.

    Args:
        database: opened.
        added_documents: how many documents were added.
        added_chunks: how many chunks.
        problems: what was left out, and why.
        resumed: the step that an earlier, killed process had reached; None where there was none.
    """

    database: Database
    added_documents: int
    added_chunks: int
    problems: Problems
    resumed: str | None


def build(
    path: str | Path,
    folders: Sequence[str | Path],
    *,
    settings: Settings = Settings(),
    tokenizer: str | Path | None = None,
    embedder: Embedder | None = None,
    begin_again: bool = False,
    wait: bool = False,
    on_progress: OnProgress | None = None,
) -> Built:
    """Make a chunk database of text, go on with one that was interrupted, or add to one the documents that it does not hold.

    Args:
        path: folder of the database; made where it does not exist.
        folders: folders and files: text, JSONL, Parquet.
        settings: how it is made.
        tokenizer: a tokenizer.json; without it a BPE is trained on the text, or, for a database that exists, its own is taken.
        embedder: what turns chunks into vectors; without it `NgramEmbedder`, counted on the first documents.
        begin_again: drop what a stopped build has made so far; a finished database stays as it was before that build.
        wait: where another process builds in the folder, wait until it has ended, and go on from there; else that is an error.
        on_progress: is told how far each step has come.

    Returns:
        The database, and what was done.

    Raises:
        ValueError: a setting that the database does not have, another tokenizer or embedder than its own, a document that it holds
            with other content, text that cannot be read (with `strict`), no documents at all.
        FileNotFoundError: a folder or the tokenizer does not exist.
        ImportError: without the packages of the extra `retro`.

    Cost: see docs/retrieval.md. Memory is bounded by the largest document and the blocks of each step, not by the corpus.
    """
    need("faiss", "chunk databases")
    need("tokenizers", "chunk databases")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path, wait=wait):
        build_ = _Build(path, settings, None if tokenizer is None else Path(tokenizer), embedder, on_progress or _quiet)
        if begin_again:
            build_.drop_unfinished()
        return build_.run(folders)


class _Build:
    """One build; `state` is what database.json will hold, `building` what building.json holds."""

    def __init__(
        self, path: Path, settings: Settings, tokenizer: Path | None, embedder: Embedder | None, on_progress: OnProgress
    ) -> None:
        self.path, self.given, self.tokenizer_file = path, settings, tokenizer
        self.embedder, self.on_progress = embedder, on_progress
        has_database = (path / STATE_FILE).is_file()
        self.before: dict[str, Any] | None = read_json(path / STATE_FILE) if has_database else None
        self.building: dict[str, Any] = {}
        self.resumed: str | None = None

    @property
    def state(self) -> dict[str, Any]:
        """What database.json will hold."""
        found: dict[str, Any] = self.building["state"]
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, with nothing left open."""
        found: dict[str, Any] = self.state["settings"]
        return found

    def drop_unfinished(self) -> None:
        """Cut off what a stopped build has made, unless all of it was made."""
        file = self.path / BUILDING_FILE
        if file.is_file() and read_json(file)["step"] == "done":
            return
        (self.path / SOURCES_FILE).unlink(missing_ok=True)
        if self.before is not None:
            for name in self.before["arrays"]:
                ArrayWriter(*array_of(self.path, self.before, name)).close()
        file.unlink(missing_ok=True)
        flush_folder(self.path)

    def run(self, folders: Sequence[str | Path]) -> Built:
        """All steps."""
        if self.before is not None:
            Database(self.path, self.before).check(verify=False)
        pending = self._pending()
        if pending is not None and pending["step"] == "done":
            self.building = pending
            self._finish()  # it was killed between its last two actions
            self.before, pending = read_json(self.path / STATE_FILE), None
        settings = self._settings((pending["state"] if pending else self.before) or {})
        listing, added = self._list(folders, settings, pending)
        if pending is not None:
            self._check_same(pending, added, settings)
            self.building, self.resumed = pending, pending["step"]
        elif not added and self.before is not None and not self._is_changed(settings):
            return Built(Database.open(self.path, verify=False), 0, 0, listing.problems, None)
        else:
            self._begin(settings, listing, added)
        self._check_tools()
        paths = dict(zip((source.name for source in listing.sources), listing.paths, strict=True))
        self.sources = [(Source(**value), paths[value["name"]]) for value in self.building["sources"]]
        steps = (self._tokenizer, self._tokens, self._counts, self._embeddings, self._index, self._neighbours)
        for name, step in zip(STEPS[:-1], steps, strict=True):
            if STEPS.index(self.building["step"]) <= STEPS.index(name):
                if self.building["step"] != name:
                    self.building["step"] = name
                    self._save()
                step()
        problems = Problems.from_json(self.building["problems"])
        before = self.before or {"arrays": {}}
        grown = {
            name: self._rows(name) - int(before["arrays"].get(name, {"rows": 0})["rows"]) for name in ("document_ends", "tokens")
        }
        self.building["step"] = "done"
        self._save()
        self._finish()
        return Built(Database.open(self.path, verify=False), grown["document_ends"], grown["tokens"], problems, self.resumed)

    # ------------------------------------------------------------------------------------------------------ before the steps

    def _pending(self) -> dict[str, Any] | None:
        """What a stopped build has written down; None where there was none."""
        if not (self.path / BUILDING_FILE).is_file():
            return None
        found: dict[str, Any] = {**read_json(self.path / BUILDING_FILE), **read_json(self.path / SOURCES_FILE)}
        return found

    def _settings(self, held: dict[str, Any]) -> dict[str, Any]:
        """The settings: those given, else the database's, else the defaults."""
        own = held.get("settings", {})
        found = {}
        for name, default in DEFAULTS.items():
            given = getattr(self.given, name)
            found[name] = own.get(name, default) if given is None else given
            if name in _FIXED and own and given is not None and given != own[name]:
                raise ValueError(
                    f"the database in {self.path} has {name} {own[name]!r}, asked for was {given!r}: it stays as it is for all its "
                    "documents; leave the setting out, or make another database"
                )
        if self.tokenizer_file is not None and self.given.vocab_size is not None:
            raise ValueError("a tokenizer file has its own vocabulary: give the file, or the size of the one to train, not both")
        return found

    def _list(
        self, folders: Sequence[str | Path], settings: dict[str, Any], pending: dict[str, Any] | None
    ) -> tuple[Listing, list[Source]]:
        """The corpus, and those of its files that are not in the database yet."""
        held = {source.name: source for source in self._held_sources()}
        known = {**held, **({value["name"]: Source(**value) for value in pending["sources"]} if pending else {})}
        listing = list_sources(
            folders,
            pattern=settings["pattern"],
            without=self.path,
            known=known,
            on_progress=lambda done, total: self.on_progress("list", done, total),
        )
        if self.given.strict and (wrong := [line for line in listing.problems.named if ": empty" not in line]):
            raise ValueError(f"{len(wrong)} or more files cannot be read: {'; '.join(wrong[:5])}")
        if not listing.sources:
            held_up = ", ".join(f"{count:,} {reason}" for reason, count in sorted(listing.problems.counts.items())) or "nothing"
            named = "".join(f"; {line}" for line in listing.problems.named[:5])
            raise ValueError(f"{', '.join(map(str, folders))} holds no text: {held_up}{named}")
        changed = [source.name for source in listing.sources if source.name in held and held[source.name].sha256 != source.sha256]
        if changed:
            raise ValueError(
                f"the database in {self.path} holds {len(changed):,} of these files with other content: {', '.join(changed[:5])}; "
                "documents are only added: put them back, index the others alone, or make another database"
            )
        return listing, [source for source in listing.sources if source.name not in held]

    def _held_sources(self) -> Iterator[Source]:
        if self.before is None:
            return
        file, extent = array_of(self.path, self.before, "sources")
        for line in file.read_all(extent).tobytes().decode("utf-8").splitlines():
            yield Source(**json.loads(line))

    def _is_changed(self, settings: dict[str, Any]) -> bool:
        """Whether the table has another width than is asked for, or the index another kind."""
        assert self.before is not None
        rows = int(self.before["arrays"]["tokens"]["rows"])
        kind = "exact" if _is_exact(rows, settings["exact_below"]) else "ivf-pq"
        return bool(settings["neighbours"] != self.before["neighbours"]["k"] or kind != self.before["index"]["kind"])

    def _check_same(self, pending: dict[str, Any], added: list[Source], settings: dict[str, Any]) -> None:
        """What is asked for must be what was begun."""
        asked, begun = [source.to_json() for source in added], pending["sources"]
        if asked != begun:
            differing = sorted({value["name"] for value in (*asked, *begun) if (value in asked) != (value in begun)})
            raise ValueError(
                f"{self.path} holds an unfinished build of other documents: {len(differing):,} differ, among them "
                f"{', '.join(differing[:5])}; give the same folders, as they were, to go on, or --begin-again (begin_again=True)"
            )
        for name, value in settings.items():
            if value != pending["state"]["settings"][name]:
                raise ValueError(
                    f"{self.path} holds an unfinished build with {name} {pending['state']['settings'][name]!r}, asked "
                    f"for was {value!r}: "
                    "go on with the same, or --begin-again (begin_again=True)"
                )

    def _begin(self, settings: dict[str, Any], listing: Listing, added: list[Source]) -> None:
        state = {"format": FORMAT, "chunk_length": settings["chunk_length"], "arrays": {}} if self.before is None else self.before
        state = json.loads(json.dumps({**state, "settings": settings}))
        self.building = {
            "format": FORMAT,
            "step": STEPS[0],
            "cursor": {"source": 0, "within": []},
            "sources": [source.to_json() for source in added],
            "problems": listing.problems.to_json(),
            "state": state,
        }
        write_json(self.path / SOURCES_FILE, {"sources": self.building["sources"]})
        self._save()

    def _check_tools(self) -> None:
        """Compare the given tokenizer and embedder with those that were used already."""
        own = self.state.get("tokenizer")
        if own is not None and self.tokenizer_file is not None and (found := sha256_of(self.tokenizer_file)) != own["sha256"]:
            raise ValueError(
                f"the database in {self.path} was made with another tokenizer than {self.tokenizer_file}: its hash is "
                f"{own['sha256'][:12]}..., the file's {found[:12]}...; leave the file out, or make another database"
            )
        own = self.state.get("embedder")
        if own is None:
            return
        if self.embedder is None:
            if "counts" not in self.state["arrays"]:
                raise ValueError(
                    f"the database in {self.path} was made with an embedder that it does not hold "
                    f"({own['description'].get('kind')}, {own['sha256'][:12]}...): give it again (--embedder PATH)"
                )
        elif (found := embedder_sha256(self.embedder.description)) != own["sha256"]:
            raise ValueError(
                f"the database in {self.path} was made with another embedder: its hash is {own['sha256'][:12]}... "
                f"({own['description'].get('kind')}), given was {found[:12]}... "
                f"({self.embedder.description.get('kind')}); give the "
                "same, or make another database"
            )

    # ------------------------------------------------------------------------------------------------------ the steps

    def _tokenizer(self) -> None:
        target = self.path / TOKENIZER_FILE
        if self.before is None and "tokenizer" not in self.state:
            if self.tokenizer_file is not None:
                load_tokenizer(self.tokenizer_file)
                with new_file(target) as beside:
                    shutil.copyfile(self.tokenizer_file, beside)
            else:
                content = train_tokenizer(self._sample(), vocab_size=self.settings["vocab_size"])
                with new_file(target) as beside:
                    beside.write_bytes(content)
            tokenizer = load_tokenizer(target)
            self.state["tokenizer"] = {
                "sha256": sha256_of(target),
                "vocab_size": tokenizer.get_vocab_size(),
                "pad_id": pad_id_of(tokenizer),
                "trained": self.tokenizer_file is None,
            }
            self._save()
        self.tokenizer = load_tokenizer(target)

    def _sample(self) -> Iterator[str]:
        """Text to train the tokenizer on: all of it, or documents drawn by a hash of their names."""
        total = max(1, sum(source.size for source, _ in self.sources))
        share, done = self.settings["tokenizer_bytes"] / total, 0
        for source, path in self.sources:
            for document in read_documents(source, path, text_field=self.settings["text_field"]):
                if document.pieces is not None and (share >= 1 or group_of(document.name, None) < share * 2**64):
                    yield from document.pieces()
                self.on_progress("tokenizer", done + document.done, total)
            done += source.size

    def _tokens(self) -> None:
        self.tokenizer = load_tokenizer(self.path / TOKENIZER_FILE)
        length, vocabulary = self.state["chunk_length"], self.state["tokenizer"]["vocab_size"]
        token = "<u2" if vocabulary <= 1 << 16 else "<u4"
        facts = {"tokenizer": self.state["tokenizer"]["sha256"]}
        shapes = {"tokens": (token, (length,)), "lengths": ("<u2", ()), "bytes": ("<u4", ()), "documents": ("<i4", ())}
        shapes |= {"document_ends": ("<i8", ()), "document_groups": ("<u8", ()), "name_ends": ("<i8", ()), "names": ("|u1", ())}
        shapes |= {"sources": ("|u1", ())}
        with ExitStack() as stack:
            writers = {name: stack.enter_context(self._writer(name, *shape, facts)) for name, shape in shapes.items()}
            _TokenStep(self, writers).run()
        if not self._rows("tokens"):
            named = "; ".join(self.building["problems"]["named"][:5])
            raise ValueError(f"the corpus holds no text that becomes tokens{': ' + named if named else ''}")

    def _counts(self) -> None:
        if "embedder" in self.state:
            return
        if self.embedder is None:
            config, total = NgramConfig(), self._rows("tokens")
            counts, num_chunks = count_chunks(self._blocks("counts", 0, total, 1 << 14), config)
            facts = {"tokenizer": self.state["tokenizer"]["sha256"]}
            with self._writer("counts", "<i8", (), facts, anew=True) as writer:
                writer.append(counts)
                self._count(writer, "counts")
            embedder: Embedder = NgramEmbedder(counts, num_chunks, config)
        else:
            embedder = self.embedder
        description = json.loads(json.dumps(dict(embedder.description)))
        self.state["embedder"] = {"sha256": embedder_sha256(description), "dim": embedder.dim, "description": description}
        if isinstance(source := getattr(embedder, "source", None), str):
            self.state["embedder"]["source"] = source
        self._save()

    def _embeddings(self) -> None:
        embedder = self.embedder or stored_ngrams(self.path, self.state)
        dim, total = self.state["embedder"]["dim"], self._rows("tokens")
        facts = {"tokenizer": self.state["tokenizer"]["sha256"], "embedder": self.state["embedder"]["sha256"]}
        tokenizer = load_tokenizer(self.path / TOKENIZER_FILE)
        with self._writer("embeddings", "<f2", (dim,), facts) as writer:
            for tokens, lengths in self._blocks("embeddings", writer.rows, total, EMBED_ROWS):
                chunks = Chunks(tokens, lengths, np.zeros(len(tokens), np.int64))
                found = check_embeddings(embedder(ChunkTexts(chunks, tokenizer)), len(tokens), dim)
                if np.abs(found).max(initial=0.0) > np.finfo(np.float16).max:
                    raise ValueError(
                        f"the embedder gave {np.abs(found).max()}, more than float16 holds (65,504): scale its vectors"
                    )
                writer.append(found.astype(np.float16))
                if writer.rows - writer.extent.rows >= COMMIT_ROWS:
                    self._count(writer, "embeddings")
                    self._save()
            self._count(writer, "embeddings")
            self._save()

    def _index(self) -> None:
        total, index = self._rows("tokens"), self.state.get("index", {"kind": "exact"})
        if _is_exact(total, self.settings["exact_below"]):
            self.state["index"] = {"kind": "exact"}
            self._save()
            return
        file, extent = array_of(self.path, self.state, "embeddings")
        vectors = file.read(extent)
        if index["kind"] == "exact" or total >= RETRAIN_GROWTH * index["rows"]:
            config = IvfConfig.of(total, vectors.shape[1])
            trained = self.path / f"index-trained-{total}.faiss"
            self.on_progress("index", 0, total)
            train_index(vectors, config, trained)
            index = {"kind": "ivf-pq", "config": vars(config), "trained": _file_facts(trained), "rows": total, "shards": []}
            self.state["index"] = index
            self._save()
        shards = index["shards"]
        while not shards or shards[-1]["end"] < total:
            # The last file is made again where it is not full, so that adding often does not leave many small ones.
            is_full = not shards or shards[-1]["end"] - shards[-1]["begin"] >= SHARD_ROWS
            begin = (shards[-1]["end"] if shards else 0) if is_full else shards.pop()["begin"]
            end = min(begin + SHARD_ROWS, total)
            shard = self.path / f"index-{begin}-{end}-of-{index['rows']}.faiss"  # beside those that readers have open
            add_to_index(
                self.path / index["trained"]["file"],
                vectors,
                begin,
                end,
                shard,
                lambda row: self.on_progress("index", row, total),
            )
            shards.append({"begin": begin, "end": end, **_file_facts(shard)})
            self._save()
        if index.get("tuned_on") != total:
            self._tune(index, vectors)

    def _tune(self, index: dict[str, Any], vectors: np.ndarray) -> None:
        """Measure how far the index has to be looked into, as the table will look: what belongs to a chunk's document left out."""
        pairs = (array_of(self.path, self.state, name) for name in ("documents", "document_groups"))
        documents, groups = (file.read(extent) for file, extent in pairs)
        parts = IvfIndex([self.path / part["file"] for part in index["shards"]], IvfConfig(**index["config"]))
        config, recall = tuned(
            parts, vectors, lambda rows: exclusion_of(documents, groups, group=np.asarray(groups[documents[rows]]))
        )
        index.update(config=vars(config), tuned_on=len(vectors), recall=round(recall, 4))
        self._save()

    def _neighbours(self) -> None:
        k = self.settings["neighbours"]
        total = self._rows("tokens")
        old = self.before["neighbours"] if self.before is not None else {"generation": 0, "k": 0, "rows": 0}
        if "neighbours_target" not in self.building:
            generation = old["generation"] + 1
            for part in ("ids", "distances", "runs"):
                self.state["arrays"].pop(f"neighbours_{part}", None)
            self.state["neighbours"] = {"generation": generation, "k": k, "rows": total if k else 0}
            self.building["neighbours_target"] = generation
            self._save()
        if k == 0:
            return
        with ExitStack() as stack:
            _TableStep(self, old, stack).run()

    # ------------------------------------------------------------------------------------------------------ files

    def _rows(self, name: str) -> int:
        return int(self.state["arrays"].get(name, {"rows": 0})["rows"])

    def _writer(
        self, name: str, dtype: str, row_shape: Sequence[int], facts: dict[str, Any], *, anew: bool = False, file: str | None = None
    ) -> ArrayWriter:
        """Go on with an array, or begin it."""
        entry = self.state["arrays"].get(name)
        if entry is None or anew:
            entry = {"file": file or f"{name}.bin", "dtype": dtype, "row_shape": list(row_shape), "facts": {"array": name, **facts}}
            entry |= Extent().to_json()
            self.state["arrays"][name] = entry
        array, extent = array_of(self.path, self.state, name)
        return ArrayWriter(array, extent)

    def _count(self, writer: ArrayWriter, name: str) -> None:
        self.state["arrays"][name] |= writer.commit().to_json()

    def _blocks(self, step: str, begin: int, end: int, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and lengths of chunks, in memory, some at a time, with the progress of a step."""
        arrays = []
        for name in ("tokens", "lengths"):
            file, extent = array_of(self.path, self.state, name)
            arrays.append((file, extent))
        self.on_progress(step, begin, end)
        for start in range(begin, end, rows):
            stop = min(start + rows, end)
            # Mapped anew for each block: pages of a mapping that stays count as this process's memory.
            yield tuple(np.asarray(file.read(extent)[start:stop]).astype(np.int64) for file, extent in arrays)  # type: ignore[misc]
            self.on_progress(step, stop, end)

    def _save(self) -> None:
        write_json(self.path / BUILDING_FILE, {name: value for name, value in self.building.items() if name != "sources"})

    def _finish(self) -> None:
        """Make the state the database's, and delete what only the one before it used."""
        write_json(self.path / STATE_FILE, self.state)
        (self.path / BUILDING_FILE).unlink()
        (self.path / SOURCES_FILE).unlink(missing_ok=True)
        used = {entry["file"] for entry in self.state["arrays"].values()}
        index = self.state["index"]
        used |= {part["file"] for part in (index.get("trained"), *index.get("shards", ())) if part}
        for pattern in ("neighbours-*.bin", "index-*.faiss", ".*.part"):
            for left in self.path.glob(pattern):
                if left.name not in used:
                    left.unlink()


class _TokenStep:
    """Documents to chunks."""

    def __init__(self, owner: _Build, writers: dict[str, ArrayWriter]) -> None:
        self.owner, self.writers = owner, writers
        self.problems = Problems.from_json(owner.building["problems"])
        self.waiting: deque[tuple[int, Document | None]] = deque()
        self.total = sum(source.size for source, _ in owner.sources)
        self.sizes = np.cumsum([0, *(source.size for source, _ in owner.sources)])

    def run(self) -> None:
        """Go through the documents that are left."""
        owner = self.owner
        chunker = self.new_chunker()
        for item in encoded(self.pieces(), owner.tokenizer):
            if item is not None:
                chunker.add(*item)
                self.write(chunker.ready())
                continue
            number, document = self.waiting.popleft()
            if document is None:
                self.end_source(number)
            else:
                self.write(chunker.rest())
                self.end_document(document)
                chunker = self.new_chunker()
                owner.building["cursor"] = {"source": number, "within": document.cursor}
                owner.on_progress("tokens", int(self.sizes[number]) + document.done, self.total)
            if self.writers["tokens"].rows - self.writers["tokens"].extent.rows >= COMMIT_ROWS:
                self.commit()
        self.commit()

    def pieces(self) -> Iterator[str | None]:
        """The text of all documents; None ends each, and each source."""
        owner = self.owner
        cursor = owner.building["cursor"]
        begin, within = cursor["source"], cursor["within"]
        for number in range(begin, len(owner.sources)):
            source, path = owner.sources[number]
            text_field = owner.settings["text_field"]
            for document in read_documents(source, path, text_field=text_field, cursor=within if number == begin else ()):
                self.waiting.append((number, document))
                if document.pieces is not None:
                    yield from document.pieces()
                yield None
            self.waiting.append((number, None))
            yield None

    def new_chunker(self) -> Chunker:
        return Chunker(self.owner.state["chunk_length"], self.owner.state["tokenizer"]["pad_id"])

    def write(self, chunks: Chunks) -> None:
        if not len(chunks):
            return
        document = self.writers["document_ends"].rows
        if document >= 2**31 - 1:
            raise ValueError("a database holds at most 2^31 - 1 documents: make another one for the rest")
        self.writers["tokens"].append(chunks.tokens)
        self.writers["lengths"].append(chunks.lengths)
        self.writers["bytes"].append(chunks.num_bytes)
        self.writers["documents"].append(np.full(len(chunks), document))

    def end_document(self, document: Document) -> None:
        if document.problem is not None:
            if self.owner.given.strict and document.problem[0] != "empty":
                raise ValueError(f"{document.name}: {document.problem[0]} ({document.problem[1]})")
            self.problems.add(document.name, *document.problem)
            return
        chunks = self.writers["tokens"].rows
        ends = self.writers["document_ends"]
        if chunks == self.last_end():
            self.problems.add(document.name, "without tokens")
            return
        ends.append(np.array([chunks]))
        self._last_end = chunks
        name = np.frombuffer(document.name.encode("utf-8"), np.uint8)
        self.writers["names"].append(name)
        self.writers["name_ends"].append(np.array([self.writers["names"].rows]))
        group = group_of(document.name, self.owner.settings["same"])
        self.writers["document_groups"].append(np.array([group], np.uint64))

    def last_end(self) -> int:
        """The chunk behind the last document's."""
        if not hasattr(self, "_last_end"):
            self._last_end = self.writers["tokens"].extent.rows
        return self._last_end

    def end_source(self, number: int) -> None:
        line = json.dumps(self.owner.sources[number][0].to_json(), ensure_ascii=True) + "\n"
        self.writers["sources"].append(np.frombuffer(line.encode(), np.uint8))
        self.owner.building["cursor"] = {"source": number + 1, "within": []}

    def commit(self) -> None:
        owner = self.owner
        for name, writer in self.writers.items():
            owner._count(writer, name)
        owner.building["problems"] = self.problems.to_json()
        owner._save()


class _TableStep:
    """The neighbours of all chunks."""

    def __init__(self, owner: _Build, old: dict[str, Any], stack: ExitStack) -> None:
        self.owner = owner
        state, path = owner.state, owner.path
        self.search: Search = searcher_of(path, state)
        self.total, self.k = owner._rows("tokens"), state["neighbours"]["k"]
        generation = state["neighbours"]["generation"]
        # Rows of the table before this: only what was added can be nearer than what they hold.
        is_kept = old["k"] >= self.k and owner.before is not None and self.total - old["rows"] <= state["settings"]["exact_below"]
        self.old_rows = old["rows"] if is_kept else 0
        self.old = [array_of(path, owner.before, f"neighbours_{part}") for part in ("ids", "distances")] if self.old_rows else []
        facts = {"embedder": state["embedder"]["sha256"], "generation": generation}
        dtypes = {"ids": "<i4" if self.total < 2**31 else "<i8", "distances": "<f4", "runs": "<u2"}
        self.writers = {
            part: stack.enter_context(
                owner._writer(f"neighbours_{part}", dtype, (self.k,), facts, file=f"neighbours-{generation}-{part}.bin")
            )
            for part, dtype in dtypes.items()
        }

    def run(self) -> None:
        """Go through the chunks that are left."""
        owner = self.owner
        documents, groups = self.read("documents"), self.read("document_groups")
        begin = self.writers["ids"].rows
        owner.on_progress("neighbours", begin, self.total)
        while begin < self.total:
            end = min(begin + QUERY_ROWS, self.total)
            if begin < self.old_rows:
                end = min(end, self.old_rows)
            rows = np.arange(begin, end)
            exclusion = exclusion_of(documents, groups, group=np.asarray(groups[documents[begin:end]]))
            queries = np.asarray(self.search.vectors[begin:end], np.float32)
            if begin < self.old_rows:
                ids, distances = self.merged(rows, queries, exclusion)
            else:
                ids, distances = self.search.nearest(queries, self.k, exclusion=exclusion)
            self.writers["ids"].append(ids)
            self.writers["distances"].append(distances)
            self.writers["runs"].append(self.runs(rows, ids))
            begin = end
            if begin - self.writers["ids"].extent.rows >= COMMIT_QUERIES or begin == self.total:
                for part, writer in self.writers.items():
                    owner._count(writer, f"neighbours_{part}")
                owner._save()
            owner.on_progress("neighbours", begin, self.total)

    def merged(self, rows: np.ndarray, queries: np.ndarray, exclusion: Any) -> tuple[np.ndarray, np.ndarray]:
        """The table's neighbours of chunks that it holds, and those nearer among what was added."""
        ids, distances = (np.asarray(file.read(extent)[rows]) for file, extent in self.old)
        if self.old_rows == self.total:
            return ids[:, : self.k].astype(np.int64), distances[:, : self.k]
        new_ids, new_distances = self.search.nearest(queries, self.k, exclusion=exclusion, begin=self.old_rows)
        ids, distances = np.concatenate([ids, new_ids], 1), np.concatenate([distances, new_distances], 1)
        order = np.lexsort((ids, distances), axis=1)[:, : self.k]
        return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)

    def runs(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        tokens, lengths, documents = (self.read(name) for name in ("tokens", "lengths", "documents"))
        found, mask = with_continuation(ids, tokens, lengths, documents, pad_id=self.owner.state["tokenizer"]["pad_id"])
        own, real = with_continuation(rows, tokens, lengths, documents, pad_id=0)
        length = tokens.shape[1]
        repeated = [np.repeat(array[:, :length], self.k, 0) for array in (own, real)]
        pairs = len(rows) * self.k
        return longest_common_run(repeated[0], found.reshape(pairs, -1), repeated[1], mask.reshape(pairs, -1)).reshape(ids.shape)

    def read(self, name: str) -> np.ndarray:
        file, extent = array_of(self.owner.path, self.owner.state, name)
        return file.read(extent)


def _is_exact(chunks: int, exact_below: int) -> bool:
    """Whether searches look at every embedding; parts and codes are found in at least 256 of them."""
    return chunks <= max(exact_below, 255)


def _file_facts(path: Path) -> dict[str, Any]:
    return {"file": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)}


def _quiet(step: str, done: int, total: int) -> None:
    pass
