"""Pictures by class: batches, what class tokens read, scores, and the run on the command line."""

import json

import numpy as np
import pytest
import torch

from crossattention.checkpoints.families import families_for, written
from crossattention.checkpoints.files import write_json, write_safetensors
from crossattention.cli.main import main
from crossattention.models.crossvit import CrossViT, CrossViTConfig
from crossattention.recipes.images import ImagesConfig, ImagesTask, VisionShape, changed, config_from_json, normalised
from crossattention.recipes.run import evaluate, load_run
from recipes.pictures import write_pictures
from run_folders import write_run

image_module = pytest.importorskip("PIL.Image", reason="pictures need the images extra")

TINY = VisionShape(patch_sizes=(4, 8), dims=(8, 12), heads=(2, 3), layers=(1, 1), encoders=1, feed_forward_ratio=2.0)


def write_folder(folder, *, count=30, side=16):
    """Class folders of a bright corner: above or below."""
    rng = np.random.default_rng(0)
    for name, rows in (("above", slice(0, side // 2)), ("below", slice(side // 2, side))):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = rng.integers(0, 60, (side, side, 3)).astype(np.uint8)
            image[rows, : side // 2] += 150
            image_module.fromarray(image).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def task(folder):
    return ImagesTask(ImagesConfig(folder, image_size=16, shift=1, batch_size=8, model=TINY), seed=1)


@pytest.fixture(scope="module")
def model(task):
    torch.manual_seed(0)
    return task.build_model().eval()


@pytest.fixture
def run_folder(task, model, tmp_path):
    """An untrained model as the training loop leaves one."""
    return write_run(tmp_path / "run", task, model)


def test_each_pass_has_every_training_picture_once_and_a_step_is_always_the_same(task, folder):
    seen = [index for step in range(task.steps_per_epoch) for index in task.batch_at(step).indices]
    assert sorted(seen) == list(range(len(task.data.train)))
    again = ImagesTask(task.config, seed=1).batch_at(3)
    assert torch.equal(again.images, task.batch_at(3).images)
    assert not torch.equal(task.batch_at(3).images, task.batch_at(3 + task.steps_per_epoch).images)
    assert task.batch_at(0).num_tokens == 8


def test_pictures_are_moved_and_mirrored_and_nothing_else():
    image = torch.arange(25).view(1, 5, 5, 1).expand(4, 5, 5, 3).to(torch.uint8)
    moved = changed(image, flip=False, shift=1, rng=np.random.default_rng(0))
    places = (torch.arange(5) + torch.tensor([[-1], [0], [1]])).clamp(0, 4)
    choices = [image[0][rows][:, columns] for rows in places for columns in places]
    assert all(any(torch.equal(one, choice) for choice in choices) for one in moved)
    assert torch.equal(changed(image, flip=False, shift=0, rng=np.random.default_rng(0)), image)
    mirrored = changed(image, flip=True, shift=0, rng=np.random.default_rng(0))
    assert all(torch.equal(one, image[0]) or torch.equal(one, image[0].flip(1)) for one in mirrored)


def test_pixels_are_normalised_as_imagenets():
    white = normalised(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8))
    assert torch.allclose(white[0, :, 0, 0], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))


def test_the_loss_falls(task):
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(80):
        optimizer.zero_grad()
        losses.append(task.loss(model, task.batch_at(step)))
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_heat_holds_each_fusions_weights_whole_on_the_small_patches(run_folder, folder):
    run = load_run(run_folder)
    image = run._read(str(folder / "above" / "0.png"))
    maps, heat = run.classifier.maps(image), run.classifier.heat(image)
    assert [name for name, _ in heat] == [
        "encoder 1: small patches read large patches",
        "encoder 1: large patches read small patches",
    ]
    assert [weights.shape for _, weights in maps] == [(3, 1 + 4), (2, 1 + 16)]
    for (_, read), (_, spread) in zip(maps, heat, strict=True):
        assert spread.shape == (len(read), 17)
        assert torch.allclose(spread.sum(1), torch.ones(len(read)))
        assert torch.allclose(spread[:, 0], read[:, 0])
    large = maps[0][1][:, 1:].view(3, 2, 2)
    assert torch.allclose(heat[0][1][:, 1:].view(3, 4, 4), large.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4)


def test_a_run_predicts_views_and_scores(run_folder, folder, task, tmp_path):
    run = load_run(run_folder)
    path = str(folder / "above" / "0.png")
    [[best, second]] = run.predict([path], num_hypotheses=2)
    assert best.score > second.score
    assert abs(best.probability + second.probability - 1) < 1e-5
    view = run.view(path)
    assert (view.context.rows, view.context.columns, view.context.leading) == (4, 4, ("class token",))
    assert len(view.layers) == 2
    scores = evaluate(run)
    assert scores["pictures"] == len(task.data.test)
    right = run.classifier.predict(task.data.test.images).argmax(1).numpy() == task.data.test.labels
    assert scores["accuracy"] == right.mean()
    assert scores["accuracy_worst_class"] <= scores["accuracy"]
    with pytest.raises(ValueError, match="leave --answer out"):
        run.view(path, "below")
    with pytest.raises(ValueError, match=r"1 to 2 answers, .* got 3"):
        run.predict([path], num_hypotheses=3)
    with pytest.raises(FileNotFoundError, match="found nothing"):
        next(run.predict([str(tmp_path / "none.png")]))


def test_scores_are_refused_where_the_pictures_have_changed(task, model, tmp_path):
    folder = write_folder(tmp_path / "classes", count=40)
    other = ImagesTask(ImagesConfig(folder, image_size=16, batch_size=8, model=TINY))
    write_run(tmp_path / "run", other, model)
    (folder / "above" / "0.png").unlink()
    with pytest.raises(ValueError, match="trained on other data"):
        evaluate(load_run(tmp_path / "run"))


def test_parts_of_two_runs_are_refused(run_folder):
    path = run_folder / "best" / "task.json"
    description = json.loads(path.read_text("utf-8"))
    write_json(path, {**description, "classes": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"3 classes, config\.json 2"):
        load_run(run_folder)


def test_settings_come_back_from_json_and_wrong_ones_are_refused(task):
    assert config_from_json(json.loads(json.dumps(task.describe()))["config"]) == task.config
    for changes, message in (
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"shift": 64}, "less than the 64 pixels of a picture, got 64"),
        ({"held_out": 1.0}, r"held_out between 0 and 1, got 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ImagesConfig(**changes)


@pytest.mark.slow
def test_a_checkpoint_of_timms_with_a_thousand_classes_is_trained_on(folder, tmp_path, capsys):
    theirs = CrossViT(
        CrossViTConfig(
            image_size=24, scales=(1.0, 20 / 24), patch_sizes=(6, 10), dims=(8, 12), heads=(2, 3), layers=(1, 1), encoders=1
        )
    )
    [family] = families_for(theirs, "timm")
    config, tensors = written(theirs, family)
    (tmp_path / "theirs").mkdir()
    write_json(tmp_path / "theirs" / "config.json", config)
    write_safetensors(tmp_path / "theirs" / "model.safetensors", tensors)
    flags = "--image-size 24 --scales 1.0 0.8333333333333334 --patch-sizes 6 10 --dims 8 12 --heads 2 3 --layers 1 1 --encoders 1"
    flags += " --feed-forward-ratio 4 --steps 2 --freeze embeddings --threads 1 --device cpu"
    command = ["train", "images", "--data", str(folder), "--init", str(tmp_path / "theirs"), "--out", str(tmp_path / "run")]
    assert main([*command, *flags.split()]) == 0
    assert "heads begins with random weights: classes is 1000" in capsys.readouterr().out
    run = load_run(tmp_path / "run")
    assert torch.equal(run.model.embeddings[0][0].weight, theirs.embeddings[0][0].weight)
    [name_and_weights, *_] = run.classifier.heat(run._read(str(next((folder / "above").iterdir()))))
    torch.testing.assert_close(name_and_weights[1].sum(1), torch.ones(3))


def test_easy_vqas_pictures_are_named_by_color_and_shape(tmp_path):
    data = ImagesTask(ImagesConfig(write_pictures(tmp_path / "easy"), image_size=16, shift=1, model=TINY)).data
    assert set(data.classes) == {"blue circle", "blue rectangle", "red circle", "red rectangle"}
    for part in (data.train, data.valid, data.test):
        for image, label, path in zip(part.images, part.labels, part.paths, strict=True):
            reds, blues = (image[..., channel].min() < 100 for channel in (2, 0))
            assert data.classes[label].startswith("red" if reds else "blue")
            assert reds != blues
            assert path.is_file()
    with pytest.raises(ValueError, match="16 x 16 pixels, got image_size=32"):
        ImagesTask(ImagesConfig(tmp_path / "easy", image_size=32, model=TINY))


@pytest.mark.slow
def test_scikit_learns_digits_are_learnt_on_the_command_line(tmp_path, capsys):
    datasets = pytest.importorskip("sklearn.datasets", reason="the smoke test's digits")
    digits = datasets.load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (tmp_path / "digits" / str(label)).mkdir(parents=True, exist_ok=True)
        image_module.fromarray((image * 15.9).astype(np.uint8)).save(tmp_path / "digits" / str(label) / f"{number}.png")
    out = str(tmp_path / "run")
    settings = [
        "--image-size",
        "8",
        "--shift",
        "1",
        "--patch-sizes",
        "1",
        "2",
        "--dims",
        "24",
        "32",
        "--heads",
        "3",
        "4",
    ]
    length = ["--steps", "900", "--threads", "1"]
    assert main(["train", "images", "--data", str(tmp_path / "digits"), "--out", out, *settings, *length]) == 0
    capsys.readouterr()
    assert main(["evaluate", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["accuracy"] > 0.9
    assert main(["predict", out, str(tmp_path / "digits" / "3" / "3.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["text"] == "3"
    assert main(["view", out, str(tmp_path / "digits" / "3" / "3.png"), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 1000
