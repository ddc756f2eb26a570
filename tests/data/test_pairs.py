"""Reading two-column files: every kind, every bad line."""

import json
import re

import pytest

from crossattention.data.pairs import MAX_LINE_BYTES, read_pairs

PAIRS = [("cat", "K AE T"), ("caf\u00e9", 'say "hi", please')]


def write(path, content):
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def write_parquet(path, columns):
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs the data extra")
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.tsv", 'cat\tK AE T\ncaf\u00e9\tsay "hi", please\n'),
        ("pairs.txt", 'cat\tK AE T\r\ncaf\u00e9\tsay "hi", please'),
        ("pairs.tsv", '\ufeffsource\ttarget\ncat\tK AE T\ncaf\u00e9\tsay "hi", please\n'),
        ("pairs.csv", 'cat,K AE T\ncaf\u00e9,"say ""hi"", please"\n'),
        ("pairs.CSV", 'Source,Target\r\ncat,K AE T\r\ncaf\u00e9,"say ""hi"", please"\r\n'),
        ("pairs.jsonl", "".join(json.dumps({"id": 3, "en": s, "fr": t}) + "\n" for s, t in PAIRS)),
        ("pairs.ndjson", "".join(json.dumps({"target": t, "note": "x", "source": s}) + "\n" for s, t in PAIRS)),
        ("pairs.json", "".join(json.dumps([s, t]) + "\n" for s, t in PAIRS)),
    ],
)
def test_every_text_kind_gives_the_same_pairs(tmp_path, name, content):
    file = read_pairs(write(tmp_path / name, content))
    assert file.pairs == PAIRS
    assert (file.skipped, file.problems) == (0, ())


def test_parquet_gives_the_same_pairs_from_named_or_first_text_columns(tmp_path):
    sources, targets = zip(*PAIRS, strict=True)
    first = write_parquet(tmp_path / "a.parquet", {"id": [1, 2], "en": sources, "fr": targets, "more": targets})
    named = write_parquet(tmp_path / "b.parquet", {"note": ["x", "y"], "target": targets, "source": sources})
    assert read_pairs(first).pairs == PAIRS
    assert read_pairs(named).pairs == PAIRS


def test_text_is_kept_as_it_stands(tmp_path):
    file = write(tmp_path / "pairs.tsv", '  a  "b\t c\u2028d \n')
    assert read_pairs(file).pairs == [('  a  "b', " c\u2028d ")]


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tsv, found nothing"):
        read_pairs(tmp_path / "none.tsv")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.tsv, found a folder"):
        read_pairs(tmp_path / "folder.tsv")


def test_unknown_kind_of_file_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"\.tsv, \.txt, \.csv.*\.parquet, got 'pairs\.docx'"):
        read_pairs(write(tmp_path / "pairs.docx", "a\tb\n"))


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.csv", "pairs.jsonl", "pairs.parquet"])
def test_empty_file_is_an_error_even_when_bad_lines_are_skipped(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} is empty \(0 bytes\); expected one pair a line"):
        read_pairs(write(tmp_path / name, ""), skip_bad=True)


BAD_LINES = [
    ("pairs.tsv", b"one column", "expected 2 columns, got 1"),
    ("pairs.tsv", b"a\tb\tc", "expected 2 columns, got 3"),
    ("pairs.tsv", b"a\t  ", "its second column is empty"),
    ("pairs.tsv", b"\tb", "its first column is empty"),
    ("pairs.tsv", b"", "it is blank, expected 2 columns"),
    ("pairs.tsv", b"ab\tc\xe9d", "not UTF-8: byte 0xe9 at position 5 of the line"),
    ("pairs.tsv", b"x" * 10_000_000, "10,000,001 bytes long, more than the 1,048,576 that a line may have"),
    ("pairs.csv", b"one column", "expected 2 columns, got 1"),
    ("pairs.csv", b'a,"b', "not CSV: unexpected end of data"),
    ("pairs.csv", b"a\xff,b", "not UTF-8: byte 0xff at position 2 of the line"),
    ("pairs.jsonl", b'{"a": "b"', "not JSON: Expecting ',' delimiter at character 10"),
    ("pairs.jsonl", b'{"a": "b", "n": 3}', "expected 2 columns, got 1"),
    ("pairs.jsonl", b'{"source": "b", "target": 3}', "expected strings under the keys 'source' and 'target'"),
    ("pairs.jsonl", b"17", "expected a JSON object or array, got int"),
    ("pairs.jsonl", b"[" * 100_000, "not a pair in JSON: nested too deeply"),
    ("pairs.jsonl", b'["\\ud800", "b"]', "half a surrogate pair"),
]


@pytest.mark.parametrize(("name", "bad", "problem"), BAD_LINES, ids=[f"{n}-{p[:30]}" for n, _, p in BAD_LINES])
def test_a_bad_line_is_named_by_its_number_or_skipped_and_counted(tmp_path, name, bad, problem):
    good = {"pairs.tsv": b"a\tb", "pairs.csv": b"a,b", "pairs.jsonl": b'["a", "b"]'}[name]
    path = write(tmp_path / name, b"\n".join([good, good, bad, good]) + b"\n")
    with pytest.raises(ValueError, match=rf"{name}, line 3: {re.escape(problem)}.*--skip-bad"):
        read_pairs(path)
    file = read_pairs(path, skip_bad=True)
    assert file.pairs == [("a", "b")] * 3
    assert file.skipped == 1
    assert file.problems[0].startswith(f"line 3: {problem}")


def test_a_line_of_exactly_the_limit_is_read_and_the_last_may_lack_its_end(tmp_path):
    path = write(tmp_path / "pairs.tsv", b"a\t" + b"x" * (MAX_LINE_BYTES - 2))
    assert len(read_pairs(path).pairs[0][1]) == MAX_LINE_BYTES - 2
    path = write(tmp_path / "pairs.tsv", b"c\td\na\t" + b"x" * (MAX_LINE_BYTES - 1))
    with pytest.raises(ValueError, match=r"line 2: 1,048,577 bytes long"):
        read_pairs(path)


def test_all_lines_are_counted_but_only_the_first_problems_are_kept(tmp_path):
    path = write(tmp_path / "pairs.tsv", "bad\n" * 50 + "a\tb\n")
    file = read_pairs(path, skip_bad=True)
    assert file.skipped == 50
    assert len(file.problems) == 5


def test_a_file_with_no_good_line_is_an_error_that_lists_problems(tmp_path):
    path = write(tmp_path / "pairs.tsv", "bad\nworse\n")
    with pytest.raises(ValueError, match=r"no good line.*got 2 bad lines\n  line 1: expected 2 columns, got 1"):
        read_pairs(path, skip_bad=True)


def test_bad_parquet_rows_are_named(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", {"a": ["x", None, "y", " "], "b": ["1", "2", "3", "4"]})
    with pytest.raises(ValueError, match=r"p\.parquet, row 2: it has a null, expected 2 strings"):
        read_pairs(path)
    file = read_pairs(path, skip_bad=True)
    assert (file.pairs, file.skipped) == ([("x", "1"), ("y", "3")], 2)
    assert file.problems == ("row 2: it has a null, expected 2 strings", "row 4: its first column is empty")


def test_parquet_bytes_that_are_not_utf8_are_named_by_row(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs the data extra")
    raw = arrow.array([b"fine", b"f\xe9"], arrow.binary())
    text = arrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    path = write_parquet(tmp_path / "p.parquet", {"a": text, "b": ["1", "2"]})
    with pytest.raises(ValueError, match=r"row 2: not UTF-8: byte 0xe9 at position 2"):
        read_pairs(path)


def test_a_damaged_or_textless_parquet_file_is_named(tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet", {"a": ["x"] * 100, "n": list(range(100))})
    with pytest.raises(ValueError, match=r"expected two string columns in .*whole\.parquet, got 1 among .*'a', 'n'"):
        read_pairs(whole)
    cut = write(tmp_path / "cut.parquet", whole.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.parquet is no readable Parquet file"):
        read_pairs(cut)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'crossattention\[data\]'"):
        read_pairs(write(tmp_path / "p.parquet", "PAR1"))
