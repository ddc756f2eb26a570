"""Searches: exact ones against looking at every pair, approximate ones against exact ones, and what must not be found."""

import numpy as np
import pytest

from crossattention.retrieval import search as searching
from crossattention.retrieval.search import Exclusion, IvfConfig, IvfIndex, Search, add_to_index, train_index, tuned

pytest.importorskip("faiss", reason="searches need faiss-cpu: pip install 'crossattention[retro]'")
CONFIG = IvfConfig(lists=16, code_bytes=4, probes=8, candidates=64, code_parts=8)
OLD_CONFIG = IvfConfig(lists=16, code_bytes=4, probes=8, candidates=64)


def clustered(count: int, dim: int = 16, clusters: int = 40, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((clusters, dim))
    return (centres[random.integers(0, clusters, count)] + 0.3 * random.standard_normal((count, dim))).astype(np.float16)


def by_hand(queries, vectors, k, allowed=None):
    away = ((queries[:, None].astype(np.float64) - vectors[None].astype(np.float64)) ** 2).sum(-1)
    if allowed is not None:
        away[~allowed] = np.inf
    order = np.argsort(away, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(away, order, 1)


@pytest.fixture(scope="module")
def vectors():
    return clustered(1500)


@pytest.fixture(scope="module")
def shards(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    train_index(vectors, CONFIG, folder / "trained")
    paths = [folder / "whole", folder / "first", folder / "second"]
    for path, begin, end in zip(paths, (0, 0, 700), (1500, 700, 1500), strict=True):
        add_to_index(folder / "trained", vectors, begin, end, path, lambda row: None)
    return paths


def test_an_exact_search_is_that_of_every_pair(vectors, monkeypatch):
    monkeypatch.setattr(searching, "BLOCK_ROWS", 400)
    queries = clustered(30, seed=1)
    ids, distances = Search(vectors).nearest(queries, 7)
    expected, away = by_hand(queries, vectors, 7)
    assert (ids == expected).all()
    np.testing.assert_allclose(distances, away, rtol=1e-5)
    ids, _ = Search(vectors).nearest(queries, 7, begin=600)
    assert (ids == by_hand(queries, vectors[600:], 7)[0] + 600).all()


@pytest.mark.parametrize("many", [1, 64])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.9, 0.999, 1.0])
def test_what_is_excluded_is_not_found_and_all_else_is(share, many, vectors, monkeypatch):
    for name, size in {"BLOCK_ROWS": 400, "_SAMPLED": 50, "_SCANNED_TOGETHER": 7, "_MOST_EXACT": 24, "_MANY": many}.items():
        monkeypatch.setattr(searching, name, size)
    queries = clustered(20, seed=1)
    out = np.random.default_rng(2).random((20, 1500)) < share
    ids, distances = Search(vectors).nearest(queries, 5, exclusion=Exclusion(lambda rows, names: out[rows[:, None], names]))
    expected, away = by_hand(queries, vectors, 5, ~out)
    there = np.isfinite(away)
    assert (ids == np.where(there, expected, -1)).all() and (np.isinf(distances) == ~there).all()
    np.testing.assert_allclose(distances[there], away[there], rtol=1e-5)


def test_an_approximate_search_finds_nearly_all_and_distances_are_exact(vectors, shards):
    queries = clustered(200, seed=1)
    _, truth = Search(vectors).nearest(queries, 10)
    ids, distances = Search(vectors, IvfIndex(shards[:1], CONFIG)).nearest(queries, 10)
    assert (distances <= truth[:, -1:] * (1 + 1e-6)).mean() >= 0.95
    away = ((queries[:, None].astype(np.float64) - vectors[ids].astype(np.float64)) ** 2).sum(-1)
    np.testing.assert_allclose(distances, away, rtol=1e-5)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_several_files_are_as_one(vectors, shards):
    queries = clustered(50, seed=1)
    one, many = (Search(vectors, IvfIndex(paths, CONFIG)).nearest(queries, 10)[1] for paths in (shards[:1], shards[1:]))
    np.testing.assert_allclose(one, many)


def test_an_approximate_search_looks_further_where_much_is_excluded(vectors, shards, monkeypatch):
    queries = clustered(20, seed=1)
    out = np.random.default_rng(2).random((20, 1500)) < 0.97
    exclusion = Exclusion(lambda rows, names: out[rows[:, None], names])
    for scanned in (0, 1500):  # by more parts of the index, and by all stored embeddings
        monkeypatch.setattr(searching, "_SCANNED", scanned)
        ids, _ = Search(vectors, IvfIndex(shards[:1], CONFIG)).nearest(queries, 5, exclusion=exclusion)
        assert (ids >= 0).all() and not out[np.arange(20)[:, None], ids].any()


def test_what_does_not_fit_is_named(vectors, shards, tmp_path):
    with pytest.raises(ValueError, match=r"queries of shape \(q, 16\), got \(3, 15\)"):
        Search(vectors).nearest(np.zeros((3, 15)), 2)
    with pytest.raises(ValueError, match="at least 1 neighbour, got 0"):
        Search(vectors).nearest(np.zeros((3, 16)), 0)
    damaged = tmp_path / "index.faiss"
    damaged.write_bytes(b"?" + shards[0].read_bytes()[1:])
    with pytest.raises(ValueError, match=r"index\.faiss is damaged or no index of FAISS"):
        IvfIndex([damaged], CONFIG)


def test_sizes_follow_the_number_and_the_width():
    assert IvfConfig.of(1_000_000, 256) == IvfConfig(lists=2048, code_bytes=64, code_parts=128)
    assert IvfConfig.of(300, 384).lists == 7 and IvfConfig.of(300, 30) == IvfConfig(lists=7, code_bytes=8, code_parts=15)


@pytest.mark.slow
def test_an_index_of_an_older_database_is_read_and_added_to(vectors, tmp_path):
    train_index(vectors, OLD_CONFIG, tmp_path / "trained")
    add_to_index(tmp_path / "trained", vectors, 0, 1500, tmp_path / "index", lambda row: None)
    held = {"lists": 16, "code_bytes": 4, "probes": 8, "candidates": 64, "shard_rows": 1 << 20}  # as it is written there
    queries = clustered(200, seed=1)
    _, truth = Search(vectors).nearest(queries, 10)
    index = IvfIndex([tmp_path / "index"], IvfConfig(**held))
    _, distances = Search(vectors, index).nearest(queries, 10)
    assert (distances <= truth[:, -1:] * (1 + 1e-6)).mean() >= 0.95
    assert tuned(index, vectors, lambda rows: Exclusion(lambda numbers, ids: ids == rows[numbers][:, None]))[1] >= 0.95


@pytest.mark.parametrize(("spread", "least", "most"), [(0.02, 16, 16), (40.0, 17, 64)])
@pytest.mark.slow
def test_an_index_is_looked_into_as_far_as_its_vectors_need(spread, least, most, tmp_path):
    random = np.random.default_rng(3)
    centres = random.standard_normal((32, 16))
    vectors = (np.repeat(centres, 125, 0) + spread * random.standard_normal((4000, 16))).astype(np.float16)
    config = IvfConfig(lists=64, code_bytes=4, code_parts=8)
    train_index(vectors, config, tmp_path / "trained")
    add_to_index(tmp_path / "trained", vectors, 0, 4000, tmp_path / "index", lambda row: None)
    index = IvfIndex([tmp_path / "index"], config)
    group = np.arange(4000) // 5

    def own(rows):
        return Exclusion(lambda numbers, ids: group[ids] == group[rows[numbers]][:, None])

    found, recall = tuned(index, vectors, own)
    assert recall >= searching.RECALL and least <= found.probes <= most
    rows = np.arange(0, 4000, 17)
    queries = np.asarray(vectors[rows], np.float32)
    _, truth = Search(vectors).nearest(queries, 10, exclusion=own(rows))
    _, distances = Search(vectors, IvfIndex.of_parts(index, found)).nearest(queries, 10, exclusion=own(rows))
    assert (distances <= truth[:, -1:] * (1 + 1e-6)).mean() >= searching.RECALL


def test_where_everything_is_excluded_an_index_stays_as_it_is(vectors, shards):
    index = IvfIndex(shards[:1], CONFIG)
    assert tuned(index, vectors, lambda rows: Exclusion(lambda numbers, ids: np.ones(ids.shape, bool))) == (CONFIG, 1.0)
