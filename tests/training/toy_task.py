"""A task small enough to train in milliseconds, with dropout; run as a program, it trains in a process of its own.

python toy_task.py OUT STEPS DELAY [resume]     DELAY: seconds that each batch takes, so that a kill hits the middle
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from crossattention.checkpoints.files import write_json, write_safetensors
from crossattention.training.config import TrainConfig
from crossattention.training.loop import train
from crossattention.training.tasks import Evaluation


@dataclass(frozen=True)
class ToyBatch:
    inputs: torch.Tensor
    labels: torch.Tensor
    indices: tuple[int, ...]

    @property
    def num_tokens(self):
        return self.inputs.shape[0]

    def to(self, device):
        return ToyBatch(self.inputs.to(device), self.labels.to(device), self.indices)


class ToyModel(nn.Module):
    def __init__(self, dim=6, hidden_dim=11):
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(0.3)
        self.down_proj = nn.Linear(hidden_dim, 1)

    def forward(self, inputs):
        return self.down_proj(self.dropout(self.norm(self.up_proj(inputs)))).squeeze(-1)

    def save_pretrained(self, folder):
        write_json(Path(folder) / "config.json", {"family": "toy"})
        write_safetensors(Path(folder) / "model.safetensors", self.state_dict())


class ToyTask:
    """Learn a fixed linear function of six numbers."""

    metric = "error"
    steps_per_epoch = 8

    def __init__(self, *, delay=0.0, evaluation_delay=0.0, bad_step=None, sleep=time.sleep):
        self.delay, self.evaluation_delay, self.bad_step, self.sleep = delay, evaluation_delay, bad_step, sleep
        generator = torch.Generator(torch.get_default_device()).manual_seed(1)
        self.inputs = torch.randn(64, 6, generator=generator)
        self.labels = self.inputs @ torch.arange(1.0, 7.0)
        self.evaluations = 0
        self.batches = []

    def build_model(self):
        return ToyModel()

    def batch_at(self, step):
        self.sleep(self.delay)
        self.batches.append(step)
        generator = torch.Generator(torch.get_default_device()).manual_seed(1000 + step // self.steps_per_epoch)
        order = torch.randperm(64, generator=generator)
        indices = order[8 * (step % self.steps_per_epoch) :][:8]
        inputs = self.inputs[indices]
        if self.bad_step is not None and step == self.bad_step - 1:
            inputs = inputs * float("nan")
        return ToyBatch(inputs, self.labels[indices], tuple(indices.tolist()))

    def loss(self, model, batch):
        return (model(batch.inputs) - batch.labels).square().mean()

    def loss_weight(self, batch):
        return len(batch.labels)

    def evaluate(self, model):
        assert not model.training
        assert not torch.is_grad_enabled()
        self.evaluations += 1
        self.sleep(self.evaluation_delay)
        torch.rand(3)  # an evaluation may draw numbers: the training must not notice
        error = (model(self.inputs) - self.labels).square().mean().item()
        return Evaluation({"error": error, "drawn": 1.0}, sample={"first": self.labels[0].item()})

    def describe(self):
        return {"task": "toy", "examples": 64}


def toy_config(**fields):
    defaults = dict(learning_rate=0.05, warmup_steps=4, log_every=5, evaluations=4, threads=1, device="cpu")
    if not {"minutes", "steps", "epochs"} & set(fields):
        fields["steps"] = 20
    return TrainConfig(**{**defaults, **fields})


def main():
    out, steps, delay = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    task = ToyTask(delay=delay)
    config = toy_config(steps=steps, evaluate_every=7)
    for event in train(task, config, out, resume=sys.argv[4:] == ["resume"]):
        print(event, flush=True)


if __name__ == "__main__":
    main()
