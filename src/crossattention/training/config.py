"""The settings of one training run, as one frozen value."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from crossattention.training.schedules import ScheduleName

OptimizerName = Literal["adamw", "muon"]
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu"]
Parallel = Literal["ddp", "fsdp"]

# Fields that may differ when a run is resumed, because they change neither the batches nor the weights
# (`threads` and `device` change the last bits; the loop says so in its `Started` event).
FREE_ON_RESUME = frozenset({"log_every", "keep_checkpoints", "checkpoint_minutes", "threads", "device", "parallel"})


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and how carefully to train. Exactly one of `minutes`, `steps` and `epochs` is given.

    Attributes:
        minutes: wall-clock length of the run, evaluations included; the first steps are measured, then the number of
            steps is fixed.
        steps: number of optimizer steps.
        epochs: number of passes over the training data.
        learning_rate: the highest learning rate, reached at the end of the warm-up. The 2017 paper's is
            (dim * warmup_steps) ** -0.5 with the schedule "inverse-sqrt".
        schedule: what the learning rate does after the warm-up.
        warmup_steps: steps over which the learning rate rises in a line from 0; at most a fifth of the run.
        optimizer: what makes a step of a gradient; "muon" takes the matrices inside the model (muon.py), AdamW the rest.
        weight_decay: decoupled weight decay, on matrices only (no biases, norms or vectors).
        betas: AdamW's decay rates of the two running means.
        epsilon: AdamW's constant in the denominator.
        clip_norm: gradients longer than this are scaled down to it; None for never.
        precision: "bf16" runs the loss under autocast; weights and optimizer stay float32.
        seed: of the weights, the dropout and (through the task) the batches.
        evaluations: evaluations over the run; the first comes early, the last at the end.
        evaluate_every: evaluate after every so many steps instead, and at the end.
        log_every: steps from one `Step` event to the next.
        keep_checkpoints: newest checkpoints that are kept, beside the one of the best evaluation.
        checkpoint_minutes: longest time between two checkpoints; there is one at each evaluation anyway.
        threads: CPU threads of torch; None leaves them as they are.
        device: "auto" takes the GPU where there is one.
        parallel: how several processes (`torchrun`, `accelerate launch`) hold the weights: "ddp" whole in each, "fsdp" sharded.
        init: begin with the weights of a run, a model folder, a folder or file of another library or a hub id, in the place of
            random ones; they must fit in every name and shape.
        freeze: names of parameters that stay as they are, with wildcards: "encoder.*", or "encoder" for all below it.

    Raises:
        ValueError: a value out of range; the message names it.

    Example:
        >>> TrainConfig(steps=100).learning_rate
        0.001
        >>> TrainConfig(steps=100, minutes=5)
        Traceback (most recent call last):
        ValueError: give exactly one of minutes, steps and epochs; got minutes=5 and steps=100
    """

    minutes: float | None = None
    steps: int | None = None
    epochs: float | None = None
    learning_rate: float = 1e-3
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 400
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-9
    clip_norm: float | None = 1.0
    precision: Precision = "fp32"
    seed: int = 0
    evaluations: int = 10
    evaluate_every: int | None = None
    log_every: int = 10
    keep_checkpoints: int = 2
    checkpoint_minutes: float = 5.0
    threads: int | None = None
    device: Device = "auto"
    parallel: Parallel = "ddp"
    init: str | None = None
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON gives a list
        if isinstance(self.freeze, str):
            raise ValueError(f"freeze must be several patterns, got the one text {self.freeze!r}; give ({self.freeze!r},)")
        object.__setattr__(self, "freeze", tuple(self.freeze))
        if self.init is not None:
            object.__setattr__(self, "init", str(self.init))
        lengths = {name: getattr(self, name) for name in ("minutes", "steps", "epochs")}
        given = {name: value for name, value in lengths.items() if value is not None}
        if len(given) != 1:
            came = " and ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
            raise ValueError(f"give exactly one of minutes, steps and epochs; got {came}")
        for name in ("minutes", "epochs", "learning_rate", "checkpoint_minutes", "epsilon", "clip_norm"):
            self._check_number(name, positive=True)
        for name in ("steps", "evaluate_every", "threads", "evaluations", "log_every", "keep_checkpoints"):
            self._check_count(name, least=1)
        self._check_count("warmup_steps", least=0)
        self._check_count("seed", least=0)
        self._check_number("weight_decay", positive=False)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 up to, not including, 1; got {self.betas}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON holds it; `from_json` is the way back."""
        fields = {**dataclasses.asdict(self), "betas": list(self.betas), "freeze": list(self.freeze)}
        # Absent where they are not used, as in the runs of versions that did not have them.
        unused = {"init": None, "freeze": [], "parallel": "ddp"}
        return {name: value for name, value in fields.items() if name not in unused or value != unused[name]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The configuration of what `to_json` gave.

        Raises:
            ValueError: a field that this version does not know, or a value out of range.
        """
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown training settings {unknown}: written by another version of crossattention")
        return cls(**fields)

    def _check_number(self, name: str, *, positive: bool) -> None:
        value = getattr(self, name)
        if value is None and name in ("minutes", "epochs", "clip_norm"):
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < 0 or (positive and value == 0):
            wanted = "a finite number above 0" if positive else "a finite number of at least 0"
            raise ValueError(f"{name} must be {wanted}; got {value!r}")

    def _check_count(self, name: str, *, least: int) -> None:
        value = getattr(self, name)
        if value is None and name in ("steps", "evaluate_every", "threads"):
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")


_CHOICES = {
    "schedule": get_args(ScheduleName),
    "optimizer": get_args(OptimizerName),
    "precision": get_args(Precision),
    "device": get_args(Device),
    "parallel": get_args(Parallel),
}
