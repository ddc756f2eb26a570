"""The planner's choice holds no more memory than the textbook's plan, forward and backward, as torch's allocator counts it."""

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from crossattention import CrossAttention
from crossattention.plan.choose import SPARE_BYTES

pytestmark = pytest.mark.slow

WORK = {  # batch, n, m, query width, context width, heads
    "a class token": (8, 1, 401, 384, 384, 6),
    "one query": (1, 1, 20_000, 256, 256, 8),
    "latents": (1, 32, 4096, 512, 512, 8),
    "a long context of one head": (1, 256, 8192, 512, 261, 1),
    "a short context": (1, 1024, 16, 640, 768, 10),
    "a very short context": (2, 2048, 4, 320, 768, 8),
    "like lengths": (2, 300, 280, 256, 320, 4),
    "wide heads": (4, 3477, 23, 108, 214, 1),
}


def most_held(call):
    """Bytes that the tensors which a call makes hold at once, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", WORK)
def test_the_choice_holds_no_more_than_the_textbook_s_plan(name, trains):
    batch, n, m, query_dim, context_dim, heads = WORK[name]
    layer = CrossAttention(query_dim, context_dim, heads=heads)
    a = torch.randn(batch, n, query_dim, requires_grad=trains)
    b = torch.randn(batch, m, context_dim, requires_grad=trains)

    def run():
        with torch.set_grad_enabled(trains):
            out = layer(a, b)
        if trains:
            out.sum().backward()
            for leaf in (a, b, *layer.parameters()):
                leaf.grad = None

    held = {}
    for plan in ("textbook", "auto"):
        layer.plan = plan
        run()
        held[plan] = most_held(run)
    assert held["textbook"] > 0
    assert held["auto"] <= held["textbook"] + SPARE_BYTES, f"{layer.plan_for(a.shape, b.shape, trains=trains).plan}: {held}"
