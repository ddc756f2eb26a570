"""Windows of a chunk database: parts without leaks, every chunk scored once, neighbours of training documents alone."""

from pathlib import Path

import numpy as np
import pytest

from crossattention.data.chunk_windows import ChunkWindows, Neighbourhood, batch_of, parts_of, window_numbers, windows_of
from crossattention.retrieval import Database
from recipes.copied_texts import CHUNK, database_of, write_copies

pytest.importorskip("faiss", reason="needs the extra retro")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    folder = tmp_path_factory.mktemp("retro")
    return Database.open(database_of(write_copies(folder / "text", documents=12, passages=8, words=12), folder / "db"))


def test_no_document_stands_in_two_parts(database: Database) -> None:
    parts = parts_of(database)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(database.num_documents))
    assert all(len(documents) for documents in parts.values())
    groups = [set(database.document_groups[documents].tolist()) for documents in parts.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))


@pytest.mark.parametrize(("chunks", "stride"), [(4, 2), (3, 3), (50, 25)])
def test_every_chunk_is_scored_once_with_what_is_before_it(database: Database, chunks: int, stride: int) -> None:
    documents = np.arange(database.num_documents)
    scored = []
    for window in windows_of(database, documents, chunks=chunks, stride=stride):
        held = database.document_chunks(int(database.documents[window.first]))
        assert window.count <= chunks and window.first + window.count <= held.stop
        assert window.is_start == (window.first + window.scored_from == held.start)
        before = window.scored_from
        assert window.is_start or before == min(window.first + before - held.start, chunks - stride)
        scored += range(window.first + window.scored_from, window.first + window.count)
    assert sorted(scored) == list(range(database.num_chunks))


def test_neighbours_are_the_tables_without_those_that_are_held_out(database: Database) -> None:
    allowed = parts_of(database)["train"]
    near = Neighbourhood(database, allowed)
    chunks = np.arange(database.num_chunks)
    found = near.nearest(chunks, 2)
    for chunk, row in enumerate(found.tolist()):
        wanted = [n for n in database.table.ids[chunk].tolist() if n >= 0 and database.documents[n] in allowed][:2]
        assert row == wanted + [-1] * (2 - len(wanted))
        assert all(database.documents[n] != database.documents[chunk] for n in row if n >= 0)
    assert (near.nearest(np.array([-1, 0]), 9)[0] == -1).all()
    drawn = near.random((500,), np.random.default_rng(0))
    assert set(database.documents[drawn].tolist()) <= set(allowed.tolist())
    of_allowed = np.isin(database.documents, allowed)
    assert len(set(drawn.tolist())) > 0.9 * of_allowed.sum()


def test_overlap_is_the_longest_run_in_common_with_what_may_be_read(database: Database) -> None:
    allowed = parts_of(database)["train"]
    found = Neighbourhood(database, allowed).overlap(np.arange(database.num_chunks))
    for chunk, share in enumerate(found.tolist()):
        pairs = zip(database.table.ids[chunk].tolist(), database.table.runs[chunk].tolist(), strict=True)
        assert share == max([run for n, run in pairs if n >= 0 and database.documents[n] in allowed], default=0) / CHUNK
    assert found.max() == 1.0


def test_batches_are_a_function_of_the_step_and_hold_every_window_once(database: Database) -> None:
    parts = parts_of(database)
    near = Neighbourhood(database, parts["train"])
    windows = ChunkWindows(database, parts["train"], chunks=3, batch_size=4, neighbourhood=near, k=2, seed=1)
    again = ChunkWindows(database, parts["train"], chunks=3, batch_size=4, neighbourhood=near, k=2, seed=1)
    batches = [windows.batch_at(step) for step in range(windows.steps_per_epoch)]
    assert {index for batch in batches for index in batch.indices} == set(range(len(windows)))
    later = again.batch_at(2)
    assert later.indices == batches[2].indices and bool((later.neighbours == batches[2].neighbours).all())
    assert windows.batch_at(2 + windows.steps_per_epoch).indices != later.indices
    assert tuple(later.ids.shape) == (4, 3 * CHUNK) and tuple(later.neighbours.shape) == (4, 2, 2, 2 * CHUNK)
    assert later.num_tokens == int(later.real.sum())


def test_unread_windows_get_no_neighbours(database: Database) -> None:
    parts = parts_of(database)
    near = Neighbourhood(database, parts["train"])
    windows = ChunkWindows(database, parts["train"], chunks=3, batch_size=64, neighbourhood=near, k=2, unread=0.5)
    has_any = windows.batch_at(0).neighbour_mask.flatten(1).any(1).double().mean()
    assert 0.25 < has_any < 0.75
    none = ChunkWindows(database, parts["train"], chunks=3, batch_size=4, neighbourhood=None, k=0).batch_at(0)
    assert none.neighbours.shape[2] == 0


def test_a_batch_holds_the_documents_text_and_its_chunks_neighbours(database: Database) -> None:
    near = Neighbourhood(database, np.arange(database.num_documents))
    [window, *_] = windows_of(database, np.array([3]), chunks=50, stride=50)
    numbers = window_numbers([window], 50)
    ids = near.nearest(numbers[:, :-1], 2)
    batch = batch_of(database, numbers, ids)
    text = database.tokenizer.decode(batch.ids[0][batch.real[0]].tolist(), skip_special_tokens=False)
    held = database.document_chunks(3)
    assert text == "".join(database.text(chunk) for chunk in held)
    tokens, mask = database.neighbour_tokens(ids)
    assert (batch.neighbours.numpy() == tokens).all() and (batch.neighbour_mask.numpy() == mask).all()
    assert not batch.real[0, len(held) * CHUNK :].any() and not batch.neighbour_mask[0, len(held) :].any()


def test_impossible_windows_are_refused(database: Database, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chunks must be at least 1, got 0"):
        ChunkWindows(database, np.array([0]), chunks=0, batch_size=1, neighbourhood=None, k=0)
    with pytest.raises(ValueError, match="the 0 documents hold no chunk"):
        ChunkWindows(database, np.array([], np.int64), chunks=1, batch_size=1, neighbourhood=None, k=0)
    two = Database.open(database_of(write_copies(tmp_path / "text", documents=2, passages=4, words=12), tmp_path / "db"))
    with pytest.raises(ValueError, match="has 2 groups of documents"):
        parts_of(two)
