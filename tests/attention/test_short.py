"""The short ways of a call: they give what the long way gives, and no call takes one because another call of its sizes did."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from crossattention import CrossAttention, Plan, SelfAttention
from crossattention.attention import products, self_attention, short
from crossattention.layers import Rotary
from crossattention.plan import TEXTBOOK, speeds_of, use_speeds
from oracle import A, B, M, N, Z, gradients, make_inputs, make_layer
from tolerances import assert_close

CONTEXT = Plan("context", "context", "explicit")
PLANS = (TEXTBOOK, CONTEXT, Plan("context", "context"))


@pytest.fixture(autouse=True)
def usual_speeds():
    yield
    use_speeds(None)


def layer_of(plan="auto", **changes):
    """A layer that a short way takes: keys and values of one width."""
    return make_layer(plan, **{"value_head_dim": 8, **changes})


class Watching(TorchDispatchMode):
    """A mode that is handed each operator."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append(operator)
        return operator(*args, **(kwargs or {}))


def takes_a_short_way(monkeypatch, call):
    """Whether a call takes one, and what it gives."""
    taken = []
    with monkeypatch.context() as patch:
        run = short.run
        patch.setattr(short, "run", lambda *given: taken.append(run(*given)) or taken[-1])
        out = call()
    return bool(taken) and taken[-1] is not None, out


def by_the_long_way(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(short, "way_of", lambda *given: None)
        patch.setattr(CrossAttention, "_is_plain", lambda *given: False)
        return call()


def queries_of(form, n=N):
    shape = {"batch": (Z, n, A), "learned": (n, A), "beams": (Z, 3, n, A)}[form]
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("masked", [None, "some", "an item"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("form", ["batch", "learned", "beams"])
def test_each_short_way_gives_what_the_long_one_gives(monkeypatch, form, plan, masked):
    for m in (M, 20):
        layer, a, (_, b) = layer_of(plan), queries_of(form), make_inputs(m=m)
        mask = None if masked is None else torch.rand(Z, m) > 0.3
        if masked == "an item":
            mask[0] = False
        call = lambda: layer(a, b, context_mask=mask)  # noqa: B023, E731
        later = lambda: layer.attend(a, layer.prepare(b, context_mask=mask))  # noqa: B023, E731
        is_short, out = takes_a_short_way(monkeypatch, call)
        assert is_short
        expected, inputs = by_the_long_way(monkeypatch, call), [a, b, *layer.parameters()]
        assert_close(out, expected)
        for found, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
            assert found.isfinite().all() and (found - wanted).abs().amax() < 1e-10
        assert_close(later(), expected)
        with torch.no_grad():
            before = a.clone(), b.clone()
            assert_close(call(), expected)
            assert_close(later(), expected)
            assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_in_half_precision_both_ways_round_alike(monkeypatch, plan, dtype):
    layer = layer_of(plan, dtype=dtype)
    for m in (M, 20):
        a, b = (x.detach() for x in make_inputs(m=m, dtype=dtype))
        mask = torch.rand(Z, m) > 0.3
        mask[1] = False
        for context_mask in (None, mask):
            with torch.no_grad():
                call = lambda: layer(a, b, context_mask=context_mask)  # noqa: B023, E731
                is_short, out = takes_a_short_way(monkeypatch, call)
                expected = by_the_long_way(monkeypatch, call)
            assert is_short and out.dtype == dtype
            assert (out - expected).abs().amax() <= 2 * torch.finfo(dtype).eps * expected.abs().amax()


@pytest.mark.parametrize("form", ["batch", "learned", "beams"])
def test_under_autocast_both_ways_are_the_same_to_the_bit(monkeypatch, form):
    layer, a, (_, b) = layer_of("textbook", dtype=torch.float32), queries_of(form).float(), make_inputs(dtype=torch.float32)
    mask = torch.rand(Z, M) > 0.3
    mask[1] = False
    for dtype in (torch.bfloat16, torch.float16):
        for given in ((a, b), (a.to(dtype), b), (a, b.to(dtype)), (a.bfloat16(), b.half())):
            for context_mask in (None, mask):
                call = lambda: layer(*given, context_mask=context_mask)  # noqa: B023, E731
                with torch.no_grad(), torch.autocast("cpu", dtype):
                    is_short, out = takes_a_short_way(monkeypatch, call)
                    assert is_short and out.dtype == dtype and torch.equal(out, by_the_long_way(monkeypatch, call))
    with torch.autocast("cpu", torch.bfloat16):  # with a backward pass to come, the kernel is another one
        is_short, out = takes_a_short_way(monkeypatch, lambda: layer(a, b))
        assert not is_short and torch.equal(out, by_the_long_way(monkeypatch, lambda: layer(a, b)))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):  # which leaves float64 as it is
        layer(a.double(), b)


# ------------------------------------------------------------------------------- what changes between two calls of the same sizes


def test_hooks_and_adapters_on_a_projection_are_run(monkeypatch):
    layer, (a, b) = layer_of(), make_inputs()
    expected, seen = layer(a, b), []
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            handle = getattr(getattr(layer, name), register)(lambda *given, name=name: seen.append(name))
            is_short, out = takes_a_short_way(monkeypatch, lambda: layer(a, b))
            handle.remove()
            assert seen.pop() == name and not seen and not is_short
            assert_close(out, expected)
    layer.k_proj.forward = lambda x: nn.Linear.forward(layer.k_proj, x) * 0.0
    assert not torch.allclose(layer(a, b), expected)
    del layer.k_proj.forward

    class Twice(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    layer.out_proj.__class__ = Twice
    assert_close(layer(a, b), 2.0 * expected)


def test_hooks_on_all_modules_are_run():
    layer, (a, b), seen = layer_of(), make_inputs(), []
    layer(a, b)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *given: seen.append(module))
    layer(a, b)
    handle.remove()
    assert [m for m in seen if isinstance(m, nn.Linear)] == [layer.k_proj, layer.v_proj, layer.q_proj, layer.out_proj]


def test_weights_that_are_written_replaced_frozen_or_moved_are_the_ones_that_are_read():
    layer, (a, b) = layer_of(), make_inputs()
    layer(a, b)
    other = layer_of()
    layer.load_state_dict(other.state_dict())
    assert_close(layer(a, b), other(a, b))
    layer.v_proj = copy.deepcopy(other.v_proj).requires_grad_(False)
    layer.v_proj.weight = nn.Parameter(2.0 * other.v_proj.weight.detach())
    other.v_proj.weight.data.mul_(2.0)
    assert_close(layer(a, b), other(a, b))
    layer.requires_grad_(False)
    assert not layer(a.detach(), b.detach()).requires_grad
    layer.float()
    with pytest.raises(ValueError, match=r"queries are torch.float64 but the layer's weights are torch.float32"):
        layer(a, b)
    layer(a.float(), b.float())


@pytest.mark.slow  # torch loads what it knows of memory that is not there
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_layer_that_lost_its_memory_goes_the_long_way(monkeypatch, plan):
    layer, (a, b) = layer_of(plan), make_inputs()
    layer(a, b)
    layer.to("meta")
    with pytest.raises(ValueError, match="queries are on cpu but the layer's weights on meta"):
        layer(a, b)
    is_short, out = takes_a_short_way(monkeypatch, lambda: layer(a.to("meta"), b.to("meta")))
    assert not is_short and out.shape == (Z, N, layer.out_dim) and out.is_meta


def test_the_plan_is_chosen_anew_where_plan_speeds_or_training_change(monkeypatch):
    layer = CrossAttention(96, 64, heads=4)
    a, b = torch.randn(2, 1, 96), torch.randn(2, 900, 64)
    planned = lambda: short.way_of(layer, a, b).plan  # noqa: E731
    assert planned() == layer.plan_for(a.shape, b.shape, trains=True).plan
    with torch.no_grad():
        assert planned() == layer.plan_for(a.shape, b.shape).plan
        chosen = planned()
        assert chosen != TEXTBOOK
        usual = speeds_of("cpu", "float32")
        use_speeds({("cpu", "float32"): replace(usual, step_seconds=1e3, fused_block=0.0)})
        assert planned() == layer.plan_for(a.shape, b.shape).plan != chosen
        use_speeds(None)
        assert planned() == chosen
        for plan in (Plan("query", "output"), "textbook", CONTEXT):
            layer.plan = plan
            assert planned() == (TEXTBOOK if plan == "textbook" else plan)
        layer.plan = "auto"
        assert planned() == chosen
    layer.requires_grad_(False)
    assert planned() == chosen


@pytest.mark.skipif(not products._has_onednn, reason="this torch has no oneDNN")
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_products_that_the_speeds_in_use_call_large_reach_the_quicker_library(monkeypatch, plan):
    layer, quick = layer_of(plan, dtype=torch.float32), []
    onednn = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *given: quick.append(1) or onednn(*given))
    for m in (M, 20):
        a, b = make_inputs(m=m, dtype=torch.float32)
        use_speeds({("cpu", "float32"): replace(speeds_of("cpu", "float32"), quick_from=1e9)})
        expected = layer(a, b)
        assert short.way_of(layer, a, b).is_small and not quick
        use_speeds({("cpu", "float32"): replace(speeds_of("cpu", "float32"), quick_from=1.0)})
        assert not short.way_of(layer, a, b).is_small
        assert_close(layer(a, b), expected)
        with torch.no_grad():
            assert_close(layer(a, b), expected)
        assert len(quick) >= 2 * 4
        quick.clear()


def test_a_plan_for_autocast_does_not_outlive_it():
    layer = CrossAttention(96, 64, heads=4, dtype=torch.float64)
    a, b = torch.randn(2, 1, 96, dtype=torch.float64), torch.randn(2, 900, 64, dtype=torch.float64)
    usual = speeds_of("cpu", "float32")
    slow_to_start = replace(usual, step_seconds=1e3, fused_block=0.0)
    use_speeds({("cpu", "float64"): usual, ("cpu", "bfloat16"): slow_to_start, ("cpu", "float32"): slow_to_start})
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 as it is, but not the plan
            in_autocast = layer.plan_for(a.shape, b.shape).plan
            layer(a, b)
        assert short.way_of(layer, a, b).plan == layer.plan_for(a.shape, b.shape).plan != in_autocast


def test_parts_dropout_and_autocast_are_seen(monkeypatch):
    layer, (a, b) = layer_of(dtype=torch.float32), make_inputs(dtype=torch.float32)
    expected = layer(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        is_short, out = takes_a_short_way(monkeypatch, lambda: layer(a, b))
    assert not is_short and out.dtype == torch.bfloat16
    assert layer(a, b).dtype == torch.float32
    layer.dropout = 0.9
    is_short, out = takes_a_short_way(monkeypatch, lambda: layer.train()(a, b))
    assert not is_short and not torch.allclose(out, expected)
    assert_close(layer.eval()(a, b), expected)
    layer.positions = Rotary()
    assert not torch.allclose(layer(a, b), expected)
    layer.positions = None
    assert_close(layer(a, b), expected)


def test_methods_put_before_the_layers_own_are_called(monkeypatch):
    layer, (a, b), seen = layer_of(), make_inputs(), []
    layer(a, b)
    for name in ("_attend", "_prepare", "_plan_of", "forbidden"):
        method = getattr(layer, name)
        setattr(layer, name, lambda *given, method=method, name=name, **more: seen.append(name) or method(*given, **more))
        assert not takes_a_short_way(monkeypatch, lambda: layer(a, b))[0]
        delattr(layer, name)
        with monkeypatch.context() as patch:
            patch.setattr(CrossAttention, name, getattr(CrossAttention, name).__get__)
            assert not layer._runs_its_own()
    assert seen[:3] == ["_attend", "_prepare", "_plan_of"]

    class Zeros(CrossAttention):
        def _attend(self, a, *given):
            return a * 0.0

    zeros = Zeros(A, B, heads=2, dtype=torch.float64)
    assert not zeros(a, b).any()


@pytest.mark.slow  # torch loads what it needs for such modes
def test_modes_that_are_handed_each_operator_see_the_long_way(monkeypatch):
    layer, (a, b) = layer_of(CONTEXT), make_inputs()
    layer(a, b)
    with Watching() as watching:
        assert not takes_a_short_way(monkeypatch, lambda: layer(a, b))[0]
    assert torch.ops.aten.bmm.default in watching.seen


@pytest.mark.filterwarnings("ignore")
def test_transforms_and_traces_look_on_from_the_long_way(monkeypatch):
    layer, (a, b) = layer_of(CONTEXT), (x.detach() for x in make_inputs())
    expected = layer(a, b)
    is_short, out = takes_a_short_way(monkeypatch, lambda: torch.func.vmap(lambda x: layer(x[None], b[:1])[0])(a[:1]))
    assert not is_short
    assert_close(out, expected[:1])
    with torch.no_grad():
        traced = torch.jit.trace(layer, (a, b), check_trace=False)
    held = len(short._ways)
    assert_close(traced(a[:, :2], b[:, :3]), layer(a[:, :2], b[:, :3]))
    assert len(short._ways) == held + 1  # of that layer's own call, none of the trace's


def test_what_is_wrong_is_refused_after_a_call_of_the_same_sizes():
    layer, (a, b) = layer_of(), make_inputs()
    mask = torch.ones(Z, M, dtype=torch.bool)
    layer(a, b, context_mask=mask)
    for given, error, message in (
        ({"context_mask": mask[:, :2]}, ValueError, r"context_mask must have shape \(batch, context length\)"),
        ({"context_mask": mask.int()}, TypeError, "context_mask must be bool"),
        ({"context_mask": [1]}, TypeError, "context_mask must be a bool tensor"),
        ({"context_mask": mask.to("meta")}, ValueError, "context_mask is on meta"),
        ({"attn_mask": torch.full((N, M), torch.nan)}, ValueError, "attn_mask has 35 NaN"),
        ({"query_positions": torch.arange(N)}, ValueError, "query_positions were passed but the layer has no position part"),
        ({"context_positions": torch.arange(M)}, ValueError, "context_positions were passed but the layer has no position part"),
    ):
        with pytest.raises(error, match=message):
            layer(a, b, **given)
    with pytest.raises(ValueError, match=r"context are torch\.float32 but the layer"):
        layer(a, b.float())
    with pytest.raises(ValueError, match="queries have width 5"):
        layer(a[..., :5], b)
    with pytest.raises(ValueError, match="queries have batch 1"):
        layer(a[:1], b)


def test_a_layer_whose_sizes_are_changed_is_no_longer_known():
    layer, (a, b) = layer_of("textbook"), make_inputs()
    layer(a, b)
    halved = copy.deepcopy(layer)
    for name, rows in (("q_proj", slice(16)), ("k_proj", slice(16)), ("v_proj", slice(16))):
        projection = getattr(halved, name)
        projection.weight, projection.bias = (nn.Parameter(p.detach()[rows]) for p in (projection.weight, projection.bias))
    halved.out_proj.weight = nn.Parameter(layer.out_proj.weight.detach()[:, :16])
    halved.heads = halved.kv_heads = 2
    with torch.no_grad():
        layer.out_proj.weight[:, 16:] = 0.0
    assert_close(halved(a, b), layer(a, b))


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(short, "_ways", {})
    monkeypatch.setattr(short, "_MOST_WAYS", 3)
    layer = layer_of()
    for m in range(1, 8):
        layer(*make_inputs(m=m))
        assert len(short._ways) <= 3


# --------------------------------------------------------------------------------------------------------- self-attention


def sequence_layer(**settings):
    layer = SelfAttention(12, heads=4, dtype=torch.float64, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer


def without_the_short_way(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(self_attention, "project_plainly", lambda *given: None)
        return call()


@pytest.mark.parametrize("masked", [None, "some", "an item"])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_gives_by_its_short_way_what_the_long_one_gives(monkeypatch, causal, masked):
    layer, x = sequence_layer(causal=causal), torch.randn(3, 7, 12, dtype=torch.float64, requires_grad=True)
    mask = None if masked is None else torch.rand(3, 7) > 0.4
    if masked == "an item":
        mask[1] = False
    found = layer(x, mask=mask)
    wanted = without_the_short_way(monkeypatch, lambda: layer(x, mask=mask))
    assert_close(found, wanted)
    inputs = [x, *layer.parameters()]
    for got, want in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        assert_close(got, want)
    with torch.no_grad():
        assert_close(layer(x, mask=mask), wanted)


@pytest.mark.parametrize("pieces", [(7,), (1, 1, 1, 1, 1, 1, 1), (3, 1, 2, 1)])
def test_steps_of_self_attention_give_its_rows(monkeypatch, pieces):
    layer, x = sequence_layer(causal=True), torch.randn(2, 7, 12, dtype=torch.float64)
    wanted = without_the_short_way(monkeypatch, lambda: layer(x))
    cache, rows = None, []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            row, cache = layer.step(piece, cache)
            rows.append(row)
    assert_close(torch.cat(rows, 1), wanted)


def test_what_a_projection_of_self_attention_does_besides_is_done():
    layer, x = sequence_layer(causal=True), torch.randn(2, 7, 12, dtype=torch.float64)
    plain, called = layer(x), []
    handle = layer.k_proj.register_forward_hook(lambda module, given, out: called.append(out) or out * 2)
    assert not torch.allclose(layer(x), plain) and len(called) == 1
    handle.remove()
    layer.v_proj = nn.Sequential(layer.v_proj)
    assert_close(layer(x), plain)
    torch.nn.utils.parametrize.register_parametrization(layer.q_proj, "weight", nn.Identity())
    assert_close(layer(x), plain)


def test_self_attention_drops_and_refuses_as_ever():
    layer, x = sequence_layer(dropout=0.5), torch.randn(2, 7, 12, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
    for wrong in (torch.randn(2, 7, 11).double(), torch.randn(7, 12).double(), torch.randn(2, 7, 12)):
        with pytest.raises(ValueError, match="the sequence"):
            layer(wrong)
    assert layer(x[:, :0]).shape == (2, 0, 12) and layer(x[:0]).shape == (0, 7, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16
