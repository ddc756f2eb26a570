"""The full map equals the specification's weights, for every plan, mask and way of passing queries."""

import pytest
import torch
from torch import nn

from crossattention import CrossAttention, attention_map
from crossattention.layers import Rotary
from crossattention.plan import CANDIDATES
from oracle import MASKS, A, B, H, M, N, Z, make_inputs, make_layer, make_masks, specification
from tolerances import assert_close


@pytest.mark.parametrize("plan", [*CANDIDATES, "auto"], ids=str)
def test_the_map_equals_the_specification_s_weights(plan):
    layer = make_layer(plan, kv_heads=2)
    a, b = make_inputs()
    for mask in MASKS:
        masks = make_masks(mask)
        expected = specification(layer, a, b, **masks)[1]
        assert_close(attention_map(layer, a, b, **masks), expected)
        prepared = layer.prepare(b, context_mask=masks.get("context_mask"))
        assert_close(attention_map(layer, a, prepared, attn_mask=masks.get("attn_mask")), expected)


def test_rows_sum_to_one_or_to_zero_where_nothing_may_be_attended():
    layer = make_layer()
    a, b = make_inputs()
    mask = torch.ones(Z, M, dtype=torch.bool)
    mask[0] = False
    sums = attention_map(layer, a, b, context_mask=mask).sum(-1)
    assert not sums[0].any() and torch.allclose(sums[1], torch.ones(H, N, dtype=torch.float64))


@pytest.mark.parametrize("plan", CANDIDATES, ids=str)
def test_learned_and_shared_queries_have_maps_too(plan):
    layer = make_layer(plan)
    learned, (_, b) = torch.randn(N, A, dtype=torch.float64), make_inputs()
    assert_close(attention_map(layer, learned, b), specification(layer, learned.expand(Z, N, A), b)[1])
    many = torch.randn(Z, 3, N, A, dtype=torch.float64)
    found = attention_map(layer, many, b)
    assert found.shape == (Z, 3, H, N, M)
    for r in range(3):
        assert_close(found[:, r], specification(layer, many[:, r], b)[1])


def test_a_map_never_drops_weights_and_leaves_the_layer_alone():
    layer = make_layer(dropout=0.5).train()
    a, b = make_inputs()
    assert_close(attention_map(layer, a, b), specification(layer, a, b)[1])
    assert layer.training


def test_an_empty_context_has_an_empty_map():
    a, b = make_inputs(m=0)
    assert attention_map(make_layer(), a, b).shape == (Z, H, N, 0)


def test_bad_calls_are_refused():
    layer = make_layer()
    a, b = make_inputs()
    with pytest.raises(ValueError, match="context_mask belongs to the prepared context"):
        attention_map(layer, a, layer.prepare(b), context_mask=torch.ones(Z, M, dtype=torch.bool))
    with pytest.raises(TypeError, match="expects a CrossAttention, or a part around one, got Linear"):
        attention_map(nn.Linear(A, B), a, b)
    with pytest.raises(ValueError, match="context has width 3"):
        attention_map(layer, a, torch.randn(Z, M, 3, dtype=torch.float64))


def test_the_map_is_that_of_the_positions_that_are_given():
    a, b = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 5, 10, dtype=torch.float64)
    layer = CrossAttention(12, 10, heads=1, value_head_dim=10, positions=Rotary(), bias=False, out_dim=10, dtype=torch.float64)
    with torch.no_grad():  # the output is then the weights times B
        layer.v_proj.weight.copy_(torch.eye(10)), layer.out_proj.weight.copy_(torch.eye(10))
    places = {"query_positions": torch.tensor([3, 1, 4, 1]), "context_positions": torch.randint(0, 9, (2, 5))}
    weights = attention_map(layer, a, b, **places)
    assert_close((weights @ b.unsqueeze(1)).squeeze(1), layer(a, b, **places))
    assert (weights - attention_map(layer, a, b)).abs().max() > 1e-3
    prepared = layer.prepare(b, context_positions=places["context_positions"])
    assert_close(attention_map(layer, a, prepared, query_positions=places["query_positions"]), weights)
    with pytest.raises(ValueError, match="context_positions belongs to the prepared context"):
        attention_map(layer, a, prepared, context_positions=places["context_positions"])


@pytest.mark.parametrize("masked", [False, True])
def test_under_autocast_the_weights_are_float32_numbers_that_sum_to_one(masked):
    """As the layer takes them: only what is multiplied is rounded."""
    mask = torch.randn(5, 7) if masked else None
    for plan in CANDIDATES:
        layer = CrossAttention(48, 32, heads=4, plan=plan)
        with torch.no_grad(), torch.autocast(torch.get_default_device().type, torch.bfloat16):
            weights = attention_map(layer, torch.randn(2, 5, 48), torch.randn(2, 7, 32), attn_mask=mask)
        assert weights.dtype == torch.float32 and (weights.sum(-1) - 1).abs().max() < 1e-5, plan
