"""A run's state on the disk: one folder a checkpoint, complete or absent, checked before anything is used.

    step-000123/
        model.safetensors       the weights
        optimizer.safetensors   the optimizers' tensors, under the parameters' names
        state.json              step, progress, random states; length and SHA-256 of the other files, and of itself

What stands in `facts` is the loop's affair; further tensor files (an average of the weights, say) need no change here.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from crossattention.checkpoints.files import (
    new_folder,
    read_json,
    read_safetensors,
    sha256_of,
    write_json,
    write_safetensors,
)

FORMAT = 1


@dataclass(frozen=True)
class State:
    """Everything that a run needs to go on as if it had never stopped.

    Attributes:
        step: steps taken.
        tensors: file name without its ending -> name -> tensor; "model" and "optimizer" in every run.
        facts: plain data, fit for JSON.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]


def save_state(folder: str | Path, state: State) -> None:
    """Write a state as the folder `folder`, which appears complete or not at all (an old one is replaced).

    Raises:
        OSError: it could not be written; nothing of it is left, and an old folder stands untouched.

    Cost: the bytes of the weights and the optimizer's state, each written, flushed and read once (from the cache).
    """
    with new_folder(folder) as beside:
        files = {}
        for stem, tensors in state.tensors.items():
            path = beside / f"{stem}.safetensors"
            write_safetensors(path, tensors)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        content = {"format": FORMAT, "step": state.step, "files": files, "facts": dict(state.facts)}
        write_json(beside / "state.json", {**content, "sha256": _digest(content)})


def load_state(folder: str | Path) -> State:
    """Read a state that `save_state` wrote; everything is checked before anything is returned.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file is missing, cut short or altered, or another format's; the message names it and what is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    content = _read_content(folder / "state.json")
    tensors = {}
    for name, promised in content["files"].items():
        path = folder / name
        _check_file(path, promised)
        tensors[path.stem] = read_safetensors(path, verify=False)  # the whole file's digest has just been compared
    return State(content["step"], tensors, content["facts"])


def _read_content(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} is missing: its folder is no checkpoint, or a damaged one")
    content = read_json(path)
    if not isinstance(content, dict) or "sha256" not in content or "format" not in content:
        raise ValueError(f"{path} is damaged or not written by crossattention: it has no digest of itself")
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has format {content['format']!r}, this version reads format {FORMAT}")
    if content.pop("sha256") != _digest(content):
        raise ValueError(f"{path} is damaged: its content does not have its SHA-256 digest; it was altered")
    return content


def _check_file(path: Path, promised: Mapping[str, Any]) -> None:
    if not path.exists():
        raise ValueError(f"{path} is missing, but state.json lists it")
    size = path.stat().st_size
    if size != promised["bytes"]:
        fault = "it was cut short" if size < promised["bytes"] else "something was added to it"
        raise ValueError(f"{path} is damaged: it holds {size:,} bytes, not {promised['bytes']:,}; {fault}")
    if sha256_of(path) != promised["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 digest is not the one in state.json; it was altered")


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
