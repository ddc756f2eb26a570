"""Conversion of folders: both ways, whole or not at all, nothing replaced unasked."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossattention.checkpoints import convert as convert_file
from crossattention.checkpoints.convert import convert
from crossattention.checkpoints.families import families_for, written
from crossattention.checkpoints.files import write_json, write_safetensors
from crossattention.models.pretrained import load
from crossattention.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    17, 17, dim=8, heads=2, encoder_layers=1, decoder_layers=2, feed_forward_dim=12, max_length=16, output_bias=True
)


def marian_folder(path: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """A folder as transformers writes it, of random weights, and our model of it."""
    torch.manual_seed(0)
    model = Transformer(CONFIG, dtype=dtype).eval()
    config, tensors = written(model, families_for(model)[0])
    path.mkdir()
    write_json(path / "config.json", config)
    write_safetensors(path / "model.safetensors", tensors)
    return model


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_give_the_same_file_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = marian_folder(tmp_path / "theirs", dtype)
    done = convert(tmp_path / "theirs", tmp_path / "deep" / "ours")
    assert same(load(tmp_path / "deep" / "ours"), model)
    back = convert(tmp_path / "deep" / "ours", tmp_path / "back")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("back", "theirs")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert (tmp_path / "back" / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()
    assert (done.source_format, done.target_format, done.family) == ("huggingface", "crossattention", "transformer_marian")
    assert (back.source_format, back.target_format, back.model) == ("crossattention", "huggingface", "Transformer")
    assert done.dtypes == {str(dtype).removeprefix("torch."): len(model.state_dict())}
    assert done.parameters == sum(p.numel() for p in model.parameters())
    assert (("final_logits_bias",), ("out_bias",)) in done.names
    assert (("out_bias",), ("final_logits_bias",)) in back.names
    assert set(done.ignored) == {f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "deep", "theirs"]


def test_another_dtype_is_written_where_asked(tmp_path: Path) -> None:
    marian_folder(tmp_path / "theirs")
    assert set(convert(tmp_path / "theirs", tmp_path / "ours", dtype=torch.float16).dtypes) == {"float16"}
    assert {p.dtype for p in load(tmp_path / "ours").parameters()} == {torch.float16}


def test_a_file_and_a_run_and_one_library_s_own_format_are_sources_too(tmp_path: Path) -> None:
    model = marian_folder(tmp_path / "theirs")
    convert(tmp_path / "theirs" / "model.safetensors", tmp_path / "ours")
    assert same(load(tmp_path / "ours"), model)
    model.save_pretrained(tmp_path / "run" / "best")
    convert(tmp_path / "run", tmp_path / "of_run")
    torch.save(load_file(tmp_path / "theirs" / "model.safetensors"), tmp_path / "theirs" / "pytorch_model.bin")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    convert(tmp_path / "theirs", tmp_path / "safe", to="huggingface")
    for name in ("of_run", "safe"):
        assert same(load(tmp_path / name), model)


def test_the_account_counts_progress_up_to_all(tmp_path: Path) -> None:
    model = marian_folder(tmp_path / "theirs")
    told: list[tuple[int, int]] = []
    convert(tmp_path / "theirs", tmp_path / "ours", on_progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == sum(t.numel() for t in model.state_dict().values())


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    model = marian_folder(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(ValueError, match=r"ours exists already; name another folder, or say --overwrite"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    torch.manual_seed(1)
    Transformer(CONFIG).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "theirs", tmp_path / "ours", overwrite=True)
    assert same(load(tmp_path / "ours"), model)


@pytest.mark.parametrize("held", ["notes.txt", "sub"])
def test_what_is_no_model_folder_is_never_replaced(tmp_path: Path, held: str) -> None:
    marian_folder(tmp_path / "theirs")
    marian_folder(tmp_path / "mine") if held == "sub" else (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / held).mkdir() if held == "sub" else (tmp_path / "mine" / held).write_text("dear")
    with pytest.raises(ValueError, match="mine is no model folder"):
        convert(tmp_path / "theirs", tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / held).exists()


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    marian_folder(tmp_path / "theirs")
    for source in (tmp_path / "theirs", tmp_path / "theirs" / "model.safetensors"):
        with pytest.raises(ValueError, match="holds the source"):
            convert(source, tmp_path / "theirs", overwrite=True)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marian_folder(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(convert_file, "write_safetensors", full)
    with pytest.raises(OSError, match="no space"):
        convert(tmp_path / "ours", tmp_path / "new" / "back")
    assert list((tmp_path / "new").iterdir()) == []


def test_formats_that_the_model_cannot_have_are_refused(tmp_path: Path) -> None:
    marian_folder(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(ValueError, match="is a model folder of crossattention already"):
        convert(tmp_path / "ours", tmp_path / "x", to="crossattention")
    with pytest.raises(
        ValueError, match=r"(?s)a Transformer cannot be written for timm: .*written for huggingface.*transformer_marian: "
    ):
        convert(tmp_path / "ours", tmp_path / "x", to="timm")
    with pytest.raises(ValueError, match="to must be one of crossattention, huggingface, timm, torch, got 'jax'"):
        convert(tmp_path / "ours", tmp_path / "x", to="jax")
    Transformer(TransformerConfig(9, 9, dim=8, heads=2, norm="pre")).save_pretrained(tmp_path / "pre")
    with pytest.raises(ValueError, match="norm is 'pre', Marian's is 'post'"):
        convert(tmp_path / "pre", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_unknown_model_is_refused_with_the_known_families(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    message = r"(?s)\(model_type 'llama', architectures \['LlamaForCausalLM'\]\) is of no known family.*\n  transformer_marian: "
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "x")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"1 names such as w and no config.json beside it\) is of no known family"):
        convert(tmp_path / "model.safetensors", tmp_path / "x")
