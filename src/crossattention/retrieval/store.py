"""Files of a chunk database: arrays that only grow, and JSON that is written whole or not at all.

What lives here: array files with a header, how many of their rows count and what these rows' checksums are; JSON with a checksum
of its own; files that appear complete; the lock of a folder. What does not: which arrays a database has (`building`, `database`).

An array file is a header of 4,096 bytes (a magic line, then one line of JSON: name, dtype, shape of a row, and facts such as
hashes of the tokenizer and the embedder that made it; zeros to its end) and rows of fixed size behind it. Rows are appended,
flushed to the disk, and only then counted, in a JSON file that replaces the one before it in one step: whatever lies behind the
counted rows was left by a process that was killed, and is cut off when writing goes on. Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"crossattention array 1\n"
HEADER_BYTES = 4096
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Extent:
    """The rows of an array file that count.

    Args:
        rows: how many.
        blocks: rows and CRC-32 of each stretch, in the order they were written; together all rows.
    """

    rows: int = 0
    blocks: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"rows": self.rows, "blocks": [list(block) for block in self.blocks]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Extent:
        """Of such an object.

        Raises:
            ValueError: it is none, or the blocks do not sum to the rows.
        """
        try:
            found = cls(int(value["rows"]), tuple((int(rows), int(crc)) for rows, crc in value["blocks"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"expected rows and blocks, got {value!r:.80}") from error
        if sum(rows for rows, _ in found.blocks) != found.rows:
            raise ValueError(f"the blocks hold {sum(rows for rows, _ in found.blocks):,} rows, not {found.rows:,}")
        return found


@dataclass(frozen=True)
class ArrayFile:
    """One array on disk.

    Args:
        path: the file.
        dtype: of its numbers, little-endian.
        row_shape: shape of a row; () for plain numbers.
        facts: what its header says beside, compared when it is opened.
    """

    path: Path
    dtype: np.dtype
    row_shape: tuple[int, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * int(np.prod(self.row_shape, dtype=np.int64))

    def header(self) -> bytes:
        """The first 4,096 bytes of the file."""
        about = {"dtype": self.dtype.str, "row_shape": list(self.row_shape), **self.facts}
        head = MAGIC + json.dumps(about, sort_keys=True, ensure_ascii=True).encode() + b"\n"
        if len(head) > HEADER_BYTES:
            raise ValueError(f"the header of {self.path.name} would have {len(head):,} bytes, expected at most {HEADER_BYTES:,}")
        return head.ljust(HEADER_BYTES, b"\0")

    def check(self, extent: Extent, *, may_be_longer: bool = False) -> None:
        """Compare header and length with what they should be.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: cut short, lengthened, of other sizes, or of another database; the message names it and what is wrong.
        """
        expected = HEADER_BYTES + extent.rows * self.row_bytes
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEADER_BYTES)
        if size < expected:
            raise ValueError(f"{self.path} is damaged: it holds {size:,} bytes, expected {expected:,}; it was cut short")
        if not head.startswith(MAGIC):
            raise ValueError(f"{self.path} is damaged or no array of a database: it does not begin with {MAGIC!r}")
        if head != self.header():
            theirs = head[len(MAGIC) :].rstrip(b"\0\n").decode("utf-8", "replace")
            ours = self.header()[len(MAGIC) :].rstrip(b"\0\n").decode()
            raise ValueError(f"{self.path} is of another database, or damaged: its header is {theirs}, expected {ours}")
        if size > expected and not may_be_longer:
            raise ValueError(
                f"{self.path} is damaged: it holds {size:,} bytes, expected {expected:,}; something was added to it. "
                "Where a build that added documents was stopped and its building.json is gone, nothing says which rows count: put "
                "that file back and run the same `crossattention index` again, or use another copy of the database"
            )

    def verify(self, extent: Extent) -> None:
        """Read every row and compare the checksums.

        Raises:
            ValueError: a stretch of rows was altered; the message names the file and the rows.

        Cost: one pass over the file, about a gigabyte a second.
        """
        with self.path.open("rb") as file:
            file.seek(HEADER_BYTES)
            first = 0
            for rows, expected in extent.blocks:
                found, left = 0, rows * self.row_bytes
                while left:
                    data = file.read(min(left, _READ_BYTES))
                    if not data:
                        raise ValueError(f"{self.path} is damaged: it ends within row {first + rows - left // self.row_bytes:,}")
                    found, left = zlib.crc32(data, found), left - len(data)
                if found != expected:
                    raise ValueError(
                        f"{self.path} is damaged: rows {first:,} to {first + rows - 1:,} have the checksum {found:08x}, expected "
                        f"{expected:08x}; they were altered after they were written. Use another copy, or build the database again"
                    )
                first += rows

    def read(self, extent: Extent) -> np.ndarray:
        """The rows, memory-mapped and read-only."""
        shape = (extent.rows, *self.row_shape)
        if extent.rows == 0:
            return np.empty(shape, self.dtype)
        return np.memmap(self.path, self.dtype, mode="r", offset=HEADER_BYTES, shape=shape)

    def read_all(self, extent: Extent) -> np.ndarray:
        """The rows, in memory."""
        return np.array(self.read(extent))


class ArrayWriter:
    """Appends rows to an array file; they count from the `commit` on whose result is written down.

    Args:
        file: the array; made where it does not exist and nothing of it counts.
        extent: the rows that count; what lies behind them is cut off.

    Raises:
        ValueError: the file is shorter than that, or another array.
    """

    def __init__(self, file: ArrayFile, extent: Extent) -> None:
        self.file, self.extent = file, extent
        self._rows = self._crc = 0
        if extent.rows == 0:
            # Whatever an earlier process left of it may not even have a whole header.
            with file.path.open("wb") as made:
                made.write(file.header())
                made.flush()
                os.fsync(made.fileno())
        else:
            file.check(extent, may_be_longer=True)
        self._stream = file.path.open("r+b")
        self._stream.truncate(HEADER_BYTES + extent.rows * file.row_bytes)
        self._stream.seek(0, os.SEEK_END)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    @property
    def rows(self) -> int:
        """Rows written, counted or not."""
        return self.extent.rows + self._rows

    def append(self, rows: np.ndarray) -> None:
        """Write rows behind the last."""
        if rows.shape[1:] != self.file.row_shape:
            raise ValueError(f"expected rows of shape {self.file.row_shape} for {self.file.path.name}, got {rows.shape[1:]}")
        data = np.ascontiguousarray(rows, self.file.dtype).reshape(-1).view(np.uint8).data
        self._stream.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self._rows += len(rows)

    def commit(self) -> Extent:
        """Flush to the disk; the rows that count once the result is written down."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        if self._rows:
            self.extent = Extent(self.rows, (*self.extent.blocks, (self._rows, self._crc)))
            self._rows = self._crc = 0
        return self.extent

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON with a SHA-256 of its content inside, whole or not at all.

    Raises:
        OSError: it could not be written; the old file is untouched.
    """
    content = {**value, "sha256": _digest(value)}
    with new_file(path) as beside:
        beside.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, cut short, or altered; the message names the file.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON: {error}") from error
    if not isinstance(value, dict) or "sha256" not in value:
        raise ValueError(f"{path} is not a file of a chunk database: expected a JSON object with its sha256")
    stored = value.pop("sha256")
    if stored != _digest(value):
        raise ValueError(
            f"{path} is damaged: its content does not have the SHA-256 that is written in it ({stored!s:.12}...); it was altered "
            "after it was written. Use another copy"
        )
    return value


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file that appears under its name only when it is complete.

    Yields a path beside it to write to; when the block ends, that file is flushed to the disk and takes the name.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Flush a folder's own entries to the disk."""
    if os.name != "posix":  # other systems cannot open a folder, and flush its entries themselves
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, size: int, sha256: str, *, verify: bool) -> None:
    """Compare a file that was written at once with its size and, if asked, its digest.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it differs; the message names it and what is wrong.
    """
    found = path.stat().st_size
    if found != size:
        how = "it was cut short" if found < size else "something was added to it"
        raise ValueError(f"{path} is damaged: it holds {found:,} bytes, expected {size:,}; {how}")
    if verify and (digest := sha256_of(path)) != sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is {digest[:12]}..., expected {sha256[:12]}...; it was altered")


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder for one process that writes; the system lets go of it when the process ends, however it ends.

    Args:
        folder: the folder.
        wait: until another process that writes in it has ended.

    Raises:
        ValueError: another process writes in it, and `wait` is False.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system: two processes in one folder are then the user's to avoid
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ValueError(f"another process builds the database in {folder}: wait for it, or stop it") from error
        yield


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
