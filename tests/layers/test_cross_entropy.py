"""The summed cross-entropy in blocks of rows equals the one that is written out, with its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crossattention.layers import cross_entropy
from crossattention.layers.cross_entropy import IGNORED, summed_cross_entropy
from tolerances import assert_close


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True), torch.randn(13, 6, dtype=dtype, requires_grad=True)
    labels = torch.randint(13, (2, 5))
    labels[0, 3] = labels[1, 0] = IGNORED
    return x, weight, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_give_the_sum_and_its_gradients(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._BLOCK, "cpu", 3 * 13)  # blocks of three rows, the last of one
    x, weight, labels = _inputs(dtype)
    wanted = F.cross_entropy((x @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    found = summed_cross_entropy(x, weight, labels)
    assert_close(found, wanted)
    for mine, whole in zip(torch.autograd.grad(3 * found, (x, weight)), torch.autograd.grad(3 * wanted, (x, weight)), strict=True):
        assert_close(mine, whole)
    with torch.no_grad():
        assert_close(summed_cross_entropy(x, weight, labels), wanted)


def test_it_has_second_derivatives_and_needs_not_both_inputs() -> None:
    x, weight, labels = _inputs()
    assert torch.autograd.gradcheck(lambda a, b: summed_cross_entropy(a, b, labels), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: summed_cross_entropy(a, b, labels), (x, weight))
    summed_cross_entropy(x.detach(), weight, labels).backward()
    assert weight.grad is not None and x.grad is None


def test_it_is_the_written_out_one_under_autocast_and_refuses_other_shapes() -> None:
    x, weight, labels = _inputs(torch.float32)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        logits = F.linear(x, weight).float()
        found = summed_cross_entropy(x, weight, labels)
    assert torch.allclose(found, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), rtol=1e-5)
    with pytest.raises(ValueError, match=r"expected x \(\.\.\., d\), a weight \(V, d\) and labels \(\.\.\.\), got"):
        summed_cross_entropy(x, weight, labels[:1])


def test_the_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, labels = _inputs()
    monkeypatch.setitem(cross_entropy._BLOCK, "cpu", 2 * 13)
    shapes = []
    own = torch.log_softmax

    def seen(logits: torch.Tensor, *given: int, **named: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(logits.shape))
        return own(logits, *given, **named)

    monkeypatch.setattr(torch, "log_softmax", seen)
    summed_cross_entropy(x, weight, labels).backward()
    assert shapes == [(2, 13)] * 5
