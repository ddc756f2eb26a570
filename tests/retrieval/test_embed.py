"""The default embedder: its formula, and that rows stand by themselves."""

import math

import numpy as np
import pytest

from crossattention.retrieval.chunks import Chunks
from crossattention.retrieval.embed import ChunkTexts, NgramConfig, NgramEmbedder, bucket_counts, check_embeddings, count_chunks

CONFIG = NgramConfig(dim=16, buckets=64, slots=4)


def chunks_of(tokens, lengths):
    return ChunkTexts(Chunks(tokens, lengths, lengths), None)


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    return random.integers(0, 9, (40, 7)), random.integers(0, 8, 40)


def test_vectors_are_the_formula(rows):
    tokens, lengths = rows
    counts, total = count_chunks([(tokens[:13], lengths[:13]), (tokens[13:], lengths[13:])], CONFIG)
    embedder = NgramEmbedder(counts, total, CONFIG)
    found = embedder(chunks_of(tokens, lengths))
    projection = np.zeros((CONFIG.dim, CONFIG.buckets))
    for bucket in range(CONFIG.buckets):
        projection[embedder._places[bucket], bucket] += embedder._signs[bucket]
    assert (np.abs(projection[projection != 0]) == 0.5).all() and ((projection != 0).sum(0) == 4).all()
    for row in range(40):
        at, buckets, times = bucket_counts(tokens[row : row + 1], lengths[row : row + 1], CONFIG)
        assert (at == 0).all() and times.sum() == sum(max(0, lengths[row] - order + 1) for order in (1, 2, 3))
        x = np.zeros(CONFIG.buckets)
        x[buckets] = (1 + np.log(times)) * (1 + np.log((1 + total) / (1 + counts[buckets])))
        y = projection @ x
        expected = y / np.linalg.norm(y) if lengths[row] else np.zeros(CONFIG.dim)
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
    df = [
        sum(bucket in set(bucket_counts(tokens[r : r + 1], lengths[r : r + 1], CONFIG)[1]) for r in range(40))
        for bucket in range(5)
    ]
    assert counts[:5].tolist() == df


def test_a_row_stands_by_itself_and_padding_does_not_count(rows):
    tokens, lengths = rows
    embedder = NgramEmbedder(np.ones(64, np.int64), 3, CONFIG)
    whole = embedder(chunks_of(tokens, lengths))
    alone = np.concatenate([embedder(chunks_of(tokens[row : row + 1], lengths[row : row + 1])) for row in range(40)])
    assert (whole == alone).all()
    other = np.where(np.arange(7) < lengths[:, None], tokens, 8 - tokens)
    assert (embedder(chunks_of(other, lengths)) == whole).all()


def test_projected_cosines_are_near_the_true_ones():
    random = np.random.default_rng(1)
    first = random.integers(0, 500, (30, 64))
    second = np.where(random.random((30, 64)) < 0.5, first, random.integers(0, 500, (30, 64)))
    lengths = np.full(30, 64)
    config = NgramConfig()
    embedder = NgramEmbedder(np.ones(config.buckets, np.int64), 1, config)
    wide = NgramEmbedder(np.ones(config.buckets, np.int64), 1, NgramConfig(dim=8192))
    cosines = [(e(chunks_of(first, lengths)) * e(chunks_of(second, lengths))).sum(1) for e in (embedder, wide)]
    assert np.abs(cosines[0] - cosines[1]).mean() < 2 / math.sqrt(256)


@pytest.mark.parametrize("sizes", [{"dim": 10, "slots": 4}, {"buckets": 100}, {"orders": ()}, {"slots": 0}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="expected"):
        NgramConfig(**sizes)


def test_what_an_embedder_gives_is_checked():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(2, 4\)"):
        check_embeddings(np.zeros((2, 4)), 2, 3)
    with pytest.raises(ValueError, match="not finite, in row 1"):
        check_embeddings(np.array([[0.0], [np.nan]]), 2, 1)
