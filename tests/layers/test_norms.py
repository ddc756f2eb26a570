"""Norms of queries and keys, each against its formula written out in float64, inside attention."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention import CrossAttention, Plan, PlanError, SelfAttention
from crossattention.attention.parts import QueryKeyNorm
from crossattention.layers import norms
from crossattention.layers.norms import QueryKeyLayerNorm, QueryKeyRMSNorm, RMSNorm
from crossattention.layers.positions import Rotary
from crossattention.plan import ALL_PLANS
from layers.part_oracle import SIZES, written_out
from tolerances import assert_close

EPS = 1e-2  # large enough to be seen


def norm_and_formula(name: str) -> tuple[QueryKeyNorm, dict[str, Any]]:
    torch.manual_seed(2)
    kind = {"rms": QueryKeyRMSNorm, "layer": QueryKeyLayerNorm}[name]
    part = kind(SIZES["head_dim"], eps=EPS, dtype=torch.float64)
    for parameter in part.parameters():
        nn.init.normal_(parameter)

    def normalise(norm: nn.Module, rows: Tensor) -> Tensor:
        if name == "layer":
            rows = rows - rows.mean(-1, keepdim=True)
        rows = rows / (rows.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight
        return rows + norm.bias if name == "layer" else rows

    return part, {
        "turn_queries": lambda rows, _: normalise(part.query_norm, rows),
        "turn_keys": lambda rows, _: normalise(part.key_norm, rows),
    }


def indices(z: int, length: int) -> Tensor:
    return torch.arange(length).expand(z, -1)


@pytest.mark.parametrize("name", ["rms", "layer"])
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_every_legal_plan_computes_the_formula_and_its_gradients(name: str, kv_heads: int) -> None:
    part, formula = norm_and_formula(name)
    layer = CrossAttention(6, 9, qk_norm=part, kv_heads=kv_heads, **SIZES)
    a, b = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 7, 9, dtype=torch.float64)
    wanted = written_out(layer, a, b, indices(2, 5), indices(2, 7), **formula)
    weights = torch.randn_like(wanted)
    # A shift of all keys alike cancels in the softmax, so the key norm's bias has no effect and gradient zero.
    inputs = [layer.q_proj.weight, layer.k_proj.weight, *part.parameters()]
    gradients = torch.autograd.grad((wanted * weights).sum(), inputs)
    plans = [plan for plan in ALL_PLANS if plan.scores == "head"]
    for plan in plans:
        layer.plan = plan
        out = layer(a, b)
        assert_close(out, wanted)
        assert_close(layer.attend(a, layer.prepare(b)), wanted)
        for found, other in zip(torch.autograd.grad((out * weights).sum(), inputs), gradients, strict=True):
            assert_close(found, other)


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_self_attention_computes_the_formula_whole_and_step_by_step(name: str) -> None:
    part, formula = norm_and_formula(name)
    layer = SelfAttention(6, qk_norm=part, causal=True, **SIZES)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    causal = torch.ones(7, 7).tril().bool().expand(2, -1, -1)
    wanted = written_out(layer, x, x, indices(2, 7), indices(2, 7), mask=causal, **formula)
    assert_close(layer(x), wanted)
    first, cache = layer.step(x[:, :4])
    assert_close(torch.cat((first, layer.step(x[:, 4:], cache)[0]), 1), wanted)


def test_the_norm_comes_before_the_turning() -> None:
    part, formula = norm_and_formula("layer")
    layer = CrossAttention(6, 9, qk_norm=part, positions=Rotary(), **SIZES)
    a, b = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 7, 9, dtype=torch.float64)

    def turn(rows: Tensor, positions: Tensor) -> Tensor:
        angle = positions[:, None] / 10000 ** torch.tensor([0.0, 0.5], dtype=torch.float64)
        numbers = torch.view_as_complex(rows.unflatten(-1, (-1, 2))) * torch.complex(angle.cos(), angle.sin())
        return torch.view_as_real(numbers).flatten(-2)

    both = {
        "turn_queries": lambda rows, p: turn(formula["turn_queries"](rows, p), p),
        "turn_keys": lambda rows, p: turn(formula["turn_keys"](rows, p), p),
    }
    assert_close(layer(a, b), written_out(layer, a, b, indices(2, 5), indices(2, 7), **both))


def test_scores_do_not_grow_with_the_input() -> None:
    layer = CrossAttention(6, 9, qk_norm=QueryKeyRMSNorm(4, eps=1e-12), bias=False, **SIZES)
    a, b = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 7, 9, dtype=torch.float64)
    assert_close(layer(1000 * a, b), layer(a, b))


@pytest.mark.parametrize("space", ["context", "query"])
def test_forbidden_plans_are_refused_with_the_reason(space: str) -> None:
    with pytest.raises(PlanError, match="the query-key norm stands between Wq and Wk"):
        CrossAttention(6, 9, qk_norm=QueryKeyLayerNorm(4), plan=Plan(space, "head"), **SIZES)


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_bfloat16_stays_near_float64(name: str) -> None:
    part, _ = norm_and_formula(name)
    layer = CrossAttention(6, 9, qk_norm=part, **SIZES)
    a, b = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 7, 9, dtype=torch.float64)
    wanted = layer(a, b)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert_close(layer.float()(a.float(), b.float()), wanted, dtype=torch.bfloat16)
    assert_close(layer.bfloat16()(a.bfloat16(), b.bfloat16()), wanted, dtype=torch.bfloat16)


def test_the_rms_norm_is_torchs() -> None:
    ours, theirs = RMSNorm(6, eps=EPS), nn.RMSNorm(6, eps=EPS)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(ours(x), theirs(x))
    assert RMSNorm(6, elementwise_affine=False)(x).square().mean(-1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


@pytest.mark.parametrize("eps", [1e-6, 0.3, None])
def test_the_root_mean_square_norm_has_torchs_gradients_in_blocks(eps: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(norms, "_BLOCK", 18)
    norm = RMSNorm(6, eps=eps).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(3, 7, 6, dtype=torch.float64)
    out, wanted = norm(x), F.rms_norm(x, (6,), norm.weight, eps)
    assert_close(out, wanted)
    pairs = zip(*(torch.autograd.grad(y, (x, norm.weight), gradient) for y in (out, wanted)), strict=True)
    for mine, theirs in pairs:
        assert_close(mine, theirs)
    assert out.grad_fn.name() != wanted.grad_fn.name()


def test_the_root_mean_square_norm_can_be_differentiated_twice() -> None:
    norm = RMSNorm(5).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda a, w: torch.func.functional_call(norm, {"weight": w}, (a,)), (x, norm.weight))
    norm.weight.requires_grad_(False)
    (first,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    assert first.requires_grad
