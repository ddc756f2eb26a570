"""Greedy and beam search of an encoder-decoder against `transformers`' `generate`, symbol for symbol, on several random models."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from bert_models import BEGIN, END, PAD, VOCAB, ours_of, prefix_mask, their_pair
from crossattention.models import BeamRules, EncoderDecoder, beam_search, greedy
from crossattention.models.generate import Hypothesis

Z, M, MAX = 4, 7, 12


def pair(seed: int) -> tuple[EncoderDecoder, Any, Tensor, Tensor]:
    """A random model whose targets end now early, now late, now at the limit; sources and a mask with short rows."""
    torch.manual_seed(seed)
    theirs = their_pair()
    with torch.no_grad():
        theirs.decoder.cls.predictions.bias[END] += 0.5 * (seed % 4)
    source, mask = torch.randint(3, VOCAB, (Z, M)), prefix_mask([M, 2, 5, 1], M)
    return ours_of(theirs), theirs, source.where(mask, PAD), mask


def without_padding(row: Tensor) -> tuple[int, ...]:
    """A row of `generate`: without the begin symbol in front, and without the end and what follows it."""
    ids = row.tolist()[1:]
    return tuple(ids[: ids.index(END)] if END in ids else ids)


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))])
def test_greedy_gives_the_references_symbols(seed: int) -> None:
    ours, theirs, source, mask = pair(seed)
    expected = theirs.generate(source, attention_mask=mask.long(), max_new_tokens=MAX, do_sample=False, num_beams=1)
    found = greedy(ours, source, mask, max_length=MAX, never=())
    for hypothesis, row in zip(found, expected, strict=True):
        assert hypothesis.ids == without_padding(row)
        assert hypothesis.is_finished == (END in row.tolist()[1:])


def assert_same_search(seed: int, beams: int, early_stopping: bool | str, length_penalty: float) -> list[list[Hypothesis]]:
    ours, theirs, source, mask = pair(seed)
    expected = theirs.generate(
        source,
        attention_mask=mask.long(),
        max_new_tokens=MAX,
        do_sample=False,
        num_beams=beams,
        num_return_sequences=beams,
        early_stopping=early_stopping,
        length_penalty=length_penalty,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = beam_search(
        ours,
        source,
        mask,
        beams=beams,
        num_hypotheses=beams,
        max_length=MAX,
        length_penalty=length_penalty,
        rules=BeamRules.huggingface(early_stopping),
        never=(),
    )
    flat = [hypothesis for hypotheses in found for hypothesis in hypotheses]
    assert [h.ids for h in flat] == [without_padding(row) for row in expected.sequences]
    torch.testing.assert_close(torch.tensor([h.score for h in flat]), expected.sequences_scores, atol=1e-4, rtol=1e-4)
    return found


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beam_search_gives_the_references_symbols(early_stopping: bool | str) -> None:
    found = assert_same_search(3, 4, early_stopping, 1.0)
    lengths = {len(h.ids) for hypotheses in found for h in hypotheses}
    assert len(lengths) > 1  # some end before the limit


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("seed", range(10))
def test_beam_search_gives_the_references_symbols_on_many_models(
    seed: int, early_stopping: bool | str, length_penalty: float
) -> None:
    assert_same_search(seed, 2 + seed % 4, early_stopping, length_penalty)


def test_one_of_several_beams_is_the_references_best() -> None:
    ours, theirs, source, mask = pair(6)
    expected = theirs.generate(source, attention_mask=mask.long(), max_new_tokens=MAX, num_beams=3, do_sample=False)
    found = beam_search(ours, source, mask, beams=3, max_length=MAX, length_penalty=1.0, rules=BeamRules.huggingface(), never=())
    assert [row[0].ids for row in found] == [without_padding(row) for row in expected]
    assert all(len(row) == 1 for row in found)


def test_begin_symbol_is_generated_only_where_it_is_allowed() -> None:
    ours, _, source, mask = pair(1)
    with torch.no_grad():
        ours.decoder.head.bias[BEGIN] += 50.0
    assert set(greedy(ours, source, mask, max_length=4, never=())[0].ids) == {BEGIN}
    assert BEGIN not in greedy(ours, source, mask, max_length=4)[0].ids
    assert set(greedy(ours, source, mask, max_length=4, never=(BEGIN, END))[0].ids).isdisjoint((BEGIN, END))
