"""Two outputs are compared leaf by leaf, and inputs are copied for each run."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from crossattention.interop.comparing import copied, difference


@dataclasses.dataclass
class Output:
    states: torch.Tensor
    name: str = "one"


class Cache:
    def __init__(self, *keys):
        self.layers, self._private, self.length = list(keys), object(), len(keys)


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("own", "ours", "said"),
    [
        (("a", 1), ("b", 1), r"it gives 'b' instead of 'a' at \[0\]"),
        ({"n": 3}, {"n": 4}, r"it gives 4 instead of 3 at \['n'\]"),
        ({"loss": 1.5}, {"loss": 1.75}, r"it differs by 1.7e-01 where 1.0e-05 is allowed at \['loss'\]"),
        ({"x": ONE}, {}, r"it gives 'nothing' instead of a tensor \(2, 3\), torch.float32 at \['x'\]"),
        ((ONE, None), (ONE, ONE), r"it gives a tensor .* instead of None at \[1\]"),
        ([ONE], [ONE, ONE], "it gives '2 items' instead of '1 items'"),
        (ONE, ONE[:1], r"it gives a tensor \(1, 3\)"),
        (ONE.long(), 2 * ONE.long(), "other integers in 6 of 6 places"),
        (ONE, ONE / 0.0, "NaN or infinite"),
        (Output(ONE), Output(2 * ONE), r"it differs by 1.0e\+00 where 1.0e-05 is allowed at .states"),
        (Output(ONE), Output(ONE, "two"), "it gives 'two' instead of 'one' at .name"),
        (Cache(ONE, ONE), Cache(ONE, ONE + 1e-2), r"it differs by 1.0e-02 where 1.0e-05 is allowed at .layers\[1\]"),
        ({1, 2}, {1, 3}, "it gives set {1, 3} instead of set {1, 2}"),
        (ONE.numpy(), 2 * ONE.numpy(), "it differs by 1.0e"),
        (True, 1, "it gives 1 instead of True"),
    ],
)
def test_what_differs_is_said_with_its_place(own, ours, said):
    found = difference(own, ours)
    assert found.excess > 1.0
    with pytest.raises(ValueError, match=said):
        raise ValueError(found)


@pytest.mark.parametrize("value", [("a", 1, None), Output(ONE), Cache(ONE), {"x": [ONE, math.nan]}, torch.tensor([math.nan]), {1}])
def test_a_thing_and_its_copy_are_the_same(value):
    assert difference(value, copied(value)).apart == 0.0


def test_a_copy_has_tensors_of_its_own_and_the_same_modules():
    weight = torch.ones(3, requires_grad=True)
    example = {"x": weight * 2, "again": None, "cache": Cache(ONE), "model": (module := nn.Linear(2, 2))}
    example["again"] = example["x"]
    taken = copied(example)
    assert taken["x"] is taken["again"] is not example["x"] and torch.equal(taken["x"], example["x"])
    assert taken["model"] is module and taken["cache"].layers[0] is not ONE
    with pytest.raises(ValueError, match="input 'lines' of the example, a generator, cannot be copied"):
        copied({"lines": (line for line in "ab")})
