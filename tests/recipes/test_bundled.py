"""Weights inside the package: found by their id, complete, small enough, and as good as their card says."""

import json

import pytest
import torch

import crossattention
from crossattention.models import pretrained
from crossattention.recipes.run import evaluate, load_run

IDS = sorted(pretrained.bundled())


def test_there_are_weights_for_words():
    assert "g2p-small" in IDS


@pytest.mark.parametrize("name", IDS)
def test_weights_lie_with_all_that_tells_of_them_and_are_small(name):
    folder = pretrained.bundled()[name]
    held = {path.name for path in folder.iterdir()}
    assert held == {"README.md", "config.json", "metrics.jsonl", "model.safetensors", "scores.json", "task.json", "training.json"}
    assert (folder / "model.safetensors").stat().st_size < 8_000_000
    assert all(tensor.dtype == torch.float16 for tensor in pretrained.load(name).state_dict().values())


@pytest.mark.parametrize("name", IDS)
def test_a_run_is_found_by_its_id_and_runs_in_float32(name):
    run = load_run(name)
    assert (run.recipe, run.path) == ("g2p", pretrained.bundled()[name])
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
    [[found]] = run.predict(["speculation"], beams=1)
    assert found.text == "S P EH K Y AH L EY SH AH N"


def test_the_model_itself_is_found_too():
    model = crossattention.load("g2p-small", dtype=torch.float32)
    assert type(model).__name__ == "Transformer"
    with pytest.raises(ValueError, match=r"g2p-small is inside this package and has no revisions, got revision=\"main\""):
        crossattention.load("g2p-small", revision="main")


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g2p-small").mkdir()
    with pytest.raises(ValueError, match=r"g2p-small is no run"):
        load_run("g2p-small")


def test_an_unknown_id_names_those_that_there_are():
    with pytest.raises(FileNotFoundError, match=r"expected the folder of a run at g2p-smal, found nothing.*there are: .*g2p-small"):
        load_run("g2p-smal")
    with pytest.raises(
        FileNotFoundError, match=r"no id of weights inside this package \(.*g2p-small.*\) or on the Hugging Face Hub"
    ):
        crossattention.load("g2p-smal")


@pytest.mark.slow
@pytest.mark.parametrize("name", IDS)
def test_the_scores_are_those_of_the_card(name):
    folder = pretrained.bundled()[name]
    quoted = json.loads((folder / "scores.json").read_text())["metrics"]["beams=1"]
    found = evaluate(load_run(name))
    assert abs(found["wer"] - quoted["wer"]) < 5e-4  # a few words of 10,011 may turn on another processor
    assert f"| 1 | {100 * quoted['wer']:.1f} % | {100 * quoted['per']:.1f} % |" in (folder / "README.md").read_text()
