"""A trained model between strings: predictions, streaming, faults, alignments."""

import itertools
from dataclasses import replace

import pytest

from crossattention.data.vocabulary import PAD, UNKNOWN, UnknownSymbol, WordTokenizer
from crossattention.maps import attention_map
from crossattention.models.generate import Hypothesis
from crossattention.recipes.translator import _count_together


@pytest.fixture(scope="module")
def translator(reversing):
    task, model = reversing
    return task.learner.translator(model)


def test_predictions_come_in_the_order_of_the_texts_whatever_their_batch(translator):
    texts = ["abc", "ea", "cab", "bbdd", "dd"]
    alone = [next(iter(translator.predict([text], beams=1)))[0].text for text in texts]
    for size in (1, 2, 32):
        assert [found[0].text for found in translator.predict(texts, beams=1, batch_size=size)] == alone
    assert [prediction.text for prediction in translator.predict_all(texts, batch_size=2)] == alone
    assert alone[0] == "C B A"


def test_several_hypotheses_are_different_and_best_first(translator):
    (found,) = translator.predict(["abc"], beams=4, num_hypotheses=3)
    assert found[0].text == "C B A"
    assert found[0].is_finished
    assert len({prediction.text for prediction in found}) == 3
    scores = [prediction.score for prediction in found]
    assert scores == sorted(scores, reverse=True)
    assert all(prediction.log_probability <= 0 for prediction in found)


def test_hypotheses_that_read_alike_or_hold_a_symbol_that_stands_for_nothing_are_left_out(reversing):
    task, model = reversing
    translator = task.learner.translator(model)
    known = translator.target.encode("C B A")
    found = [
        Hypothesis(tuple(ids), -score, -score, is_finished=True)
        for score, ids in enumerate([known, [*known, PAD], [*known[:2], UNKNOWN], known[:2]])
    ]
    closed = replace(translator, target=WordTokenizer(translator.target.symbols, strict=True))
    assert [prediction.text for prediction in closed._different(found)] == ["C B A", "C B"]
    assert [prediction.text for prediction in translator._different(found)] == ["C B A", "C B \ufffd", "C B"]
    assert len(closed._different(found[2:3])) == 1


def test_texts_are_read_as_they_are_answered(translator):
    taken = []
    endless = (taken.append(text) or text for text in itertools.cycle(["abc", "cab"]))
    answers = translator.predict(endless, beams=1, batch_size=1)
    assert [next(answers)[0].text for _ in range(3)] == ["C B A", "B A C", "C B A"]
    assert len(taken) == 3
    assert list(translator.predict([], beams=1)) == []


def test_texts_before_an_unknown_symbol_are_answered_first(translator):
    answers = translator.predict(["abc", "cab", "a!c", "abc"], beams=1)
    assert [next(answers)[0].text for _ in range(2)] == ["C B A", "B A C"]
    with pytest.raises(UnknownSymbol, match=r"'!' at position 2 of 'a!c'.*known symbols: a b c d e f g"):
        next(answers)
    with pytest.raises(ValueError, match="an empty one: ''"):
        next(translator.predict([""]))


def test_a_test_set_is_scored_whole_with_what_cannot_be_read_answered_empty(translator):
    found = translator.predict_all(["abc", "a!c", "cab"])
    assert [prediction.text for prediction in found] == ["C B A", "", "B A C"]
    assert not found[1].is_finished


def test_wrong_numbers_are_named_before_any_text_is_taken(translator):
    with pytest.raises(ValueError, match=r"1 to 2 hypotheses, the number of beams, got 3"):
        translator.predict(["abc"], beams=2, num_hypotheses=3)
    with pytest.raises(ValueError, match=r"got beams=0, batch_size=32"):
        translator.predict(["abc"], beams=0)
    with pytest.raises(ValueError, match=r"batch_size=0"):
        translator.predict(["abc"], batch_size=0)


def test_the_alignment_is_the_mean_map_and_shows_the_reversal(translator):
    alignment = translator.align("abcd", "D C B A")
    assert (alignment.rows, alignment.columns) == (["D", "C", "B", "A"], list("abcd"))
    for row in alignment.weights:
        assert len(row) == 4
        assert sum(row) == pytest.approx(1, abs=1e-3)
    # The layer's own map of the same inputs, taken by hand.
    seen = []
    layer = translator.model.decoder.layers[0].cross_attention
    with layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True):
        source = translator._tensor([translator.source.encode("abcd")])
        translator.model(source, translator._tensor([[1, *translator.target.encode("D C B A")]]))
    expected = attention_map(layer, *seen[0][0], **seen[0][1])[0].mean(0)[:4]
    for row, other in zip(alignment.weights, expected.tolist(), strict=True):
        assert row == pytest.approx(other, abs=1e-4)


def test_alignment_leaves_no_hook_and_no_mode_behind(translator):
    translator.model.train()
    try:
        translator.align("ab", "B A")
        assert translator.model.training
        assert not any(layer.cross_attention._forward_pre_hooks for layer in translator.model.decoder.layers)
    finally:
        translator.model.eval()


def test_the_map_of_nothing_predicted_is_empty(translator):
    assert translator.align("ab", "").weights == []


def test_sources_are_computed_together_by_length_count_and_symbols():
    assert _count_together([3]) == 1
    assert _count_together([2] * 200 + [3] * 50) == 200  # enough of one length
    assert _count_together([1] * 100 + [2] * 50 + [3] * 50 + [4]) == 200
    assert _count_together([2] * 191 + [5]) == 192  # too few to stay among themselves
    assert _count_together([1 << 14, 1 << 14, 1 << 14]) == 2
    assert _count_together([1 << 20, 1 << 20]) == 1
