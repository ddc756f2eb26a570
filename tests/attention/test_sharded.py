"""Contexts sharded over processes: what one process can tell; the rest is checked by several (sharded_cases.py)."""

import json
from pathlib import Path

import pytest
import torch

from crossattention.attention import Traffic, sharded
from processes import run_processes

CASES = Path(__file__).with_name("sharded_cases.py")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_that_share_a_context_get_what_one_gets(world):
    for said in run_processes(CASES, world):
        lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"passed"')]
        assert len(lines) == CASES.read_text().count("\n@case\n")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("world", "backend"), [(1, "nccl"), (2, "gloo")])
def test_the_same_on_a_gpu(world, backend):
    for said in run_processes(CASES, world, TEST_DEVICE="cuda", TEST_BACKEND=backend):
        lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"passed"')]
        assert len(lines) == CASES.read_text().count("\n@case\n")


@pytest.mark.slow
def test_a_case_that_fails_in_one_process_ends_all_and_says_why():
    with pytest.raises(AssertionError, match="a process failed"):
        run_processes(CASES, 2, ["no_such_case"])


@pytest.mark.slow
def test_a_process_that_goes_away_is_told_of_in_words():
    first, second = run_processes(CASES, 2, ["a_lost_peer"])
    assert "of the 2 processes that share this context one has ended" in first
    assert second == ""


def test_a_ring_sends_twice_all_but_one_share():
    traffic = Traffic([("all_reduce max", 400), ("all_reduce sum", 1200), ("all_gather", 24)])
    assert traffic.nbytes == 1624
    assert traffic.ring_bytes(4) == 1600 * 2 * 3 / 4 + 24 * 3
    assert traffic.ring_bytes(1) == 0.0


def test_plain_tensors_are_not_sharded_and_need_no_process_group():
    assert not sharded.is_sharded(torch.randn(2, 7, 9))
    assert not sharded.is_sharded(torch.nn.Parameter(torch.randn(2, 7, 9)))
    assert not sharded.is_sharded([torch.randn(7, 9)])


def test_a_part_starts_where_those_before_it_end():
    shards = sharded.Shards(None, (3, 0, 5, 2), 2)
    assert (shards.length, shards.start, shards.part) == (10, 3, slice(3, 8))
