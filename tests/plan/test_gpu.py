"""What the planner makes of a GPU's kernels, by the constants of the one that was measured (docs/planning.md)."""

import json
from dataclasses import replace

import pytest

from crossattention import Plan
from crossattention.plan import TEXTBOOK, Sizes, choose_plan, cost_of, read_speeds, speeds_of, write_speeds

LONG = Sizes(1, 1, 65536, 768, 768, 12, 12, 64, 64, 768, device="cuda")
CLASS_TOKEN = Sizes(8, 1, 401, 384, 384, 6, 6, 64, 64, 384, device="cuda")
ABSORBED = Plan("context", "context", "explicit")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_queries_on_a_long_context_read_it_unprojected_and_short_ones_wait_for_the_host(dtype):
    assert choose_plan(replace(LONG, dtype=dtype)).plan == ABSORBED
    assert choose_plan(replace(CLASS_TOKEN, dtype=dtype)).plan == TEXTBOOK


def test_few_tasks_of_the_fused_kernel_leave_the_gpu_idle():
    alone, many = (
        cost_of(TEXTBOOK, replace(LONG, heads=h, kv_heads=h, head_dim=768 // h, value_head_dim=768 // h)) for h in (1, 12)
    )
    assert alone.seconds > 2 * many.seconds  # one task of width 768 waits for each of its blocks; twelve of 64 do so together


def test_heads_above_the_quick_kernel_s_width_cost_more_than_their_arithmetic():
    narrow, wide = (
        replace(LONG, query_length=4096, context_length=4096, heads=1, kv_heads=1, head_dim=w, value_head_dim=w) for w in (256, 264)
    )
    half = [cost_of(TEXTBOOK, replace(sizes, dtype="bfloat16")).attend_seconds for sizes in (narrow, wide)]
    assert half[1] > 2 * half[0]
    assert cost_of(TEXTBOOK, wide).attend_seconds < 1.2 * cost_of(TEXTBOOK, narrow).attend_seconds  # float32 has one kernel


def test_unaligned_wide_heads_are_counted_as_written_out():
    aligned, unaligned = (replace(LONG, query_length=512, heads=1, kv_heads=1, head_dim=w, value_head_dim=w) for w in (264, 261))
    assert cost_of(TEXTBOOK, unaligned).peak_bytes > cost_of(TEXTBOOK, aligned).peak_bytes + 512 * 65536 * 4


def test_constants_that_came_later_may_be_missing_in_a_file(tmp_path):
    path = tmp_path / "speeds.json"
    write_speeds(path, {("cpu", "float32"): speeds_of("cpu", "float32")}, {})
    data = json.loads(path.read_text())
    del data["speeds"]["cpu float32"]["fused_widest"], data["speeds"]["cpu float32"]["fused_wide"]
    path.write_text(json.dumps(data))
    assert read_speeds(path)["cpu", "float32"].fused_wide == 1.0
