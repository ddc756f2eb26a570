import pytest

from crossattention.plan import Sizes

SIZES = {
    "batch": 2, "query_length": 5, "context_length": 7, "query_dim": 6, "context_dim": 9, "heads": 4, "kv_heads": 2,
    "head_dim": 8, "value_head_dim": 3, "out_dim": 10,
}  # fmt: skip


def test_sizes_are_a_hashable_value():
    assert hash(Sizes(**SIZES)) == hash(Sizes(**SIZES)) and Sizes(**SIZES).element_bytes == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"context_length": -1}, "context_length must be at least 0, got -1"),
        ({"uses": 0}, "uses must be at least 1, got 0"),
        ({"kv_heads": 3}, "kv_heads=3 for heads=4"),
        ({"dtype": "int8"}, "got 'int8'"),
    ],
)
def test_sizes_that_cannot_be_say_so(change, message):
    with pytest.raises(ValueError, match=message):
        Sizes(**{**SIZES, **change})


def test_empty_sides_are_sizes_too():
    assert Sizes(**{**SIZES, "query_length": 0, "context_length": 0, "batch": 0}).batch == 0
