"""`crossattention view`: the file that is written, the numbers as JSON, and what is said where it cannot be."""

import json

import numpy as np
import pytest

from cli.conftest import type_in
from crossattention.recipes.run import load_run


def test_a_page_is_written_and_its_path_and_weights_are_printed(trained, tmp_path):
    out = tmp_path / "page.html"
    code, stdout, stderr = type_in("view", trained.run, "abc", "-o", out)
    assert (code, stdout) == (0, f"{out}\n")
    assert stderr.startswith(f"loaded {trained.run / 'best'} (seq2seq, step 200, sha256 ")
    page = out.read_text(encoding="utf-8")
    assert '"labels":["C","B","A"]' in page
    assert '"labels":["a","b","c"]' in page
    assert "<title>abc → C B A</title>" in page


def test_without_a_name_the_page_lies_in_this_folder_under_the_input_s(g2p_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = type_in("view", g2p_run, "Can't", "--answer", "K AE N T")
    assert (code, stdout) == (0, "attention-Can-t.html\n")
    assert (tmp_path / "attention-Can-t.html").is_file()


def test_json_holds_the_numbers_and_writes_no_file_unless_one_is_named(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = type_in("view", trained.run, "abc", "--json")
    facts = json.loads(stdout)
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    assert (facts["queries"], facts["context"], facts["file"]) == (["C", "B", "A"], ["a", "b", "c"], None)
    weights = np.array([layer["weights"] for layer in facts["layers"]])
    assert weights.shape == (1, 2, 3, 3)
    assert np.allclose(weights.sum(-1), 1, atol=1e-4)
    alignment = load_run(trained.run).align("abc", "C B A").weights
    assert np.allclose(weights.mean((0, 1)), alignment, atol=1e-4)


def test_a_figure_shows_the_head_that_was_asked_for(trained, tmp_path):
    out = tmp_path / "figure.svg"
    assert type_in("view", trained.run, "abc", "-o", out, "--layer", 0, "--head", 1)[:2] == (0, f"{out}\n")
    assert "decoder.layers.0.cross_attention, head 1" in out.read_text(encoding="utf-8")


def test_feed_forward_shows_keys_what_they_promote_and_on_which_training_texts(trained, tmp_path):
    out = tmp_path / "page.html"
    code, stdout, _ = type_in("view", trained.run, "abc", "--feed-forward", "-o", out, "--json")
    facts = json.loads(stdout)
    assert code == 0
    assert facts["tokens"] == ["C", "B", "A"]
    (layer,) = facts["layers"]
    assert layer["size"] == 64
    strongest = layer["keys"][str(layer["top_keys"][0][0])]
    assert len(strongest["promotes"]) == 6
    assert all(len(one["tokens"]) == 3 and one["source"][::-1].upper() == "".join(one["tokens"]) for one in strongest["inputs"])
    assert "fires most are looked for among 300 training texts" in out.read_text(encoding="utf-8")


def test_feed_forward_without_an_input_reads_a_training_text_and_a_view_without_one_is_refused(trained, tmp_path):
    out = tmp_path / "page.html"
    code, stdout, _ = type_in("view", trained.run, "--feed-forward", "-o", out, "--json")
    [(source, _)] = load_run(trained.run).training_pairs(1)
    assert code == 0 and out.is_file() and json.loads(stdout)["input"] == source
    code, _, stderr = type_in("view", trained.run)
    assert code == 2 and "reads one word, TEXT; got none" in stderr


def test_feed_forward_without_the_run_s_data_says_so(trained, pairs_file, tmp_path, monkeypatch):
    moved = pairs_file.rename(pairs_file.with_suffix(".away"))
    try:
        out = tmp_path / "page.html"
        assert type_in("view", trained.run, "abc", "--feed-forward", "-o", out)[0] == 0
    finally:
        moved.rename(pairs_file)
    assert "data is not where it was, or has changed, so no texts are shown" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["abc", "-o", "page.pdf"], "expected a file that ends in .html or .png or .svg, got 'page.pdf'; name the file so"),
        (["abc", "-o", "."], "expected a file to write, but . is a folder; name a file in it, as view.html"),
        (["abc", "-o", "no/page.html"], "the folder no for page.html does not exist; make it first"),
        (["", "-o", "page.html"], "expected a text to read, got an empty one"),
        (["a!c", "-o", "page.html"], "the symbol '!' at position 2 of 'a!c' was never seen in training"),
        (["abc", "-o", "page.html", "--layer", "1"], "there is no layer 1: the view has 1, counted from 0"),
        (["abc", "-o", "page.html", "--head", "0"], "head 0 needs a layer"),
        (["abc", "-o", "page.html", "--answer", ""], "nothing was written for 'abc', so nothing read it"),
        (
            ["abc", "-o", "page.html", "--feed-forward", "--layer", "0", "--head", "0"],
            "a feed-forward layer has no heads, got head=0",
        ),
    ],
)
def test_a_fault_is_one_sentence_and_no_file(words, sentence, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = type_in("view", trained.run, *words)
    assert (code, stdout) == (2, "")
    assert sentence in stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_no_such_run_is_named(tmp_path):
    code, _, stderr = type_in("view", tmp_path / "none", "abc", "-o", tmp_path / "page.html")
    assert code == 2
    assert f"expected the folder of a run at {tmp_path / 'none'}, found nothing" in stderr


def test_every_training_ends_with_a_view_in_the_run_s_folder(trained):
    page = trained.run / "view.html"
    assert re_line(trained.stdout, "to open in a browser: ") == str(page)
    assert "decoder.layers.0.cross_attention" in page.read_text(encoding="utf-8")


def re_line(stdout, words):
    """What stands behind some words, in the one line that has them."""
    (line,) = (line for line in stdout.splitlines() if words in line)
    return line.split(words)[1]


@pytest.mark.browser
def test_letters_and_phonemes_align_in_a_browser(trained, browser, tmp_path):
    out = tmp_path / "page.html"
    type_in("view", trained.run, "abc", "-o", out)
    browser.open(out)
    assert browser.complaints == []
    tokens = "side => [...document.querySelectorAll(`.ribbons .${side} .text`)].map(e => e.textContent)"
    assert browser.evaluate(f"({tokens})('queries')")[:3] == ["C", "B", "A"]
    assert browser.evaluate(f"({tokens})('context')")[:3] == ["a", "b", "c"]
    assert browser.evaluate("document.querySelectorAll('.ribbons path').length") >= 3
