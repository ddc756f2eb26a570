"""What a run begins with beside random weights: those of another model, and which of them stay as they are.

What lives here: loading strictly into the model that a task built, saying why weights do not fit, freezing by name. What does
not: reading files (`checkpoints`), the loop.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crossattention.checkpoints.files import read_json, sha256_of
from crossattention.checkpoints.weights import Weights, find_weights
from crossattention.models.pretrained import find_source, load

_REMEDY = "train on data with exactly the symbols of the first training, or without --init"
_FREE_SETTINGS = ("max_length",)  # of a model: where it changes a shape, the shapes say so


def initialise(model: nn.Module, source: str, description: Mapping[str, Any]) -> dict[str, Any]:
    """Give a model the weights of another one of the same class and settings: every name, every shape.

    Args:
        model: what the task built; its dtype and device stay.
        source: whatever `load` takes: a run, a model folder, a folder or file of another library, a hub id.
        description: the task's. Where the source has a task.json, as the runs of this project, their tokenizers must be equal.

    What a model names as made for its data (`made_for_data`, as the heads of an image classifier for its classes) keeps its random
    weights where the source was made for other data.

    Returns:
        What to keep of it, fit for JSON: source, path, model, sha256 of each file of weights; and `new`, where some of the model
        begins anew: part -> why.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: another class, settings, vocabulary or shapes; all that differ are listed, with what to do.
    """
    place = find_source(source)
    loaded = load(place)
    if type(loaded) is not type(model):
        raise ValueError(
            f"{source} holds a {type(loaded).__name__}, but a {type(model).__name__} is to be trained; name one of those"
        )
    new = _made_for_other_data(model, loaded, place, description, source)
    differences = _settings_that_differ(model, loaded, source) + _vocabularies_that_differ(place, description, source)
    if differences:
        raise ValueError(f"the weights of {source} do not fit the model that is to be trained:\n  " + "\n  ".join(differences))
    with torch.no_grad():
        ours, theirs = (
            {name: tensor for name, tensor in one.state_dict(keep_vars=True).items() if name.split(".")[0] not in new}
            for one in (model, loaded)
        )
        faults = [f"missing: {name}" for name in ours if name not in theirs]
        faults += [f"unexpected: {name}" for name in theirs if name not in ours]
        faults += [
            f"misshapen: {name} is {tuple(theirs[name].shape)}, the model's is {tuple(ours[name].shape)}"
            for name in ours
            if name in theirs and theirs[name].shape != ours[name].shape
        ]
        if faults:
            raise ValueError(f"the weights of {source} do not fit the model that is to be trained:\n  " + "\n  ".join(faults))
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])
    found = {"source": source, "path": str(place.resolve()), "model": type(model).__name__, "sha256": digests(place)}
    return {**found, "new": new} if new else found


def digests(place: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights of a folder, or of a file."""
    file = find_weights(place) if place.is_dir() else place
    assert file is not None, "it was loaded from there"
    with Weights(file) as weights:
        return {path.name: sha256_of(path) for path in weights.files}


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Keep parameters as they are: no gradient, so no optimizer state and no weight decay.

    Args:
        model: its parameters get `requires_grad=False`.
        patterns: names with shell wildcards, "encoder.*" or "*.norm.*"; a part's own name, "encoder", is all below it.

    Returns:
        The names of what is frozen.

    Raises:
        ValueError: a pattern that no parameter matches, with near names; or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen: dict[str, None] = {}
    faults = []
    for pattern in patterns:
        found = [name for name in named if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not found:
            parts = [".".join(name.split(".")[:depth]) for name in named for depth in range(1, name.count(".") + 2)]
            near = difflib.get_close_matches(pattern.rstrip(".*"), dict.fromkeys(parts), n=3, cutoff=0.4)
            hint = (
                f"near ones are {', '.join(near)}"
                if near
                else f"there are {', '.join(dict.fromkeys(name.split('.')[0] for name in named))}"
            )
            faults.append(f"{pattern!r}: {hint}")
        frozen.update(dict.fromkeys(found))
    if faults:
        raise ValueError("no parameter is called as these patterns of freeze say:\n  " + "\n  ".join(faults))
    for name in frozen:
        named[name].requires_grad_(False)
    if frozen and not any(parameter.requires_grad for parameter in named.values()):
        raise ValueError(f"freeze={' '.join(patterns)} leaves nothing to train: all {len(frozen)} parameters match; leave some out")
    return list(frozen)


def _made_for_other_data(
    model: nn.Module, loaded: nn.Module, place: Path, description: Mapping[str, Any], source: str
) -> dict[str, str]:
    """Parts of the model that its source was not made for -> why."""
    told = (place if place.is_dir() else place.parent) / "task.json"
    before = read_json(told) if told.is_file() else {}
    new = {}
    for setting, part in getattr(model, "made_for_data", {}).items():
        here, there = getattr(model.config, setting), getattr(loaded.config, setting)
        if here != there:
            new[part] = f"{setting} is {there!r} in {source}, {here!r} here"
        elif setting in before and setting in description and before[setting] != description[setting]:
            new[part] = f"{setting} are others in {source}"
    return new


def _settings_that_differ(model: nn.Module, loaded: nn.Module, source: str) -> list[str]:
    ours, theirs = getattr(model, "config", None), getattr(loaded, "config", None)
    if not (dataclasses.is_dataclass(ours) and dataclasses.is_dataclass(theirs)):
        return []
    found = []
    for field in dataclasses.fields(ours):
        here, there = getattr(ours, field.name), getattr(theirs, field.name)
        if here == there or "drop" in field.name or field.name in (*_FREE_SETTINGS, *getattr(model, "made_for_data", ())):
            continue
        if "vocab_size" in field.name:
            found.append(
                f"{field.name} is {there} in {source}, {here} here: a row of the embedding belongs to one symbol, and the "
                f"vocabulary is made of the training data; {_REMEDY}"
            )
        else:
            found.append(f"{field.name} is {there!r} in {source}, {here!r} here: give the model the same setting")
    return found


def _vocabularies_that_differ(place: Path, description: Mapping[str, Any], source: str) -> list[str]:
    """Tokenizers of the source's own task.json that are not the task's: equal sizes would hide it."""
    folder = place if place.is_dir() else place.parent
    if not (folder / "task.json").is_file():
        return []
    before = read_json(folder / "task.json")
    found = []
    for name in description:
        if not name.endswith("tokenizer") or name not in before or before[name] == description[name]:
            continue
        was, now = _symbols(before[name]), _symbols(description[name])
        lacking, new = sorted(was - now), sorted(now - was)
        detail = "".join(
            f"; {what}: {' '.join(map(repr, some[:10]))}" + (" ..." if len(some) > 10 else "")
            for what, some in ((f"only in {source}", lacking), ("only here", new))
            if some
        )
        detail = detail or " (the same symbols in another order, or of another kind)"
        found.append(f"{name} is another than in {source}{detail}: the embeddings would stand for other symbols; {_REMEDY}")
    return found


def _symbols(tokenizer: Any) -> set[str]:
    held = tokenizer.get("symbols") if isinstance(tokenizer, Mapping) else None
    return {str(symbol) for symbol in held} if isinstance(held, list | str) else set()
