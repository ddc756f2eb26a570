"""Figures: files that a paper takes, with the view's own words and numbers in them."""

import struct
from xml.etree import ElementTree

import pytest

from crossattention.views.pages import write_figure
from view_samples import hostile_view, large_view, long_view, memory_view, picture_view, sound_view, text_view

VIEWS = {
    "text": text_view,
    "hostile": hostile_view,
    "picture": picture_view,
    "sound": sound_view,
    "long": long_view,
    "memory": memory_view,
    "large": large_view,
}


def texts(path):
    """All texts of an SVG, in their order."""
    return ["".join(node.itertext()).strip() for node in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_an_svg_holds_tokens_and_weights_as_texts(tmp_path):
    view = text_view()
    path = write_figure(view, tmp_path / "figure.svg", layer=1, head=2)
    found = texts(path)
    assert found.count("EH") == 2  # above the ribbons, and at its row
    assert found.count("f") == 1
    weights = view.layers[1].weights[2]
    assert {f"{weight:.2f}"[1:] for weight in weights.reshape(-1) if 0.005 <= weight < 0.995} <= set(found)
    assert "decoder.1, head 2" in " ".join(found)
    assert path.read_bytes() == write_figure(view, tmp_path / "again.svg", layer=1, head=2).read_bytes()


def test_a_memory_figure_names_keys_and_what_they_promote(tmp_path):
    view = memory_view()
    found = " ".join(texts(write_figure(view, tmp_path / "figure.svg")))
    key = view.layers[1].top_keys[0, 0]
    assert f"key {key}: {view.layers[1].coefficients[0, 0]:.2f}" in found
    assert f"P{key} </script>" in found


@pytest.mark.slow
@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_every_view_has_a_figure_of_a_size_that_a_page_holds(kind, ending, tmp_path):
    path = write_figure(VIEWS[kind](), tmp_path / f"figure.{ending}")
    if ending == "png":
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        width, height = width / 300, height / 300
    else:
        root = ElementTree.parse(path).getroot()
        width, height = (float(root.get(name).removesuffix("pt")) / 72 for name in ("width", "height"))
    assert 1.5 < width < 9
    assert 1 < height < 11


@pytest.mark.slow
def test_texts_of_the_data_are_no_formulas_and_no_markup(tmp_path):
    found = texts(write_figure(hostile_view(), tmp_path / "figure.svg"))
    assert "$x^2$" in found
    assert "</script><script>window…" in found
    assert not list(ElementTree.parse(tmp_path / "figure.svg").iter("{http://www.w3.org/2000/svg}script"))


def test_another_ending_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected a file that ends in \.png or \.svg, got 'figure\.pdf'; name the file so"):
        write_figure(text_view(), tmp_path / "figure.pdf")
