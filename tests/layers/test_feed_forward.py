"""The feed-forward layer against its formula, and what it refuses."""

import pytest
import torch
from torch import nn

from crossattention.layers.feed_forward import FeedForward
from tolerances import assert_close


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("relu", lambda x: x.clamp(min=0)),
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        (nn.Tanh(), torch.tanh),
    ],
)
def test_it_is_two_projections_with_the_activation_between(activation, formula, bias: bool) -> None:
    layer = FeedForward(6, 11, out_dim=7, activation=activation, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    hidden = x @ layer.up_proj.weight.T + (layer.up_proj.bias if bias else 0)
    wanted = formula(hidden) @ layer.down_proj.weight.T + (layer.down_proj.bias if bias else 0)
    assert (layer.up_proj.bias is not None) == (layer.down_proj.bias is not None) == bias
    assert_close(layer(x), wanted)


def test_dropout_acts_on_the_hidden_units_in_training_only() -> None:
    layer = FeedForward(4, 1000, dropout=0.25)
    seen = []
    layer.down_proj.register_forward_pre_hook(lambda _, args: seen.append((args[0] == 0).float().mean().item()))
    with torch.no_grad():
        layer.up_proj.bias.fill_(100.0)
        layer(torch.randn(3, 4))
        layer.eval()(torch.randn(3, 4))
    assert seen[0] == pytest.approx(0.25, abs=0.04)
    assert seen[1] == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"hidden_dim": -3}, "hidden_dim must be at least 1, got -3"),
        ({"out_dim": 0}, "out_dim must be at least 1, got 0"),
        ({"activation": "swish"}, "activation must be one of relu, gelu, silu or a module, got 'swish'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_layers_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeedForward(**{"dim": 4, "hidden_dim": 5, **arguments})


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", nn.GELU(approximate="tanh")])
def test_without_gradients_it_gives_the_same_to_the_bit_and_leaves_its_input_alone(activation) -> None:
    layer, x = FeedForward(6, 11, activation=activation), torch.randn(2, 3, 6)
    before = x.clone()
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.clone().requires_grad_()).detach())
    assert torch.equal(layer(x).detach(), layer.down_proj(layer.activation(layer.up_proj(x))).detach())
    assert torch.equal(x, before)


@pytest.mark.parametrize("watched", ["up_proj", "activation"])
@torch.no_grad()
def test_hooks_see_the_hidden_units_as_they_were(watched: str) -> None:
    layer, x, seen = FeedForward(6, 11), torch.randn(2, 3, 6), []
    getattr(layer, watched).register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    layer(x)
    hidden = nn.functional.linear(x, layer.up_proj.weight, layer.up_proj.bias)
    assert torch.equal(seen[0 if watched == "activation" else 1], hidden)
    assert hidden.min() < 0
