"""Folders of Hugging Face's BERTs become ours and ours theirs: every class, strictly, both ways."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import transformers

from bert_models import BEGIN, END, PAD, VOCAB, decoder_config, their_config, their_model, their_pair
from crossattention.checkpoints import bert_huggingface as family
from crossattention.checkpoints.families import families_for, written
from crossattention.models import BertDecoder, BertEncoder, BertMaskedLM, EncoderDecoder, Transformer, TransformerConfig, load

MODELS = {
    "BertModel": (lambda: their_model("BertModel", their_config(), dtype=torch.float32), BertEncoder),
    "BertModel without pooler": (
        lambda: their_model("BertModel", their_config(), dtype=torch.float32, add_pooling_layer=False),
        BertEncoder,
    ),
    "BertModel as decoder": (
        lambda: their_model("BertModel", decoder_config(), dtype=torch.float32, add_pooling_layer=False),
        BertDecoder,
    ),
    "BertForMaskedLM": (lambda: their_model("BertForMaskedLM", their_config(), dtype=torch.float32), BertMaskedLM),
    "BertForMaskedLM untied": (
        lambda: their_model("BertForMaskedLM", their_config(tie_word_embeddings=False), dtype=torch.float32),
        BertMaskedLM,
    ),
    "BertLMHeadModel": (lambda: their_model("BertLMHeadModel", decoder_config(), dtype=torch.float32), BertDecoder),
    "BertLMHeadModel alone": (
        lambda: their_model("BertLMHeadModel", decoder_config(add_cross_attention=False), dtype=torch.float32),
        BertDecoder,
    ),
    "EncoderDecoderModel": (lambda: their_pair(dtype=torch.float32), EncoderDecoder),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_read_and_what_is_written_of_it_loads_in_the_reference(name: str, tmp_path: Path) -> None:
    make, ours_class = MODELS[name]
    theirs = make()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert type(ours) is ours_class
    [found] = families_for(ours, "huggingface")
    config, tensors = written(ours, found)
    (tmp_path / "written").mkdir()
    (tmp_path / "written" / "config.json").write_text(json.dumps(config))
    save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "written" / "model.safetensors", {"format": "pt"})
    kwargs = {"add_pooling_layer": False} if type(theirs).__name__ == "BertModel" and theirs.pooler is None else {}
    again, info = type(theirs).from_pretrained(tmp_path / "written", output_loading_info=True, **kwargs)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    before = theirs.state_dict()
    unread = {n for n in before if "cls.predictions.bias" in n and "untied" in name}
    assert all(torch.equal(again.state_dict()[n], tensor) for n, tensor in before.items() if n not in unread)
    back = load(tmp_path / "written")
    assert back.config == ours.config
    assert all(torch.equal(back.state_dict()[n], tensor) for n, tensor in ours.state_dict().items())


def test_a_pretraining_checkpoint_leaves_two_heads_behind_and_old_names_are_read(tmp_path: Path) -> None:
    theirs = their_model("BertForPreTraining", their_config(), dtype=torch.float32)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(20)[None]
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    ours = load(tmp_path)
    ids = torch.randint(3, VOCAB, (2, 5))
    torch.testing.assert_close(ours(ids), theirs(ids).prediction_logits, atol=1e-5, rtol=1e-5)


def test_an_encoder_is_read_from_under_a_head(tmp_path: Path) -> None:
    for name in ("BertForMaskedLM", "BertForPreTraining"):
        theirs = their_model(name, their_config(), dtype=torch.float32)
        theirs.save_pretrained(tmp_path / name)
        ours = BertEncoder.from_pretrained(tmp_path / name)
        ids = torch.randint(3, VOCAB, (2, 5))
        expected = theirs.bert(ids)
        torch.testing.assert_close(ours(ids), expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        assert ours.config.pooler == (name == "BertForPreTraining")
    their_model("BertLMHeadModel", decoder_config(), dtype=torch.float32).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match=r"holds a BertDecoder .*, not a BertEncoder"):
        BertEncoder.from_pretrained(tmp_path / "decoder")


def our_decoder_config() -> Any:
    return family.config_to_ours(decoder_config().to_dict(), names=["cls.predictions.bias"], model_class=BertDecoder)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    their_model("BertModel", their_config(), dtype=torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    tensors["encoder.layer.7.output.dense.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"(?s)missing: encoder.layer.1.output.dense.bias.*unexpected: encoder.layer.7.output.dense.bias"
    ):
        load(tmp_path)


def test_an_encoder_without_pooler_can_be_read_as_their_encoder(tmp_path: Path) -> None:
    encoder = family.config_to_ours(their_config().to_dict(), names=(), model_class=BertEncoder)
    ours = EncoderDecoder(BertEncoder(encoder), BertDecoder(our_decoder_config())).eval()
    config, tensors = written(ours, families_for(ours, "huggingface")[0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    theirs, info = transformers.EncoderDecoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    source, target = torch.randint(3, VOCAB, (2, 6)), torch.randint(3, VOCAB, (2, 4))
    expected = theirs.eval()(input_ids=source, decoder_input_ids=target).logits
    torch.testing.assert_close(ours(source, target), expected, atol=1e-4, rtol=1e-4)
    assert (theirs.config.decoder_start_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (BEGIN, END, PAD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key': positions are absolute here"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id is \[2, 3\]: one symbol is needed"),
        ({"architectures": ["BertForQuestionAnswering"]}, r"architectures must name one of BertModel, .*BertForQuestionAnswering"),
    ],
)
def test_what_ours_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config = {**their_config().to_dict(), "architectures": ["BertModel"], **changes}
        family.config_to_ours(config, names=(), model_class=family.model_class(config, (), None))


def test_what_theirs_cannot_be_is_refused() -> None:
    config = our_decoder_config()
    with pytest.raises(ValueError, match="context_dim is 18 and dim 24: theirs reads states of its own width"):
        family.config_to_theirs(replace(config, context_dim=18), model_class=BertDecoder)
    with pytest.raises(ValueError, match="causal is False"):
        family.config_to_theirs(replace(config, causal=False), model_class=BertDecoder)
    transformer = Transformer(TransformerConfig(9, 9, dim=24, heads=2, encoder_layers=1, decoder_layers=1, feed_forward_dim=8))
    mixed = EncoderDecoder(transformer, BertDecoder(config))
    with pytest.raises(ValueError, match="the encoder is of the family 'transformer'"):
        family.config_to_theirs(mixed.config, model_class=EncoderDecoder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 10**30),
        ("intermediate_size", 10**18),
        ("architectures", 5),
        ("hidden_act", ["gelu"]),
        ("layer_norm_eps", "no"),
        ("is_decoder", "yes"),
        ("hidden_dropout_prob", None),
    ],
)
def test_a_config_with_a_value_of_another_kind_is_named(tmp_path: Path, field: str, value: object) -> None:
    their_model("BertModel", their_config(), dtype=torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=tmp_path.name):
        load(tmp_path)


def test_a_pair_whose_halves_are_no_configs_is_named(tmp_path: Path) -> None:
    their_pair(dtype=torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder": "bert"}))
    with pytest.raises(ValueError, match=tmp_path.name):
        load(tmp_path)
