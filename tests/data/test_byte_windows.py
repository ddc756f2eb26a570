"""Windows of bytes: what is read, in which order, and which bytes of them are masked."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from crossattention.data.byte_windows import (
    END,
    MASK,
    OFFSET,
    ByteStream,
    MaskedWindows,
    count_masked,
    decode,
    encode,
    masked_positions,
    permuted,
    word_pieces,
)
from crossattention.data.text_folder import list_text


def stream_of(folder: Path, *texts: bytes) -> ByteStream:
    for index, text in enumerate(texts):
        (folder / f"{index:03}").write_bytes(text)
    return ByteStream(list_text(folder), range(len(texts)))


def test_bytes_and_ids_turn_into_each_other() -> None:
    every = bytes(range(256))
    assert encode(every).tolist() == list(range(6, 262))
    assert decode(encode(every)) == every
    with pytest.raises(ValueError, match="from 6 to 261, got 3"):
        decode([70, MASK])


def test_a_stream_is_the_files_with_their_ends(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, b"ab", b"c", b"def")
    whole = [*encode(b"ab"), END, *encode(b"c"), END, *encode(b"def"), END]
    assert len(stream) == len(whole)
    for begin in range(len(whole)):
        for length in range(len(whole) + 1):
            assert stream.read(begin, length).tolist() == (whole + whole)[begin : begin + length]
    assert [stream.name_at(place) for place in (0, 2, 3, 5, 8)] == ["000", "000", "001", "002", "002"]
    with pytest.raises(ValueError, match="stream of 9 ids, got 10 from 0 on"):
        stream.read(0, 10)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000])
def test_the_order_is_a_permutation_that_the_key_changes(size: int) -> None:
    orders = [[permuted(index, size, key=key) for index in range(size)] for key in (0, 1)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 64 or orders[0] != orders[1] != list(range(size))


def test_an_epoch_reads_every_byte_once(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, b"x" * 30, b"y" * 33)
    windows = MaskedWindows(stream, length=5, batch_size=1)
    for epoch in (0, 1):
        places = [windows.place(epoch * windows.num_windows + index) for index in range(windows.num_windows)]
        read = np.bincount([(place + step) % len(stream) for place in places for step in range(5)])
        assert len(stream) == 65 and (read == 1).all()
        assert sorted(places) != places


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, b"some words of text " * 40)

    def windows(seed: int = 3) -> MaskedWindows:
        return MaskedWindows(stream, length=40, batch_size=4, seed=seed, shortest=8)

    used = windows()
    first = [used.batch_at(step) for step in range(12)]
    for step in (11, 4, 0):
        again = windows().batch_at(step)
        assert torch.equal(first[step].ids, again.ids) and torch.equal(first[step].positions, again.positions)
    assert not torch.equal(windows(4).batch_at(0).ids, first[0].ids) or windows(4).batch_at(0).indices != first[0].indices
    assert {batch.ids.shape[1] for batch in first} > {40}
    with pytest.raises(ValueError, match="from 0 on, got -1"):
        used.batch_at(-1)


def test_masks_hide_words_and_labels_hold_them(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, b"some words, of text\n" * 20)
    batch = MaskedWindows(stream, length=60, batch_size=3, mask_share=0.2).batch_at(1)
    assert batch.positions.shape == batch.labels.shape == (3, count_masked(60, 0.2)) == (3, 12)
    for ids, positions, labels, place in zip(batch.ids, batch.positions, batch.labels, batch.indices, strict=True):
        whole = stream.read(place, 60)
        assert torch.equal(torch.nonzero(ids == MASK).flatten(), positions)
        assert whole[positions].tolist() == labels.tolist()
        ids[positions] = labels
        assert ids.tolist() == whole.tolist()
        assert not set(decode(labels.numpy())) & set(b" \n")


def test_words_are_masked_whole_but_for_the_last_one() -> None:
    ids = encode(b"aa bbb cccc ddddd eeeeee fffffff gggggggg")
    starts, ends = word_pieces(ids)
    partly = set()
    for seed in range(30):
        hidden = set(masked_positions(ids, 11, np.random.default_rng(seed)).tolist())
        assert len(hidden) == 11
        cut = [(s, e) for s, e in zip(starts, ends, strict=True) if 0 < len(hidden & set(range(s, e))) < e - s]
        assert len(cut) <= 1
        assert all(s in hidden for s, _ in cut)
        partly.add(len(cut))
    assert partly == {0, 1}


def test_long_words_come_in_pieces_and_blanks_fill_up() -> None:
    starts, ends = word_pieces(encode(b"x" * 40 + b" yy"))
    assert list(zip(starts, ends, strict=True)) == [(0, 16), (16, 32), (32, 40), (41, 43)]
    hidden = masked_positions(encode(b"a      "), 3, np.random.default_rng(0))
    assert len(set(hidden.tolist())) == 3 and 0 in hidden
    with pytest.raises(ValueError, match="at least 3 bytes to mask, got 1"):
        masked_positions(np.array([END, OFFSET + 65, END, END]), 3, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length": 1}, "at least 2 bytes, got 1"),
        ({"length": 999}, "one window of 999 bytes, got 21"),
        ({"mask_share": 0.0}, "at most 0.5, got 0.0"),
        ({"mask_share": 0.6}, "at most 0.5, got 0.6"),
        ({"batch_size": 0}, "at least 1 window, got 0"),
        ({"shortest": 11}, "2 to 10 bytes, got 11"),
    ],
)
def test_settings_out_of_range_are_said(tmp_path: Path, changes: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MaskedWindows(stream_of(tmp_path, b"x" * 20), **{"length": 10, "batch_size": 2, **changes})  # type: ignore[arg-type]


def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, b"words of text " * 200_000)
    tracemalloc.start()
    batch = MaskedWindows(stream, length=100, batch_size=8).batch_at(70)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.num_tokens == 800
    assert peak < len(stream) / 10
