"""Runs read back: predictions and scores, and what is said of folders that are none."""

import json
import shutil

import pytest

from crossattention.recipes.run import evaluate, load_run


def test_a_run_predicts_what_its_model_predicted(run_folder, reversing):
    task, model = reversing
    run = load_run(run_folder)
    assert (run.recipe, run.step, run.path) == ("seq2seq", 200, run_folder / "best")
    assert not run.model.training
    expected = [found[0] for found in task.learner.translator(model).predict(["abc", "edc"])]
    assert [found[0] for found in run.predict(["abc", "edc"])] == expected
    assert expected[0].text == "C B A"
    assert run.align("ab", "B A").columns == ["a", "b"]


def test_the_folder_best_is_a_run_by_itself(run_folder):
    assert load_run(run_folder / "best").step == 200
    (run_folder / "best" / "scores.json").unlink()
    assert load_run(str(run_folder / "best")).step is None


def test_evaluation_scores_the_whole_test_part(run_folder, reversing):
    scores = evaluate(load_run(run_folder))
    assert scores["pairs"] == len(reversing[0].parts.test)
    assert scores["exact"] > 0.8
    assert evaluate(load_run(run_folder), beams=3)["exact"] > 0.8


def test_a_folder_that_is_no_run_says_what_was_expected_and_found(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"is no run: expected config\.json, model\.safetensors, task\.json.*notes\.txt"):
        load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"folder of a run at .*none, found nothing"):
        load_run(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"notes\.txt, found a file"):
        load_run(tmp_path / "notes.txt")


def test_a_run_before_its_first_evaluation_says_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"has no model yet.*--resume"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "task.json"])
def test_a_missing_part_is_named(run_folder, name):
    (run_folder / "best" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"best is not complete: {name} missing"):
        load_run(run_folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "task.json"])
def test_a_damaged_part_is_named(run_folder, name):
    path = run_folder / "best" / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"best.{name}"):
        load_run(run_folder)


def test_a_description_of_another_kind_is_named(run_folder):
    path = run_folder / "best" / "task.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "recipe": "sing"}))
    with pytest.raises(ValueError, match=r"recipe among g2p, seq2seq, .* in .*task\.json, got 'sing'"):
        load_run(run_folder)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"got 'list'"):
        load_run(run_folder)
    path.write_text(json.dumps({key: value for key, value in description.items() if key != "max_length"}))
    with pytest.raises(ValueError, match=r"task\.json is damaged or of another version: KeyError\('max_length'\)"):
        load_run(run_folder)


def test_parts_of_two_runs_do_not_mix(run_folder):
    path = run_folder / "best" / "task.json"
    description = json.loads(path.read_text())
    description["source_tokenizer"]["symbols"] = "abcdefghij"
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"do not belong together.*vocabularies of 14 and 11 ids, config\.json of 11 and 11"):
        load_run(run_folder)


def test_changed_data_is_not_scored(run_folder, tmp_path, reversing):
    run = load_run(run_folder)
    copy = tmp_path / "copy.tsv"
    shutil.copy(reversing[0].config.data, copy)
    digests = {str(copy): "0" * 64}
    changed = {**run.description, "config": {**run.description["config"], "data": str(copy)}, "data": digests}
    object.__setattr__(run, "description", changed)
    with pytest.raises(ValueError, match=r"copy\.tsv has changed since the run was trained: expected sha256 0000"):
        evaluate(run)
