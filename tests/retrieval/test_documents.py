"""Documents of text, JSONL and Parquet: read from any place on; what is wrong is named by file and byte."""

import json

import pytest

from crossattention.retrieval.documents import list_sources, pieces_of, read_documents


def documents_of(folder, **options):
    listing = list_sources([folder], **options)
    return [
        (document.name, None if document.pieces is None else "".join(document.pieces()), document.problem)
        for source, path in zip(listing.sources, listing.paths, strict=True)
        for document in read_documents(source, path)
    ]


def test_encoding_errors_are_named_with_file_and_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "cut.txt").write_bytes("naïve é".encode()[:-1])
    (tmp_path / "far.txt").write_bytes(b"x" * (1 << 20) + b"y\xff")
    (tmp_path / "wide.txt").write_bytes("word".encode("utf-16"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "zero.txt").write_bytes(b"ab\0c")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "good.txt").write_bytes("café".encode())
    (tmp_path / ".hidden").write_bytes(b"x")
    listing = list_sources([tmp_path])
    top = tmp_path.name
    assert [source.name for source in listing.sources] == [f"{top}/good.txt"]
    named = dict(line.removeprefix(f"{top}/").split(": ", 1) for line in listing.problems.named)
    assert named["latin.txt"].startswith("not UTF-8 (byte 3: ")
    assert named["cut.txt"].startswith("not UTF-8 (byte 7: ")
    assert named["far.txt"].startswith("not UTF-8 (byte 1,048,577: ")
    assert "UTF-16" in named["wide.txt"]
    assert named["picture.png"].startswith("not UTF-8 (byte 0")
    assert named["zero.txt"] == "binary (a NUL byte at 2)"
    assert dict(listing.problems.counts) == {"not UTF-8": 5, "binary": 1, "empty": 1, "hidden": 1}


def test_lines_of_jsonl_are_documents_and_bad_ones_are_named(tmp_path):
    lines = [b'{"text": "one"}', b'{"text": "tw\xff"}', b'{"text": ', b'{"body": "x"}', b'{"text": 3}', b'{"text": ""}', b""]
    lines += [b"[1]", b'{"text": "\\ud800"}', '{"text": "zwölf"}'.encode()]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    found = {name.partition("#")[2]: (text, problem) for name, text, problem in documents_of(tmp_path)}
    assert found["1"] == ("one", None) and found["10"] == ("zwölf", None)
    assert found["2"][1] == ("not UTF-8", "byte 28 of the file: invalid start byte")
    assert found["3"][1][0] == "no JSON" and "byte 42 of the file" in found["3"][1][1]
    reasons = [found[line][1][0] for line in ("4", "5", "6", "7", "8", "9")]
    assert reasons == ["no such field", "no text", "empty", "empty", "no JSON object", "not UTF-8"]


def test_reading_goes_on_behind_any_document(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install 'crossattention[retro]'")
    from pyarrow import parquet

    texts = [f"text {number}" for number in range(7)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    parquet.write_table(pyarrow.table({"id": list(range(7)), "text": texts}), tmp_path / "b.parquet", row_group_size=3)
    listing = list_sources([tmp_path])
    for source, path in zip(listing.sources, listing.paths, strict=True):
        whole = list(read_documents(source, path))
        assert ["".join(document.pieces()) for document in whole] == texts
        for place, document in enumerate(whole):
            rest = list(read_documents(source, path, cursor=document.cursor))
            assert [after.name for after in rest] == [after.name for after in whole[place + 1 :]]


def test_a_parquet_file_that_does_not_fit_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install 'crossattention[retro]'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x"], "number": [3]}), tmp_path / "a.parquet")
    (source,), (path,) = (lambda listing: (listing.sources, listing.paths))(list_sources([tmp_path]))
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text': it has body, number"):
        list(read_documents(source, path))
    with pytest.raises(ValueError, match="'number' holds int64, expected text"):
        list(read_documents(source, path, text_field="number"))
    path.write_bytes(path.read_bytes()[:-7])
    (source,) = list_sources([tmp_path]).sources
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or no Parquet file"):
        list(read_documents(source, path))


def test_a_field_that_no_line_has_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected the field 'text', found 'body'.*--text-field"):
        documents_of(tmp_path)


def test_a_file_that_changed_since_it_was_listed_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    listing = list_sources([tmp_path])
    (tmp_path / "a.txt").write_text("afterwards")
    with pytest.raises(ValueError, match=r"a\.txt has changed since"):
        list(read_documents(listing.sources[0], listing.paths[0]))


def test_two_files_of_one_name_are_refused(tmp_path):
    for top in ("x", "y"):
        (tmp_path / top / "docs").mkdir(parents=True)
        (tmp_path / top / "docs" / "a.txt").write_text(top)
    with pytest.raises(ValueError, match=r"would both be named docs/a\.txt"):
        list_sources([tmp_path / "x" / "docs", tmp_path / "y" / "docs"])
    with pytest.raises(FileNotFoundError, match="found nothing"):
        list_sources([tmp_path / "z"])


def test_pieces_end_behind_lines_wherever_the_text_is_cut():
    text = "".join(f"line {number} with some words\n" for number in range(9000))
    whole = list(pieces_of(iter((text,))))
    assert "".join(whole) == text and all(piece.endswith("\n") for piece in whole) and len(whole) == 4
    assert list(pieces_of(text[begin : begin + 777] for begin in range(0, len(text), 777))) == whole
