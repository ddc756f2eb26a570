"""timm's CrossVit folders and files are our models, and ours are theirs, strictly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossattention.checkpoints.convert import convert
from crossattention.checkpoints.crossvit_timm import ARCHITECTURES, config_from_shapes, config_to_ours, config_to_theirs, rules
from crossattention.checkpoints.files import write_json
from crossattention.checkpoints.rules import to_theirs
from crossattention.models import crossvit, load
from crossattention.models.crossvit import CrossViT, CrossViTConfig

timm = pytest.importorskip("timm", reason="the reference, in the extra test")

CONFIG = CrossViTConfig(
    classes=7, image_size=(36, 72), scales=(1.0, 8 / 9), dims=(8, 12), heads=(2, 3), layers=(1, 2), encoders=2, stem="convolutions"
)


@pytest.fixture
def ours() -> CrossViT:
    torch.manual_seed(0)
    return CrossViT(CONFIG).eval()


def test_a_folder_goes_there_and_back(ours: CrossViT, tmp_path: Path) -> None:
    convert(ours.save_pretrained(tmp_path / "ours"), tmp_path / "theirs", to="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    images = torch.randn(2, 3, 36, 72)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), atol=1e-5, rtol=1e-5)
    theirs.load_state_dict(load_file(tmp_path / "theirs" / "model.safetensors"), strict=True)
    again = load(tmp_path / "theirs")
    assert again.config == CONFIG
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_what_timm_saves_is_read_whatever_the_file(ours: CrossViT, tmp_path: Path) -> None:
    from timm.models import save_for_hf

    config = config_to_theirs(CONFIG)
    arguments = {**config["model_args"], "img_size": CONFIG.image_size, "num_classes": 7}
    theirs = timm.create_model(config["architecture"], **arguments).eval()
    images = torch.randn(1, 3, 36, 72)
    for safe in (True, False):
        folder = tmp_path / str(safe)
        save_for_hf(
            theirs, str(folder), model_args={**config["model_args"], "img_size": CONFIG.image_size}, safe_serialization=safe
        )
        with torch.no_grad():
            torch.testing.assert_close(load(folder)(images), theirs(images), atol=1e-5, rtol=1e-5)


def test_one_error_lists_missing_unexpected_and_misshapen(ours: CrossViT, tmp_path: Path) -> None:
    tensors = to_theirs(ours.state_dict(), rules(CONFIG))
    tensors["blocks.0.fusion.0.attn.wz.weight"] = tensors.pop("blocks.0.fusion.0.attn.wq.weight")
    tensors["head.1.bias"] = torch.zeros(9)
    save_file(tensors, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", config_to_theirs(CONFIG))
    with pytest.raises(ValueError, match="do not fit") as caught:
        load(tmp_path)
    for line in (
        "missing: blocks.0.fusion.0.attn.wq.weight (12, 12)",
        "unexpected: blocks.0.fusion.0.attn.wz.weight (12, 12)",
        "misshapen: head.1.bias is (9,), the model's is (7,)",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_variant_is_told_by_its_shapes_and_named_on_the_way_back(name: str) -> None:
    config = getattr(crossvit, name)(classes=11)
    with torch.device("meta"):
        tensors = to_theirs(CrossViT(config).state_dict(), rules(config))
    shapes = {key.replace("pos_embed_", "pos_embed."): tuple(tensor.shape) for key, tensor in tensors.items()}
    assert config_to_ours(config_from_shapes(shapes)) == config
    theirs = config_to_theirs(config)
    assert theirs["architecture"] == name
    assert "model_args" not in theirs
    assert config_to_ours(theirs) == config
    changed = replace(config, stochastic_depth=0.1, image_size=(240, 480))
    assert config_to_ours(config_to_theirs(changed)) == changed


def test_the_authors_names_with_dots_are_read(ours: CrossViT, tmp_path: Path) -> None:
    tensors = to_theirs(ours.state_dict(), rules(CONFIG))
    dotted = {
        name.replace("embed_", "embed.") if "pos_" in name else name.replace("token_", "token."): t for name, t in tensors.items()
    }
    assert "cls_token.1" in dotted
    torch.save({"model": dotted}, tmp_path / "crossvit.pth")
    write_json(tmp_path / "config.json", config_to_theirs(CONFIG))
    images = torch.randn(1, 3, 36, 72)
    assert torch.equal(load(tmp_path / "crossvit.pth")(images), ours(images))


def test_a_bare_file_of_no_variant_is_refused_with_the_reason(ours: CrossViT, tmp_path: Path) -> None:
    save_file(to_theirs(ours.state_dict(), rules(CONFIG)), tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match=r"\(1, 19, 8\) and \(1, 9, 12\) are of no variant .* config.json"):
        load(tmp_path / "some.safetensors")


def test_what_only_timm_can_be_is_refused_with_every_reason() -> None:
    arguments = {"depth": [[1, 4, 2], [1, 3, 0]], "mlp_ratio": [4, 3, 1], "global_pool": "avg", "qkv_bias": False, "some": 1}
    with pytest.raises(ValueError, match="cannot be a CrossViT") as caught:
        config_to_ours({"architecture": "crossvit_9_240", "model_args": arguments, "num_classes": 0})
    for reason in ("all encoders are alike", "one fusion each way", "mlp_ratio is", "global_pool is 'avg'", "qkv_bias is False"):
        assert reason in str(caught.value)
    assert "some is 1" in str(caught.value)
    assert "num_classes is 0" in str(caught.value)
    with pytest.raises(ValueError, match="got 'crossvit_7'"):
        config_to_ours({"architecture": "crossvit_7"})
    with pytest.raises(ValueError, match=r"norm_eps is 0\.1"):
        config_to_theirs(replace(CONFIG, norm_eps=0.1))
