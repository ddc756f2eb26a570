"""Dropout against its formula: shares, scale, the residual sum, gradients, and the ways around the cheap draws."""

import pytest
import torch
from torch import nn

from crossattention.attention.dropout import drawn_factors
from crossattention.layers import Dropout

CPU = torch.device("cpu")


def test_the_share_is_as_asked_and_the_mean_is_exact() -> None:
    torch.manual_seed(0)
    factors, scale = drawn_factors((250, 401), 0.3, torch.float32, CPU)
    assert set(factors.unique().tolist()) == {0.0, 1.0}
    assert 1 - factors.mean().item() == pytest.approx(0.3, abs=0.005)
    assert scale == 65536 / (65536 - 19661)  # 0.3 to the nearest multiple of 2^-16, and the scale that goes with it
    rows = factors.mean(1)
    assert rows.std().item() == pytest.approx((0.3 * 0.7 / 401) ** 0.5, rel=0.2)  # no number follows from its neighbours
    columns = factors.mean(0)
    assert columns.std().item() == pytest.approx((0.3 * 0.7 / 250) ** 0.5, rel=0.2)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 0, 4), (5, 1, 7)])
def test_any_shape_is_drawn_and_all_draws_come_from_the_generator(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    first, _ = drawn_factors(shape, 0.5, torch.float64, CPU)
    assert first.shape == shape and first.dtype == torch.float64
    torch.manual_seed(3)
    assert torch.equal(first, drawn_factors(shape, 0.5, torch.float64, CPU)[0])


def test_nearly_all_may_be_dropped() -> None:
    factors, scale = drawn_factors((1000,), 1 - 1e-9, torch.float32, CPU)
    assert scale == 65536 and factors.sum() <= 2


@pytest.mark.parametrize("with_residual", [False, True])
def test_output_and_gradients_are_the_formulas(with_residual: bool) -> None:
    layer = Dropout(0.4)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(5, 7, dtype=torch.float64, requires_grad=True) if with_residual else None
    torch.manual_seed(1)
    out = layer(x, residual)
    torch.manual_seed(1)
    factors, scale = drawn_factors((5, 7), 0.4, torch.float64, CPU)
    wanted = x * factors * scale + (residual if residual is not None else 0)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
    inputs = [x] if residual is None else [x, residual]
    weight = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, inputs, weight), torch.autograd.grad(wanted, inputs, weight), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_evaluation_and_probability_zero_drop_nothing_and_draw_nothing() -> None:
    x, residual = torch.randn(2, 3), torch.randn(2, 3)
    state = torch.get_rng_state()
    for layer in (Dropout(0.5).eval(), Dropout(0.0)):
        assert layer(x) is x
        assert torch.equal(layer(x, residual), residual + x)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_torchs_where_torch_has_a_kernel_or_looks_in() -> None:
    assert isinstance(Dropout(0.1), nn.Dropout)
    assert torch.equal(Dropout(1.0)(torch.ones(3), torch.ones(3)), torch.ones(3))
    compiled = torch.compile(lambda x, y: Dropout(0.5)(x, y), fullgraph=True, backend="eager")
    assert set(compiled(torch.ones(50), torch.ones(50)).unique().tolist()) == {1.0, 3.0}
    many = torch.func.vmap(Dropout(0.5), randomness="different")(torch.ones(4, 50))
    assert set(many.unique().tolist()) == {0.0, 2.0}


def test_a_half_precision_update_is_added_to_a_float32_residual() -> None:
    out = Dropout(0.25)(torch.ones(40, dtype=torch.bfloat16), torch.ones(40))
    assert out.dtype == torch.float32
    assert out.min() == 1.0
    assert out.max().item() == pytest.approx(1 + 4 / 3, abs=1e-6)  # not rounded to bfloat16


def test_the_probability_is_checked() -> None:
    with pytest.raises(ValueError, match=r"dropout probability has to be between 0 and 1, but got 1\.5"):
        Dropout(1.5)
