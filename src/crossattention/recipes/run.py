"""Runs: a trained model read back from its folder, to predict and to be scored.

What lives here: finding and checking the parts of a folder. What does not: writing it (`training`), what a run can do
(`recipe`), what a recipe's scores are (the recipe's own module).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crossattention.checkpoints.files import read_json
from crossattention.models.pretrained import bundled, load
from crossattention.recipes.listing import RECIPES
from crossattention.recipes.recipe import OnProgress, Run

__all__ = ["Run", "evaluate", "load_run"]

_PARTS = ("config.json", "model.safetensors", "task.json")


def load_run(folder: str | Path) -> Run:
    """Load the best model of a run.

    Args:
        folder: what `crossattention train` wrote (its `best` is taken), or a folder with config.json,
            model.safetensors and task.json itself; or the id of weights inside this package, as "g2p-small". A folder of
            that name comes first.

    Returns:
        The run, its model in evaluation mode on the CPU, in float32 whatever it is stored in; what it can do is in `recipe.Run`.

    Raises:
        FileNotFoundError: there is no such folder, or a part of it is missing.
        ValueError: the folder is no run, has no model yet, or a part of it is damaged; the part is named.
        ModuleNotFoundError: a library of the recipe's extra is missing.

    Cost: reads the weights once.
    """
    path = _find_model(Path(folder))
    description = _read_description(path)
    recipe = RECIPES[description["recipe"]].load()
    model = load(path, dtype=torch.float32)  # half precision is how weights are stored, not how they are run
    try:
        return recipe.open_run(path, description, model.eval(), _read_step(path))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / 'task.json'} is damaged or of another version: {error!r}; train again") from error


def evaluate(run: Run, *, beams: int | None = None, on_progress: OnProgress | None = None) -> dict[str, float]:
    """Score a run on its whole test part, which training never saw.

    Args:
        run: what `load_run` gave.
        beams: width of the beam search, for a run that has one; 1, which is greedy, where it is not given.
        on_progress: called now and then with the number of examples that are predicted, and that of all.

    Returns:
        What the recipe scores: see its `Run.evaluate`.

    Raises:
        FileNotFoundError: a data file of the run is missing.
        ValueError: the data is not what the run was trained on, or the run has no beam search.
    """
    check_beams(run, beams)
    search: dict[str, Any] = {} if beams is None else {"beams": beams}
    return run.evaluate(on_progress=on_progress, **search)


def check_beams(run: Run, beams: int | None) -> None:
    """Check that a run that is given a number of beams has a beam search.

    Raises:
        ValueError: it has none.
    """
    if beams is not None and not run.has_beams:
        raise ValueError(f"a run of {run.recipe} has no beam search, got beams={beams}; leave out --beams")


def _find_model(folder: Path) -> Path:
    """The folder that holds the weights of a run's folder, complete."""
    if not folder.exists() and str(folder) in bundled():
        return bundled()[str(folder)]
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise FileNotFoundError(
            f"expected the folder of a run at {folder}, found {found}; `crossattention train g2p --out {folder}` makes one, "
            f"and inside this package there are: {', '.join(bundled()) or 'none'}"
        )
    path = folder / "best" if (folder / "best").is_dir() else folder
    present = [name for name in _PARTS if (path / name).is_file()]
    if "task.json" not in present and path == folder:
        if (folder / "checkpoints").is_dir():
            raise ValueError(f"the run in {folder} has no model yet: its first evaluation writes one; go on with --resume")
        held = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{folder} is no run: expected {', '.join(_PARTS)} in it or in its folder best, found {held}; "
            "`crossattention train` writes runs"
        )
    missing = [name for name in _PARTS if name not in present]
    if missing:
        raise FileNotFoundError(f"the run in {path} is not complete: {', '.join(missing)} missing; copy it whole")
    return path


def _read_description(path: Path) -> Mapping[str, Any]:
    description = read_json(path / "task.json")
    if not isinstance(description, dict) or description.get("recipe") not in RECIPES:
        named = description.get("recipe") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"expected a recipe among {', '.join(RECIPES)} in {path / 'task.json'}, got {named!r}")
    return description


def _read_step(path: Path) -> int | None:
    scores = path / "scores.json"
    found = read_json(scores).get("step") if scores.is_file() else None
    return found if isinstance(found, int) else None
