"""Files of a database: rows count once they are committed, and what is wrong with a file is named."""

import threading

import numpy as np
import pytest

from crossattention.retrieval.store import (
    HEADER_BYTES,
    ArrayFile,
    ArrayWriter,
    Extent,
    check_file,
    locked,
    read_json,
    sha256_of,
    write_json,
)


def array(path, **changes):
    return ArrayFile(**{"path": path / "rows.bin", "dtype": np.dtype("<u2"), "row_shape": (3,), "facts": {"maker": "a"}, **changes})


def written(path, *counts):
    extent, number = Extent(), 0
    for count in counts:
        with ArrayWriter(array(path), extent) as writer:
            writer.append(np.arange(number, number + 3 * count).reshape(count, 3))
            extent, number = writer.commit(), number + 3 * count
    return extent


def test_rows_come_back_and_are_counted_by_blocks(tmp_path):
    extent = written(tmp_path, 2, 5)
    assert extent.rows == 7 and [rows for rows, _ in extent.blocks] == [2, 5]
    assert (array(tmp_path).read(extent).reshape(-1) == np.arange(21)).all()
    array(tmp_path).check(extent)
    array(tmp_path).verify(extent)
    assert Extent.from_json(extent.to_json()) == extent


def test_rows_that_were_not_committed_are_cut_off(tmp_path):
    extent = written(tmp_path, 4)
    with ArrayWriter(array(tmp_path), extent) as writer:
        writer.append(np.full((9, 3), 7))
    with pytest.raises(ValueError, match="something was added"):
        array(tmp_path).check(extent)
    array(tmp_path).check(extent, may_be_longer=True)
    with ArrayWriter(array(tmp_path), extent) as writer:
        writer.append(np.full((1, 3), 8))
        extent = writer.commit()
    array(tmp_path).check(extent)
    array(tmp_path).verify(extent)
    assert array(tmp_path).read(extent)[-1].tolist() == [8, 8, 8]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1], "holds 4,119 bytes, expected 4,120; it was cut short"),
        (lambda data: data[:100], "it was cut short"),
        (lambda data: data + b"x", "something was added to it"),
        (lambda data: b"?" + data[1:], "does not begin with"),
        (lambda data: data.replace(b'"maker": "a"', b'"maker": "b"'), "of another database, or damaged"),
        (lambda data: data[:-3] + b"?" + data[-2:], "rows 2 to 3 have the checksum"),
    ],
)
def test_a_damaged_file_is_named(damage, said, tmp_path):
    extent = written(tmp_path, 2, 2)
    assert (tmp_path / "rows.bin").stat().st_size == HEADER_BYTES + 24
    file = tmp_path / "rows.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=said) as caught:
        array(tmp_path).check(extent)
        array(tmp_path).verify(extent)
    assert str(file) in str(caught.value)


def test_json_is_whole_or_named(tmp_path):
    path = tmp_path / "facts.json"
    write_json(path, {"a": [1, "ü"]})
    assert read_json(path) == {"a": [1, "ü"]}
    text = path.read_text(encoding="utf-8")
    for damaged in (text[:-5], text.replace("1", "2", 1), "[]", '{"a": 1}'):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=r"facts\.json"):
            read_json(path)


def test_a_file_of_another_digest_or_size_is_named(tmp_path):
    path = tmp_path / "index.faiss"
    path.write_bytes(b"abcd")
    digest = sha256_of(path)
    check_file(path, 4, digest, verify=True)
    with pytest.raises(ValueError, match="expected 5; it was cut short"):
        check_file(path, 5, digest, verify=False)
    path.write_bytes(b"abce")
    check_file(path, 4, digest, verify=False)
    with pytest.raises(ValueError, match="it was altered"):
        check_file(path, 4, digest, verify=True)


def test_one_process_writes_at_a_time(tmp_path):
    with locked(tmp_path):
        with pytest.raises(ValueError, match="another process builds"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_who_waits_for_a_folder_gets_it_when_it_is_free(tmp_path):
    order = []

    def second():
        with locked(tmp_path, wait=True):
            order.append("second")

    other = threading.Thread(target=second)
    with locked(tmp_path):
        other.start()
        other.join(0.05)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]
