"""Compiled with a pinned plan, a layer is compiled once or twice for any number of lengths; and which operators its graphs hold."""

import random

import pytest
import torch
from torch.export import Dim

from crossattention import CrossAttention, Plan
from crossattention.plan import speeds, speeds_of
from crossattention.plan.plans import KERNELS

pytestmark = pytest.mark.slow

SPACES = (("head", "head"), ("context", "context"), ("query", "output"))
PLANS = [Plan(*spaces, kernel) for spaces in SPACES for kernel in KERNELS]
QUERY_DIM, CONTEXT_DIM = 64, 96  # 64 x 96 weights are large enough for the operator of ours
BATCH = 3
HAS_QUICK = "no product goes to oneDNN on this processor"


class Compiled:
    """A layer with a pinned plan, compiled by a backend that counts the graphs and runs them as they are."""

    def __init__(self, plan, dynamic, kv_heads=None):
        torch._dynamo.reset()
        self.layer = CrossAttention(QUERY_DIM, CONTEXT_DIM, heads=4, kv_heads=kv_heads, plan=plan)
        self.graphs = []
        self.run = torch.compile(self.layer, fullgraph=True, dynamic=dynamic, backend=self._count)

    def _count(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph

    @torch.no_grad()
    def agrees(self, n, m, *, learned=False):
        a, b = inputs(n, m)
        a = a[0] if learned else a
        torch.testing.assert_close(self.run(a, b), self.layer(a, b), atol=1e-5, rtol=1e-5)

    def operators(self):
        """Names of the library's own operators in the last graph."""
        return own_operators(self.graphs[-1].graph)


def inputs(n, m):
    return torch.randn(BATCH, n, QUERY_DIM), torch.randn(BATCH, m, CONTEXT_DIM)


def own_operators(graph):
    targets = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    return {target.split(".")[1] for target in targets if target.startswith("crossattention.")}


def fifty_lengths(*first):
    """Fifty different pairs n, m of 2 or more, the given ones first."""
    generator, pairs = random.Random(0), list(first)
    while len(pairs) < 50:
        pair = generator.randint(2, 60), generator.randint(2, 60)
        if pair not in pairs:
            pairs.append(pair)
    return pairs


@pytest.fixture(autouse=True)
def known_speeds():
    """The configuration is read before anything is traced."""
    speeds_of("cpu", "float32")
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_with_dynamic_shapes_fifty_lengths_compile_once(plan):
    compiled = Compiled(plan, dynamic=True)
    for n, m in fifty_lengths((5, 9)):
        compiled.agrees(n, m)
    assert len(compiled.graphs) == 1


@pytest.mark.parametrize("first", [(7, 7), (BATCH, 9), (9, BATCH), (QUERY_DIM, 9), (9, CONTEXT_DIM), (2, 2)], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_first_lengths_that_equal_another_size_cost_one_more_compilation(plan, first):
    """torch takes sizes that are equal when it first sees them for one size, and compiles again when they differ."""
    compiled = Compiled(plan, dynamic=True)
    for n, m in [first, (4, 11), (12, 8), (40, 2)]:
        compiled.agrees(n, m)
    assert len(compiled.graphs) <= 2


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_by_default_fifty_lengths_compile_twice(plan):
    """Once for the first sizes alone, once for all."""
    compiled = Compiled(plan, dynamic=None)
    for n, m in fifty_lengths((5, 9), (6, 10)):
        compiled.agrees(n, m)
    assert len(compiled.graphs) == 2


def test_by_default_lengths_that_begin_to_vary_one_after_the_other_compile_three_times():
    """torch holds a size fixed until it sees it differ."""
    compiled = Compiled(Plan("head", "head"), dynamic=None)
    for n, m in [(5, 9), (5, 10), *fifty_lengths((6, 10))]:
        compiled.agrees(n, m)
    assert len(compiled.graphs) == 3


def test_a_layer_compiles_in_a_process_that_has_planned_nothing_yet(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv(speeds.CONFIG_VARIABLE, raising=False)
    monkeypatch.setattr(speeds, "_in_use", {})
    monkeypatch.setattr(speeds, "_reads_config", True)
    Compiled(Plan("head", "head"), dynamic=True).agrees(5, 9)


@pytest.mark.parametrize("spaces", SPACES, ids="+".join)
def test_the_blocked_kernel_is_an_operator_of_the_graph(spaces):
    compiled = Compiled(Plan(*spaces, "blocked"), dynamic=True)
    compiled.agrees(5, 9)
    assert "attend_blocks" in compiled.operators()


@pytest.mark.skipif(speeds_of("cpu", "float32").quick_from == float("inf"), reason=HAS_QUICK)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_projections_of_a_large_layer_are_operators_of_the_graph(plan):
    compiled = Compiled(plan, dynamic=True)
    compiled.agrees(5, 9)
    assert "linear" in compiled.operators()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_where_sizes_are_fixed_and_small_projections_are_torch_s_own(plan):
    """The operator takes longer to ask how large a product is than a small one takes."""
    compiled = Compiled(plan, dynamic=False)
    compiled.agrees(5, 9)
    assert "linear" not in compiled.operators()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("spaces", [("head", "head"), ("context", "context")], ids="+".join)
def test_queries_that_a_batch_shares_go_to_the_fused_kernel_as_they_are(spaces, kv_heads):
    """torch's compiler would write them out for each item."""
    compiled = Compiled(Plan(*spaces), dynamic=True, kv_heads=kv_heads)
    compiled.agrees(5, 9, learned=True)
    assert "attend_shared" in compiled.operators()
    for n, m in ((4, 11), (12, 8)):
        compiled.agrees(n, m, learned=True)
    assert len(compiled.graphs) == 1
    compiled.agrees(5, 9)
    assert "attend_shared" not in compiled.operators()  # of its own queries each item


def test_shared_queries_that_are_trained_compile_with_their_gradients():
    compiled = Compiled(Plan("head", "head"), dynamic=True)
    queries, b = torch.randn(5, QUERY_DIM, requires_grad=True), torch.randn(BATCH, 9, CONTEXT_DIM)
    gradients = [torch.autograd.grad(run(queries, b).square().sum(), queries)[0] for run in (compiled.run, compiled.layer)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert "attend_shared" not in compiled.operators()


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("trains", [False, True], ids=["no_grad", "grad"])
def test_an_exported_program_holds_torch_s_operators_alone(plan, trains):
    """It must run where this library is not installed."""
    layer = CrossAttention(QUERY_DIM, CONTEXT_DIM, heads=4, plan=plan)
    shapes = {"a": {1: Dim("n")}, "b": {1: Dim("m")}}
    with torch.set_grad_enabled(trains):
        program = torch.export.export(layer, inputs(5, 9), dynamic_shapes=shapes)
    assert own_operators(program.graph) == set()
    assert "crossattention" not in str(program.graph)
    with torch.no_grad():
        for n, m in ((2, 3), (17, 40)):
            a, b = inputs(n, m)
            torch.testing.assert_close(program.module()(a, b), layer(a, b), atol=1e-5, rtol=1e-5)
