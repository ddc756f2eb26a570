"""What one picture shows of a view: means over heads and layers, against numpy on the whole weights."""

import numpy as np
import pytest

from crossattention.views.pages import AttentionLayer, AttentionView, TextSide
from crossattention.views.selection import select
from view_samples import drawn_weights, long_view, memory_view, text_view


def whole(selection):
    return np.stack([selection.row(query) for query in range(selection.n)])


@pytest.mark.parametrize(("layer", "head"), [(None, None), (1, None), (1, 2), (0, 0)])
def test_means_are_those_of_the_whole_weights(layer, head):
    view = text_view()
    stacked = np.stack([one.weights for one in view.layers])
    stacked = stacked if layer is None else stacked[layer : layer + 1]
    expected = stacked.mean((0, 1)) if head is None else stacked[0, head]
    found = select(view, layer, head)
    assert np.allclose(whole(found), expected, atol=1e-7)
    assert np.allclose(found.mass, expected.sum(0), atol=1e-6)
    assert found.is_whole
    assert found.largest == pytest.approx(expected.max())


def test_kept_weights_alone_give_the_same_where_all_are_kept():
    view = text_view()
    kept = [AttentionLayer(one.name, one.kind, one.top_indices, one.top_weights) for one in view.layers]
    found = select(AttentionView("kept", view.queries, view.context, tuple(kept)))
    assert np.allclose(whole(found), whole(select(view)), atol=1e-7)
    assert np.allclose(found.mass, select(view).mass, atol=1e-6)
    assert not found.is_whole


def test_mass_is_the_highlight_where_it_is_known():
    found = select(long_view(), 0, 1)
    assert np.array_equal(found.mass, long_view().layers[0].highlight[1])
    assert found.mass.argmax() == 31_415


def test_a_cell_of_the_grid_is_the_largest_weight_in_it():
    weights = drawn_weights(1, 6, 10)
    sides = TextSide(tuple("abcdef")), TextSide(tuple("abcdefghij"))
    found = select(AttentionView("grid", *sides, (AttentionLayer.of_weights("one", "cross", weights, k=10),)))
    assert np.allclose(found.grid(3, 5), weights[0].reshape(3, 2, 5, 2).max((1, 3)))
    assert found.grid(100, 100).shape == (6, 10)


@pytest.mark.parametrize(
    ("view", "layer", "head", "words"),
    [
        (text_view(), 2, None, "there is no layer 2: the view has 2, counted from 0; leave it out for their mean"),
        (text_view(), None, 0, "head 0 needs a layer, since each layer has heads of its own; name one of 2"),
        (text_view(), 1, 3, "there is no head 3: layer 1 has 3, counted from 0; leave it out for their mean"),
        (memory_view(), 1, 0, "a feed-forward layer has no heads, got head=0; leave it out"),
    ],
)
def test_what_is_not_there_is_named(view, layer, head, words):
    from crossattention.views.selection import check_choice

    with pytest.raises(ValueError, match=words):
        check_choice(view, layer, head)
