"""The one training loop: a task and a configuration in, events out, everything worth keeping in a folder.

It prints nothing, parses nothing and reads no environment (accelerate reads the one of `accelerate launch` and
`torchrun`, to find the other processes). The batch of a step is `task.batch_at(step)`, a pure function, and all random
states are saved: a run that was stopped anywhere and resumed ends in the same weights, to the bit, as one that was not
(on a CPU, with the same number of threads).
"""

import dataclasses
import inspect
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.training.budget import Pace, evaluation_steps, is_too_long, plan_steps
from crossattention.training.config import TrainConfig
from crossattention.training.events import Evaluated, Event, Finished, Interrupted, Saved, Started, Step
from crossattention.training.folder import RunFolder
from crossattention.training.initial import freeze, initialise
from crossattention.training.interruption import Interruption
from crossattention.training.journal import Journal, finite
from crossattention.training.optimizers import build_optimizers, load_optimizer_tensors, optimizer_tensors
from crossattention.training.processes import Processes, load_whole, naming_a_lost_process, whole
from crossattention.training.randomness import (
    preserved_randomness,
    random_state,
    restore_random_state,
    seed_everything,
)
from crossattention.training.schedules import factor_at, warmup_of
from crossattention.training.state import State
from crossattention.training.tasks import Batch, Evaluation, Task
from crossattention.training.together import ALONE, BrokenOffError

__all__ = ["Evaluated", "Event", "Finished", "Interrupted", "Saved", "Started", "Step", "train"]

_REPLAN_EVERY = 10  # steps from one look at the clock to the next, in a run of `minutes`


def train(task: Task, config: TrainConfig, out: str | Path, *, resume: bool = False) -> Iterator[Event]:
    """Train the task's model, yielding what happens.

    w <- optimizer(w, clip(grad task.loss(model, task.batch_at(step)))), with the learning rate of `config.schedule`

    The folder is checked at the call; the work is done while the events are iterated over. In a run of several
    processes (`accelerate launch`, `torchrun`) each takes some items of the same batch, so that the loss and its gradient
    are those of one process (processes.py), and only the first process yields events and writes files.

    Args:
        task: what to train (tasks.py).
        config: how (config.py).
        out: the run's folder (folder.py says what lies in it); made where it does not exist.
        resume: go on with the run in `out` from its newest checkpoint, with the same settings.

    Returns:
        The events (events.py). SIGINT and SIGTERM end the run with a checkpoint at the current step, an `Interrupted`
        event, and then KeyboardInterrupt or SystemExit.

    Raises:
        ValueError: `out` holds a run and `resume` is not set, or the other way round, or the settings differ, or its
            newest checkpoint is damaged.
        OSError: `out` cannot be written.
        ConnectionError: while iterating: another process of the run has ended.
        FloatingPointError: while iterating: the loss or the gradient is not finite; names the step and the examples.

    Example:
        for event in train(task, TrainConfig(steps=1000), "runs/first"):
            if isinstance(event, Step):
                print(event.step, event.loss)
    """
    processes = Processes(config)
    folder = RunFolder(Path(out))
    description = task.describe()
    if processes.is_first:
        if resume:
            folder.check_resumable(config, description)
        else:
            folder.check_new()
    return _events(task, config, folder, description, processes, resume)


def _events(
    task: Task,
    config: TrainConfig,
    folder: RunFolder,
    description: dict[str, Any],
    processes: Processes,
    resume: bool,
) -> Iterator[Event]:
    is_main = processes.is_first
    lost = naming_a_lost_process(processes.count, lambda: f"The run can be resumed: {_newest(folder)}")
    with folder.locked() if is_main else nullcontext(), Interruption(has_launcher=processes.count > 1) as interruption, lost:
        run = _Run(task, config, folder, description, processes, interruption, resume=resume)
        try:
            for event in run.events():
                if is_main:
                    with preserved_randomness():  # whoever looks on may draw numbers too
                        yield event
        finally:
            run.close()


@dataclass
class _Progress:
    """How far a run is: what changes from step to step, and is saved with the tensors."""

    step: int = 0
    total_steps: int | None = None
    evaluation_steps: tuple[int, ...] = ()
    evaluated_step: int = 0
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    # Since the last Step event:
    losses: list[float] = field(default_factory=list)
    gradient_norm: float = 0.0
    tokens: int = 0
    token_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return finite(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "_Progress":
        metrics = {name: math.nan if value is None else value for name, value in fields["best_metrics"].items()}
        return cls(**{**fields, "best_metrics": metrics, "evaluation_steps": tuple(fields["evaluation_steps"])})


class _Run:
    """One run in one process: the parts, and what is done with them between two events."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        folder: RunFolder,
        description: dict[str, Any],
        processes: Processes,
        interruption: Interruption,
        *,
        resume: bool,
    ):
        self.task, self.config, self.folder, self.description = task, config, folder, description
        self.processes, self.interruption = processes, interruption
        self.device, self.is_main = processes.device, processes.is_first
        self.started_at = self.stepped_at = self.saved_at = time.monotonic()
        self.progress = _Progress()
        self.pace = Pace()
        # A task that knows of no other processes is evaluated by the first alone.
        self.evaluates_together = processes.count > 1 and "together" in inspect.signature(task.evaluate).parameters
        self.is_replannable = False  # only in the process that made the plan: a resumed run keeps to the stored one
        self.unread: list[tuple[int, Tensor, Tensor]] = []  # (step, loss, gradient norm), still on the device
        self.saved_key: tuple[int, int] | None = None
        if config.threads is not None:
            torch.set_num_threads(config.threads)

        seed_everything(config.seed)
        self.model = task.build_model()
        self.init = self._initialise(resume)
        self.frozen = freeze(self.model, config.freeze)
        self.model = self.model.to(self.device).train()
        self.copy = self._plain_copy()
        self.prepared: nn.Module = processes.wrap(self.model)  # before the optimizers: shards take the place of weights
        self.optimizers = build_optimizers(self.model, config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        seed_everything(config.seed + processes.rank)  # each process has its own dropout

        self.resumed_from: Path | None = None
        self.notes: list[str] = []
        saved = self._open_folder(resume)
        self._fix_length()
        self._note_warm_up()
        self._note_beginning()
        resumed_step = self.progress.step if resume else None
        self.journal = Journal(folder.journal_file, folder.tensorboard, resumed_step=resumed_step) if self.is_main else None
        if saved is None:
            self._write_beginning()
        elif len(saved.facts["random"]) == processes.count:
            restore_random_state(saved.facts["random"][processes.rank])  # last: building draws numbers
        else:
            seed_everything(config.seed + 7919 * self.progress.step + processes.rank)

    def events(self) -> Iterator[Event]:
        """The whole run."""
        progress = self.progress
        yield Started(
            total_steps=progress.total_steps,
            parameters=sum(p.numel() for p in self.parameters),
            device=str(self.device),
            resumed_from=self.resumed_from,
            step=progress.step,
            notes=tuple(self.notes),
        )
        self.stepped_at = time.monotonic()
        while True:
            signal_number, is_time_to_save = self.processes.highest(
                self.interruption.signal_number, time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes
            )
            if signal_number:
                yield from self._stop(signal_number)
            if is_time_to_save and self.saved_key != (progress.step, progress.evaluated_step):
                yield self._save()
            if self._is_evaluation_due():
                yield from self._evaluate_and_save()
                continue
            if progress.step == progress.total_steps:
                break
            self._take_step()
            self._shorten_if_late()
            if progress.step % self.config.log_every == 0:
                yield self._log_step()
        if self.saved_key != (progress.step, progress.evaluated_step):
            yield self._save()
        assert progress.best_step is not None, "the last step is always evaluated"
        yield Finished(progress.step, dict(progress.best_metrics), progress.best_step, self._elapsed())

    def close(self) -> None:
        """Let go of the files."""
        if self.journal is not None:
            self.journal.close()

    # ---- beginning

    def _initialise(self, resume: bool) -> dict[str, Any] | None:
        """Load the weights to begin with; for a run that goes on from a checkpoint, only say which they were."""
        if self.config.init is None:
            return None
        recorded = self.folder.read_config().get("init") if resume else None
        if recorded is not None and self.folder.saved_steps():
            return recorded
        found = initialise(self.model, self.config.init, self.description)
        if recorded is not None and recorded["sha256"] != found["sha256"]:
            raise ValueError(
                f"{self.config.init} has changed since the run was begun: sha256 {recorded['sha256']} then, {found['sha256']} now; "
                "put it back, or begin a new run in another folder"
            )
        return found

    def _note_beginning(self) -> None:
        if self.init is not None:
            digests = ", ".join(f"{name} {digest[:12]}" for name, digest in self.init["sha256"].items())
            self.notes.append(f"begun with the weights of {self.init['source']} (sha256 of {digests})")
            self.notes += [f"{part} begins with random weights: {why}" for part, why in self.init.get("new", {}).items()]
        if self.frozen:
            named = dict(self.model.named_parameters(remove_duplicate=False))
            numbers = sum(p.numel() for p in {named[name] for name in self.frozen})
            self.notes.append(f"frozen: {numbers:,} numbers in {len(self.frozen)} tensors ({' '.join(self.config.freeze)})")

    def _write_beginning(self) -> None:
        if self.init is not None:
            self._write("init", self.init)
        if self.frozen:
            self._write("freeze", {"patterns": list(self.config.freeze), "names": self.frozen})

    def _open_folder(self, resume: bool) -> State | None:
        """Make the folder a run's, or load what it holds; None where the run begins at step 0."""
        if not resume:
            if self.is_main:
                self.folder.write_config(self.config, self.description, self.init)
            return None
        if self.is_main:
            self.folder.restore()
        self.processes.wait()
        newest = self.folder.load_newest()
        steps = self.processes.from_all(None if newest is None else newest[0].facts["progress"]["step"])
        if any(step != steps[0] for step in steps):
            raise ValueError(
                f"the processes found checkpoints of different steps in {self.folder.path}: {', '.join(map(str, steps))}; "
                "the run's folder must be on a disk that all machines share"
            )
        if newest is None:
            return None
        state, self.resumed_from = newest
        facts = state.facts
        load_whole(self.model, state.tensors["model"])
        load_optimizer_tensors(self.optimizers, self.model, state.tensors["optimizer"])
        self.progress = _Progress.from_json(facts["progress"])
        self.saved_key = (self.progress.step, self.progress.evaluated_step)
        if len(facts["random"]) != self.processes.count:
            self.notes.append(
                f"saved by {len(facts['random'])} processes, resumed by {self.processes.count}: the batches are the same, "
                "dropout draws other numbers"
            )
        self.notes += [
            f"{name}: {facts['environment'][name]} before, {now} now: the weights will not be the same to the last bit"
            for name, now in self._environment().items()
            if facts["environment"].get(name) != now
        ]
        return state

    def _fix_length(self) -> None:
        """Set the number of steps and the evaluations; a run of `minutes` does that after its first steps."""
        progress, config = self.progress, self.config
        if progress.total_steps is not None or config.minutes is not None:
            return
        progress.total_steps = config.steps or max(1, math.ceil((config.epochs or 0) * self.task.steps_per_epoch))
        progress.evaluation_steps = evaluation_steps(
            progress.total_steps, evaluations=config.evaluations, evaluate_every=config.evaluate_every
        )

    def _note_warm_up(self) -> None:
        total, wanted = self.progress.total_steps, self.config.warmup_steps
        if total is not None and warmup_of(wanted, total) < wanted:
            self.notes.append(f"warmup_steps={wanted} becomes {warmup_of(wanted, total)}, a fifth of the run's {total} steps")

    def _environment(self) -> dict[str, Any]:
        """What changes the last bits of the weights."""
        return {"threads": torch.get_num_threads(), "device": self.device.type, "torch": torch.__version__}

    # ---- a step

    def _take_step(self) -> None:
        progress = self.progress
        step = progress.step + 1
        factor = self._factor(step)
        batch = self._batch_of(step)
        part, share = self.processes.part_of(self.task, batch)
        with self._autocast():
            loss = self.task.loss(self.prepared, part.to(self.device))
        if self.processes.count > 1:  # the mean over processes that DDP and FSDP take of gradients becomes the sum of shares
            loss = loss * share
            (loss * self.processes.count).backward()
        else:
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm or math.inf)
        self.unread.append((step, loss.detach(), whole({"norm": norm.detach()})["norm"]))
        if self.device.type == "cpu":  # elsewhere reading waits for the device: done when the numbers are needed
            self._read_losses()
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step = step
        progress.tokens += batch.num_tokens
        now = time.monotonic()
        self.pace.add_step(now - self.stepped_at)
        progress.token_seconds += now - self.stepped_at
        self.stepped_at = now

    def _factor(self, step: int) -> float:
        """Of the highest learning rate, at a step."""
        config = self.config
        total_steps = self.progress.total_steps
        return factor_at(config.schedule, step, warmup_steps=config.warmup_steps, total_steps=total_steps)

    def _batch_of(self, step: int) -> Batch:
        return self.task.batch_at(step - 1)

    def _autocast(self) -> AbstractContextManager[Any]:
        # Around the whole loss, by torch itself: accelerate would replace the model's `forward` and cast its outputs.
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _read_losses(self) -> None:
        """Take the losses off the device and stop where one is not finite, before anything made of it is saved."""
        if not self.unread:
            return
        losses = self.processes.sum(torch.stack([loss for _, loss, _ in self.unread])).tolist()
        norms = torch.stack([norm for _, _, norm in self.unread]).tolist()
        steps = [step for step, _, _ in self.unread]
        self.unread.clear()
        for step, loss, norm in zip(steps, losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(self._not_finite(step, loss, norm))
        self.progress.losses += losses
        self.progress.gradient_norm = norms[-1]

    def _not_finite(self, step: int, loss: float, norm: float) -> str:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4g} but its gradient is {norm}"
        indices = list(self._batch_of(step).indices)
        named = ", ".join(str(index) for index in indices[:20]) + (", ..." if len(indices) > 20 else "")
        return (
            f"{what} at step {step}; its batch holds the {len(indices)} examples {named}; {_newest(self.folder)}. "
            "Look at these examples, or lower learning_rate, lengthen warmup_steps or lower clip_norm in a new run"
        )

    def _log_step(self) -> Step:
        self._read_losses()
        progress = self.progress
        event = Step(
            step=progress.step,
            total_steps=progress.total_steps,
            loss=sum(progress.losses) / len(progress.losses),
            tokens_per_second=progress.tokens / max(progress.token_seconds, 1e-9),
            learning_rate=self.config.learning_rate * self._factor(progress.step),
            gradient_norm=progress.gradient_norm,
            seconds=self._elapsed(),
            seconds_left=self._seconds_left(),
        )
        progress.losses, progress.tokens, progress.token_seconds = [], 0, 0.0
        numbers = {
            name: getattr(event, name) for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds")
        }
        charts = {f"training/{name}": value for name, value in numbers.items() if name != "seconds"}
        self._write("step", numbers, charts)
        return event

    # ---- time

    def _elapsed(self) -> float:
        return self.progress.seconds + max(0.0, time.monotonic() - self.started_at)  # a clock that went back gives no time back

    def _seconds_left(self) -> float | None:
        progress = self.progress
        if progress.total_steps is None:
            return max(0.0, 60 * (self.config.minutes or 0) - self._elapsed())
        return self.pace.seconds_left(progress.total_steps - progress.step, len(self._evaluations_left()))

    def _evaluations_left(self) -> list[int]:
        return [step for step in self.progress.evaluation_steps if step > self.progress.evaluated_step]

    def _plan(self, evaluations: int) -> None:
        """Fix the number of steps of a run of `minutes`, and spread the evaluations over those that are left."""
        progress, config = self.progress, self.config
        total, evaluations = plan_steps(
            self.pace,
            step=progress.step,
            elapsed_seconds=self._elapsed(),
            budget_seconds=60 * (config.minutes or 0),
            evaluations=evaluations,
        )
        self.is_replannable = True
        progress.total_steps = self.processes.first(total)
        progress.evaluation_steps = evaluation_steps(
            progress.total_steps,
            evaluations=self.processes.first(evaluations),
            evaluate_every=config.evaluate_every,
            after=progress.step,
        )
        self._write("plan", {"total_steps": progress.total_steps, "seconds": self._elapsed()})

    def _shorten_if_late(self) -> None:
        """Where the machine became slower since a run of `minutes` was planned, end it in time nevertheless."""
        progress, config = self.progress, self.config
        if config.minutes is None or progress.total_steps is None or not self.is_replannable:
            return
        if progress.step % _REPLAN_EVERY or progress.step >= progress.total_steps:
            return
        left = len(self._evaluations_left())
        is_late = is_too_long(
            self.pace,
            steps_left=progress.total_steps - progress.step,
            evaluations_left=left,
            elapsed_seconds=self._elapsed(),
            budget_seconds=60 * config.minutes,
        )
        if self.processes.first(is_late):
            self._plan(left)

    # ---- evaluating, saving, stopping

    def _is_evaluation_due(self) -> bool:
        progress = self.progress
        if progress.step == progress.evaluated_step:
            return False
        if progress.total_steps is None:
            budget = 60 * (self.config.minutes or 0)
            return bool(self.processes.first(self.pace.is_measured(budget, self._elapsed())))
        return progress.step in progress.evaluation_steps or progress.step == progress.total_steps

    def _evaluate_and_save(self) -> Iterator[Event]:
        begun = time.monotonic()
        self._read_losses()
        evaluation = self._evaluate()
        if self.processes.highest(self.interruption.signal_number)[0]:
            return  # the evaluation was broken off; a resumed run begins with it
        yield self._note_evaluation(evaluation)
        if self.progress.total_steps is None:
            self.pace.evaluation_seconds = time.monotonic() - begun
            self._plan(self.config.evaluations - 1)
        yield self._save()
        self.pace.add_evaluation(time.monotonic() - begun)
        self.stepped_at = time.monotonic()

    def _evaluate(self) -> Evaluation | None:
        """The task's scores, by all processes that evaluate; None in others, and in all where a signal broke it off."""
        model = self._whole_model()
        if model is None:
            return None
        together = self.processes.together(self.interruption.noted) if self.evaluates_together else ALONE
        given = {"together": together} if self.evaluates_together else {}
        model.eval()
        try:
            with torch.no_grad(), preserved_randomness(), self.interruption.at_once():
                evaluation = self.task.evaluate(model, **given)
            together.finish()
            return evaluation
        except BrokenOffError as stop:
            if not stop.fault:
                return None
            raise RuntimeError(f"another process could not evaluate the model: {stop.fault}") from None
        except KeyboardInterrupt:
            together.break_off()
            if not self.interruption.signal_number:
                raise
            return None
        except Exception as error:
            together.break_off(f"{type(error).__name__}: {error}")
            raise
        finally:
            model.train()

    @property
    def _evaluates(self) -> bool:
        """Whether this process evaluates."""
        return self.is_main or self.evaluates_together

    def _plain_copy(self) -> nn.Module | None:
        """Where weights are sharded, a second model in each process that evaluates, which takes them whole."""
        if not (self.processes.is_sharded and self._evaluates):
            return None
        with preserved_randomness():
            return self.task.build_model().to(self.device)

    def _whole_model(self) -> nn.Module | None:
        """The model with whole weights, in processes that evaluate; None elsewhere. A collective call where weights are sharded."""
        if not self.processes.is_sharded:
            return self.model if self._evaluates else None
        tensors = whole(self.model.state_dict())
        if self.copy is not None:
            self.copy.load_state_dict(tensors)
        return self.copy

    def _note_evaluation(self, evaluation: Evaluation | None) -> Evaluated:
        progress, metric = self.progress, self.task.metric
        metrics = dict(evaluation.metrics) if evaluation is not None else {}
        if evaluation is not None and metric not in metrics:
            raise ValueError(f"task.metric is {metric!r}, but task.evaluate gave only {sorted(metrics)}")
        is_best = bool(self.processes.first(self._is_better(metrics.get(metric, math.nan))))
        progress.evaluated_step = progress.step
        if is_best:
            progress.best_step, progress.best_metrics = progress.step, metrics
            if self.is_main:
                scores = {"step": progress.step, "metric": metric, "metrics": finite(metrics)}
                model = self.model if self.copy is None else self.copy
                self.folder.save_best(model, self.description, scores, self.init)
        charts = {f"evaluation/{name}": value for name, value in metrics.items()}
        self._write("evaluation", {"metrics": metrics, "is_best": is_best, "seconds": self._elapsed()}, charts)
        return Evaluated(progress.step, metrics, evaluation.sample if evaluation is not None else None, is_best)

    def _is_better(self, value: float) -> bool:
        if self.progress.best_step is None:
            return True
        best = self.progress.best_metrics.get(self.task.metric, math.nan)
        return value < best or (math.isnan(best) and not math.isnan(value))

    def _save(self) -> Saved:
        self._read_losses()
        progress = self.progress
        random = self.processes.from_all(random_state())
        model, optimizer = whole(self.model.state_dict()), whole(optimizer_tensors(self.optimizers, self.model))
        if self.is_main:
            facts = {
                "progress": {**progress.to_json(), "seconds": self._elapsed()},
                "random": random,
                "environment": self._environment(),
            }
            tensors: dict[str, Mapping[str, Tensor]] = {
                "model": model,
                "optimizer": optimizer,
            }
            self._flush_journal()
            self.folder.save_checkpoint(State(progress.step, tensors, facts))
            self.folder.prune(keep=self.config.keep_checkpoints, best_step=progress.best_step)
        self.processes.wait()
        self.saved_key = (progress.step, progress.evaluated_step)
        self.saved_at = self.stepped_at = time.monotonic()
        return Saved(progress.step, self.folder.checkpoint(progress.step), progress.best_step == progress.step)

    def _stop(self, signal_number: int) -> Iterator[Event]:
        """Save where the run stands, say so, and end it as the signal would have."""
        name, answer = signal.Signals(signal_number).name, self.interruption.answer(signal_number)
        if self.saved_key != (self.progress.step, self.progress.evaluated_step):
            yield self._save()
        yield Interrupted(self.progress.step, self.folder.checkpoint(self.progress.step), name)
        raise answer

    def _write(self, event: str, values: Mapping[str, Any], charts: Mapping[str, float] | None = None) -> None:
        if self.journal is None:
            return
        try:
            self.journal.write(event, self.progress.step, values, charts=charts)
        except OSError as error:
            raise self.folder.explained(error, f"could not write {self.folder.journal_file}") from error

    def _flush_journal(self) -> None:
        if self.journal is None:
            return
        try:
            self.journal.flush()
        except OSError as error:
            raise self.folder.explained(error, f"could not write {self.folder.journal_file}") from error


def _newest(folder: RunFolder) -> str:
    steps = folder.saved_steps()
    return f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint before it"
