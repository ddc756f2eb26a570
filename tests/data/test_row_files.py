"""Rows of files in blocks: three kinds of file, read ahead, resumed, and damaged ones named."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from crossattention import CrossAttention
from crossattention.data.row_files import RowFile

ROWS = torch.randn(23, 5, generator=torch.Generator(torch.get_default_device()).manual_seed(0))


def write(path: Path, rows: torch.Tensor = ROWS) -> Path:
    if path.suffix == ".npy":
        np.save(path, rows.numpy())
    elif path.suffix == ".safetensors":
        save_file({"rows": rows.contiguous()}, path)
    else:
        pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'crossattention[data]'")
        kind = {torch.float32: pa.float32(), torch.float64: pa.float64(), torch.float16: pa.float16()}[rows.dtype]
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.numpy().ravel(), kind), 5)
        table = pa.table({"text": ["x"] * len(rows), "rows": column})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".arrow"])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_blocks_are_the_rows(suffix: str, ahead: int, tmp_path: Path) -> None:
    file = RowFile(write(tmp_path / f"rows{suffix}"), block_rows=4, ahead=ahead)
    assert (file.rows, file.width, file.dtype) == (23, 5, torch.float32)
    for _ in range(2):  # any number of times
        blocks = list(file)
        assert len(blocks) == len(file) and max(map(len, blocks)) == 4 and torch.equal(torch.cat(blocks), ROWS)
    later = list(file.from_block(2))
    assert torch.equal(torch.cat(later), torch.cat(blocks[2:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".arrow"])
def test_other_dtypes_are_read_and_converted(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", ROWS.to(dtype))
    assert torch.equal(torch.cat(list(RowFile(path))), ROWS.to(dtype))
    assert torch.equal(torch.cat(list(RowFile(path, dtype=torch.float32))), ROWS.to(dtype).float())


def test_memory_of_blocks_is_used_again_but_never_while_a_view_is_held(tmp_path: Path) -> None:
    file = RowFile(write(tmp_path / "rows.npy"), block_rows=2, ahead=2)
    places, views = set(), []
    for block in file:
        places.add(block.data_ptr())
    assert len(places) < len(file)
    for place, block in enumerate(file):
        if place % 3 == 0:
            views.append((place, block[None, :1].transpose(1, 2)))
    for place, view in views:
        assert torch.equal(view[0, :, 0], ROWS[2 * place])
    assert torch.equal(torch.cat(list(RowFile(file.path, block_rows=2, dtype=torch.float64))), ROWS.double())


def test_bfloat16_and_one_tensor_of_several(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    save_file({"a": ROWS.bfloat16(), "b": ROWS[:, :3].contiguous()}, path, {"note": "two"})
    assert torch.equal(torch.cat(list(RowFile(path, "a"))), ROWS.bfloat16())
    assert torch.equal(torch.cat(list(RowFile(path, "b", block_rows=7))), ROWS[:, :3])
    with pytest.raises(ValueError, match=r"has 2 tensors \(a, b\); none was named"):
        RowFile(path)
    with pytest.raises(ValueError, match="'c' is not among them"):
        RowFile(path, "c")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".arrow"])
def test_a_file_is_a_context(suffix: str, tmp_path: Path) -> None:
    layer, a = CrossAttention(6, 5, heads=2), torch.randn(1, 3, 6, requires_grad=True)
    out = layer.attend_blocks(a, RowFile(write(tmp_path / f"rows{suffix}"), block_rows=4))
    whole = layer(a, ROWS[None])
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)
    for p, q in zip(*(torch.autograd.grad(y.square().sum(), [a, *layer.parameters()]) for y in (out, whole)), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)


def test_an_empty_file_is_one_empty_block(tmp_path: Path) -> None:
    file = RowFile(write(tmp_path / "rows.npy", ROWS[:0]))
    assert [tuple(block.shape) for block in file] == [(0, 5)]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".arrow"])
@pytest.mark.parametrize("cut", [3, -3])
def test_a_short_file_is_named(suffix: str, cut: int, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=rf"rows\{suffix} is .*(cut short|damaged)"):
        RowFile(path)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_file_that_becomes_shorter_or_is_too_long_is_named(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}")
    file = RowFile(path, block_rows=4)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=rf"rows\{suffix} became shorter while it was read"):
        list(file)
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match="longer than it should be"):
        RowFile(path)


def test_a_damaged_record_batch_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.arrow")
    file = RowFile(path, block_rows=4)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(ValueError, match=r"rows\.arrow"):
        list(file)


def test_a_large_record_batch_is_read_in_slices_and_a_compressed_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'crossattention[data]'")
    from crossattention.data import row_files

    column = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.numpy().ravel()), 5)
    table = pa.table({"rows": column}).slice(2)  # begins in the middle of its memory
    asked = []
    read = row_files._ArrowPass.read
    monkeypatch.setattr(row_files._ArrowPass, "read", lambda self, *of: asked.append(of) or read(self, *of))
    for compression in (None, "lz4"):
        path = tmp_path / f"{compression}.arrow"
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
            writer.write_table(table)
        assert torch.equal(torch.cat(list(RowFile(path, block_rows=4))), ROWS[2:])
        assert bool(asked) is (compression is not None)


def test_other_files_and_arguments_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(3, np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((3, 2), np.int64))
    np.save(tmp_path / "columns.npy", np.asfortranarray(np.zeros((3, 2), np.float32)))
    (tmp_path / "rows.csv").write_text("1,2")
    for name, says in (
        ("flat.npy", "two dimensions"),
        ("whole.npy", "<i8, but rows must be"),
        ("columns.npy", "column by column"),
        ("rows.csv", r"must end in one of \.npy"),
    ):
        with pytest.raises(ValueError, match=says):
            RowFile(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        RowFile(tmp_path / "none.npy")
    path = write(tmp_path / "rows.npy")
    wrong = (
        ({"block_rows": 0}, "block_rows"),
        ({"ahead": -1}, "ahead"),
        ({"dtype": torch.int8}, "float"),
        ({"name": "x"}, "says nothing"),
    )
    for options, says in wrong:
        with pytest.raises(ValueError, match=says):
            RowFile(path, **options)


def test_a_reader_that_is_left_ends_its_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    blocks = iter(RowFile(write(tmp_path / "rows.npy"), block_rows=1, ahead=2))
    next(blocks)
    assert threading.active_count() == before + 1
    blocks.close()
    assert threading.active_count() == before
