"""The planner on the command line."""

import json
from dataclasses import replace

import pytest
import torch

from cli.conftest import type_in
from crossattention import CrossAttention
from crossattention.plan import speeds_of, write_speeds

SIZES = ["--queries", "8,1,384", "--context", "8,401,192", "--heads", "6"]


def test_the_table_is_the_one_of_the_layer():
    code, stdout, stderr = type_in("plan", *SIZES, "--uses", 3)
    layer = CrossAttention(384, 192, heads=6)
    assert (code, stderr) == (0, "")
    assert stdout == f"{layer.plan_for((8, 1, 384), (8, 401, 192), uses=3)}\n"


def test_json_is_the_same_as_plain_data():
    _, stdout, _ = type_in("plan", *SIZES, "--dtype", "bfloat16", "--json")
    layer = CrossAttention(384, 192, heads=6)
    choice = layer.plan_for((8, 1, 384), (8, 401, 192), dtype=torch.bfloat16)
    assert json.loads(stdout) == json.loads(json.dumps(choice.as_dict()))


def test_every_width_of_a_layer_can_be_given():
    widths = {"head_dim": 16, "value_head_dim": 24, "kv_heads": 2, "out_dim": 100}
    flags = [word for name, value in widths.items() for word in (f"--{name.replace('_', '-')}", value)]
    sizes = json.loads(type_in("plan", *SIZES, *flags, "--json")[1])["sizes"]
    assert {name: sizes[name] for name in widths} == widths


def test_learned_queries_and_beams_are_understood():
    learned = ["--queries", "32,384", *SIZES[2:], "--json"]
    beams = ["--queries", "8,4,1,384", *SIZES[2:], "--json"]
    assert json.loads(type_in("plan", *learned)[1])["sizes"]["query_length"] == 32
    assert json.loads(type_in("plan", *beams)[1])["sizes"]["repeats"] == 4


def test_a_training_step_is_planned_as_one():
    stdout = type_in("plan", *SIZES, "--train", "--json")[1]
    choice = CrossAttention(384, 192, heads=6).plan_for((8, 1, 384), (8, 401, 192), trains=True)
    assert json.loads(stdout) == json.loads(json.dumps(choice.as_dict()))
    assert json.loads(stdout)["sizes"]["trains"] is True


@pytest.fixture
def slow_starts(tmp_path):
    """A file of speeds for one dtype, of a machine that takes a second to start anything."""
    speeds = replace(speeds_of("cpu", "float32"), step_seconds=1.0)
    write_speeds(tmp_path / "slow.json", {("cpu", "float32"): speeds}, {"processor": "test"})
    return tmp_path / "slow.json", speeds


def test_a_file_of_speeds_takes_the_place_of_those_in_use(slow_starts):
    path, speeds = slow_starts
    code, stdout, _ = type_in("plan", *SIZES, "--speeds", path)
    layer = CrossAttention(384, 192, heads=6)
    assert code == 0
    assert stdout == f"{layer.plan_for((8, 1, 384), (8, 401, 192), speeds=speeds)}\n"
    assert stdout != f"{layer.plan_for((8, 1, 384), (8, 401, 192))}\n"
    assert speeds_of("cpu", "float32").step_seconds < 1.0


def test_a_dtype_that_the_file_has_no_speeds_for_is_an_error(slow_starts):
    code, stdout, stderr = type_in("plan", *SIZES, "--dtype", "bfloat16", "--speeds", slow_starts[0])
    assert (code, stdout) == (2, "")
    assert "has no speeds for cpu bfloat16; it has: cpu float32; measure them with" in stderr


def test_a_file_that_is_none_of_speeds_is_named(tmp_path):
    (tmp_path / "notes.json").write_text("[]")
    for path, message in ((tmp_path / "notes.json", "must have format"), (tmp_path / "nowhere.json", "nowhere.json: No such file")):
        code, stdout, stderr = type_in("plan", *SIZES, "--speeds", path)
        assert (code, stdout) == (2, "")
        assert message in stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--queries", "8,x,384"], "--queries takes whole numbers with commas between them, as 8,1,384; got '8,x,384'"),
        (["--queries", "384"], "--queries takes 2 or 3 or 4 numbers, got 1: '384'"),
        (["--context", "401,192"], "--context takes 3 numbers, got 2: '401,192'"),
        (["--heads", "7"], "7"),
        (["--context", "9,401,192"], "9"),
    ],
)
def test_sizes_that_make_no_sense_are_named(changed, message):
    code, stdout, stderr = type_in("plan", *SIZES, *changed)
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert stderr.startswith("crossattention: error: ")


def test_a_missing_flag_is_named():
    code, _, stderr = type_in("plan", "--queries", "8,1,384", "--heads", 6)
    assert code == 2
    assert "--context" in stderr
