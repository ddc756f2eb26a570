"""A run's folder: what lies where, whether a run may begin or go on in it, which checkpoints are kept.

out/
config.json       the training settings and the task's description
metrics.jsonl     the journal (journal.py); tensorboard/ beside it where that is installed
checkpoints/      step-000123/ ... (state.py)
best/             the best model as `save_pretrained` writes it, task.json and scores.json; init.json where it began with the
                  weights of another model: which, and their SHA-256
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from crossattention.checkpoints.files import new_folder, read_json, restore_folder, write_json
from crossattention.training.config import FREE_ON_RESUME, TrainConfig
from crossattention.training.state import State, load_state, save_state

FORMAT = 1
_OWN_NAMES = ("config.json", "metrics.jsonl", "checkpoints", "best", "tensorboard")


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run and what is done with them; holds nothing itself."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The settings of the run."""
        return self.path / "config.json"

    @property
    def journal_file(self) -> Path:
        """The metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's own files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The best model so far."""
        return self.path / "best"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step, whether it exists or not."""
        return self.checkpoints / f"step-{step:06d}"

    def saved_steps(self) -> list[int]:
        """The steps of all checkpoints, oldest first. Unfinished ones have other names."""
        names = [path.name for path in self.checkpoints.glob("step-*") if path.is_dir()]
        return sorted(int(name[5:]) for name in names if name[5:].isdecimal())

    def check_new(self) -> None:
        """Say whether a run can begin here, before any time is spent on it.

        Raises:
            ValueError: the folder holds a run already.
            OSError: the folder cannot be made or written.
        """
        held = [name for name in _OWN_NAMES if (self.path / name).exists()]
        if held:
            raise ValueError(
                f"{self.path} already holds a run ({', '.join(held)}): resume it (--resume, resume=True), "
                "choose another folder, or delete this one"
            )
        self._check_writable()

    def check_resumable(self, config: TrainConfig, description: Mapping[str, Any]) -> None:
        """Say whether the run in this folder can go on with these settings, before any time is spent on it.

        Raises:
            ValueError: there is no run, or it was begun with other settings; every difference is listed.
            OSError: the folder cannot be written.
        """
        if not self.config_file.exists():
            raise ValueError(
                f"{self.path} holds no run to resume (no config.json in it): begin one without --resume (resume=False)"
            )
        self._check_writable()
        saved = self.read_config()
        now = _content(config, description)
        differences = [
            f"{section}.{name}: {_short(saved[section].get(name))} in the run, {_short(now[section].get(name))} now"
            for section in ("training", "task")
            for name in sorted({*saved[section], *now[section]} - (FREE_ON_RESUME if section == "training" else set()))
            if saved[section].get(name) != now[section].get(name)
        ]
        if differences:
            raise ValueError(
                f"the run in {self.path} was begun with other settings:\n  "
                + "\n  ".join(differences)
                + "\nresume with the same settings, or begin a new run in another folder"
            )

    def write_config(self, config: TrainConfig, description: Mapping[str, Any], init: Mapping[str, Any] | None = None) -> None:
        """Make the folder a run's: the settings first, so that a kill at any later moment can be resumed.

        Args:
            config: the training's settings.
            description: the task's.
            init: which weights the run begins with (initial.py); None for random ones.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config_file, {**_content(config, description), **({} if init is None else {"init": dict(init)})})
        self.checkpoints.mkdir(exist_ok=True)

    def read_config(self) -> dict[str, Any]:
        """What config.json holds: `training` and `task`.

        Raises:
            ValueError: damaged, or not written by this library.
        """
        content = read_json(self.config_file)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{self.config_file} is not the config.json of a run (expected format {FORMAT})")
        return content

    def restore(self) -> None:
        """Clear what a kill left unfinished."""
        self.checkpoints.mkdir(exist_ok=True)
        restore_folder(self.best)
        for aside in list(
            self.checkpoints.glob(".step-*.old")
        ):  # where names cannot be swapped, a checkpoint that was being replaced
            restore_folder(self.checkpoints / aside.name.removeprefix(".").removesuffix(".old"))
        for left in self.checkpoints.glob(".*.part"):
            shutil.rmtree(left)

    def load_newest(self) -> tuple[State, Path] | None:
        """The newest checkpoint, or None where the run was stopped before its first.

        Raises:
            ValueError: it is damaged: what is wrong with it, and which one before it is whole.
        """
        steps = self.saved_steps()
        if not steps:
            return None
        try:
            return self._load(steps[-1]), self.checkpoint(steps[-1])
        except ValueError as error:
            raise ValueError(f"{error}.\n{self._offer(steps)}") from error

    def save_checkpoint(self, state: State) -> Path:
        """Write a checkpoint.

        Raises:
            OSError: it could not be written; the message says which one a resumed run would go on from.
        """
        path = self.checkpoint(state.step)
        try:
            save_state(path, state)
        except OSError as error:
            raise self.explained(error, f"could not write the checkpoint {path}") from error
        return path

    def save_best(
        self, model: nn.Module, description: Mapping[str, Any], scores: Mapping[str, Any], init: Mapping[str, Any] | None = None
    ) -> None:
        """Replace the best model, in one step.

        Raises:
            OSError: it could not be written; the one before it stands untouched.
        """
        try:
            with new_folder(self.best) as beside:
                model.save_pretrained(beside)
                write_json(beside / "task.json", dict(description))
                write_json(beside / "scores.json", dict(scores))
                if init is not None:
                    write_json(beside / "init.json", dict(init))
        except OSError as error:
            raise self.explained(error, f"could not write the best model {self.best}") from error

    def prune(self, *, keep: int, best_step: int | None) -> None:
        """Delete all checkpoints but the newest `keep` and the best one."""
        for step in self.saved_steps()[:-keep]:
            if step != best_step:
                # Renamed first: a kill inside the deletion must not leave half a checkpoint under a good name.
                doomed = self.checkpoints / f".step-{step:06d}.part"
                os.rename(self.checkpoint(step), doomed)
                shutil.rmtree(doomed)

    def explained(self, error: OSError, what: str) -> OSError:
        """The same error, saying what could not be done and where a resumed run would go on from."""
        steps = self.saved_steps()
        rest = (
            f"{self.checkpoint(steps[-1])} is complete: when this is mended, --resume goes on from there"
            if steps
            else "no checkpoint was written before it"
        )
        return OSError(error.errno, f"{what}: {error.strerror or error}; {rest}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one process; the system lets go of it when the process ends, however it ends.

        Raises:
            ValueError: another process trains in it.
        """
        try:
            import fcntl
        except ImportError:  # no such locks on this system: two runs in one folder are then the user's to avoid
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"another process is training in {self.path}: wait for it, stop it, or choose another folder"
                ) from error
            yield

    def _load(self, step: int) -> State:
        """The checkpoint of a step; a ValueError where it is damaged or of another step."""
        state = load_state(self.checkpoint(step))
        if state.step != step:
            raise ValueError(f"{self.checkpoint(step)} holds the state of step {state.step}: its folder was renamed or copied")
        return state

    def _check_writable(self) -> None:
        probe = self.path / ".probe"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"1")
            probe.unlink()
        except OSError as error:
            reason = f"cannot write to {self.path}: {error.strerror}; choose a folder that you may write to"
            raise OSError(error.errno, reason) from error

    def _offer(self, steps: list[int]) -> str:
        """What to do when the newest of `steps` is damaged: name the newest whole one, and what stands in its way."""
        damaged = [self.checkpoint(steps[-1])]
        for step in reversed(steps[:-1]):
            whole = self.checkpoint(step)
            try:
                self._load(step)
            except ValueError:
                damaged.append(whole)
                continue
            names = " and ".join(str(path) for path in damaged)
            return f"The one before it, {whole.name}, is whole: delete {names}, then resume again to go on from there"
        return f"There is no whole checkpoint before it: delete {self.path} and begin again"


def _content(config: TrainConfig, description: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds, exactly as it will be read back (JSON has no tuples)."""
    return {"format": FORMAT, "training": config.to_json(), "task": json.loads(json.dumps(description))}


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
