"""The layer: every plan against the specification, prepare and attend, shapes, empty rows, errors by their values."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crossattention import CrossAttention, Plan, PlanError, SelfAttention
from crossattention.attention import PreparedContext, execute, short
from crossattention.layers import Rotary
from crossattention.plan import ALL_PLANS, CANDIDATES, TEXTBOOK
from oracle import MASKS, A, B, H, K, M, N, O, V, Z, gradients, make_inputs, make_layer, make_masks, specification
from tolerances import TOLERANCES, assert_close

LENGTHS = ((N, M), (1, M), (N, 1), (0, M), (N, 0), (0, 0))


def named(plan: Plan) -> str:
    return str(plan)


# ------------------------------------------------------------------------------------------------ the grid


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("plan", CANDIDATES, ids=named)
def test_every_plan_equals_the_specification_with_gradients(plan, mask):
    for (n, m), bias, kv_heads in itertools.product(LENGTHS, (True, False), (H, 2, 1)):
        layer = make_layer(plan, bias=bias, kv_heads=kv_heads)
        a, b = make_inputs(n, m)
        masks = make_masks(mask, n, m)
        out = layer(a, b, **masks)
        expected, _ = specification(layer, a, b, **masks)
        assert_close(out, expected)
        names = ["a", "b", *(name for name, _ in layer.named_parameters())]
        inputs = [a, b, *layer.parameters()]
        for name, found, wanted in zip(names, gradients(out, inputs), gradients(expected, inputs), strict=True):
            assert found.isfinite().all() and (found - wanted).abs().amax() < 1e-10 if found.numel() else True, (name, n, m)


@pytest.mark.parametrize("plan", CANDIDATES, ids=named)
def test_every_plan_is_exact_in_float32(plan):
    for mask in MASKS:
        layer = make_layer(plan, dtype=torch.float32)
        a, b = make_inputs(dtype=torch.float32)
        masks = make_masks(mask, dtype=torch.float32)
        expected, _ = specification(layer, a.double(), b.double(), **masks)
        assert_close(layer(a, b, **masks), expected)


@pytest.mark.parametrize("plan", CANDIDATES, ids=named)
def test_in_bfloat16_no_plan_errs_more_than_twice_the_textbook(plan):
    ratios = []
    for seed in range(12):
        torch.manual_seed(seed)
        layer = CrossAttention(48, 72, heads=3, head_dim=16, value_head_dim=24, out_dim=80, dtype=torch.float64)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))
        layer.bfloat16()
        a, b = torch.randn(2, 11, 48).bfloat16(), torch.randn(2, 37, 72).bfloat16()
        expected, _ = specification(layer, a.double(), b.double())
        errors = []
        for tried in (plan, TEXTBOOK):
            layer.plan = tried
            errors.append((layer(a, b).double() - expected).square().mean().sqrt())
        ratios.append(float((errors[0] / errors[1]).detach()))
    assert max(ratios) <= 2.0, ratios


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("plan", [plan for plan in CANDIDATES if plan.kernel == "explicit"], ids=named)
def test_weights_made_in_place_are_the_same_and_change_nothing_that_was_given(plan, mask):
    """Without gradients the weights take the place of their scores; narrow rows and wide ones lie differently in memory."""
    for m, kv_heads in itertools.product((M, 18), (H, 2, 1)):
        layer, (a, b) = make_layer(plan, kv_heads=kv_heads), make_inputs(N, m)
        masks = make_masks(mask, N, m)
        expected, _ = specification(layer, a, b, **masks)
        with torch.no_grad():
            prepared = layer.prepare(b, context_mask=masks.get("context_mask"))
            given = [a, b, *masks.values(), prepared.keys, prepared.values, *layer.parameters()]
            before = [tensor.clone() for tensor in given]
            for _ in range(2):
                assert_close(layer.attend(a, prepared, attn_mask=masks.get("attn_mask")), expected)
        assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


@pytest.mark.parametrize("kernel", ["fused", "explicit", "blocked"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_large_query_bias_is_not_rounded_key_by_key(kernel, autocast):
    """Biases of queries and keys that point one way: what they add to all scores cancels, its rounding would not."""
    for strength, trains in itertools.product((1.0, 8.0), (True, False)):
        ratios = []
        for seed in range(4):
            torch.manual_seed(seed)
            layer, direction = CrossAttention(64, heads=1, dtype=torch.float64), torch.randn(64)
            with torch.no_grad():
                layer.q_proj.bias.copy_(direction)
                layer.k_proj.bias.copy_(strength * direction)
            a, b = torch.randn(2, 11, 64).bfloat16(), torch.randn(2, 37, 64).bfloat16()
            layer = layer.bfloat16()
            expected, _ = specification(layer, a.double(), b.double())
            errors = []
            for plan in (Plan("query", "head", kernel), TEXTBOOK):
                layer.plan = plan
                used = layer.float() if autocast else layer
                with (
                    torch.set_grad_enabled(trains),
                    torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast),
                ):
                    out = used(a.float(), b.float()) if autocast else used(a, b)
                errors.append((out.double() - expected).square().mean().sqrt().detach())
                layer = layer.bfloat16()
            ratios.append(float(errors[0] / errors[1]))
        assert sum(ratios) / len(ratios) < 1.5, (strength, trains, ratios)


@pytest.mark.parametrize("plan", CANDIDATES, ids=named)
def test_an_empty_batch_gives_an_empty_output(plan):
    layer = make_layer(plan)
    a, b = torch.randn(0, N, A).double(), torch.randn(0, M, B).double()
    assert layer(a, b).shape == (0, N, O)
    with torch.no_grad():
        assert layer(a, b).shape == (0, N, O) and layer(a[:, :1], b).shape == (0, 1, O)


def test_a_query_projection_that_lays_its_output_out_otherwise_is_read_as_it_is():
    layer = CrossAttention(48, heads=4, plan=Plan("context", "context")).double()
    layer.q_proj = nn.Identity()
    a, b = torch.randn(2, 48, 5).double().transpose(1, 2), torch.randn(2, 7, 48).double()
    expected = layer(a, b)
    with torch.no_grad():
        assert_close(layer(a, b), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "plan", [Plan(s, v, "explicit") for s, v in (("head", "head"), ("context", "context"), ("query", "output"))]
)
def test_a_trace_that_forbids_writing_in_place_keeps_the_softmax(plan):
    for m in (7, 20):
        layer, (a, b) = make_layer(plan).eval(), make_inputs(N, m)
        with torch.no_grad():
            traced = torch.jit.trace(layer, (a, b), check_trace=False, _force_outplace=True)
            assert_close(traced(a, b), layer(a, b))


def test_a_layer_without_memory_of_its_own_can_be_planned_for():
    with torch.device("meta"):
        layer = CrossAttention(384, heads=6)
    assert layer.plan_for((8, 1, 384), (8, 401, 384)).sizes.device == "meta"


@pytest.mark.parametrize("kernel", ["fused", "explicit"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_short_way_to_read_b_itself_gives_what_the_long_one_does(monkeypatch, kernel, bias):
    """Without masks, parts or gradients context+context takes few steps: all lengths, one item and several, dense and prepared."""
    plan, used = Plan("context", "context", kernel), []
    plainly = short.attend_b_plainly
    monkeypatch.setattr(short, "attend_b_plainly", lambda *given, **how: used.append(given) or plainly(*given, **how))
    for n, m, heads in itertools.product((1, N), (1, M, 18, 40), (1, H)):
        layer, (a, b) = make_layer(plan, bias=bias, heads=heads), make_inputs(n, m)
        expected, _ = specification(layer, a, b)
        assert_close(layer(a, b), expected)
        with torch.no_grad():
            assert_close(layer(a, b), expected)
            assert_close(layer.attend(a[:1], layer.prepare(b[:1])), expected[:1])
            assert_close(layer(a, b.transpose(1, 2).contiguous().transpose(1, 2)), expected)
        assert len(used) == 4
        used.clear()


@pytest.mark.parametrize("plan", [p for p in CANDIDATES if p.scores == "query" and p.kernel != "explicit"], ids=named)
@pytest.mark.parametrize("scale", [0.3, 0.0])
def test_a_trained_query_bias_leaves_the_kernel_that_was_asked_for(monkeypatch, plan, scale):
    """Its extra score of each key is a column of the keys, not a mask, for which kernels have no gradient."""
    layer, (a, b) = make_layer(plan, scale=scale), make_inputs()
    masks = make_masks("both")
    expected, _ = specification(layer, a, b, **masks)
    if scale:
        monkeypatch.setattr(execute, "explicit_weights", lambda *_: pytest.fail("ran explicitly"))
    out = layer(a, b, **masks)
    assert_close(out, expected)
    inputs = [a, b, *layer.parameters()]
    for found, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert (found - wanted).abs().amax() < 1e-10


def test_every_plan_drops_the_same_pairs_in_training():
    outs = []
    for plan in CANDIDATES:
        torch.manual_seed(0)
        layer = make_layer(plan, dropout=0.4).train()
        a, b = make_inputs()
        torch.manual_seed(7)
        outs.append(layer(a, b, **make_masks("empty row")))
    for out in outs[1:]:
        assert_close(out, outs[0])


@pytest.mark.slow
def test_dropout_keeps_the_mean_and_stops_in_evaluation():
    layer = make_layer(dropout=0.5)
    a, b = make_inputs()
    expected, _ = specification(layer, a, b)
    with torch.no_grad():
        mean = torch.stack([layer(a, b) for _ in range(4000)]).mean(0)
    assert (mean - expected).abs().max() < 0.2 * expected.abs().max()
    assert not torch.equal(layer(a, b), expected)
    assert_close(layer.eval()(a, b), expected)


@given(
    z=st.integers(1, 3),
    n=st.integers(0, 6),
    m=st.integers(0, 6),
    widths=st.tuples(*[st.integers(1, 9)] * 5),
    groups=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3), (6, 2)]),
    plan=st.sampled_from(CANDIDATES),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_sizes_equal_the_specification(z, n, m, widths, groups, plan, masked, seed):
    torch.manual_seed(seed)
    a_dim, b_dim, k, v, o = widths
    heads, kv_heads = groups
    layer = CrossAttention(
        a_dim, b_dim, heads=heads, kv_heads=kv_heads, head_dim=k, value_head_dim=v, out_dim=o, plan=plan, dtype=torch.float64
    )
    a, b = torch.randn(z, n, a_dim, dtype=torch.float64), torch.randn(z, m, b_dim, dtype=torch.float64)
    masks = {"context_mask": torch.rand(z, m) > 0.5, "attn_mask": torch.rand(n, m) > 0.3} if masked else {}
    assert_close(layer(a, b, **masks), specification(layer, a, b, **masks)[0])


# ---------------------------------------------------------------------------------------- prepare and attend


@pytest.mark.parametrize("plan", [*CANDIDATES, "auto", "textbook"], ids=str)
def test_forward_is_attend_on_prepare_to_the_bit(plan):
    for mask in MASKS:
        layer = make_layer(plan)
        a, b = make_inputs()
        masks = make_masks(mask)
        prepared = layer.prepare(b, context_mask=masks.get("context_mask"), query_length=N, uses=1)
        assert torch.equal(layer.attend(a, prepared, attn_mask=masks.get("attn_mask")), layer(a, b, **masks))


@pytest.mark.parametrize("plan", CANDIDATES, ids=named)
def test_attend_changes_nothing_in_the_prepared_context_and_can_be_repeated(plan):
    layer = make_layer(plan)
    a, b = make_inputs()
    prepared = layer.prepare(b, context_mask=torch.rand(Z, M) > 0.3)
    before = [t.clone() for t in (prepared.keys, prepared.values, prepared.mask)]
    first = layer.attend(a, prepared)
    assert torch.equal(first, layer.attend(a, prepared))
    assert all(torch.equal(x, y) for x, y in zip(before, (prepared.keys, prepared.values, prepared.mask), strict=True))


@pytest.mark.parametrize("plan", CANDIDATES, ids=named)
@pytest.mark.parametrize("mask", ["none", "per item", "per query", "additive"])
def test_queries_that_share_a_context_equal_repeating_it(plan, mask):
    r = 3
    layer = make_layer(plan)
    a = torch.randn(Z, r, N, A, dtype=torch.float64, requires_grad=True)
    _, b = make_inputs()
    context_mask = torch.rand(Z, M) > 0.3
    attn_mask = {
        "none": None,
        "per item": torch.rand(Z, 1, 1, 1, M) > 0.3,
        "per query": torch.rand(r, 1, N, M) > 0.3,
        "additive": torch.randn(Z, r, H, N, M, dtype=torch.float64),
    }[mask]
    out = layer.attend(a, layer.prepare(b, context_mask=context_mask), attn_mask=attn_mask)
    full = None if attn_mask is None else attn_mask.expand(Z, r, H, N, M).flatten(0, 1)
    repeated = {"context_mask": context_mask.repeat_interleave(r, 0), "attn_mask": full}
    repeated = {name: value for name, value in repeated.items() if value is not None}
    expected, _ = specification(layer, a.flatten(0, 1), b.repeat_interleave(r, 0), **repeated)
    expected = expected.unflatten(0, (Z, r))
    assert_close(out, expected)
    for found, wanted in zip(gradients(out, [a, b]), gradients(expected, [a, b]), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("plan", ALL_PLANS, ids=named)
def test_sharing_a_context_projects_it_once_and_copies_nothing(plan):
    layer = make_layer(plan)
    a, b = torch.randn(Z, 8, 1, A, dtype=torch.float64), torch.randn(Z, M, B, dtype=torch.float64)
    prepared = layer.prepare(b)
    bytes_before = prepared.nbytes
    layer.attend(a, prepared)
    assert prepared.batch == Z and prepared.nbytes == bytes_before
    if plan == Plan("context", "context"):
        assert prepared.keys.data_ptr() == b.data_ptr() and prepared.values is prepared.keys
        assert prepared.nbytes == b.numel() * b.element_size()


def test_learned_queries_are_projected_once_for_the_whole_batch():
    layer = make_layer("textbook")
    rows = []
    layer.q_proj.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].numel() // A))
    learned = nn.Parameter(torch.randn(N, A, dtype=torch.float64))
    _, b = make_inputs()
    out = layer(learned, b)
    assert rows == [N]
    assert_close(out, specification(layer, learned.expand(Z, N, A), b)[0])
    assert_close(gradients(out, [learned])[0], gradients(specification(layer, learned.expand(Z, N, A), b)[0], [learned])[0])


@pytest.mark.parametrize("plan", CANDIDATES, ids=named)
def test_learned_queries_are_exact_in_every_plan(plan):
    layer = make_layer(plan)
    learned, (_, b) = torch.randn(N, A, dtype=torch.float64), make_inputs()
    for mask in MASKS:
        masks = make_masks(mask)
        assert_close(layer(learned, b, **masks), specification(layer, learned.expand(Z, N, A), b, **masks)[0])


@pytest.mark.parametrize("plan", CANDIDATES, ids=named)
def test_inputs_that_overlap_or_lie_transposed_in_memory_are_exact(plan):
    layer = make_layer(plan)
    lengths = torch.randn(Z, A + N - 1, dtype=torch.float64), torch.randn(Z, B + M - 1, dtype=torch.float64)
    frames = [signal.unfold(1, width, 1) for signal, width in zip(lengths, (A, B), strict=True)]
    across = [torch.randn(Z, width, length, dtype=torch.float64).mT for width, length in ((A, N), (B, M))]
    spread = [torch.randn(1, length, width, dtype=torch.float64).expand(Z, -1, -1) for length, width in ((N, A), (M, B))]
    for a, b in (frames, across, spread):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        out, (expected, _) = layer(a, b), specification(layer, a, b)
        assert_close(out, expected)
        for found, wanted in zip(gradients(out, [a, b]), gradients(expected, [a, b]), strict=True):
            assert_close(found, wanted)
    column = torch.randn(A, 1, dtype=torch.float64)  # one learned query, of strides (1, 1)
    assert_close(layer(column.mT, b[:1]), specification(layer, column.mT[None], b[:1])[0])


def test_a_transposed_context_is_kept_in_the_layout_that_fused_kernels_take():
    for plan in (Plan("context", "context"), Plan("context", "head"), Plan("head", "context")):
        prepared = make_layer(plan).prepare(torch.randn(Z, B, M, dtype=torch.float64).mT)
        assert prepared.keys.stride(-1) == prepared.values.stride(-1) == 1


def test_without_hints_the_textbook_cache_is_prepared_and_hints_may_change_it():
    layer = CrossAttention(64, 64, heads=4)
    b = torch.randn(1, 4096, 64)
    assert layer.prepare(b).plan == TEXTBOOK
    hinted = layer.prepare(b, query_length=1, uses=1).plan
    assert (hinted.scores, hinted.values) == ("context", "context")


def test_a_selected_prepared_context_is_that_of_the_selected_items():
    for plan in ALL_PLANS:
        layer = make_layer(plan)
        a, b = make_inputs()
        mask = torch.rand(Z, M) > 0.3
        rows = torch.tensor([1, 0, 1])
        selected = layer.prepare(b, context_mask=mask).select(rows)
        assert_close(layer.attend(a[rows], selected), layer(a, b, context_mask=mask)[rows])


EXTENDED = ((4, 3, ()), (7, 2, (0, 1)), (5, 1, (0,)), (3, 6, (1,)), (0, 4, (0, 1)), (4, 0, ()))
"""Lengths of both parts, and which of them has a mask."""


def assert_extends(plan, first, more, masked):
    layer = make_layer(plan, kv_heads=2)
    a, b = make_inputs(m=first + more)
    masks = [torch.rand(Z, m) > 0.4 if part in masked else None for part, m in enumerate((first, more))]
    prepared = layer.prepare(b[:, :first], context_mask=masks[0])
    before = prepared.keys.clone()
    extended = layer.extend(prepared, b[:, first:], context_mask=masks[1])
    whole = [torch.ones(Z, m, dtype=bool) if mask is None else mask for mask, m in zip(masks, (first, more), strict=True)]
    out, (wanted, _) = layer.attend(a, extended), specification(layer, a, b, context_mask=torch.cat(whole, 1))
    assert_close(out, wanted)
    inputs = [a, b, layer.k_proj.weight, layer.v_proj.weight]
    for found, expected in zip(gradients(out, inputs), gradients(wanted, inputs), strict=True):
        assert_close(found, expected)
    assert torch.equal(prepared.keys, before) and prepared.context_length == first
    assert (extended.mask is None) == (not masked) and extended.context_length == first + more


def test_an_extended_prepared_context_is_that_of_both_parts_end_to_end():
    for plan, case in zip(ALL_PLANS, itertools.cycle(EXTENDED)):
        assert_extends(plan, *case)


@pytest.mark.slow
@pytest.mark.parametrize("plan", CANDIDATES, ids=named)
def test_every_plan_extends_by_any_length_and_mask(plan):
    for case in EXTENDED:
        assert_extends(plan, *case)


def test_positions_of_an_extended_context_go_on_where_the_first_part_ends():
    layer = CrossAttention(12, 10, heads=3, positions=Rotary(), dtype=torch.float64)
    a, b = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 7, 10, dtype=torch.float64)
    assert_close(layer.attend(a, layer.extend(layer.prepare(b[:, :4]), b[:, 4:])), layer(a, b))
    each = torch.randint(0, 9, (2, 7))
    parts = layer.prepare(b[:, :4], context_positions=each[:, :4])
    given = layer.extend(parts, b[:, 4:], context_positions=each[:, 4:])
    assert_close(layer.attend(a, given), layer(a, b, context_positions=each))
    mixed = layer.extend(parts, b[:, 4:], context_positions=torch.tensor([3, 1, 8]))
    wanted = torch.cat((each[:, :4], torch.tensor([[3, 1, 8]] * 2)), 1)
    assert_close(layer.attend(a, mixed), layer(a, b, context_positions=wanted))


def test_what_cannot_be_extended_is_refused():
    layer, other = make_layer(), make_layer()
    b = torch.randn(Z, M, B, dtype=torch.float64)
    prepared = layer.prepare(b)
    assert "made by another layer" in error_of(lambda: other.extend(prepared, b))
    assert f"has batch 1 but the prepared context has batch {Z}" in error_of(lambda: layer.extend(prepared, b[:1]))
    assert f"context has width {A} but" in error_of(lambda: layer.extend(prepared, b[..., :A]))
    assert f"(batch, length, {B}), got shape ({M}, {B})" in error_of(lambda: layer.extend(prepared, b[0]))
    with pytest.raises(TypeError, match="extend expects what this layer's prepare returned, got Tensor"):
        layer.extend(b, b)
    with torch.no_grad():
        layer.v_proj.weight.mul_(2)
    assert "out of date: v_proj.weight changed" in error_of(lambda: layer.extend(prepared, b))
    extended = layer.extend(layer.prepare(b), b)
    with torch.no_grad():
        layer.k_proj.bias.add_(1)
    assert "out of date: k_proj.bias changed" in error_of(lambda: layer.attend(torch.randn(Z, N, A, dtype=torch.float64), extended))


# ------------------------------------------------------------------------------------- what must always hold


def test_the_output_has_the_length_and_width_of_a_whatever_b_is():
    for b_dim, m in itertools.product((1, 5, 64), (0, 1, 9)):
        layer = CrossAttention(48, b_dim, heads=4)
        assert layer(torch.randn(2, 7, 48), torch.randn(2, m, b_dim)).shape == (2, 7, 48)


def test_self_attention_equals_cross_attention_of_a_sequence_with_itself():
    own = SelfAttention(12, heads=3, dtype=torch.float64)
    cross = CrossAttention(12, heads=3, dtype=torch.float64)
    cross.load_state_dict(own.state_dict())
    x = torch.randn(Z, N, 12, dtype=torch.float64)
    mask = torch.rand(Z, N) > 0.3
    assert_close(own(x, mask=mask), cross(x, x, context_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", CANDIDATES, ids=named)
def test_a_row_that_may_attend_nothing_gives_the_output_bias_and_no_gradient(plan, dtype):
    layer = make_layer(plan, dtype=dtype)
    a, b = make_inputs(dtype=dtype)
    context_mask = torch.ones(Z, M, dtype=torch.bool)
    context_mask[0] = False
    pairs = torch.ones(Z, 1, N, M, dtype=torch.bool)
    pairs[1, 0, 2] = False
    outs = [
        layer(a, b, context_mask=context_mask, attn_mask=pairs),
        layer.attend(a, layer.prepare(b, context_mask=context_mask), attn_mask=pairs),
        layer(a, b, attn_mask=torch.zeros(Z, 1, N, M, dtype=dtype).masked_fill(~(pairs & context_mask[:, None, None]), -torch.inf)),
    ]
    for out in outs:
        bias = layer.out_proj.bias
        assert torch.equal(out[0], bias.expand(N, O)) and torch.equal(out[1, 2], bias)
        assert not torch.equal(out[1, 1], bias)
        layer.zero_grad()
        found = gradients(out, [a, b, *layer.parameters()])
        assert all(gradient.isfinite().all() for gradient in found)
        assert not found[0][0].any() and not found[0][1, 2].any() and not found[1][0].any()
        assert found[0][1, 1].any() and found[1][1].any()


def test_an_empty_context_gives_the_output_bias_in_every_plan():
    for plan in CANDIDATES:
        layer = make_layer(plan)
        a, b = make_inputs(m=0)
        assert torch.equal(layer(a, b), layer.out_proj.bias.expand(Z, N, O))


def test_the_key_bias_never_changes_the_output():
    for plan in CANDIDATES:
        layer = make_layer(plan)
        a, b = make_inputs()
        before = layer(a, b)
        with torch.no_grad():
            layer.k_proj.bias += 3.0
        assert_close(layer(a, b), before)


def test_a_permuted_context_leaves_the_output_and_permuted_queries_permute_it():
    layer = make_layer()
    a, b = make_inputs()
    keys, rows = torch.randperm(M), torch.randperm(N)
    assert_close(layer(a, b[:, keys]), layer(a, b))
    assert_close(layer(a[:, rows], b), layer(a, b)[:, rows])


def test_a_large_negative_additive_mask_is_not_an_empty_row():
    for plan in CANDIDATES:
        layer = make_layer(plan, dtype=torch.bfloat16)
        a, b = make_inputs(dtype=torch.bfloat16)
        lowest = torch.full((N, M), torch.finfo(torch.float32).min)
        out = layer(a, b, attn_mask=lowest)
        assert out.isfinite().all() and not torch.equal(out[0, 0], layer.out_proj.bias)


def test_gradcheck_holds_for_the_auto_plan():
    layer = make_layer()
    a, b = make_inputs(3, 4)
    assert torch.autograd.gradcheck(lambda a, b: layer(a, b), (a, b))


def test_gradient_checkpointing_gives_the_same_gradients():
    layer = make_layer(dropout=0.3)
    a, b = make_inputs()
    torch.manual_seed(3)
    plain = gradients(layer(a, b), [a, b, *layer.parameters()])
    torch.manual_seed(3)
    out = torch.utils.checkpoint.checkpoint(layer, a, b, use_reentrant=False)
    for found, wanted in zip(gradients(out, [a, b, *layer.parameters()]), plain, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("plan", CANDIDATES, ids=named)
def test_autocast_runs_every_plan_in_bfloat16_near_float32(plan):
    layer = make_layer(plan, dtype=torch.float32)
    a, b = make_inputs(dtype=torch.float32)
    for mask in MASKS:
        masks = make_masks(mask, dtype=torch.float32)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            out = layer(a, b, **masks)
            prepared = layer.prepare(b, context_mask=masks.get("context_mask"))
            again = layer.attend(a, prepared, attn_mask=masks.get("attn_mask"))
        assert out.dtype == torch.bfloat16 and torch.equal(out, again)
        expected, _ = specification(layer, a, b, **masks)
        assert (out - expected).abs().max() < 0.05 * expected.abs().max()
        out.sum().backward()


def test_a_layer_moves_to_another_dtype_and_state_dict_names_are_the_four_projections():
    layer = CrossAttention(8, 12, heads=2).double()
    assert layer(torch.randn(1, 2, 8).double(), torch.randn(1, 3, 12).double()).dtype == torch.float64
    names = {f"{p}_proj.{w}" for p in ("q", "k", "v", "out") for w in ("weight", "bias")}
    assert set(layer.state_dict()) == names


def test_bias_can_be_named_for_each_projection():
    layer = CrossAttention(8, heads=2, bias=("q_proj", "out_proj"))
    assert [getattr(layer, p).bias is not None for p in ("q_proj", "k_proj", "v_proj", "out_proj")] == [True, False, False, True]


# --------------------------------------------------------------------------------------------------- plans


def test_plan_for_prints_every_plan_with_its_cost_and_the_choice():
    layer = CrossAttention(384, 384, heads=6)
    choice = layer.plan_for((8, 1, 384), (8, 401, 384))
    text = str(choice)
    assert choice.plan.scores == choice.plan.values == "context"
    assert "chosen: context+context" in text and "times as fast as the textbook" in text and "weight absorption" in text
    for plan in CANDIDATES:
        assert f"{plan.scores}+{plan.values} ({plan.kernel})" in text
    assert choice.as_dict()["plan"] == {"scores": "context", "values": "context", "kernel": choice.plan.kernel}


def test_forward_runs_the_plan_that_plan_for_names(monkeypatch):
    layer = CrossAttention(96, 64, heads=4)
    seen = []
    original = CrossAttention._prepare
    monkeypatch.setattr(
        CrossAttention,
        "_prepare",
        lambda self, b, m, p, plan, stamped: (seen.append(plan), original(self, b, m, p, plan, stamped=stamped))[1],
    )
    for n, m in ((1, 900), (50, 60), (2000, 3)):
        layer(torch.randn(2, n, 96), torch.randn(2, m, 64))
        assert seen[-1] == layer.plan_for((2, n, 96), (2, m, 64), trains=True).plan
    assert len(set(seen)) >= 2


def test_a_pinned_plan_is_run_and_named():
    layer = CrossAttention(8, heads=2, plan=Plan("query", "context"))
    assert layer.plan_for((1, 2, 8), (1, 3, 8)).why == "given to the layer"
    assert layer.prepare(torch.randn(1, 3, 8)).plan == Plan("query", "context")


def test_fix_plan_pins_the_choice_and_auto_frees_it():
    layer = CrossAttention(64, heads=4)
    plan = layer.fix_plan(query_length=1, context_length=4000)
    assert plan.scores == "context" and layer.plan == plan
    assert layer.prepare(torch.randn(1, 3, 64)).plan == plan
    layer.plan = "auto"
    assert layer.prepare(torch.randn(1, 3, 64)).plan == TEXTBOOK


def test_a_projection_that_is_no_plain_linear_forbids_absorbing_it():
    class LowRank(nn.Linear):
        pass

    layer = CrossAttention(8, heads=2)
    layer.k_proj = LowRank(8, 8)
    choice = layer.plan_for((1, 1, 8), (1, 5000, 8))
    assert choice.plan.scores != "context"
    assert "k_proj is a LowRank, not a plain nn.Linear" in str(choice)
    layer.v_proj.register_forward_hook(lambda *args: None)
    assert "v_proj has forward hooks" in str(layer.plan_for((1, 1, 8), (1, 5000, 8)))
    with pytest.raises(PlanError, match=r"plan context\+head is illegal here: k_proj is a LowRank"):
        layer.plan = Plan("context", "head")


def test_hooks_and_a_forward_of_its_own_forbid_absorbing_a_projection():
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        layer = CrossAttention(8, heads=2)
        getattr(layer.k_proj, register)(lambda *args: None)
        choice = layer.plan_for((1, 1, 8), (1, 5000, 8))
        assert choice.plan.scores != "context" and "k_proj has backward hooks" in str(choice)
    layer = CrossAttention(8, heads=2)
    layer.v_proj.forward = layer.v_proj.forward
    choice = layer.plan_for((1, 1, 8), (1, 5000, 8))
    assert choice.plan.values != "context" and "v_proj has a forward of its own" in str(choice)


class Adapted(nn.Module):
    """A projection and a low-rank product beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class AdaptedLinear(nn.Linear):
    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.adapter = Adapted(base)

    def forward(self, x):
        return self.adapter(x)


@pytest.mark.parametrize("kind", [Adapted, AdaptedLinear])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_what_an_adapter_adds_is_never_skipped(name, kind):
    layer = CrossAttention(A, B, heads=H, head_dim=K, value_head_dim=V, out_dim=O)
    setattr(layer, name, kind(getattr(layer, name)))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        layer.to(dtype)
        a, b = make_inputs(dtype=dtype)
        layer.plan = "textbook"
        expected = layer(a, b)
        for plan in CANDIDATES:
            try:
                layer.plan = plan
            except PlanError as error:
                assert f"{name} is a {kind.__name__}" in str(error)
                continue
            assert (layer(a, b) - expected).abs().max() < tolerance, plan


@pytest.mark.filterwarnings("ignore")  # torch calls this way of quantising old
def test_a_quantised_layer_runs():
    layer = CrossAttention(16, 24, heads=4).eval()
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    a, b = torch.randn(2, 1, 16), torch.randn(2, 500, 24)
    assert (quantised(a, b) - layer(a, b)).abs().max() < 0.05
    assert "is a Linear, not a plain nn.Linear" in str(quantised.plan_for(a.shape, b.shape))


# -------------------------------------------------------------------------------------------------- errors


def error_of(call, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_wrong_widths_say_what_was_expected_and_what_came():
    layer = make_layer()
    a, b = make_inputs()
    message = error_of(lambda: layer(torch.randn(Z, N, 64), b))
    assert "queries have width 64 but this layer was built with query_dim=6" in message and "query_dim=64" in message
    message = error_of(lambda: layer(a, torch.randn(Z, M, 11)))
    assert "context has width 11 but this layer was built with context_dim=9" in message
    message = error_of(lambda: layer.prepare(torch.randn(M, B)))
    assert "context must be (batch, length, 9), got shape (7, 9)" in message and "context[None]" in message
    assert "got shape (6,)" in error_of(lambda: layer(torch.randn(A), b))


def test_wrong_batches_say_both():
    layer = make_layer()
    a, b = make_inputs()
    message = error_of(lambda: layer(a[:1].repeat(5, 1, 1), b))
    assert "queries have batch 5 but the context has batch 2" in message and "(batch, repeats, length, width)" in message
    message = error_of(lambda: layer.attend(a[:1], layer.prepare(b)))
    assert "queries have batch 1 but the context has batch 2" in message


def test_wrong_dtypes_say_both():
    layer = make_layer()
    a, b = make_inputs()
    assert "queries are torch.float32 but the layer's weights are torch.float64" in error_of(lambda: layer(a.float(), b))
    assert "context are torch.float32" in error_of(lambda: layer(a, b.float()))


def test_what_is_no_dense_tensor_is_refused_by_its_type():
    layer = make_layer()
    a, b = make_inputs()
    assert "context must be a tensor (batch, length, width), got str" in error_of(lambda: layer(a, "b"), TypeError)
    assert "queries[0] must be a tensor, got float" in error_of(lambda: layer.attend([1.0], layer.prepare(b)), TypeError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
        strided = torch.nested.nested_tensor([b[0, :3].detach(), b[1].detach()])
        jagged = torch.nested.nested_tensor([b[0, :3].detach(), b[1].detach()], layout=torch.jagged)
    assert "layout=torch.jagged" in error_of(lambda: layer.prepare(strided), TypeError)
    assert "got a nested one; pad it" in error_of(lambda: layer.extend(layer.prepare(b), jagged), TypeError)


def test_a_context_prepared_under_autocast_is_refused_outside_of_it():
    layer = make_layer("textbook", dtype=torch.float32)
    a, b = make_inputs(dtype=torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        prepared = layer.prepare(b)
    message = error_of(lambda: layer.attend(a, prepared))
    assert "the prepared context is torch.bfloat16 but the queries are torch.float32" in message and "torch.autocast" in message


def test_what_autocast_made_stays_in_its_dtype_and_is_refused_outside():
    a, b = make_inputs(dtype=torch.float32)
    for plan in CANDIDATES:
        layer = make_layer(plan, dtype=torch.float32)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            prepared = layer.prepare(b)
        assert prepared.keys.dtype == (torch.float32 if plan.scores == "context" else torch.bfloat16)
        assert prepared.values.dtype == (torch.float32 if plan.values == "context" else torch.bfloat16)
        if (plan.scores, plan.values) == ("context", "context"):
            assert_close(layer.attend(a, prepared), layer(a, b))  # B itself, which autocast did not touch
        else:
            assert "the prepared context is torch.bfloat16" in error_of(lambda p=prepared, x=layer: x.attend(a, p))


def test_wrong_masks_say_shape_and_dtype():
    layer = make_layer()
    a, b = make_inputs()
    message = error_of(lambda: layer(a, b, context_mask=torch.ones(Z, M + 1, dtype=torch.bool)))
    assert "context_mask must have shape (batch, context length) = (2, 7), got (2, 8)" in message
    message = error_of(lambda: layer(a, b, context_mask=torch.ones(Z, M)), TypeError)
    assert "context_mask must be bool" in message and "torch.float32" in message and "mask.bool()" in message
    message = error_of(lambda: layer(a, b, attn_mask=torch.ones(N, M, dtype=torch.int64)), TypeError)
    assert "torch.int64" in message
    message = error_of(lambda: layer(a, b, attn_mask=torch.ones(Z, N, M, dtype=torch.bool)))
    assert "(2, 5, 7) does not broadcast to (batch, heads, queries, context) = (2, 4, 5, 7)" in message
    message = error_of(lambda: layer(a, b, context_mask=torch.ones(Z, M, dtype=torch.bool, device="meta")))
    assert "context_mask is on meta but what it masks is on cpu" in message
    message = error_of(lambda: layer(a, b, attn_mask=torch.ones(N, M, device="meta")))
    assert "attn_mask is on meta but what it masks is on cpu" in message
    message = error_of(lambda: layer(a, b, context_mask=[True]), TypeError)
    assert "list" in message


def test_nan_and_infinity_in_a_mask_are_named_with_their_place():
    layer = make_layer()
    a, b = make_inputs()
    mask = torch.zeros(N, M, dtype=torch.float64)
    mask[2, 3] = torch.nan
    assert "1 NaN, the first at [2, 3]" in error_of(lambda: layer(a, b, attn_mask=mask))
    mask[2, 3] = torch.inf
    assert "+inf at index [2, 3]" in error_of(lambda: layer(a, b, attn_mask=mask))


def test_a_mask_with_an_already_prepared_context_is_refused():
    layer = make_layer()
    a, b = make_inputs()
    prepared = layer.prepare(b)
    message = error_of(lambda: layer.attend(a, prepared, context_mask=torch.ones(Z, M, dtype=torch.bool)))
    assert "context_mask belongs to the prepared context" in message and "prepare(b, context_mask=...)" in message


def test_a_prepared_context_of_another_layer_is_refused():
    layer, other = make_layer(), make_layer()
    a, b = make_inputs()
    assert "made by another layer" in error_of(lambda: layer.attend(a, other.prepare(b)))
    assert "expects what this layer's prepare returned, got Tensor" in error_of(lambda: layer.attend(a, b), TypeError)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw fused", "in place", "data", "load", "move"])
def test_a_prepared_context_of_earlier_weights_is_refused(optimizer):
    layer = make_layer("textbook")
    a, b = make_inputs()
    prepared = layer.prepare(b)
    layer.attend(a, prepared).sum().backward()
    if optimizer == "sgd":
        torch.optim.SGD(layer.parameters(), 0.1).step()
    elif optimizer == "adamw fused":
        torch.optim.AdamW(layer.parameters(), 0.1, fused=True).step()
    elif optimizer == "in place":
        with torch.no_grad():
            layer.k_proj.weight.mul_(2)
            layer.v_proj.weight.mul_(2)
    elif optimizer == "data":
        layer.k_proj.weight.data = layer.k_proj.weight.data * 2
        layer.v_proj.weight.data = layer.v_proj.weight.data * 2
    elif optimizer == "load":
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    else:
        layer.float()
        a = a.float()
    message = error_of(lambda: layer.attend(a, prepared))
    assert (
        "out of date" in message
        and "k_proj.weight" in message
        and "v_proj.weight" in message
        and "call prepare(b) again" in message
    )


def test_the_weights_behind_a_pruned_projection_are_watched():
    layer = make_layer("textbook")
    torch.nn.utils.prune.l1_unstructured(layer.k_proj, "weight", 0.5)
    a, b = make_inputs()
    prepared = layer.prepare(b)
    with torch.no_grad():
        layer.k_proj.weight_orig.mul_(2)
    assert "out of date: k_proj.weight_orig changed" in error_of(lambda: layer.attend(a, prepared))


def test_weights_that_a_prepared_context_does_not_depend_on_may_change():
    layer = make_layer("textbook")
    a, b = make_inputs()
    prepared = layer.prepare(b)
    with torch.no_grad():
        layer.q_proj.weight.mul_(2)
        layer.out_proj.weight.mul_(2)
    assert_close(layer.attend(a, prepared), layer(a, b))


def test_a_context_that_is_kept_and_then_edited_is_refused():
    layer = make_layer(Plan("context", "context"))
    a, b = make_inputs()
    b = b.detach()
    prepared = layer.prepare(b)
    b[0, 0] += 1
    assert "out of date: context changed" in error_of(lambda: layer.attend(a, prepared))


def test_a_copied_layer_does_not_take_the_original_s_prepared_context():
    layer = make_layer()
    a, b = make_inputs()
    prepared = layer.prepare(b)
    assert "out of date" in error_of(lambda: copy.deepcopy(layer).attend(a, prepared))


def test_heads_that_do_not_divide_say_so():
    assert "query_dim=10 and heads=4" in error_of(lambda: CrossAttention(10, heads=4))
    assert "kv_heads=3 and heads=4" in error_of(lambda: CrossAttention(8, heads=4, kv_heads=3))
    assert CrossAttention(10, heads=4, head_dim=3)(torch.randn(1, 2, 10), torch.randn(1, 3, 10)).shape == (1, 2, 10)


def test_constructor_arguments_are_checked_by_value():
    assert "heads must be at least 1, got 0" in error_of(lambda: CrossAttention(8, heads=0))
    assert "context_dim must be at least 1, got -3" in error_of(lambda: CrossAttention(8, -3))
    assert "query_dim must be an integer, got float 8.0" in error_of(lambda: CrossAttention(8.0), TypeError)
    assert "dropout must be in [0, 1), got 1.0" in error_of(lambda: CrossAttention(8, dropout=1.0))
    assert "got 'best'" in error_of(lambda: CrossAttention(8, plan="best"))
    assert "got tuple" in error_of(lambda: CrossAttention(8, plan=("head", "head")), TypeError)
    assert "scale must be finite, got nan" in error_of(lambda: CrossAttention(8, scale=float("nan")))
    assert "bias must be True, False or names of projections, got None" in error_of(lambda: CrossAttention(8, bias=None), TypeError)
    assert "bias names key" in error_of(lambda: CrossAttention(8, bias=("key",)))
    assert "positions must be a PositionPart" in error_of(lambda: CrossAttention(8, positions=nn.Linear(2, 2)), TypeError)
    assert "uses must be at least 1, got 0" in error_of(lambda: make_layer().prepare(make_inputs()[1], uses=0))


def test_positions_without_a_position_part_are_refused():
    layer = make_layer()
    a, b = make_inputs()
    message = error_of(lambda: layer(a, b, query_positions=torch.arange(N)))
    assert "query_positions were passed but the layer has no position part" in message


def test_the_printed_layer_shows_its_sizes():
    text = repr(make_layer(kv_heads=2))
    for part in (
        "query_dim=6",
        "context_dim=9",
        f"heads={H}",
        f"head_dim={K}",
        f"value_head_dim={V}",
        "kv_heads=2",
        f"out_dim={O}",
    ):
        assert part in text


def test_a_prepared_context_is_a_frozen_value():
    prepared = make_layer().prepare(make_inputs()[1])
    assert isinstance(prepared, PreparedContext) and prepared.context_length == M
    assert repr(prepared).startswith(f"PreparedContext(batch={Z}, context_length={M}, plan=head+head, nbytes=")
    with pytest.raises(AttributeError):
        prepared.keys = None
    assert TOLERANCES
