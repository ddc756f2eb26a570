"""Model folders: what goes in comes out, whole or not at all, and what is wrong is named."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crossattention.checkpoints.files import read_safetensors, write_safetensors
from crossattention.models import pretrained
from crossattention.models.pretrained import FAMILIES, load
from crossattention.models.transformer import Transformer, TransformerConfig

TINY = TransformerConfig(11, 13, dim=8, heads=2, encoder_layers=1, decoder_layers=1, feed_forward_dim=12, tied="target", norm="pre")


def saved(folder: Path, config: TransformerConfig = TINY) -> Transformer:
    model = Transformer(config).eval()
    model.save_pretrained(folder)
    return model


def logits(model: torch.nn.Module) -> Tensor:
    return model(torch.tensor([[3, 4, 5]]), torch.tensor([[1, 7]]))


def rewrite_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite_weights(folder: Path, **changes: Tensor | None) -> None:
    weights = read_safetensors(folder / "model.safetensors")
    for name, tensor in changes.items():
        weights[name.replace("__", ".")] = tensor
    write_safetensors(folder / "model.safetensors", {n: t for n, t in weights.items() if t is not None})


@pytest.mark.parametrize("tied", ["all", "target", "none"])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_a_saved_model_comes_back_the_same(tmp_path: Path, tied: str, positions: str) -> None:
    config = replace(TINY, source_vocab_size=13, tied=tied, positions=positions, max_length=4)
    model = saved(tmp_path / "new" / "model", config)
    for loaded in (Transformer.from_pretrained(tmp_path / "new" / "model"), load(str(tmp_path / "new" / "model"))):
        assert type(loaded) is Transformer
        assert loaded.config == config
        assert not loaded.training
        assert torch.equal(logits(loaded), logits(model))


def test_the_folder_holds_the_family_the_version_and_the_config_as_json(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["family"] == "transformer"
    assert content["format_version"] == 1
    assert content["config"]["feed_forward_dim"] == 12


def test_the_dtype_is_the_stored_one_unless_another_is_asked_for(tmp_path: Path) -> None:
    Transformer(TINY, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    assert {p.dtype for p in load(tmp_path / "model").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path / "model", dtype=torch.float64).parameters()} == {torch.float64}


def test_a_loaded_model_trains_on(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    model = load(tmp_path / "model").train()
    logits(model).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_saving_over_a_model_replaces_it_and_leaves_other_files_alone(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "task.json").write_text("{}")
    for config in (TINY, replace(TINY, activation="gelu")):
        model = saved(tmp_path, config)
        assert torch.equal(logits(load(tmp_path)), logits(model))
        assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors", "task.json"]


def test_saving_that_fails_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossattention.checkpoints import files

    model = saved(tmp_path / "model")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", full)
    for config in (TINY, replace(TINY, activation="gelu")):
        with pytest.raises(OSError, match="no space left"):
            Transformer(config).save_pretrained(tmp_path / "model")
        assert torch.equal(logits(load(tmp_path / "model")), logits(model))
        with pytest.raises(OSError, match="no space left"):
            Transformer(config).save_pretrained(tmp_path / "other")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_kill_while_another_config_is_saved_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrained.os, "replace", lambda a, b: killed() if str(b).endswith("config.json") else os.rename(a, b))
        with pytest.raises(KeyboardInterrupt):
            Transformer(replace(TINY, activation="gelu")).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no model: config.json is missing"):
        load(tmp_path)


def test_a_model_is_not_saved_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match="model is a file"):
        Transformer(TINY).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


# -------------------------------------------------------------------------------------------------------- refusals


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no model: config.json and model.safetensors are missing"):
        load(tmp_path)
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model: model.safetensors is missing"):
        Transformer.from_pretrained(tmp_path)


def test_a_name_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent, and it is no id"):
        load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="there is no folder g2p, and it is no id"):
        load("g2p")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file; name the folder"):
        load(tmp_path / "file")


def test_weights_that_do_not_fit_are_named_all_at_once(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite_weights(
        tmp_path,
        encoder__norm__weight=None,
        decoder__norm__bias=torch.zeros(9),
        decoder__layers__7__extra=torch.zeros(1),
    )
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "missing: encoder.norm.weight\n" in message
    assert "unexpected: decoder.layers.7.extra\n" in message
    assert "misshapen: decoder.norm.bias is (9,), the model's is (8,)" in message
    assert len(message.splitlines()) == 4


def test_another_family_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite_config(tmp_path, family="gpt")
    with pytest.raises(ValueError, match='family "gpt", not "transformer"'):
        Transformer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'family "gpt"; known are .*transformer'):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2, this version of crossattention reads up to 1"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"config": None}, "not the config of a model of this project"),
        ({"config": {"wings": 2, "heads": 2}}, "fields that TransformerConfig does not know: wings"),
        ({"config": {"heads": 2}}, r"does not describe a Transformer: .*source_vocab_size"),
        ({"config": {"source_vocab_size": 9, "target_vocab_size": 9, "heads": 3}}, "heads must divide dim"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    saved(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: .* cut short"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"family": ')
    with pytest.raises(ValueError, match=r"config.json is damaged or no JSON"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------------------- hub


def test_an_id_is_looked_up_on_the_hub_for_the_config_and_safetensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model = saved(tmp_path / "snapshot")
    asked = []

    def snapshot_download(name: str, **keywords: object) -> str:
        asked.append((name, keywords))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = Transformer.from_pretrained("someone/pronounces", revision="v1")
    assert torch.equal(logits(loaded), logits(model))
    patterns = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
    assert asked == [("someone/pronounces", {"revision": "v1", "allow_patterns": patterns})]


def in_hub_cache(cache: Path, name: str) -> Path:
    """A folder as the Hub's client keeps a repository: content under blobs/, names that point to it under snapshots/."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.slow
def test_models_of_the_hub_s_cache_load_without_a_network(tmp_path: Path) -> None:
    """In a process of its own: the Hub's client reads its environment once."""
    from crossattention.checkpoints.families import families_for, written
    from crossattention.checkpoints.files import write_json

    model = Transformer(replace(TINY, source_vocab_size=13, tied="all", norm="post", output_bias=True)).eval()
    config, tensors = written(model, families_for(model)[0])
    for name in ("someone/safe", "someone/sharded", "someone/archive", "someone/ours"):
        snapshot = in_hub_cache(tmp_path / "hub", name)
        blobs = snapshot.parents[1] / "blobs"
        write_json(snapshot / "config.json", config)
        if name.endswith("ours"):
            model.save_pretrained(snapshot)
        elif name.endswith("archive"):
            torch.save(tensors, blobs / "f00")
            (snapshot / "pytorch_model.bin").symlink_to(blobs / "f00")
        elif name.endswith("safe"):
            write_safetensors(blobs / "f00", tensors)
            (snapshot / "model.safetensors").symlink_to(blobs / "f00")
        else:
            held = {n: t for n, t in tensors.items() if n != "lm_head.weight" and "embed_tokens" not in n}
            names = list(held)
            places = {}
            for number, part in enumerate((names[:9], names[9:]), 1):
                file = f"model-0000{number}-of-00002.safetensors"
                write_safetensors(blobs / f"f0{number}", {n: held[n] for n in part})
                (snapshot / file).symlink_to(blobs / f"f0{number}")
                places |= dict.fromkeys(part, file)
            write_json(snapshot / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    program = (
        "import sys, torch\nfrom crossattention import load\n"
        "model = load(sys.argv[1])\nprint(model(torch.tensor([[3, 4, 5]]), torch.tensor([[1, 7]])).sum().item())"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    wanted = float(logits(model).detach().sum())
    for name in ("someone/safe", "someone/sharded", "someone/archive", "someone/ours"):
        done = subprocess.run([sys.executable, "-c", program, name], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(wanted, abs=1e-4), name
    done = subprocess.run([sys.executable, "-c", program, "someone/absent"], env=environment, capture_output=True, text=True)
    assert 'the Hugging Face Hub gave nothing under the id "someone/absent"' in done.stderr


def test_a_folder_comes_before_an_id_and_has_no_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = saved(Path("someone/pronounces"))
    assert torch.equal(logits(load("someone/pronounces")), logits(model))
    with pytest.raises(ValueError, match='has no revisions, got revision="v1"'):
        load("someone/pronounces", revision="v1")


def test_an_id_that_the_hub_does_not_give_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='gave nothing under the id "runs/absent"'):
        load("runs/absent")


def test_every_family_that_load_knows_names_itself() -> None:
    import importlib

    for family, (module, name) in FAMILIES.items():
        assert getattr(importlib.import_module(module), name).family == family
