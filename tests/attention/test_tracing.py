"""Graphs: compiled in one piece and exported with dynamic lengths, a layer gives what it gives eagerly."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from crossattention import CrossAttention, MemoryAttention, Plan, SelfAttention
from crossattention.layers import Rotary
from crossattention.plan import ALL_PLANS, CANDIDATES

LENGTHS = ((3, 5), (4, 9), (17, 2), (2, 33))


class Reader(nn.Module):
    """A model whose input is a prepared context."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, queries, prepared):
        return self.layer.attend(queries, prepared)


def inputs(n, m, z=2):
    mask = torch.rand(z, m) > 0.4
    mask[0] = False
    return torch.randn(z, n, 16), torch.randn(z, m, 24), mask


def same(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


SPACES = (("head", "head"), ("context", "context"), ("query", "output"))
"""Every space once; with one kernel each they are exported in the unit tier, all else in the slow one: half a second a plan."""
QUICK = [Plan(*spaces, kernel) for spaces, kernel in zip(SPACES, ("fused", "blocked", "explicit"), strict=True)]
EXPORTED = [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in CANDIDATES]


@pytest.mark.parametrize("plan", EXPORTED, ids=str)
def test_every_plan_exports_with_dynamic_batch_and_lengths(plan):
    layer = CrossAttention(16, 24, heads=4, kv_heads=2, plan=plan)
    a, b, mask = inputs(3, 5)
    z, n, m = Dim("z"), Dim("n"), Dim("m")
    program = torch.export.export(
        layer,
        (a, b),
        kwargs={"context_mask": mask},
        dynamic_shapes={"a": {0: z, 1: n}, "b": {0: z, 1: m}, "context_mask": {0: z, 1: m}},
    ).module()
    for n_, m_ in LENGTHS:
        a, b, mask = inputs(n_, m_, z=3)
        same(program(a, b, context_mask=mask), layer(a, b, context_mask=mask))


def test_a_graph_runs_the_layer_s_own_plan_and_the_textbook_s_without_one():
    a, b, _ = inputs(2, 20000)
    layer = CrossAttention(16, 24, heads=4)
    assert layer.plan_for(a.shape, b.shape).plan.scores == "context"
    textbook = str(torch.export.export(layer, (a, b)).graph)
    layer.fix_plan(query_length=2, context_length=20000)
    fixed = str(torch.export.export(layer, (a, b)).graph)
    assert textbook.count("aten.linear") == 4 and fixed.count("aten.linear") == 2  # absorbed: B is not projected


def test_positions_export_for_any_batch_and_length_also_equal_ones():
    layer = CrossAttention(16, 24, heads=4, positions=Rotary())

    def positions(z, n, m):
        return {"query_positions": torch.randint(0, 50, (z, n)), "context_positions": torch.randint(0, 50, (z, m))}

    a, b, _ = inputs(3, 5)
    z, n, m = Dim("z"), Dim("n"), Dim("m")
    shapes = {"a": {0: z, 1: n}, "b": {0: z, 1: m}, "query_positions": {0: z, 1: n}, "context_positions": {0: z, 1: m}}
    program = torch.export.export(layer, (a, b), kwargs=positions(2, 3, 5), dynamic_shapes=shapes).module()
    for n_, m_ in ((3, 7), (4, 3), (3, 3)):
        a, b, _ = inputs(n_, m_, z=3)
        given = positions(3, n_, m_)
        same(program(a, b, **given), layer(a, b, **given))


@pytest.mark.parametrize("plan", [ALL_PLANS[0], ALL_PLANS[4], Plan("query", "output", "explicit")], ids=str)
def test_attend_exports_with_a_prepared_context_as_input(plan):
    layer = CrossAttention(16, 24, heads=4, plan=plan)
    a, b, mask = inputs(3, 5)
    with torch.no_grad():
        example = layer.prepare(b, context_mask=mask)
    program = torch.export.export(Reader(layer), (a, example)).module()
    a, b, mask = inputs(3, 5)
    prepared = layer.prepare(b, context_mask=mask)
    same(program(a, prepared), layer.attend(a, prepared))


@pytest.mark.slow
@pytest.mark.parametrize("plan", CANDIDATES, ids=str)
def test_every_plan_compiles_in_one_graph_for_many_lengths(plan):
    torch._dynamo.reset()
    layer = CrossAttention(16, 24, heads=4, plan=plan)
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph

    run = torch.compile(layer, fullgraph=True, dynamic=True, backend=counting)
    for n, m in LENGTHS:
        a, b, mask = inputs(n, m)
        same(run(a, b, context_mask=mask), layer(a, b, context_mask=mask))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("plan", [ALL_PLANS[0], ALL_PLANS[4], Plan("query", "output", "explicit")], ids=str)
def test_compiled_code_gives_the_same_values_and_gradients(plan):
    torch._dynamo.reset()
    layer = CrossAttention(16, 24, heads=4, plan=plan)
    run = torch.compile(layer, fullgraph=True, dynamic=True)
    for n, m in LENGTHS[:2]:
        a, b, mask = inputs(n, m)
        a.requires_grad_(), b.requires_grad_()
        found, wanted = run(a, b, context_mask=mask), layer(a, b, context_mask=mask)
        same(found, wanted)
        for grad, want in zip(*(torch.autograd.grad(out.square().sum(), (a, b)) for out in (found, wanted)), strict=True):
            same(grad, want)


@pytest.mark.slow
def test_compiled_attend_takes_a_prepared_context():
    torch._dynamo.reset()
    layer = CrossAttention(16, 24, heads=4)
    run = torch.compile(Reader(layer), fullgraph=True)
    for _ in range(2):
        a, b, mask = inputs(3, 5)
        with torch.no_grad():  # torch warns when an input of a graph is no leaf
            prepared = layer.prepare(b, context_mask=mask)
        same(run(a, prepared), layer.attend(a, prepared))


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_exports_with_a_dynamic_length(causal):
    layer = SelfAttention(16, heads=4, causal=causal)
    program = torch.export.export(layer, (torch.randn(2, 5, 16),), dynamic_shapes={"x": {1: Dim("n")}}).module()
    for n in (2, 9, 31):
        x = torch.randn(2, n, 16)
        same(program(x), layer(x))


def test_memory_attention_exports():
    memory = MemoryAttention(16, 32, heads=2)
    program = torch.export.export(memory, (torch.randn(2, 5, 16),), dynamic_shapes={"x": {1: Dim("n")}}).module()
    x = torch.randn(2, 9, 16)
    same(program(x), memory(x))
