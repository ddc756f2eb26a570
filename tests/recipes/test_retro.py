"""The recipe retro: what is read, scored, continued and shown; and that copies in the neighbours are what it learns to use."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from crossattention.cli.main import main
from crossattention.data.chunk_windows import batch_of, window_numbers, windows_of
from crossattention.models.retro import Retro, is_of_retrieval
from crossattention.recipes import retro as recipe
from crossattention.recipes.recipe import RecipeTask
from crossattention.recipes.retro import RetroRun, RetroShape, RetroTask, RetroTextConfig, config_from_json, open_run, score
from crossattention.recipes.run import evaluate, load_run
from crossattention.retrieval import Database
from crossattention.training.config import TrainConfig
from crossattention.training.events import Finished
from crossattention.training.loop import train
from recipes.copied_texts import CHUNK, database_of, write_copies

pytest.importorskip("faiss", reason="needs the extra retro")
SMALL = RetroShape(dim=16, heads=2, layers=2, cross_layers=(1, 2), encoder_layers=1, widening=2)


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retro")
    return database_of(write_copies(folder / "text", documents=12, passages=8, words=12), folder / "db")


@pytest.fixture(scope="module")
def task(db: Path) -> RetroTask:
    return RetroTask(RetroTextConfig(db=db, chunks=3, batch_size=4, evaluation_windows=4, test_windows=6, model=SMALL), seed=1)


@pytest.fixture(scope="module")
def run(task: RetroTask) -> RetroRun:
    torch.manual_seed(0)
    return open_run(Path("nowhere"), task.describe(), task.build_model().eval(), 3)


def prompt_of(task: RetroTask) -> str:
    return task.sample_input


def test_the_task_says_what_it_reads(task: RetroTask) -> None:
    checked: RecipeTask = task
    assert checked.metric == "bits_per_byte"
    assert "12 documents" in task.notes[0] and "for train" in task.notes[0]
    assert "% of the chunks stand in a training document's by more than half" in task.notes[1]


def test_settings_survive_json(task: RetroTask) -> None:
    described = json.loads(json.dumps(task.describe()))
    assert described == task.describe()
    assert config_from_json(described["config"]) == task.config


def test_the_loss_is_the_mean_over_real_tokens_but_the_first(task: RetroTask) -> None:
    model, batch = task.build_model().eval(), task.batch_at(0)
    logits = model(batch.ids[:, :-1], batch.neighbours, batch.neighbour_mask).log_softmax(-1)
    gained = logits.gather(-1, batch.ids[:, 1:, None])[..., 0]
    assert torch.allclose(task.loss(model, batch), -gained[batch.real[:, 1:]].mean())


def test_bits_are_of_every_token_and_the_bytes_those_of_the_text(task: RetroTask) -> None:
    """A model that knows nothing needs log2 V bits a token, whatever it reads, over all the text's bytes."""
    model = task.build_model().eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    windows = list(windows_of(task.database, task.parts["test"], chunks=3, stride=1))
    scores = score(model, task.database, windows, task.config, task.neighbourhood)
    chunks = np.concatenate([task.database.document_chunks(d) for d in task.parts["test"].tolist()])
    tokens, num_bytes = task.database.lengths[chunks].sum(), task.database.num_bytes[chunks].sum()
    for name in ("bits_per_byte", "bits_per_byte_off", "bits_per_byte_random"):
        assert scores[name] == pytest.approx(tokens * np.log2(task.database.vocab_size) / num_bytes, rel=1e-6)
    shares = [scores[f"{name}_share"] for name in recipe.OVERLAPS]
    assert sum(shares) == pytest.approx(1.0) and scores["bits_per_byte_share"] == 1.0


def test_scores_are_those_of_the_model_with_these_neighbours_without_and_with_others(task: RetroTask) -> None:
    torch.manual_seed(0)
    model = task.build_model().eval()
    [window] = [w for w in windows_of(task.database, task.parts["test"][:1], chunks=3, stride=3)][:1]
    scores = score(model, task.database, [window], task.config, task.neighbourhood)
    numbers = window_numbers([window], 3)
    batch = batch_of(task.database, numbers, task.neighbourhood.nearest(numbers[:, :-1], 2))
    num_bytes = task.database.num_bytes[numbers[numbers >= 0]].sum()
    for name, given in (("bits_per_byte", (batch.neighbours, batch.neighbour_mask)), ("bits_per_byte_off", ())):
        with torch.no_grad():
            logits = model(batch.ids[:, :-1], *given).log_softmax(-1)
        gained = logits.gather(-1, batch.ids[:, 1:, None])[..., 0][batch.real[:, 1:]].sum()
        bits = (-float(gained) + np.log(task.database.vocab_size)) / np.log(2)
        assert scores[name] == pytest.approx(bits / num_bytes, rel=1e-5)
    assert len({scores[name] for name in ("bits_per_byte", "bits_per_byte_off", "bits_per_byte_random")}) == 3


def test_it_continues_a_text_and_names_what_it_read(task: RetroTask, run: RetroRun) -> None:
    [[first, second]] = run.writer.continue_texts([prompt_of(task)], num_hypotheses=2, new_tokens=6)
    [[again]] = run.writer.continue_texts([prompt_of(task)], new_tokens=6)
    assert again == first and first.text and second.score <= 0.0
    train = {task.database.document_name(int(document)) for document in task.parts["train"]}
    assert first.neighbours and {name for chunk in first.neighbours for name in chunk} <= train
    with pytest.raises(ValueError, match="got an empty one"):
        list(run.predict([""]))


def test_the_view_shows_of_each_token_the_neighbours_of_its_chunk_alone(task: RetroTask, run: RetroRun) -> None:
    shown = run.view(prompt_of(task), "du ba")
    [first, second] = shown.layers
    assert first.name == "layers.0.cross_attention" and second.weights.shape[1:] == (shown.queries.length, shown.context.length)
    assert np.allclose(first.weights.sum(-1), 1.0, atol=1e-5)
    heads = [at for at, label in enumerate(shown.context.tokens) if label.startswith("[chunk ")]
    numbers = [int(shown.context.tokens[at].split()[1].rstrip(",")) for at in heads]
    chunk_of = np.repeat(numbers, np.diff([*heads, shown.context.length]))
    for row in range(shown.queries.length):
        read = set(chunk_of[np.flatnonzero(first.weights[0, row])].tolist())
        assert read == {numbers[0] + row // CHUNK}
    ids = run.writer.ids_of(prompt_of(task) + "ba")
    other = run.view(prompt_of(task), "ba")
    whole = ids.shape[1] // CHUNK
    assert other.queries.length == ids.shape[1] - (max(0, whole - 4) * CHUNK + CHUNK - 1)
    with pytest.raises(ValueError, match="give a longer text"):
        run.view("ba", "du")


def test_a_run_refuses_what_is_not_its_own(task: RetroTask, run: RetroRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        open_run(Path("nowhere"), task.describe(), torch.nn.Linear(2, 2), 1)
    facts = {**task.describe()["database"], "sha256": "0" * 64, "chunks": 7}
    grown = open_run(Path("nowhere"), {**task.describe(), "database": facts}, run.model, 1)
    with pytest.raises(ValueError, match=r"is not as it was .* then it had 7"):
        grown.evaluate()
    facts = {**task.describe()["database"], "tokenizer_sha256": "0" * 64}
    other = open_run(Path("nowhere"), {**task.describe(), "database": facts}, run.model, 1)
    with pytest.raises(ValueError, match="another tokenizer"):
        other.evaluate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbours": -1}, "neighbours of at least 0, got -1"),
        ({"chunks": 1}, "chunks of at least 2, got 1"),
        ({"unread": 1.0}, "unread as a share from 0"),
        ({"neighbours": 0, "retro_fit": Path("run")}, "retro_fit=run adds retrieval to a model, but neighbours=0"),
        ({"model": RetroShape(dim=30, heads=4)}, "dim must be a multiple of heads=4, got 30"),
        ({"model": RetroShape(layers=2, cross_layers=(3,))}, r"from 1 to 2, got \(3,\)"),
    ],
)
def test_impossible_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetroTextConfig(**change)


def test_a_database_of_other_settings_is_refused(db: Path) -> None:
    with pytest.raises(ValueError, match="was made with vocab_size=400, asked for was 500"):
        RetroTask(RetroTextConfig(db=db, vocab_size=500, model=SMALL))


@pytest.mark.slow
def test_one_command_makes_the_database_trains_resumes_scores_and_shows(tmp_path: Path, capsys) -> None:
    pytest.importorskip("tyro")
    folder = write_copies(tmp_path / "text", documents=12, passages=8, words=80)
    flags = "--dim 16 --heads 2 --layers 2 --cross-layers 2 --vocab-size 300 --threads 1 --batch-size 4 --chunks 2".split()
    words = ["train", "retro", "--data", folder, "--db", tmp_path / "db", "--out", tmp_path / "run", *flags]
    assert main([str(word) for word in [*words, "--steps", "4", "--test-windows", "4"]]) == 0
    said = capsys.readouterr().out
    assert "retrieval on" in said and "retrieval off" in said and "random neighbours" in said and "share of the bytes" in said
    run = load_run(tmp_path / "run")
    scores = evaluate(run)
    assert {"bits_per_byte", "bits_per_byte_off", "bits_per_byte_random"} <= set(scores)
    text = (folder / "text0.txt").read_text()
    for words in (
        ["predict", tmp_path / "run", text, "--json"],
        ["view", tmp_path / "run", text, "--out", tmp_path / "view.html"],
        ["evaluate", tmp_path / "run", "--json"],
    ):
        assert main([str(word) for word in words]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert found[0]["predictions"][0]["neighbours"] and found[-1]["scores"] == scores
    assert "neighbour 1: text/" in (tmp_path / "view.html").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(db: Path, tmp_path: Path) -> None:
    config = RetroTextConfig(db=db, chunks=3, batch_size=4, evaluation_windows=4, model=SMALL)
    training = TrainConfig(steps=6, evaluate_every=3, warmup_steps=0)
    events = list(train(RetroTask(config), training, tmp_path / "whole"))
    assert isinstance(events[-1], Finished)
    for event in train(RetroTask(config), training, tmp_path / "killed"):
        if type(event).__name__ == "Saved":
            break
    list(train(RetroTask(config), training, tmp_path / "killed", resume=True))
    runs = [load_run(tmp_path / name) for name in ("whole", "killed")]
    for name, weight in runs[0].model.state_dict().items():
        assert torch.equal(weight, runs[1].model.state_dict()[name]), name


@pytest.mark.slow
def test_retro_fitting_a_run_leaves_its_language_model_as_it_is(db: Path, tmp_path: Path) -> None:
    plain = RetroTextConfig(db=db, chunks=3, batch_size=4, evaluation_windows=4, test_windows=6, neighbours=0, model=SMALL)
    training = TrainConfig(steps=3, warmup_steps=0)
    list(train(RetroTask(plain), training, tmp_path / "plain"))
    base = load_run(tmp_path / "plain")
    assert list(evaluate(base)) == ["bits_per_byte"]
    with pytest.raises(ValueError, match="reads no neighbours"):
        base.view("ba" * 80)
    config = RetroTextConfig(
        db=db, chunks=3, batch_size=4, evaluation_windows=4, test_windows=6, retro_fit=tmp_path / "plain", model=SMALL
    )
    list(train(RetroTask(config), training, tmp_path / "fitted"))
    fitted = load_run(tmp_path / "fitted")
    ids = torch.randint(base.model.config.vocab_size, (2, 20))
    with torch.no_grad():
        assert torch.equal(fitted.model(ids), base.model(ids))
    kept, now = base.model.state_dict(), fitted.model.state_dict()
    assert all(torch.equal(now[name], kept[name]) for name in kept)
    assert any(is_of_retrieval(name) and weight.any() for name, weight in now.items())
    scores = evaluate(fitted)
    assert scores["bits_per_byte_off"] == pytest.approx(evaluate(base)["bits_per_byte"], rel=1e-6)
    with pytest.raises(ValueError, match="found one that reads neighbours already"):
        RetroTask(RetroTextConfig(db=db, retro_fit=tmp_path / "fitted", model=SMALL)).build_model()


@pytest.mark.slow
def test_copies_in_the_neighbours_are_learned_to_be_used(tmp_path: Path) -> None:
    """Passages of random words, each in several documents: nothing but the neighbours tells what comes next."""
    path = database_of(write_copies(tmp_path / "text"), tmp_path / "db")
    shape = RetroShape(dim=64, heads=4, layers=2, cross_layers=(1, 2), encoder_layers=1, widening=2)
    task = RetroTask(RetroTextConfig(db=path, chunks=6, evaluation_windows=20, model=shape))
    training = TrainConfig(steps=200, learning_rate=2e-3, optimizer="muon", warmup_steps=30, evaluations=2)
    list(train(task, training, tmp_path / "run"))
    scores = load_run(tmp_path / "run").evaluate()
    assert scores["bits_per_byte"] < 0.9 * scores["bits_per_byte_off"]
    assert scores["bits_per_byte_random"] > 0.95 * scores["bits_per_byte_off"]
    assert isinstance(load_run(tmp_path / "run").model, Retro) and isinstance(task.database, Database)


def test_a_changed_corpus_gets_another_database_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.mkdir()
    (text / "one.txt").write_text("a")
    config = RetroTextConfig(data=text)
    first = recipe._database_folder(config)
    assert recipe._database_folder(config) == first
    (text / "one.txt").write_text("ab")
    second = recipe._database_folder(config)
    (text / "two.txt").write_text("c")
    third = recipe._database_folder(config)
    assert len({first, second, third}) == 3
    assert recipe._database_folder(RetroTextConfig(data=text, pattern="one.*")) not in {first, second, third}


def test_another_pattern_than_the_databases_is_refused(db: Path) -> None:
    with pytest.raises(ValueError, match=r"was made with pattern='\*', asked for was '\*\.md'"):
        recipe.open_database(RetroTextConfig(db=db, pattern="*.md"))


def test_an_embedder_that_is_missing_is_asked_for_at_once(db: Path) -> None:
    database = Database.open(db, verify=False)
    arrays = {name: entry for name, entry in database.state["arrays"].items() if name != "counts"}
    for source, told in (
        (None, r"needs it: give it \(--embedder PATH\)"),
        ("gone/bert", r"read from gone/bert, which is not there"),
    ):
        state = {**database.state, "arrays": arrays, "embedder": {**database.state["embedder"], "source": source}}
        with pytest.raises(ValueError, match=told):
            recipe.with_embedder(Database(db, state))
    assert recipe.with_embedder(database) is database


def test_an_epochs_order_is_drawn_once(task: RetroTask, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [task.batch_at(step).indices for step in (0, 1)]
    task.windows._epoch = None
    drawn = []
    own = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or own(seed))
    assert [task.batch_at(step).indices for step in (0, 1)] == wanted and len(drawn) == 1
    task.batch_at(task.steps_per_epoch)
    assert len(drawn) == 2 and task.batch_at(0).indices == wanted[0]
