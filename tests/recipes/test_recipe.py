"""The frame of recipes: every listed one has its members, and the verbs take a run that is no translator."""

import dataclasses
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from cli.conftest import type_in
from crossattention.cli.questions import Question, questions_from_arguments
from crossattention.recipes import listing
from crossattention.recipes.listing import RECIPES, Listed
from crossattention.recipes.recipe import Run
from crossattention.views.content import AttentionLayer, AttentionView, LongSide, TextSide


@dataclass(frozen=True)
class Guess:
    text: str
    score: float


@dataclass(frozen=True)
class Seeing(Run):
    """Answers a picture and a question by their lengths."""

    input_names: ClassVar = ("PICTURE", "QUESTION")

    @property
    def model(self):
        return None

    def predict(self, inputs, *, num_hypotheses=1, batch_size=32):
        return ([Guess(str(len(picture)), 0.75), Guess(question, 0.25)][:num_hypotheses] for picture, question in inputs)

    def evaluate(self, *, on_progress=None):
        return {"accuracy": 0.5}

    def view(self, given, answer=None):
        layer = AttentionLayer("layer", "cross-attention", np.zeros((1, 1, 1), int), np.ones((1, 1, 1)))
        return AttentionView(" ".join(given), TextSide(("a",)), LongSide(3, {1: "b"}), (layer,))


@pytest.fixture
def seeing(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    run = Seeing(tmp_path, "vqa", {}, 7)
    monkeypatch.setattr("crossattention.recipes.run.load_run", lambda folder: run)
    return run


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_what_a_recipe_has(name):
    module = RECIPES[name].load()
    assert name == module.RECIPE
    assert dataclasses.is_dataclass(module.CONFIG) and module.CONFIG.__doc__
    for member in ("evaluate", "describe", "batch_at", "loss", "build_model", "notes", "sample_input", "examples"):
        assert hasattr(module.TASK, member), member
    assert module.default_training().learning_rate > 0
    assert callable(module.open_run) and callable(module.config_from_json)


def test_the_list_alone_imports_no_torch():
    program = "import sys, crossattention.recipes.listing; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_missing_library_of_a_recipe_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "some_recipe", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"the recipe some_recipe needs some_recipe; .*pip install 'crossattention\[see\]'"
    ):
        Listed("what", "some_recipe", "see").load()
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'crossattention\.recipes\.none'"):
        Listed("what", "crossattention.recipes.none", "see").load()


def test_a_question_of_several_words(seeing, monkeypatch):
    code, stdout, _ = type_in("predict", "run", "cat.png", "what is it?", "--best", 2)
    assert (code, stdout.splitlines()) == (0, ["cat.png\twhat is it?\t7\t0.750", "cat.png\twhat is it?\twhat is it?\t0.250"])
    assert json.loads(type_in("predict", "run", "a", "b", "--json")[1]) == {
        "input": ["a", "b"],
        "predictions": [{"text": "1", "score": 0.75}],
    }
    code, _, stderr = type_in("predict", "run", "a", "b", "c")
    assert code == 2 and "a question is 2 words, PICTURE QUESTION; got 3 words: a b c" in stderr
    lines = io.TextIOWrapper(io.BytesIO(b"ab\tc\nabc\n"))
    monkeypatch.setattr(sys, "stdin", lines)
    code, stdout, stderr = type_in("predict", "run")
    assert (code, stdout) == (2, "ab\tc\t2\t0.750\n")
    assert "line 2 of standard input: expected PICTURE and QUESTION with a tab between, got 1 words: ('abc',)" in stderr


def test_what_a_run_does_not_have_is_refused(seeing):
    for verb in (["predict", "run", "a", "b", "--beams", 2], ["evaluate", "run", "--beams", 2]):
        code, stdout, stderr = type_in(*verb)
        assert (code, stdout) == (2, "") and "a run of vqa has no beam search, got beams=2; leave out --beams" in stderr
    assert "a run of vqa has no map for the terminal" in type_in("predict", "run", "a", "b", "--map")[2]
    assert "a run of vqa does not show its feed-forward layers" in type_in("view", "run", "a", "b", "--feed-forward")[2]
    assert "a run of vqa does not show its feed-forward layers" in type_in("view", "run", "--feed-forward")[2]
    assert "a run of vqa reads 2 words, PICTURE QUESTION; got 1: a" in type_in("view", "run", "a")[2]


def test_scores_and_views_of_any_run(seeing, tmp_path):
    assert type_in("evaluate", "run")[1].split() == ["accuracy", "all", "50.0", "%"]
    assert "beams" not in json.loads(type_in("evaluate", "run", "--json")[1])
    facts = json.loads(type_in("view", "run", "a", "b", "--json")[1])
    assert (facts["input"], facts["queries"], facts["context"]) == (
        ["a", "b"],
        ["a"],
        {"kind": "long", "positions": 3, "labels": {"1": "b"}},
    )
    assert facts["layers"] == [{"name": "layer", "kind": "cross-attention", "top_indices": [[[0]]], "top_weights": [[[1.0]]]}]
    assert type_in("view", "run", "a", "b", "-o", tmp_path / "v.html")[0] == 0


def test_questions_of_one_word_are_texts():
    assert [question.given() for batch in questions_from_arguments(["a", "b"]) for question in batch] == ["a", "b"]
    assert Question(b"a\tb").given() == "a\tb"
    assert Question(b"a\tb").given(("X", "Y")) == ("a", "b")


def test_shares_are_shown_as_such():
    assert "accuracy" in listing.SHARES
