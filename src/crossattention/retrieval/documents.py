"""Documents of a corpus: text files, lines of JSONL files, rows of Parquet files; one with a fault is named and left out.

What lives here: walking folders, reading documents one after the other from any place on. What does not: tokens (`chunks`), and
which documents a database holds already (`building`).

A *source* is a file, a *document* a text in it: a text file is one document of the source's own name, a line of `words.jsonl` is
`words.jsonl#LINE` (from 1), a row of `words.parquet` `words.parquet#ROW` (from 0). All text is UTF-8.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from crossattention.retrieval.extras import need

PIECE_CHARACTERS = 1 << 16
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 256
_NAMED_PROBLEMS = 20
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

OnBytes = Callable[[int, int], None]
"""Is told how many bytes are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file of a corpus.

    Args:
        name: the last part of the folder given, then the path inside it; parts joined by "/".
        kind: "text", "jsonl" or "parquet", by the ending of the name.
        size: bytes.
        sha256: of its content.
        modified: when it was last modified, in nanoseconds; where size and time are as they were it is not read again to compare
            it.
    """

    name: str
    kind: str
    size: int
    sha256: str
    modified: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass
class Problems:
    """What was left out: how many for each reason, and the first of them by name.

    Args:
        counts: reason -> how many files or documents.
        named: the first 20, each with its place and what is wrong.
    """

    counts: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str, detail: str = "") -> None:
        """Leave one out."""
        self.counts[reason] += 1
        if reason not in ("hidden", "of another name") and len(self.named) < _NAMED_PROBLEMS:
            self.named.append(f"{where}: {reason}{f' ({detail})' if detail else ''}")

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"counts": dict(sorted(self.counts.items())), "named": list(self.named)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Problems:
        """Of such an object."""
        return cls(Counter(value["counts"]), list(value["named"]))


@dataclass(frozen=True)
class Listing:
    """The sources of a corpus.

    Args:
        sources: in the order of the folders given, then of their names.
        paths: where each of them lies.
        problems: what was left out.
    """

    sources: tuple[Source, ...]
    paths: tuple[Path, ...]
    problems: Problems

    @property
    def num_bytes(self) -> int:
        """Bytes of all sources."""
        return sum(source.size for source in self.sources)


@dataclass(frozen=True)
class Document:
    """One text, or what is wrong with it.

    Args:
        name: its name.
        pieces: gives its text, at most 65,536 characters at a time; None where there is no text.
        problem: reason and detail for leaving it out, or None.
        cursor: where reading goes on behind it.
        done: bytes of the source up to there.
    """

    name: str
    pieces: Callable[[], Iterator[str]] | None
    problem: tuple[str, str] | None
    cursor: list[int]
    done: int


def list_sources(
    folders: Sequence[str | Path],
    *,
    pattern: str = "*",
    without: Path | None = None,
    known: Mapping[str, Source] | None = None,
    on_progress: OnBytes | None = None,
) -> Listing:
    """Find the files of a corpus and read each once.

    Left out, counted and, the first of them, named: hidden files and folders, other names than `pattern`, empty, unreadable and
    special files, links to folders, files with a NUL byte (binary, or UTF-16), and text files that are not UTF-8, with the offset
    of the first byte that is not.

    Args:
        folders: folders and files.
        pattern: what the name of a file in a folder must match, as in a shell: "*.py".
        without: a folder that is not looked into: the database's own, which may lie in the corpus.
        known: sources by name that were read before.
        on_progress: is told how far it has come.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no folder is given, or two files would have one name.

    Cost: every byte is read once, 1 MiB at a time; memory is some 500 bytes a file.
    """
    if not folders:
        raise ValueError("expected at least one folder or file of text, got none")
    problems = Problems()
    found: dict[str, Path] = {}
    for folder in folders:
        root = Path(folder)
        if not root.exists():
            raise FileNotFoundError(f"expected a folder or a file of text at {root}, found nothing")
        for name, path in _walk(root, pattern, without, problems):
            if name in found:
                raise ValueError(
                    f"{found[name]} and {path} would both be named {name}: give folders whose last parts differ, or each file once"
                )
            found[name] = path
    total = sum(path.stat().st_size for path in found.values())
    done, sources, paths = 0, [], []
    for name, path in found.items():
        source = _look_at(name, path, (known or {}).get(name), problems)
        if source is not None:
            sources.append(source)
            paths.append(path)
            done += source.size
        if on_progress is not None:
            on_progress(min(done, total), total)
    return Listing(tuple(sources), tuple(paths), problems)


def read_documents(source: Source, path: Path, *, text_field: str = "text", cursor: Sequence[int] = ()) -> Iterator[Document]:
    """The documents of a source, one after the other.

    Args:
        source: as it was listed.
        path: where it lies.
        text_field: the field of a JSONL line, or the column of a Parquet file, that holds the text.
        cursor: of the last document that was read; () from the beginning.

    Raises:
        ValueError: the file has changed since it was listed, has no such field, or is damaged.
        ImportError: a Parquet file without pyarrow.
    """
    now = path.stat()
    if (now.st_size, now.st_mtime_ns) != (source.size, source.modified):
        raise ValueError(f"{printable(source.name)} has changed since the corpus was listed: index again once it stays as it is")
    reader = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[source.kind]
    yield from reader(source, path, text_field, list(cursor))


def pieces_of(texts: Iterator[str]) -> Iterator[str]:
    r"""Text in pieces of at most 65,536 characters that end behind a line, a blank or, where there is neither, anywhere.

    Where the pieces end depends on the text alone, not on how it comes.

    Example:
        >>> [len(piece) for piece in pieces_of(iter(["x" * 70_000, "\n" + "y" * 10]))]
        [65536, 4475]
    """
    waiting = ""
    for text in texts:
        waiting += text
        while len(waiting) > PIECE_CHARACTERS:
            end = waiting.rfind("\n", 0, PIECE_CHARACTERS) + 1 or waiting.rfind(" ", 0, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS
            yield waiting[:end]
            waiting = waiting[end:]
    if waiting:
        yield waiting


def printable(name: str) -> str:
    """A file name as text that any terminal and any JSON can hold."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _walk(root: Path, pattern: str, without: Path | None, problems: Problems) -> Iterator[tuple[str, Path]]:
    """Names and paths of the files below a folder, rising; a file that was given itself is taken whatever its name."""
    if not root.is_dir():
        yield printable(root.name), root
        return
    top = root.resolve().name
    left_out = None if without is None else without.resolve()
    waiting = [root]
    while waiting:
        here = waiting.pop()
        folders = []
        try:
            entries = sorted(os.scandir(here), key=lambda entry: os.fsencode(entry.name))
        except OSError as fault:
            problems.add(printable(str(here)), "unreadable", str(fault.strerror))
            continue
        for entry in entries:
            path = Path(entry.path)
            name = printable(f"{top}/{path.relative_to(root).as_posix()}")
            if entry.name.startswith("."):
                problems.add(name, "hidden")
            elif entry.is_dir(follow_symlinks=False):
                if left_out is None or path.resolve() != left_out:
                    folders.append(path)
            elif entry.is_dir():
                problems.add(name, "link to a folder")
            elif not fnmatchcase(entry.name, pattern):
                problems.add(name, "of another name")
            elif not entry.is_file():
                problems.add(name, "no regular file or a link to nothing")
            else:
                yield name, path
        waiting += reversed(folders)


def _look_at(name: str, path: Path, known: Source | None, problems: Problems) -> Source | None:
    kind = _KINDS.get(path.suffix.lower(), "text")
    try:
        with path.open("rb", buffering=0) as stream:
            facts = os.fstat(stream.fileno())
            if not stat.S_ISREG(facts.st_mode):
                problems.add(name, "no regular file or a link to nothing")
                return None
            if facts.st_size == 0:
                problems.add(name, "empty")
                return None
            if known is not None and (known.size, known.modified, known.kind) == (facts.st_size, facts.st_mtime_ns, kind):
                return known
            sha256, problem = _read_once(stream, kind)
            after = os.fstat(stream.fileno())
    except OSError as fault:
        problems.add(name, "unreadable", str(fault.strerror))
        return None
    if problem is None and (facts.st_size, facts.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        problem = ("changed while it was read", "")
    if problem is not None:
        problems.add(name, *problem)
        return None
    return Source(name, kind, facts.st_size, sha256, facts.st_mtime_ns)


def _read_once(stream: Any, kind: str) -> tuple[str, tuple[str, str] | None]:
    """The digest of a file, and what is wrong with its text, if it is one."""
    digest, decoder, before, pending = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0, 0
    while True:
        data = stream.read(_READ_BYTES) or b""
        if kind == "text":
            if before == 0 and data.startswith(_UTF16):
                return "", ("not UTF-8", "byte 0: the byte order mark of UTF-16; convert the file to UTF-8")
            nul = data.find(0)
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                if nul < 0 or nul > error.start:
                    return "", ("not UTF-8", f"byte {before - pending + error.start:,}: {error.reason}")
            if nul >= 0:
                return "", ("binary", f"a NUL byte at {before + nul:,}")
            pending = len(decoder.getstate()[0])
        if not data:
            return digest.hexdigest(), None
        digest.update(data)
        before += len(data)


def _read_text(source: Source, path: Path, text_field: str, cursor: list[int]) -> Iterator[Document]:
    def texts() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with path.open("rb") as stream:
            while data := stream.read(_READ_BYTES):
                yield decoder.decode(data)
            yield decoder.decode(b"", final=True)

    if not cursor:
        yield Document(source.name, lambda: pieces_of(texts()), None, [source.size], source.size)


def _read_jsonl(source: Source, path: Path, text_field: str, cursor: list[int]) -> Iterator[Document]:
    offset, number = cursor or (0, 0)
    with path.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            begin, offset, number = offset, offset + len(line), number + 1
            text, problem = _text_of_line(line, begin, text_field)
            if problem is not None and problem[0] == "no such field" and number == 1:
                raise ValueError(f"{source.name}, line 1: {problem[1]}; name the one that holds the text (--text-field)")
            yield _document(f"{source.name}#{number}", text, problem, [offset, number], offset)


def _text_of_line(line: bytes, begin: int, text_field: str) -> tuple[str, tuple[str, str] | None]:
    if not line.strip():
        return "", None
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", ("not UTF-8", f"byte {begin + error.start:,} of the file: {error.reason}")
    except json.JSONDecodeError as error:
        place = begin + len(error.doc[: error.pos].encode("utf-8"))
        return "", ("no JSON", f"column {error.colno}, byte {place:,} of the file: {error.msg}")
    except RecursionError:
        return "", ("no JSON", "nested too deeply")
    if not isinstance(value, dict):
        return "", ("no JSON object", f"it is a {type(value).__name__}")
    if text_field not in value:
        return "", ("no such field", f"expected the field {text_field!r}, found {', '.join(map(repr, list(value)[:10])) or 'none'}")
    text = value[text_field]
    if text is not None and not isinstance(text, str):
        return "", ("no text", f"the field {text_field!r} holds a {type(text).__name__}")
    return _checked(text)


def _checked(text: str | None) -> tuple[str, tuple[str, str] | None]:
    """The text, or what is wrong with it: JSON can hold halves of characters that UTF-8 cannot."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        return "", ("not UTF-8", f"character {error.start:,} of the text is half a surrogate pair")
    return text or "", None


def _document(name: str, text: str, problem: tuple[str, str] | None, cursor: list[int], done: int) -> Document:
    if problem is None and not text:
        problem = ("empty", "")
    return Document(name, None if problem else lambda: pieces_of(iter((text,))), problem, cursor, done)


def _read_parquet(source: Source, path: Path, text_field: str, cursor: list[int]) -> Iterator[Document]:
    need("pyarrow", "Parquet files")
    import pyarrow
    from pyarrow import parquet

    start = cursor[0] if cursor else 0
    try:
        with parquet.ParquetFile(path, memory_map=False) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise ValueError(f"{source.name} has no column {text_field!r}: it has {', '.join(names)} (--text-field)")
            kind = file.schema_arrow.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise ValueError(f"{source.name}: the column {text_field!r} holds {kind}, expected text")
            total, row = max(1, file.metadata.num_rows), 0
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= start:
                    row += rows
                    continue
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group], columns=[text_field]):
                    for value in batch.column(0):
                        row += 1
                        if row > start:
                            text, problem = _text_of_cell(value)
                            done = source.size * row // total
                            yield _document(f"{source.name}#{row - 1}", text, problem, [row], done)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, ValueError) and str(error).startswith(source.name):
            raise
        raise ValueError(f"{source.name} is damaged or no Parquet file: {str(error).splitlines()[0]}") from error


def _text_of_cell(value: Any) -> tuple[str, tuple[str, str] | None]:
    if not value.is_valid:
        return "", None
    try:
        return value.as_buffer().to_pybytes().decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", ("not UTF-8", f"byte {error.start:,} of the text: {error.reason}")
