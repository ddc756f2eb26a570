"""Marian folders of every layout are our Transformer, ours are Marian's, and what cannot be is refused with the reason."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crossattention.checkpoints import transformer_marian
from crossattention.checkpoints.families import families_for, open_checkpoint, written
from crossattention.checkpoints.rules import to_ours, to_theirs
from crossattention.models.pretrained import load
from crossattention.models.transformer import Transformer, TransformerConfig

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 17, "decoder_vocab_size": 17, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
    "activation_function": "swish", "scale_embedding": True, "max_position_embeddings": 16, "init_std": 0.3,
    "pad_token_id": 16, "decoder_start_token_id": 16, "bos_token_id": 16, "eos_token_id": 0, "forced_eos_token_id": 0,
}  # fmt: skip
LAYOUTS = {
    "one vocabulary": {},
    "two vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 19},
    "nothing tied": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 19, "tie_word_embeddings": False},
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The library shows a bar while it loads."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def marian(**changes: Any) -> nn.Module:
    torch.manual_seed(3)
    model = transformers.MarianMTModel(transformers.MarianConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    return model


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    return torch.randint(1, 16, (2, 7), generator=generator), torch.randint(1, 16, (2, 5), generator=generator)


def logits_of_theirs(model: nn.Module) -> Tensor:
    source, target = inputs()
    with torch.no_grad():
        return model(input_ids=source, decoder_input_ids=target).logits


def logits_of_ours(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(*inputs())


def loaded_strictly(folder: Path, **keywords: Any) -> nn.Module:
    model, report = transformers.MarianMTModel.from_pretrained(folder, output_loading_info=True, **keywords)
    found = {name: list(value) for name, value in report.items() if value}
    assert not found, found
    return model.eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_marian_is_our_transformer_and_comes_back_strictly(tmp_path: Path, layout: str) -> None:
    theirs = marian(**LAYOUTS[layout])
    theirs.save_pretrained(tmp_path / "theirs")
    for ours in (load(tmp_path / "theirs"), Transformer.from_pretrained(tmp_path / "theirs" / "model.safetensors")):
        assert type(ours) is Transformer and not ours.training
        torch.testing.assert_close(logits_of_ours(ours), logits_of_theirs(theirs), atol=1e-5, rtol=1e-5)

    config, tensors = written(ours, families_for(ours, "huggingface")[0])
    again = transformers.MarianMTModel(transformers.MarianConfig(**config))
    again.load_state_dict(tensors, strict=True)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ours_loads_in_the_library_without_a_missing_or_unexpected_name(tmp_path: Path, layout: str) -> None:
    tied = {"one vocabulary": "all", "two vocabularies": "target", "nothing tied": "none"}[layout]
    for output_bias in (False, True):
        config = TransformerConfig(
            17, 17 if tied == "all" else 19, dim=24, heads=4, encoder_layers=2, decoder_layers=3, feed_forward_dim=40, tied=tied,
            output_bias=output_bias, max_length=16,
        )  # fmt: skip
        ours = Transformer(config).eval()
        their_config, tensors = written(ours, families_for(ours)[0])
        folder = tmp_path / str(output_bias)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(their_config))
        from crossattention.checkpoints.files import write_safetensors

        write_safetensors(folder / "model.safetensors", tensors)
        theirs = loaded_strictly(folder)
        torch.testing.assert_close(logits_of_theirs(theirs), logits_of_ours(ours), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits_of_ours(load(folder)), logits_of_ours(ours), atol=0, rtol=0)


def test_several_files_and_old_archives_are_read_alike(tmp_path: Path) -> None:
    theirs = marian()
    wanted = logits_of_theirs(theirs)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "archive").mkdir()
    theirs.config.save_pretrained(tmp_path / "archive")
    torch.save(theirs.state_dict(), tmp_path / "archive" / "pytorch_model.bin")
    for folder in ("shards", "archive"):
        torch.testing.assert_close(logits_of_ours(load(tmp_path / folder)), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_stored_dtype_is_kept_unless_another_is_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    marian().to(dtype).save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path).parameters()} == {dtype}
    assert {p.dtype for p in load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_a_model_without_its_head_is_read(tmp_path: Path) -> None:
    theirs = marian()
    theirs.model.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs.final_logits_bias.zero_()
    torch.testing.assert_close(logits_of_ours(load(tmp_path)), logits_of_theirs(theirs), atol=1e-5, rtol=1e-5)


def test_both_ways_give_the_same_numbers_to_the_bit() -> None:
    for tied in ("all", "target", "none"):
        config = replace(transformer_marian.config_to_ours(SIZES), tied=tied)
        ours = Transformer(config, dtype=torch.float64).state_dict()
        rules = transformer_marian.rules(config)
        back = to_ours(to_theirs(ours, rules), rules, ours)
        assert back.keys() == ours.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


def test_other_positions_than_the_paper_s_are_refused(tmp_path: Path) -> None:
    theirs = marian()
    theirs.config.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    weights["model.decoder.embed_positions.weight"] += 0.01
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"in use: model.decoder.embed_positions.weight would be ignored \(sines and cosines"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scale_embedding": False}, "scale_embedding is False, here it is True"),
        ({"activation_function": "gelu_new"}, "activation_function is 'gelu_new'"),
        ({"decoder_ffn_dim": 41}, "encoder_ffn_dim is 40 and decoder_ffn_dim 41"),
        ({"decoder_attention_heads": 2}, "encoder_attention_heads is 4 and decoder_attention_heads 2"),
        ({"activation_dropout": 0.1}, "activation_dropout is 0.1"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop is 0.1"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false with one vocabulary"),
        ({"eos_token_id": [0, 1]}, r"eos_token_id is \[0, 1\]"),
        ({"d_model": "24"}, "dim must be an integer"),
        ({"encoder_layers": None}, "encoder_layers must be an integer"),
    ],
)
def test_what_our_transformer_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian", **SIZES, **changes}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=reason):
        open_checkpoint(tmp_path)


def test_what_marian_cannot_be_is_refused() -> None:
    config = replace(transformer_marian.config_to_ours(SIZES), norm="pre", positions="learned", norm_eps=1e-6)
    with pytest.raises(ValueError, match=r"(?s)norm is 'pre'.*positions is 'learned'.*norm_eps is 1e-06"):
        transformer_marian.config_to_theirs(config)


def test_a_folder_that_lacks_and_adds_names_lists_them_all(tmp_path: Path) -> None:
    marian().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.encoder.layers.1.fc1.bias"]
    weights["model.decoder.layers.3.fc1.bias"] = torch.zeros(40)
    weights["model.decoder.layers.0.fc1.bias"] = torch.zeros(41)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "missing: model.encoder.layers.1.fc1.bias (40,)",
        "unexpected: model.decoder.layers.3.fc1.bias (40,)",
        "misshapen: model.decoder.layers.0.fc1.bias is (41,), the model's is (40,)",
    ]
