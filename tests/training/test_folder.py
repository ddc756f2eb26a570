import os

import pytest
import torch

from crossattention.checkpoints.files import read_json, write_json
from crossattention.training.config import TrainConfig
from crossattention.training.folder import RunFolder
from crossattention.training.state import State


def state_at(step):
    return State(step, {"model": {"w": torch.full((3,), float(step))}, "optimizer": {}}, {})


def begun(tmp_path, **fields):
    folder = RunFolder(tmp_path / "run")
    folder.check_new()
    folder.write_config(TrainConfig(steps=10, **fields), {"task": "toy", "sizes": (1, 2)})
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def test_a_new_or_empty_folder_may_begin(tmp_path):
    RunFolder(tmp_path / "deep" / "run").check_new()
    assert list((tmp_path / "deep" / "run").iterdir()) == []
    RunFolder(tmp_path / "deep" / "run").check_new()
    (tmp_path / "notes.txt").touch()
    RunFolder(tmp_path).check_new()


@pytest.mark.parametrize("name", ["config.json", "checkpoints", "best", "metrics.jsonl"])
def test_a_folder_that_holds_a_run_may_not_begin_another(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"already holds a run \({name}\): resume it \(--resume"):
        RunFolder(tmp_path).check_new()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file/run: Not a directory; choose a folder"):
        RunFolder(tmp_path / "file" / "run").check_new()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=r"cannot write to .*run: Permission denied"):
        RunFolder(tmp_path / "run").check_new()


def test_only_a_run_is_resumed(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run to resume \(no config.json in it\): begin one"):
        RunFolder(tmp_path).check_resumable(TrainConfig(steps=10), {})


def test_the_same_settings_resume_and_free_ones_may_differ(tmp_path):
    folder = begun(tmp_path)
    same = {"task": "toy", "sizes": (1, 2)}
    folder.check_resumable(TrainConfig(steps=10), same)
    folder.check_resumable(TrainConfig(steps=10, threads=2, log_every=3, keep_checkpoints=9), same)


def test_every_other_setting_is_listed(tmp_path):
    folder = begun(tmp_path)
    with pytest.raises(ValueError, match="begun with other settings") as caught:
        folder.check_resumable(TrainConfig(steps=20, seed=3), {"task": "toy", "sizes": [1, 3], "new": "x" * 200})
    message = str(caught.value)
    for line in (
        "training.steps: 10 in the run, 20 now",
        "training.seed: 0 in the run, 3 now",
        "task.sizes: [1, 2] in the run, [1, 3] now",
        'task.new: null in the run, "xxxx',
    ):
        assert line in message
    assert "learning_rate" not in message
    assert max(map(len, message.splitlines())) < 150


def test_the_configuration_can_be_read_back(tmp_path):
    folder = begun(tmp_path, betas=(0.8, 0.9))
    assert TrainConfig.from_json(folder.read_config()["training"]) == TrainConfig(steps=10, betas=(0.8, 0.9))
    write_json(folder.config_file, {"dim": 3})
    with pytest.raises(ValueError, match=r"config\.json is not the config.json of a run"):
        folder.read_config()


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    folder = begun(tmp_path)
    for step in (2, 4, 6, 8, 1_000_000):
        folder.save_checkpoint(state_at(step))
    folder.prune(keep=2, best_step=4)
    assert folder.saved_steps() == [4, 8, 1_000_000]
    folder.prune(keep=1, best_step=None)
    assert folder.saved_steps() == [1_000_000]
    assert len(list(folder.checkpoints.iterdir())) == 1


def test_the_newest_checkpoint_is_loaded(tmp_path):
    folder = begun(tmp_path)
    assert folder.load_newest() is None
    folder.save_checkpoint(state_at(999_999))
    folder.save_checkpoint(state_at(1_000_000))
    state, path = folder.load_newest()
    assert state.step == 1_000_000
    assert path == folder.checkpoint(1_000_000)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(tmp_path):
    folder = begun(tmp_path)
    for step in (2, 4, 6):
        folder.save_checkpoint(state_at(step))
    cut(folder.checkpoint(6) / "model.safetensors")
    with pytest.raises(ValueError, match=r"step-000006/model\.safetensors is damaged: .* cut short") as caught:
        folder.load_newest()
    offer = f"The one before it, step-000004, is whole: delete {folder.checkpoint(6)}, then resume again"
    assert offer in str(caught.value)

    cut(folder.checkpoint(4) / "state.json")
    offer = f"The one before it, step-000002, is whole: delete {folder.checkpoint(6)} and {folder.checkpoint(4)}, then resume"
    with pytest.raises(ValueError) as caught:
        folder.load_newest()
    assert offer in str(caught.value)

    cut(folder.checkpoint(2) / "state.json")
    with pytest.raises(ValueError, match=r"There is no whole checkpoint before it: delete .*run and begin again"):
        folder.load_newest()


def test_a_removed_folder_is_a_clear_error(tmp_path):
    folder = begun(tmp_path)
    folder.checkpoints.rmdir()
    with pytest.raises(OSError, match=r"could not write the checkpoint .*step-000003: No such file.*no checkpoint was"):
        folder.save_checkpoint(state_at(3))


def test_a_failed_writing_names_the_checkpoint_that_stands(tmp_path, monkeypatch):
    folder = begun(tmp_path)
    folder.save_checkpoint(state_at(3))

    def no_space(path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crossattention.training.state.write_safetensors", no_space)
    with pytest.raises(OSError, match=r"step-000005: No space left on device; .*step-000003 is complete: .*--resume"):
        folder.save_checkpoint(state_at(5))
    assert os.listdir(folder.checkpoints) == ["step-000003"]


def test_what_a_kill_left_is_cleared(tmp_path):
    folder = begun(tmp_path)
    folder.save_checkpoint(state_at(3))
    (folder.checkpoints / ".step-000005.part").mkdir()
    (folder.path / ".best.part").mkdir()
    folder.restore()
    assert os.listdir(folder.checkpoints) == ["step-000003"]
    assert not (folder.path / ".best.part").exists()


def test_a_checkpoint_under_another_steps_name_is_refused_and_the_one_before_it_offered(tmp_path):
    folder = begun(tmp_path)
    for step in (3, 5):
        folder.save_checkpoint(state_at(step))
    os.rename(folder.checkpoint(5), folder.checkpoint(9))
    with pytest.raises(ValueError, match=r"step-000009 holds the state of step 5(.|\n)*step-000003, is whole"):
        folder.load_newest()


def test_a_checkpoint_that_was_moved_aside_comes_back(tmp_path):
    folder = begun(tmp_path)
    for step in (3, 5):
        folder.save_checkpoint(state_at(step))
    os.rename(folder.checkpoint(5), folder.checkpoints / ".step-000005.old")  # a kill between two renames
    (folder.checkpoints / ".step-000003.old").mkdir()  # a kill after both
    folder.restore()
    assert sorted(os.listdir(folder.checkpoints)) == ["step-000003", "step-000005"]
    state, path = folder.load_newest()
    assert (state.step, path) == (5, folder.checkpoint(5))


def test_the_best_model_lies_with_its_task_and_scores(tmp_path):
    class Model:
        def save_pretrained(self, path):
            write_json(path / "config.json", {"family": "toy"})

    folder = begun(tmp_path)
    for step in (3, 5):
        folder.save_best(Model(), {"task": "toy"}, {"step": step, "metrics": {"error": 0.5}})
    assert sorted(os.listdir(folder.best)) == ["config.json", "scores.json", "task.json"]
    assert read_json(folder.best / "task.json") == {"task": "toy"}
    assert read_json(folder.best / "scores.json")["step"] == 5


def test_a_folder_is_one_processs_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    folder = RunFolder(tmp_path)
    with folder.locked(), pytest.raises(ValueError, match="another process is training in"), folder.locked():
        pass
    with folder.locked():
        pass
