"""Several processes that train one model: how a batch is split, and runs of every recipe against those of one process."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from crossattention.checkpoints.files import read_safetensors
from crossattention.training.folder import RunFolder
from crossattention.training.processes import Processes, naming_a_lost_process, rows_of
from processes import environment, run_processes, started
from training.toy_task import ToyBatch, ToyTask

PROGRAM = Path(__file__).with_name("parallel_runs.py")
STEPS = 6


def place(rank, count):
    made = object.__new__(Processes)
    made.rank, made.count = rank, count
    return made


@pytest.mark.parametrize("items", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_batch_is_split_without_overlap_or_loss_and_its_loss_is_the_sum(items, count):
    task, batch = ToyTask(), ToyTask().batch_at(0)
    batch = rows_of(batch, slice(0, items))
    model = task.build_model().eval()
    parts = [place(rank, count).part_of(task, batch) for rank in range(count)]
    assert sorted(index for part, share in parts if share for index in part.indices) == sorted(batch.indices)
    assert sum(share for _, share in parts) == pytest.approx(1.0)
    total = sum(task.loss(model, part) * share for part, share in parts)
    torch.testing.assert_close(total, task.loss(model, batch))


def test_what_cannot_be_split_is_refused():
    class Weightless(ToyTask):
        loss_weight = None

    batch = ToyTask().batch_at(0)
    with pytest.raises(TypeError, match="Weightless has no loss_weight"):
        place(0, 2).part_of(Weightless(), batch)

    @dataclass(frozen=True)
    class Odd(ToyBatch):
        table: torch.Tensor

    with pytest.raises(TypeError, match=r"Odd.table has shape \(3, 2\), but"):
        rows_of(Odd(batch.inputs, batch.labels, batch.indices, torch.zeros(3, 2)), slice(0, 1))
    with pytest.raises(TypeError, match="must be a dataclass"):
        rows_of(type("Batch", (), {"indices": (1, 2)})(), slice(0, 1))


def test_a_lost_process_is_named_and_other_errors_stay():
    with pytest.raises(ConnectionError, match=r"another of the 2 processes .* step 4"):
        with naming_a_lost_process(2, lambda: "the newest checkpoint is of step 4"):
            raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    for count, words in ((1, "Connection closed by peer"), (2, "shapes do not match")):
        with pytest.raises(RuntimeError, match=words), naming_a_lost_process(count, str):
            raise RuntimeError(words)


def lines_of(said):
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def losses_of(said):
    return {line["step"]: (line["loss"], line["norm"]) for line in lines_of(said) if "step" in line}


def alone(recipe, data, out, steps=STEPS, *more):
    command = [sys.executable, str(PROGRAM), recipe, str(data), str(out), str(steps), "ddp", *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def model_of(out, step):
    return read_safetensors(RunFolder(out).checkpoint(step) / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["g2p", "seq2seq", "vqa", "images", "bytes", "listen", "retro"])
def test_two_processes_learn_what_one_learns(recipe, tmp_path):
    data = tmp_path / "data"
    one = losses_of(alone(recipe, data, tmp_path / "one"))
    assert list(one) == list(range(1, STEPS + 1))
    for parallel in ("ddp", "fsdp"):
        first, second = run_processes(PROGRAM, 2, [recipe, str(data), str(tmp_path / parallel), str(STEPS), parallel])
        assert lines_of(second) == []  # only the first tells
        two = losses_of(first)
        assert two.keys() == one.keys()
        # Muon multiplies in bfloat16 where that is quick, so a last bit of a gradient may be a bit of an update.
        tolerance = 1e-3 if recipe == "images" else 2e-5
        for step in one:
            assert two[step] == pytest.approx(one[step], rel=tolerance, abs=tolerance)
        # AdamW makes a whole step of a gradient that is rounding alone, as that of a key bias, which cancels in the softmax.
        wanted, found = model_of(tmp_path / "one", STEPS), model_of(tmp_path / parallel, STEPS)
        assert found.keys() == wanted.keys()
        names = [name for name, tensor in wanted.items() if tensor.is_floating_point() and not name.endswith("k_proj.bias")]
        off = torch.cat([(found[name] - wanted[name]).abs().flatten() for name in names])
        assert (off > (2e-3 if recipe == "images" else 1e-4)).float().mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["g2p", "seq2seq", "vqa", "images", "bytes", "listen", "retro"])
def test_two_processes_score_what_one_scores(recipe, tmp_path):
    """The batches are shared, and the scores are those of one process to the last bit."""
    data = tmp_path / "data"
    command = [sys.executable, str(PROGRAM), recipe, str(data), "evaluate"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    [one] = lines_of(done.stdout)
    [first], [second] = (lines_of(said) for said in run_processes(PROGRAM, 2, [recipe, str(data), "evaluate"]))
    assert first["metrics"] == second["metrics"] == one["metrics"]
    assert one["batches"] == first["batches"] + second["batches"]
    assert second["batches"] > 0 or one["batches"] == 1
    assert first["sample"] and not second["sample"]


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_any_number_of_processes_of_any_kind(tmp_path):
    """Two DDP, then three FSDP, then one: the losses are those of one process from the first step to the last."""
    data, out = tmp_path / "data", tmp_path / "run"
    wanted = losses_of(alone("seq2seq", data, tmp_path / "one", 12))
    found, config = {}, out / "config.json"
    for steps, world, parallel in ((4, 2, "ddp"), (8, 3, "fsdp"), (12, 1, "ddp")):
        if config.exists():  # the run was planned to be shorter
            config.write_text(config.read_text().replace(f'"steps": {steps - 4}', f'"steps": {steps}'))
            for state in out.glob("checkpoints/*/state.json"):
                lengthen(state, steps)
        arguments = ["seq2seq", str(data), str(out), str(steps), parallel, *(["resume"] if found else [])]
        first, *_ = run_processes(PROGRAM, world, arguments)
        if found:
            assert "saved by" in json.dumps(lines_of(first)[0])
        found |= losses_of(first)
    assert found.keys() == wanted.keys()
    for step in wanted:
        assert found[step] == pytest.approx(wanted[step], rel=5e-5)


def lengthen(state, steps):
    """Give a saved run a later end, as if it had been stopped before."""
    from crossattention.training.state import _digest

    content = json.loads(state.read_text())
    content.pop("sha256")
    progress = content["facts"]["progress"]
    progress["total_steps"], progress["evaluation_steps"] = steps, [4, 8, 12][: steps // 4]
    state.write_text(json.dumps({**content, "sha256": _digest(content)}))


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_ends_the_others_clearly_and_the_run_goes_on(lost, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    make = ["seq2seq", str(data), str(out), "100000", "ddp"]
    with started(PROGRAM, 2, make) as (children, places):
        end = time.monotonic() + 600
        while '"step": 6,' not in places[0].read_text():
            assert time.monotonic() < end and children[0].poll() is None, places[0].read_text()
            time.sleep(0.05)
        children[lost].send_signal(signal.SIGKILL)
        other = children[1 - lost]
        assert other.wait(timeout=300) == 1
        said = places[1 - lost].read_text()
    assert "ConnectionError: another of the 2 processes of this run has ended" in said
    assert "the newest checkpoint is of step" in said
    saved = RunFolder(out).saved_steps()[-1]
    with started(PROGRAM, 2, [*make, "resume"]) as (children, places):
        end = time.monotonic() + 600
        while f'"step": {saved + 3},' not in places[0].read_text():
            assert time.monotonic() < end and children[0].poll() is None, places[0].read_text()
            time.sleep(0.05)
        assert min(losses_of(places[0].read_text())) == saved + 1


@pytest.mark.slow
def test_the_command_under_torchrun_tells_once_and_leaves_a_run(tmp_path):
    from recipes.reversing_words import write_reversed_words

    data, out = write_reversed_words(tmp_path / "pairs.tsv"), tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "crossattention.cli.main", "train", "seq2seq", "--data", str(data), "--target-tokens", "words"]
    command += ["--metrics", "exact", "--steps", "4", "--device", "cpu", "--threads", "1", "--out", str(out)]
    for parallel in ("ddp", "fsdp"):
        folder = out.with_name(parallel)
        given = [*command[:-1], str(folder), "--parallel", parallel]
        done = subprocess.run(given, capture_output=True, text=True, env=environment(), timeout=900)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("training seq2seq in") == 1
        assert done.stdout.count("On examples that it has never seen") == 1
        assert RunFolder(folder).saved_steps()[-1] == 4
        assert (folder / "best" / "model.safetensors").is_file()
