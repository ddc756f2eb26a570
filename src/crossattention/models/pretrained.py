"""Saving a model as a folder, and loading one: from a folder, from this package, or from the Hugging Face Hub.

A model folder of this project holds `config.json` (the family, the format's version, the fields of the model's config) and
`model.safetensors` (its weights). Folders and files of other libraries are read too, through `checkpoints.families`. Nothing in
any of them is executed. Reading and writing of the files themselves is done by `checkpoints`.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from crossattention.attention.graphs import Graph

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT_VERSION = 1
"""Version of the folder's layout; a folder of a later version is refused."""

FAMILIES: dict[str, tuple[str, str]] = {
    "bert_decoder": ("crossattention.models.bert", "BertDecoder"),
    "bert_encoder": ("crossattention.models.bert", "BertEncoder"),
    "bert_masked_lm": ("crossattention.models.bert", "BertMaskedLM"),
    "crossvit": ("crossattention.models.crossvit", "CrossViT"),
    "encoder_decoder": ("crossattention.models.bert", "EncoderDecoder"),
    "listener": ("crossattention.models.listener", "Listener"),
    "perceiver": ("crossattention.models.perceiver", "PerceiverIO"),
    "picture_reader": ("crossattention.models.picture_reader", "PictureReader"),
    "retro": ("crossattention.models.retro", "Retro"),
    "transformer": ("crossattention.models.transformer", "Transformer"),
}
"""Name in `config.json` -> module and class of each model family."""

# What is fetched of a repository on the Hub: safetensors, and only where it has none, torch's archives.
HUB_PATTERNS = (
    (CONFIG_FILE, WEIGHTS_FILE, "model.safetensors.index.json", "model-*-of-*.safetensors"),
    (CONFIG_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)

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
    made_for_data: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Settings that follow from the data that is learnt, and the part of the model that is made for it: what is trained on other
    data begins with a new one (`training.initial`)."""

    def graphs(self: Any) -> dict[str, Graph]:
        """What of the model stands alone as a graph of plain tensors, for an exporter: name -> module, examples, names of axes.

        Returns:
            "forward" first; of models that generate also "encode", "prepare" and "step" (`models.graphs` says what they take).

        Raises:
            ValueError: a model of which none is known.

        Example:
            >>> from crossattention import load
            >>> list(load("g2p-small").graphs())
            ['forward', 'encode', 'prepare', 'step']
        """
        from crossattention.models.graphs import graphs_of

        return graphs_of(self)

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
            name: a folder that `save_pretrained` wrote; a folder or file of another library, such as Hugging Face's or timm's;
                or the id of weights inside this package ("g2p-small"), or on the Hugging Face Hub ("owner/name"). What exists
                under that name here comes first.
            revision: branch, tag or commit on the Hub.
            device: where the weights go; default the CPU.
            dtype: dtype of the weights; default as stored.

        Returns:
            The model.

        Raises:
            FileNotFoundError: nothing of that name, or no model in it.
            ValueError: another family, a later format, a config or weights that do not fit (every name is listed), a damaged
                file or one that would run something, a `revision` given with what is here already.
        """
        return _load(name, revision, device, dtype, cls)


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a model of whatever family its folder or file is, ready to evaluate.

    Args:
        name: a folder that `save_pretrained` wrote; a folder or file of another library (docs/checkpoints.md lists the
            families); or the id of weights inside this package ("g2p-small") or on the Hugging Face Hub.
        revision: branch, tag or commit on the Hub.
        device: where the weights go; default the CPU.
        dtype: dtype of the weights; default as stored.

    Returns:
        The model.

    Raises:
        FileNotFoundError: nothing of that name, or no model in it.
        ValueError: a family that is not known, with those that are; and all that `from_pretrained` refuses.
    """
    return _load(name, revision, device, dtype, None)


def bundled() -> dict[str, Path]:
    """The weights inside this package: id -> folder."""
    return {path.parent.name: path.parent for path in sorted(_BUNDLED.glob(f"*/{WEIGHTS_FILE}"))}


def find_source(name: str | Path, revision: str | None = None) -> Path:
    """Where a model lies here: the folder or file named (of a training run its best/), the one inside this package, or the Hub's.

    Raises:
        FileNotFoundError: neither here nor an id, or an id that the Hub does not have.
        ValueError: a `revision` with what is here already.
    """
    from crossattention.checkpoints.families import is_weights_file

    place = Path(name)
    inside = None if place.exists() else bundled().get(str(name))
    if place.exists() or inside is not None:
        if place.is_file() and not is_weights_file(place):
            raise FileNotFoundError(
                f"{place} is a file; name the folder that holds {CONFIG_FILE} and the weights, or a file of weights (.safetensors)"
            )
        if revision is not None:
            what = "inside this package" if inside is not None else "a local file" if place.is_file() else "a local folder"
            raise ValueError(f'{place} is {what} and has no revisions, got revision="{revision}"; leave it out')
        # The folder of a training run has its model in best/.
        return inside or (place / "best" if is_own(place / "best") and not (place / WEIGHTS_FILE).exists() else place)
    if isinstance(name, Path) or not _HUB_ID.fullmatch(name):
        held = ", ".join(bundled()) or "none"
        raise FileNotFoundError(
            f"there is no folder {place}, and it is no id of weights inside this package ({held}) or on the Hugging Face Hub "
            "(owner/name)"
        )
    return _fetched(name, revision)


def _fetched(name: str, revision: str | None) -> Path:
    """The folder of what the Hub has under an id, in the user's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from crossattention.checkpoints.weights import find_weights

    try:
        for patterns in HUB_PATTERNS:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
            if find_weights(folder) is not None:
                break
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f'there is no folder {name}, and the Hugging Face Hub gave nothing under the id "{name}": {error}'
        ) from error


def is_own(place: Path) -> bool:
    """Whether a folder is of this project: it holds a `config.json` that names a family."""
    from crossattention.checkpoints.files import read_json

    if not (place / CONFIG_FILE).is_file():
        return False
    content = read_json(place / CONFIG_FILE)
    return isinstance(content, dict) and "family" in content


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
            "name a folder that save_pretrained wrote, the best/ folder of a training run, a folder of another library, or a "
            "file of weights itself"
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


def _load(name: str | Path, revision: str | None, device: torch.device | str | None, dtype: torch.dtype | None, asked: Any) -> Any:
    """The model of a name, of the class `asked` or of any."""
    place = find_source(name, revision)
    if place.name == WEIGHTS_FILE and place.is_file() and is_own(place.parent):
        place = place.parent
    if is_own(place) or _holds_nothing(place):
        family, config = read_config(place)
        if asked is not None and family != asked.family:
            raise ValueError(
                f'{place} holds a model of the family "{family}", not "{asked.family}"; load("{name}") finds the class'
            )
        if family not in FAMILIES:
            raise ValueError(f'{place} holds a model of the family "{family}"; known are {", ".join(sorted(FAMILIES))}')
        module, class_name = FAMILIES[family]
        return _build(asked or getattr(importlib.import_module(module), class_name), place, config, device, dtype)

    from crossattention.checkpoints.families import open_checkpoint

    opened = open_checkpoint(place, asked)
    with opened.weights:
        if asked is not None and opened.model_class is not asked:
            raise ValueError(
                f"{place} holds a {opened.model_class.__name__} ({opened.family.name}), not a {asked.__name__}; "
                f'load("{name}") finds the class'
            )
        model, _ = opened.build(device=device, dtype=dtype)
    return model


def _holds_nothing(place: Path) -> bool:
    """Whether a folder lacks a config or weights of any kind, so that it is said to hold no model."""
    from crossattention.checkpoints.weights import find_weights

    return place.is_dir() and (not (place / CONFIG_FILE).is_file() or find_weights(place) is None)


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
