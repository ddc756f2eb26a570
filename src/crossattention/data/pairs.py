"""Files of text pairs, one pair a line: TSV, CSV, JSON lines and Parquet, read strictly.

What lives here: turning such a file into a list of (source, target) strings, with every fault named by its line.
What does not: splitting into parts (recipes), turning text into numbers (`vocabulary`), batches (`batches`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 1 << 20
"""A longer line is an error: a pair of sequences is never that long, a file of another kind often is."""

_NAMED_PROBLEMS = 5
_SUFFIXES = {
    ".tsv": "tsv",
    ".txt": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class PairFile:
    """The pairs of one file, in its order, and what was left out.

    Args:
        path: the file.
        pairs: (source, target), both non-empty.
        skipped: how many bad lines `skip_bad` left out; 0 without it.
        problems: what was wrong with the first few of them, each beginning with its line number.
    """

    path: Path
    pairs: list[tuple[str, str]]
    skipped: int = 0
    problems: tuple[str, ...] = ()


def read_pairs(path: str | Path, *, skip_bad: bool = False) -> PairFile:
    r"""Read a two-column file of text pairs.

    The kind is known by the name: `.tsv`/`.txt` (one tab between the columns, nothing quoted), `.csv` (commas, double
    quotes; a record ends with its line), `.jsonl`/`.ndjson`/`.json` (one object or array a line: the keys `source` and
    `target`, else its two string values in their order) and `.parquet` (the columns `source` and `target`, else its
    first two string columns). A first TSV or CSV line that reads exactly `source`, `target` is a heading. Text is
    UTF-8; a byte order mark at the start is no part of it. Nothing else is repaired: fields are kept as they stand.

    Args:
        path: the file.
        skip_bad: leave bad lines out and count them, where otherwise the first of them is an error.

    Returns:
        The pairs with the number of lines left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name says no known kind; the file is empty or has no good line; or, without `skip_bad`, a line
            has not two columns, has an empty column, is longer than `MAX_LINE_BYTES`, is not UTF-8 or not JSON. The
            line (from 1; in Parquet the row) is named.
        ModuleNotFoundError: a Parquet file without `pip install 'crossattention[data]'`.

    Cost: one pass; memory is that of the pairs, at most one line is held beside them.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "pairs.tsv"
        >>> _ = file.write_text("cat\tK AE T\nno tab here\n", encoding="utf-8")
        >>> read_pairs(file, skip_bad=True).pairs
        [('cat', 'K AE T')]
        >>> read_pairs(file, skip_bad=True).problems
        ('line 2: expected 2 columns, got 1',)
    """
    path = Path(path)
    kind = _kind_of(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"expected a data file at {path}, found {found}; give the path of a two-column file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); expected one pair a line, source and target")
    where = "row" if kind == "parquet" else "line"
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    skipped = 0
    for number, pair in _READERS[kind](path):
        if isinstance(pair, tuple):
            pairs.append(pair)
            continue
        problem = f"{where} {number}: {pair}"
        if not skip_bad:
            raise ValueError(f"{path}, {problem}; correct it, or leave bad lines out with skip_bad=True (--skip-bad)")
        skipped += 1
        if len(problems) < _NAMED_PROBLEMS:
            problems.append(problem)
    if not pairs:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{path} has no good {where}: expected at least one pair, got {skipped} bad {where}s{listed}")
    return PairFile(path, pairs, skipped, tuple(problems))


def _kind_of(path: Path) -> str:
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(_SUFFIXES)
        raise ValueError(f"expected a file name ending in one of {known}, got {path.name!r}; rename or convert it")
    return kind


# A reader yields (number, pair) or (number, what is wrong with that line): one stream, so that the caller alone
# decides whether a bad line ends the reading.
_Numbered = Iterator[tuple[int, tuple[str, str] | str]]


def _read_lines(path: Path) -> Iterator[tuple[int, bytes | str]]:
    """Yield (number, bytes of the line without its end), or (number, problem) for a line that is too long."""
    number = 0
    with path.open("rb") as file:
        # readline with a limit: a 10 GB file without a line break costs 1 MiB of memory, not 10 GB.
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                length = len(line)
                while rest := file.readline(MAX_LINE_BYTES):
                    length += len(rest)
                    if rest.endswith(b"\n"):
                        break
                yield number, f"{length:,} bytes long, more than the {MAX_LINE_BYTES:,} that a line may have"
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _decode(raw: bytes) -> str:
    """Decode strictly; a ValueError says which byte, counted from 1, is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise ValueError(f"not UTF-8: byte 0x{byte:02x} at position {error.start + 1} of the line") from None


def _two_columns(columns: list[str]) -> tuple[str, str]:
    if len(columns) != 2:
        raise ValueError(f"expected 2 columns, got {len(columns)}")
    source, target = columns
    if not source.strip() or not target.strip():
        raise ValueError(f"its {'first' if not source.strip() else 'second'} column is empty")
    return source, target


def _parse_lines(path: Path, parse: Callable[[str], list[str]], *, has_heading: bool) -> _Numbered:
    for number, line in _read_lines(path):
        if isinstance(line, str):
            yield number, line
            continue
        try:
            text = _decode(line)
            if not text.strip():
                raise ValueError("it is blank, expected 2 columns")
            pair = _two_columns(parse(text))
        except ValueError as error:
            yield number, str(error)
            continue
        if has_heading and number == 1 and tuple(column.strip().lower() for column in pair) == ("source", "target"):
            continue
        yield number, pair


def _parse_csv(text: str) -> list[str]:
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise ValueError(f"not CSV: {error} (a quoted field must end on its own line)") from None


def _parse_json(text: str) -> list[str]:
    try:
        record = json.loads(text)
    except RecursionError:
        raise ValueError("not a pair in JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    columns = _strings_of(record)
    try:
        "".join(columns).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    return columns


def _strings_of(record: object) -> list[str]:
    if isinstance(record, dict):
        if "source" in record and "target" in record:
            values = [record["source"], record["target"]]
            if not all(isinstance(value, str) for value in values):
                raise ValueError("expected strings under the keys 'source' and 'target'")
            return values
        return [value for value in record.values() if isinstance(value, str)]
    if isinstance(record, list):
        return [value for value in record if isinstance(value, str)]
    raise ValueError(f"expected a JSON object or array, got {type(record).__name__}")


def _read_parquet(path: Path) -> _Numbered:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is a Parquet file, which pyarrow reads; install it with: pip install 'crossattention[data]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            names = _text_columns(path, file.schema_arrow)
            number = 0
            for batch in file.iter_batches(batch_size=8192, columns=names):
                # As bytes, so that a value that is not UTF-8 is found by our own decoder and named by its row.
                columns = [batch.column(name).cast(arrow.large_binary()).to_pylist() for name in names]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield number, _check_row(values)
    except (arrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no readable Parquet file ({error}); write it again, or give a TSV file") from error


def _text_columns(path: Path, schema: Any) -> list[str]:
    """The names of the two string columns of an Arrow schema."""
    texts = [field.name for field in schema if str(field.type) in ("string", "large_string")]
    names = ["source", "target"] if {"source", "target"} <= set(texts) else texts[:2]
    if len(names) < 2:
        raise ValueError(f"expected two string columns in {path}, got {len(texts)} among the columns {schema.names}")
    return names


def _check_row(values: tuple[bytes | None, ...]) -> tuple[str, str] | str:
    try:
        if None in values:
            raise ValueError("it has a null, expected 2 strings")
        if max(len(value) for value in values) > MAX_LINE_BYTES:
            raise ValueError(f"a value is longer than the {MAX_LINE_BYTES:,} bytes that it may have")
        return _two_columns([_decode(value) for value in values])
    except ValueError as error:
        return str(error)


_READERS: dict[str, Callable[[Path], _Numbered]] = {
    "tsv": lambda path: _parse_lines(path, lambda text: text.split("\t"), has_heading=True),
    "csv": lambda path: _parse_lines(path, _parse_csv, has_heading=True),
    "jsonl": lambda path: _parse_lines(path, _parse_json, has_heading=False),
    "parquet": _read_parquet,
}
