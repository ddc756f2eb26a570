"""Somebody else's attention on its own projections: those of now, hooks and adapters included, whatever is kept of a context."""

import pytest
import torch
from torch import nn

from crossattention import CrossAttention
from crossattention.interop.borrowing import Borrowing
from crossattention.interop.reader import Reader
from crossattention.plan import Plan
from tolerances import assert_close


class Owner(nn.Module):
    """Four projections, as other libraries' attention modules have them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, 12, dtype=torch.float64) for width in (10, 14, 14))
        self.o = nn.Linear(12, 10, dtype=torch.float64)

    def forward(self, a, b):
        q, k, v = (part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part, x in ((self.q, a), (self.k, b), (self.v, b)))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def reader_of(owner: Owner) -> Reader:
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}
    return Reader(owner, Borrowing(10, 14, 3, 4, projections=lambda: {ours: owner._modules[name] for ours, name in names.items()}))


@pytest.mark.parametrize("plan", [Plan(), Plan("query", "output"), Plan("context", "context"), Plan("head", "context")], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "o"])
@torch.no_grad()
def test_a_projection_that_takes_another_s_place_is_the_one_that_runs(plans_for_all, plan, name):
    plans_for_all(plan)
    owner, a, b = Owner(), *(torch.randn(2, n, width, dtype=torch.float64) for n, width in ((5, 10), (7, 14)))
    reader = reader_of(owner)
    for _ in range(3):
        assert_close(reader.read(a, b, must=True).out, owner(a, b))
    before = getattr(owner, name)
    setattr(owner, name, nn.Linear(before.in_features, before.out_features, dtype=torch.float64))
    for _ in range(3):
        assert_close(reader.read(a, b, must=True).out, owner(a, b))


@pytest.mark.parametrize("name", ["k", "v"])
@torch.no_grad()
def test_a_hook_on_a_projection_sees_every_call_also_where_a_context_arrives_again(name):
    owner, a, b = Owner(), *(torch.randn(2, n, width, dtype=torch.float64) for n, width in ((5, 10), (7, 14)))
    reader, seen = reader_of(owner), []
    for _ in range(3):
        reader.read(a, b, must=True)
    handle = getattr(owner, name).register_forward_hook(lambda _, args, out: seen.append(1) or out * 2)
    for _ in range(3):
        assert_close(reader.read(a, b, must=True).out, owner(a, b))
    assert len(seen) == 6  # of both
    handle.remove()
    for _ in range(3):
        assert_close(reader.read(a, b, must=True).out, owner(a, b))


def test_a_pass_that_a_checkpoint_repeats_keeps_nothing_of_a_frozen_context():
    owner, b = Owner().requires_grad_(False), torch.randn(2, 7, 14, dtype=torch.float64)
    reader = reader_of(owner)
    a = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        read = torch.utils.checkpoint.checkpoint(lambda x: reader.read(x, b, must=True).out, a, use_reentrant=False)
        found, wanted = (torch.autograd.grad(out.square().sum(), a)[0] for out in (read, owner(a, b)))
        assert_close(found, wanted)
    assert "(kept)" not in "".join(reader.describe())


@pytest.mark.parametrize("kernel", ["explicit", "fused"])
@pytest.mark.parametrize("batch", [1, 3])
def test_learned_queries_that_are_read_without_a_graph_stay_what_they_are(kernel, batch):
    layer = CrossAttention(12, 20, heads=3, plan=Plan("context", "context", kernel)).double().eval()
    a, b = torch.randn(4, 12, dtype=torch.float64), torch.randn(batch, 40, 20, dtype=torch.float64)
    expected = layer(a, b)
    with torch.no_grad():
        queries = layer.prepare_queries(a, space="context")
        for _ in range(2):
            assert_close(layer.attend(queries, layer.prepare(b, uses=1, query_length=4)), expected, dtype=torch.float64)
        assert_close(layer(a.expand(batch, -1, -1), b), expected, dtype=torch.float64)
