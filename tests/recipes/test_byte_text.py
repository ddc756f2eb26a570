"""The recipe bytes: what is learned, scored, filled in and shown, on a folder of made-up text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from crossattention.cli.main import main
from crossattention.data.byte_windows import MASK
from crossattention.models.perceiver import PerceiverIO
from crossattention.recipes.byte_filler import ByteFiller, hide_word
from crossattention.recipes.byte_text import BytesConfig, BytesTask, PerceiverShape, begin_local, config_from_json, open_run
from crossattention.recipes.recipe import RecipeTask, Run
from crossattention.recipes.run import load_run

SMALL = PerceiverShape(dim=32, num_latents=8, latent_dim=32, layers=1, heads=2, qk_dim=16)
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    for index in range(12):
        (made / f"{index}.txt").write_text(" ".join(random.choice(WORDS, 200)))
    (made / "picture").write_bytes(bytes(20))
    return made


@pytest.fixture(scope="module")
def task(folder: Path) -> BytesTask:
    config = BytesConfig(data=folder, length=32, batch_size=4, evaluation_windows=6, test_windows=5, model=SMALL)
    return BytesTask(config, seed=1)


@pytest.fixture(scope="module")
def run(task: BytesTask) -> Run:
    torch.manual_seed(0)
    return open_run(Path("nowhere"), task.describe(), task.build_model().eval(), 3)


def test_the_task_says_what_it_reads_and_what_it_left_out(task: BytesTask) -> None:
    checked: RecipeTask = task
    assert checked.metric == "bits_per_byte"
    assert "12 text files" in task.notes[0] and "10 for train, 1 for valid, 1 for test" in task.notes[0]
    assert task.notes[-1] == "left out: 1 binary; such as picture: binary"


def test_settings_survive_json(task: BytesTask) -> None:
    described = json.loads(json.dumps(task.describe()))
    assert described == task.describe()
    assert config_from_json(described["config"]) == task.config


def test_the_loss_is_of_the_masked_bytes_alone(task: BytesTask) -> None:
    model, batch = task.build_model(), task.batch_at(0)
    every = model(batch.ids)
    at_masks = every.gather(1, batch.positions[..., None].expand(-1, -1, every.shape[-1]))
    expected = -at_masks.log_softmax(-1).gather(-1, batch.labels[..., None]).mean()
    torch.testing.assert_close(task.loss(model, batch), expected)


def test_scores_do_not_depend_on_what_is_scored_together(task: BytesTask, monkeypatch: pytest.MonkeyPatch) -> None:
    model = task.build_model().eval()
    first = task.evaluate(model)
    monkeypatch.setattr("crossattention.recipes.byte_text._TOGETHER", 4)
    assert task.evaluate(model).metrics == pytest.approx(first.metrics, rel=1e-5)
    assert first.sample is not None and len(first.sample["rows"]) == len(first.sample["weights"])


def test_evaluation_holds_the_counts_beside_the_model(run: Run) -> None:
    told: list[tuple[int, int]] = []
    scores = run.evaluate(on_progress=lambda *done: told.append(done))
    names = ["", "_unigram", "_ngram_left", "_ngram_both", "_ngram_told"]
    assert [name for name in scores if name.startswith("bits")] == [f"bits_per_byte{name}" for name in names]
    assert scores["masked"] == 5 * 5 and told[-1] == (10, 10)
    assert scores["bits_per_byte_ngram_told"] < scores["bits_per_byte_unigram"] < 8
    assert set(run.subsets) == set(names)


def test_a_folder_that_changed_is_not_scored(run: Run, folder: Path) -> None:
    (folder / "new.txt").write_text("more text")
    try:
        with pytest.raises(ValueError, match=r"is not as it was when the run was trained: new\.txt is new"):
            run.evaluate()
    finally:
        (folder / "new.txt").unlink()


def test_marks_are_filled_with_bytes_best_first(run: Run) -> None:
    [found] = run.predict(["al[MASK*2]a b[MASK]ta"], num_hypotheses=4)
    assert len({filling.text for filling in found}) == 4
    assert [filling.score for filling in found] == sorted((filling.score for filling in found), reverse=True)
    choices = found[0].choices
    assert [choice.position for choice in choices] == [2, 3, 7]
    assert found[0].score == pytest.approx(sum(np.log(choice.probabilities[0]) for choice in choices), abs=1e-4)
    assert found[0].text.startswith("al") and found[0].text.endswith("ta")


def test_the_best_fillings_are_the_best_of_all(run: Run) -> None:
    filler: ByteFiller = run.filler  # type: ignore[attr-defined]
    [logs] = filler._log_probabilities(filler.ids_of("a[MASK*2]b")[None])
    every = np.sort((logs[0][:, None] + logs[1][None]).ravel())[::-1]
    [found] = filler.fill(["a[MASK*2]b"], num_hypotheses=9)
    np.testing.assert_allclose([filling.score for filling in found], every[:9], rtol=1e-9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no mark", "expected a mark such as"),
        ("[MASK*0]", "at least one byte"),
        ("x" * 32 + "[MASK]", "at most 32 bytes, marks counted, got 33"),
        ("[MASK*99999]", "at most 32 bytes"),
        ("\ud800[MASK]", "that UTF-8 can write"),
    ],
)
def test_texts_that_cannot_be_filled_are_said_after_those_before(run: Run, text: str, said: str) -> None:
    answers = run.predict(["[MASK]", text])
    next(answers)
    with pytest.raises(ValueError, match=said):
        next(answers)
    with pytest.raises(ValueError, match="num_hypotheses=0"):
        run.predict([], num_hypotheses=0)


def test_the_map_is_the_product_of_both_attentions(run: Run) -> None:
    view = run.view("alpha [MASK*3] beta")
    [layer] = view.layers
    assert layer.weights.shape == (2, 3, len("alpha  beta") + 3)
    np.testing.assert_allclose(layer.weights.sum(-1), 1, atol=1e-5)
    assert view.context.tokens[6] == "░" and "latents read each other" in view.notes[0]
    with pytest.raises(ValueError, match="does not depend on an answer"):
        run.view("[MASK]", "x")


def test_attention_begins_near_by() -> None:
    torch.manual_seed(0)
    config = BytesConfig(length=64)
    task_model = PerceiverIO(config.perceiver)
    ids = np.full(64, 100)
    ids[30] = MASK
    filler = ByteFiller(task_model, 64)
    before = float(filler.maps(ids).mean(0)[0, 26:35].sum())
    begin_local(task_model)
    after = float(filler.maps(ids).mean(0)[0, 26:35].sum())
    assert before < 0.2 < after


def test_parts_of_two_runs_are_told_apart(task: BytesTask) -> None:
    described = task.describe()
    described["config"]["length"] = 31
    with pytest.raises(ValueError, match="describe different models"):
        open_run(Path("nowhere"), described, task.build_model(), None)


def test_a_word_is_hidden_or_nothing_is() -> None:
    assert hide_word("x = 1") is None
    assert hide_word("has [MASK] word") is None


@pytest.mark.slow
def test_it_learns_resumes_to_the_same_bits_and_answers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(out: Path, *more: str) -> None:
        size = ["--dim", "32", "--num-latents", "16", "--latent-dim", "32", "--layers", "1", "--heads", "2", "--qk-dim", "16"]
        flags = ["--data", str(folder), "--length", "32", "--batch-size", "16", "--test-windows", "20", "--threads", "1", *size]
        assert main(["train", "bytes", "--out", str(out), *flags, *more]) == 0

    train(tmp_path / "whole", "--steps", "40", "--evaluate-every", "20")
    out = tmp_path / "whole"
    newest = sorted((out / "checkpoints").iterdir())[-1] / "model.safetensors"
    expected = newest.read_bytes()
    for part in newest.parent.iterdir():
        part.unlink()
    newest.parent.rmdir()
    assert main(["train", "bytes", "--out", str(out), "--resume"]) == 0
    assert newest.read_bytes() == expected
    assert (out / "view.html").is_file()
    capsys.readouterr()

    assert main(["predict", str(out), "alp[MASK]a beta", "--json"]) == 0
    [answer] = json.loads(capsys.readouterr().out)["predictions"]
    assert answer["text"].startswith("alp") and len(answer["choices"]) == 1
    assert main(["evaluate", str(out), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert {"bits_per_byte", "bits_per_byte_unigram", "accuracy_ngram_both"} <= set(scores)
    assert main(["view", str(out), "alp[MASK]a beta", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 1
    assert load_run(out).recipe == "bytes"
