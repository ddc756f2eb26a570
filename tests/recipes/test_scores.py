"""Scores: error rates by hand, and the agreement with the libraries."""

import random
import time

import pytest

from crossattention.recipes.scores import check_text_metrics, edit_distance, score_pronunciations, score_texts


def slow_distance(first, second):
    if not first or not second:
        return len(first) + len(second)
    if first[0] == second[0]:
        return slow_distance(first[1:], second[1:])
    return 1 + min(slow_distance(first[1:], second), slow_distance(first, second[1:]), slow_distance(first[1:], second[1:]))


def test_edit_distance_equals_its_definition():
    draw = random.Random(0)
    for _ in range(200):
        first, second = (draw.choices("abc", k=draw.randrange(6)) for _ in range(2))
        assert edit_distance(first, second) == slow_distance(first, second)


def test_any_reference_makes_a_word_right():
    scores = score_pronunciations(["B", "B"], [["A", "B"], ["A"]])
    assert (scores.words, scores.wer) == (2, 0.5)


def test_micro_and_macro_differ_as_defined():
    # Word 1: 1 edit of 2 phones; word 2: 1 edit of 8.
    scores = score_pronunciations(["A X", "A B C D E F G X"], [["A B"], ["A B C D E F G H"]])
    assert scores.per == pytest.approx(2 / 10)
    assert scores.per_macro == pytest.approx((1 / 2 + 1 / 8) / 2)


def test_the_closest_reference_counts_and_of_equals_the_first():
    assert score_pronunciations(["A B C"], [["X Y", "A B"]]).per == pytest.approx(1 / 2)
    # One edit from both: the first listed gives the length of the micro rate, the longer one the macro rate.
    scores = score_pronunciations(["A B C"], [["A B", "A B C D"]])
    assert scores.per == pytest.approx(1 / 2)
    assert scores.per_macro == pytest.approx(1 / 4)


def test_nothing_predicted_costs_the_whole_reference_and_too_much_more_than_it():
    assert score_pronunciations([""], [["A B"]]).per == 1
    assert score_pronunciations(["A B C D E"], [["A B"]]).per == pytest.approx(1.5)


def test_ten_thousand_words_take_about_a_second():
    draw = random.Random(0)
    phones = [" ".join(draw.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=7)) for _ in range(10_000)]
    began = time.perf_counter()
    score_pronunciations(phones[1:] + phones[:1], [[a, b] for a, b in zip(phones, phones[::-1], strict=True)])
    assert time.perf_counter() - began < 5


def test_faults_of_the_caller_are_named():
    with pytest.raises(ValueError, match="got 1 for 2 references"):
        score_pronunciations(["A"], [["A"], ["B"]])
    with pytest.raises(ValueError, match="at least one item to score"):
        score_pronunciations([], [])
    with pytest.raises(ValueError, match=r"got \[''\] for word 1"):
        score_pronunciations(["A", "B"], [["A"], [""]])
    with pytest.raises(ValueError, match="an empty one at item 1"):
        score_texts(["a", "b"], ["a", " "], ["exact"])
    with pytest.raises(ValueError, match=r"bleu, chrf, cer, wer, exact, got 'rouge'"):
        check_text_metrics(["rouge"])
    with pytest.raises(ValueError, match="at least one metric"):
        check_text_metrics([])


def test_text_metrics_by_hand():
    pytest.importorskip("jiwer", reason="error rates need the data extra")
    found = score_texts(["a cat sat", ""], ["a cat sat", "dog"], ["exact", "wer", "cer"])
    assert found["exact"] == 0.5
    assert found["wer"] == pytest.approx(1 / 4)
    assert found["cer"] == pytest.approx(3 / 12)


def test_bleu_and_chrf_are_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu", reason="BLEU needs the data extra")
    predictions = ["the cat sat on the mat today", "a dog barks at night now"]
    references = ["the cat sat on the mat yesterday", "a dog barked at night now"]
    found = score_texts(predictions, references, ["bleu", "chrf"])
    assert found["bleu"] == sacrebleu.corpus_bleu(predictions, [references]).score
    assert 0 < found["bleu"] < found["chrf"] < 100
    assert score_texts(references, references, ["bleu"])["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(("metric", "library"), [("bleu", "sacrebleu"), ("wer", "jiwer")])
def test_a_missing_library_is_named_before_any_work(monkeypatch, metric, library):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{library}; install it with: pip install 'crossattention\[data\]'"):
        check_text_metrics([metric])
