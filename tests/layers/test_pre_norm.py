"""Sublayers with gradients taken together, against the same modules called one after the other, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from crossattention.attention.self_attention import SelfAttention
from crossattention.layers import pre_norm
from crossattention.layers.dropout import Dropout
from crossattention.layers.feed_forward import FeedForward
from crossattention.layers.norms import RMSNorm
from crossattention.layers.positions import RelativeLogits
from crossattention.layers.pre_norm import add_feed_forward, add_self_attention, with_norm
from tolerances import assert_close

Run = Callable[[Tensor], Tensor]


def norm_of(width: int) -> RMSNorm:
    norm = RMSNorm(width, eps=1e-2, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    return norm


def feed_forward(activation: str) -> tuple[nn.ModuleList, Run, Run]:
    norm, layer, dropout = norm_of(6), FeedForward(6, 10, activation=activation, bias=False, dtype=torch.float64), Dropout(0.0)
    return (
        nn.ModuleList((norm, layer)),
        lambda x: add_feed_forward(x, norm, layer, dropout),
        lambda x: dropout(layer(norm(x)), x),
    )


def other_sublayer() -> tuple[nn.ModuleList, Run, Run]:
    norm, layer = norm_of(6), nn.Linear(6, 6, dtype=torch.float64)

    def together(x: Tensor) -> Tensor:
        x, normed = with_norm(x, norm)
        return x + layer(normed) * normed

    return nn.ModuleList((norm, layer)), together, lambda x: x + layer(norm(x)) * norm(x)


def self_attention(bias: bool, *, causal: bool = False, mask: Tensor | None = None) -> tuple[nn.ModuleList, Run, Run]:
    positions = RelativeLogits(6, 2, 4, max_distance=9, dtype=torch.float64)
    biased = ("q_proj", "v_proj", "out_proj") if bias else ("q_proj",)
    layer = SelfAttention(6, heads=2, head_dim=4, bias=biased, positions=positions, causal=causal, dtype=torch.float64)
    norm, dropout = norm_of(6), Dropout(0.0)
    for weight in layer.parameters():
        nn.init.normal_(weight)
    return (
        nn.ModuleList((norm, layer)),
        lambda x: add_self_attention(x, norm, layer, dropout, mask),
        lambda x: dropout(layer(norm(x), mask=mask), x),
    )


def names_of(out: Tensor) -> set[str]:
    """Of what computed a tensor."""
    found, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            found.add(node.name())
            left += [before for before, _ in node.next_functions]
    return found


MASK = torch.tensor([[True, False, True, True, True], [False] * 5, [True] * 5])
CASES = {
    "gelu": lambda: feed_forward("gelu"),
    "relu": lambda: feed_forward("relu"),
    "silu": lambda: feed_forward("silu"),
    "other": other_sublayer,
    "attention": lambda: self_attention(False),
    "biases": lambda: self_attention(True),
    "causal": lambda: self_attention(False, causal=True),
    "mask": lambda: self_attention(False, mask=MASK),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("rows_at_once", [2, 4, 100])
def test_sublayers_and_their_gradients_are_those_of_their_parts(
    name: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(pre_norm, "_blocks", lambda rows: [slice(b, b + rows_at_once) for b in range(0, len(rows), rows_at_once)])
    modules, together, apart = CASES[name]()
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 6, dtype=torch.float64)
    inputs = [x, *modules.parameters()]
    found, wanted = together(x), apart(x)
    assert names_of(found) & {
        "_FeedForwardBackward",
        "_ProjectionsBackward",
        "_WithNormBackward",
    } and "_NormalisedBackward" in names_of(wanted)
    assert_close(found, wanted)
    for mine, other in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True):
        assert_close(mine, other)


def test_a_gradient_of_the_gradient_is_there() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    for name in ("gelu", "other"):
        _, together, _ = CASES[name]()
        assert torch.autograd.gradgradcheck(together, (x,))
    norm, layer = norm_of(6), nn.Linear(6, 4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: pre_norm.projections_of_norm(x, norm, (layer,)), (x,))


def test_frozen_weights_get_no_gradient_and_change_no_bit() -> None:
    torch.manual_seed(0)
    for name in ("gelu", "attention"):
        modules, together, _ = CASES[name]()
        x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
        free = together(x)
        (wanted,) = torch.autograd.grad(free.sum(), x)
        modules.requires_grad_(False)
        frozen = together(x)
        assert torch.equal(frozen, free)
        frozen.sum().backward()
        assert_close(x.grad, wanted)
        assert all(weight.grad is None for weight in modules.parameters())
        assert torch.equal(together(x.detach()), free)


@pytest.mark.parametrize("why", ["hook", "bfloat16", "autocast", "dropout", "subclass", "no gradients"])
def test_where_somebody_looks_on_the_parts_are_called(why: str) -> None:
    torch.manual_seed(0)
    norm, layer = RMSNorm(6), FeedForward(6, 10, activation="gelu", bias=False)
    dropout, x, seen = Dropout(0.0), torch.randn(4, 6), []
    if why == "hook":
        layer.up_proj.register_forward_hook(lambda *given: seen.append(given[2].shape))
    if why == "bfloat16":
        norm, layer, x = norm.bfloat16(), layer.bfloat16(), x.bfloat16()
    if why == "dropout":
        dropout = Dropout(0.5)
    if why == "subclass":
        layer.up_proj.__class__ = type("Adapted", (nn.Linear,), {})
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"), torch.set_grad_enabled(why != "no gradients"):
        out = add_feed_forward(x, norm, layer, dropout)
    assert out.grad_fn is None or "_FeedForward" not in out.grad_fn.name()
    assert seen == ([(4, 10)] if why == "hook" else [])
