"""Events, scores and tables as text."""

from pathlib import Path

import pytest
from rich.cells import cell_len

from crossattention.cli import lines
from crossattention.recipes.g2p import SUBSETS
from crossattention.training.events import Evaluated, Finished, Started, Step

STEP = Step(1200, 4000, 0.8125, 8412.7, 1e-3, 0.9, 63.0, 252.4)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (65, "1:05"), (3599.7, "1:00:00"), (3725, "1:02:05")])
def test_a_duration_reads_like_a_clock(seconds, text):
    assert lines.duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("per", 0.1404, "14.0 %"),
        ("wer_stem_seen", 1.2, "120.0 %"),
        ("bleu", 31.2, "31.200"),
        ("loss", 0.5, "0.500"),
        ("words", 10011, "10,011"),
    ],
)
def test_shares_are_percentages_and_counts_are_whole(name, value, text):
    assert lines.score(name, value) == text


def test_a_step_says_where_it_is_how_fast_and_how_long():
    assert lines.place(STEP) == "step 1,200/4,000"
    assert lines.pace(STEP) == "loss 0.812  8,413 tokens/s  4:12 left"


def test_what_is_not_known_yet_is_left_out():
    early = Step(10, None, 3.0, 100.0, 1e-4, 2.0, 1.0, None)
    assert lines.place(early) == "step 10"
    assert lines.pace(early) == "loss 3.000  100 tokens/s"


def test_the_start_says_what_is_trained_and_shows_every_note():
    event = Started(None, 269472, "cpu", Path("r/checkpoints/step-000405"), 405, ("threads: 1 before, 2 now",))
    assert lines.started(event) == [
        "269,472 parameters on cpu, resumed at step 405 from r/checkpoints/step-000405",
        "note: threads: 1 before, 2 now",
    ]
    assert lines.started(Started(10, 7, "cuda:0", None)) == ["7 parameters on cuda:0"]


def test_an_evaluation_is_one_line_without_counts():
    event = Evaluated(61, {"per": 0.891, "pairs": 50.0, "loss": 1.5}, None, True)
    assert lines.evaluated(event) == "step 61: per 89.1 %  loss 1.500  (best so far)"
    assert lines.evaluated(Evaluated(61, {"per": 0.891}, None, False)) == "step 61: per 89.1 %"


def test_the_end_names_the_best_step():
    event = Finished(2000, {"per": 0.1}, 1800, 301.0)
    assert lines.finished(event) == "trained 2,000 steps in 5:01; the best model is of step 1,800"


def test_an_example_stands_in_straight_columns():
    example = {"source": "odd", "predicted": "AA D", "reference": "AA D", "ipa": "\u0251d", "reference_ipa": "\u0251d"}
    assert lines.sample(example) == ["reads   odd", "writes  AA D  /\u0251d/", "data    AA D  /\u0251d/"]


def test_an_example_without_ipa_or_without_an_answer_is_shown_too():
    example = {"source": "[red]a\x1b[2J", "predicted": "", "reference": "b"}
    assert lines.sample(example) == ["reads   [red]a\\x1b[2J", "writes  (nothing yet)", "data    b"]


def test_columns_are_straight_whatever_the_width_of_characters():
    table = lines.aligned([["日本", "1"], ["t\u0361\u0283", "22"]], right=[1])
    assert [cell_len(line) for line in table] == [8, 8]
    assert [line[-1] for line in table] == ["1", "2"]


def test_a_score_table_has_a_line_a_subset_and_a_column_a_score():
    metrics = {"words": 10, "per": 0.5, "words_stem_seen": 4, "per_stem_seen": 0.25, "per_stressed": 0.6}
    assert lines.score_table(metrics, SUBSETS) == [
        "                                   words     per",
        "all                                   10  50.0 %",
        "a stem of the word was trained on      4  25.0 %",
        "all, stress counted                       60.0 %",
    ]


def test_records_are_a_table_while_they_fit_and_paragraphs_where_not():
    labels, rows = ["right", "source", "model"], [["yes", "a" * 10, "b" * 10], ["", "c", "d"]]
    assert lines.records(labels, rows, width=40, has_header=True)[0] == "right  source      model"
    assert lines.records(labels, rows, width=20) == [
        "right   yes",
        "source  aaaaaaaaaa",
        "model   bbbbbbbbbb",
        "",
        "source  c",
        "model   d",
    ]
