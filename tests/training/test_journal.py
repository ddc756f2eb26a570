import json
import sys

import pytest

from crossattention.training.journal import Journal, finite


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_some(path, steps, **options):
    journal = Journal(path, None, **options)
    for step in steps:
        journal.write("step", step, {"loss": step / 2})
    journal.flush()
    journal.close()


def test_every_event_is_a_line_at_once(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl", None)
    journal.write("evaluation", 3, {"metrics": {"per": 0.25}, "is_best": True})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"event": "evaluation", "step": 3, "metrics": {"per": 0.25}, "is_best": True}]
    journal.close()


def test_numbers_that_json_has_no_word_for_are_null():
    assert finite({"a": float("nan"), "b": [float("inf"), 1.0], "c": {"d": -float("inf")}}) == {
        "a": None,
        "b": [None, 1.0],
        "c": {"d": None},
    }


def test_resuming_forgets_what_will_happen_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_some(path, [5, 10, 15, 20])
    write_some(path, [11, 12], resumed_step=10)
    assert [line["step"] for line in read_lines(path)] == [5, 10, 11, 12]


def test_resuming_drops_a_line_that_was_cut_in_two(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_some(path, [5, 10])
    path.write_text(path.read_text()[:-9])
    write_some(path, [10, 15], resumed_step=10)
    assert [line["step"] for line in read_lines(path)] == [5, 10, 15]


def test_tensorboard_holds_the_charts(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(steps, **options):
        journal = Journal(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", **options)
        for step in steps:
            journal.write("step", step, {}, charts={"training/loss": float(step)})
        journal.flush()
        journal.close()

    run([1, 2, 3])
    run([3, 4], resumed_step=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("training/loss")] == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_without_tensorboard_there_are_still_the_lines(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)  # importing it now fails
    journal = Journal(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    journal.write("step", 1, {"loss": 1.0}, charts={"training/loss": 1.0})
    journal.flush()
    journal.close()
    assert not (tmp_path / "tensorboard").exists()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
