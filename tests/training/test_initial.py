"""Beginning with another model's weights, and freezing some of them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossattention.checkpoints.files import read_json, read_safetensors, sha256_of, write_json
from crossattention.models.crossvit import CrossViT, CrossViTConfig
from crossattention.models.transformer import Transformer, TransformerConfig
from crossattention.training.config import TrainConfig
from crossattention.training.events import Started
from crossattention.training.initial import freeze, initialise
from crossattention.training.loop import train
from crossattention.training.tasks import Evaluation

CONFIG = TransformerConfig(
    9, 11, dim=8, heads=2, encoder_layers=1, decoder_layers=1, feed_forward_dim=12, tied="target", dropout=0.1
)
SYMBOLS = {"source_tokenizer": {"kind": "characters", "symbols": "abcdef"}}


@dataclass(frozen=True)
class Ids:
    ids: Tensor

    num_tokens = 10
    indices = (0,)

    def to(self, device: torch.device) -> "Ids":
        return self


class Copying:
    """Some batches of random ids; the model itself is what matters."""

    metric = "loss"
    steps_per_epoch = 4

    def build_model(self) -> Transformer:
        return Transformer(CONFIG)

    def batch_at(self, step: int) -> Ids:
        return Ids(torch.randint(3, 9, (2, 5), generator=torch.Generator(torch.get_default_device()).manual_seed(step)))

    def loss(self, model: nn.Module, batch: Ids) -> Tensor:
        return nn.functional.cross_entropy(model(batch.ids, batch.ids).flatten(0, 1), batch.ids.flatten())

    def evaluate(self, model: nn.Module) -> Evaluation:
        return Evaluation({"loss": self.loss(model, self.batch_at(0)).item()})

    def describe(self) -> dict[str, Any]:
        return {"task": "copying", **SYMBOLS}


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"steps": 4, "evaluations": 2, "warmup_steps": 1, "log_every": 2, "threads": 1, "device": "cpu", **changes}
    )


def saved(folder: Path, config: TransformerConfig = CONFIG) -> Transformer:
    torch.manual_seed(5)
    model = Transformer(config)
    model.save_pretrained(folder)
    return model


# --------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_taken_whole_in_the_model_s_own_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source = Transformer(replace(CONFIG, dropout=0.3), dtype=dtype)
    source.save_pretrained(tmp_path / "source")
    model = Transformer(CONFIG)
    record = initialise(model, str(tmp_path / "source"), {})
    wanted = source.state_dict()
    assert all(torch.equal(tensor, wanted[name].float()) for name, tensor in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert record == {
        "source": str(tmp_path / "source"),
        "path": str(tmp_path / "source"),
        "model": "Transformer",
        "sha256": {"model.safetensors": sha256_of(tmp_path / "source" / "model.safetensors")},
    }


def test_all_settings_that_differ_are_listed_even_if_every_shape_fits(tmp_path: Path) -> None:
    saved(tmp_path, replace(CONFIG, heads=4, activation="gelu", source_vocab_size=7))
    model = Transformer(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit") as caught:
        initialise(model, str(tmp_path), {})
    lines = str(caught.value).splitlines()[1:]
    assert (
        lines[0].strip().startswith(f"source_vocab_size is 7 in {tmp_path}, 9 here: a row of the embedding belongs to one symbol")
    )
    assert "train on data with exactly the symbols of the first training, or without --init" in lines[0]
    assert lines[1].strip() == f"heads is 4 in {tmp_path}, 2 here: give the model the same setting"
    assert lines[2].strip() == f"activation is 'gelu' in {tmp_path}, 'relu' here: give the model the same setting"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_vocabulary_of_the_same_size_with_other_symbols_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    write_json(tmp_path / "task.json", SYMBOLS)
    initialise(Transformer(CONFIG), str(tmp_path), SYMBOLS)
    other = {"source_tokenizer": {"kind": "characters", "symbols": "abcdxf"}}
    with pytest.raises(
        ValueError, match=r"source_tokenizer is another than in .*; only in .*: 'e'; only here: 'x': the embeddings"
    ):
        initialise(Transformer(CONFIG), str(tmp_path), other)
    turned = {"source_tokenizer": {"kind": "characters", "symbols": "fedcba"}}
    with pytest.raises(ValueError, match="the same symbols in another order"):
        initialise(Transformer(CONFIG), str(tmp_path), turned)


def test_a_model_of_another_class_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="holds a Transformer, but a Linear is to be trained"):
        initialise(nn.Linear(2, 2), str(tmp_path), {})
    with pytest.raises(FileNotFoundError):
        initialise(Transformer(CONFIG), str(tmp_path / "absent"), {})


def classifier(classes: int) -> CrossViT:
    sizes = {"image_size": 24, "scales": (1.0, 1.0), "patch_sizes": (6, 8), "dims": (4, 8), "heads": (1, 2), "encoders": 1}
    return CrossViT(CrossViTConfig(classes=classes, layers=(1, 1), **sizes))


def test_heads_begin_anew_for_other_classes_and_all_else_is_taken(tmp_path: Path) -> None:
    source = classifier(5)
    source.save_pretrained(tmp_path)
    model = classifier(3)
    heads = {name: tensor.clone() for name, tensor in model.heads.state_dict().items()}
    record = initialise(model, str(tmp_path), {"classes": ["a", "b", "c"]})
    assert record["new"] == {"heads": f"classes is 5 in {tmp_path}, 3 here"}
    assert all(torch.equal(tensor, heads[name]) for name, tensor in model.heads.state_dict().items())
    others = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("heads.")}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in others.items())
    assert "new" not in initialise(classifier(5), str(tmp_path), {"classes": list("abcde")})
    write_json(tmp_path / "task.json", {"classes": list("abcdf")})
    assert initialise(classifier(5), str(tmp_path), {"classes": list("abcde")})["new"] == {
        "heads": f"classes are others in {tmp_path}"
    }


# -------------------------------------------------------------------------------------------------------- freezing


def test_patterns_and_part_names_freeze_what_they_name() -> None:
    model = Transformer(CONFIG)
    found = freeze(model, ["encoder", "*.cross_attention.?_proj.weight"])
    wanted = {n for n, _ in model.named_parameters() if n.startswith("encoder.")}
    wanted |= {f"decoder.layers.0.cross_attention.{x}_proj.weight" for x in "qkv"}
    assert set(found) == wanted == {n for n, p in model.named_parameters() if not p.requires_grad}


def test_patterns_that_match_nothing_are_listed_with_near_names() -> None:
    with pytest.raises(ValueError) as caught:
        freeze(Transformer(CONFIG), ["encoder.*", "encodr.*", "decoder.layer"])
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 2
    assert lines[0].strip().startswith("'encodr.*': near ones are encoder")
    assert "decoder.layers" in lines[1]


def test_nothing_left_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"freeze=\* leaves nothing to train"):
        freeze(Transformer(CONFIG), ["*"])
    with pytest.raises(ValueError, match="freeze must be several patterns, got the one text 'encoder'"):
        TrainConfig(steps=1, freeze="encoder")


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.slow
def test_a_run_begins_with_the_weights_and_leaves_frozen_ones_as_they_are(tmp_path: Path, optimizer: str) -> None:
    source = saved(tmp_path / "source").state_dict()
    out = tmp_path / "run"
    config = settings(init=str(tmp_path / "source"), freeze=("encoder", "source_embedding"), weight_decay=0.5, optimizer=optimizer)
    started = next(event for event in list(train(Copying(), config, out)) if isinstance(event, Started))
    last = read_safetensors(out / "checkpoints" / "step-000004" / "model.safetensors")
    frozen = {name for name in source if name.startswith(("encoder.", "source_embedding."))}
    assert {name for name in source if torch.equal(last[name], source[name])} == frozen
    state = read_safetensors(out / "checkpoints" / "step-000004" / "optimizer.safetensors")
    assert not [name for name in state if name.split("/")[1] in frozen]
    digest = sha256_of(tmp_path / "source" / "model.safetensors")
    assert any(
        f"begun with the weights of {tmp_path / 'source'} (sha256 of model.safetensors {digest[:12]})" in n for n in started.notes
    )
    assert any(note.startswith("frozen: ") and note.endswith("(encoder source_embedding)") for note in started.notes)

    journal = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert next(line for line in journal if line["event"] == "init")["sha256"] == {"model.safetensors": digest}
    assert set(next(line for line in journal if line["event"] == "freeze")["names"]) == frozen
    assert read_json(out / "best" / "init.json") == read_json(out / "config.json")["init"]


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_not_stopped_and_needs_the_source_no_more(tmp_path: Path) -> None:
    saved(tmp_path / "source")
    config = settings(init=str(tmp_path / "source"), freeze=("encoder",), evaluate_every=2)
    list(train(Copying(), config, tmp_path / "straight"))
    events = train(Copying(), config, tmp_path / "stopped")
    next(event for event in events if getattr(event, "path", None) is not None)
    events.close()
    (tmp_path / "source").rename(tmp_path / "gone")
    list(train(Copying(), config, tmp_path / "stopped", resume=True))
    ends = [
        read_safetensors(tmp_path / run / "checkpoints" / "step-000004" / "model.safetensors") for run in ("straight", "stopped")
    ]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert read_json(tmp_path / "stopped" / "best" / "init.json")["model"] == "Transformer"
    with pytest.raises(ValueError, match=r"(?s)training.freeze: \[\"encoder\"\] in the run, null now.*training.init"):
        train(Copying(), settings(evaluate_every=2), tmp_path / "stopped", resume=True)


@pytest.mark.slow
def test_a_run_stopped_before_its_first_checkpoint_begins_with_the_same_weights_or_says_that_they_changed(tmp_path: Path) -> None:
    saved(tmp_path / "source")
    config = settings(init=str(tmp_path / "source"))
    events = train(Copying(), config, tmp_path / "run")
    next(events)
    events.close()
    whole = (tmp_path / "source" / "model.safetensors").read_bytes()
    saved(tmp_path / "source", replace(CONFIG, dropout=0.0)).half().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="has changed since the run was begun"):
        list(train(Copying(), config, tmp_path / "run", resume=True))
    (tmp_path / "source" / "model.safetensors").write_bytes(whole)
    list(train(Copying(), config, tmp_path / "run", resume=True))


def test_weights_that_do_not_fit_leave_no_run_behind(tmp_path: Path) -> None:
    saved(tmp_path / "source", replace(CONFIG, dim=16))
    with pytest.raises(ValueError, match="dim is 16"):
        list(train(Copying(), settings(init=str(tmp_path / "source")), tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()
    list(train(Copying(), settings(), tmp_path / "run"))
