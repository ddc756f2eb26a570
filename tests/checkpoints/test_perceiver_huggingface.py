"""Perceiver folders of `transformers` are our models, and ours are theirs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from crossattention.checkpoints.families import families_for, open_checkpoint, written
from crossattention.checkpoints.files import write_json
from crossattention.models.perceiver import PerceiverIO, PerceiverIOConfig
from crossattention.models.perceiver_adapters import ClassOutput, ImageInput

transformers = pytest.importorskip("transformers")

CONFIG = PerceiverIOConfig(
    ImageInput(stem="conv"), ClassOutput(7), num_latents=5, latent_dim=24, layers_per_block=2, cross_heads=1, self_heads=3
)


def test_a_folder_goes_there_and_back(tmp_path: Path) -> None:
    ours = PerceiverIO(CONFIG).eval()
    (family,) = families_for(ours, "huggingface")
    config, tensors = written(ours, family)
    (tmp_path / "theirs").mkdir()
    write_json(tmp_path / "theirs" / "config.json", config)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs" / "model.safetensors", {"format": "pt"}
    )
    theirs, told = transformers.PerceiverForImageClassificationConvProcessing.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.train()(inputs=torch.randn(2, 3, 20, 24))  # counts a batch
    theirs.eval().save_pretrained(tmp_path / "again")
    again, fit = open_checkpoint(tmp_path / "again").build()
    assert again.config == ours.config
    assert list(fit.ignored) == ["perceiver.input_preprocessor.convnet.batchnorm.num_batches_tracked"]
    images = torch.randn(2, 3, 20, 24)
    with torch.no_grad():
        torch.testing.assert_close(again(images), theirs(inputs=images).logits, atol=1e-4, rtol=1e-4)
