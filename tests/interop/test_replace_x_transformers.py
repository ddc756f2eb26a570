import copy
import re

import pytest
import torch

from crossattention import speed_up
from crossattention.plan import Plan
from tolerances import assert_close

x_transformers = pytest.importorskip("x_transformers", reason='needs x-transformers; pip install "crossattention[peers]"')

OPTIONS = {
    "plain": {},
    "flash": {"attn_flash": True},
    "grouped": {"attn_kv_heads": 2},
    "grouped flash": {"attn_kv_heads": 3, "attn_flash": True},
    "one key head": {"attn_one_kv_head": True},
    "another context": {"cross_attn_dim_context": 20},
    "value width": {"attn_value_dim_head": 5},
}
PLANS = [None, Plan(), Plan("context", "context"), Plan("query", "output"), Plan("context", "head", "explicit")]


def stack(kind="Decoder", **options):
    options = {"attn_dim_head": 4, "heads": 6, "dim": 24, "depth": 2} | options
    if kind == "Decoder":
        options["cross_attend"] = True
    return getattr(x_transformers, kind)(**options).eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_stack_gives_the_same(plans_for_all, options, plan):
    plans_for_all(plan)
    model = stack(**options)
    own, x = copy.deepcopy(model), torch.randn(2, 5, 24)
    context, mask = torch.randn(2, 9, options.get("cross_attn_dim_context", 24)), torch.rand(2, 9) > 0.4
    mask[:, 0] = True
    given = {"context": context, "context_mask": mask, "mask": torch.arange(5).expand(2, 5) < torch.tensor([[5], [3]])}
    with speed_up(model, example={"x": x} | given) as changes:
        assert len(changes.replaced) == 2 and all("own sequence" in left.why for left in changes.left)
        out = model(x, **given)
        assert_close(out, own(x, **given))
        out.square().sum().backward()
        own(x, **given).square().sum().backward()
        for p, q in zip(model.parameters(), own.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            for _ in range(3):
                assert_close(model(x, **given), own(x, **given))


@pytest.mark.parametrize("flash", [True, False])
def test_intermediates_and_caches_are_the_modules_own(plans_for_all, flash):
    plans_for_all(Plan("context", "context"))
    model = stack(attn_kv_heads=2, attn_flash=flash)
    own, x, context = copy.deepcopy(model), torch.randn(2, 5, 24), torch.randn(2, 9, 24)
    with speed_up(model), torch.no_grad():
        _, ours = model(x, context=context, return_hiddens=True)
        _, theirs = own(x, context=context, return_hiddens=True)
        for one, other in zip(ours.attn_intermediates, theirs.attn_intermediates, strict=True):
            assert one.layer_type == other.layer_type
            for name in ("qk_similarities", "pre_softmax_attn", "post_softmax_attn", "values"):
                assert (getattr(one, name) is None) == (getattr(other, name) is None)
                if getattr(other, name) is not None:
                    assert_close(getattr(one, name), getattr(other, name))
        more = torch.cat((x, torch.randn(2, 1, 24)), 1)
        assert_close(model(more, context=context, cache=ours), own(more, context=context, cache=theirs))


def test_a_cross_attender_keeps_its_context(plans_for_all):
    plans_for_all(None)
    model = stack("CrossAttender")
    own, context = copy.deepcopy(model), torch.randn(2, 9, 24)
    with speed_up(model) as changes, torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 3, 24)
            assert_close(model(x, context=context), own(x, context=context))
        assert "(kept)" in str(changes)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attn_qk_norm": True}, "qk_norm"),
        ({"attn_gate_values": True}, "to_v_gate"),
        ({"attn_num_mem_kv": 2}, "num_mem_kv"),
        ({"attn_sparse_topk": 2}, "sparse_topk"),
        ({"attn_softclamp_logits": True}, "softclamp_logits"),
        ({"attn_pre_talking_heads": True}, "pre_softmax_talking_heads"),
        ({"attn_on_attn": True}, "to_out|Sequential|attn_on_attn"),
        ({"attn_head_scale": True}, "head_scale"),
        ({"attn_laser": True}, "laser"),
        ({"cross_residual_attn": True}, "hands scores or values"),
    ],
)
def test_options_that_change_attention_are_left(options, why):
    changes = speed_up(stack(**options))
    assert changes.replaced == ()
    assert any(re.search(why, left.why) for left in changes.left)
