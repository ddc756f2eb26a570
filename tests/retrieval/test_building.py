"""Making a database: what it holds, that it goes on after any stop to the same bytes, and that documents can be added."""

import dataclasses
import json

import numpy as np
import pytest

from crossattention.retrieval import Chunks, Database, NgramConfig, NgramEmbedder, Settings, build, building, longest_common_run
from crossattention.retrieval.building import STEPS
from retrieval.corpus import SMALL, write_corpus

pytest.importorskip("faiss", reason="the database needs faiss-cpu: pip install 'crossattention[retro]'")
pytest.importorskip("tokenizers", reason="the database needs tokenizers: pip install 'crossattention[retro]'")

TINY = NgramConfig(dim=32, buckets=1 << 10, slots=4)
SETTINGS = Settings(**SMALL)


def embedder() -> NgramEmbedder:
    """One that depends on no corpus, so that a database made at once and one that grew can be compared."""
    return NgramEmbedder(np.ones(TINY.buckets, np.int64), 10, TINY)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "words", sentences=16)


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    return build(tmp_path_factory.mktemp("db") / "db", [corpus], settings=SETTINGS, embedder=embedder())


def content(path):
    """Every file of a database but those that hold hashes of times."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.suffix == ".bin" and file.name != "sources.bin"}


def test_documents_become_chunks_and_come_back_as_they_were(made, corpus):
    database = made.database
    names = [database.document_name(number) for number in range(database.num_documents)]
    assert names == sorted(names[:4], key=lambda name: int(name.split("#")[1])) + [f"words/text{number}.txt" for number in range(6)]
    for number, name in enumerate(names):
        chunks = database.document_chunks(number)
        tokens = database.tokens[chunks.start : chunks.stop]
        lengths = database.lengths[chunks.start : chunks.stop]
        assert (database.documents[chunks.start : chunks.stop] == number).all()
        assert (lengths[:-1] == 8).all() and 1 <= lengths[-1] <= 8
        text = database.tokenizer.decode([int(t) for row, n in zip(tokens, lengths, strict=True) for t in row[:n]])
        file, _, line = name.removeprefix("words/").partition("#")
        raw = (corpus / file).read_text(encoding="utf-8")
        assert text == (json.loads(raw.splitlines()[int(line) - 1])["text"] if line else raw)
        assert database.num_bytes[chunks.start : chunks.stop].sum() == len(text.encode())
    assert (made.added_documents, made.added_chunks) == (10, database.num_chunks)


def test_the_table_is_what_looking_at_every_pair_gives(made):
    database = made.database
    vectors = database.embeddings.astype(np.float64)
    away = ((vectors[:, None] - vectors[None]) ** 2).sum(-1)
    documents = np.asarray(database.documents)
    away[documents[:, None] == documents[None]] = np.inf
    expected = np.sort(away, axis=1)[:, :3]
    np.testing.assert_allclose(database.table.distances, expected, rtol=1e-4, atol=1e-6)
    rows = np.arange(len(vectors))[:, None]
    np.testing.assert_allclose(away[rows, database.table.ids], expected, rtol=1e-4, atol=1e-6)
    tokens, mask = database.neighbour_tokens(database.table.ids[:, 0])
    all_chunks = database.chunks(slice(None))
    runs = longest_common_run(all_chunks.tokens, tokens, all_chunks.mask, mask)
    assert (runs == database.table.runs[:, 0]).all() and runs.max() >= 8 > runs.min()


class StopError(Exception):
    pass


def stopping_at(step, at):
    """A progress function that raises when a step has come so far."""
    seen = []

    def stop(name, done, total):
        if name == step:
            seen.append(done)
            if len(seen) == at:
                raise StopError

    return stop


@pytest.mark.slow
@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("counts", "done")])
@pytest.mark.parametrize("at", [1, 3])
def test_a_stopped_build_goes_on_to_the_same_bytes(step, at, corpus, tmp_path, monkeypatch):
    for name, rows in {"COMMIT_ROWS": 10, "COMMIT_QUERIES": 16, "EMBED_ROWS": 16, "QUERY_ROWS": 16, "SHARD_ROWS": 64}.items():
        monkeypatch.setattr(building, name, rows)
    settings = dataclasses.replace(SETTINGS, exact_below=20)
    whole = build(tmp_path / "whole", [corpus], settings=settings, embedder=embedder())
    with pytest.raises(StopError):
        build(tmp_path / "db", [corpus], settings=settings, embedder=embedder(), on_progress=stopping_at(step, at))
    with pytest.raises(ValueError, match="not finished"):
        Database.open(tmp_path / "db")
    done = build(tmp_path / "db", [corpus], settings=settings, embedder=embedder())
    assert done.resumed == step and done.added_chunks == whole.added_chunks
    assert content(tmp_path / "db") == content(tmp_path / "whole")
    assert Database.open(tmp_path / "db").index_kind == "ivf-pq"


def test_documents_added_later_give_what_a_new_database_would(made, corpus, tmp_path):
    first = tmp_path / "words"
    first.mkdir()
    for name in ("rows.jsonl", "text0.txt", "text1.txt"):
        (first / name).write_bytes((corpus / name).read_bytes())
    options = {"tokenizer": made.database.path / "tokenizer.json", "embedder": embedder()}
    settings = dataclasses.replace(SETTINGS, vocab_size=None)
    build(tmp_path / "db", [first], settings=settings, **options)
    for number in range(2, 6):
        (first / f"text{number}.txt").write_bytes((corpus / f"text{number}.txt").read_bytes())
    grown = build(tmp_path / "db", [first], settings=settings, **options)
    assert grown.added_documents == 4
    theirs, ours = content(made.database.path), content(tmp_path / "db")
    for part in ("ids", "distances", "runs"):
        old, new = theirs.pop(f"neighbours-1-{part}.bin"), ours.pop(f"neighbours-2-{part}.bin")
        assert old[4096:] == new[4096:]
    assert {name: data[4096:] for name, data in ours.items()} == {name: data[4096:] for name, data in theirs.items()}
    again = build(tmp_path / "db", [first], settings=settings, **options)
    assert (again.added_documents, again.added_chunks) == (0, 0)


@pytest.mark.parametrize("is_deleted", [False, True])
@pytest.mark.parametrize("adds_more", [False, True])
def test_a_stopped_addition_can_be_dropped(is_deleted, adds_more, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "COMMIT_ROWS", 10)
    first, db = tmp_path / "words", tmp_path / "db"
    first.mkdir()
    (first / "text0.txt").write_bytes((corpus / "text0.txt").read_bytes())
    before = build(db, [first], settings=SETTINGS, embedder=embedder()).database.num_chunks
    kept = content(db)
    (first / "text1.txt").write_bytes((corpus / "text1.txt").read_bytes())
    with pytest.raises(StopError):
        build(db, [first], settings=SETTINGS, embedder=embedder(), on_progress=stopping_at("embeddings", 1))
    (first / "text1.txt").unlink()
    if is_deleted:
        (db / building.BUILDING_FILE).unlink()
    with pytest.raises(ValueError, match="something was added" if is_deleted else "go on, or --begin-again"):
        build(db, [first], settings=SETTINGS, embedder=embedder())
    if adds_more:
        (first / "text2.txt").write_bytes((corpus / "text2.txt").read_bytes())
    done = build(db, [first], settings=SETTINGS, embedder=embedder(), begin_again=True)
    assert done.resumed is None and done.added_documents == adds_more
    assert Database.open(db).num_chunks == before + done.added_chunks
    if not adds_more:
        assert content(db) == kept


def test_what_does_not_fit_the_database_is_refused(made, corpus, tmp_path):
    path = made.database.path
    with pytest.raises(ValueError, match="has chunk_length 8, asked for was 16"):
        build(path, [corpus], settings=Settings(chunk_length=16), embedder=embedder())
    with pytest.raises(ValueError, match="an embedder that it does not hold"):
        build(path, [write_corpus(tmp_path / "more", seed=1)], settings=SETTINGS)
    other = NgramEmbedder(np.zeros(TINY.buckets, np.int64), 10, TINY)
    with pytest.raises(ValueError, match=rf"another embedder.*{made.database.embedder_sha256[:12]}"):
        Database.open(path, embedder=other)
    with pytest.raises(ValueError, match=r"another tokenizer.*asked for was abcabcabcabc"):
        Database.open(path, tokenizer_sha256="abcabcabcabc")
    changed = tmp_path / "words"
    changed.mkdir()
    (changed / "text0.txt").write_text("something else")
    with pytest.raises(ValueError, match=r"holds 1 of these files with other content: words/text0\.txt"):
        build(path, [changed], settings=SETTINGS, embedder=embedder())


def test_a_query_finds_nothing_that_is_excluded(made):
    database = made.database
    database.use_embedder(embedder())
    chunks = database.chunks(slice(0, 20))
    free = database.retrieve(chunks, 4)
    assert (free.ids[:, 0] == np.arange(20)).all() or (free.distances[:, 0] == 0).all()
    own = np.asarray(database.documents[:20])
    without = database.retrieve(chunks, 4, exclude_document=own)
    assert (database.documents[without.ids] != own[:, None]).all()
    texts = database.documents_where(lambda name: name.endswith(".txt"))
    rows_only = database.retrieve(chunks, 4, exclude=texts)
    assert not texts[database.documents[rows_only.ids]].any()
    nothing = database.retrieve(chunks, 4, exclude=np.ones(database.num_documents, bool))
    assert (nothing.ids == -1).all() and np.isinf(nothing.distances).all() and (nothing.runs == 0).all()
    groups = np.array([database.group_of(database.document_name(int(document))) for document in own], np.uint64)
    assert (database.retrieve(chunks, 4, exclude_group=groups).ids == without.ids).all()


def test_copies_are_reported_and_passed_over(made):
    database = made.database
    database.use_embedder(embedder())
    chunks = database.chunks(slice(None))
    found = database.retrieve(chunks, 3, longest_run=4, exclude_document=np.asarray(database.documents))
    assert found.runs.max() <= 4 and (found.ids >= 0).any(1).all()
    assert database.table.runs.max() > 4
    kept = database.neighbours(np.arange(database.num_chunks), 2, longest_run=4)
    assert kept.runs.max() <= 4 and kept.ids.shape == (database.num_chunks, 2)
    overlap = database.overlap(Chunks(chunks.tokens, chunks.lengths, chunks.num_bytes))
    assert overlap.max() == 1.0


def test_a_database_in_its_own_corpus_is_no_part_of_it(tmp_path):
    corpus = write_corpus(tmp_path / "words", files=2)
    for _ in range(2):
        done = build(corpus / "db", [corpus], settings=SETTINGS, embedder=embedder())
        assert done.database.num_documents == 6
    assert done.added_documents == 0


def test_more_neighbours_than_there_are_chunks_are_none(made):
    database = made.database
    database.use_embedder(embedder())
    total = database.num_chunks
    found = database.retrieve(database.chunks(slice(0, 2)), total + 5, exclude_document=0)
    own = len(database.document_chunks(0))
    assert ((found.ids >= 0).sum(1) == total - own).all() and (found.ids[:, total - own :] == -1).all()
    copies = database.retrieve(database.chunks(slice(0, 2)), total, longest_run=0)
    assert copies.runs.max() == 0


def test_the_list_of_files_is_written_once_beside_the_state(corpus, tmp_path, monkeypatch):
    written = []
    own = building.write_json

    def seen(path, value):
        written.append((path.name, "sources" in value))
        own(path, value)

    monkeypatch.setattr(building, "write_json", seen)
    build(tmp_path / "db", [corpus], settings=SETTINGS, embedder=embedder())
    assert [name for name, has_sources in written if has_sources] == [building.SOURCES_FILE]
    assert [name for name, _ in written].count(building.BUILDING_FILE) > 4
    assert not (tmp_path / "db" / building.SOURCES_FILE).exists()


def test_an_approximate_index_is_trained_anew_when_the_database_has_outgrown_it(tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, exact_below=20, neighbours=0)
    folders = [write_corpus(tmp_path / f"words{number}", sentences=16, seed=number) for number in range(3)]
    monkeypatch.setattr(building, "RETRAIN_GROWTH", 2.5)
    trained = []
    for folder in folders:
        database = build(tmp_path / "db", [folder], settings=settings, embedder=embedder()).database
        trained.append(database.state["index"]["rows"])
        assert database.state["index"]["shards"][-1]["end"] == database.num_chunks
    chunks = database.num_chunks
    assert trained[0] == trained[1] < 255 + chunks // 2 and trained[2] == chunks
    found, _ = database.search(np.asarray(database.embeddings[-5:], np.float32), 1)
    assert (np.asarray(database.embeddings)[found[:, 0]] == np.asarray(database.embeddings[-5:])).all()
    assert len(list((tmp_path / "db").glob("index-*.faiss"))) == 2
