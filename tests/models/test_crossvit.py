"""CrossViT: what it refuses, what it does not compute, saving and loading, recording. Parity with timm: parity/."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crossattention import Plan, attention_map, record_attention
from crossattention.attention import CrossAttention
from crossattention.models import load
from crossattention.models.crossvit import CrossViT, CrossViTConfig, StochasticDepth, crossvit_9_dagger_240
from tolerances import assert_close

CONFIG = CrossViTConfig(
    classes=5, image_size=(40, 32), scales=(1.0, 0.8), patch_sizes=(8, 16), dims=(8, 12), heads=(2, 3), layers=(1, 2), encoders=2
)


def small(config: CrossViTConfig = CONFIG) -> CrossViT:
    torch.manual_seed(0)
    return CrossViT(config).double().eval()


def images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 40, 32, dtype=torch.float64, generator=torch.Generator(torch.get_default_device()).manual_seed(1))


def test_the_logits_are_the_mean_of_both_branches() -> None:
    model = small()
    first, second = model.branch_logits(images())
    assert_close(model(images()), (first + second) / 2)
    assert not torch.allclose(first, second)


def test_sizes_of_branches_and_grids() -> None:
    assert CONFIG.branch_sizes == ((40, 32), (32, 25))
    assert CONFIG.grids == ((5, 4), (2, 1))
    assert crossvit_9_dagger_240().grids == ((20, 20), (14, 14))
    assert CrossViTConfig(image_size=48).image_size == (48, 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": (3, 3)}, r"heads=\(3, 3\) for dims=\(8, 12\)"),
        ({"dims": (8,)}, r"dims must be a pair of integers of at least 1, got \(8,\)"),
        ({"layers": (1, 0)}, r"layers must be a pair .* got \(1, 0\)"),
        ({"classes": 0}, "classes must be an integer of at least 1, got 0"),
        ({"stem": "patches"}, "got 'patches'"),
        ({"stem": "convolutions"}, r"patches of 12 and 16, got \[8\]"),
        ({"image_size": 12}, "sees 9 x 9 pixels has no patch of 16"),
        ({"stochastic_depth": 1.0}, r"stochastic_depth must be in \[0, 1\), got 1.0"),
        ({"scales": (1.0, -0.5)}, r"scales must be a pair of numbers above 0, got \(1.0, -0.5\)"),
        ({"feed_forward_ratio": 0.1}, "leaves no width"),
    ],
)
def test_a_config_that_fits_nothing_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_images_that_do_not_fit_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"\(batch, 3, 40, 32\).* got shape \(3, 3, 32, 40\)"):
        model(images().transpose(2, 3))
    with pytest.raises(ValueError, match=r"torch.float32 but the model's weights are torch.float64"):
        model(images().float())
    with pytest.raises(TypeError, match="got list"):
        model([1])
    with pytest.raises(TypeError, match="got dict"):
        CrossViT({})


def test_a_fusion_projects_none_of_the_patches() -> None:
    model, plans = small(), []
    for module in model.modules():
        if isinstance(module, CrossAttention):
            run = module._attend
            module._attend = lambda a, prepared, *rest, run=run: plans.append(prepared.plan) or run(a, prepared, *rest)
    absorbed = model(images())
    assert [(plan.scores, plan.values) for plan in plans] == [("context", "context")] * 4
    for module in model.modules():
        if isinstance(module, CrossAttention):
            module.plan = "textbook"
    assert_close(model(images()), absorbed)
    assert plans[-1] == Plan("head", "head")


def test_the_sublayers_run_on_the_images_that_are_kept_and_on_no_others() -> None:
    residual, seen = StochasticDepth(0.5).train(), []
    x = torch.randn(64, 3, 4, requires_grad=True)
    torch.manual_seed(0)
    out = residual(x, lambda rows: seen.append(len(rows)) or rows.exp())
    kept = (out != x).any(2).any(1)
    assert seen == [int(kept.sum())]
    assert 0 < seen[0] < 64
    assert_close(out[kept], (x + 2.0 * x.exp())[kept])
    assert_close(residual.eval()(x, torch.exp), x + x.exp())


def test_an_image_left_out_everywhere_still_gives_every_parameter_a_gradient() -> None:
    model = small(replace(CONFIG, stochastic_depth=0.999)).train()
    torch.manual_seed(0)
    model(images(1)).sum().backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_no_images_give_no_logits() -> None:
    assert small()(images(0)).shape == (0, 5)


def test_it_is_saved_and_loaded_by_its_family(tmp_path: Path) -> None:
    model = small()
    found = load(model.save_pretrained(tmp_path / "model"))
    assert isinstance(found, CrossViT)
    assert found.config == CONFIG
    assert_close(found(images()), model(images()))


def test_recording_sees_both_fusions_of_each_encoder_and_their_maps_are_the_layers() -> None:
    model = small()
    calls = []
    fusions = [fusion.attention for encoder in model.encoders for fusion in encoder.fusions]
    hooks = [layer.register_forward_pre_hook(lambda layer, args: calls.append((layer, args))) for layer in fusions]
    with torch.no_grad(), record_attention(model) as seen:
        recorded = model(images())
    for hook in hooks:
        hook.remove()
    assert_close(recorded, model(images()))
    assert list(seen.layers) == [f"encoders.{k}.fusions.{i}.attention" for k in (0, 1) for i in (0, 1)]
    for name, (layer, (queries, tokens)) in zip(seen.layers, calls, strict=True):
        weights = attention_map(layer, queries, tokens)
        patches = CONFIG.grids[1 - int(name.split(".")[3])]
        assert weights.shape == (3, layer.heads, 1, 1 + patches[0] * patches[1])
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_autocast_and_bfloat16_run() -> None:
    model = small().float()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16), torch.no_grad():
        cast = model(images().float())
    assert torch.allclose(cast.float(), model(images().float()), atol=5e-2)
    assert model.bfloat16()(images().bfloat16()).dtype == torch.bfloat16
