"""Files and folders that are written whole or not at all, and read with what is wrong named.

What lives here: safetensors and JSON, reading and writing; the digest of a file; folders that appear complete. What
does not: which tensors a model has (the families beside this file) and what a training run keeps (training/).
Nothing here reads or writes a pickle.

Every file is written under another name beside its target, flushed to the disk, renamed over the target, and then the
folder's own entry is flushed: after a power cut or a kill one finds the old content or the new, never half of one.
"""

import ctypes
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

# Keys of the file's own metadata that these functions own; "format" is what other readers of safetensors expect.
_FORMAT, _ALIASES, _DIGEST = "format", "aliases", "sha256"


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, whole or not at all, with a digest of their content inside.

    Args:
        path: the file; an old one is replaced in one step. Its folder must exist.
        tensors: name -> tensor, on any device. Names of one and the same tensor (tied weights) are stored once, and
            come back under every name.
        metadata: further strings for the file's header; `format`, `aliases` and `sha256` are this function's own.

    Raises:
        TypeError: a value is not a tensor.
        ValueError: `metadata` holds one of this function's own keys.
        OSError: the file could not be written; the old file is untouched.

    Cost: one pass of SHA-256 over the bytes, beside the writing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_safetensors(f"{folder}/model.safetensors", {"w": torch.ones(2)})
        ...     read_safetensors(f"{folder}/model.safetensors")
        {'w': tensor([1., 1.])}
    """
    path = Path(path)
    taken = {_FORMAT, _ALIASES, _DIGEST} & set(metadata or {})
    if taken:
        raise ValueError(f"metadata must not hold the keys {sorted(taken)}: they belong to the file itself; rename them")
    stored, aliases = _each_once(tensors)
    header = {**(metadata or {}), _FORMAT: "pt", _DIGEST: _digest(stored)}
    if aliases:
        header[_ALIASES] = json.dumps(aliases, sort_keys=True)
    with new_file(path) as beside:
        try:
            beside.touch()
            permissions = beside.stat().st_mode  # those that the user's new files have; the library's are private
            save_file(stored, beside, metadata=header)
            _sort_metadata(beside)
            beside.chmod(permissions)
        except SafetensorError as error:  # the library's own type hides that the disk is full or the folder gone
            raise OSError(f"could not write {path}: {error}") from error


def read_safetensors(path: str | Path, *, device: str | torch.device = "cpu", verify: bool = True) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file, or say what is wrong with the file.

    Args:
        path: the file.
        device: where the tensors go.
        verify: compare the content with the digest in the header, if there is one (files of other programs have none).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, altered, or no safetensors file; the message names it and what is wrong.
    """
    path = Path(path)
    check_layout(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if verify and _DIGEST in metadata and _digest(tensors) != metadata[_DIGEST]:
        raise ValueError(
            f"{path} is damaged: its content does not have the SHA-256 digest written in its header "
            f"({metadata[_DIGEST][:12]}...); it was altered after it was written. Use another copy"
        )
    # Copied, because the library maps the file: the tensors would change, or end the process, with the file.
    tensors = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
    for name, first in json.loads(metadata.get(_ALIASES, "{}")).items():
        tensors[name] = tensors[first]
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings in a safetensors file's header, without this module's own (see `write_safetensors`)."""
    check_layout(Path(path))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return {key: value for key, value in metadata.items() if key not in (_FORMAT, _ALIASES, _DIGEST)}


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all.

    Raises:
        TypeError, ValueError: JSON cannot hold the value (nan and infinity among them); nothing is written.
        OSError: the file could not be written; the old file is untouched.
    """
    path = Path(path)
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(path: str | Path, *, refuse_repeated: bool = False) -> Any:
    """Read a JSON file, or say what is wrong with it.

    Args:
        path: the file.
        refuse_repeated: refuse an object that holds a key twice, where otherwise the last one counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, or cut short; the message names the file, the line and the column.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_each_key_once if refuse_repeated else None)
    except RepeatedKeyError as error:
        raise ValueError(f"{path} names {error} twice; each name must stand once") from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged or no JSON of a model: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged or no JSON: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged or no JSON: {error.msg} at line {error.lineno}, column {error.colno} "
            f"(the file holds {len(data):,} bytes)"
        ) from error


def sha256_of(path: str | Path) -> str:
    """The SHA-256 digest of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Write a file that appears under its name only when it is complete.

    Yields a path beside `path` to write to. When the block ends, that file is flushed to the disk and renamed to
    `path`, replacing an old one in one step. When the block raises, nothing is left and the old file is untouched.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        _flush_file(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Fill a folder that appears under its name only when it is complete.

    Yields the path of an empty folder beside `path`. When the block ends, its files are flushed to the disk and the
    folder takes the name `path`; a folder that had the name is replaced (in one step where the system can swap two
    names; see `restore_folder` for the others) and deleted. When the block raises, nothing is left.

    Raises:
        OSError: the folder above `path` does not exist or cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     with new_folder(f"{out}/best") as beside:
        ...         write_json(beside / "config.json", {"dim": 8})
        ...     read_json(f"{out}/best/config.json")
        {'dim': 8}
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.part")
    if beside.exists():  # left by a process that was killed
        shutil.rmtree(beside)
    beside.mkdir()
    try:
        yield beside
        _flush_tree(beside)
        _take_place(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _flush_folder(path.parent)
    shutil.rmtree(beside, ignore_errors=True)  # after a swap: the folder that had the name before


def restore_folder(path: str | Path) -> None:
    """Bring back the folder that a kill left under its other name, and delete unfinished ones.

    Only systems that cannot swap two names need the first: there `new_folder` moves the old folder aside for a moment.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.old")
    if aside.exists() and not path.exists():
        os.rename(aside, path)
    for left in (aside, path.with_name(f".{path.name}.part")):
        if left.exists():
            shutil.rmtree(left)


def _each_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors on the CPU, each memory once, and alias -> name of the one stored."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_of_view: dict[tuple[Any, ...], str] = {}
    storages = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} must be a tensor, got {type(tensor).__name__}")
        tensor = tensor.detach()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        view = (*storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first_of_view:
            aliases[name] = first_of_view[view]
            continue
        first_of_view[view] = name
        # Two different views of one memory: the format holds no views, so the later one is stored as a copy.
        stored[name] = (tensor.clone() if storage in storages else tensor).to("cpu").contiguous()
        storages.add(storage)
    return stored, aliases


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order: the library writes them as its hash table happens to hold them."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        sorted_header = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(sorted_header) == length:  # only its order is ours to change: what the library escapes otherwise stays
            file.seek(8)
            file.write(sorted_header)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def check_layout(path: str | Path) -> dict[str, dict[str, Any]]:
    """Compare a safetensors file's length with what its header promises: says more than the library's error does.

    Returns:
        Name -> dtype, shape and data_offsets of each tensor, as in the header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: cut short, lengthened, or no safetensors file; a name that is there twice.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            raise ValueError(
                f"{path} is damaged or no safetensors file: it holds {size:,} bytes, fewer than its header needs "
                f"({8 + length if len(start) == 8 else 8:,}); it was cut short, or it is something else"
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_each_key_once)
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            promised = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
            is_formed = all(isinstance(e["dtype"], str) and all(type(n) is int for n in e["shape"]) for e in entries.values())
        except RepeatedKeyError as error:
            raise ValueError(f"{path} is damaged: its header names {error} twice") from error
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file: its header cannot be read") from error
    if not is_formed:
        raise ValueError(f"{path} is damaged or no safetensors file: its header gives a tensor no dtype or shape")
    if size != promised:
        fault = "it was cut short" if size < promised else "something was added to it"
        raise ValueError(
            f"{path} is damaged: it holds {size:,} bytes, but its header promises {promised:,}; {fault}. Use another copy"
        )
    return entries


class RepeatedKeyError(ValueError):
    """A JSON object holds a key twice; readers differ in which of them they take."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return made


def _flush_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name != "posix":  # other systems cannot open a folder, and flush its entries themselves
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(path: Path) -> None:
    for folder, _, names in os.walk(path):
        for name in names:
            _flush_file(Path(folder, name))
        _flush_folder(Path(folder))


def _take_place(beside: Path, path: Path) -> None:
    """Give the folder `beside` the name `path`; a folder that has it is left under the name `beside`."""
    if not path.exists():
        os.rename(beside, path)
    elif not _swap_names(beside, path):
        aside = path.with_name(f".{path.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        os.rename(beside, path)
        os.rename(aside, beside)


def _swap_names(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    swap = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
    names = (os.fsencode(first), os.fsencode(second))
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return library.renamex_np(*names, swap) == 0
        current_folder = -100  # AT_FDCWD
        return library.renameat2(current_folder, names[0], current_folder, names[1], swap) == 0
    except (OSError, AttributeError, TypeError):
        return False
