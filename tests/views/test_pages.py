"""Pages as files: self-contained, of the numbers that went in, with nothing of the data that could act."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest

from crossattention.views.pages import AttentionLayer, AttentionView, LongSide, TextSide, write_page
from view_samples import (
    HOSTILE,
    drawn_weights,
    hostile_view,
    large_view,
    long_view,
    memory_view,
    picture_view,
    sound_view,
    text_view,
)

VIEWS = {
    "text": text_view,
    "hostile": hostile_view,
    "picture": picture_view,
    "sound": sound_view,
    "long": long_view,
    "memory": memory_view,
}


def page_of(view, tmp_path, **changes):
    return write_page(view, tmp_path / "page.html", **changes).read_text(encoding="utf-8")


def data_of(page):
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(block)


def floats(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), "<f2").astype(np.float64) * packed["scale"]


@pytest.mark.parametrize("kind", VIEWS)
def test_a_page_asks_for_nothing_outside_of_itself(kind, tmp_path):
    page = page_of(VIEWS[kind](), tmp_path)
    outside = page[: page.index('id="data"')] + page[page.index("</script>") :]
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)", outside)
    assert not re.search(r"<(link|iframe|object|embed|base)\b|@import|url\(", outside)


@pytest.mark.parametrize("kind", VIEWS)
def test_the_policy_allows_the_page_s_own_script_and_style_by_their_hashes_alone(kind, tmp_path):
    page = page_of(VIEWS[kind](), tmp_path)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy


def test_hostile_texts_are_data_and_no_markup(tmp_path):
    page = page_of(hostile_view(), tmp_path)
    assert page.count("</script>") == 2  # the data's end and the script's, nothing of the data's
    (block,) = re.findall(r'id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert not set(block) & set("<>&\u2028\x00")
    labels = data_of(page)["queries"]["labels"]
    assert labels[0] == HOSTILE[0]
    assert labels[9] == "x" * 10_000
    assert labels[11] == "␀␛[31m␊␉"
    assert "<title>&lt;/title&gt;&lt;script&gt;" in page


def test_the_numbers_are_those_of_the_view(tmp_path):
    view = text_view()
    data = data_of(page_of(view, tmp_path))
    for packed, layer in zip(data["layers"], view.layers, strict=True):
        found = floats(packed["weights"]).reshape(layer.weights.shape)
        assert np.allclose(found, layer.weights, rtol=5e-4, atol=1e-7)
        assert np.allclose(floats(packed["highlight"]).reshape(layer.highlight.shape), layer.highlight, rtol=5e-4, atol=1e-7)
    assert data["notes"] == []
    assert data["context"]["labels"] == list("serif")


def test_of_a_long_context_the_kept_weights_and_the_highlight_are_there(tmp_path):
    view = long_view()
    data = data_of(page_of(view, tmp_path))
    (packed,) = data["layers"]
    assert packed["weights"] is None
    indices = np.frombuffer(base64.b64decode(packed["top"]["indices"]), "<u2").reshape(2, 4, 8)
    assert np.array_equal(indices, view.layers[0].top_indices)
    assert np.allclose(floats(packed["top"]["weights"]).reshape(2, 4, 8), view.layers[0].top_weights, rtol=5e-4)
    assert data["notes"] == ["Of each query the 8 largest weights are kept; what is not shown need not be zero."]


def test_positions_beyond_two_bytes_are_kept(tmp_path):
    layer = AttentionLayer("one", "cross", [[[99_999]]], [[[1.0]]])
    data = data_of(page_of(AttentionView("far", TextSide(("a",)), LongSide(100_000), (layer,)), tmp_path))
    indices = np.frombuffer(base64.b64decode(data["layers"][0]["top"]["indices"]), "<u4")
    assert indices.tolist() == [99_999]


def test_a_page_of_26_layers_is_under_five_megabytes(tmp_path):
    path = write_page(large_view(), tmp_path / "page.html")
    assert path.stat().st_size < 5_000_000
    data = data_of(path.read_text(encoding="utf-8"))
    assert [packed["top"]["k"] for packed in data["layers"]] == [8] * 26
    assert not any(packed["highlight"]["isMean"] for packed in data["layers"])


def test_what_does_not_fit_is_left_out_in_order_and_said(tmp_path):
    draw = np.random.default_rng(0)
    sides = TextSide(tuple("q" for _ in range(64))), LongSide(20_000)
    indices, weights = draw.integers(0, 20_000, (4, 64, 16)), draw.random((4, 64, 16))
    view = AttentionView("big", *sides, (AttentionLayer("one", "cross", indices, weights, draw.random((4, 20_000))),))
    all_bytes = len(page_of(view, tmp_path))
    seen = []
    for limit in (all_bytes + 3_000, all_bytes - 90_000, all_bytes - 166_000, 100_000):
        page = page_of(view, tmp_path, max_bytes=limit)
        assert len(page.encode()) <= limit
        packed, notes = data_of(page)["layers"][0], data_of(page)["notes"]
        kept = packed["highlight"] and ("mean" if packed["highlight"]["isMean"] else "each")
        seen.append((packed["top"]["k"], kept, len(notes)))
    assert seen[0] == (16, "each", 1)
    assert seen[1] == (16, "mean", 2)
    assert seen[2] == (8, "mean", 2)
    assert seen[3] == (8, None, 2)
    assert "largest weights of 16 that were given, for the page's size" in notes[0]


def test_what_cannot_fit_at_all_is_an_error_with_both_numbers(tmp_path):
    with pytest.raises(
        ValueError, match=r"the largest weight of each query in 26 layers takes [\d,]+ bytes, of which [\d,]+ are left"
    ):
        write_page(large_view(), tmp_path / "page.html", max_bytes=150_000)
    assert list(tmp_path.iterdir()) == []


def test_whole_weights_are_cut_to_the_largest_where_they_do_not_fit(tmp_path):
    layer = AttentionLayer.of_weights("one", "cross", drawn_weights(8, 200, 200))
    sides = [TextSide(tuple("x" for _ in range(200)))] * 2
    data = data_of(page_of(AttentionView("wide", *sides, (layer,)), tmp_path, max_bytes=400_000))
    assert data["layers"][0]["weights"] is None
    assert data["layers"][0]["top"]["k"] == 8


def test_the_same_view_is_the_same_file_and_replaces_an_old_one(tmp_path):
    (tmp_path / "page.html").write_text("old")
    first = page_of(text_view(), tmp_path)
    assert first == page_of(text_view(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("page.pdf", ValueError, "expected a file that ends in .html, got 'page.pdf'; name the file so"),
        ("", IsADirectoryError, r"is a folder; name a file in it, as .*view\.html"),
        ("missing/page.html", FileNotFoundError, "the folder .*missing for page.html does not exist; make it first"),
    ],
)
def test_a_path_that_cannot_be_written_is_named(name, fault, words, tmp_path):
    with pytest.raises(fault, match=words):
        write_page(text_view(), tmp_path / name)
