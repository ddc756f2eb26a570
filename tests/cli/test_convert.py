"""The convert verb: what it prints, and that a user's faults are one sentence."""

import json

import pytest

from checkpoints.test_convert import marian_folder, same
from cli.conftest import type_in
from crossattention.models.pretrained import load


def test_it_says_what_became_of_what(tmp_path):
    model = marian_folder(tmp_path / "theirs")
    code, stdout, stderr = type_in("convert", tmp_path / "theirs", tmp_path / "ours")
    assert (code, stderr) == (0, "")
    assert same(load(tmp_path / "ours"), model)
    lines = stdout.splitlines()
    assert lines[0] == f"read     {tmp_path / 'theirs'} (huggingface)"
    assert lines[1] == f"wrote    {tmp_path / 'ours'} (crossattention; transformer_marian; Transformer)"
    assert lines[2].endswith("tensors became 70; --names shows which became which")
    assert "ignored  model.decoder.embed_positions.weight: sines and cosines, computed where they are used" in lines
    assert "dtypes   float32 (70)" in lines
    assert lines[-1].startswith("size     ") and "sha256" in lines[-1]


def test_it_names_each_tensor_when_asked(tmp_path):
    marian_folder(tmp_path / "theirs")
    _, stdout, _ = type_in("convert", tmp_path / "theirs", tmp_path / "ours", "--names")
    assert "         model.shared.weight -> target_embedding.weight" in stdout.splitlines()


def test_json_holds_the_whole_account(tmp_path):
    marian_folder(tmp_path / "theirs")
    _, stdout, _ = type_in("convert", tmp_path / "theirs", tmp_path / "ours", "--json", "--dtype", "float16")
    found = json.loads(stdout)
    assert found["dtypes"] == {"float16": 70}
    assert [["model.shared.weight"], ["target_embedding.weight"]] in found["names"]
    assert found["num_bytes"] == (tmp_path / "ours" / "model.safetensors").stat().st_size


def test_a_fault_is_one_sentence(tmp_path):
    marian_folder(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    code, stdout, stderr = type_in("convert", tmp_path / "theirs", tmp_path / "ours")
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"crossattention: error: {tmp_path / 'ours'} exists already")
    code, _, stderr = type_in("convert", tmp_path / "absent", tmp_path / "other")
    assert code == 2 and "absent" in stderr


@pytest.mark.slow
def test_an_onnx_file_is_written_run_and_described(tmp_path):
    pytest.importorskip("onnxruntime")
    marian_folder(tmp_path / "theirs")
    code, stdout, stderr = type_in("convert", tmp_path / "theirs", tmp_path / "step.onnx", "--graph", "step", "--dtype", "float32")
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0] == f"read     {tmp_path / 'theirs'}"
    assert lines[1].startswith(f"wrote    {tmp_path / 'step.onnx'} (ONNX, opset 20, ")
    assert "input    ids (batch, targets)" in lines and lines[-1].startswith("checked  in onnxruntime ")
    code, _, stderr = type_in("convert", tmp_path / "theirs", tmp_path / "step.onnx")
    assert code == 2 and "exists already" in stderr


def test_flags_that_an_onnx_file_has_no_use_for_are_refused(tmp_path):
    code, _, stderr = type_in("convert", "g2p-small", tmp_path / "model.onnx", "--to", "torch")
    assert code == 2 and "--to has nothing to say of" in stderr
    code, _, stderr = type_in("convert", "g2p-small", tmp_path / "folder", "--graph", "step")
    assert code == 2 and "--graph is of an ONNX file" in stderr
