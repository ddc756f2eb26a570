"""Cases of `models.py`: CrossViT against timm's."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from crossattention.checkpoints.crossvit_timm import rules
from crossattention.checkpoints.rules import to_theirs
from crossattention.models import crossvit
from crossattention.models.crossvit import CrossViT
from models import BATCHES, DTYPES, MODES, Call, Case, forward_of, step_of

SIZES = {"CrossViT-9": "crossvit_9_240", "CrossViT-15": "crossvit_15_240", "CrossViT-18": "crossvit_18_240"}
ASKED = 1.05
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


def cases() -> Iterator[Case]:
    """Every size, mode, dtype and batch."""
    for (name, preset), mode, dtype, batch in itertools.product(SIZES.items(), MODES, DTYPES, BATCHES):
        build = partial(build_pair, preset, mode, dtype, batch)
        yield Case(name, mode, dtype, batch, build, TOLERANCES[dtype], ASKED, ("timm",))


def build_pair(preset: str, mode: str, dtype: str, batch: int) -> tuple[Call, Call]:
    """Our model and timm's with its weights, on the same images."""
    import timm

    torch.manual_seed(0)
    ours, theirs = CrossViT(getattr(crossvit, preset)()), timm.create_model(preset)
    theirs.load_state_dict(to_theirs(ours.state_dict(), rules(ours.config)))
    images = torch.randn(batch, 3, *ours.config.image_size, dtype=DTYPES[dtype])
    labels = torch.randint(ours.config.classes, (batch,))
    calls = []
    for model in (ours, theirs):
        model.to(DTYPES[dtype]).train(mode != "forward")
        if mode == "forward":
            calls.append(forward_of(partial(model, images)))
        else:
            calls.append(step_of(model, lambda model=model: F.cross_entropy(model(images).float(), labels)))
    return calls[0], calls[1]
