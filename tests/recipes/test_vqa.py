"""Questions about pictures: batches, answers, what words read, scores, and the run on the command line."""

import json
import re

import numpy as np
import pytest
import torch

from crossattention.checkpoints.files import write_json
from crossattention.cli.main import main
from crossattention.data.easy_vqa import Question, find_easy_vqa, read_easy_vqa
from crossattention.data.vocabulary import PAD, UnknownSymbol
from crossattention.recipes.picture_questions import patches_with_a_shape, reading_of
from crossattention.recipes.run import evaluate, load_run
from crossattention.recipes.vqa import VQAConfig, VQATask, config_from_json, guesses
from crossattention.views.pages import write_page
from recipes.pictures import tiny_config, write_pictures
from run_folders import write_run

pytest.importorskip("PIL", reason="pictures need the images extra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def task(folder):
    return VQATask(tiny_config(folder), seed=1)


@pytest.fixture(scope="module")
def model(task):
    torch.manual_seed(0)
    return task.build_model().eval()


@pytest.fixture
def run_folder(task, model, tmp_path):
    """An untrained model as the training loop leaves one."""
    return write_run(tmp_path / "run", task, model)


def trained(task, steps, learning_rate):
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        task.loss(model, task.batch_at(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def test_each_pass_has_every_training_question_once_and_a_step_is_always_the_same(task, folder):
    steps = task.steps_per_epoch
    passes = [[task.batch_at(epoch * steps + step).indices for step in range(steps)] for epoch in range(2)]
    for batches in passes:
        assert sorted(index for indices in batches for index in indices) == list(range(len(task.train)))
    assert passes[0] != passes[1]
    assert VQATask(tiny_config(folder), seed=1).batch_at(3).indices == task.batch_at(3).indices
    assert VQATask(tiny_config(folder), seed=2).batch_at(3).indices != task.batch_at(3).indices


def test_no_picture_is_both_learned_from_and_evaluated_on(task):
    assert not set(task.train.part.image_numbers) & set(task.valid.part.image_numbers)
    assert len(task.valid.part.images) == 4


def test_a_batch_holds_the_questions_words_pictures_and_answers(task):
    batch = task.batch_at(0)
    for row, index in enumerate(batch.indices):
        question = task.train.part.questions[index]
        ids = [number for number in batch.ids[row].tolist() if number != PAD]
        assert task.tokenizer.decode(ids) == question.text.rstrip("?")
        assert task.data.answers[batch.answers[row]] == question.answer
        assert np.array_equal(batch.images[row].numpy(), task.train.part.images[question.image])
    assert batch.num_tokens == int((batch.ids != PAD).sum())


def test_patches_with_a_shape_are_those_that_differ_from_the_border():
    picture = torch.full((1, 8, 8, 3), 240, dtype=torch.uint8)
    picture[0, 3, 3] = 0  # in the upper left patch of 4 x 4
    picture[0, 5, 6:8] = 9  # in the lower right one, and on the border
    assert patches_with_a_shape(picture, 4).tolist() == [[True, False, False, True]]


def test_words_that_attend_evenly_read_the_shape_as_often_as_its_patches_are(task, model):
    even = task.build_model().eval()
    for layer in even.decoder.layers:
        torch.nn.init.zeros_(layer.cross_attention.q_proj.weight)
        torch.nn.init.zeros_(layer.cross_attention.q_proj.bias)
    found = reading_of(task.answerer(even), task.valid.batches(7))
    assert found.mean == pytest.approx(found.even, rel=1e-5)
    assert 0 < found.even < 1
    assert reading_of(task.answerer(model), task.valid.batches(7)).heads.shape == (2, 2)
    with pytest.raises(ValueError, match="expected questions"):
        reading_of(task.answerer(model), [])


def test_attention_that_is_turned_to_the_shape_is_measured_as_such(task, model, monkeypatch):
    from crossattention.recipes import picture_questions

    def on_the_shape(answerer, batch):
        shape = patches_with_a_shape(batch.images, 4).float()
        weights = shape / shape.sum(1, keepdim=True)
        return weights[None, :, None, None].expand(2, -1, 2, batch.ids.shape[1], -1)

    monkeypatch.setattr(picture_questions.Answerer, "maps", on_the_shape)
    assert reading_of(task.answerer(model), task.valid.batches(7)).mean == pytest.approx(1.0)


def test_a_guess_is_the_commonest_answer_of_the_same_question():
    seen = [
        Question("a", "no", 0),
        Question("a", "no", 1),
        Question("a", "yes", 2),
        Question("b", "red", 0),
        Question("b", "red", 1),
    ]
    asked = [Question("a", "yes", 0), Question("b", "blue", 0), Question("c", "no", 0)]
    assert guesses(seen, asked) == ["no", "red", "no"]


def test_scores_are_of_all_and_of_both_kinds_of_questions(run_folder):
    run = load_run(run_folder)
    scores = evaluate(run)
    assert (scores["questions"], scores["questions_shape_color"], scores["questions_yes_no"]) == (48, 24, 24)
    for name in ("accuracy", "accuracy_from_question", "attention_on_shape", "attention_if_even"):
        halves = (scores[f"{name}_shape_color"] + scores[f"{name}_yes_no"]) / 2
        assert scores[name] == pytest.approx(halves)
    test = read_easy_vqa(run.description["config"]["data"]).test
    right = [run.answerer.ask(test.images[q.image], q.text)[0].text == q.answer for q in test.questions]
    assert scores["accuracy"] == pytest.approx(sum(right) / 48)


def test_other_data_than_that_of_the_training_is_not_scored(run_folder, folder, tmp_path):
    other = write_pictures(tmp_path / "other", train=39)
    description = json.loads((run_folder / "best/task.json").read_text())
    description["config"]["data"] = str(other)
    write_json(run_folder / "best/task.json", description)
    with pytest.raises(ValueError, match=r"was trained on other data .* give the folder it was trained on"):
        evaluate(load_run(run_folder))


def test_predictions_are_the_likeliest_answers_first(run_folder, folder):
    run = load_run(run_folder)
    [found] = run.predict([(str(folder / "test/images/0.png"), "What SHAPE is present")], num_hypotheses=6)
    assert sorted(prediction.text for prediction in found) == sorted(run.answerer.answers)
    assert [prediction.score for prediction in found] == sorted((prediction.score for prediction in found), reverse=True)
    assert sum(prediction.probability for prediction in found) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="expected 1 to 6 answers, as many as there are, got 7"):
        run.predict([], num_hypotheses=7)


def test_what_cannot_be_asked_is_named(run_folder, folder, tmp_path):
    from PIL import Image

    run = load_run(run_folder)
    picture = str(folder / "test/images/0.png")

    def ask(path, question):
        return next(run.predict([(str(path), question)]))

    with pytest.raises(UnknownSymbol, match="elephant"):
        ask(picture, "is there an elephant?")
    with pytest.raises(ValueError, match=re.escape("one without a word: '?'")):
        ask(picture, "?")
    with pytest.raises(ValueError, match="at most 5 words, the longest that it was trained on, got 6"):
        ask(picture, "is there no circle there no?")
    with pytest.raises(FileNotFoundError, match=r"expected a picture at .*none\.png, found nothing"):
        ask(tmp_path / "none.png", "is there no circle?")
    Image.new("RGB", (20, 16)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="20 x 16 pixels; this model reads pictures of 16 x 16"):
        ask(tmp_path / "wide.png", "is there no circle?")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match="is no readable picture"):
        ask(tmp_path / "text.png", "is there no circle?")


def test_a_view_has_a_row_a_word_and_the_model_s_own_weights(run_folder, folder, tmp_path):
    run = load_run(run_folder)
    given = (str(folder / "test/images/0.png"), "what shape is present?")
    view = run.view(given)
    assert view.queries.tokens == ("[CLS]", "what", "shape", "is", "present")
    assert (view.context.rows, view.context.columns) == (4, 4)
    assert [layer.weights.shape for layer in view.layers] == [(2, 5, 16)] * 2
    assert np.allclose(view.layers[1].weights.sum(-1), 1.0, atol=1e-5)
    [[best]] = run.predict([given])
    assert view.title.startswith(f"what shape is present? → {best.text} (")
    assert write_page(view, tmp_path / "page.html").stat().st_size > 0
    mean = np.mean([layer.weights[:, 1:] for layer in view.layers], axis=(0, 1, 2)).reshape(4, 4)
    assert np.allclose(run.align(given, best.text).weights, mean, atol=1e-4)
    with pytest.raises(ValueError, match="does not depend on an answer, got 'red'; leave --answer out"):
        run.view(given, "red")


def test_settings_and_parts_come_back_from_a_run(task, run_folder):
    described = json.loads(json.dumps(task.describe()))
    assert config_from_json(described["config"]) == task.config
    described["answers"].append("purple")
    write_json(run_folder / "best/task.json", described)
    with pytest.raises(ValueError, match=r"do not belong together: .* \(1 of its answers not among them\)"):
        load_run(run_folder)
    del described["answers"]
    write_json(run_folder / "best/task.json", described)
    with pytest.raises(ValueError, match="damaged or of another version"):
        load_run(run_folder)


def test_settings_out_of_range_and_answers_of_two_words_are_refused(tmp_path):
    for name, value in (("batch_size", 0), ("evaluation_questions", 0), ("held_out", 1.0)):
        with pytest.raises(ValueError, match=f"{name} .*{value}"):
            VQAConfig(**{name: value})
    folder = write_pictures(tmp_path / "data", train=4, test=1)
    (folder / "answers.txt").write_text((folder / "answers.txt").read_text() + "\nlight blue\n")
    with pytest.raises(ValueError, match="expected answers of one word in small letters, got 'light blue'"):
        VQATask(tiny_config(folder, held_out=0.3))


@pytest.mark.slow
def test_the_command_line_asks_scores_and_shows(run_folder, folder, tmp_path, capsys):
    picture = str(folder / "test/images/0.png")
    assert main(["predict", str(run_folder), picture, "what shape is present?", "--json", "--map"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["alignment"]["weights"]) == 4
    assert main(["view", str(run_folder), picture, "what shape is present?", "-o", str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["evaluate", str(run_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["questions"] == 48
    assert main(["evaluate", str(run_folder)]) == 0
    assert re.search(r"answered by a shape or a color +24 ", capsys.readouterr().out)
    assert main(["predict", str(run_folder), picture, "is there an elephant?"]) == 2
    assert "elephant" in capsys.readouterr().err


@pytest.mark.slow
def test_words_learn_to_read_the_shape_and_training_on_the_command_line_resumes(folder, tmp_path, capsys):
    flags = ["--data", str(folder), "--out", str(tmp_path / "run"), "--steps", "30", "--batch-size", "16", "--threads", "1"]
    flags += ["--dim", "16", "--heads", "2", "--feed-forward-dim", "32", "--channels", "8"]
    assert main(["train", "vqa", *flags]) == 0
    out = capsys.readouterr().out
    assert "what it reads of" in out.lower()
    assert (tmp_path / "run" / "view.html").is_file()
    task = VQATask(tiny_config(folder), seed=1)
    model = trained(task, 500, 5e-3)
    assert task.evaluate(model).metrics["accuracy"] > 0.9
    read = reading_of(task.answerer(model), task.valid.batches(64))
    assert read.mean > 1.5 * read.even


@pytest.mark.slow
def test_on_easy_vqa_the_words_of_questions_for_shapes_and_colors_read_the_shape():
    if find_easy_vqa() is None:
        pytest.skip("easy-vqa is not on this machine: pip install easy-vqa==1.0")
    task = VQATask()
    model = trained(task, 600, 2e-3)
    metrics = task.evaluate(model).metrics
    assert metrics["accuracy_shape_color"] > 0.5  # guessed: 0.23
    open_ones = [index for index, question in enumerate(task.valid.part.questions) if question.answer not in ("yes", "no")]
    read = reading_of(task.answerer(model), [task.valid.batch(open_ones[:500])])
    assert read.mean > 2 * read.even
