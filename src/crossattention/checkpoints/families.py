"""Which family an outside checkpoint is of: opened, recognised, turned into a model of ours, and the way back.

A family file stands beside this one and is called `<file in models>_<library or format>.py`; it is found by that name, so that a
new one needs no entry anywhere. It offers

    recognises(config, names) -> bool    is it this family's? config: their config.json ({} where there is none); names: of tensors
    config_to_ours(config) -> ours       ValueError with every reason where the model cannot be ours
    config_to_theirs(ours) -> dict       ValueError with every reason where ours cannot be theirs
    rules(ours) -> Rules                 which tensor is which

and may offer

    LIBRARY = "huggingface"              where the end of the file's name is none of LIBRARIES
    config_from_shapes(shapes) -> dict   their config, told from the names and shapes of a bare file; ValueError with the reason
    model_class(config, names, asked)    our class, where several of the file in models/ have one class of config; asked: the class
                                         whose `from_pretrained` was called, or None. It may take of a model what fits that class

The last three of the first list may have keywords `model_class` and, where they read theirs, `names`; they are given if they do.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import crossattention.checkpoints as room
from crossattention.checkpoints.files import read_json
from crossattention.checkpoints.rules import Fit, Rules, fit, to_theirs
from crossattention.checkpoints.weights import ENDINGS, FOLDER_FILES, Weights, find_weights
from crossattention.models import pretrained

LIBRARIES = ("huggingface", "timm", "torch")

OnProgress = Callable[[int, int], None]
"""Called with the number of bytes that are done, and that of all."""


@dataclass(frozen=True)
class Family:
    """One family file.

    Args:
        name: of the file, as in "transformer_marian".
        module: the file itself.
    """

    name: str
    module: ModuleType

    @property
    def library(self) -> str:
        """Whose names and config these are."""
        return getattr(self.module, "LIBRARY", self.name.rpartition("_")[2])

    @property
    def what(self) -> str:
        """The first sentence of what the file says of itself."""
        return (self.module.__doc__ or "").strip().partition("\n\n")[0].replace("\n", " ").rstrip(".")

    def is_of(self, model: type) -> bool:
        """Whether a class of ours is one that this family turns into and from."""
        return model.__module__ == f"crossattention.models.{self.name.rpartition('_')[0]}"

    def ask(self, name: str, config: Any, **known: Any) -> Any:
        """Call a function of the file with a config, and with those of `known` that it takes."""
        function = getattr(self.module, name)
        taken = inspect.signature(function).parameters
        return function(config, **{key: value for key, value in known.items() if key in taken})

    def model_class(self, config: Any) -> type:
        """The only class of ours with this class of config."""
        module = f"crossattention.models.{self.name.rpartition('_')[0]}"
        names = [name for place, name in pretrained.FAMILIES.values() if place == module]
        classes = [getattr(importlib.import_module(module), name) for name in names]
        fitting = [cls for cls in classes if cls.config_class is type(config)]
        if len(fitting) != 1:
            raise TypeError(f"{self.name} must offer model_class: {len(fitting)} models have a {type(config).__name__}")
        return fitting[0]


@cache
def families() -> tuple[Family, ...]:
    """All family files, by name."""
    names = sorted(found.name for found in pkgutil.iter_modules(room.__path__) if "_" in found.name)
    return tuple(Family(name, importlib.import_module(f"{room.__name__}.{name}")) for name in names)


def known() -> str:
    """A line for each family, for messages."""
    return "\n  ".join(f"{family.name}: {family.what}" for family in families())


@dataclass(frozen=True)
class Checkpoint:
    """An outside checkpoint whose family and config are known; nothing of its weights is read yet.

    Args:
        path: the folder or file.
        weights: its tensors.
        family: its family.
        theirs: their config.
        ours: our config.
        model_class: our class.
    """

    path: Path
    weights: Weights
    family: Family
    theirs: Mapping[str, Any]
    ours: Any
    model_class: Any

    @property
    def rules(self) -> Rules:
        """Which tensor is which."""
        return self.family.ask("rules", self.ours, model_class=self.model_class)

    def fit(self) -> Fit:
        """Compare all names and shapes with our model's, without reading a tensor or making the model.

        Raises:
            ValueError: one message with every missing, unexpected and misshapen name; sizes that no tensor can have.
        """
        try:
            with torch.device("meta"):
                wanted = self.model_class(self.ours).state_dict()
        except NotImplementedError:  # a model that computes numbers while it is built, as rates of its layers
            wanted = self.model_class(self.ours).state_dict()
        except (RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{self.path}: no model has the sizes that its {pretrained.CONFIG_FILE} says: {str(error).splitlines()[0]}"
            ) from error
        return fit(self.weights, self.rules, wanted, source=self.weights.path)

    def build(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        on_progress: OnProgress | None = None,
    ) -> tuple[nn.Module, Fit]:
        """Our model with these weights, ready to evaluate, and what went where.

        Args:
            device: where the weights go; default the CPU.
            dtype: dtype of the weights; default as stored.
            on_progress: called after each tensor.

        Cost: memory of the model in float32, or in the asked dtype if that is larger, and of one tensor; the file is mapped.
        """
        found = self.fit()  # before any memory is taken
        model = self.model_class(self.ours)
        fill(model, found.tensors(), dtype=dtype, on_progress=on_progress)
        return model.to(device=device).eval(), found


def fill(
    model: nn.Module,
    tensors: Any,
    *,
    dtype: torch.dtype | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Copy tensors into a model one by one, each in the dtype it comes in; `tensors` are pairs that hold every name once."""
    places = model.state_dict(keep_vars=True)
    total = sum(place.numel() for place in places.values())
    left, done = dict(places), 0
    for name, tensor in tensors:
        place = left.pop(name)
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if place.dtype != wanted:
            place.data = torch.empty_like(place.data, dtype=wanted)
        with torch.no_grad():
            place.copy_(tensor)
        done += place.numel()
        if on_progress is not None:
            on_progress(done, total)
    assert not left, f"the rules gave no {', '.join(left)}"


def open_checkpoint(path: str | Path, asked: type | None = None) -> Checkpoint:
    """Open an outside checkpoint and find its family.

    Args:
        path: a folder with `config.json` and weights (one file, or several with an index), or a file of weights; a file's config is
            the `config.json` beside it, and where there is none it is told from the names and shapes.
        asked: the class of ours that it shall be, where the family leaves a choice.

    Raises:
        FileNotFoundError: there is nothing of that name, or no weights in the folder.
        ValueError: a damaged or refused file; a family that is not known, with those that are; a model that cannot be ours, with
            every reason.
    """
    path = Path(path)
    file = find_weights(path) if path.is_dir() else path
    if file is None:
        raise FileNotFoundError(f"{path} holds no weights: expected {', '.join(FOLDER_FILES)}, or one file of another name")
    config_file = file.parent / pretrained.CONFIG_FILE
    config = read_json(config_file) if config_file.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} is no config of a model: expected an object, got a {type(config).__name__}")
    weights = Weights(file)
    try:
        family = _recognised(config, weights.shapes, path)
        theirs = config or _config_told(family, weights, path)
        given: dict[str, Any] = {"names": weights.shapes.keys()}
        has_choice = hasattr(family.module, "model_class")
        try:
            if has_choice:
                given["model_class"] = family.module.model_class(theirs, weights.shapes.keys(), asked)
            ours = family.ask("config_to_ours", theirs, **given)
        # A field of another kind than theirs ever is makes the readers of it raise any of these.
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"{config_file} does not describe a model of {family.name}: {type(error).__name__}: {error}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    except BaseException:
        weights.close()
        raise
    return Checkpoint(path, weights, family, theirs, ours, given["model_class"] if has_choice else family.model_class(ours))


def is_weights_file(path: Path) -> bool:
    """Whether a path is called like a file of weights or an index of such."""
    return path.name.endswith((*ENDINGS, ".index.json"))


def families_for(model: nn.Module, library: str | None = None) -> list[Family]:
    """The families that a model of ours can be written as, of one library or of all."""
    return [family for family in families() if family.is_of(type(model)) and library in (None, family.library)]


def written(model: nn.Module, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Their config and tensors of a model of ours.

    Raises:
        ValueError: theirs cannot be this model, with every reason.
    """
    theirs = family.ask("config_to_theirs", model.config, model_class=type(model))
    rules = family.ask("rules", model.config, model_class=type(model))
    tensors = to_theirs(model.state_dict(), rules, source="the model")
    return theirs, tensors


def _recognised(config: Mapping[str, Any], shapes: Collection[str], path: Path) -> Family:
    found = [family for family in families() if family.module.recognises(config, shapes)]
    if len(found) == 1:
        return found[0]
    told = {name: config[name] for name in ("model_type", "architectures", "architecture") if name in config}
    said = (
        ", ".join(f"{name} {value!r}" for name, value in told.items())
        or f"{len(shapes)} names such as {', '.join(list(shapes)[:3])}"
    )
    if found:
        raise ValueError(
            f"{path} ({said}) is of several families: {', '.join(family.name for family in found)}; give its config.json"
        )
    without = "" if config else f" and no {pretrained.CONFIG_FILE} beside it"
    raise ValueError(f"{path} ({said}{without}) is of no known family. Known are:\n  {known()}")


def _config_told(family: Family, weights: Weights, path: Path) -> Mapping[str, Any]:
    if not hasattr(family.module, "config_from_shapes"):
        raise ValueError(f"{path} looks like {family.name}, but has no {pretrained.CONFIG_FILE} beside it; put the model's there")
    return family.module.config_from_shapes(weights.shapes)
