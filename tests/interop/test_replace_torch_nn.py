import copy
import itertools
import weakref
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from crossattention import speed_up
from crossattention.plan import ALL_PLANS, Plan
from tolerances import assert_close

Z, N, M, E, H = 2, 3, 11, 12, 3
EXPLICIT = [Plan(plan.scores, plan.values, "explicit") for plan in ALL_PLANS]


def mha_and_inputs(dtype=torch.float64, batch_first=True, batched=True, kdim=None, vdim=None, **options):
    mha = nn.MultiheadAttention(E, H, kdim=kdim, vdim=vdim, batch_first=batch_first, dtype=dtype, **options)
    for bias in (mha.in_proj_bias, mha.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    query, key = torch.randn(Z, N, E, dtype=dtype), torch.randn(Z, M, kdim or E, dtype=dtype)
    value = key if kdim is None and vdim is None else torch.randn(Z, M, vdim or E, dtype=dtype)
    turn = (lambda x: x[0]) if not batched else (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    query, turned = turn(query), turn(key)
    return mha, query, turned, turned if value is key else turn(value)


def masks(kind, batched=True, dtype=torch.float64):
    """Masks in torch's sense; every row keeps a live key."""
    padding, pairs = torch.rand(Z, M) > 0.6, torch.rand(N, M) > 0.6
    padding[:, 0], pairs[:, 0] = False, False
    by_head = (torch.rand(Z * H, N, M) > 0.6).index_fill(2, torch.tensor(0), False)
    if not batched:
        padding, by_head = padding[0], by_head[:H]
    added = torch.randn(pairs.shape, dtype=dtype).masked_fill(pairs, -torch.inf)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "pairs": {"attn_mask": pairs},
        "by head": {"attn_mask": by_head},
        "added": {"attn_mask": added},
        "both": {"key_padding_mask": padding, "attn_mask": by_head},
        "added padding": {"key_padding_mask": torch.zeros(padding.shape, dtype=dtype).masked_fill(padding, -torch.inf)},
        "both added": {
            "key_padding_mask": torch.randn(padding.shape, dtype=dtype).masked_fill(padding, -torch.inf),
            "attn_mask": added,
        },
    }[kind]


@pytest.mark.parametrize("plan", ALL_PLANS, ids=str)
@pytest.mark.parametrize("mask", ["none", "padding", "by head", "both added"])
def test_outputs_and_gradients_are_the_modules_own_in_every_plan(plans_for_all, plan, mask):
    plans_for_all(plan)
    mha, *inputs = mha_and_inputs()
    own, given = copy.deepcopy(mha), masks(mask)
    with speed_up(mha):
        results = []
        for module in (own, mha):
            leaves = [x.clone().requires_grad_() for x in inputs[:2]]
            out, weights = module(leaves[0], leaves[1], leaves[1], need_weights=False, **given)
            (out * torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
            results.append([out, *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())])
    assert weights is None
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("plan", EXPLICIT, ids=str)
@pytest.mark.parametrize("mask", ["none", "both"])
@pytest.mark.parametrize("averages", [True, False])
def test_weights_are_given_too(plans_for_all, plan, mask, averages):
    plans_for_all(plan)
    mha, *inputs = mha_and_inputs()
    own, given = copy.deepcopy(mha), {"average_attn_weights": averages} | masks(mask)
    with speed_up(mha):
        for actual, expected in zip(mha(*inputs, **given), own(*inputs, **given), strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (20, 20), (20, 7), (7, None)])
@pytest.mark.parametrize("plan", [Plan("context", "context"), Plan("query", "output"), Plan("head", "context")], ids=str)
def test_every_layout_and_width(plans_for_all, plan, kdim, vdim, batched, batch_first):
    plans_for_all(plan)
    mha, *inputs = mha_and_inputs(batch_first=batch_first, batched=batched, kdim=kdim, vdim=vdim, bias=kdim is None)
    own = copy.deepcopy(mha)
    with speed_up(mha), torch.no_grad():
        for kind, _again in itertools.product(["none", "both", "pairs", "added padding"], range(3)):
            given = masks(kind, batched)
            out, expected = mha(*inputs, need_weights=False, **given)[0], own(*inputs, need_weights=False, **given)[0]
            assert_close(out, expected)
            assert out.stride() == expected.stride() or not expected.is_contiguous()


def test_the_planner_chooses_and_the_weights_keep_the_modules_order(plans_for_all):
    mha, *inputs = mha_and_inputs(torch.float32)
    own = copy.deepcopy(mha)
    with speed_up(mha) as changes, torch.no_grad():
        for _ in range(3):
            for actual, expected in zip(mha(*inputs), own(*inputs), strict=True):
                assert_close(actual, expected)
    assert "ran" in str(changes)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_row_without_a_live_key_gives_the_output_bias_and_no_nan(plans_for_all, need_weights):
    mha, query, key, value = mha_and_inputs(torch.float32)
    padding = torch.zeros(Z, M, dtype=torch.bool)
    padding[1] = True
    own = copy.deepcopy(mha)
    with speed_up(mha):
        out, weights = mha(query, key, value, key_padding_mask=padding, need_weights=need_weights)
        out.sum().backward()
    expected = own(query, key, value, key_padding_mask=padding, need_weights=need_weights)[0]
    assert_close(out[0], expected[0])
    assert_close(out[1], mha.out_proj.bias.expand(N, E))
    assert weights is None or torch.equal(weights[1], torch.zeros(N, M))
    assert all(p.grad.isfinite().all() for p in mha.parameters())


def test_self_attention_and_training_with_dropout_run_the_modules_own_code(plans_for_all):
    mha, query, key, _ = mha_and_inputs(torch.float32, dropout=0.5)
    own = copy.deepcopy(mha)
    with speed_up(mha) as changes:
        for arguments in ((query, query, query), (query, key, key)):
            torch.manual_seed(3)
            actual = mha(*arguments)[0]
            torch.manual_seed(3)
            assert torch.equal(actual, own(*arguments)[0])
        assert "none has run yet" in str(changes)
        with torch.no_grad():
            for _ in range(2):
                assert_close(mha.eval()(query, key, key)[0], own.eval()(query, key, key)[0])
        assert "ran" in str(changes)


def test_wrong_input_meets_the_modules_own_errors(plans_for_all):
    mha, query, key, value = mha_and_inputs(torch.float32)
    with speed_up(mha):
        with pytest.raises(AssertionError, match="embedding dimension"):
            mha(query[..., :-1], key, value)
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            mha(query, key)
        with pytest.raises((RuntimeError, AssertionError)):
            mha(query, key, value, attn_mask=torch.zeros(N, M + 1))


@pytest.mark.parametrize(
    ("options", "why"),
    [({"add_bias_kv": True}, "add_bias_kv=True appends"), ({"add_zero_attn": True}, "add_zero_attn=True appends")],
)
def test_what_no_plan_has_a_place_for_is_left(options, why):
    mha = nn.MultiheadAttention(E, H, **options)
    changes = speed_up(mha)
    assert changes.replaced == () and why in changes.left[0].why and "forward" not in mha.__dict__


def test_a_subclass_with_a_forward_of_its_own_is_left():
    class Mine(nn.MultiheadAttention):
        def forward(self, query):
            return query

    (left,) = speed_up(Mine(E, H)).left
    assert "a Mine has a forward of its own" in left.why


def test_a_decoder_steps_on_a_kept_memory(plans_for_all):
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16, batch_first=True), 2).eval()
    own, memory = copy.deepcopy(decoder), torch.randn(Z, M, E)
    with speed_up(decoder) as changes, torch.no_grad():
        assert changes.replaced == ("layers.0.multihead_attn", "layers.1.multihead_attn")
        assert {left.name for left in changes.left} == {"layers.0.self_attn", "layers.1.self_attn"}
        for length in (1, 2, 3, 4, 9):
            x = torch.randn(Z, length, E)
            assert_close(decoder(x, memory), own(x, memory))


def kept_reads(changes):
    return sum(count for one in changes._replacements for plan in one.what.plans for (*_, kept), count in plan._ran.items() if kept)


def steps(plans_for_all, plan=None):
    """A module that has kept what it made of a memory."""
    plans_for_all(plan)
    mha, query, key, _ = mha_and_inputs(torch.float32)
    own, changes = copy.deepcopy(mha), speed_up(mha)
    with torch.no_grad():
        for _ in range(3):
            mha(query, key, key, need_weights=False)
    assert kept_reads(changes) == 2
    return mha, own, changes, query, key


def agree(mha, own, query, key):
    own.load_state_dict(mha.state_dict())
    with torch.no_grad():
        return assert_close(mha(query, key, key, need_weights=False)[0], own(query, key, key, need_weights=False)[0])


@pytest.mark.parametrize("plan", [Plan(), Plan("query", "output"), Plan("head", "context"), Plan("context", "output")], ids=str)
@pytest.mark.parametrize(
    "edit",
    {
        "memory in place": lambda mha, key: key.mul_(2.0),
        "memory through a view": lambda mha, key: key[1].zero_(),
        "weights in place": lambda mha, key: mha.in_proj_weight.mul_(1.5),
        "a part of the weights": lambda mha, key: mha.in_proj_weight[-E:].add_(1.0),
        "bias": lambda mha, key: mha.in_proj_bias.add_(1.0),
        "output": lambda mha, key: mha.out_proj.weight.mul_(2.0),
        "loading": lambda mha, key: mha.load_state_dict(nn.MultiheadAttention(E, H).state_dict()),
        "another parameter": lambda mha, key: setattr(mha, "in_proj_weight", nn.Parameter(torch.randn(3 * E, E))),
        "weights through .data": lambda mha, key: setattr(mha.in_proj_weight, "data", torch.randn(3 * E, E)),
        "moved memory": lambda mha, key: key.set_(torch.randn(Z, M, E)),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_kept_is_never_stale(plans_for_all, edit, plan):
    mha, own, _, query, key = steps(plans_for_all, plan)
    agree(mha, own, query, key)
    with torch.no_grad():
        edit[1](mha, key)
    agree(mha, own, query, key)
    agree(mha, own, query, key)


@pytest.mark.slow  # the first step of an optimizer in a process imports for seconds
@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_is_seen(plans_for_all, fused):
    mha, own, _, query, key = steps(plans_for_all)
    optimizer = torch.optim.AdamW(mha.parameters(), lr=0.5, fused=fused)
    for _ in range(2):
        mha(query, key, key)[0].sum().backward()
        optimizer.step()
        agree(mha, own, query, key)
        agree(mha, own, query, key)


def test_another_memory_at_the_same_address_is_another(plans_for_all):
    mha, own, _, query, _ = steps(plans_for_all)
    storage = torch.randn(Z * M * E)
    for _ in range(4):  # each has the address and the version of the one before
        storage = storage.detach() + 1.0
        agree(mha, own, query, torch.from_numpy(storage.numpy()).view(Z, M, E))
    for _ in range(6):
        key = torch.randn(Z, M, E)
        agree(mha, own, query, key)
        agree(mha, own, query, key)
        del key


def test_a_memory_of_inference_mode_is_compared_by_its_numbers(plans_for_all):
    mha, own, changes, query, _ = steps(plans_for_all)
    before = kept_reads(changes)
    with torch.inference_mode():
        key = torch.randn(Z, M, E)
        for _ in range(3):
            agree(mha, own, query, key)
        assert kept_reads(changes) == before + 2
        key[0, 0, 0] += 1.0
        agree(mha, own, query, key)
        own_out = mha(query, key, key, need_weights=False)[0]
    agree(mha, own, query, key.clone())
    assert own_out.is_inference()


def test_modes_do_not_share_what_is_kept(plans_for_all):
    mha, own, _, query, key = steps(plans_for_all)
    with torch.inference_mode():
        for _ in range(3):
            agree(mha, own, query, key)
    leaf = query.clone().requires_grad_()
    mha(leaf, key, key)[0].sum().backward()
    own(query.clone(), key, key)[0].sum().backward()
    assert leaf.grad is not None
    assert_close(mha.in_proj_weight.grad, own.in_proj_weight.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for _ in range(3):
            assert mha(query, key, key, need_weights=False)[0].dtype == torch.bfloat16
    agree(mha, own, query, key)


def test_nothing_is_kept_of_a_memory_that_is_gone(plans_for_all):
    _, _, changes, _, key = steps(plans_for_all)
    (reader,) = changes._replacements[0].what.plans
    assert reader._kept._last is not None
    del key
    assert reader._kept._last is None


def test_a_frozen_module_keeps_its_memory_while_queries_are_trained(plans_for_all):
    mha, query, key, _ = mha_and_inputs(torch.float32)
    mha.requires_grad_(False)
    own, changes = copy.deepcopy(mha), speed_up(mha)
    for _ in range(4):
        leaves = [query.clone().requires_grad_() for _ in range(2)]
        for module, leaf in zip((mha, own), leaves, strict=True):
            module(leaf, key, key, need_weights=False)[0].square().sum().backward()
        assert_close(leaves[0].grad, leaves[1].grad)
    assert kept_reads(changes) == 3


def test_edits_without_a_trace_are_told_by_forget(plans_for_all):
    mha, own, changes, query, key = steps(plans_for_all)
    key.data.mul_(2.0)
    changes.forget()
    agree(mha, own, query, key)


def test_half_precision_and_its_memory(plans_for_all):
    mha, query, key, _ = mha_and_inputs(torch.float32)
    exact, own = copy.deepcopy(mha).double(), copy.deepcopy(mha).bfloat16()
    mha.bfloat16()
    query, key = query.bfloat16(), key.bfloat16()
    exact.load_state_dict({name: w.double() for name, w in own.state_dict().items()})
    expected = exact(query.double(), key.double(), key.double())[0]
    with speed_up(mha), torch.no_grad():
        allowed = 2 * (own(query, key, key, need_weights=False)[0].double() - expected).abs().amax()
        for _ in range(3):
            assert (mha(query, key, key, need_weights=False)[0].double() - expected).abs().amax() <= allowed


def test_a_memory_of_inference_mode_is_kept_where_the_batch_comes_second(plans_for_all):
    plans_for_all(Plan("head", "head"))
    mha = nn.MultiheadAttention(E, H)
    own, changes = copy.deepcopy(mha), speed_up(mha)
    with torch.inference_mode():
        query, key = torch.randn(N, Z, E), torch.randn(M, Z, E)
        for _ in range(3):
            agree(mha, own, query, key)
        assert kept_reads(changes) == 2
        key[0, 0, 0] += 1.0
        agree(mha, own, query, key)


@pytest.mark.parametrize(
    "plan", [Plan("head", "context"), Plan("context", "output", "explicit"), Plan("context", "head", "blocked")], ids=str
)
def test_what_is_kept_by_a_mixed_plan_keeps_no_memory_alive(plans_for_all, plan):
    mha, own, changes, query, key = steps(plans_for_all, plan)
    agree(mha, own, query, key)
    (reader,) = (plans for one in changes._replacements for plans in one.what.plans)
    assert reader._kept._last is not None
    gone = weakref.ref(key)
    del key
    assert gone() is None and reader._kept._last is None


def test_no_weights_are_held_after_forgetting_or_undoing(plans_for_all):
    for end in ("forget", "undo"):
        mha, own, changes, query, key = steps(plans_for_all)
        agree(mha, own, query, key)
        gone = weakref.ref(mha.in_proj_weight)
        mha.in_proj_weight = nn.Parameter(torch.randn(3 * E, E))
        getattr(changes, end)()
        assert gone() is None
        agree(mha, own, query, key)


def test_calls_that_gain_nothing_are_left_to_the_module_until_a_memory_comes_again(plans_for_all):
    plans_for_all(Plan("head", "head"))
    for batch_first in (True, False):
        mha = nn.MultiheadAttention(E, H, batch_first=batch_first)
        own, changes = copy.deepcopy(mha), speed_up(mha)
        (reader,) = (plans for one in changes._replacements for plans in one.what.plans)
        shape = (Z, M, E) if batch_first else (M, Z, E)
        query, keys = torch.randn(Z, N, E) if batch_first else torch.randn(N, Z, E), [torch.randn(shape) for _ in range(3)]
        with torch.no_grad():
            for key in (*keys, *keys):
                assert torch.equal(mha(query, key, key, need_weights=False)[0], own(query, key, key, need_weights=False)[0])
            assert kept_reads(changes) == 0 and not reader._ran
            reader.read = Mock(side_effect=reader.read)
            mha(query, keys[0], keys[0], need_weights=False)
            assert reader.read.call_count == 0
            for _ in range(2):
                agree(mha, own, query, keys[0])
            assert reader.read.call_count == kept_reads(changes) == 2
            for _ in range(2):  # written to before each call, it is another one each time
                agree(mha, own, query, keys[0].mul_(1.5))
            assert kept_reads(changes) == 2
