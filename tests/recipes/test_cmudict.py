"""The dictionary in the package: what it holds, how it is split, stress, IPA, stems."""

import re
from importlib import resources

import pytest

from crossattention.recipes.cmudict import (
    IPA,
    has_stem_in,
    parse_dictionary,
    part_of,
    pronunciations_of,
    read_dictionary,
    stems,
    to_ipa,
    without_stress,
)


@pytest.fixture(scope="module")
def dictionary():
    return read_dictionary()


def symbols(pronunciations):
    return {symbol for found in pronunciations.values() for phones in found for symbol in phones.split()}


def test_every_word_and_pronunciation_is_there(dictionary):
    assert len(dictionary) == 126_052
    assert sum(map(len, dictionary.values())) == 135_166
    assert sum(len(found) > 1 for found in dictionary.values()) == 8_447
    assert sum(re.fullmatch(r"[a-z']+", word) is not None for word in dictionary) == 124_926


def test_remarks_and_variant_numbers_are_no_part_of_words_or_phones(dictionary):
    assert dictionary["aalborg"] == ("AO1 L B AO0 R G", "AA1 L B AO0 R G")
    assert "dail" in dictionary
    assert not any(set("#()") & set(word) for word in dictionary)
    assert all(re.fullmatch(r"[A-Z]+[012]?", symbol) for symbol in symbols(dictionary))


def test_stress_makes_69_symbols_of_39(dictionary):
    stressed, unstressed = (pronunciations_of(dictionary, stressed=choice) for choice in (True, False))
    assert len(symbols(stressed)) == 69
    assert len(symbols(unstressed)) == 39
    assert sum(map(len, unstressed.values())) == 134_860
    assert unstressed["tomato"] == ("T AH M EY T OW", "T AH M AA T OW")
    assert (len(stressed["abstract"]), len(unstressed["abstract"])) == (2, 1)


def test_the_licence_lies_beside_the_data():
    text = resources.files("crossattention.recipes").joinpath("assets/LICENSE.cmudict").read_text("ascii")
    assert "Copyright (C) 1993-2015 Carnegie Mellon University" in text


def test_the_split_is_90_2_8_and_never_moves(dictionary):
    counts = {part: 0 for part in ("train", "valid", "test")}
    for word in dictionary:
        counts[part_of(word)] += 1
    # Exact counts: a changed hash would silently make scores of old and new runs incomparable.
    assert counts == {"train": 113_480, "valid": 2_561, "test": 10_011}
    assert [part_of(word) for word in ("tomato", "abaco", "able", "zyuganov's")] == ["train", "train", "test", "test"]


def test_every_letter_of_the_held_out_words_occurs_in_training(dictionary):
    letters = {part: set() for part in ("train", "valid", "test")}
    for word in dictionary:
        letters[part_of(word)].update(word)
    assert letters["valid"] | letters["test"] <= letters["train"]


def test_a_line_without_phones_is_named():
    with pytest.raises(ValueError, match=r"line 2 of the dictionary, got 'b # nothing'"):
        parse_dictionary("a AH0\nb # nothing\n")


def test_ipa_covers_all_phones_and_marks_stress(dictionary):
    assert set(IPA) == symbols(pronunciations_of(dictionary, stressed=False))
    assert len(set(IPA.values())) == 39
    assert to_ipa("CH ER1 CH") == "t\u0283\u02c8\u025dt\u0283"
    assert to_ipa("B AH1 T ER0") == "b\u02c8\u028ct\u025a"
    assert to_ipa("B AH T ER") == "b\u0259t\u025a"
    assert to_ipa("HH AW1 S HH OW2 L D") == "h\u02c8a\u028ash\u02cco\u028ald"
    assert to_ipa("") == ""
    with pytest.raises(ValueError, match="got 'XX1'"):
        to_ipa("K XX1 T")


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        ("cats", "cat"),
        ("boxes", "box"),
        ("cities", "city"),
        ("smith's", "smith"),
        ("smiths'", "smiths"),
        ("smiths'", "smith"),
        ("walked", "walk"),
        ("baked", "bake"),
        ("stopped", "stop"),
        ("married", "marry"),
        ("walking", "walk"),
        ("making", "make"),
        ("running", "run"),
        ("walkers", "walk"),
        ("happier", "happy"),
        ("largest", "large"),
        ("quickly", "quick"),
        ("possibly", "possible"),
        ("happily", "happy"),
        ("kindness", "kind"),
        ("happiness", "happy"),
    ],
)
def test_regular_forms_have_their_stems(word, stem):
    assert stem in stems(word)
    assert has_stem_in(word, {stem})


def test_short_and_unrelated_words_have_no_stem():
    assert stems("is") == stems("bed") == stems("cat") == set()
    assert not has_stem_in("running", {"jog", "running", "runner"})


def test_a_quarter_of_the_test_words_have_a_training_stem(dictionary):
    training = {word for word in dictionary if part_of(word) == "train"}
    test_words = [word for word in dictionary if part_of(word) == "test"]
    assert sum(has_stem_in(word, training) for word in test_words) == 2_645


def test_removing_stress_changes_nothing_else():
    assert without_stress("HH AW1 S HH OW2 L D AH0") == "HH AW S HH OW L D AH"
