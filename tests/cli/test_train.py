"""Training by the command line: what is printed, what stopping it says, and that going on is the same run."""

import re
import shlex
import signal

import pytest
import torch

from cli.conftest import TINY_FLAGS, type_in
from crossattention.cli.screen import PlainLines
from crossattention.recipes import g2p
from crossattention.recipes.listing import RECIPES
from crossattention.training.events import Step


def flags(pairs_file, out, *more):
    few = ["--steps", 12, "--log-every", 1, "--evaluations", 1, "--tokens-per-batch", 400, "--warmup-steps", 2]
    return ["train", "seq2seq", "--data", pairs_file, "--out", out, *few, *TINY_FLAGS, *more]


def stop_at(monkeypatch, step, number):
    """Send this process a signal once the screen has drawn a step, as Ctrl-C would."""
    draw = PlainLines.draw

    def draw_and_stop(self, event):
        draw(self, event)
        if isinstance(event, Step) and event.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(PlainLines, "draw", draw_and_stop)


def weights(run):
    from crossattention.checkpoints.files import read_safetensors

    return read_safetensors(run / "best" / "model.safetensors")


def test_a_run_ends_with_scores_answers_and_the_next_command(trained):
    lines = trained.stdout.splitlines()
    assert trained.code == 0
    assert lines[0] == f"training seq2seq in {trained.run}; Ctrl-C saves where it stands"
    assert re.fullmatch(r"\d\d,\d\d\d parameters on cpu", lines[1])
    assert re.search(r"^trained 200 steps in \d+:\d\d; the best model is of step \d+$", trained.stdout, re.MULTILINE)
    assert "On examples that it has never seen:" in lines
    answers = lines[lines.index("10 of them:") + 2 :][:10]
    assert sum(line.startswith("yes") for line in answers) >= 5
    assert lines[-2] == f"The run lies in {trained.run}. Ask it:"
    assert trained.stderr.startswith(f"loaded {trained.run / 'best'} (seq2seq, step ")


def test_the_next_command_works_as_it_is_printed(trained):
    words = shlex.split(trained.stdout.splitlines()[-1])
    assert words[:2] == ["crossattention", "predict"]
    code, stdout, _ = type_in(*words[1:])
    assert (code, len(stdout.splitlines())) == (0, 1)


def test_a_run_without_a_terminal_has_no_control_characters(trained):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", trained.stdout + trained.stderr)


def test_ctrl_c_saves_and_prints_the_command_that_goes_on_to_the_same_weights(pairs_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5, signal.SIGINT)
        code, _, stderr = type_in(*flags(pairs_file, tmp_path / "stopped"))
    message, command = stderr.splitlines()
    assert code == 130
    assert message == "crossattention: saved at step 5; to go on:"
    assert command.split() == ["crossattention", "train", "seq2seq", "--out", str(tmp_path / "stopped"), "--resume"]

    code, stdout, _ = type_in(*shlex.split(command)[1:])
    assert code == 0
    assert "resumed at step 5" in stdout
    assert type_in(*flags(pairs_file, tmp_path / "whole"))[0] == 0
    resumed, whole = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_request_to_end_saves_too_and_keeps_its_exit_code(pairs_file, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3, signal.SIGTERM)
    code, _, stderr = type_in(*flags(pairs_file, tmp_path / "run"))
    assert code == 143
    assert stderr.startswith("saved at step 3; to go on:\n  crossattention train seq2seq --out ")


def test_ctrl_c_while_scoring_keeps_the_run_and_says_how_to_score_it(pairs_file, tmp_path, monkeypatch):
    def interrupted(run, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr("crossattention.recipes.run.evaluate", interrupted)
    code, stdout, _ = type_in(*flags(pairs_file, tmp_path / "run"))
    assert code == 0
    assert f"not scored; this does it: crossattention evaluate {tmp_path / 'run'}" in stdout


def test_a_run_is_never_overwritten(trained, pairs_file):
    before = weights(trained.run)
    code, _, stderr = type_in(*flags(pairs_file, trained.run))
    assert code == 2
    assert f"{trained.run} already holds a run" in stderr
    assert all(torch.equal(before[name], after) for name, after in weights(trained.run).items())


def test_a_resumed_run_refuses_other_settings(trained):
    code, _, stderr = type_in("train", "seq2seq", "--out", trained.run, "--resume", "--learning-rate", 0.5)
    assert code == 2
    assert "training.learning_rate: 0.005 in the run, 0.5 now" in stderr


def test_an_out_that_cannot_be_written_is_named(pairs_file, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, stderr = type_in(*flags(pairs_file, tmp_path / "file" / "run"))
    assert code == 2
    assert f"cannot write to {tmp_path / 'file' / 'run'}" in stderr


def test_an_unknown_recipe_is_answered_with_the_nearest():
    assert type_in("train", "gtp")[2].endswith("no recipe 'gtp'; did you mean 'g2p'? See `crossattention train --help`.\n")
    assert f"there are {', '.join(RECIPES)}." in type_in("train", "--steps")[2]


def test_train_alone_names_the_recipes():
    code, stdout, _ = type_in("train")
    assert code == 2
    assert re.findall(r"^  (\w+) ", stdout, re.MULTILINE)[:2] == list(RECIPES)[:2] == ["g2p", "seq2seq"]
    assert type_in("train", "--help")[0] == 0


def test_a_wrong_flag_is_answered_with_the_nearest():
    code, _, stderr = type_in("train", "g2p", "--minuts", 3)
    assert code == 2
    assert "--minuts" in stderr
    assert "--minutes" in stderr


def test_bad_lines_are_counted_where_they_are_left_out(pairs_file, tmp_path):
    bad = tmp_path / "bad.tsv"
    bad.write_text(pairs_file.read_text() + "alone\n")
    assert f"{bad}, line 344: expected 2 columns, got 1" in type_in(*flags(bad, tmp_path / "a"))[2]
    code, stdout, _ = type_in(*flags(bad, tmp_path / "b", "--skip-bad"))
    assert code == 0
    assert f"bad lines left out: 1, such as {bad}, line 344: expected 2 columns, got 1" in stdout


def test_g2p_shows_arpabet_ipa_and_the_dictionary(tmp_path, monkeypatch):
    scores = {"words": 10011, "per": 0.5, "words_stem_seen": 2645, "per_stem_seen": 0.25}
    monkeypatch.setattr("crossattention.recipes.run.evaluate", lambda run, **_: scores)  # all test words take too long here
    few = ["--steps", 2, "--evaluations", 1, "--evaluation-words", 3, "--tokens-per-batch", 400]
    code, stdout, _ = type_in("train", "g2p", "--out", tmp_path / "run", *few, *TINY_FLAGS)
    lines = stdout.splitlines()
    assert code == 0
    assert "  data    S P AH G EH T IY  /sp\u0259\u0261\u025bti/" in re.sub(" +/", "  /", stdout).splitlines()
    assert "a stem of the word was trained on   2,645  25.0 %" in lines
    header = lines.index("10 of them:") + 1
    assert lines[header].split() == ["right", "word", "model", "IPA", "dictionary"]
    words = [line.removeprefix("yes").split()[0] for line in lines[header + 1 : header + 11]]
    assert set(words) <= set(g2p.words_by_part(stressed=False)["test"])
    assert lines[-1].split()[:3] == ["crossattention", "predict", str(tmp_path / "run")]


@pytest.mark.slow
def test_g2p_learns_within_a_minute(tmp_path):
    """The default recipe, only smaller: the thread from the dictionary to scores of all test words."""
    small = ["--dim", 96, "--encoder-layers", 2, "--decoder-layers", 1, "--feed-forward-dim", 192, "--tokens-per-batch", 1024]
    quick = ["--minutes", 1, "--warmup-steps", 60, "--learning-rate", 3e-3, "--evaluation-words", 100]
    code, stdout, _ = type_in("train", "g2p", "--out", tmp_path / "run", *small, *quick)
    assert code == 0
    per = float(re.search(r"^all  +10,011 +\S+ % +(\S+) %", stdout, re.MULTILINE)[1])
    assert per < 40


@pytest.mark.slow
def test_a_run_is_trained_on_with_parts_frozen_and_resumed_so(trained, pairs_file, tmp_path):
    """The same verbs: its weights begin another run, which says so, keeps frozen parts, and resumes with both."""
    from crossattention.checkpoints.files import read_json, read_safetensors

    out = tmp_path / "tuned"
    flags = ["--data", pairs_file, "--target-tokens", "words", "--tokens-per-batch", 400, "--warmup-steps", 1, *TINY_FLAGS]
    code, stdout, stderr = type_in(
        "train", "seq2seq", "--out", out, *flags, "--steps", 4, "--init", trained.run, "--freeze", "encoder", "*_embedding.*"
    )
    assert code == 0, stderr
    assert f"begun with the weights of {trained.run} (sha256 of model.safetensors " in stdout
    before, after = (read_safetensors(run / "best" / "model.safetensors") for run in (trained.run, out))
    frozen = {name for name in before if name.startswith("encoder.") or "_embedding." in name}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    stored = read_json(out / "config.json")["training"]
    assert (stored["init"], stored["freeze"]) == (str(trained.run), ["encoder", "*_embedding.*"])
    assert type_in("train", "seq2seq", "--out", out, "--resume")[0] == 0

    code, _, stderr = type_in("train", "seq2seq", "--out", tmp_path / "x", *flags, "--steps", 4, "--freeze", "encodr")
    assert code == 2 and "'encodr': near ones are encoder" in stderr
    other = tmp_path / "other.tsv"
    other.write_text(pairs_file.read_text().replace("g", "z"))
    code, _, stderr = type_in(
        "train", "seq2seq", "--out", tmp_path / "y", "--data", other, *flags[2:], "--steps", 4, "--init", trained.run
    )
    assert code == 2 and "source_tokenizer is another than in" in stderr and "only here: 'z'" in stderr
