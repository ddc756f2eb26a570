"""The recipe that listens: parts, runs, scores, alignments; and words that are spoken where the library is there."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from cli.conftest import type_in
from crossattention.data import speech
from crossattention.recipes.listen import ListenConfig, ListenTask, _source_of, config_from_json
from crossattention.recipes.pair_task import ModelShape
from crossattention.recipes.run import evaluate, load_run
from crossattention.training.config import TrainConfig
from crossattention.training.loop import train
from crossattention.views.content import SoundSide
from recipes.singing import RATE, write_songs

TINY = ModelShape(dim=32, heads=2, encoder_layers=1, decoder_layers=1, feed_forward_dim=64, dropout=0.0)


def config_of(folder, **changes):
    small = {"sample_rate": RATE, "bands": 20, "reduction": 2, "tokens_per_batch": 1500, "model": TINY}
    return ListenConfig(**{"data": folder, **small, **changes})


def run_source(run):
    return _source_of(config_from_json(run.description["config"]))


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    return write_songs(tmp_path_factory.mktemp("songs"), lengths=(3,), count=60)


@pytest.fixture(scope="module")
def run_folder(songs, tmp_path_factory):
    """A run of two steps: what it says is wrong, how it is said is what we test."""
    folder = tmp_path_factory.mktemp("runs") / "listen"
    for _ in train(ListenTask(config_of(songs)), TrainConfig(steps=2, evaluations=1, warmup_steps=1), folder):
        pass
    return folder


def test_one_text_never_stands_on_two_sides(songs):
    task = ListenTask(config_of(songs))
    texts = {name: set(task._source.part(name).texts) for name in ("train", "valid", "test")}
    assert sum(map(len, texts.values())) == 60
    assert len(set.union(*texts.values())) == 60
    assert all(texts.values())


def test_a_run_predicts_and_shows_a_file(run_folder, songs):
    run = load_run(run_folder)
    assert (run.recipe, run.step, run.input_names) == ("listen", 2, ("SOUND",))
    path = str(songs / "abc.wav")
    [answers, again] = run.predict([path, path], beams=3, num_hypotheses=2)
    assert answers == again and len(answers) >= 1
    view = run.view(path, "abc")
    assert isinstance(view.context, SoundSide)
    assert view.context.positions == view.layers[0].weights.shape[2] == 13  # 25 frames of 10 ms, two a position
    assert view.context.seconds_per_position == pytest.approx(0.02)
    assert np.allclose(view.layers[0].weights.sum(-1), 1, atol=1e-5)
    columns = run.align(path, "abc").columns
    assert columns == list("0....1....2..")


def test_keys_that_fire_while_a_sound_is_spelled_are_shown_with_training_sounds(run_folder):
    run = load_run(run_folder)
    given = run.sample_input()
    told = []
    view = run.feed_forward_view(given, "abc", num_examples=7, on_progress=lambda *done: told.append(done))
    assert view.title == f"{given} → abc" and told[-1] == (7, 7)
    [layer] = view.layers
    assert layer.size == 64 and layer.agreement is not None
    training = dict(run_source(run).training_files(7))
    heard = {(one.source, "".join(one.tokens)) for key in layer.keys.values() for one in key.inputs}
    assert heard and heard <= set(training.items())


def test_scores_are_of_the_test_part(run_folder):
    scores = evaluate(load_run(run_folder), beams=2)
    assert set(scores) == {"cer", "wer", "exact", "diagonal", "sounds"}
    assert scores["exact"] + scores["wer"] == pytest.approx(1.0)  # words: a text is one


def test_sounds_that_changed_are_not_scored(run_folder, songs):
    run = load_run(run_folder)
    changed = {**run.description, "data": {**run.description["data"], "test sounds": "0" * 64}}
    object.__setattr__(run, "description", changed)
    with pytest.raises(ValueError, match="test sounds has changed since the run was trained: expected sha256 0000"):
        evaluate(run)


def test_settings_come_back_from_json(songs):
    config = config_of(songs, voices=("a", "b"))
    task = ListenTask(config)
    assert config_from_json(json.loads(json.dumps(task.describe()))["config"]) == config


def test_the_verbs_know_it(run_folder, songs, tmp_path):
    path = songs / "bcd.wav"
    code, stdout, stderr = type_in("predict", run_folder, path, "--json", "--map")
    assert code == 0 and "listen, step 2" in stderr
    found = json.loads(stdout)
    assert found["input"] == str(path) and found["alignment"]["columns"][0] == "0"
    code, stdout, _ = type_in("view", run_folder, path, "--answer", "bcd", "-o", tmp_path / "v.html", "--json")
    assert code == 0 and json.loads(stdout)["context"]["kind"] == "sound"
    assert "data:audio/wav" in (tmp_path / "v.html").read_text() or '"sound"' in (tmp_path / "v.html").read_text()
    code, stdout, _ = type_in("evaluate", run_folder)
    assert code == 0 and stdout.splitlines()[0].split() == ["cer", "wer", "exact", "diagonal", "sounds"]
    code, stdout, stderr = type_in("predict", run_folder, path, "none.wav")
    assert code == 2 and stdout.startswith(str(path)) and "expected a sound file at none.wav, found nothing" in stderr
    code, _, _ = type_in("view", run_folder, path, "--answer", "bcd", "--feed-forward", "-o", tmp_path / "memory.html")
    assert code == 0 and "Sounds on which a key fires most" in (tmp_path / "memory.html").read_text()


def test_faults_are_named(songs, tmp_path):
    with pytest.raises(ValueError, match="words of at least 1, got 0"):
        ListenConfig(words=0)
    with pytest.raises(ValueError, match="and another one as new_voice"):
        ListenConfig(voices=("en-us",), new_voice="en-us")
    with pytest.raises(ValueError, match="name it with data"):
        ListenConfig(test=tmp_path)
    with pytest.raises(ValueError, match="reduction of 1, 2 or 4, got 3"):
        ListenConfig(reduction=3)
    with pytest.raises(ValueError, match=r"part of .* is empty: 3 sounds are too few"):
        ListenTask(config_of(write_songs(tmp_path, count=3)))


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'crossattention\[speech\]'"):
        next(speech.speak([("en-us", "cat")], sample_rate=16_000))


@pytest.mark.slow
def test_tones_are_learned_and_letters_read_them_from_left_to_right(tmp_path):
    """Every new word right, and the alignment straight: seconds on one core."""
    task = ListenTask(config_of(write_songs(tmp_path / "songs"), model=replace(TINY, dim=64, feed_forward_dim=128)))
    settings = TrainConfig(steps=400, evaluations=2, optimizer="muon", learning_rate=6e-3, warmup_steps=40, threads=1)
    for _ in train(task, settings, tmp_path / "run"):
        pass
    scores = evaluate(load_run(tmp_path / "run"))
    assert scores["cer"] < 0.05
    assert scores["diagonal"] > 0.9


@pytest.mark.slow
def test_words_are_spoken_the_same_each_time_and_kept(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="needs the extra speech")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spoken = [("en-us", "fish"), ("en-us+f2", "fish")]
    (first, other), (again, _) = (list(speech.speak(spoken, sample_rate=16_000)) for _ in range(2))
    assert torch.equal(first, again)
    assert len(first) != len(other) or not torch.equal(first, other)
    made = speech.spoken_frames(spoken, sample_rate=16_000, bands=40)
    [path] = speech.cache_folder().glob("*.safetensors")
    monkeypatch.setattr(speech, "speak", None)
    assert torch.equal(speech.spoken_frames(spoken, sample_rate=16_000, bands=40).frames, made.frames)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"safetensors is damaged.*delete it"):
        speech.spoken_frames(spoken, sample_rate=16_000, bands=40)


@pytest.mark.slow
def test_a_voice_that_there_is_not_is_named():
    pytest.importorskip("espeakng_loader", reason="needs the extra speech")
    with pytest.raises(ValueError, match="no voice 'nobody'"):
        list(speech.speak([("nobody", "cat")], sample_rate=16_000))
    with pytest.raises(ValueError, match="without tabs and line ends"):
        list(speech.speak([("en-us", "a\tb")], sample_rate=16_000))
