"""Saving a model as a folder, and loading one: from a folder, from this package, or from the Hugging Face Hub.

A model folder holds `config.json` (the family, the format's version, the fields of the model's config) and `model.safetensors`
(its weights). Nothing in it is executed. Reading and writing of the files themselves is done by `checkpoints.files`.
"""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT_VERSION = 1
"""Version of the folder's layout; a folder of a later version is refused."""

FAMILIES: dict[str, tuple[str, str]] = {
    "perceiver": ("crossattention.models.perceiver", "PerceiverIO"),
    "transformer": ("crossattention.models.transformer", "Transformer"),
}
"""Name in `config.json` -> module and class of each model family."""

_BUNDLED = Path(__file__).parents[1] / "recipes" / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Pretrained:
    """Mixin of models that are built from one config: `save_pretrained` and `from_pretrained`.

    A family names itself (`family`) and its config's class (`config_class`, a dataclass of plain values), takes the config as
    its constructor's only required argument and keeps it as `config`.
    """

    family: ClassVar[str]
    config_class: ClassVar[type]
    config: Any

    def save_pretrained(self: Any, folder: str | Path) -> Path:
        """Write the model as a folder that `from_pretrained` and `load` read.

        A new folder appears complete or not at all. In a folder that exists, other files are left alone; its weights are replaced
        in one step, and if the config differs, a kill between the two files leaves a folder without a model, never a mixture.

        Args:
            folder: the folder; folders above it are made.

        Returns:
            The folder.

        Raises:
            NotADirectoryError: there is a file of that name.
            OSError: the folder cannot be written.
        """
        from crossattention.checkpoints.files import new_folder, write_json, write_safetensors

        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; a model is saved as a folder, so give another name")
        config = {"family": self.family, "format_version": FORMAT_VERSION, "config": asdict(self.config)}
        weights = self.state_dict()
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with new_folder(folder) as beside:
                write_json(beside / CONFIG_FILE, config)
                write_safetensors(beside / WEIGHTS_FILE, weights)
            return folder
        staged = folder / f".{WEIGHTS_FILE}.new"
        try:
            write_safetensors(staged, weights)
            if not _holds_config(folder, config):
                (folder / CONFIG_FILE).unlink(missing_ok=True)
            os.replace(staged, folder / WEIGHTS_FILE)
        finally:
            staged.unlink(missing_ok=True)
        write_json(folder / CONFIG_FILE, config)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a model of this family, ready to evaluate (dropout off; `train()` turns it on).

        Args:
            name: a folder that `save_pretrained` wrote; or the id of weights inside this package ("g2p-small"), or of such a folder
                on the Hugging Face Hub ("owner/name"). A folder of that name comes first.
            revision: branch, tag or commit on the Hub.
            device: where the weights go; default the CPU.
            dtype: dtype of the weights; default as stored.

        Returns:
            The model.

        Raises:
            FileNotFoundError: no such folder, or one without a model.
            ValueError: another family, a later format, a config or weights that do not fit (every name is listed), a damaged file,
                a `revision` given with a folder.
        """
        folder = find_folder(name, revision)
        family, config = read_config(folder)
        if family != cls.family:
            raise ValueError(f'{folder} holds a model of the family "{family}", not "{cls.family}"; load("{name}") finds the class')
        return _build(cls, folder, config, device, dtype)


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a model of whatever family its folder names, ready to evaluate.

    Args:
        name: a folder that `save_pretrained` wrote, or the id of one inside this package ("g2p-small") or on the Hugging Face Hub.
        revision: branch, tag or commit on the Hub.
        device: where the weights go; default the CPU.
        dtype: dtype of the weights; default as stored.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such folder, or one without a model.
        ValueError: an unknown family, and all that `from_pretrained` refuses.
    """
    folder = find_folder(name, revision)
    family, config = read_config(folder)
    if family not in FAMILIES:
        raise ValueError(f'{folder} holds a model of the family "{family}"; known are {", ".join(sorted(FAMILIES))}')
    module, class_name = FAMILIES[family]
    return _build(getattr(importlib.import_module(module), class_name), folder, config, device, dtype)


def bundled() -> dict[str, Path]:
    """The weights inside this package: id -> folder."""
    return {path.parent.name: path.parent for path in sorted(_BUNDLED.glob(f"*/{WEIGHTS_FILE}"))}


def find_folder(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: the one named, the one inside this package, or what the Hub has under that id, downloaded once.

    Raises:
        FileNotFoundError: neither a folder nor an id, or an id that the Hub does not have.
        ValueError: a `revision` with a local folder or with weights inside this package.
    """
    folder = Path(name)
    inside = None if folder.exists() else bundled().get(str(name))
    if folder.is_dir() or inside is not None:
        if revision is not None:
            what = "a local folder" if inside is None else "inside this package"
            raise ValueError(f'{folder} is {what} and has no revisions, got revision="{revision}"; leave it out')
        return inside or folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file; name the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    if isinstance(name, Path) or not _HUB_ID.fullmatch(name):
        held = ", ".join(bundled()) or "none"
        raise FileNotFoundError(
            f"there is no folder {folder}, and it is no id of weights inside this package ({held}) or on the Hugging Face Hub "
            "(owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f'there is no folder {folder}, and the Hugging Face Hub gave nothing under the id "{name}": {error}'
        ) from error


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The family and the config's fields that a model folder names.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: `config.json` is none of this project's, or of a later format.
    """
    from crossattention.checkpoints.files import read_json

    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no model: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; "
            "name a folder that save_pretrained wrote, or the best/ folder of a training run"
        )
    content = read_json(folder / CONFIG_FILE)
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict) or "family" not in content:
        raise ValueError(
            f"{folder / CONFIG_FILE} is not the config of a model of this project: it must hold family, format_version and config"
        )
    version = content.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format_version {version!r}, this version of crossattention reads up to {FORMAT_VERSION}; "
            "upgrade crossattention"
        )
    return str(content["family"]), content["config"]


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Give a model its weights, in the dtype they are stored in: every name, no other, every shape.

    Raises:
        ValueError: one message with all missing, unexpected and misshapen names.
    """
    wanted = model.state_dict()
    faults = [f"missing: {name}" for name in wanted if name not in weights]
    faults += [f"unexpected: {name}" for name in weights if name not in wanted]
    faults += [
        f"misshapen: {name} is {tuple(weights[name].shape)}, the model's is {tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    if faults:
        raise ValueError(f"the weights in {source} do not fit the model:\n  " + "\n  ".join(faults))
    # Copied into the model's own memory: what was read may lie unaligned in a mapped file, and tied weights stay tied.
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(weights)


def _build(cls: Any, folder: Path, config: dict[str, Any], device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    from crossattention.checkpoints.files import read_safetensors

    known = {field.name for field in fields(cls.config_class)}
    if unknown := sorted(set(config) - known):
        raise ValueError(f"{folder / CONFIG_FILE} has fields that {cls.config_class.__name__} does not know: {', '.join(unknown)}")
    try:
        built = cls.config_class(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not describe a {cls.__name__}: {error}") from error
    model = cls(built)
    load_weights(model, read_safetensors(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    return model.to(device=device, dtype=dtype).eval()


def _holds_config(folder: Path, config: dict[str, Any]) -> bool:
    from crossattention.checkpoints.files import read_json

    try:
        return bool(read_json(folder / CONFIG_FILE) == config)
    except (FileNotFoundError, ValueError):
        return False
