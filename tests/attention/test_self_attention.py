"""Self-attention: it is cross-attention of a sequence with itself, causal where asked, the same step by step."""

import copy
import pickle

import pytest
import torch

from crossattention import CrossAttention, SelfAttention
from crossattention.attention import execute
from crossattention.layers import RelativeLogits
from tolerances import assert_close

Z, N, D = 2, 6, 12


def make(**settings):
    layer = SelfAttention(D, heads=4, head_dim=5, value_head_dim=3, kv_heads=2, dtype=torch.float64, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer


def crossed(layer):
    cross = CrossAttention(D, heads=4, head_dim=5, value_head_dim=3, kv_heads=2, dtype=torch.float64)
    cross.load_state_dict(layer.state_dict())
    return cross


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pairs", ["none", "bool", "float"])
def test_it_equals_cross_attention_of_a_sequence_with_itself(causal, pairs):
    layer = make(causal=causal)
    x = torch.randn(Z, N, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(Z, N) > 0.3
    attn_mask = {"none": None, "bool": torch.rand(4, N, N) > 0.2, "float": torch.randn(N, N, dtype=torch.float64)}[pairs]
    full = torch.ones(N, N, dtype=torch.bool).tril() if causal else torch.ones(N, N, dtype=torch.bool)
    if attn_mask is not None:
        full = full & attn_mask if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~full, -torch.inf)
    found, wanted = layer(x, mask=mask, attn_mask=attn_mask), crossed(layer)(x, x, context_mask=mask, attn_mask=full)
    assert_close(found, wanted)
    direction = torch.randn_like(found)
    assert_close(torch.autograd.grad((found * direction).sum(), x)[0], torch.autograd.grad((wanted * direction).sum(), x)[0])


def test_steps_of_any_length_equal_the_whole_and_leave_the_cache_as_it_was():
    layer = make(causal=True)
    x = torch.randn(Z, N, D, dtype=torch.float64)
    for cuts in ([1] * N, [2, 3, 1], [N], [0, N]):
        cache, rows = None, []
        for piece in x.split(cuts, 1):
            before = None if cache is None else cache.keys.clone()
            out, longer = layer.step(piece, cache)
            assert cache is None or torch.equal(cache.keys, before)
            rows.append(out)
            cache = longer
        assert cache.length == N
        assert_close(torch.cat(rows, 1), layer(x))


@torch.no_grad()
@pytest.mark.parametrize("is_selected", [False, True])
def test_caches_that_go_on_from_one_share_nothing_that_is_written(is_selected: bool) -> None:
    layer = make(causal=True)
    x, others = torch.randn(2, Z, N, D, dtype=torch.float64)
    _, first = layer.step(x[:, :3])
    if is_selected:
        first = first.select(torch.arange(Z))
    kept = first.keys.clone()
    wanted, mine = [], []
    for sequence in (x, others, x):
        joined = torch.cat((x[:, :3], sequence[:, 3:]), 1)
        cache, rows = first, []
        for t in range(3, N):
            out, cache = layer.step(joined[:, t : t + 1], cache)
            rows.append(out)
        mine.append((torch.cat(rows, 1), cache))
        wanted.append(layer(joined)[:, 3:])
    for (out, cache), expected, sequence in zip(mine, wanted, (x, others, x), strict=True):
        assert_close(out, expected)
        assert_close(
            layer.step(sequence[:, :1], cache)[0], layer(torch.cat((x[:, :3], sequence[:, 3:], sequence[:, :1]), 1))[:, -1:]
        )
    assert torch.equal(first.keys, kept)


def test_gradients_flow_through_steps_that_go_on_from_steps_without() -> None:
    layer = make(causal=True)
    x = torch.randn(Z, N, D, dtype=torch.float64)
    with torch.inference_mode():
        cache = layer.step(x[:, 1:2], layer.step(x[:, :1])[1])[1]
    with torch.no_grad():
        assert_close(layer.step(x[:, 2:3], cache)[0], layer(x[:, :3])[:, 2:])
    with torch.no_grad():
        cache = layer.step(x[:, 1:2], layer.step(x[:, :1])[1])[1]
    longer = layer.step(x[:, 2:4], cache)[1]
    layer.step(x[:, 4:5], longer)[0].sum().backward()
    assert layer.k_proj.weight.grad.abs().sum() > 0
    assert longer.keys.requires_grad and not cache.keys.requires_grad


def test_a_cache_can_be_copied_and_saved() -> None:
    layer = make(causal=True).float()
    x = torch.randn(Z, N, D)
    with torch.no_grad():
        cache = layer.step(x[:, 2:3], layer.step(x[:, :2])[1])[1]
        for same in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert torch.equal(same.keys, cache.keys) and torch.equal(same.values, cache.values)
            assert torch.equal(layer.step(x[:, 3:4], same)[0], layer.step(x[:, 3:4], cache)[0])


def test_a_selected_cache_follows_the_surviving_rows():
    layer = make(causal=True)
    x = torch.randn(Z, N, D, dtype=torch.float64)
    _, cache = layer.step(x[:, :4])
    rows = torch.tensor([1, 1, 0])
    out, _ = layer.step(x[rows, 4:], cache.select(rows))
    assert_close(out, layer(x)[rows, 4:])


def test_a_causal_layer_never_looks_ahead():
    layer = make(causal=True)
    x = torch.randn(Z, N, D, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3:] += 1
    assert torch.equal(layer(x)[:, :3], layer(changed)[:, :3]) and not torch.equal(layer(x)[:, 3:], layer(changed)[:, 3:])


def test_a_wholly_masked_sequence_gives_the_output_bias_and_an_empty_one_nothing():
    layer = make()
    x = torch.randn(Z, N, D, dtype=torch.float64)
    mask = torch.ones(Z, N, dtype=torch.bool)
    mask[0] = False
    assert torch.equal(layer(x, mask=mask)[0], layer.out_proj.bias.expand(N, D))
    assert layer(x[:, :0]).shape == (Z, 0, D)


def test_errors_name_what_came():
    with pytest.raises(ValueError, match=r"step needs SelfAttention\(causal=True\)"):
        make().step(torch.randn(Z, 1, D, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(batch, length, 12\).*got shape \(2, 6, 13\)"):
        make()(torch.randn(Z, N, 13, dtype=torch.float64))
    layer = make(causal=True)
    _, cache = layer.step(torch.randn(Z, 2, D, dtype=torch.float64))
    with pytest.raises(ValueError, match="x has batch 3 but the cache has batch 2"):
        layer.step(torch.randn(3, 1, D, dtype=torch.float64), cache)
    with pytest.raises(ValueError, match=r"torch\.float32 but the layer's weights are torch.float64"):
        layer(torch.randn(Z, N, D))
    with pytest.raises(ValueError, match="query_dim=10 and heads=4"):
        SelfAttention(10, heads=4)
    with pytest.raises(ValueError, match="the cache has 6 key-value heads of width 2 but this layer has"):
        layer.step(
            torch.randn(Z, 1, D, dtype=torch.float64),
            SelfAttention(D, heads=6, causal=True, dtype=torch.float64).step(torch.randn(Z, 1, D, dtype=torch.float64))[1],
        )
    with pytest.raises(TypeError, match="the sequence must be a tensor"):
        layer([1.0])


def test_learned_scores_of_long_causal_sequences_are_those_of_one_product() -> None:
    """They are written out in stretches of rows; a mask that cuts nothing asks for all of them at once."""
    torch.manual_seed(0)
    layer = SelfAttention(6, heads=2, head_dim=4, positions=RelativeLogits(6, 2, 4), causal=True).double()
    x = torch.randn(2, 300, 6, dtype=torch.float64, requires_grad=True)
    weights, nothing_cut = torch.randn(2, 300, 6, dtype=torch.float64), torch.ones(2, 300, dtype=torch.bool)
    found, wanted = layer(x), layer(x, mask=nothing_cut)
    assert_close(found, wanted)
    with torch.no_grad():
        assert_close(layer(x), wanted)
    inputs = [x, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_with_two_head_widths_trains_with_written_out_scores(monkeypatch, causal):
    def of(dtype, kernels):
        heard = execute.attend_heads
        monkeypatch.setattr(execute, "attend_heads", lambda *a, **k: kernels.append(k["kernel"]) or heard(*a, **k))
        torch.manual_seed(0)
        layer = SelfAttention(24, heads=2, head_dim=8, value_head_dim=20, bias=False, causal=causal).to(dtype)
        x = torch.randn(2, 70, 24).to(dtype).requires_grad_()
        layer(x, mask=torch.arange(70) < torch.tensor([[70], [66]])).double().square().sum().backward()
        with torch.no_grad():
            layer(x)
        monkeypatch.setattr(execute, "attend_heads", heard)
        return [x.grad, *(parameter.grad for parameter in layer.parameters())]

    kernels: list[str] = []
    found, exact = of(torch.bfloat16, kernels), of(torch.float64, [])
    assert kernels == ["explicit", "fused"]  # without a gradient the fused kernel is the quicker one
    for mine, wanted in zip(found, exact, strict=True):
        assert (mine.double() - wanted).norm() <= 0.02 * wanted.norm()
