"""Attention by distance equals the scores with their bias written out, with all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossattention.attention import by_distance, cross_attention, self_attention
from crossattention.attention.cross_attention import CrossAttention
from crossattention.attention.self_attention import SelfAttention
from crossattention.layers.positions import RelativeLogits
from tolerances import assert_close


def _outputs(call, inputs: list[Tensor]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    out = call()
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def _both(call, inputs: list[Tensor], module, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    taken = []
    own = by_distance.attend_by_distance

    def seen(*given, **named):  # type: ignore[no-untyped-def]
        taken.append(1)
        return own(*given, **named)

    monkeypatch.setattr(module, "attend_by_distance", seen)
    mine = _outputs(call, inputs)
    assert taken
    monkeypatch.setattr(module, "runs_by_distance", lambda *tensors: False)
    for found, wanted in zip(mine, _outputs(call, inputs), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("items", [1, 2, 5])
@pytest.mark.parametrize(("r", "n", "c", "m"), [(1, 5, 1, 7), (1, 5, 2, 7), (2, 5, 1, 7), (2, 6, 3, 4), (1, 1, 1, 1), (1, 1, 2, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention(r: int, n: int, c: int, m: int, masked: bool, items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(by_distance, "CACHED_NUMBERS", items * 3 * r * n * c * m)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    positions = RelativeLogits(12, 3, 5, max_distance=6)
    layer = CrossAttention(12, 8, heads=3, head_dim=5, value_head_dim=5, bias=("q_proj",), positions=positions, plan="textbook")
    layer = layer.double()
    torch.nn.init.normal_(positions.bias)
    a, b = (torch.randn(3, size, d, dtype=torch.float64, requires_grad=True) for size, d in ((r * n, 12), (c * m, 8)))
    mask = None
    if masked:
        mask = torch.rand(3, c * m) > 0.3
        mask[1] = False
    places = {"query_positions": torch.arange(3, 3 + n).repeat(r), "context_positions": torch.arange(m).repeat(c)}
    _both(lambda: layer(a, b, context_mask=mask, **places), [a, b, *layer.parameters()], cross_attention, monkeypatch)


@pytest.mark.parametrize(("causal", "n", "span"), [(True, 11, 3), (True, 11, 128), (True, 1, 3), (False, 7, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention(causal: bool, n: int, span: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(by_distance, "SPAN", span)
    positions = RelativeLogits(12, 3, 5, bias=bias)
    layer = SelfAttention(12, heads=3, head_dim=5, value_head_dim=4, positions=positions, causal=causal).double()
    x = torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for name, p in layer.named_parameters() if name != "k_proj.bias")]
    _both(lambda: layer(x), inputs, self_attention, monkeypatch)


def test_a_mask_on_a_sequence_read_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(12, heads=3, head_dim=5, positions=RelativeLogits(12, 3, 5, max_distance=4)).double()
    x = torch.randn(3, 6, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 6) > 0.4
    mask[2] = False
    _both(lambda: layer(x, mask=mask), [x, layer.v_proj.weight, layer.positions.r_proj.weight], self_attention, monkeypatch)


def test_a_step_with_gradients_reads_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(12, heads=3, head_dim=5, positions=RelativeLogits(12, 3, 5), causal=True).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)

    def steps() -> Tensor:
        first, cache = layer.step(x[:, :5])
        return torch.cat((first, layer.step(x[:, 5:], cache)[0]), 1)

    assert_close(steps(), layer(x))
    _both(steps, [x, *layer.positions.parameters()], self_attention, monkeypatch)


def test_logits_of_ones_own_are_asked_for() -> None:
    layer = CrossAttention(12, 8, heads=3, head_dim=5, positions=RelativeLogits(12, 3, 5), plan="textbook")
    a, b = torch.randn(1, 4, 12), torch.randn(1, 6, 8)
    plain = layer(a, b)
    layer.positions.score_bias = lambda queries, p, s, scale: torch.zeros(1, 3, 4, 6)
    assert not torch.allclose(layer(a, b), plain)
