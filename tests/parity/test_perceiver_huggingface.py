"""Perceiver IO against `transformers`, from tiny random configurations: all of its models, their gradients and masks."""

import pytest
import torch
from torch import Tensor, nn

from crossattention.checkpoints import perceiver_huggingface as family
from crossattention.checkpoints.rules import to_ours, to_theirs
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


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=["float64", "float32"])
@pytest.mark.parametrize("architecture", family.ARCHITECTURES)
def test_outputs_are_theirs(architecture: str, dtype: torch.dtype) -> None:
    ours, theirs = models(architecture, dtype)
    inputs = inputs_of(architecture, dtype)
    with torch.no_grad():
        wanted = theirs_of(architecture, theirs, inputs)
        assert_same(ours(inputs), wanted)
        assert_same(ours(inputs), wanted)  # and from what is kept
    assert_same(ours(inputs), wanted)  # and where gradients flow


@pytest.mark.slow
@pytest.mark.parametrize("architecture", family.ARCHITECTURES)
def test_gradients_are_theirs(architecture: str) -> None:
    ours, theirs = models(architecture)
    inputs = inputs_of(architecture)
    out, wanted = ours(inputs), theirs_of(architecture, theirs, inputs)
    pairs = [(out[kind], wanted[kind]) for kind in out] if isinstance(out, dict) else [(out, wanted)]
    for mine, yours in pairs:
        direction = torch.randn(mine.shape, dtype=mine.dtype, generator=torch.Generator(torch.get_default_device()).manual_seed(3))
        (mine * direction).sum().backward(retain_graph=True)
        (yours * direction).sum().backward(retain_graph=True)
    made = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    made |= {name: buffer for name, buffer in theirs.named_buffers() if "running" in name}
    for name, grad in to_ours(made, family.rules(ours.config), ours.state_dict()).items():
        if "running" in name:
            continue
        mine = ours.get_parameter(name).grad
        assert_same(torch.zeros_like(grad) if mine is None else mine, grad)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", family.ARCHITECTURES)
def test_masked_inputs_are_as_theirs_where_a_row_is_live(architecture: str) -> None:
    ours, theirs = models(architecture)
    inputs = inputs_of(architecture)
    length = ours.inputs(inputs).length
    mask = torch.rand(2, length) > 0.4
    mask[:, 0] = True
    mask[1, 1:] = False  # one live row
    wanted = theirs_of(architecture, theirs, inputs, mask)
    with torch.no_grad():
        assert_same(ours(inputs, mask), wanted)
    assert_same(ours(inputs, mask), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", family.ARCHITECTURES)
def test_weights_and_configuration_go_both_ways(architecture: str) -> None:
    ours, theirs = models(architecture)
    back = to_theirs(ours.state_dict(), family.rules(ours.config))
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(back[name], tensor), name
    made = family.config_to_theirs(ours.config)
    assert family.config_to_ours(made) == ours.config
    assert family.recognises(made, list(back))
    again = getattr(transformers, architecture)(transformers.PerceiverConfig(**made)).double().eval()
    again.load_state_dict(back)
    inputs = inputs_of(architecture)
    with torch.no_grad():
        assert_same(ours(inputs), theirs_of(architecture, again, inputs))


@pytest.mark.slow
def test_the_video_model_answers_for_a_subset_of_places_as_theirs() -> None:
    ours, theirs = models(family.VIDEO)
    inputs = inputs_of(family.VIDEO)
    places = {"audio": torch.tensor([5, 0, 3]), "image": torch.tensor([127, 0, 64, 9]), "label": None}
    wanted = theirs(inputs=inputs, subsampled_output_points=places).logits
    assert_same(ours(inputs, outputs=places), wanted)
    one = ours(inputs, outputs={"image": places["image"]})
    assert set(one) == {"image"}
    assert_same(one["image"], wanted["image"])


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "gelu_new"}, {"use_query_residual": False}, {"v_channels": 24, "qk_channels": 12}]
)
def test_variants_are_theirs(changes: dict[str, object]) -> None:
    ours, theirs = models(family.FOURIER, **changes)
    inputs = inputs_of(family.FOURIER)
    assert_same(ours(inputs), theirs(inputs=inputs).logits)


def test_what_their_code_has_fixed_is_refused() -> None:
    from dataclasses import replace

    from crossattention.models import perceiver

    config = perceiver.imagenet_conv()
    with pytest.raises(ValueError, match=r"inputs.padding='same', where theirs has 'transformers'"):
        family.config_to_theirs(replace(config, inputs=replace(config.inputs, padding="same")))
    with pytest.raises(ValueError, match=r"outputs.query_residual=False"):
        family.config_to_theirs(replace(config, outputs=replace(config.outputs, query_residual=False)))
    with pytest.raises(ValueError, match="architectures must name one of"):
        family.config_to_ours({"model_type": "perceiver"})
    with pytest.raises(ValueError, match=r"hidden_act must be one of gelu, .* got 'relu'"):
        family.config_to_ours({"architectures": [family.LANGUAGE], "hidden_act": "relu"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "count"),
    [
        (family.LANGUAGE, 201_108_230),
        (family.LEARNED, 62_255_848),
        (family.FOURIER, 48_440_627),
        (family.CONV, 48_646_522),
        (family.FLOW, 41_057_134),
        (family.VIDEO, 19_858_855),
    ],
)
def test_published_configurations_have_their_tensors_and_counts(architecture: str, count: int) -> None:
    from crossattention.models import perceiver

    presets = {
        family.LANGUAGE: perceiver.language,
        family.LEARNED: perceiver.imagenet_learned,
        family.FOURIER: perceiver.imagenet_fourier,
        family.CONV: perceiver.imagenet_conv,
        family.FLOW: perceiver.optical_flow,
        family.VIDEO: perceiver.multimodal,
    }
    with torch.device("meta"):
        ours = PerceiverIO(presets[architecture]())
        theirs = getattr(transformers, architecture)(transformers.PerceiverConfig(**family.config_to_theirs(ours.config)))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == count
    made = to_ours(theirs.state_dict(), family.rules(ours.config), ours.state_dict())
    assert {name: t.shape for name, t in made.items()} == {name: t.shape for name, t in ours.state_dict().items()}
