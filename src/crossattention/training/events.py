"""What happens in a training run, as values: the loop yields them, whoever iterates shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Started:
    """The model is built (and, on resuming, loaded); no step has been taken by this process.

    Attributes:
        total_steps: None while `minutes` are still to be turned into steps.
        parameters: numbers that are trained.
        device: as torch writes it, such as "cpu" or "cuda:0".
        resumed_from: the checkpoint folder, or None in a new run.
        step: steps already taken, by the run that is resumed.
        notes: things to show that are no errors, such as another number of threads than before.
    """

    total_steps: int | None
    parameters: int
    device: str
    resumed_from: Path | None
    step: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """Every `log_every`-th step.

    Attributes:
        step: steps taken, from 1.
        total_steps: None while `minutes` are still to be turned into steps.
        loss: mean over the steps since the last such event.
        tokens_per_second: source and target tokens, padding not counted, over the same steps; evaluations not counted.
        learning_rate: of this step.
        gradient_norm: of this step, before clipping.
        seconds: since the run began, the parts before resuming included.
        seconds_left: an estimate, evaluations included; None in the first steps.
    """

    step: int
    total_steps: int | None
    loss: float
    tokens_per_second: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    seconds_left: float | None


@dataclass(frozen=True)
class Evaluated:
    """The task scored the model on held-out data.

    Attributes:
        metrics: as the task gave them.
        sample: the task's example to show, or None.
        is_best: the task's metric was never smaller; the model now lies in the run's folder `best`.
    """

    step: int
    metrics: Mapping[str, float]
    sample: Mapping[str, Any] | None
    is_best: bool


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on the disk, complete.

    Attributes:
        is_best: it is the checkpoint of the best evaluation so far.
    """

    step: int
    path: Path
    is_best: bool


@dataclass(frozen=True)
class Interrupted:
    """SIGINT or SIGTERM came; everything is saved, and the next `next()` raises KeyboardInterrupt or SystemExit(143).

    Attributes:
        path: the checkpoint that `resume=True` continues from.
        signal: "SIGINT" or "SIGTERM".
    """

    step: int
    path: Path
    signal: str


@dataclass(frozen=True)
class Finished:
    """The run is complete.

    Attributes:
        metrics: of the best evaluation: what the model in the run's folder `best` scored.
        best_step: the step of that evaluation.
        seconds: of the whole run, the parts before resuming included.
    """

    step: int
    metrics: Mapping[str, float]
    best_step: int
    seconds: float


Event = Started | Step | Evaluated | Saved | Interrupted | Finished
