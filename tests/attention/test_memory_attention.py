"""Attention over a learned memory: the feed-forward layer is one case, persistent vectors the other."""

import inspect

import pytest
import torch
from torch import nn

from crossattention import MemoryAttention
from tolerances import assert_close


def random_feed_forward(activation, *, bias=True, extra=()):
    ff = nn.Sequential(nn.Linear(6, 11, bias=bias), activation, *extra, nn.Linear(11, 9, bias=bias)).double()
    for parameter in ff.parameters():
        nn.init.normal_(parameter)
    return ff


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU()], ids=repr)
def test_a_feed_forward_layer_is_attention_over_its_weights_to_1e_12(activation, bias):
    ff = random_feed_forward(activation, bias=bias)
    memory = MemoryAttention.from_feed_forward(ff)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert (memory(x) - ff(x)).abs().max() <= 1e-12
    direction = torch.randn(2, 5, 9, dtype=torch.float64)
    found, wanted = (torch.autograd.grad((f(x) * direction).sum(), x)[0] for f in (memory, ff))
    assert_close(found, wanted)


def test_keys_are_rows_of_the_first_matrix_and_values_columns_of_the_second():
    ff = random_feed_forward(nn.ReLU())
    memory = MemoryAttention.from_feed_forward(ff)
    assert memory.slots == 11 and memory.heads == 1
    assert torch.equal(memory.keys[0], ff[0].weight) and torch.equal(memory.values[0], ff[2].weight.T)
    assert torch.equal(memory.key_bias[0], ff[0].bias) and torch.equal(memory.out_bias, ff[2].bias)


def test_the_two_kinds_differ_in_one_argument():
    torch.manual_seed(1)
    softmax = MemoryAttention(6, 11, out_dim=9, scale=1.0, key_bias=True, out_bias=True, activation="softmax", dtype=torch.float64)
    relu = MemoryAttention(6, 11, out_dim=9, scale=1.0, key_bias=True, out_bias=True, activation=torch.relu, dtype=torch.float64)
    relu.load_state_dict(softmax.state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)
    scores = x @ softmax.keys[0].T + softmax.key_bias[0]
    assert_close(softmax(x), scores.softmax(-1) @ softmax.values[0] + softmax.out_bias)
    assert_close(relu(x), scores.relu() @ relu.values[0] + relu.out_bias)
    assert "activation" in inspect.signature(MemoryAttention).parameters


def test_every_head_reads_its_own_slots():
    memory = MemoryAttention(6, 11, out_dim=9, heads=3, dtype=torch.float64)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    heads = [((x[..., 2 * h : 2 * h + 2] @ memory.keys[h].T) * 2**-0.5).softmax(-1) @ memory.values[h] for h in range(3)]
    assert_close(memory(x), torch.cat(heads, -1))
    assert_close(memory.coefficients(x).sum(-1), torch.ones(2, 5, 3, dtype=torch.float64))


def test_other_shapes_of_feed_forward_modules_are_understood():
    x = torch.randn(3, 6, dtype=torch.float64)
    dropped = random_feed_forward(nn.GELU(), extra=(nn.Dropout(0.3),))
    memory = MemoryAttention.from_feed_forward(dropped)
    assert memory.dropout == pytest.approx(0.3) and memory.training
    assert_close(memory.eval()(x), dropped.eval()(x))
    layer = nn.TransformerEncoderLayer(6, 2, 11, activation="gelu", dtype=torch.float64).eval()
    expected = layer.linear2(layer.activation(layer.linear1(x)))
    assert_close(MemoryAttention.from_feed_forward(layer)(x), expected)


def test_what_is_no_feed_forward_layer_is_refused_with_what_came():
    with pytest.raises(TypeError, match="got Linear -> ReLU"):
        MemoryAttention.from_feed_forward(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(TypeError, match="Linear -> ReLU -> Linear -> Dropout"):
        MemoryAttention.from_feed_forward(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Dropout(0.1)))
    with pytest.raises(TypeError, match="gives 32 hidden units and the second takes 16; a gated layer"):
        MemoryAttention.from_feed_forward(nn.Sequential(nn.Linear(8, 32), nn.GLU(), nn.Linear(16, 8)))
    with pytest.raises(TypeError, match="got Conv1d"):
        MemoryAttention.from_feed_forward(nn.Conv1d(1, 1, 1))


def test_arguments_are_checked_by_value():
    with pytest.raises(ValueError, match="heads=4, query_dim=6"):
        MemoryAttention(6, 11, heads=4)
    with pytest.raises(ValueError, match="got 'tanh'"):
        MemoryAttention(6, 11, activation="tanh")
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        MemoryAttention(6, 0)
    with pytest.raises(ValueError, match="width 5 but this memory was built with query_dim=6"):
        MemoryAttention(6, 11)(torch.randn(3, 5))
    assert MemoryAttention(6, 11)(torch.randn(0, 6)).shape == (0, 6)
