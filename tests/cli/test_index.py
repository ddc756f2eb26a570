"""The verbs index and neighbours: what they print, and that a user's faults are one sentence."""

import json

import pytest

from cli.conftest import type_in
from retrieval.corpus import write_corpus

pytest.importorskip("faiss", reason="the database needs faiss-cpu: pip install 'crossattention[retro]'")
SMALL = ["--vocab-size", 300, "--chunk-length", 8, "--neighbours", 3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("corpus") / "words")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


@pytest.fixture(scope="module")
def indexed(corpus, tmp_path_factory):
    database = tmp_path_factory.mktemp("db") / "db"
    return database, type_in("index", corpus, "--out", database, *SMALL)


def test_index_says_what_it_made_and_what_it_left_out(indexed):
    database, (code, stdout, stderr) = indexed
    assert code == 0
    lines = stdout.splitlines()
    assert lines[0] == f"database   {database}" and lines[1] == "documents  10 (added: 10)"
    assert "left out   1 not UTF-8" in lines
    assert "left out: words/latin.txt: not UTF-8 (byte 3: " in stderr
    assert "finding neighbours: " in stderr and lines[-1].startswith("copies     ")


def test_again_it_adds_nothing_and_json_says_so(indexed, corpus):
    database, _ = indexed
    code, stdout, _ = type_in("index", corpus, "--out", database, "--json")
    found = json.loads(stdout)
    assert code == 0 and (found["documents"], found["added_documents"], found["added_chunks"]) == (10, 0, 0)
    assert found["index"] == "exact" and found["neighbours"] == 3 and found["embedder"]["kind"] == "ngrams"
    assert found["left_out"]["counts"] == {"not UTF-8": 1}


def test_neighbours_are_found_with_what_follows_them(indexed, corpus):
    database, _ = indexed
    text = (corpus / "text0.txt").read_text()[:60]
    code, stdout, stderr = type_in("neighbours", database, text, "--best", 2, "--json")
    assert code == 0 and f"loaded {database}" in stderr
    (first, *rest) = json.loads(stdout)["chunks"]
    near = first["neighbours"][0]
    assert len(first["neighbours"]) == 2 and rest and near["distance"] == 0 and near["longest_run"] == 8
    assert near["document"] == "words/text0.txt" and near["text"] == first["text"] and near["continuation"] == rest[0]["text"]
    lines = type_in("neighbours", database, text)[1].splitlines()
    assert lines[1].startswith("1. distance 0.0000, 8 tokens in a row in common, words/text0.txt, chunk ")


def test_documents_and_copies_can_be_passed_over(indexed, corpus):
    database, _ = indexed
    text = (corpus / "text0.txt").read_text()[:60]
    for flags in (["--exclude", "text0"], ["--longest-run", 4]):
        found = json.loads(type_in("neighbours", database, text, "--json", *flags)[1])["chunks"]
        all_near = [near for chunk in found for near in chunk["neighbours"]]
        assert all_near
        if flags[0] == "--exclude":
            assert all(near["document"] != "words/text0.txt" for near in all_near)
        else:
            assert all(near["longest_run"] <= 4 for near in all_near)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["index", "{corpus}", "--out", "{db}", "--chunk-length", 16], "has chunk_length 8, asked for was 16"),
        (["index", "--out", "{db}"], "expected at least one folder"),
        (["index", "{corpus}/absent", "--out", "{db}"], "found nothing"),
        (["index", "{corpus}", "--out", "{db}2", "--strict"], "latin.txt: not UTF-8 (byte 3"),
        (["neighbours", "{corpus}", "x"], "expected a chunk database"),
        (["neighbours", "{db}", "x", "--best", 0], "at least 1 neighbour, got --best 0"),
        (["neighbours", "{db}", ""], "one without tokens"),
        (["neighbours", "{db}", "x", "--exclude", "("], "expected --exclude as a pattern"),
        (["neighbours", "{db}", "x", "--embedder-tokenizer", "t.json"], "belongs to --embedder"),
    ],
)
def test_a_fault_is_one_sentence(words, said, indexed, corpus):
    database, _ = indexed
    code, stdout, stderr = type_in(*(str(word).format(corpus=corpus, db=database) for word in words))
    assert (code, stdout) == (2, "") and said in stderr


def test_a_damaged_database_is_named(indexed, corpus, tmp_path):
    copy = tmp_path / "db"
    copy.mkdir()
    for file in indexed[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tokens = copy / "tokens.bin"
    data = tokens.read_bytes()
    for damaged in (data[:-1], data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]):
        tokens.write_bytes(damaged)
        code, _, stderr = type_in("neighbours", copy, "the cat")
        assert code == 2 and f"{tokens} is damaged" in stderr
