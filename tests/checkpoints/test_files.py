import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from crossattention.checkpoints import files
from crossattention.checkpoints.files import (
    new_file,
    new_folder,
    read_json,
    read_metadata,
    read_safetensors,
    restore_folder,
    sha256_of,
    write_json,
    write_safetensors,
)


def some_tensors():
    return {
        "weight": torch.arange(12.0).reshape(3, 4),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 5),
        "mask": torch.tensor([True, False]),
    }


def assert_same(left, right):
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def test_what_is_written_is_read_back(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", some_tensors(), metadata={"step": "3"})
    assert_same(read_safetensors(tmp_path / "a.safetensors"), some_tensors())
    assert read_metadata(tmp_path / "a.safetensors") == {"step": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_same_content_gives_the_same_bytes(tmp_path):
    metadata = {name: f'{name} "ü" \n' for name in "step seed config recipe".split()}
    for number in range(8):
        write_safetensors(tmp_path / f"{number}.safetensors", some_tensors(), metadata=metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert read_metadata(tmp_path / "0.safetensors") == metadata
    assert_same(read_safetensors(tmp_path / "0.safetensors"), some_tensors())


def test_transposed_tensors_and_views_of_one_memory_come_back_with_their_values(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    tensors = {"whole": whole, "transposed": whole.T, "row": whole[1], "other_row": whole[0]}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    assert_same(read_safetensors(tmp_path / "a.safetensors"), tensors)


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, some_tensors())
    read = read_safetensors(path)
    path.write_bytes(bytes(path.stat().st_size))
    path.write_bytes(b"")
    assert_same(read, some_tensors())


def test_tied_weights_are_stored_once_and_read_under_every_name(tmp_path):
    shared = torch.randn(100, 100)
    write_safetensors(tmp_path / "a.safetensors", {"embedding": shared, "output": shared, "again": shared.view(100, 100)})
    assert (tmp_path / "a.safetensors").stat().st_size < 1.1 * shared.numel() * 4
    read = read_safetensors(tmp_path / "a.safetensors")
    assert_same(read, {"embedding": shared, "output": shared, "again": shared})
    assert read["embedding"].data_ptr() == read["output"].data_ptr()


def test_files_have_the_permissions_of_new_files(tmp_path):
    (tmp_path / "plain").touch()
    write_safetensors(tmp_path / "a.safetensors", some_tensors())
    write_json(tmp_path / "a.json", {})
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "a.safetensors", "a.json")}
    assert len(modes) == 1


def test_other_programs_can_read_the_file(tmp_path):
    from safetensors import safe_open

    write_safetensors(tmp_path / "a.safetensors", some_tensors())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert torch.equal(file.get_tensor("weight"), some_tensors()["weight"])


def test_files_of_other_programs_without_a_digest_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file(some_tensors(), tmp_path / "a.safetensors")
    assert_same(read_safetensors(tmp_path / "a.safetensors"), some_tensors())


def test_every_truncation_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, some_tensors())
    data = path.read_bytes()
    for size in (0, 5, 8, 60, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"a\.safetensors is damaged.*holds {size:,} bytes.*cut short"):
            read_safetensors(path)


def test_every_altered_byte_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"weight": torch.arange(5.0)}
    write_safetensors(path, tensors)
    data = path.read_bytes()
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1
        path.write_bytes(altered)
        try:
            read = read_safetensors(path)
        except ValueError as error:
            assert "a.safetensors" in str(error)
        else:  # only the header's padding and the names of keys that nobody reads may change without harm
            assert_same(read, tensors)
            assert place < len(data) - 20


def test_altered_numbers_are_named_by_the_digest(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, some_tensors())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged: its content does not have the SHA-256"):
        read_safetensors(path)


def test_bytes_after_the_end_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": torch.ones(2)})
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"xyz")
    with pytest.raises(ValueError, match=rf"holds {size + 3:,} bytes, but its header promises {size:,}; something was"):
        read_safetensors(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"PK\x03\x04 this is a zip file, as torch.save writes it")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or no safetensors file"):
        read_safetensors(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_safetensors(tmp_path / "missing")


def test_only_tensors_and_free_metadata_keys_are_written(tmp_path):
    with pytest.raises(TypeError, match="'w' must be a tensor, got list"):
        write_safetensors(tmp_path / "a", {"w": [1.0]})
    with pytest.raises(ValueError, match=r"keys \['sha256'\]"):
        write_safetensors(tmp_path / "a", {}, metadata={"sha256": "0"})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": torch.ones(2)})

    def no_space(*arguments, **options):
        raise files.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(files, "save_file", no_space)
    with pytest.raises(OSError, match=r"could not write .*a\.safetensors: I/O error: No space left"):
        write_safetensors(path, {"w": torch.zeros(2)})
    assert torch.equal(read_safetensors(path)["w"], torch.ones(2))
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path):
    program = """
import resource, sys, torch
from crossattention.checkpoints.files import write_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_safetensors(sys.argv[1], {"w": torch.ones(100_000)})
except OSError as error:
    print("OSError:", error)
"""
    path = tmp_path / "a.safetensors"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"OSError: could not write {path}: ")
    assert list(tmp_path.iterdir()) == []


def test_json_goes_there_and_back_and_refuses_nan(tmp_path):
    value = {"text": "\u02c8k\u00e6t", "list": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == value


def test_damaged_json_is_named_with_its_place(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"first": 1, "second": 2})
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match=r"a\.json is damaged or no JSON: .* at line 3.*holds 20 bytes"):
        read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"a\.json is damaged or no JSON: byte 7 is not UTF-8"):
        read_json(path)


def test_the_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    with new_file(tmp_path / "a.txt") as beside:
        beside.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    with pytest.raises(RuntimeError), new_file(tmp_path / "a.txt") as beside:
        beside.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, can_swap):
    if not can_swap:
        monkeypatch.setattr(files, "_swap_names", lambda first, second: False)
    for version in ("one", "two"):
        with new_folder(tmp_path / "best") as beside:
            (beside / version).write_text(version)
            assert not (tmp_path / "best" / version).exists()
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_everything_is_flushed_before_the_folder_appears_and_its_name_after(tmp_path, monkeypatch):
    flushed = []
    flush = os.fsync

    def watched(descriptor):
        status = os.fstat(descriptor)
        flushed.append((status.st_ino, (tmp_path / "best").exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with new_folder(tmp_path / "best") as beside:
        (beside / "deep").mkdir()
        (beside / "deep" / "file").write_text("some")
    before = {inode for inode, has_appeared in flushed if not has_appeared}
    inodes = [(tmp_path / name).stat().st_ino for name in ("best", "best/deep", "best/deep/file")]
    assert before == set(inodes)
    assert flushed[-1] == (tmp_path.stat().st_ino, True)


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    with new_folder(tmp_path / "best") as beside:
        (beside / "one").write_text("one")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "best") as beside:
        (beside / "two").write_text("two")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_folder_needs_the_one_above(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "gone" / "best"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="only asserted where the system call is known to exist")
def test_linux_swaps_two_names_in_one_step(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert files._swap_names(tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "first" / "second").exists()
    assert (tmp_path / "second" / "first").exists()


def test_what_a_kill_left_is_restored_or_deleted(tmp_path):
    for name in (".best.old", ".best.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    restore_folder(tmp_path / "best")
    assert [path.name for path in (tmp_path / "best").iterdir()] == [".best.old"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    restore_folder(tmp_path / "best")
    assert (tmp_path / "best").exists()


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path):
    program = """
import itertools, sys, torch
from crossattention.checkpoints.files import new_folder, write_json, write_safetensors
for number in itertools.count():
    with new_folder(sys.argv[1]) as beside:
        write_safetensors(beside / "model.safetensors", {"w": torch.full((100_000,), float(number))})
        write_json(beside / "number.json", number)
    if number == 0:
        print("ready", flush=True)
"""
    seen = set()
    for attempt in range(10):
        with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "best")], stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(0.003 + 0.0071 * attempt)
            os.kill(child.pid, signal.SIGKILL)
        number = read_json(tmp_path / "best" / "number.json")
        assert (read_safetensors(tmp_path / "best" / "model.safetensors")["w"] == number).all()
        seen.add(number)
        restore_folder(tmp_path / "best")
        assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["best"]'
    assert len(seen) > 1
