"""Runs as the command line makes them, shared by the tests of the verbs."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from crossattention.cli.main import main
from crossattention.recipes.g2p import G2PConfig, G2PTask
from recipes.reversing_words import TINY, write_reversed_words
from run_folders import write_run

TINY_FLAGS = "--dim 32 --heads 2 --encoder-layers 1 --decoder-layers 1 --feed-forward-dim 64 --dropout 0".split()


@dataclass(frozen=True)
class Done:
    """What one command line gave."""

    code: int
    stdout: str
    stderr: str
    run: Path


def type_in(*words: object) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of one command line, in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main([str(word) for word in words])
    return code, stdout.getvalue(), stderr.getvalue()


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    return write_reversed_words(tmp_path_factory.mktemp("data") / "pairs.tsv")


@pytest.fixture(scope="session")
def trained(pairs_file, tmp_path_factory):
    """A run that reverses short words, trained by the command line."""
    run = tmp_path_factory.mktemp("runs") / "reversed"
    flags = ["--steps", 200, "--tokens-per-batch", 400, "--learning-rate", 5e-3, "--warmup-steps", 10, "--evaluations", 2]
    flags += ["--target-tokens", "words", "--threads", torch.get_num_threads(), *TINY_FLAGS]
    return Done(*type_in("train", "seq2seq", "--data", pairs_file, "--out", run, *flags), run)


@pytest.fixture(scope="session")
def g2p_run(tmp_path_factory):
    """A g2p run of random weights, as the loop leaves one: what it says is wrong, how it is said is what we test."""
    task = G2PTask(G2PConfig(model=TINY))
    torch.manual_seed(0)
    return write_run(tmp_path_factory.mktemp("runs") / "g2p", task, task.build_model(), step=1234)
