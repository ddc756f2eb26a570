"""Tokenizers: what comes back, what is refused, and what JSON keeps."""

import json

import pytest

from crossattention.data.vocabulary import (
    BEGIN,
    END,
    FIRST_ID,
    PAD,
    UNKNOWN,
    BPETokenizer,
    CharacterTokenizer,
    UnknownSymbol,
    WordTokenizer,
    build_tokenizer,
    tokenizer_from_json,
)

TEXTS = ["the cat sat", "the dog", "caf\u00e9 <end> of the day"]


def built(kind):
    if kind == "bpe":
        pytest.importorskip("tokenizers", reason="BPE needs the data extra")
    return build_tokenizer(kind, TEXTS, size=300 if kind == "bpe" else None)


@pytest.mark.parametrize("kind", ["characters", "words", "bpe"])
def test_training_texts_come_back_unchanged_and_never_use_a_special_id(kind):
    tokenizer = built(kind)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert min(ids) >= FIRST_ID
        assert max(ids) < tokenizer.size
        assert tokenizer.decode([BEGIN, *ids, END, PAD, PAD]) == text


@pytest.mark.parametrize("kind", ["characters", "words", "bpe"])
def test_json_keeps_the_whole_tokenizer(kind):
    tokenizer = built(kind)
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.size == tokenizer.size
    assert again.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
    assert again.to_json() == tokenizer.to_json()


@pytest.mark.parametrize("kind", ["characters", "words", "bpe"])
def test_ids_do_not_depend_on_the_order_of_the_texts(kind):
    if kind == "bpe":
        pytest.importorskip("tokenizers", reason="BPE needs the data extra")
    size = 300 if kind == "bpe" else None
    assert build_tokenizer(kind, TEXTS[::-1], size=size).to_json() == build_tokenizer(kind, TEXTS, size=size).to_json()


@pytest.mark.parametrize("kind", ["characters", "words", "bpe"])
def test_one_token_an_id_for_the_map_axes(kind):
    tokenizer = built(kind)
    ids = tokenizer.encode("the cat")
    tokens = tokenizer.tokens([*ids, END])
    assert len(tokens) == len(ids)
    assert "".join(tokens).replace(" ", "") == "thecat"


def test_a_character_never_seen_is_named_with_its_place_and_the_known_ones():
    with pytest.raises(UnknownSymbol, match=r"symbol '\$' at position 3 of 'ab\$c'.*known symbols: a b c"):
        CharacterTokenizer("abc").encode("ab$c")


def test_a_long_alphabet_is_not_listed_whole():
    with pytest.raises(UnknownSymbol, match=r"and 920 more$"):
        CharacterTokenizer([chr(0x4E00 + index) for index in range(1000)]).encode("x")


def test_a_word_never_seen_is_unknown_unless_strict():
    assert WordTokenizer(["a", "b"]).encode("a x b") == [4, UNKNOWN, 5]
    assert WordTokenizer(["a", "b"]).decode([4, UNKNOWN, 5]) == "a \ufffd b"
    assert WordTokenizer(["a", "b"]).encode("a \ufffd b") == [4, UNKNOWN, 5]
    with pytest.raises(UnknownSymbol, match=r"symbol 'x', word 2 of 'a x b'.*known symbols: a b"):
        WordTokenizer(["a", "b"], strict=True).encode("a x b")


@pytest.mark.parametrize("kind", ["characters", "bpe", "strict words"])
def test_where_every_symbol_is_known_an_unknown_one_is_left_out(kind):
    tokenizer = WordTokenizer(["the", "cat"], strict=True) if kind == "strict words" else built(kind)
    first, second = tokenizer.encode("the"), tokenizer.encode("cat")
    assert tokenizer.decode([*first, UNKNOWN, *second]).replace(" ", "") == "thecat"
    assert len(tokenizer.tokens([UNKNOWN, *first])) == len(first)
    with pytest.raises(ValueError, match=rf"ids from 0 to {tokenizer.size - 1}, got {tokenizer.size}"):
        tokenizer.decode([tokenizer.size])


def test_the_most_frequent_words_are_kept():
    assert build_tokenizer("words", ["b a a c c c"], size=FIRST_ID + 2).symbols == ("c", "a")


def test_bpe_keeps_any_text_and_learns_merges():
    pytest.importorskip("tokenizers", reason="BPE needs the data extra")
    tokenizer = build_tokenizer("bpe", ["lower lowest newer newest"] * 10, size=290)
    for text in ["low", " \u65e5\u672c \U0001f600\t\n", "<pad> [CLS]"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("lowest")) < len("lowest")


def test_faults_of_the_caller_are_named():
    with pytest.raises(ValueError, match=r"at least 260 ids .*, got 100"):
        BPETokenizer.train(["a"], 100)
    with pytest.raises(ValueError, match=r"expected a size for the kind 'bpe'"):
        build_tokenizer("bpe", ["a"])
    with pytest.raises(ValueError, match=r"leave size=9 out"):
        build_tokenizer("characters", ["a"], size=9)
    with pytest.raises(ValueError, match=r"more than the 4 special ids, got size=4"):
        build_tokenizer("words", ["a"], size=4)
    with pytest.raises(ValueError, match=r"strict=True with kind 'words' only, got kind 'bpe'"):
        build_tokenizer("bpe", ["a"], size=300, strict=True)
    with pytest.raises(ValueError, match=r"'characters', 'words', 'bpe', got 'letters'"):
        build_tokenizer("letters", ["a"])
    with pytest.raises(ValueError, match=r"'characters', 'words', 'bpe', got None"):
        tokenizer_from_json({})
    with pytest.raises(ValueError, match=r"expected the key 'symbols' in a 'words' tokenizer, got \['kind'\]"):
        tokenizer_from_json({"kind": "words"})
    with pytest.raises(ValueError, match=r"ids from 0 to 6, got 9"):
        CharacterTokenizer("abc").decode([4, 9])
    with pytest.raises(ValueError, match=r"\['a'\] more than once"):
        WordTokenizer(["a", "b", "a"])
    with pytest.raises(ValueError, match=r"single characters, got \['ab'\]"):
        CharacterTokenizer(["ab"])
    with pytest.raises(ValueError, match=r"words without spaces, got \['a b'\]"):
        WordTokenizer(["a b"])


def test_bpe_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'crossattention\[data\]'"):
        build_tokenizer("bpe", ["a"], size=300)
