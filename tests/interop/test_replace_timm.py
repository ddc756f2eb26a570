import copy

import pytest
import timm
import torch
from timm.layers import AttentionPoolLatent
from timm.models.cait import ClassAttn
from timm.models.crossvit import CrossAttention
from torch import nn

from crossattention import record_attention, speed_up
from crossattention.plan import Plan
from tolerances import assert_close

POOLS = {
    "plain": {},
    "norms": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "no query projection": {"q_proj": False},
    "mean of latents": {"latent_len": 3, "pool_type": "avg"},
    "all latents": {"latent_len": 3, "pool_type": "", "latent_dim": 20},
    "no output": {"out_features": 0},
    "positions": {"pos_embed": "abs", "feat_size": 11},
    "no bias": {"qkv_bias": False, "out_features": 8},
}
PLANS = [
    Plan(),
    Plan("context", "context"),
    Plan("context", "context", "explicit"),
    Plan("query", "output"),
    Plan("context", "head"),
]


def both_ways(module, *inputs, **given):
    """Output, gradients of the inputs and of the parameters, by the module itself and by plans."""
    module.zero_grad()
    own, results = copy.deepcopy(module), []
    with speed_up(module):
        for one in (own, module):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = one(*leaves, **given)
            (out * torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
            gradients = [p.grad for p in one.parameters()]
            results.append([out, *(leaf.grad for leaf in leaves), *(g for g in gradients if g is not None)])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_attention_pooling(plans_for_all, options, plan):
    if options.get("qk_norm") and plan.scores != "head":
        plan = Plan("head", plan.values if plan.values != "output" else "context")
    if (options.get("q_proj") is False and plan.scores == "query") or (
        options.get("out_features") == 0 and plan.values == "output"
    ):
        plan = Plan("context", "head")
    plans_for_all(plan)
    pool = AttentionPoolLatent(12, num_heads=3, dtype=torch.float64, **options)
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    both_ways(pool, x)
    mask = torch.rand(2, 1, 1, 11) > 0.4
    mask[..., 0] = True
    both_ways(pool, x, attn_mask=mask)
    own = copy.deepcopy(pool)
    with speed_up(pool), torch.no_grad():
        for _ in range(2):
            assert_close(pool(x), own(x))
            pool.latent.mul_(2.0), own.latent.mul_(2.0)
            pool.kv.weight.mul_(2.0), own.kv.weight.mul_(2.0)


def test_the_planner_pools(plans_for_all):
    plans_for_all(None)
    pool = AttentionPoolLatent(64, num_heads=2, norm_layer=nn.LayerNorm)
    with speed_up(pool, example=torch.randn(2, 400, 64)) as changes:
        assert "context+context" in str(changes) and "1 replaced methods ran" in changes.checked


def test_a_hook_on_the_packed_projection_runs(plans_for_all):
    plans_for_all(Plan("context", "context"))
    pool, seen = AttentionPoolLatent(12, num_heads=3), []
    with speed_up(pool):
        pool(torch.randn(2, 11, 12))
        pool.kv.register_forward_hook(lambda *args: seen.append(1))
        pool(torch.randn(2, 11, 12))
    assert seen == [1]


@pytest.mark.parametrize("kind", [CrossAttention, ClassAttn])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_class_tokens(plans_for_all, kind, plan):
    plans_for_all(plan)
    module = kind(12, num_heads=3, qkv_bias=True).double()
    both_ways(module, torch.randn(2, 11, 12, dtype=torch.float64))


def test_a_class_token_trains_with_its_own_dropout(plans_for_all):
    plans_for_all(Plan("context", "context"))
    module, x = CrossAttention(12, num_heads=3, attn_drop=0.5), torch.randn(2, 11, 12)
    own = copy.deepcopy(module)
    with speed_up(module) as changes:
        torch.manual_seed(1)
        out = module(x)
        torch.manual_seed(1)
        assert torch.equal(out, own(x)) and "none has run yet" in str(changes)


def test_a_projection_that_is_hooked_is_called(plans_for_all):
    plans_for_all(None)
    module, seen, x = CrossAttention(12, num_heads=3), [], torch.randn(2, 11, 12)
    module.wk.register_forward_hook(lambda *args: seen.append(1))
    with speed_up(module, example=x):
        module(x)
    assert seen == [1, 1, 1]  # both ways of the example, and once


@pytest.mark.slow
def test_a_whole_crossvit(plans_for_all):
    plans_for_all(Plan("context", "context"))
    model, x = timm.create_model("crossvit_9_240").eval(), torch.randn(1, 3, 240, 240)
    with speed_up(model, example=x) as changes:
        assert changes.replaced and all("fusion" in name for name in changes.replaced)
        assert all("own sequence" in left.why for left in changes.left)
        with record_attention(model) as seen:
            model(x)
    assert len(seen.layers) == len(changes.replaced)
