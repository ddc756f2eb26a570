import json
import math
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from crossattention.checkpoints.files import read_json, read_safetensors
from crossattention.training.events import Evaluated, Finished, Interrupted, Saved, Started, Step
from crossattention.training.folder import RunFolder
from crossattention.training.loop import train
from crossattention.training.schedules import factor_at
from crossattention.training.tasks import Evaluation
from training.toy_task import ToyTask, toy_config


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tensors_of(out, step):
    folder = RunFolder(out).checkpoint(step)
    return {
        f"{stem}/{name}": tensor
        for stem in ("model", "optimizer")
        for name, tensor in read_safetensors(folder / f"{stem}.safetensors").items()
    }


def assert_bitwise_equal(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def journal_without_times(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def run_until(task, config, out, step, **options):
    """Train, and send SIGINT to this process at the batch after `step`; returns the events."""
    events = []
    original = task.batch_at

    def batch_at(index):
        if index == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(index)

    task.batch_at = batch_at
    with pytest.raises(KeyboardInterrupt):
        for event in train(task, config, out, **options):
            events.append(event)
    return events


# ---- a whole run


def test_a_run_tells_what_happens_in_order(tmp_path):
    events = list(train(ToyTask(), toy_config(), tmp_path / "run"))
    assert [type(event).__name__ for event in events] == [
        *("Started", "Evaluated", "Saved", "Step", "Evaluated", "Saved", "Step", "Evaluated", "Saved"),
        *("Step", "Step", "Evaluated", "Saved", "Finished"),
    ]
    started, finished = events[0], events[-1]
    assert started == Started(total_steps=20, parameters=111, device="cpu", resumed_from=None)
    assert [event.step for event in of_kind(events, Step)] == [5, 10, 15, 20]
    assert [event.step for event in of_kind(events, Evaluated)] == [1, 7, 13, 20]
    best = min(of_kind(events, Evaluated), key=lambda event: event.metrics["error"])
    assert (finished.step, finished.best_step, finished.metrics) == (20, best.step, best.metrics)
    assert of_kind(events, Evaluated)[0].sample == {"first": ToyTask().labels[0].item()}


def test_steps_report_loss_rate_and_time(tmp_path):
    steps = of_kind(train(ToyTask(delay=0.002), toy_config(), tmp_path / "run"), Step)
    assert 0.045 < steps[0].learning_rate < 0.05
    assert steps[-1].learning_rate < 0.01
    for step in steps:
        assert step.total_steps == 20
        assert step.loss > 0
        assert step.gradient_norm > 0
        assert 0 < step.tokens_per_second < 8 / 0.002
        assert step.seconds_left is None or step.seconds_left >= 0
    assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)


def test_the_model_learns_and_the_best_one_is_kept(tmp_path):
    out = tmp_path / "run"
    events = list(train(ToyTask(), toy_config(steps=400), out))
    first, finished = of_kind(events, Evaluated)[0], events[-1]
    assert finished.metrics["error"] < first.metrics["error"] / 10
    scores = read_json(out / "best" / "scores.json")
    assert scores == {"step": finished.best_step, "metric": "error", "metrics": finished.metrics}
    assert read_json(out / "best" / "task.json") == ToyTask().describe()
    model = ToyTask().build_model()
    model.load_state_dict(read_safetensors(out / "best" / "model.safetensors"))
    with torch.no_grad():
        assert ToyTask().evaluate(model.eval()).metrics == finished.metrics


def test_the_best_is_not_the_last_when_the_last_is_worse(tmp_path):
    class Worsening(ToyTask):
        def evaluate(self, model):
            super().evaluate(model)
            return Evaluation({"error": [3.0, 1.0, math.nan, 2.0][self.evaluations - 1]})

    events = list(train(Worsening(), toy_config(keep_checkpoints=1), tmp_path / "run"))
    assert [event.is_best for event in of_kind(events, Evaluated)] == [True, True, False, False]
    assert (events[-1].best_step, events[-1].metrics) == (7, {"error": 1.0})
    assert RunFolder(tmp_path / "run").saved_steps() == [7, 20]
    best = read_safetensors(tmp_path / "run" / "best" / "model.safetensors")
    at_7 = read_safetensors(RunFolder(tmp_path / "run").checkpoint(7) / "model.safetensors")
    assert_bitwise_equal(best, at_7)


def test_epochs_are_turned_into_steps(tmp_path):
    events = list(train(ToyTask(), toy_config(epochs=2.5), tmp_path / "run"))
    assert events[0].total_steps == 20
    assert events[-1].step == 20


def test_the_journal_holds_every_number(tmp_path):
    events = list(train(ToyTask(), toy_config(), tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["loss"] for line in steps] == [event.loss for event in of_kind(events, Step)]
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    assert [line["metrics"] for line in evaluations] == [event.metrics for event in of_kind(events, Evaluated)]
    assert read_json(tmp_path / "run" / "config.json")["training"] == toy_config().to_json()


def test_the_batches_are_those_of_the_steps(tmp_path):
    task = ToyTask()
    list(train(task, toy_config(), tmp_path / "run"))
    assert task.batches == list(range(20))


def test_the_first_step_equals_one_written_by_hand(tmp_path):
    config = toy_config(steps=1, warmup_steps=0, clip_norm=None, weight_decay=0.0)
    list(train(ToyTask(), config, tmp_path / "run"))
    torch.manual_seed(config.seed)
    model = ToyTask().build_model()
    torch.manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, betas=config.betas, eps=config.epsilon, weight_decay=0.0, fused=True)
    ToyTask().loss(model, ToyTask().batch_at(0)).backward()
    optimizer.step()
    trained = read_safetensors(RunFolder(tmp_path / "run").checkpoint(1) / "model.safetensors")
    assert_bitwise_equal(trained, model.state_dict())


@pytest.fixture
def before_steps():
    """Lists what the functions put into it see of an optimizer just before each of its steps."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    looks, seen = [], []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *rest: seen.extend(look(optimizer) for look in looks))
    yield looks, seen
    handle.remove()


def test_every_step_takes_the_rate_of_the_schedule(tmp_path, before_steps):
    looks, seen = before_steps
    looks.append(lambda optimizer: {group["lr"] for group in optimizer.param_groups})
    list(train(ToyTask(), toy_config(schedule="linear"), tmp_path / "run"))
    assert seen == [{0.05 * factor_at("linear", step, warmup_steps=4, total_steps=20)} for step in range(1, 21)]


def test_clipping_bounds_the_gradient(tmp_path, before_steps):
    looks, seen = before_steps
    looks.append(lambda adamw: torch.stack([p.grad.norm() for g in adamw.param_groups for p in g["params"]]).norm().item())
    events = list(train(ToyTask(), toy_config(clip_norm=0.5, steps=5), tmp_path / "run"))
    assert len(seen) == 5
    assert all(norm <= 0.5001 for norm in seen)
    assert of_kind(events, Step)[0].gradient_norm > 0.5


def test_the_loss_of_an_event_is_the_mean_since_the_last(tmp_path):
    losses = []

    class Watching(ToyTask):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            losses.append(loss.item())
            return loss

    steps = of_kind(train(Watching(), toy_config(), tmp_path / "run"), Step)
    assert [step.loss for step in steps] == pytest.approx([sum(losses[i : i + 5]) / 5 for i in (0, 5, 10, 15)])


def test_bf16_runs_the_loss_under_autocast_and_keeps_float32_weights(tmp_path):
    dtypes = set()

    class Watching(ToyTask):
        def loss(self, model, batch):
            outputs = model(batch.inputs)
            dtypes.add(outputs.dtype)
            return (outputs.float() - batch.labels).square().mean()

    list(train(Watching(), toy_config(precision="bf16"), tmp_path / "run"))
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "run", 20).values()} == {torch.float32}


def test_evaluations_do_not_change_the_training(tmp_path):
    list(train(ToyTask(), toy_config(evaluations=1), tmp_path / "few"))
    list(train(ToyTask(), toy_config(evaluations=10), tmp_path / "many"))
    assert_bitwise_equal(tensors_of(tmp_path / "few", 20), tensors_of(tmp_path / "many", 20))


def test_whoever_looks_on_may_draw_numbers(tmp_path):
    list(train(ToyTask(), toy_config(), tmp_path / "alone"))
    for _ in train(ToyTask(), toy_config(), tmp_path / "watched"):
        torch.rand(1), random.random(), np.random.rand()
    assert_bitwise_equal(tensors_of(tmp_path / "alone", 20), tensors_of(tmp_path / "watched", 20))


def test_another_seed_gives_other_weights(tmp_path):
    list(train(ToyTask(), toy_config(seed=1), tmp_path / "one"))
    list(train(ToyTask(), toy_config(seed=2), tmp_path / "two"))
    one, two = tensors_of(tmp_path / "one", 20), tensors_of(tmp_path / "two", 20)
    assert not torch.equal(one["model/up_proj.weight"], two["model/up_proj.weight"])


def test_a_long_warm_up_is_mentioned(tmp_path):
    started = next(train(ToyTask(), toy_config(warmup_steps=400), tmp_path / "run"))
    assert started.notes == ("warmup_steps=400 becomes 4, a fifth of the run's 20 steps",)


# ---- resuming


@pytest.mark.parametrize("stop", [1, 10, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (6, 7, 19))])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, stop):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    events = list(train(ToyTask(), toy_config(), straight))
    first = run_until(ToyTask(), toy_config(), resumed, stop)
    assert first[-1] == Interrupted(stop, RunFolder(resumed).checkpoint(stop), "SIGINT")
    torch.rand(100), random.random(), np.random.rand(3)  # a new process starts elsewhere
    second = list(train(ToyTask(), toy_config(), resumed, resume=True))
    assert second[0].resumed_from == RunFolder(resumed).checkpoint(stop)
    assert second[0].step == stop
    assert second[0].notes == ()
    assert_bitwise_equal(tensors_of(straight, 20), tensors_of(resumed, 20))
    assert "optimizer/adamw/up_proj.weight/exp_avg" in tensors_of(resumed, 20)
    assert journal_without_times(straight) == journal_without_times(resumed)
    best = [read_safetensors(out / "best" / "model.safetensors") for out in (straight, resumed)]
    assert_bitwise_equal(*best)
    assert (second[-1].metrics, second[-1].best_step) == (events[-1].metrics, events[-1].best_step)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    list(train(ToyTask(), toy_config(), tmp_path / "straight"))
    events = train(ToyTask(), toy_config(), tmp_path / "killed")
    next(events)
    events.close()
    assert RunFolder(tmp_path / "killed").saved_steps() == []
    resumed = list(train(ToyTask(), toy_config(), tmp_path / "killed", resume=True))
    assert resumed[0].resumed_from is None
    assert_bitwise_equal(tensors_of(tmp_path / "straight", 20), tensors_of(tmp_path / "killed", 20))


def test_an_older_checkpoint_leads_to_the_same_end(tmp_path):
    out = tmp_path / "run"
    list(train(ToyTask(), toy_config(keep_checkpoints=4), out))
    expected = tensors_of(out, 20)
    journal = journal_without_times(out)
    for step in (13, 20):
        shutil.rmtree(RunFolder(out).checkpoint(step))
    list(train(ToyTask(), toy_config(keep_checkpoints=4), out, resume=True))
    assert_bitwise_equal(expected, tensors_of(out, 20))
    assert journal_without_times(out) == journal


def test_a_finished_run_only_says_so_again(tmp_path):
    finished = list(train(ToyTask(), toy_config(), tmp_path / "run"))[-1]
    task = ToyTask()
    again = list(train(task, toy_config(), tmp_path / "run", resume=True))
    assert [type(event) for event in again] == [Started, Finished]
    assert (again[-1].metrics, again[-1].best_step) == (finished.metrics, finished.best_step)
    assert task.batches == []


def test_another_number_of_threads_is_mentioned(tmp_path):
    list(train(ToyTask(), toy_config(threads=1), tmp_path / "run"))
    started = next(train(ToyTask(), toy_config(threads=2), tmp_path / "run", resume=True))
    assert started.notes == ("threads: 1 before, 2 now: the weights will not be the same to the last bit",)


def test_other_settings_do_not_resume(tmp_path):
    list(train(ToyTask(), toy_config(), tmp_path / "run"))
    with pytest.raises(ValueError, match=r"training\.learning_rate: 0\.05 in the run, 0\.1 now"):
        train(ToyTask(), toy_config(learning_rate=0.1), tmp_path / "run", resume=True)


def test_a_model_of_other_shape_does_not_resume(tmp_path):
    class Wider(ToyTask):
        def build_model(self):
            return type(super().build_model())(hidden_dim=12)

    list(train(ToyTask(), toy_config(), tmp_path / "run"))
    with pytest.raises(RuntimeError, match=r"size mismatch for up_proj.weight.*\[11, 6\].*\[12, 6\]"):
        next(train(Wider(), toy_config(), tmp_path / "run", resume=True))


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_resumes(tmp_path):
    out = tmp_path / "run"
    list(train(ToyTask(), toy_config(), out))
    expected = tensors_of(out, 20)
    path = RunFolder(out).checkpoint(20) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is damaged.*\n.*step-000013, is whole: delete"):
        next(train(ToyTask(), toy_config(), out, resume=True))
    shutil.rmtree(path.parent)
    list(train(ToyTask(), toy_config(), out, resume=True))
    assert_bitwise_equal(expected, tensors_of(out, 20))


# ---- being stopped


def test_sigterm_saves_and_exits_with_the_usual_code(tmp_path):
    task = ToyTask()
    events = []
    with pytest.raises(SystemExit) as caught:
        for event in train(task, toy_config(), tmp_path / "run"):
            events.append(event)
            if isinstance(event, Step) and event.step == 10:
                os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert isinstance(events[-2], Saved)
    assert events[-1] == Interrupted(10, RunFolder(tmp_path / "run").checkpoint(10), "SIGTERM")


def test_an_evaluation_is_broken_off_and_done_again(tmp_path):
    class Interrupting(ToyTask):
        def evaluate(self, model):
            if self.evaluations == 1:
                torch.rand(5)
                os.kill(os.getpid(), signal.SIGINT)
                raise AssertionError("the evaluation went on")
            return super().evaluate(model)

    straight, out = tmp_path / "straight", tmp_path / "run"
    list(train(ToyTask(), toy_config(), straight))
    events = []
    with pytest.raises(KeyboardInterrupt):
        for event in train(Interrupting(), toy_config(), out):
            events.append(event)
    assert [event.step for event in of_kind(events, Evaluated)] == [1]
    assert events[-1].step == 7
    resumed = list(train(ToyTask(), toy_config(), out, resume=True))
    assert [event.step for event in of_kind(resumed, Evaluated)] == [7, 13, 20]
    assert_bitwise_equal(tensors_of(straight, 20), tensors_of(out, 20))
    assert journal_without_times(straight) == journal_without_times(out)


def test_a_run_that_nobody_iterates_any_longer_gives_everything_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    events = train(ToyTask(), toy_config(), tmp_path / "run")
    next(events)
    assert signal.getsignal(signal.SIGINT) is not before
    events.close()
    assert signal.getsignal(signal.SIGINT) is before
    list(train(ToyTask(), toy_config(), tmp_path / "run", resume=True))  # the lock is free


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_none_stops_with_step_and_examples(tmp_path, what):
    class Root(ToyTask):
        """The root of 0 is fine, its slope is not."""

        def loss(self, model, batch):
            loss = super().loss(model, batch)
            return loss + (loss - loss).sqrt() if self.batches[-1] == 11 else loss

    out = tmp_path / "run"
    task = ToyTask(bad_step=12) if what == "loss" else Root()
    indices = ", ".join(str(index) for index in ToyTask().batch_at(11).indices)
    events = []
    with pytest.raises(FloatingPointError) as caught:
        for event in train(task, toy_config(), out):
            events.append(event)
    message = str(caught.value)
    assert f"at step 12; its batch holds the 8 examples {indices}; the newest checkpoint is of step 7" in message
    assert message.startswith("the loss is nan" if what == "loss" else "the loss is ")
    assert RunFolder(out).saved_steps() == [1, 7]
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(out, 7).values())


def test_a_missing_metric_is_named(tmp_path):
    class Forgetful(ToyTask):
        metric = "per"

    with pytest.raises(ValueError, match=r"task.metric is 'per', but task.evaluate gave only \['drawn', 'error'\]"):
        list(train(Forgetful(), toy_config(), tmp_path / "run"))


def test_a_folder_removed_while_training_is_a_clear_error(tmp_path):
    events = train(ToyTask(), toy_config(), tmp_path / "run")
    with pytest.raises(OSError, match=r"could not write the (best model|checkpoint) .*run/.*: No such file"):
        for event in events:
            if isinstance(event, Step) and event.step == 5:
                shutil.rmtree(tmp_path / "run")


# ---- the folder


def test_a_folder_with_a_run_is_refused_at_the_call(tmp_path):
    list(train(ToyTask(), toy_config(), tmp_path / "run"))
    with pytest.raises(ValueError, match="already holds a run"):
        train(ToyTask(), toy_config(), tmp_path / "run")
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(ToyTask(), toy_config(), tmp_path / "other", resume=True)


def test_an_unwritable_folder_is_refused_before_anything_is_built(tmp_path):
    (tmp_path / "file").touch()
    task = ToyTask()
    task.build_model = None  # would raise TypeError
    with pytest.raises(OSError, match=r"cannot write to .*file/run"):
        train(task, toy_config(), tmp_path / "file" / "run")


def test_two_runs_in_one_folder_are_refused(tmp_path):
    pytest.importorskip("fcntl")
    first = train(ToyTask(), toy_config(), tmp_path / "run")
    next(first)
    with pytest.raises(ValueError, match="another process is training in"):
        next(train(ToyTask(), toy_config(), tmp_path / "run", resume=True))
    first.close()


# ---- minutes, on a clock that only the task moves


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("crossattention.training.loop.time", clock)
    return clock


def test_minutes_are_measured_kept_and_filled_with_evaluations(tmp_path, clock):
    config = toy_config(minutes=0.5, log_every=1, evaluations=5)
    task = ToyTask(delay=0.125, evaluation_delay=0.5, sleep=clock.sleep)
    events = list(train(task, config, tmp_path / "run"))
    assert events[0].total_steps is None
    assert clock.now - 100 == pytest.approx(30, rel=0.02)
    assert clock.now - 100 <= 30
    evaluations = of_kind(events, Evaluated)
    assert len(evaluations) == 5
    assert evaluations[0].step == 15  # three that are not timed, and 5 % of 30 s
    assert evaluations[-1].step == events[-1].step == 217
    steps = of_kind(events, Step)
    assert {event.total_steps for event in steps[:15]} == {None}
    assert {event.total_steps for event in steps[15:]} == {217}
    for event in steps[15:]:
        assert event.seconds_left == pytest.approx(events[-1].seconds - event.seconds, abs=0.01)


@pytest.mark.slow
def test_a_machine_that_becomes_slower_does_not_lengthen_the_minutes(tmp_path, clock):
    class Tiring(ToyTask):
        def batch_at(self, step):
            self.delay = 0.1 if step < 100 else 0.4
            return super().batch_at(step)

    config = toy_config(minutes=0.5, evaluations=3, log_every=1)
    events = list(train(Tiring(sleep=clock.sleep), config, tmp_path / "run"))
    assert clock.now - 100 < 1.05 * 30
    totals = [event.total_steps for event in of_kind(events, Step) if event.total_steps]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == 297
    assert events[-1].step == totals[-1] < 160
    assert of_kind(events, Evaluated)[-1].step == events[-1].step


@pytest.mark.slow
def test_a_resumed_run_keeps_to_the_steps_that_its_minutes_became(tmp_path, clock):
    out = tmp_path / "run"
    config = toy_config(minutes=0.5, evaluations=3)
    run_until(ToyTask(delay=0.1, sleep=clock.sleep), config, out, 100)
    slower = list(train(ToyTask(delay=0.5, sleep=clock.sleep), config, out, resume=True))
    assert slower[0].total_steps == 297
    assert slower[-1].step == 297
    assert slower[-1].seconds == pytest.approx(100 * 0.1 + 197 * 0.5)


@pytest.mark.slow
def test_a_run_of_minutes_stopped_while_measuring_measures_again(tmp_path, clock):
    out = tmp_path / "run"
    config = toy_config(minutes=0.5, evaluations=3)
    run_until(ToyTask(delay=0.1, sleep=clock.sleep), config, out, 7)
    clock.sleep(1000)  # what passes between two parts of a run does not count
    events = list(train(ToyTask(delay=0.1, sleep=clock.sleep), config, out, resume=True))
    assert events[0].total_steps is None
    assert events[-1].step == 297
    assert events[-1].seconds == pytest.approx(29.7)


def test_minutes_too_short_for_a_step_still_end_with_a_model(tmp_path, clock):
    events = list(train(ToyTask(delay=2.0, sleep=clock.sleep), toy_config(minutes=0.01), tmp_path / "run"))
    assert events[-1].step == 1
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("step", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("jump", [pytest.param(3600.0, marks=pytest.mark.slow), -3600.0])
def test_a_clock_that_jumps_loses_nothing(tmp_path, clock, step, jump):
    class Jumping(ToyTask):
        def batch_at(self, index):
            clock.now += jump if index == step - 1 else 0.0
            return super().batch_at(index)

    config = toy_config(minutes=0.5, evaluations=3)
    events = list(train(Jumping(delay=0.1, sleep=clock.sleep), config, tmp_path / "run"))
    finished = events[-1]
    assert isinstance(finished, Finished)
    # Forward the minutes are over, and the run ends at its next look at the clock; back, it does not notice.
    assert finished.step == step if jump > 0 else 297 - 3 <= finished.step <= 340
    assert of_kind(events, Saved)[-1].step == of_kind(events, Evaluated)[-1].step == finished.step


@pytest.mark.slow
def test_real_minutes_end_about_in_time(tmp_path):
    begun = time.monotonic()
    list(train(ToyTask(delay=0.001), toy_config(minutes=2 / 60), tmp_path / "run"))
    assert 1.5 < time.monotonic() - begun < 2.5  # generous: other programs run on this machine


def test_checkpoints_come_by_the_clock_too(tmp_path, clock):
    config = toy_config(evaluations=1, checkpoint_minutes=0.65)
    events = list(train(ToyTask(delay=6, sleep=clock.sleep), config, tmp_path / "run"))
    assert [event.step for event in of_kind(events, Saved)] == [7, 14, 20]
    assert [event.is_best for event in of_kind(events, Saved)] == [False, False, True]
