"""A tiny trained model, shared by the tests of what stands around it."""

import pytest
import torch

from crossattention.recipes.seq2seq import Seq2SeqConfig, Seq2SeqTask
from recipes.reversing_words import TINY, write_reversed_words
from run_folders import write_run


@pytest.fixture(scope="session")
def reversing(tmp_path_factory):
    """The task of reversing short words, and a model that has learned it: (task, model)."""
    path = write_reversed_words(tmp_path_factory.mktemp("data") / "reversed.tsv")
    config = Seq2SeqConfig(path, target_tokens="words", metrics=("exact",), tokens_per_batch=400, model=TINY)
    task = Seq2SeqTask(config, seed=1)
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(200):
        optimizer.zero_grad()
        task.loss(model, task.batch_at(step)).backward()
        optimizer.step()
    return task, model.eval()


@pytest.fixture
def run_folder(reversing, tmp_path):
    """That model as the training loop leaves it: the folder of a run, the model in its folder best."""
    task, model = reversing
    return write_run(tmp_path / "run", task, model, step=200)
