"""The listing of a folder: what is text, what is left out and why, which side a file stands on, what happens when it changes."""

import os
from pathlib import Path

import pytest

from crossattention.data.text_folder import TextFolder, list_text


def write(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def names(folder: TextFolder) -> list[str]:
    return [file.name for file in folder.files]


def test_what_is_no_text_is_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, a=b"one", b=b"", c=b"\0bin", d=b"\xff\xfe no utf-8", e=b"one", f=bytes(range(1, 256)))
    (tmp_path / ".hidden").write_bytes(b"secret")
    os.mkfifo(tmp_path / "pipe")
    os.link(tmp_path / "a", tmp_path / "same")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    found = list_text(tmp_path)
    assert names(found) == ["a", "d"]
    assert found.num_undecodable == 1
    assert found.left_out == {
        "binary": 2,
        "copy of another": 1,
        "empty": 1,
        "hidden": 1,
        "link to nothing or in a loop": 1,
        "no regular file": 1,
        "the same file as another": 1,
    }
    assert "b: empty" in found.problems


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write(inner, a=b"one")
    (inner / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    write(outside, b=b"two")
    (tmp_path / "away").symlink_to(outside)
    found = list_text(tmp_path)
    assert names(found) == ["away/b", "inner/a"]
    assert found.left_out == {"link to a folder that was read already": 1, "link to nothing or in a loop": 1}


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a=b"one", b=b"two")
    opened = Path.open

    def refuse(self: Path, *args: object, **kwargs: object) -> object:
        if self.name == "b":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    found = list_text(tmp_path)
    assert names(found) == ["a"]
    assert found.problems == ("b: unreadable (Permission denied)",)


def test_a_character_over_a_chunk_s_border_is_utf8(tmp_path: Path) -> None:
    write(tmp_path, a=b"x" * ((1 << 20) - 1) + "é".encode(), b=b"x" * 10 + b"\xc3")
    found = list_text(tmp_path)
    assert found.num_undecodable == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(b"onE"), "other content"),
        (lambda path: path.write_bytes(b"longer"), "it had 3 bytes and has 6"),
        (lambda path: path.unlink(), "it is gone"),
    ],
)
def test_a_file_that_changes_is_named(tmp_path: Path, change: object, said: str) -> None:
    found = list_text(write(tmp_path, a=b"one"))
    assert found.read(0, 1, 3) == b"ne"
    change(tmp_path / "a")  # type: ignore[operator]
    if (tmp_path / "a").exists():
        os.utime(tmp_path / "a", ns=(1, 1))
    with pytest.raises(ValueError, match=f"the file a has changed since the folder was listed: .*{said}"):
        found.read(0, 1, 3)


def test_a_file_that_was_only_touched_is_read(tmp_path: Path) -> None:
    found = list_text(write(tmp_path, a=b"one"))
    os.utime(tmp_path / "a", ns=(1, 1))
    assert found.read(0, 0, 3) == b"one"


def test_the_digest_knows_names_and_contents(tmp_path: Path) -> None:
    first = list_text(write(tmp_path, a=b"one", b=b"two")).sha256
    assert list_text(tmp_path).sha256 == first
    (tmp_path / "a").rename(tmp_path / "c")
    assert list_text(tmp_path).sha256 != first


def test_no_file_stands_in_two_parts_and_few_files_fill_all_three(tmp_path: Path) -> None:
    for count in (3, 4, 60):
        for index in range(count):
            (tmp_path / f"{index}.txt").write_text(f"text {index}")
        parts = list_text(tmp_path).parts()
        places = [place for part in parts.values() for place in part]
        assert sorted(places) == list(range(count))
        assert all(parts.values())


def test_a_file_keeps_its_part_when_others_come(tmp_path: Path) -> None:
    def sides(count: int) -> dict[str, str]:
        for index in range(count):
            (tmp_path / f"{index}.txt").write_text(f"text {index}")
        found = list_text(tmp_path)
        return {found.files[place].name: part for part, places in found.parts().items() for place in places}

    before, after = sides(100), sides(150)
    assert {name: after[name] for name in before} == before


def test_faults_of_the_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder of text files"):
        list_text(tmp_path / "missing")
    write(tmp_path, a=b"\0")
    with pytest.raises(NotADirectoryError, match="give the folder that it lies in"):
        list_text(tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds no text file .* it holds 1 binary"):
        list_text(tmp_path)
    with pytest.raises(ValueError, match=r"has 1 text files.*expected at least 3.*left out: 1 binary"):
        list_text(write(tmp_path, b=b"text")).parts()
