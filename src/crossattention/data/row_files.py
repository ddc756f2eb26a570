"""Files of rows, read block by block and ahead: a context on disk for `CrossAttention.attend_blocks`.

A `.npy` file, a tensor of a safetensors file, or a column of vectors of an Arrow file. Nothing is mapped into memory: blocks are
read into memory of their own while the one before is worked on, so that what the process holds does not grow with the file, and a
file that becomes shorter is an error that names it, not a signal that ends the process.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 4 << 20
"""Bytes of a block by default: large enough that its start-up does not show, small enough that its memory is used again."""
AHEAD = 2
"""Blocks that wait, read, for the one that is worked on."""
_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KINDS = {".npy": "npy", ".safetensors": "safetensors", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}


class _Rows(Protocol):
    """One open file: how many rows, how wide, of what dtype, and how to read some of them."""

    rows: int
    width: int
    dtype: torch.dtype

    def cuts(self, most: int) -> list[tuple[int, int]]:
        """First and last-but-one row of each block of at most so many rows."""

    def read(self, file: Any, start: int, stop: int, memory: _Memory) -> Tensor:
        """Rows (stop - start, width) out of what `open` gave."""

    def open(self) -> Any:
        """The file, open for one pass; closed by `close()`."""


class RowFile:
    """The rows of a file as blocks (rows, width) that are read ahead; can be iterated any number of times.

    Args:
        path: of a `.npy`, `.safetensors`, or Arrow IPC file (`.arrow`, `.feather`, `.ipc`).
        name: which tensor of a safetensors file, or column of an Arrow file (of fixed-size lists of floats); needed where there are
            several.
        block_rows: rows of a block, at most; by default 4 MiB of the file.
        dtype: what blocks are converted to; default the file's.
        ahead: blocks that are read before they are asked for, by a thread; 0 reads without one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another kind, with no or several such tensors, not of two dimensions, not of floating numbers;
            damaged, or shorter or longer than it says itself. While reading: a file that became shorter.
        ModuleNotFoundError: an Arrow file without pyarrow; `pip install 'crossattention[data]'`.

    Cost: `ahead` + 2 blocks in memory.

    Example:
        >>> import numpy as np
        >>> from crossattention import CrossAttention
        >>> np.save("rows.npy", np.random.randn(700, 32).astype(np.float32))
        >>> file = RowFile("rows.npy", block_rows=256)
        >>> file.rows, file.width, [len(block) for block in file]
        (700, 32, [256, 256, 188])
        >>> CrossAttention(48, 32, heads=4).attend_blocks(torch.randn(1, 5, 48), file).shape
        torch.Size([1, 5, 48])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        block_rows: int | None = None,
        dtype: torch.dtype | None = None,
        ahead: int = AHEAD,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} is no file")
        kind = _KINDS.get(self.path.suffix.lower())
        if kind is None:
            raise ValueError(f"{path} must end in one of {', '.join(_KINDS)}; convert it, or pass blocks of your own")
        if kind == "npy" and name is not None:
            raise ValueError(f"{path} holds one array, so name={name!r} says nothing; leave it out")
        if block_rows is not None and block_rows < 1:
            raise ValueError(f"block_rows must be at least 1, got {block_rows}")
        if ahead < 0:
            raise ValueError(f"ahead must be at least 0, got {ahead}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating, got {dtype}")
        held: _Rows
        if kind == "npy":
            held = _npy(self.path)
        elif kind == "safetensors":
            held = _safetensors(self.path, name)
        else:
            held = _Arrow(self.path, name)
        self._held = held
        self.rows, self.width, self.dtype = held.rows, held.width, held.dtype if dtype is None else dtype
        self.block_rows = block_rows or max(1, BLOCK_BYTES // max(1, held.width * held.dtype.itemsize))
        self.ahead = ahead
        # A file without rows is one empty block: an empty context is a context.
        self._cuts = held.cuts(self.block_rows) or [(0, 0)]

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._cuts)

    def __repr__(self) -> str:
        return f"RowFile({str(self.path)!r}, rows={self.rows}, width={self.width}, {self.dtype}, block_rows={self.block_rows})"

    def __iter__(self) -> Iterator[Tensor]:
        """All blocks in turn."""
        return self.from_block(0)

    def from_block(self, first: int) -> Iterator[Tensor]:
        """The blocks after the first few, of which nothing is read: where an interrupted pass goes on."""
        cuts = self._cuts[first:]
        blocks = self._read(cuts) if self.ahead == 0 else _ahead(self._read(cuts), self.ahead)
        return blocks

    def rows_before(self, block: int) -> int:
        """Number of rows in the blocks before one."""
        return self._cuts[block][0] if block < len(self._cuts) else self.rows

    def _read(self, cuts: list[tuple[int, int]]) -> Iterator[Tensor]:
        file, memory = self._held.open(), _Memory(self.ahead + 4)
        try:
            for start, stop in cuts:
                block = self._held.read(file, start, stop, memory)
                if block.dtype != self.dtype:
                    block = memory.take(stop - start, self.width, self.dtype).copy_(block)
                yield block
                del block  # so that its memory is free for the next
        finally:
            file.close()


class _Memory:
    """Memory of blocks that nobody holds any more, used again: getting new memory was measured to cost more than the copy into it.

    A tensor made of a numpy array holds a reference to it for as long as its storage lives, views of it included. An array that is
    referred to from here alone is therefore free.
    """

    def __init__(self, most: int) -> None:
        self._arrays = [np.empty(0, np.uint8)]
        self._count_when_free, self._most = sys.getrefcount(self._arrays[0]), most

    def take(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """An unwritten block."""
        wanted = rows * width * dtype.itemsize
        if wanted == 0:
            return torch.empty(rows, width, dtype=dtype)
        for place in range(len(self._arrays)):
            if sys.getrefcount(self._arrays[place]) <= self._count_when_free and self._arrays[place].nbytes == wanted:
                return torch.from_numpy(self._arrays[place]).view(dtype).view(rows, width)
        array = np.empty(wanted, np.uint8)
        self._arrays = [*self._arrays[-self._most + 1 :], array]
        return torch.from_numpy(array).view(dtype).view(rows, width)


def _ahead(blocks: Iterator[Tensor], most: int) -> Iterator[Tensor]:
    """The same blocks, made by a thread before they are asked for; it ends when the caller stops asking."""
    waiting: queue.Queue[Any] = queue.Queue(most)
    stopped = threading.Event()

    def put(thing: Any) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(thing, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for block in blocks:
                if not put(block):
                    return
            put(None)
        except BaseException as error:  # told to whoever reads
            put(error)
        finally:
            blocks.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=work, name="crossattention-rows", daemon=True)
    thread.start()
    try:
        while (block := waiting.get()) is not None:
            if isinstance(block, BaseException):
                raise block
            yield block
            del block  # before the next is waited for
    finally:
        stopped.set()
        thread.join()


class _Flat:
    """Rows that lie end to end in a file, from some byte on."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
        if len(shape) != 2:
            raise ValueError(f"{what} must have two dimensions, (rows, width), got shape {shape}")
        self.path, self.offset, self.dtype = path, offset, dtype
        self.rows, self.width = shape

    @property
    def _row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def cuts(self, most: int) -> list[tuple[int, int]]:
        return [(start, min(start + most, self.rows)) for start in range(0, self.rows, most)]

    def open(self) -> Any:
        return open(self.path, "rb", buffering=0)

    def read(self, file: Any, start: int, stop: int, memory: _Memory) -> Tensor:
        block = memory.take(stop - start, self.width, self.dtype)
        into = memoryview(block.view(torch.uint8).flatten().numpy())
        file.seek(self.offset + start * self._row_bytes)
        filled = 0
        while filled < len(into):
            count = file.readinto(into[filled:])
            if not count:
                raise ValueError(
                    f"{self.path} became shorter while it was read: rows {start} to {stop} end at byte "
                    f"{self.offset + stop * self._row_bytes}, but the file at byte {self.path.stat().st_size}"
                )
            filled += count
        return block


def _npy(path: Path) -> _Flat:
    """The array of a .npy file, by its header."""
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read_header(file)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no .npy file, or its header is damaged: {str(error).splitlines()[0]}") from None
        offset = file.tell()
    if dtype.str not in ("<f8", "<f4", "<f2"):
        raise ValueError(f"{path} holds {dtype.str}, but rows must be little-endian float16, float32 or float64")
    if is_fortran and len(shape) == 2 and min(shape) > 1:
        raise ValueError(f"{path} is stored column by column (fortran_order); save np.ascontiguousarray(array)")
    _check_size(path, offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, "its header")
    return _Flat(path, offset, shape, torch.from_numpy(np.empty(0, dtype)).dtype, f"the array of {path}")


def _safetensors(path: Path, name: str | None) -> _Flat:
    """One tensor of a safetensors file, by its header."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is damaged or cut short: its header would have {length:,} bytes, the file has {size:,}")
        try:
            header = json.loads(file.read(length))
            tensors = {key: value for key, value in header.items() if key != "__metadata__"}
            end = max((value["data_offsets"][1] for value in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is no safetensors file, or its header is damaged: {str(error).splitlines()[0]}") from None
    _check_size(path, 8 + length + end, "its header")
    name = _one_of(path, "tensor", list(tensors), name)
    told = tensors[name]
    if told["dtype"] not in _SAFETENSORS:
        raise ValueError(f"tensor {name!r} of {path} is {told['dtype']}, but rows must be one of {', '.join(_SAFETENSORS)}")
    found = _Flat(
        path, 8 + length + told["data_offsets"][0], tuple(told["shape"]), _SAFETENSORS[told["dtype"]], f"tensor {name!r} of {path}"
    )
    if found.rows * found.width * found.dtype.itemsize != told["data_offsets"][1] - told["data_offsets"][0]:
        raise ValueError(f"tensor {name!r} of {path} has shape {told['shape']}, which its bytes {told['data_offsets']} do not fit")
    return found


class _Arrow:
    """A column of fixed-size lists of floats of an Arrow IPC file; blocks do not cross its record batches."""

    def __init__(self, path: Path, name: str | None) -> None:
        self.path = path
        pa = _pyarrow()
        try:
            with pa.memory_map(str(path)) as mapped:  # only lengths and places are looked at: nothing of the rows is read
                reader = pa.ipc.open_file(mapped)
                schema = reader.schema
                vectors = [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]
                column = name if name in vectors else vectors[0] if vectors else None
                found = [_batch_in_file(reader.get_batch(i), column, mapped) for i in range(reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is no Arrow IPC file, or is damaged or cut short: {str(error).splitlines()[0]}") from None
        lengths = [length for length, _ in found]
        self.places = [place for _, place in found]
        self.name = _one_of(path, "fixed-size list column", vectors, name)
        kind = schema.field(self.name).type
        try:
            self.dtype = {pa.float16(): torch.float16, pa.float32(): torch.float32, pa.float64(): torch.float64}[kind.value_type]
        except KeyError:
            raise ValueError(f"column {self.name!r} of {path} holds {kind.value_type}, but rows must be floats") from None
        self.rows, self.width = sum(lengths), kind.list_size
        self._starts = [0, *accumulate(lengths)]

    def cuts(self, most: int) -> list[tuple[int, int]]:
        return [(start, min(start + most, end)) for first, end in pairwise(self._starts) for start in range(first, end, most)]

    def open(self) -> Any:
        return _ArrowPass(self)

    def read(self, file: Any, start: int, stop: int, memory: _Memory) -> Tensor:
        batch = int(np.searchsorted(self._starts, start, side="right")) - 1
        place = self.places[batch] if start < stop else None
        if place is None:
            return file.read(start, stop)
        first = self._starts[batch]
        rows = _Flat(self.path, place, (self.rows, self.width), self.dtype, "")
        return rows.read(file.plain, start - first, stop - first, memory)


def _batch_in_file(batch: Any, column: str | None, mapped: Any) -> tuple[int, int | None]:
    """The length of a record batch, and the byte of the file at which its numbers lie end to end; None where they do not.

    They do not where they are compressed, or where some are missing.
    """
    if column is None or batch.column(column).null_count or batch.num_rows == 0:
        return batch.num_rows, None
    numbers = batch.column(column).flatten()
    mapped.seek(0)
    whole = mapped.read_buffer(mapped.size())  # a view
    at = numbers.buffers()[1].address + numbers.offset * (numbers.type.bit_width // 8) - whole.address
    return batch.num_rows, at if numbers.null_count == 0 and 0 <= at < whole.size else None


class _ArrowPass:
    """One pass over an Arrow file, with the record batch that is being read where it must be read whole."""

    def __init__(self, told: _Arrow) -> None:
        pa = _pyarrow()
        self.told, self.batch, self._invalid = told, -1, pa.ArrowInvalid
        self.plain = open(told.path, "rb", buffering=0)
        self.file = pa.OSFile(str(told.path))
        try:
            self.reader = pa.ipc.open_file(self.file)
        except (pa.ArrowInvalid, OSError) as error:
            self.close()
            raise ValueError(f"{told.path} cannot be read any more: {str(error).splitlines()[0]}") from None
        self.rows = torch.empty(0, told.width)

    def read(self, start: int, stop: int) -> Tensor:
        told = self.told
        batch = int(np.searchsorted(told._starts, start, side="right")) - 1
        if stop == start:
            return torch.empty(0, told.width, dtype=told.dtype)
        if batch != self.batch:
            try:
                column = self.reader.get_batch(batch).column(told.name)
            except (self._invalid, OSError) as error:
                raise ValueError(f"{told.path}: record batch {batch} cannot be read: {str(error).splitlines()[0]}") from None
            if column.null_count or column.flatten().null_count:
                raise ValueError(f"{told.path}: record batch {batch} of column {told.name!r} has missing values; fill or drop them")
            numbers = column.flatten().to_numpy(zero_copy_only=True)
            # Copied, as the memory is Arrow's and may not be written to.
            self.batch, self.rows = batch, torch.from_numpy(numbers.copy()).view(-1, told.width)
        first = told._starts[batch]
        return self.rows[start - first : stop - first]

    def close(self) -> None:
        self.file.close()
        self.plain.close()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Arrow files are read by pyarrow; install it with pip install 'crossattention[data]'") from None
    return pyarrow


def _one_of(path: Path, what: str, names: list[str], name: str | None) -> str:
    if name is None and len(names) == 1:
        return names[0]
    if name is None or name not in names:
        asked = "none was named" if name is None else f"{name!r} is not among them"
        raise ValueError(f"{path} has {len(names)} {what}s ({', '.join(sorted(names)[:8]) or 'none'}); {asked}, pass name=")
    return name


def _check_size(path: Path, wanted: int, by: str) -> None:
    size = path.stat().st_size
    if size != wanted:
        how = "cut short" if size < wanted else "longer than it should be"
        raise ValueError(f"{path} is {how}: by {by} it has {wanted:,} bytes, but the file has {size:,}")
