"""Chunks in memory: cutting, continuations, common runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossattention.retrieval.chunks import Chunker, cut, longest_common_run, with_continuation
from crossattention.retrieval.documents import pieces_of

tokenizers = pytest.importorskip("tokenizers", reason="chunks need tokenizers: pip install 'crossattention[retro]'")


@pytest.fixture(scope="module")
def tokenizer():
    from crossattention.retrieval.tokenizer import train_tokenizer

    content = train_tokenizer(iter(["zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich\n" * 20]), vocab_size=300)
    made = tokenizers.Tokenizer.from_str(content.decode())
    made.encode_special_tokens = True
    return made


@given(st.text(max_size=80), st.integers(1, 9))
@settings(max_examples=40)
def test_any_text_becomes_chunks_and_the_same_text(tokenizer, text, length):
    text = text.encode("utf-8", "ignore").decode()
    chunks = cut(text, tokenizer, length=length)
    tokens = chunks.tokens[chunks.mask].tolist()
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    assert chunks.num_bytes.sum() == len(text.encode())
    assert (chunks.lengths[:-1] == length).all() and (len(chunks) == 0 or chunks.lengths[-1] >= 1)
    assert (chunks.tokens[~chunks.mask] == 0).all()


def test_a_special_token_in_a_text_is_text(tokenizer):
    chunks = cut("a<pad>b", tokenizer)
    assert (
        chunks.lengths.sum() > 3 and tokenizer.decode(chunks.tokens[chunks.mask].tolist(), skip_special_tokens=False) == "a<pad>b"
    )


def test_chunks_that_come_piece_by_piece_are_those_of_the_whole(tokenizer):
    text = "über " * 30_000 + "quer\n"
    whole = cut(text, tokenizer)
    chunker, parts = Chunker(64, 0), []
    for piece in pieces_of(iter((text,))):
        chunker.add(piece, tokenizer.encode(piece, add_special_tokens=False))
        parts.append(chunker.ready())
    parts.append(chunker.rest())
    assert len(parts) >= 3 and len(parts[0]) > 0
    assert (np.concatenate([part.tokens for part in parts]) == whole.tokens).all()
    assert (np.concatenate([part.num_bytes for part in parts]) == whole.num_bytes).all()
    assert whole.num_bytes.sum() == len(text.encode())


def test_a_continuation_is_the_next_chunk_of_the_document():
    tokens = np.arange(1, 13).reshape(4, 3)
    lengths, documents = np.array([3, 2, 3, 1]), np.array([0, 0, 1, 1])
    found, mask = with_continuation(np.array([[0, 1], [3, -1]]), tokens, lengths, documents, pad_id=99)
    assert found[0, 0].tolist() == [1, 2, 3, 4, 5, 99] and mask[0, 0].tolist() == [True] * 5 + [False]
    assert found[0, 1].tolist() == [4, 5, 99, 99, 99, 99]  # the last of its document
    assert found[1, 0].tolist() == [10, 99, 99, 99, 99, 99]
    assert not mask[1, 1].any() and (found[1, 1] == 99).all()


def test_the_longest_run_is_that_of_looking_at_all():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 3, (50, 9)), random.integers(0, 3, (50, 14))
    a_mask, b_mask = np.arange(9) < random.integers(0, 10, (50, 1)), np.arange(14) < random.integers(0, 15, (50, 1))

    def slow(row):
        x, y = a[row][a_mask[row]].tolist(), b[row][b_mask[row]].tolist()
        runs = [
            n for n in range(1, 10) for i in range(len(x) - n + 1) for j in range(len(y) - n + 1) if x[i : i + n] == y[j : j + n]
        ]
        return max(runs, default=0)

    assert longest_common_run(a, b, a_mask, b_mask).tolist() == [slow(row) for row in range(50)]
