"""Counts around masked bytes, against the plainest counting there is."""

from pathlib import Path

import numpy as np
import pytest

from crossattention.data.byte_windows import MASK, ByteStream, encode
from crossattention.data.text_folder import list_text
from crossattention.recipes.byte_ngrams import ByteNGrams, read_text, score_masked

BLANK = b"\0 \t\n\r\v\f"
TEXT = bytes(np.random.default_rng(0).choice(list(b"aaabbc  \n\0"), 400).tolist())


def interpolated(counts: dict[int, int], shorter: list[float]) -> list[float]:
    total, types = sum(counts.values()), len(counts)
    return [(counts.get(x, 0) + 8 * types * shorter[x]) / (total + 8 * types) if total else shorter[x] for x in range(256)]


def counted(left: bytes, right: bytes, width: int, at: int) -> dict[int, int]:
    """How often each byte is the `at`-th of `width` word bytes between two contexts; before the text, files end."""
    padded = b"\0" * 4 + TEXT
    counts: dict[int, int] = {}
    for end in range(5, len(padded) + 1):
        between, after = padded[end : end + width], padded[end + width : end + width + len(right)]
        is_there = padded[:end].endswith(left) and len(between) == width and after == right
        if is_there and not set(between) & set(BLANK):
            counts[between[at]] = counts.get(between[at], 0) + 1
    return counts


def unigram() -> list[float]:
    return interpolated({x: TEXT.count(x) for x in set(TEXT) - set(BLANK)}, [1 / 256] * 256)


def after(left: bytes, distance: int) -> list[float]:
    return interpolated(counted(left, b"", distance, distance - 1), after(left[1:], distance)) if left else unigram()


def between(left: bytes, right: bytes, width: int, at: int) -> list[float]:
    if not left and not right:
        return unigram()
    shorter = between(left[1:], right, width, at) if len(left) > len(right) else between(left, right[:-1], width, at)
    return interpolated(counted(left, right, width, at), shorter)


@pytest.fixture(scope="module")
def ngrams() -> ByteNGrams:
    return ByteNGrams(np.frombuffer(TEXT, np.uint8))


@pytest.mark.parametrize(
    ("left", "distance"), [(b"", 1), (b"a", 1), (b"ab", 2), (b"a b", 1), (b"\0a", 1), (b"bcab", 3), (b"zz", 1)]
)
def test_what_follows_a_context_is_counted_exactly(ngrams: ByteNGrams, left: bytes, distance: int) -> None:
    np.testing.assert_allclose(ngrams.after(left, distance), after(left, distance), rtol=0, atol=1e-14)
    assert ngrams.after(left, distance).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("left", "right", "width"),
    [(b"a", b"b", 1), (b" ", b" ", 2), (b"", b"a", 1), (b"\n", b"", 3), (b"ab", b" a", 2), (b" a", b"b", 1)],
)
def test_what_stands_between_two_contexts_is_counted_exactly(ngrams: ByteNGrams, left: bytes, right: bytes, width: int) -> None:
    found = ngrams.between(left, right, width)
    for at in range(width):
        np.testing.assert_allclose(found[at], between(left, right, width, at), rtol=0, atol=1e-14)


def test_scores_are_those_of_the_probabilities(ngrams: ByteNGrams) -> None:
    whole = encode(b"ab ab cab")
    places = np.array([3, 4, 7])
    ids = whole.copy()
    ids[places] = MASK
    found = score_masked(ngrams, ids[None], places[None], whole[places][None])
    expected = {
        "unigram": [unigram()] * 3,
        "ngram_left": [after(b"ab ", 1), after(b"ab ", 2), after(b" c", 1)],
        "ngram_both": [between(b"ab ", b" c", 2, 0), between(b"ab ", b" c", 2, 1), between(b" c", b"b", 1, 0)],
        "ngram_told": [after(b"ab ", 1), after(b"ab a", 1), after(b"ab c", 1)],
    }
    for name, probabilities in expected.items():
        bits = [-np.log2(row[byte]) for row, byte in zip(probabilities, b"aba", strict=True)]
        right = [int(np.argmax(row)) == byte for row, byte in zip(probabilities, b"aba", strict=True)]
        assert found[name].bits_per_byte == pytest.approx(np.mean(bits), abs=1e-12), name
        assert found[name].accuracy == pytest.approx(np.mean(right)), name


def test_more_of_the_context_helps_where_the_text_repeats() -> None:
    ngrams = ByteNGrams(np.frombuffer(b"the quick brown fox\n" * 50, np.uint8))
    whole = encode(b"the quick brown fox\n")
    places = np.arange(4, 9)
    ids = whole.copy()
    ids[places] = MASK
    found = score_masked(ngrams, ids[None], places[None], whole[places][None])
    assert found["unigram"].bits_per_byte > 3 > 0.5 > found["ngram_both"].bits_per_byte
    assert found["ngram_both"].accuracy == found["ngram_left"].accuracy == 1


def test_a_long_stream_is_read_in_parts(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"c" * 300_000)
    stream = ByteStream(list_text(tmp_path), (0, 1))
    assert read_text(stream).tobytes() == b"ab\0" + b"c" * 300_000 + b"\0"
    parts = read_text(stream, most=1 << 17)
    assert len(parts) == 1 << 17 and parts[:4].tobytes() == b"ab\0c"
    with pytest.raises(ValueError, match=r"got 0; take parts of it"):
        ByteNGrams(np.empty(0, np.uint8))
