"""What the kernels are called with, where that is not seen in a layer's output."""

import pytest
import torch

from crossattention.attention import execute, fused
from crossattention.attention.masks import combine_masks

CPU = torch.device("cpu")


@pytest.mark.parametrize("shares_keys", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_half_precision_trains_through_the_float32_kernel_on_a_cpu(monkeypatch, trains: bool, shares_keys: bool) -> None:
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, length, 8, dtype=torch.bfloat16, requires_grad=trains) for length in (4, 5, 5))
    values = keys if shares_keys else values
    mask = combine_masks(torch.tensor([[True, True, False, True, True], [False] * 5]), None, None, 5, torch.bfloat16)
    seen = []
    read_in = fused._read
    monkeypatch.setattr(fused, "_read", lambda *read: seen.append([t.dtype for t in read[:3]]) or read_in(*read))
    out, _ = execute.attend_heads(queries, keys, values, mask, scale=0.3)
    assert seen == [[torch.float32 if trains else torch.bfloat16] * 3]
    exact, _ = execute.attend_heads(queries.detach().float(), keys.detach().float(), values.detach().float(), mask, scale=0.3)
    assert out.dtype == torch.bfloat16
    assert not out[1].any()
    if trains:
        assert torch.equal(out, exact.bfloat16())
        out.square().sum().backward()
        assert keys.grad.dtype == torch.bfloat16 and keys.grad[0].abs().sum() > 0
        assert not keys.grad[1].any()
