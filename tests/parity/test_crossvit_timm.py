"""CrossViT against timm's with the same weights: both branches' logits, gradients, sizes of images, stochastic depth."""

import pytest
import torch
from torch import Tensor, nn

import crossvit_weights as weights
from crossattention.models import crossvit
from crossattention.models.crossvit import CrossViT, CrossViTConfig

timm = pytest.importorskip("timm", reason="the reference, in the extra test")

TINY = CrossViTConfig(
    classes=7, image_size=(48, 36), scales=(1.0, 8 / 9), patch_sizes=(12, 16), dims=(8, 12), heads=(2, 3), layers=(1, 2), encoders=2
)
VARIANTS = (
    "crossvit_tiny_240",
    "crossvit_small_240",
    "crossvit_base_240",
    "crossvit_9_240",
    "crossvit_15_240",
    "crossvit_18_240",
    "crossvit_9_dagger_240",
    "crossvit_15_dagger_240",
    "crossvit_15_dagger_408",
    "crossvit_18_dagger_240",
    "crossvit_18_dagger_408",
)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


def pair(config: CrossViTConfig, dtype: torch.dtype, theirs: nn.Module | None = None) -> tuple[CrossViT, nn.Module]:
    """Ours and timm's with the same weights, none of them as a new model has them."""
    torch.manual_seed(1)
    ours = CrossViT(config).to(dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs = (weights.timm_model(config) if theirs is None else theirs).to(dtype)
    theirs.load_state_dict(weights.named(ours))
    return ours.eval(), theirs.eval()


def images_for(config: CrossViTConfig, dtype: torch.dtype, batch: int = 2) -> Tensor:
    return torch.randn(
        batch,
        config.channels,
        *config.image_size,
        dtype=dtype,
        generator=torch.Generator(torch.get_default_device()).manual_seed(2),
    )


def branches_of(theirs: nn.Module, images: Tensor) -> list[Tensor]:
    return [head(x[:, 0]) for head, x in zip(theirs.head, theirs.forward_features(images), strict=True)]


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stem": "convolutions", "channels": 1, "image_size": (36, 72)},
        {"image_size": (60, 120), "scales": (1.0, 0.8), "patch_sizes": (6, 16), "layers": (2, 2), "encoders": 1},
        {"image_size": 50, "scales": (0.97, 1.0), "patch_sizes": (24, 25)},  # sides that are no multiples of a patch
        {"image_size": 32, "scales": (1.5, 1.0), "patch_sizes": (8, 16), "feed_forward_ratio": 2.5},
    ],
)
def test_logits_and_gradients_are_those_of_timm(changes: dict, dtype: torch.dtype) -> None:
    config = CrossViTConfig(**{**TINY.__dict__, **changes})
    ours, theirs = pair(config, dtype)
    images = images_for(config, dtype).requires_grad_()
    again = images.detach().clone().requires_grad_()
    branches, expected = ours.branch_logits(images), branches_of(theirs, again)
    for mine, its in zip(branches, expected, strict=True):
        assert_near(mine, its, dtype)
    assert_near(ours(images), theirs(again), dtype)
    weight = torch.randn(2, config.classes, dtype=dtype)
    (ours(images) * weight).sum().backward()
    (theirs(again) * weight).sum().backward()
    assert_near(images.grad, again.grad, dtype)
    found = weights.named(ours, "grad")
    for name, parameter in theirs.named_parameters():
        if name.endswith("attn.wk.bias"):  # cancels in the softmax: what timm has there is rounding
            torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), atol=1e-5, rtol=0.0)
        assert_near(found[name], parameter.grad, dtype)


@pytest.mark.parametrize("seed", range(3))
def test_stochastic_depth_leaves_out_the_same_images_as_timm_for_the_same_seed(seed: int) -> None:
    config = CrossViTConfig(**{**TINY.__dict__, "stochastic_depth": 0.7})
    ours, theirs = pair(config, torch.float64)
    images = images_for(config, torch.float64, batch=5)
    outs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(seed)
        out = model(images)
        out.square().sum().backward()
        outs.append(out)
    assert_near(outs[0], outs[1], torch.float64)
    found = weights.named(ours, "grad")
    for name, parameter in theirs.named_parameters():
        assert_near(found[name], parameter.grad, torch.float64)
    torch.manual_seed(seed + 1)
    assert not torch.allclose(ours(images), outs[0])


@pytest.mark.slow
def test_presets_have_the_sizes_and_parameters_of_every_variant_that_timm_registers() -> None:
    assert set(timm.list_models("crossvit*")) == set(VARIANTS)
    for name in VARIANTS:
        with torch.device("meta"):
            ours = CrossViT(getattr(crossvit, name)())
            expected = timm.create_model(name).state_dict()
            found = weights.named(ours)
        assert {key: tensor.shape for key, tensor in found.items()} == {key: tensor.shape for key, tensor in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_gives_the_logits_of_timm(name: str, dtype: torch.dtype) -> None:
    config = getattr(crossvit, name)()
    ours, theirs = pair(config, dtype, timm.create_model(name))
    with torch.no_grad():
        images = images_for(config, dtype, batch=1)
        for mine, its in zip(ours.branch_logits(images), branches_of(theirs, images), strict=True):
            assert_near(mine, its, dtype)
        assert_near(ours(images), theirs(images), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("size", [120, (240, 360), 480])
def test_other_image_sizes_give_the_logits_of_timm(size: int | tuple[int, int]) -> None:
    config = crossvit.crossvit_9_240(image_size=size)
    ours, theirs = pair(config, torch.float64, timm.create_model("crossvit_9_240", img_size=size))
    with torch.no_grad():
        images = images_for(config, torch.float64, batch=1)
        assert_near(ours(images), theirs(images), torch.float64)
