"""Perceiver IO against `transformers`, from tiny random configurations: all of its models, their gradients and masks."""

import pytest
import torch
from torch import Tensor, nn

from crossattention.checkpoints import perceiver_huggingface as family
from crossattention.checkpoints.rules import to_ours
from crossattention.models.perceiver import PerceiverIO

transformers = pytest.importorskip("transformers")

CORE = {
    "num_latents": 5,
    "d_latents": 24,
    "num_blocks": 2,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 3,
    "num_cross_attention_heads": 1,
    "self_attention_widening_factor": 2,
    "cross_attention_widening_factor": 3,
}
SIZES = {
    family.LANGUAGE: {
        "vocab_size": 19,
        "d_model": 16,
        "max_position_embeddings": 13,
        "num_cross_attention_heads": 4,
        "num_self_attention_heads": 2,
        "qk_channels": 8,
        "v_channels": 24,
    },
    family.TEXT_CLASSES: {"vocab_size": 19, "d_model": 16, "max_position_embeddings": 13, "num_labels": 7},
    family.LEARNED: {"image_size": 6, "num_labels": 7},
    family.FOURIER: {"num_labels": 7, "cross_attention_shape_for_attention": "q"},
    family.CONV: {"num_labels": 7},
    family.FLOW: {"train_size": [6, 8]},
    family.VIDEO: {
        "num_frames": 2,
        "image_size": 8,
        "audio_samples_per_frame": 12,
        "samples_per_patch": 4,
        "num_labels": 7,
        "output_shape": [1, 2, 8, 8],
        "output_num_channels": 9,
        "_label_trainable_num_channels": 11,
    },
}
IMAGES = (family.LEARNED, family.FOURIER, family.CONV)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def models(architecture: str, dtype: torch.dtype = torch.float64, **changes: object) -> tuple[PerceiverIO, nn.Module]:
    """Ours with their weights, and theirs, all weights random."""
    torch.manual_seed(1)
    config = transformers.PerceiverConfig(**{**CORE, **SIZES[architecture], **changes}, architectures=[architecture])
    theirs = getattr(transformers, architecture)(config).to(dtype).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.is_floating_point():
                is_norm = "norm" in name and name.endswith(("weight", "running_var"))
                tensor.copy_(
                    torch.randn_like(tensor) * 0.2 + is_norm if not name.endswith("running_var") else torch.rand_like(tensor) + 0.5
                )
    ours_config = family.config_to_ours(config.to_dict())
    ours = PerceiverIO(ours_config, dtype=dtype).eval()
    ours.load_state_dict(to_ours(theirs.state_dict(), family.rules(ours_config), ours.state_dict()))
    return ours, theirs


def inputs_of(architecture: str, dtype: torch.dtype = torch.float64) -> Tensor | dict[str, Tensor]:
    """A batch of two."""
    torch.manual_seed(2)
    if architecture in (family.LANGUAGE, family.TEXT_CLASSES):
        return torch.randint(19, (2, 11))
    if architecture in IMAGES:
        height, width = (6, 6) if architecture == family.LEARNED else (22, 18) if architecture == family.CONV else (5, 7)
        return torch.randn(2, 3, height, width, dtype=dtype)
    if architecture == family.FLOW:
        return torch.randn(2, 2, 27, 6, 8, dtype=dtype)
    return {
        "audio": torch.randn(2, 24, 1, dtype=dtype),
        "image": torch.randn(2, 2, 3, 8, 8, dtype=dtype),
        "label": torch.randn(2, 7, dtype=dtype),
    }


EVERY_PLACE = {"audio": torch.arange(6), "image": torch.arange(128), "label": None}


def theirs_of(architecture: str, theirs: nn.Module, inputs: object, mask: Tensor | None = None) -> object:
    """Their logits, in our form."""
    more = {"subsampled_output_points": EVERY_PLACE} if architecture == family.VIDEO else {}
    logits = theirs(inputs=inputs, attention_mask=None if mask is None else mask.long(), **more).logits
    if architecture == family.VIDEO:
        logits["image"] = logits["image"].unflatten(1, (2, 8, 8))
    return logits


def assert_same(ours: object, theirs: object) -> None:
    if isinstance(ours, dict):
        assert set(ours) == set(theirs)
        for kind in ours:
            assert_same(ours[kind], theirs[kind])
        return
    assert ours.shape == theirs.shape
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("architecture", family.ARCHITECTURES)
def test_outputs_are_theirs(architecture: str, dtype: torch.dtype) -> None:
    ours, theirs = models(architecture, dtype)
    inputs = inputs_of(architecture, dtype)
    with torch.no_grad():
        wanted = theirs_of(architecture, theirs, inputs)
        assert_same(ours(inputs), wanted)
        assert_same(ours(inputs), wanted)  # and from what is kept
    assert_same(ours(inputs), wanted)  # and where gradients flow
