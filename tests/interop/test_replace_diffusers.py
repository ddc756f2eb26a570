import copy

import pytest
import torch

from crossattention import speed_up
from crossattention.plan import Plan
from tolerances import assert_close

processors = pytest.importorskip(
    "diffusers.models.attention_processor", reason="needs diffusers, which no extra brings; pip install diffusers"
)

OPTIONS = {
    "plain": {},
    "biases": {"bias": True},
    "another width": {"out_dim": 18},
    "norms": {"qk_norm": "layer_norm"},
    "picture": {"norm_num_groups": 3, "residual_connection": True, "rescale_output_factor": 2.0},
}
PLANS = [None, Plan(), Plan("query", "output"), Plan("context", "context"), Plan("head", "output")]


@pytest.mark.parametrize("processor", [processors.AttnProcessor2_0, processors.AttnProcessor])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_text_is_read_as_by_the_module_itself(plans_for_all, options, plan, processor):
    if options.get("qk_norm") and plan is not None:
        plan = Plan("head", plan.values)
    plans_for_all(plan)
    module = processors.Attention(12, cross_attention_dim=20, heads=3, dim_head=6, processor=processor(), **options).double()
    own, text = copy.deepcopy(module), torch.randn(2, 7, 20, dtype=torch.float64)
    rows = (2, 12, 5, 6) if options.get("norm_num_groups") else (2, 30, 12)
    padding = torch.zeros(2, 1, 7, dtype=torch.float64).masked_fill(torch.rand(2, 1, 7) > 0.6, -10000.0)
    with speed_up(module, example=(torch.randn(rows, dtype=torch.float64), text)) as changes:
        for mask in (None, padding):
            for _ in range(3):
                x = torch.randn(rows, dtype=torch.float64)
                with torch.no_grad():
                    assert_close(module(x, text, attention_mask=mask), own(x, text, attention_mask=mask))
        assert "(kept)" in str(changes) or plan == Plan("context", "context")
        leaves = [(torch.randn(rows, dtype=torch.float64), text)] * 2
        for one, given in zip((module, own), leaves, strict=True):
            one(*given).square().sum().backward()
    for (name, p), q in zip(module.named_parameters(), own.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_close(p.grad, q.grad)


def test_self_attention_and_other_processors_run_their_own_code(plans_for_all):
    plans_for_all(Plan("query", "output"))
    module = processors.Attention(12, cross_attention_dim=20, heads=3, dim_head=6)
    x, text = torch.randn(2, 30, 12), torch.randn(2, 7, 20)
    own = copy.deepcopy(module)
    with speed_up(module) as changes:
        module.set_processor(processors.AttnProcessor())
        assert_close(module(x, text), own(x, text))
        assert "none has run yet" in str(changes)
    (left,) = speed_up(processors.Attention(12, heads=3, dim_head=6)).left
    assert "self-attention" in left.why
    normed = processors.Attention(12, cross_attention_dim=20, heads=3, dim_head=6, cross_attention_norm="layer_norm")
    assert "a norm stands between the context and its projections" in speed_up(normed).left[0].why
