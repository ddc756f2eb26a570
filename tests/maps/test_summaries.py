"""Summaries equal those of the full map, for every plan, mask, way of passing queries and way of cutting, and never hold it."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossattention import CrossAttention, attention_map
from crossattention.layers import ALiBi, QueryKeyRMSNorm, RelativeLogits, Rotary, T5Bias
from crossattention.maps import Aligned, Alignment, Argmax, Block, Entropy, Highlight, Rows, TopK, blocks, top
from crossattention.plan import CANDIDATES, Plan
from oracle import MASKS, A, B, H, K, M, N, Z, make_inputs, make_layer, make_masks, specification
from tolerances import assert_close

BLOCKS = (blocks.BLOCK_SCORES, 170, 40, 7)  # everything, an item or some of its heads, some rows of a head, one row
KEPT = (3, -5, 3)
ASKED = [kind(heads=heads) for kind in (Highlight, Entropy, Argmax, Alignment) for heads in ("each", "mean")]
ASKED += [kind(what, heads=heads) for kind, what in ((TopK, 3), (Rows, KEPT)) for heads in ("each", "mean")]
EACH = [summary for summary in ASKED if summary.heads == "each"]


def by_hand(summary: object, full: Tensor) -> tuple[Tensor, ...]:
    """What a summary should give, from the full weights (z, h, n, m) or (z, r, h, n, m)."""
    full = full.mean(-3) if summary.heads == "mean" else full
    if isinstance(summary, TopK):
        weights, positions = full.sort(dim=-1, descending=True, stable=True)
        return weights[..., : summary.k], positions[..., : summary.k]
    if isinstance(summary, Highlight):
        return (full.sum(-2),)
    if isinstance(summary, Entropy):
        return (-(full * full.clamp(min=1e-300).log()).sum(-1),)
    if isinstance(summary, Argmax):
        return (full.argmax(-1).masked_fill(full.sum(-1) == 0, -1),)
    if isinstance(summary, Rows):
        return (full[..., list(summary.queries), :],)
    raise AssertionError(f"nothing to compare {summary} with")


def check(results: list[object], full: Tensor, context_mask: Tensor | None = None, tolerance: float = 1e-10) -> None:
    """All of ASKED, or of EACH, against the full map."""
    for summary, result in zip(ASKED if len(results) == len(ASKED) else EACH, results, strict=True):
        if isinstance(summary, Alignment):
            check_paths(result, full.mean(-3) if summary.heads == "mean" else full, context_mask, tolerance)
            continue
        found = (result.weights, result.positions) if isinstance(summary, TopK) else (result,)
        for got, wanted in zip(found, by_hand(summary, full), strict=True):
            assert got.shape == wanted.shape and not got.requires_grad
            torch.testing.assert_close(got.to(wanted.dtype), wanted, atol=tolerance, rtol=tolerance)


def check_paths(path: Aligned, weights: Tensor, context_mask: Tensor | None, tolerance: float) -> None:
    """Each path is one, and costs what the cheapest costs cell by cell; of equally cheap ones any will do."""
    maps, (n, m) = weights.shape[:-2], weights.shape[-2:]
    assert path.first.shape == path.last.shape == (*maps, n) and path.cost.shape == maps
    for index in itertools.product(*map(range, maps)):
        real = list(range(m)) if context_mask is None else context_mask[index[0]].nonzero()[:, 0].tolist()
        first, last, cost = path.first[index].tolist(), path.last[index].tolist(), path.cost[index].item()
        if not real:
            assert set(first) == set(last) == {-1} and cost == 0
            continue
        costs = (1 - weights[index][:, real].double()).tolist()
        spans = [(real.index(one), real.index(other)) for one, other in zip(first, last, strict=True)]
        assert spans[0][0] == 0 and spans[-1][1] == len(real) - 1
        assert all(then[0] - now[1] in (0, 1) for now, then in itertools.pairwise(spans))
        assert sum(sum(row[one : other + 1]) for row, (one, other) in zip(costs, spans, strict=True)) == approx(cost, tolerance)
        assert least_cost(costs) == approx(cost, tolerance)


def approx(value: float, tolerance: float) -> object:
    return pytest.approx(value, abs=tolerance, rel=tolerance)


def least_cost(costs: list[list[float]]) -> float:
    """Dynamic time warping as it is written in books."""
    total: dict[tuple[int, int], float] = {}
    for i, j in itertools.product(range(len(costs)), range(len(costs[0]))):
        before = [total[cell] for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in total]
        total[i, j] = costs[i][j] + min(before, default=0.0)
    return total[len(costs) - 1, len(costs[0]) - 1]


def cut(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK_SCORES", scores)


@pytest.mark.parametrize("plan", [*CANDIDATES, "auto"], ids=str)
def test_every_plan_mask_and_cut_gives_the_full_map_s_summaries(monkeypatch, plan):
    layer = make_layer(plan)
    a, b = make_inputs()
    # Plans of the same scores share their ways through here: each takes every third pair of a mask and a cut.
    turns = range(len(MASKS)) if plan in ("auto", *CANDIDATES[:1]) else range(CANDIDATES.index(plan) % 3, len(MASKS), 3)
    for turn in turns:
        masks = make_masks(MASKS[turn])
        full = specification(layer, a, b, **masks)[1].detach()
        context_mask = masks.get("context_mask")
        cut(monkeypatch, BLOCKS[turn % len(BLOCKS)])
        check(attention_map(layer, a, b, ASKED, **masks), full, context_mask)
        check(attention_map(layer, a, b, EACH, **masks), full, context_mask)
        prepared = layer.prepare(b, context_mask=context_mask)
        cut(monkeypatch, BLOCKS[(turn + 1) % len(BLOCKS)])
        check(attention_map(layer, a, prepared, ASKED, attn_mask=masks.get("attn_mask")), full, context_mask)


@pytest.mark.parametrize("scores", [BLOCKS[0], *(pytest.param(block, marks=pytest.mark.slow) for block in BLOCKS[1:])])
@pytest.mark.parametrize("spaces", ["head", "context", "query"])
def test_every_cut_with_grouped_heads_repeats_and_learned_queries(monkeypatch, spaces, scores):
    cut(monkeypatch, scores)
    for kv_heads in (1, 2):
        layer = make_layer(Plan(spaces, "head"), kv_heads=kv_heads)
        _, b = make_inputs()
        learned = torch.randn(N, A, dtype=torch.float64)
        masks = make_masks("both")
        full = specification(layer, learned.expand(Z, N, A), b, **masks)[1].detach()
        for asked in (ASKED, EACH):
            check(attention_map(layer, learned, b, asked, **masks), full, masks["context_mask"])
        many = torch.randn(Z, 3, N, A, dtype=torch.float64)
        pairs = torch.rand(Z, 3, H, N, M) > 0.3
        each = [specification(layer, many[:, r], b, context_mask=masks["context_mask"], attn_mask=pairs[:, r])[1] for r in range(3)]
        full = torch.stack(each, 1).detach()
        for asked in (ASKED, EACH):
            found = attention_map(layer, many, b, asked, context_mask=masks["context_mask"], attn_mask=pairs)
            check(found, full, masks["context_mask"])
        shared = attention_map(layer, many, b, EACH, attn_mask=masks["attn_mask"][:, None, :1])
        each = [specification(layer, many[:, r], b, attn_mask=masks["attn_mask"][:, :1])[1] for r in range(3)]
        check(shared, torch.stack(each, 1).detach())


@pytest.mark.parametrize("scores", BLOCKS)
def test_position_parts_and_norms_are_in_the_maps(monkeypatch, scores):
    cut(monkeypatch, scores)
    b = torch.randn(Z, M, B, dtype=torch.float64)
    places = {"query_positions": torch.randint(0, 20, (Z, N)), "context_positions": torch.randint(0, 20, (Z, M))}
    parts = [
        {"positions": Rotary()},
        {"positions": ALiBi(H), "plan": Plan("query", "head")},
        {"positions": T5Bias(H), "plan": Plan("context", "head")},
        {"positions": RelativeLogits(6, H, K)},
        {"positions": RelativeLogits(6, H, K, max_distance=4), "qk_norm": QueryKeyRMSNorm(K)},
    ]
    for part in parts:
        layer = make_layer(**part).double()
        for a, at in ((torch.randn(Z, N, A), places), (torch.randn(Z, 3, N, A), places), (torch.randn(N, A), {})):
            full = attention_map(layer, a.double(), b, **at).detach()
            for asked in (ASKED, EACH):
                check(attention_map(layer, a.double(), b, asked, **at), full)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [c for c in CANDIDATES if c.kernel == "explicit" and c.values == "head"], ids=str)
def test_single_and_half_precision(monkeypatch, plan, dtype):
    """Against the full map of the same precision: weights are float32 in both."""
    a, b = make_inputs(11, 300, dtype=dtype)
    layer = make_layer(plan, dtype=dtype)
    full = attention_map(layer, a, b).detach()
    assert full.dtype == torch.float32
    for scores in (blocks.BLOCK_SCORES, 1000):
        cut(monkeypatch, scores)
        for asked in (ASKED, EACH):
            check(attention_map(layer, a, b, asked), full, tolerance=1e-6)


def test_under_autocast_rows_are_those_of_the_layer_s_precision():
    layer = make_layer("textbook", dtype=torch.float32)
    a, b = make_inputs(dtype=torch.float32)
    exact = attention_map(layer, a, b, [Rows(range(N))])[0]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        rows, _ = attention_map(layer, a, b, [Rows(range(N)), Highlight(heads="mean")])
        late = attention_map(layer, a, b, [Rows(range(N))])[0]
        mass = attention_map(layer, a, layer.prepare(b), [Highlight()])[0]
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones(Z, H, N))
    torch.testing.assert_close(mass, rows.sum(-2))
    torch.testing.assert_close(late, rows)
    assert 0 < (rows - exact).abs().max() < 0.1


def test_rows_that_may_attend_nothing_count_nothing():
    layer = make_layer()
    a, b = make_inputs()
    mask = torch.ones(Z, M, dtype=torch.bool)
    mask[0] = False
    best, mass, entropy, at, path = attention_map(
        layer, a, b, [TopK(3), Highlight(), Entropy(), Argmax(), Alignment()], context_mask=mask
    )
    assert not best.weights[0].any() and torch.equal(best.positions[0], torch.arange(3).expand(H, N, 3))
    assert not mass[0].any() and not entropy[0].any() and (at[0] == -1).all()
    assert (path.first[0] == -1).all() and (path.last[0] == -1).all() and path.cost[0] == 0
    torch.testing.assert_close(mass[1].sum(-1), torch.full((H,), float(N), dtype=torch.float64))
    assert (at[1] >= 0).all() and path.first[1, 0] == 0 and path.last[1, -1] == M - 1


def test_a_path_runs_through_the_positions_that_may_be_attended_alone():
    layer = make_layer()
    a, b = make_inputs()
    mask = torch.ones(Z, M, dtype=torch.bool)
    mask[0, [0, 3, 5, 6]] = False
    path = attention_map(layer, a, b, [Alignment()], context_mask=mask)[0]
    assert path.first[0, 0] == 1 and path.last[0, -1] == 4 and 3 not in path.first[0]
    alone = attention_map(layer, a[:1], b[:1, [1, 2, 4]], [Alignment()])[0]
    assert torch.equal(torch.tensor([1, 2, 4])[alone.first[0]], path.first[0])
    assert torch.equal(torch.tensor([1, 2, 4])[alone.last[0]], path.last[0])
    assert_close(path.cost[:1], alone.cost)


@pytest.mark.parametrize(("n", "m"), [(0, M), (N, 0), (0, 0)])
def test_empty_sides(n, m):
    layer = make_layer()
    a, b = make_inputs(n, m)
    best, mass, entropy, at, path = attention_map(layer, a, b, [TopK(3), Highlight(), Entropy(), Argmax(), Alignment(heads="each")])
    assert best.weights.shape == best.positions.shape == (Z, H, n, min(m, 3))
    assert mass.shape == (Z, H, m) and not mass.any()
    assert entropy.shape == (Z, H, n) and not entropy.any()
    assert at.shape == path.first.shape == path.last.shape == (Z, H, n) and path.cost.shape == (Z, H)
    if m == 0:
        assert (at == -1).all() and (path.first == -1).all() and (path.last == -1).all()
    assert at.dtype == best.positions.dtype == path.first.dtype == torch.int64
    none = attention_map(layer, a[:0], b[:0], [Highlight(), Highlight(heads="mean")])
    assert none[0].shape == (0, H, m) and none[1].shape == (0, m)


def test_a_context_shorter_than_k_gives_all_its_positions():
    layer = make_layer()
    a, b = make_inputs()
    best = attention_map(layer, a, b, [TopK(M + 5)])[0]
    assert best.weights.shape == (Z, H, N, M)
    torch.testing.assert_close(best.weights.sum(-1), torch.ones(Z, H, N, dtype=torch.float64))


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("plan", [Plan("head", "head"), Plan("context", "context"), Plan("query", "head")], ids=str)
def test_memory_is_one_block_and_not_the_pairs(plan):
    """Counted, not timed; of the whole map only bits are kept, for an alignment that is asked for."""
    n, m, h = 1500, 4000, 2
    layer = CrossAttention(8, 8, heads=h, plan=plan)
    a, b = torch.randn(1, n, 8), torch.randn(1, m, 8)
    full = h * n * m
    mask = torch.rand(1, m) > 0.1
    row = torch.rand(1, 1, n, 1) > 0.01  # broadcast pairs are cut before they are combined
    asked = [summary for summary in ASKED if not isinstance(summary, Alignment)]
    with Largest() as largest:
        attention_map(layer, a, b, asked, context_mask=mask, attn_mask=row)
    assert m <= largest.numbers <= blocks.BLOCK_SCORES < full / 5


def test_memory_with_a_position_part_is_one_block_of_all_heads():
    n, m, h = 1500, 1000, 4
    layer = CrossAttention(8, 8, heads=h, positions=ALiBi(h))
    with Largest() as largest:
        attention_map(layer, torch.randn(1, n, 8), torch.randn(1, m, 8), [TopK(8), Highlight()])
    assert largest.numbers <= blocks.BLOCK_SCORES < h * n * m


@pytest.mark.parametrize("kv_heads", [4, 8])
def test_of_a_raw_context_the_keys_of_all_heads_are_never_held_together(kv_heads):
    n, m, h, k = 8, 9000, 8, 64
    layer = CrossAttention(64, 16, heads=h, kv_heads=kv_heads, head_dim=k, plan=Plan("head", "head"))
    a, b = torch.randn(1, n, 64), torch.randn(1, m, 16)
    with Largest() as largest:
        attention_map(layer, a, b, [TopK(8), Highlight()])
    assert m * k <= largest.numbers < m * k * kv_heads
    adapted = CrossAttention(64, 16, heads=h, kv_heads=kv_heads, head_dim=k, plan=Plan("head", "head"))
    adapted.load_state_dict(layer.state_dict())
    adapted.k_proj.register_forward_hook(lambda module, args, out: out * 9)
    once = attention_map(adapted, a, b, [Highlight()])[0]  # what a hook does is in the keys
    torch.testing.assert_close(once, attention_map(adapted, a, b).sum(-2).detach(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(once, attention_map(layer, a, b, [Highlight()])[0], rtol=1e-2)


def test_one_query_of_a_long_context_reads_the_keys_of_one_head_at_a_time():
    m, h, k = 40_000, 8, 64
    layer = CrossAttention(64, 16, heads=h, head_dim=k, plan=Plan("head", "head"))
    prepared = layer.prepare(torch.randn(1, m, 16))
    seen = attention_map(layer, torch.randn(1, 1, 64), prepared, [Seen()])[0]
    assert [block.weights.shape for block in seen] == [(1, 1, 1, m)] * h


class Seen:
    """A summary as a user would write it."""

    def __init__(self, heads="each"):
        self.heads, self.blocks = heads, []

    def update(self, block):
        self.blocks.append(block)

    def result(self):
        return self.blocks


class Least:
    """One without `heads`: blocks of each head."""

    value = 1.0

    def update(self, block):
        self.value = min(self.value, block.weights.min().item())

    def result(self):
        return self.value


@pytest.mark.parametrize("scores", BLOCKS)
def test_a_user_s_own_summary_sees_every_row_once_and_where_it_stands(monkeypatch, scores):
    cut(monkeypatch, scores)
    layer = make_layer()
    a, b = make_inputs()
    mask = torch.rand(Z, M) > 0.3
    many = torch.randn(Z, 3, N, A, dtype=torch.float64)
    for queries in (a, many):
        full = attention_map(layer, queries, b, context_mask=mask).detach()
        each, mean, least = attention_map(layer, queries, b, [Seen(), Seen("mean"), Least()], context_mask=mask)
        assert least == full.min()
        for found, whole in ((each, full), (mean, full.mean(-3))):
            count = torch.zeros(whole.shape[:-1])
            for block in found:
                assert block.shape == whole.shape
                assert_close(block.weights, whole[block.place])
                assert torch.equal(block.context_mask, mask[block.place[0]])
                count[block.place] += 1
            assert (count == 1).all()
        alone = attention_map(layer, queries, b, [Seen()], context_mask=mask)[0]
        assert sum(block.weights.numel() for block in alone) == full.numel()


def test_blocks_hold_the_scores_they_may(monkeypatch):
    layer = CrossAttention(8, 8, heads=4)
    a, b = torch.randn(3, 70, 8), torch.randn(3, 50, 8)
    for scores in (50, 60, 1000, 3499, 3500, 10_000, 30_000, 1 << 20):
        cut(monkeypatch, scores)
        sizes = [block.weights.numel() for block in attention_map(layer, a, b, [Seen()])[0]]
        assert sum(sizes) == 3 * 4 * 70 * 50 and max(sizes) <= scores
        assert len(sizes) <= 1 + 4 * sum(sizes) / scores  # and not few of them


def test_the_objects_that_are_passed_stay_as_they_are_and_serve_again():
    layer = make_layer()
    a, b = make_inputs()
    mine, top3 = Seen(), TopK(3)
    first = attention_map(layer, a, b, [mine, top3])
    again = attention_map(layer, a, b, (mine, top3))
    assert mine.blocks == [] and len(first[0]) == len(again[0])
    assert torch.equal(first[1].weights, again[1].weights)
    with pytest.raises(ValueError, match="this TopK has seen no block"):
        top3.result()
    with pytest.raises(ValueError, match="this Highlight has seen no block"):
        Highlight().result()


def test_the_layer_s_output_is_the_same_to_the_bit_whether_or_not_maps_are_taken():
    for plan in ("auto", *CANDIDATES[::4]):
        layer = make_layer(plan, dtype=torch.float32, dropout=0.3).train()
        a, b = make_inputs(dtype=torch.float32)
        prepared = layer.prepare(b)

        def run(layer=layer, prepared=prepared, a=a, b=b, takes_maps=True):
            torch.manual_seed(3)
            first = layer(a, b)
            if takes_maps:
                attention_map(layer, a, b, ASKED)
                attention_map(layer, a, prepared, ASKED)
            return first, layer.attend(a, prepared), layer(a, b)

        for found, wanted in zip(run(), run(takes_maps=False), strict=True):
            assert torch.equal(found, wanted)
        assert layer.training


def test_of_a_raw_context_no_values_are_made():
    layer = CrossAttention(64, 64, heads=2, plan="textbook")
    layer.v_proj.forward = lambda b: pytest.fail("values were made")
    assert attention_map(layer, torch.randn(1, 3, 64), torch.randn(1, 9, 64), [Highlight()])[0].shape == (1, 2, 9)


@pytest.mark.parametrize(
    ("summaries", "error", "message"),
    [
        ([], ValueError, r"summaries is empty; name what to keep, as \[TopK\(8\)\]"),
        (TopK(3), TypeError, r"summaries must be a list such as \[TopK\(8\), Highlight\(\)\], got TopK; put it in a list"),
        (torch.ones(2), TypeError, "got a Tensor; masks are passed by name"),
        ([TopK], TypeError, "summaries holds the class TopK; make one of it"),
        ([TopK(3), torch.nn.ReLU()], TypeError, r"but ReLU has no update and no result; those of this library are in"),
        ([Seen("both")], ValueError, """the heads of a summary must be "each" or "mean", got 'both' from Seen"""),
        ([Rows([0, 5])], ValueError, "Rows asks for query 5, but there are 5 queries; indices go from -5 to 4"),
        ([Rows([-6])], ValueError, "Rows asks for query -6, but there are 5 queries"),
    ],
)
def test_what_is_no_summary_is_refused(summaries, error, message):
    a, b = make_inputs()
    with pytest.raises(error, match=message):
        attention_map(make_layer(), a, b, summaries)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopK(0), ValueError, "TopK keeps at least 1 position, got k=0"),
        (lambda: TopK(-3), ValueError, "got k=-3"),
        (lambda: TopK(2.0), TypeError, r"TopK expects a number of positions, got float 2.0; write TopK\(8\)"),
        (lambda: TopK(True), TypeError, "got bool True"),
        (lambda: Entropy(heads="all"), ValueError, """heads must be "each" or "mean", got 'all'"""),
        (lambda: Rows([]), ValueError, "Rows expects at least one query, got none"),
        (lambda: Rows([1, 0.5]), TypeError, "got float 0.5"),
        (lambda: Rows([1, None]), TypeError, "got NoneType None"),
        (lambda: Rows([True]), TypeError, "got bool True"),
        (lambda: Rows(3), TypeError, r"got int 3; write Rows\(\[0\]\) for the first alone"),
        (lambda: Rows(torch.tensor(0)), TypeError, "got int 0"),
    ],
)
def test_a_summary_that_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_numpy_s_integers_are_integers():
    top, rows = TopK(np.int64(3)), Rows(np.arange(2))
    assert (type(top.k), top.k, rows.queries) == (int, 3, (0, 1))


def test_bad_calls_are_refused_as_the_layer_refuses_them():
    layer, other = make_layer(), make_layer()
    a, b = make_inputs()
    mask = torch.ones(Z, M, dtype=torch.bool)
    prepared = layer.prepare(b)
    asked = [TopK(3)]
    with pytest.raises(ValueError, match="made by another layer"):
        attention_map(other, a, prepared, asked)
    with pytest.raises(ValueError, match="query_positions were passed but the layer has no position part"):
        attention_map(layer, a, b, asked, query_positions=torch.arange(N))
    with pytest.raises(ValueError, match="context_positions were passed but the layer has no position part"):
        attention_map(layer, a, b, asked, context_positions=torch.arange(M))
    with pytest.raises(ValueError, match="context_mask belongs to the prepared context"):
        attention_map(layer, a, prepared, asked, context_mask=mask)
    with pytest.raises(ValueError, match="context_positions belongs to the prepared context"):
        attention_map(layer, a, prepared, asked, context_positions=torch.arange(M))
    with pytest.raises(ValueError, match="context has width 3"):
        attention_map(layer, a, b[..., :3], asked)
    with pytest.raises(ValueError, match=r"attn_mask of shape \(3, 7\) does not broadcast"):
        attention_map(layer, a, b, asked, attn_mask=mask.new_ones(3, M))
    with pytest.raises(TypeError, match=r"queries\[0\] must be a tensor"):
        attention_map(layer, [1.0], b, asked)
    with torch.no_grad():
        layer.k_proj.weight.mul_(2)
    with pytest.raises(ValueError, match=r"out of date: k_proj\.weight"):
        attention_map(layer, a, prepared, asked)


@pytest.mark.parametrize("worth", [1, 5, 32])
def test_the_largest_are_exact_and_of_equal_ones_the_first(monkeypatch, worth):
    monkeypatch.setattr(top, "WORTH_BLOCKS", worth)
    for m in (1, 8, 9, 130, 1000, 1030):
        for rows in (
            torch.rand(3, 4, m),
            torch.randint(0, 4, (3, 4, m)).float(),  # full of equal numbers
            torch.rand(3, 4, m) * (torch.rand(3, 4, m) > 0.99),
            torch.zeros(3, 4, m),
            torch.arange(m).float().expand(3, 4, m),  # the largest at the end, where a block may not be whole
        ):
            laid = rows.transpose(0, 2).contiguous().transpose(0, 2)
            for k in {1, min(3, m), min(8, m), m}:
                wanted, at = rows.sort(dim=-1, descending=True, stable=True)
                for values in (rows, laid):
                    found, positions = top.top(values, k)
                    assert torch.equal(found, wanted[..., :k]) and torch.equal(positions, at[..., :k])


def test_a_path_of_a_plain_map_is_what_one_would_draw():
    """Weights of 0.9 along a staircase: each of the six cells that lead up it costs 0.1, and the corner in it is passed by."""
    stairs = torch.zeros(1, 1, 4, 6, dtype=torch.float64)
    for i, positions in enumerate(([0, 1], [2], [2, 3, 4], [5])):
        stairs[0, 0, i, positions] = 0.9
    path = Alignment(heads="each")
    path.update(Block(stairs, (slice(0, 1), slice(0, 1), slice(0, 4)), (1, 1, 4, 6), None))
    found = path.result()
    assert found.first[0, 0].tolist() == [0, 2, 3, 5] and found.last[0, 0].tolist() == [1, 2, 4, 5]
    assert found.cost.item() == pytest.approx(0.1 * 6)
    path = Alignment(heads="each")
    path.update(Block(torch.ones(1, 1, 2, 2), (slice(0, 1), slice(0, 1), slice(0, 2)), (1, 1, 2, 2), None))
    assert path.result().last.flatten().tolist() == [0, 1]  # of equal paths the diagonal
