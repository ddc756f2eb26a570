"""Weights of other programs, opened without being read: one file or several, safetensors or torch's own archives.

What lives here: finding the files of a folder, their names and shapes, each tensor when it is asked for, and what can be wrong
with them. What does not: what the names mean (`rules`, the families) and this project's own files (`files`).

A torch archive (`.bin`, `.pt`, `.pth`) is a pickle, and a pickle is a program. It is read by torch's restricted reader
(`weights_only=True`), which rebuilds tensors and containers and refuses every other call before making it.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crossattention.checkpoints.files import check_layout, read_json

SAFETENSORS_ENDINGS = (".safetensors",)
TORCH_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
ENDINGS = SAFETENSORS_ENDINGS + TORCH_ENDINGS

# What a folder may call its weights, the first that is there counts: safetensors before pickles, as the libraries do.
FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# Under which a training program's archive may hold the weights, beside its optimizer and settings.
_SECTIONS = ("state_dict", "model", "state_dict_ema", "model_ema", "module", "model_state_dict", "model_state")

_CALL = re.compile(r"(?:GLOBAL|class|function) ([\w.]+\.[\w.]+)")


def find_weights(folder: str | Path) -> Path | None:
    """The file of a folder that holds its weights, or the index that names them; None where there is none.

    Raises:
        ValueError: none has a usual name, and several could be meant.
    """
    folder = Path(folder)
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(ENDINGS))
    if len(others) > 1:
        raise ValueError(
            f"{folder} holds {len(others)} files of weights and no index that joins them: "
            f"{', '.join(path.name for path in others[:5])}; name the file itself, or add {FOLDER_FILES[1]}"
        )
    return others[0] if others else None


class Weights(Mapping[str, Tensor], AbstractContextManager["Weights"]):
    """The tensors of one or several files, under the names in them; each is read when it is asked for.

    Args:
        path: a `.safetensors`, `.bin`, `.pt`, `.pth` or `.ckpt` file, or an index (`*.index.json`) that names such files beside it.

    Attributes:
        path: what was opened.
        files: the files, in the order of the index.
        shapes: name -> shape.
        dtypes: name -> dtype.
        section: the key of a torch archive under which the weights lay ("state_dict"); None where it holds them directly.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, cut short, of another kind, or an archive that asks for more than tensors to be made; what is wrong
            with the files of an index is listed whole.

    Cost: opening reads the headers; a torch archive of before 2020 is read whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.section: str | None = None
        self._places: dict[str, _File] = {}
        promised = _read_index(self.path) if self.path.name.endswith(".index.json") else None
        self.files = [self.path] if promised is None else _shards(self.path, promised)
        self._opened: list[_File] = []
        try:
            for file in self.files:
                self._opened.append(_SafetensorsFile(file) if file.name.endswith(SAFETENSORS_ENDINGS) else _TorchFile(file))
            self._join(promised)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        """Let go of the files; tensors that were read stay."""
        for file in self._opened:
            file.close()
        self._opened, self._places = [], {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_product(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    def _join(self, promised: Mapping[str, str] | None) -> None:
        faults = []
        for file in self._opened:
            self.section = self.section or file.section
            for name, (shape, dtype) in file.headers.items():
                if name in self._places:
                    faults.append(f"{name} is in {self._places[name].path.name} and again in {file.path.name}")
                    continue
                self.shapes[name], self.dtypes[name], self._places[name] = shape, dtype, file
        for name, shard in (promised or {}).items():
            held = self._places.get(name)
            if held is None:
                faults.append(f"{name} should be in {shard}, but is in none of the files")
            elif held.path.name != PurePosixPath(shard).name:
                faults.append(f"{name} should be in {shard}, but is in {held.path.name}")
        if promised is not None:
            faults += [
                f"{name} is in {f.path.name}, but not in the index" for name, f in self._places.items() if name not in promised
            ]
        if faults:
            raise ValueError(f"{self.path} and the files that it names do not agree:\n  " + "\n  ".join(faults))


# ------------------------------------------------------------------------------------------------------------ index


def _read_index(path: Path) -> dict[str, str]:
    """Name -> file of an index, its form checked."""
    index = read_json(path, refuse_repeated=True)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f'{path} is no index of weights: expected {{"weight_map": {{name: file, ...}}}}')
    return places


def _shards(index: Path, places: Mapping[str, str]) -> list[Path]:
    """The files that an index names: all there, all beside it, all of one kind."""
    names = list(dict.fromkeys(places.values()))
    outside = [name for name in names if _leaves(name)]
    if outside:
        raise ValueError(
            f"{index} names files outside its folder: {', '.join(map(repr, outside[:5]))}; an index may only name files beside it"
        )
    wrong = [name for name in names if not name.endswith(ENDINGS)]
    if wrong or len({name.endswith(SAFETENSORS_ENDINGS) for name in names}) > 1:
        raise ValueError(f"{index} must name files of one kind, {', '.join(ENDINGS)}; got {', '.join((wrong or names)[:5])}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} files that {index.name} names: {', '.join(missing[:10])}; "
            "copy or download the folder whole"
        )
    return [index.parent / name for name in names]


def _leaves(name: str) -> bool:
    path = PurePosixPath(name)
    return not name or path.is_absolute() or len(path.parts) != 1 or name in (".", "..") or any(c in name for c in "\\:\0")


# ------------------------------------------------------------------------------------------------------------ files


class _File:
    """One opened file: its path, its section, and name -> (shape, dtype)."""

    path: Path
    section: str | None = None
    headers: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def read(self, name: str) -> Tensor:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class _SafetensorsFile(_File):
    def __init__(self, path: Path) -> None:
        self.path = path
        header = check_layout(path)
        # Mistyped headers make the library raise whatever comes.
        try:
            self.file = safe_open(path, framework="pt").__enter__()
        except Exception as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {_first_line(error)}") from error
        self.headers = {}
        for name, entry in header.items():
            dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
            if dtype is None:
                self.close()
                raise ValueError(f"{path} holds {name} as {entry['dtype']}, which this version of torch cannot hold")
            self.headers[name] = (tuple(entry["shape"]), dtype)

    def read(self, name: str) -> Tensor:
        try:
            return self.file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged: {name} cannot be read: {_first_line(error)}") from error

    def close(self) -> None:
        self.file.__exit__(None, None, None)


class _TorchFile(_File):
    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.name.endswith(TORCH_ENDINGS):
            raise ValueError(f"{path} is no file of weights: expected one that ends in {', '.join(ENDINGS)}")
        content = _load_archive(path)
        self.tensors, self.section = _state_dict_of(content, path)
        self.headers = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def close(self) -> None:
        self.tensors = {}


def _load_archive(path: Path) -> Any:
    """The content of a torch archive, nothing but containers, plain values and tensors; new ones are mapped, not read."""
    with open(path, "rb") as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(4)
    is_zip = start == b"PK\x03\x04"
    if is_zip:
        _check_archive(path, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols, whose refusal follows
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError:
        raise
    except MemoryError as error:
        raise ValueError(f"{path} asks for more memory than there is: damaged, or made to do harm") from error
    # A damaged pickle makes torch's reader raise whatever comes: UnpicklingError, EOFError, KeyError, struct.error, ...
    except Exception as error:
        text = str(error)
        refused = _CALL.search(text)
        if refused is not None or ("weights_only" in text and "TorchScript" in text):
            what = f"it would call {refused.group(1)}" if refused else "it is a TorchScript program"
            raise ValueError(
                f"{path} holds more than tensors: {what}. It was refused and nothing of it was run; ask for the weights as "
                "safetensors, or save them as a state_dict in the program that trusts the file"
            ) from None
        raise ValueError(
            f"{path} is damaged, cut short or no archive of torch ({size:,} bytes): "
            f"{type(error).__name__}: {_archive_fault(text)}. Nothing of it was used; take another copy"
        ) from None


def _check_archive(path: Path, size: int) -> None:
    """Refuse what a zip may do and torch's own archives never do."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it holds {size:,} bytes and its directory, at the end, cannot be read: {error}; it "
                         "was cut short or altered. Use another copy") from error  # fmt: skip
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    names = [entry.filename for entry in entries]
    if packed or len(set(names)) != len(names) or sum(entry.file_size for entry in entries) > size:
        raise ValueError(f"{path} is no archive that torch wrote: its parts are compressed, repeated or larger than the file")


def _state_dict_of(content: Any, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The names and tensors of an archive, and the key under which they lay."""
    section = None
    if isinstance(content, Mapping):
        held = [key for key in _SECTIONS if isinstance(content.get(key), Mapping)]
        if len(held) > 1:
            raise ValueError(
                f"{path} holds weights under several keys, {', '.join(held)}; save the one that is meant by itself: "
                f"torch.save(torch.load(path)[{held[0]!r}], new_path)"
            )
        if held:
            section = held[0]
            content = content[section]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} must hold names and tensors, got {_kind(content)}")
    wrong = [f"{name!r} is {_kind(value)}" for name, value in content.items() if not (isinstance(name, str) and _is_plain(value))]
    if wrong:
        raise ValueError(
            f"{path} must hold names and plain tensors only, but {'; '.join(wrong[:5])}"
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    return {name: value.detach() for name, value in content.items()}, section


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
    )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        form = "quantized" if value.is_quantized else "on the meta device" if value.is_meta else str(value.layout)
        return f"a {type(value).__name__} ({form})"
    return f"an empty {type(value).__name__}" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"


def _archive_fault(text: str) -> str:
    """What torch found, without its advice to read the file unsafely."""
    _, found, rest = text.partition("WeightsUnpickler error:")
    return _first_line(rest if found else text)


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200].rstrip(".") if lines else type(error).__name__


def _product(shape: tuple[int, ...]) -> int:
    number = 1
    for length in shape:
        number *= length
    return number


_DTYPE_NAMES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}
_SAFETENSORS_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, there) for name, there in _DTYPE_NAMES.items()}
