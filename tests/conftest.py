"""What every test starts from: fixed seeds, few threads, no network, and a reason where a test cannot run here."""

import os

# Read when huggingface_hub, tokenizers and matplotlib are imported: no test downloads, forks threads or opens a window.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
import signal
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

from chromium import NAMES, Chromium, chromium
from crossattention.plan import devices

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: the tests of interruption need it to arrive.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests run in two processes (`-n 2` in pyproject.toml; `-n 0` for a debugger), each with one thread.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

# Which plan is quickest depends on the processor. Here they are all chosen for one, so that a test means the same on every machine.
PROCESSOR = devices.Processor("AuthenticAMD", 25, frozenset({"avx512f", "avx512_bf16"}))
devices.processor = lambda: PROCESSOR

# One example may compile a kernel or wait for a busy machine, so a deadline would only measure the machine.
hypothesis.settings.register_profile("local", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where tests make their tensors and models; cuda in full float32, without TF32"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device, and those marked `browser` where no browser is installed."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device; torch.cuda.is_available() is False here"
    if chromium() is None:
        reasons["browser"] = f"needs a browser, but none of {', '.join(NAMES)} is on the PATH; apt-get install chromium"
    for item in items:
        for mark, reason in reasons.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    """One browser for all tests marked `browser`."""
    path = chromium()
    assert path is not None, "a test that asks for the browser carries the mark `browser`"
    with Chromium(path) as started:
        yield started


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """The device that was asked for, for every tensor that a test makes without naming one."""
    device = request.config.getoption("device")
    if device == "cpu":
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test draws the same numbers, alone or in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
