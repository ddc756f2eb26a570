"""Turning a model folder of one library into one of another, whole or not at all.

What lives here: the way from a source to a written folder, and the account of it. What does not: names (the families), files
(`files`, `weights`), printing (`cli`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.checkpoints.families import (
    LIBRARIES,
    Checkpoint,
    Family,
    OnProgress,
    families_for,
    known,
    open_checkpoint,
    written,
)
from crossattention.checkpoints.files import new_folder, sha256_of, write_json, write_safetensors
from crossattention.checkpoints.rules import Fit
from crossattention.checkpoints.weights import ENDINGS
from crossattention.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, find_source, is_own, load

OURS = "crossattention"
FORMATS = (OURS, *LIBRARIES)


@dataclass(frozen=True)
class Conversion:
    """The account of a conversion.

    Attributes:
        source: what was read.
        target: the folder that was written.
        source_format: "crossattention", or the library.
        target_format: likewise.
        family: the family file whose names were followed.
        model: our class.
        names: (names of the one side, names of the other) for each step, source first.
        ignored: name in the source that is not used -> why.
        filled: name of ours that the source does not have -> why, and what it is then.
        tied: name in the source -> the name of what is the same tensor.
        dtypes: dtype -> number of tensors that are stored in it.
        parameters: numbers in the model.
        num_bytes: size of the written weights file.
        sha256: its digest.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    family: str
    model: str
    names: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    ignored: Mapping[str, str]
    filled: Mapping[str, str]
    tied: Mapping[str, str]
    dtypes: Mapping[str, int]
    parameters: int
    num_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Every field, as JSON holds it."""
        return asdict(self)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Read a model of any known library, or of this project, and write it as a folder of another.

    Args:
        source: a folder, a file of weights, the id of weights inside this package, or a hub id.
        target: the folder to write; it appears complete or not at all.
        to: "crossattention", "huggingface", "timm" or "torch"; default "crossattention" for a source of another library, and
            for one of this project the only library that it can be written for.
        revision: branch, tag or commit on the Hub.
        dtype: dtype of the written weights; default as stored.
        overwrite: replace a model folder that is at `target`.
        on_progress: called with the numbers that are copied, and with all of them.

    Returns:
        The account.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: `target` exists, `to` is no format that the model can have, and all that `load` refuses.
        OSError: `target` cannot be written; nothing is left there.

    Cost: the model once in memory, and the source's file mapped.
    """
    target = Path(target)
    names: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    if to is not None and to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    place = find_source(source, revision)
    _check_target(target, place, overwrite)
    if is_own(place) or (place.is_file() and is_own(place.parent)):
        model: Any = load(source, revision=revision, dtype=dtype)
        opened, found = None, None
    else:
        opened = open_checkpoint(place)
        with opened.weights:
            model, found = opened.build(dtype=dtype, on_progress=on_progress)
    to = to or (OURS if opened is not None else _only_library(model))
    if to == OURS and opened is None:
        raise ValueError(
            f"{place} is a model folder of crossattention already; name a library to write it for: {', '.join(LIBRARIES)}"
        )
    family = None if to == OURS else _family(model, to, opened)
    if family is None:
        assert opened is not None, "checked above"
        family, theirs, tensors = opened.family, None, {}
    else:
        theirs, tensors = written(model, family)
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as beside:
        if theirs is None:
            model.save_pretrained(beside)
            tensors = model.state_dict()
        else:
            write_json(beside / CONFIG_FILE, theirs)
            write_safetensors(beside / WEIGHTS_FILE, tensors)
            again = open_checkpoint(beside, type(model))
            with again.weights:
                names = _names(again.fit(), is_to_ours=False)  # what is written must be readable, strictly
        digest, size = sha256_of(beside / WEIGHTS_FILE), (beside / WEIGHTS_FILE).stat().st_size
    if theirs is None:
        assert found is not None, "read from another library"
        names = _names(found, is_to_ours=True)
    return Conversion(
        source=str(place),
        target=str(target),
        source_format=OURS if opened is None else opened.family.library,
        target_format=to,
        family=family.name,
        model=type(model).__name__,
        names=names,
        **_reasons(found if opened is not None else None),
        dtypes=_dtypes(tensors),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_bytes=size,
        sha256=digest,
    )


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Refuse to write over anything but, where told, a model folder."""
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"{target} exists already; name another folder, or say --overwrite (overwrite=True) to replace it")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{target} holds the source, {source}; name another folder")
    held = sorted(target.iterdir()) if target.is_dir() else None
    is_model = held is not None and all(path.is_file() for path in held) and any(path.name == CONFIG_FILE for path in held)
    if held is None or (held and not (is_model and any(path.name.endswith(ENDINGS) for path in held))):
        raise ValueError(f"{target} is no model folder ({CONFIG_FILE} and weights), so it is not replaced; delete it yourself")


def _only_library(model: nn.Module) -> str:
    libraries = sorted({family.library for family in families_for(model)})
    if len(libraries) != 1:
        raise ValueError(
            f"a {type(model).__name__} can be written for {', '.join(libraries) or 'no other library'}"
            + ("; say which (--to, to=)" if libraries else f". Known are:\n  {known()}")
        )
    return libraries[0]


def _family(model: nn.Module, library: str, opened: Checkpoint | None) -> Family:
    found = families_for(model, library)
    if opened is not None and opened.family in found:
        return opened.family
    if len(found) != 1:
        others = ", ".join(sorted({family.library for family in families_for(model)})) or "no other library"
        number = len(found) or "no"
        raise ValueError(
            f"a {type(model).__name__} cannot be written for {library}: {number} families are for that; it can be written for "
            f"{others}. Known are:\n  {known()}"
        )
    return found[0]


def _names(found: Fit, *, is_to_ours: bool) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    theirs = [tuple(found.names.get(name, name) for name in step.theirs) for step in found.steps]
    pairs = [(names, step.ours) for names, step in zip(theirs, found.steps, strict=True)]
    return tuple(pairs if is_to_ours else [(ours, names) for names, ours in pairs])


def _reasons(found: Fit | None) -> dict[str, dict[str, str]]:
    if found is None:
        return {"ignored": {}, "filled": {}, "tied": {}}
    absent = {name: rule.reason for name, rule in found.absent.items()}
    return {"ignored": dict(found.ignored), "filled": {**found.filled, **absent}, "tied": dict(found.tied)}


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()))
