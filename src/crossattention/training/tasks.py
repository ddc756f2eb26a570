"""What a task says of itself to the training loop: its model, its batches, its loss, its scores.

A recipe writes one class with these members; it inherits nothing. The loop (loop.py) knows no more of it than this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from crossattention.training.together import ALONE, Together


class Batch(Protocol):
    """One step's examples as tensors: a dataclass, all of whose tensors have one row for each of `indices`."""

    @property
    def num_tokens(self) -> int:
        """Real tokens in the batch, sources and targets, padding not counted: what tokens per second counts."""
        ...

    @property
    def indices(self) -> Sequence[int]:
        """The examples' places in the data; named when the loss of this batch is not a number."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What a task found out about a model on held-out data.

    Attributes:
        metrics: name -> value, as written to the journal; holds the task's `metric`.
        sample: one held-out example to show, as plain data in a form that the recipe and its view agree on.
    """

    metrics: Mapping[str, float]
    sample: Mapping[str, Any] | None = None


class Task(Protocol):
    """Everything that the loop needs to know of what is trained."""

    @property
    def metric(self) -> str:
        """The name in `Evaluation.metrics` of the number to make small; it decides which model is the best."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every example once."""
        ...

    def build_model(self) -> nn.Module:
        """A new model with random weights; it has `save_pretrained(folder)`."""
        ...

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, counted from 0: a pure function of `step`, so that a resumed run reads the same ones."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss per target token, a scalar; calls `model(...)` itself (which may be wrapped for several GPUs)."""
        ...

    def loss_weight(self, batch: Batch) -> float:
        """The number of targets that `loss` is the mean of: by it the losses of a batch's parts are the loss of the batch."""
        ...

    def evaluate(self, model: nn.Module, together: Together = ALONE) -> Evaluation:
        """Scores on held-out data. The model is in evaluation mode, no gradients are kept, random states are put back.

        All processes of a run call it, with whole weights. What takes time is handed to `together.map`, batch by batch, and scored
        in each process as if it had answered everything; the sample is asked of the first alone (`together.is_first`). A task that
        takes the model only is evaluated by the first process while the others wait.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the model's folder must hold to use it (tokenizers, data digest, settings), fit for JSON; always the same."""
        ...
