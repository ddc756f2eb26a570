"""Files of other programs: every layout that holds a model is read, every damage is named, and nothing is run."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from crossattention.checkpoints.weights import Weights, find_weights

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(7)}


def same(weights: Weights) -> bool:
    return weights.keys() == TENSORS.keys() and all(
        torch.equal(weights[name], tensor) and weights.shapes[name] == tensor.shape and weights.dtypes[name] == tensor.dtype
        for name, tensor in TENSORS.items()
    )


def sharded(folder: Path, ending: str = ".safetensors", write: Callable[..., None] | None = None, **places: str) -> Path:
    """The tensors in two files with an index; `places` changes what the index says."""
    names = [f"model-0000{number}-of-00002{ending}" for number in (1, 2)]
    write = write or (lambda tensors, path: save_file(tensors, path) if ending == ".safetensors" else torch.save(tensors, path))
    write({"a.weight": TENSORS["a.weight"]}, folder / names[0])
    write({name: TENSORS[name] for name in ("b.bias", "c")}, folder / names[1])
    index = folder / ("model.safetensors.index.json" if ending == ".safetensors" else "pytorch_model.bin.index.json")
    weight_map = {"a.weight": names[0], "b.bias": names[1], "c": names[1]}
    weight_map |= {name.replace("__", "."): place for name, place in places.items()}
    index.write_text(json.dumps({"metadata": {"total_size": 42}, "weight_map": weight_map}))
    return index


# --------------------------------------------------------------------------------------------------------- layouts


def test_each_layout_gives_the_same_tensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors")
    torch.save(TENSORS, tmp_path / "new.bin")
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": TENSORS, "epoch": 3, "arch": "x"}, tmp_path / "inside.pt")
    for name in ("one.safetensors", "new.bin", "old.pth", "inside.pt"):
        with Weights(tmp_path / name) as weights:
            assert same(weights), name
            assert weights.section == ("state_dict" if name == "inside.pt" else None)
            assert weights.num_bytes == 24 + 10 + 8
    for ending in (".safetensors", ".bin"):
        with Weights(sharded(tmp_path, ending)) as weights:
            assert same(weights)
            assert [file.name for file in weights.files] == [f"model-0000{i}-of-00002{ending}" for i in (1, 2)]


def test_a_parameter_counts_as_a_tensor_and_needs_no_gradient(tmp_path: Path) -> None:
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "w.pt")
    assert not Weights(tmp_path / "w.pt")["w"].requires_grad


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    assert find_weights(tmp_path) is None
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert find_weights(tmp_path) == tmp_path / "pytorch_model.bin"
    assert find_weights(sharded(tmp_path).parent) == tmp_path / "model.safetensors.index.json"
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert find_weights(tmp_path) == tmp_path / "model.safetensors"


def test_a_file_of_another_name_is_taken_if_it_is_the_only_one(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "crossvit.pth")
    assert find_weights(tmp_path) == tmp_path / "crossvit.pth"
    torch.save(TENSORS, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"2 files of weights and no index that joins them: crossvit.pth, other.pth"):
        find_weights(tmp_path)


# ----------------------------------------------------------------------------------------------------------- index


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "a\\b.safetensors", ".."]
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "model.safetensors")
    (tmp_path / "inner").mkdir()
    with pytest.raises(ValueError, match="names files outside its folder"):
        Weights(sharded(tmp_path / "inner", a__weight=name))


def test_missing_files_of_an_index_are_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 2 files .*: model-00002-of-00002.safetensors"):
        Weights(index)


def test_all_that_an_index_says_wrongly_is_listed(tmp_path: Path) -> None:
    index = sharded(tmp_path, c="model-00001-of-00002.safetensors", absent="model-00001-of-00002.safetensors")
    content = json.loads(index.read_text())
    del content["weight_map"]["b.bias"]
    content["weight_map"]["d"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="do not agree") as caught:
        Weights(index)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "c should be in model-00001-of-00002.safetensors, but is in model-00002-of-00002.safetensors",
        "absent should be in model-00001-of-00002.safetensors, but is in none of the files",
        "d should be in model-00002-of-00002.safetensors, but is in none of the files",
        "b.bias is in model-00002-of-00002.safetensors, but not in the index",
    ]


def test_a_name_in_two_files_or_twice_in_an_index_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    save_file({"a.weight": torch.zeros(1), **TENSORS}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"a.weight is in model-00001-of-00002.safetensors and again in model-00002"):
        Weights(index)
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(ValueError, match="names a twice"):
        Weights(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is no index of weights"),
        ("[1]", "is no index of weights"),
        ('{"weight_map": {"a": 3}}', "is no index of weights"),
        ('{"weight_map": {"a": "x.exe"}}', "must name files of one kind.*x.exe"),
        ('{"weight_map": {"a": "x.bin", "b": "x.safetensors"}}', "must name files of one kind"),
        ('{"weight_map": {"a": ', "damaged or no JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Weights(tmp_path / "model.safetensors.index.json")


# ---------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", ["one.safetensors", "new.bin", "old.pth"])
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "one.safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "new.bin")
    whole = path.read_bytes()
    for length in {0, 1, 4, 7, 8, 9, len(whole) // 3, len(whole) - 9, len(whole) - 1, *range(0, len(whole), 97)}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{kind} is damaged"):
            Weights(path)


def test_a_cut_file_of_several_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is damaged: .* cut short"):
        Weights(index)


ONE = b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


def header(content: object, data: int = 0) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * data


@pytest.mark.parametrize(
    "content",
    [
        header(b"[" * 100_000),
        header(b'{"a": ' + ONE + b', "a": ' + ONE + b"}", 4),
        header({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, 4),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "x"]}}, 4),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4),
        header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, 4),
        header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, 4),
        header({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4),
        header({"a": [], "b": 3}),
        header(b"\xff\xfe"),
        struct.pack("<Q", 2**63) + b"{}",
    ],
)  # fmt: skip
def test_a_header_made_to_mislead_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.safetensors (is damaged|holds a as)"):
        Weights(tmp_path / "x.safetensors")


def test_random_changes_of_a_header_never_end_in_another_error(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    whole = bytearray((tmp_path / "x.safetensors").read_bytes())
    for place in range(0, 8 + int.from_bytes(whole[:8], "little")):
        changed = whole.copy()
        changed[place] ^= 1 << place % 8
        (tmp_path / "x.safetensors").write_bytes(changed)
        try:
            with Weights(tmp_path / "x.safetensors") as weights:
                dict(weights)
        except ValueError as error:
            assert "x.safetensors" in str(error)


# ----------------------------------------------------------------------------------------------------------- harm


class Harmful:
    """A pickle of it makes a file when it is loaded by a reader that runs pickles."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("inner", [False, True])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path, is_new: bool, inner: bool) -> None:
    harm = {"weights": Harmful(tmp_path / "harmed")} if inner else Harmful(tmp_path / "harmed")
    torch.save({"a": torch.ones(2), "b": harm}, tmp_path / "x.bin", _use_new_zipfile_serialization=is_new)
    with pytest.raises(
        ValueError, match=r"x.bin holds more than tensors: it would call (posix|nt).mkdir. It was refused and nothing"
    ):
        Weights(tmp_path / "x.bin")
    assert not (tmp_path / "harmed").exists()
    torch.load(tmp_path / "x.bin", weights_only=False)  # the same file does harm elsewhere
    assert (tmp_path / "harmed").exists()


def test_a_plain_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with open(tmp_path / "x.pt", "wb") as file:
            pickle.dump(Harmful(tmp_path / "harmed"), file, protocol=protocol)
        with pytest.raises(ValueError, match=r"x.pt (is damaged|holds more than tensors)"):
            Weights(tmp_path / "x.pt")
    assert not (tmp_path / "harmed").exists()


def test_an_archive_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    with pytest.raises(ValueError, match="compressed, repeated or larger"):
        Weights(tmp_path / "y.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "must hold names and tensors, got a list"),
        ({}, "got an empty dict"),
        ({"state_dict": {}}, "got an empty dict"),
        ({"epoch": 3}, "must hold names and plain tensors only, but 'epoch' is a int"),
        ({1: torch.ones(1)}, "but 1 is a Tensor"),
        ({"w": torch.ones(2).to_sparse()}, r"'w' is a Tensor \(torch.sparse_coo\)"),
        ({"state_dict": {"w": torch.ones(1)}, "state_dict_ema": {"w": torch.ones(1)}}, "several keys, state_dict, state_dict_ema"),
    ],
)
def test_an_archive_that_holds_no_weights_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        Weights(tmp_path / "x.pt")


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x.h5 is no file of weights: expected one that ends in .safetensors, .bin"):
        Weights(tmp_path / "x.h5")
    with pytest.raises(FileNotFoundError):
        Weights(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError):
        Weights(tmp_path / "absent.bin")


def test_a_new_archive_is_mapped_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = torch.load

    def spied(*args: object, **keywords: object) -> Tensor:
        asked.append(keywords)
        return real(*args, **keywords)

    monkeypatch.setattr(torch, "load", spied)
    for is_new in (True, False):
        torch.save(TENSORS, tmp_path / "x.bin", _use_new_zipfile_serialization=is_new)
        Weights(tmp_path / "x.bin")
    assert [(keywords["weights_only"], keywords["mmap"]) for keywords in asked] == [(True, True), (True, False)]
