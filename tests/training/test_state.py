import json
import os

import pytest
import torch

from crossattention.training import state as state_file
from crossattention.training.state import State, load_state, save_state


def some_state(step=12):
    tensors = {"model": {"w": torch.arange(6.0)}, "optimizer": {"adamw/w/exp_avg": torch.ones(6)}}
    return State(step, tensors, {"progress": {"seconds": 1.5}, "random": ["\u00e6", None]})


def test_a_state_comes_back_as_it_was(tmp_path):
    save_state(tmp_path / "step-000012", some_state())
    read = load_state(tmp_path / "step-000012")
    assert (read.step, read.facts) == (12, some_state().facts)
    assert torch.equal(read.tensors["model"]["w"], torch.arange(6.0))
    assert torch.equal(read.tensors["optimizer"]["adamw/w/exp_avg"], torch.ones(6))
    names = ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(path.name for path in (tmp_path / "step-000012").iterdir()) == names


def test_further_tensor_files_need_nothing_else(tmp_path):
    state = some_state()
    save_state(tmp_path / "a", State(1, {**state.tensors, "average": {"w": torch.zeros(2)}}, {}))
    assert set(load_state(tmp_path / "a").tensors) == {"model", "optimizer", "average"}


def test_an_existing_folder_is_replaced(tmp_path):
    save_state(tmp_path / "a", some_state(1))
    save_state(tmp_path / "a", some_state(2))
    assert load_state(tmp_path / "a").step == 2
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_damage_to_tensors_is_named(tmp_path, name):
    folder = tmp_path / "a"
    save_state(folder, some_state())
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-3])
    with pytest.raises(ValueError, match=rf"{name} is damaged: it holds {len(data) - 3} bytes, not {len(data)}; .* short"):
        load_state(folder)
    (folder / name).write_bytes(data + b"x")
    with pytest.raises(ValueError, match=rf"{name} is damaged: .* something was added"):
        load_state(folder)
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{name} is damaged: its SHA-256 digest is not the one in state.json"):
        load_state(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing, but state.json lists it"):
        load_state(folder)


def test_damage_to_the_json_is_named(tmp_path):
    folder = tmp_path / "a"
    save_state(folder, some_state())
    path = folder / "state.json"
    text = path.read_text()
    for size in (0, 10, len(text) - 5):
        path.write_text(text[:size])
        with pytest.raises(ValueError, match=r"state\.json is damaged"):
            load_state(folder)
    path.write_text(text.replace('"seconds": 1.5', '"seconds": 1.6'))
    with pytest.raises(ValueError, match=r"state\.json is damaged: its content does not have its SHA-256 digest"):
        load_state(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"state\.json is missing"):
        load_state(folder)
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        load_state(tmp_path / "b")


def test_tensors_of_another_checkpoint_are_refused(tmp_path):
    save_state(tmp_path / "a", some_state())
    other = State(13, {"model": {"w": torch.zeros(6)}, "optimizer": {}}, {})
    save_state(tmp_path / "b", other)
    os.replace(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_state(tmp_path / "a")


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(state_file, "FORMAT", 99)
    save_state(tmp_path / "a", some_state())
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"state\.json has format 99, this version reads format 1"):
        load_state(tmp_path / "a")
    (tmp_path / "a" / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(ValueError, match="not written by crossattention"):
        load_state(tmp_path / "a")


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path):
    save_state(tmp_path / "a", some_state(1))
    with pytest.raises(ValueError, match="JSON compliant"):
        save_state(tmp_path / "a", State(2, {}, {"loss": float("nan")}))
    assert load_state(tmp_path / "a").step == 1
    assert os.listdir(tmp_path) == ["a"]
