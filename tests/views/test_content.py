"""The border of the views: what fits together is taken, what does not is named with its numbers."""

import numpy as np
import pytest

from crossattention.views.pages import (
    AttentionLayer,
    AttentionView,
    FeedForwardView,
    ImageSide,
    KeyInput,
    LongSide,
    MemoryKey,
    MemoryLayer,
    SoundSide,
    TextSide,
)
from view_samples import drawn_weights, png

AB, XYZ = TextSide(("a", "b")), TextSide(("x", "y", "z"))


def layer(heads=1, n=2, m=3, **changes):
    parts = {"top_indices": np.zeros((heads, n, 1), int), "top_weights": np.ones((heads, n, 1))}
    return AttentionLayer("one", "cross", **{**parts, **changes})


def view(*layers, queries=AB, context=XYZ):
    return AttentionView("title", queries, context, layers)


def test_nested_lists_are_taken_like_arrays():
    made = AttentionLayer("one", "cross", [[[2, 0], [1, 0]]], [[[0.5, 0.25], [1, 0]]], [[0.25, 1, 0.5]])
    assert view(made).layers[0].heads == 1
    assert made.top_weights.tolist() == [[[0.5, 0.25], [1.0, 0.0]]]


def test_a_layer_of_weights_keeps_the_largest_and_sums_what_each_position_receives():
    weights = drawn_weights(2, 3, 5)
    made = AttentionLayer.of_weights("one", "cross", weights, k=2)
    assert np.array_equal(made.top_weights, np.sort(weights, -1)[..., :-3:-1])
    assert np.array_equal(np.take_along_axis(weights, made.top_indices, -1), made.top_weights)
    assert np.allclose(made.highlight, weights.sum(1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TextSide("abc"), r"tokens expects a sequence of texts, got the text 'abc'; write \('abc',\) or tuple\(text\)"),
        (lambda: TextSide(("a", 3)), "tokens expects texts, got int 3"),
        (lambda: TextSide(("a", None)), "tokens expects texts, got NoneType None"),
        (lambda: LongSide(5, {0: None}), "labels expects texts, got NoneType None"),
        (lambda: view(layer(), queries="ab"), r"queries expects a side, as TextSide\(tokens\), got str 'ab'"),
        (lambda: FeedForwardView("t", ("a",), ()), r"tokens expects a side, as TextSide\(tokens\), got tuple \('a',\)"),
        (lambda: ImageSide(b"GIF89a", 2, 2), "png expects the bytes of a PNG file, got 6 bytes that begin with b'GIF89a'"),
        (lambda: ImageSide(png(64, 48), 49, 8), "rows must be 1 to 48, the picture's pixels that way, got 49"),
        (
            lambda: SoundSide([[0.0]], 8000, 1),
            r"samples expects the samples of one channel, \(length,\), got an array of shape \(1, 1\)",
        ),
        (lambda: SoundSide([0.0, 1.5], 8000, 1), "within -1.0 to 1.0, got up to 1.5; divide by the largest"),
        (lambda: SoundSide([0.0], 8000, 0), "positions must be at least 1, got 0"),
        (lambda: SoundSide([0.0], 8000, 1, -1.0), "seconds_per_position must be above 0, got -1.0"),
        (lambda: LongSide(0), "length must be at least 1, got 0"),
        (lambda: LongSide(5, {5: "x"}), "labels names position 5, but positions go from 0 to 4"),
        (lambda: layer(top_indices=np.zeros((1, 2, 1))), "'one': top_indices expects integers, got float64"),
        (lambda: layer(top_indices=np.zeros((1, 2, 2), int)), r"got \(1, 2, 2\) and \(1, 2, 1\)"),
        (lambda: layer(top_weights=-np.ones((1, 2, 1))), "'one': top_weights must be finite and not negative, got -1.0"),
        (lambda: layer(highlight=np.full((1, 3), np.nan)), "'one': highlight must be finite and not negative, got nan"),
        (lambda: layer(weights=np.ones((2, 3))), r"'one': weights must have 3 dimensions, got an array of shape \(2, 3\)"),
        (lambda: view(), "a view needs queries, a context and layers, got 2 queries, 3 context positions and 0 layers"),
        (lambda: view(layer(n=1)), "'one' has weights of 1 queries, but the view has 2 queries"),
        (
            lambda: view(layer(top_indices=np.full((1, 2, 1), 3))),
            "'one' reads position 3, but positions of the context go from 0 to 2",
        ),
        (lambda: view(layer(highlight=np.ones((2, 3)))), r"highlight of 'one' must be \(1, 3\) for these sides, got \(2, 3\)"),
        (lambda: KeyInput(("a",), 1, 1.0), "at must be one of 1 tokens, counted from 0, got 1"),
        (lambda: MemoryLayer("ff", 4, [[0]], [[1.0, 2.0]], [1], {}), r"got \(1, 1\), \(1, 2\) and \(1,\)"),
        (lambda: MemoryLayer("ff", 4, [[3]], [[1.0]], [1], {}), "'ff': keys says nothing of key 3, which stands in top_keys"),
        (
            lambda: FeedForwardView("t", AB, (MemoryLayer("ff", 4, [[3]], [[1.0]], [1], {3: MemoryKey(())}),)),
            "'ff' has 1 tokens, but the view has 2",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_numbers(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_positions_have_their_lengths():
    assert TextSide(letter for letter in "abc").tokens == ("a", "b", "c")
    assert ImageSide(png(), 6, 8, ("[CLS]",)).length == 49
    sound = SoundSide(np.zeros(8000), 8000, 50)
    assert (sound.seconds, sound.seconds_per_position, sound.length) == (1.0, 0.02, 50)
