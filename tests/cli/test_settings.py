"""What a `train` command line asks for."""

from pathlib import Path

import pytest

from crossattention.cli.settings import read_order
from crossattention.recipes.g2p import G2PConfig, default_training
from crossattention.training.config import TrainConfig
from crossattention.training.folder import RunFolder


def order(*words, recipe="g2p"):
    return read_order(recipe, [str(word) for word in words], prog=f"crossattention train {recipe}")


@pytest.fixture
def begun(tmp_path):
    """A g2p run that was begun with settings of its own."""
    folder = tmp_path / "begun"
    task = {"recipe": "g2p", "config": {**G2PConfig(stressed=True).__dict__, "model": vars(G2PConfig().model)}}
    RunFolder(folder).write_config(TrainConfig(steps=77, learning_rate=0.5), task)
    return folder


def test_without_flags_the_recipe_s_defaults_hold():
    found = order()
    assert (found.recipe, found.run.out, found.run.resume) == ("g2p", Path("runs/g2p"), False)
    assert found.config == G2PConfig()
    assert found.training == default_training()


def test_flags_reach_every_settings_object():
    found = order("--out", "o", "--stressed", "--dim", 64, "--learning-rate", 0.25, "--betas", 0.5, 0.75, "--norm", "post")
    assert found.run.out == Path("o")
    assert (found.config.stressed, found.config.model.dim, found.config.model.norm) == (True, 64, "post")
    assert (found.training.learning_rate, found.training.betas) == (0.25, (0.5, 0.75))
    assert found.training.minutes == default_training().minutes


@pytest.mark.parametrize(
    ("flag", "name", "value"), [("--steps", "steps", 9), ("--epochs", "epochs", 2.5), ("--minutes", "minutes", 1)]
)
def test_a_length_replaces_the_default_length(flag, name, value):
    lengths = dict.fromkeys(("minutes", "steps", "epochs")) | {name: value}
    training = order(flag, value).training
    assert {name: getattr(training, name) for name in lengths} == lengths


def test_two_lengths_are_one_too_many():
    with pytest.raises(ValueError, match=r"exactly one of minutes, steps and epochs; got minutes=2.0 and steps=3"):
        order("--minutes", 2, "--steps", 3)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"learning_rate must be a finite number above 0; got -1.0"):
        order("--learning-rate", -1)


def test_seq2seq_must_be_told_its_data(capsys):
    with pytest.raises(SystemExit):
        order(recipe="seq2seq")
    assert "--data" in capsys.readouterr().err


def test_seq2seq_reads_paths_kinds_and_metrics():
    found = order("--data", "p.tsv", "--target-tokens", "words", "--metrics", "exact", "cer", "--skip-bad", recipe="seq2seq").config
    assert (found.data, found.valid, found.source_tokens, found.target_tokens) == (Path("p.tsv"), None, "characters", "words")
    assert (found.metrics, found.skip_bad) == (("exact", "cer"), True)


def test_a_resumed_run_keeps_its_settings(begun):
    found = order("--out", begun, "--resume")
    assert found.run.resume
    assert found.config.stressed
    assert (found.training.steps, found.training.minutes, found.training.learning_rate) == (77, None, 0.5)


def test_flags_beside_resume_win_so_that_the_loop_can_refuse_them(begun):
    found = order("--resume", "--learning-rate", 0.125, "--out", begun, "--log-every", 3)
    assert (found.training.learning_rate, found.training.log_every, found.training.steps) == (0.125, 3, 77)


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no run to resume"):
        order("--out", tmp_path, "--resume")


def test_a_run_of_another_recipe_is_not_resumed(begun):
    with pytest.raises(ValueError, match=r"is of the recipe g2p, not seq2seq: crossattention train g2p resumes it"):
        order("--out", begun, "--resume", recipe="seq2seq")


def test_the_command_that_resumes_can_be_typed_as_it_is():
    assert order("--out", "a b/$c").resume_command == "crossattention train g2p --out 'a b/$c' --resume"
