"""The default recipe: its examples, its evaluation, its scores, without training it."""

import json
from dataclasses import replace

import pytest
import torch

from crossattention.data.vocabulary import END, PAD
from crossattention.recipes.cmudict import part_of, to_ipa
from crossattention.recipes.g2p import (
    SAMPLE_WORD,
    G2PConfig,
    G2PTask,
    config_from_json,
    default_training,
    letters_of,
    score_test_words,
    unseen_words,
    words_by_part,
)
from crossattention.recipes.run import evaluate, load_run
from crossattention.recipes.translator import Alignment, Prediction
from crossattention.training.config import TrainConfig
from crossattention.training.loop import Finished, train
from recipes.reversing_words import TINY

SMALL = G2PConfig(evaluation_words=8, model=TINY)


@pytest.fixture(scope="module")
def task():
    return G2PTask(SMALL)


class Oracle:
    """Stands in the place of a translator and answers from the dictionary, some words wrongly."""

    def __init__(self, *, stressed, wrong=lambda word: False, drop_stress=False):
        self.words = {word: found for part in words_by_part(stressed=stressed).values() for word, found in part.items()}
        self.wrong, self.drop_stress = wrong, drop_stress

    def predict_all(self, texts, *, beams=1, **_):
        return [self._answer(text) for text in texts]

    def _answer(self, text):
        phones = self.words[text][-1]
        if self.drop_stress:
            phones = phones.replace("1", "0")
        if self.wrong(text):
            phones = f"{phones} ZH"
        return Prediction(phones, 0.0, 0.0, True)

    def align(self, text, predicted):
        return Alignment([], [], [])


def test_every_training_pronunciation_and_nothing_held_out_is_trained_on(task):
    seen, words = 0, set()
    for step in range(task.steps_per_epoch):
        batch = task.batch_at(step)
        seen += len(batch.indices)
        for ids in batch.source_ids[:3].tolist():
            words.add(task.learner.source.decode([number for number in ids if number != PAD]))
    assert seen == 121_399
    assert all(part_of(word) == "train" for word in words)


def test_letters_and_phonemes_are_those_of_the_dictionary(task):
    assert task.learner.source.symbols == tuple("'-." + "abcdefghijklmnopqrstuvwxyz")
    assert len(task.learner.target.symbols) == 39
    batch = task.batch_at(0)
    word, phones = task.learner.source.decode(batch.source_ids[0]), task.learner.target.decode(batch.labels[0])
    assert phones in words_by_part(stressed=False)["train"][word]
    assert (batch.labels == END).sum() == len(batch.indices)


@pytest.mark.slow
def test_stress_is_learned_only_where_asked():
    task = G2PTask(replace(SMALL, stressed=True))
    assert len(task.learner.target.symbols) == 69
    assert config_from_json(json.loads(json.dumps(task.describe()))["config"]) == task.config


def test_evaluation_gives_rates_and_a_held_out_word_to_look_at(task):
    torch.manual_seed(0)
    model = task.build_model().eval()
    evaluation = task.evaluate(model)
    assert part_of(SAMPLE_WORD) == "valid"
    assert set(evaluation.metrics) == {"per", "wer", "per_macro"}
    assert evaluation.metrics[task.metric] > 0.5
    sample = evaluation.sample
    assert (sample["source"], sample["reference"]) == ("spaghetti", "S P AH G EH T IY")
    assert sample["reference_ipa"] == "sp\u0259\u0261\u025bti"
    assert sample["columns"] == list("spaghetti")
    assert len(sample["rows"]) == len(sample["weights"]) == len(sample["predicted"].split())
    json.dumps(sample)
    assert task.evaluate(model).metrics == evaluation.metrics


def test_the_seed_changes_the_order_but_not_the_evaluation_words(task):
    assert len(task.held_out) == 8
    assert all(part_of(word) == "valid" for word in task.held_out)
    other = G2PTask(SMALL, seed=9)
    assert list(task.held_out) == list(other.held_out)
    assert task.batch_at(5).indices != other.batch_at(5).indices


def test_a_perfect_model_scores_zero_and_stress_errors_count_only_with_stress():
    scores = score_test_words(Oracle(stressed=False), stressed=False)
    assert (scores["words"], scores["wer"], scores["per"], scores["per_macro"]) == (10_011, 0, 0, 0)
    assert "wer_stressed" not in scores
    scores = score_test_words(Oracle(stressed=True, drop_stress=True), stressed=True)
    assert (scores["wer"], scores["per"]) == (0, 0)
    assert scores["wer_stressed"] > 0.9
    assert 0.1 < scores["per_stressed"] < scores["wer_stressed"]


def test_words_with_a_training_stem_are_scored_apart():
    scores = score_test_words(Oracle(stressed=False, wrong=lambda word: word.endswith("ing")), stressed=False)
    assert (scores["words_stem_seen"], scores["words_stem_unseen"]) == (2_645, 10_011 - 2_645)
    assert scores["wer_stem_seen"] > scores["wer"] > scores["wer_stem_unseen"] > 0
    both = scores["wer_stem_seen"] * 2_645 + scores["wer_stem_unseen"] * (10_011 - 2_645)
    assert both / 10_011 == pytest.approx(scores["wer"])


def test_ten_unseen_words_are_test_words_beside_the_dictionary():
    shown = unseen_words(Oracle(stressed=False), stressed=False)
    assert len({item.word for item in shown}) == 10
    for item in shown:
        assert part_of(item.word) == "test"
        assert item.predicted in item.references
        assert item.ipa


def test_the_training_loop_leaves_a_run_that_can_be_asked_and_resumed(task, tmp_path):
    config = TrainConfig(steps=3, evaluations=1, warmup_steps=1)
    assert isinstance([*train(task, config, tmp_path / "run")][-1], Finished)
    run = load_run(tmp_path / "run")
    assert (run.recipe, run.step) == ("g2p", 3)
    ((first, _), _) = run.predict(["Zoomified", "abc"], beams=3, num_hypotheses=2)
    assert first.ipa == to_ipa(first.text)
    assert run.align("Cat", "K AE T").columns == ["c", "a", "t"]
    assert isinstance([*train(task, config, tmp_path / "run", resume=True)][-1], Finished)
    run.description["data"]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match=r"another edition of the dictionary \(sha256 0000"):
        evaluate(run)


@pytest.mark.slow
def test_two_thirds_of_the_steps_of_five_minutes_reach_12_percent_of_phonemes_and_44_of_words(tmp_path):
    # Five minutes on two cores hold 3,750 steps; beside other tests they would hold as many as these leave room for.
    training = replace(default_training(), threads=1, minutes=None, steps=2500)
    for _ in train(G2PTask(), training, tmp_path / "run"):
        pass
    scores = evaluate(load_run(tmp_path / "run"), beams=4)
    assert scores["per"] <= 0.12 and scores["wer"] <= 0.44


def test_capitals_and_spaces_are_spelled_as_in_the_dictionary():
    assert letters_of(" O'Neill\n") == "o'neill"


def test_a_setting_out_of_range_is_named():
    with pytest.raises(ValueError, match="evaluation_words of at least 1, got 0"):
        G2PTask(G2PConfig(evaluation_words=0))
