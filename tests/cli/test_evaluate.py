"""Scoring a run on what its training never saw."""

import io
import json

from rich.console import Console

from cli.conftest import type_in
from crossattention.cli.weights import measuring
from crossattention.recipes.run import evaluate, load_run


def test_the_table_holds_the_scores(trained):
    code, stdout, stderr = type_in("evaluate", trained.run)
    header, scores = stdout.splitlines()
    assert code == 0
    assert header.split() == ["cer", "wer", "exact", "pairs", "unreadable"]
    assert scores.split()[0] == "all"
    assert stderr.startswith(f"loaded {trained.run / 'best'} (seq2seq, step ")


def test_json_says_which_weights_and_how(trained):
    _, stdout, _ = type_in("evaluate", trained.run, "--json", "--beams", 2)
    found = json.loads(stdout)
    assert (found["run"], found["recipe"], found["step"], found["beams"]) == (str(trained.run), "seq2seq", 200, 2)
    assert len(found["sha256"]) == 64
    assert set(found["scores"]) == {"cer", "wer", "exact", "pairs", "unreadable"}


def test_beams_reach_the_search(trained, monkeypatch):
    monkeypatch.setattr("crossattention.recipes.run.evaluate", lambda run, *, beams, on_progress: {"exact": beams / 10})
    assert "30.0 %" in type_in("evaluate", trained.run, "--beams", 3)[1]


def test_a_terminal_shows_how_many_are_scored(trained, monkeypatch):
    """On stderr, so that stdout stays data; in a pipe nothing is shown."""
    terminal = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=terminal, force_terminal=True, width=120))
    told = []
    with measuring("scoring") as show:
        evaluate(load_run(trained.run), on_progress=lambda done, total: (told.append((done, total)), show(done, total)))
    done, total = told[-1]
    assert done == total > 0 and [d for d, _ in told] == sorted(d for d, _ in told)
    assert f"{done}/{total}" in terminal.getvalue()


def test_changed_data_are_not_scored_as_unseen(trained, pairs_file):
    before = pairs_file.read_bytes()
    try:
        pairs_file.write_bytes(before + b"abcd\tD C B A\n")
        code, _, stderr = type_in("evaluate", trained.run)
    finally:
        pairs_file.write_bytes(before)
    assert code == 2
    assert f"{pairs_file} has changed since the run was trained" in stderr


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path):
    code, _, stderr = type_in("evaluate", tmp_path)
    assert code == 2
    assert f"{tmp_path} is no run" in stderr
