"""The random states that a run depends on: Python's, NumPy's and torch's (CPU and current GPU), as plain JSON."""

import base64
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed every generator that `random_state` reads."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # seeds every device


def random_state() -> dict[str, Any]:
    """Every generator's state, fit for JSON; `restore_random_state` is the way back."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            "name": numpy_state["bit_generator"],
            "key": _encode(torch.from_numpy(numpy_state["state"]["key"].view(np.uint8))),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": _encode(torch.get_rng_state()),
        # A process trains on one device: asking the others would open each of them.
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
        "mps": _encode(torch.mps.get_rng_state()) if torch.backends.mps.is_available() else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put every generator back. States of devices that this machine does not have are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    saved = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": saved["name"],
            "state": {"key": _decode(saved["key"]).numpy().view(np.uint32), "pos": saved["position"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    torch.set_rng_state(_decode(state["torch"]))
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(_decode(state["cuda"]))
    if torch.backends.mps.is_available() and state["mps"] is not None:
        torch.mps.set_rng_state(_decode(state["mps"]))


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Whatever draws numbers inside the block, those outside go on as if it had not been there."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
