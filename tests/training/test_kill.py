"""Runs in processes of their own: killed at random moments, killed inside a checkpoint's writing, in pairs."""

import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from crossattention.checkpoints.files import read_json, read_safetensors
from crossattention.training.folder import RunFolder

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("toy_task.py")
STEPS = 120


def start(out, *, delay=0.02, resume=False, environment=None):
    command = [sys.executable, str(PROGRAM), str(out), str(STEPS), str(delay), *(["resume"] if resume else [])]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def finish(child):
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return output


def everything(out):
    """Every tensor of the last checkpoint and of the best model, and the scores."""
    checkpoint = RunFolder(out).checkpoint(STEPS)
    files = [checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors", out / "best" / "model.safetensors"]
    tensors = {f"{path}/{name}"[len(str(out)) :]: tensor for path in files for name, tensor in read_safetensors(path).items()}
    return tensors, read_json(out / "best" / "scores.json"), read_json(checkpoint / "state.json")["facts"]["random"]


def assert_same_end(left, right):
    (tensors, scores, random_states), (other_tensors, other_scores, other_random_states) = everything(left), everything(right)
    assert tensors.keys() == other_tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])] == []
    assert scores == other_scores
    assert random_states == other_random_states


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    finish(start(out, delay=0))
    return out


def test_killed_at_twenty_random_moments_and_resumed_it_ends_in_the_same_bits(tmp_path, straight):
    draw = random.Random(3)
    kills, resumed_from = 0, set()
    for attempt in itertools.count():  # a run that came to its end in spite of the kills is followed by another
        out = tmp_path / f"run{attempt}"
        while kills < 20:
            child = start(out, resume=(out / "config.json").exists())
            lines = [child.stdout.readline() for _ in range(draw.randint(1, 6))]  # the first tells where it begins
            time.sleep(draw.uniform(0, 0.1))
            child.send_signal(signal.SIGKILL)
            child.communicate()
            if found := re.search(r"step-(\d+)", lines[0]):
                resumed_from.add(int(found[1]))
            if child.returncode != -signal.SIGKILL:
                break
            kills += 1
        finish(start(out, delay=0, resume=(out / "config.json").exists()))
        assert_same_end(straight, out)
        assert [path for path in out.rglob("*") if path.name.endswith((".part", ".old"))] == []
        if kills == 20:
            break
    assert len(resumed_from) >= 3


@pytest.mark.parametrize("moment", ["save_file", "_flush_file", "_flush_folder", "_take_place", "rmtree", "rename"])
@pytest.mark.parametrize("call", [1, 8])
def test_killed_inside_the_writing_of_a_checkpoint_it_ends_in_the_same_bits(tmp_path, straight, moment, call):
    """The process kills itself in the middle of the calls that write, flush, rename and delete."""
    out = tmp_path / "run"
    program = f"""
import itertools, os, shutil, signal, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import toy_task
from crossattention.checkpoints import files
counter = itertools.count(1)
holder = {{"rmtree": shutil, "rename": os}}.get({moment!r}, files)
original = getattr(holder, {moment!r})
def dying(*arguments, **options):
    is_last = next(counter) == {call}
    if is_last and {moment!r} != "save_file":
        os.kill(os.getpid(), signal.SIGKILL)
    original(*arguments, **options)
    if is_last:
        with open(arguments[1], "r+b") as file:  # as if the disk had taken only a part of it
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)
setattr(holder, {moment!r}, dying)
sys.argv = ["toy", {str(out)!r}, "{STEPS}", "0"]
toy_task.main()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    has_begun = (out / "config.json").exists()
    finish(start(out, delay=0, resume=has_begun))
    assert_same_end(straight, out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_signals_end_it_with_a_checkpoint_and_the_usual_code(tmp_path, straight, number, code):
    out = tmp_path / "run"
    child = start(out)
    for line in child.stdout:
        if line.startswith("Step(step=15"):
            child.send_signal(number)
            break
    output, _ = child.communicate(timeout=60)
    assert child.returncode in (code, -number)
    found = re.search(r"Interrupted\(step=(\d+), .*signal='(\w+)'", output)
    assert found[2] == number.name
    assert RunFolder(out).saved_steps()[-1] == int(found[1])
    assert 15 <= int(found[1]) < STEPS
    finish(start(out, delay=0, resume=True))
    assert_same_end(straight, out)


def test_a_full_disk_ends_it_clearly_and_loses_nothing_that_was_saved(tmp_path, straight):
    out = tmp_path / "run"
    program = f"""
import resource, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import toy_task
from crossattention.training.events import Saved
from crossattention.training.loop import train
try:
    for event in train(toy_task.ToyTask(), toy_task.toy_config(steps={STEPS}, evaluate_every=7), {str(out)!r}):
        if isinstance(event, Saved) and event.step == 14:
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
except OSError as error:
    print("OSError:", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"OSError: .*could not write .*step-000014 is complete: when this is mended, --resume", done.stdout)
    finish(start(out, delay=0, resume=True))
    assert_same_end(straight, out)


def test_two_processes_train_one_model_and_resume_to_the_same_bits(tmp_path):
    def start_both(out, delay, **options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
        return [start(out, delay=delay, environment={**places, "RANK": rank, "LOCAL_RANK": rank}, **options) for rank in ("0", "1")]

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    outputs = [finish(child) for child in start_both(whole, 0)]
    assert f"Finished(step={STEPS}" in outputs[0]
    assert outputs[1] == ""

    children = start_both(stopped, 0.02)
    for line in children[0].stdout:
        if line.startswith("Step(step=15"):
            for child in children:
                child.send_signal(signal.SIGTERM)
            break
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [143, 143]
    assert "Interrupted(" in outputs[0]
    for child in start_both(stopped, 0, resume=True):
        finish(child)
    assert_same_end(whole, stopped)
