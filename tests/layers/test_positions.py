"""Position encodings and parts, each against its formula written out pair by pair in float64, inside attention."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crossattention import CrossAttention, Plan, PlanError, SelfAttention
from crossattention.attention.parts import PositionPart
from crossattention.layers.positions import ALiBi, RelativeLogits, Rotary, T5Bias, sinusoidal_positions
from crossattention.plan import ALL_PLANS
from layers.part_oracle import SIZES, written_out
from tolerances import assert_close

K, HEADS, DIM = SIZES["head_dim"], SIZES["heads"], 10


# --------------------------------------------------------------------------------------------------------- formulas


def rotated(base: float, pairs: list[tuple[int, int]]) -> Callable[[Tensor, Tensor], Tensor]:
    """Each pair of channels as a complex number, times e^(j p w)."""

    def turn(rows: Tensor, positions: Tensor) -> Tensor:
        turned = torch.empty_like(rows)
        for i, (first, second) in enumerate(pairs):
            angle = positions.double() * base ** (-2 * i / K)
            number = torch.complex(rows[:, first], rows[:, second]) * torch.complex(angle.cos(), angle.sin())
            turned[:, first], turned[:, second] = number.real, number.imag
        return turned

    return turn


def alibi(slopes: list[float]) -> Callable[..., Tensor]:
    def added(queries: Tensor, p: Tensor, s: Tensor, head: int) -> Tensor:
        return torch.tensor([[-slopes[head] * abs(int(i) - int(j)) for j in s] for i in p], dtype=torch.float64)

    return added


def t5_bucket(offset: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    """Bucket of s - p, from the description in words."""
    base = 0
    if bidirectional:
        num_buckets //= 2
        base = num_buckets if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    single = num_buckets // 2
    if distance < single:
        return base + distance
    share = math.log(distance / single) / math.log(max_distance / single)
    return base + min(single + int(share * (num_buckets - single)), num_buckets - 1)


def t5(part: T5Bias) -> Callable[..., Tensor]:
    def added(queries: Tensor, p: Tensor, s: Tensor, head: int) -> Tensor:
        sizes = (part.num_buckets, part.max_distance, part.bidirectional)
        rows = [[part.table.weight[t5_bucket(int(j) - int(i), *sizes), head] for j in s] for i in p]
        return torch.stack([torch.stack(row) for row in rows])

    return added


def relative_logits(part: RelativeLogits, scale: float) -> Callable[..., Tensor]:
    furthest = part.max_distance or 10**9

    def added(queries: Tensor, p: Tensor, s: Tensor, head: int) -> Tensor:
        weight = part.r_proj.weight[head * K : (head + 1) * K]
        rows = []
        for i, query in zip(p.tolist(), queries, strict=True):
            if part.bias is not None:
                query = query + part.bias[head]
            row = []
            for j in s.tolist():
                distance = max(-furthest, min(furthest, i - j))
                r = [f(distance / 10000 ** (2 * c / DIM)) for c in range(DIM // 2) for f in (math.sin, math.cos)]
                row.append(scale * query @ (weight @ torch.tensor(r, dtype=torch.float64)))
            rows.append(torch.stack(row))
        return torch.stack(rows)

    return added


def part_and_formula(name: str, scale: float) -> tuple[PositionPart, dict[str, Any]]:
    """A part, and what `written_out` needs to do the same."""
    torch.manual_seed(2)
    if name == "rotary":
        turn = rotated(50.0, [(0, 1), (2, 3)])
        return Rotary(base=50.0), {"turn_queries": turn, "turn_keys": turn}
    if name == "rotary halves":
        turn = rotated(10_000.0, [(0, 2), (1, 3)])
        return Rotary(layout="halves"), {"turn_queries": turn, "turn_keys": turn}
    if name == "alibi":  # for 3 heads: those of 2 heads, then the first of 4
        return ALiBi(3), {"added": alibi([2.0**-4, 2.0**-8, 2.0**-2])}
    if name.startswith("t5"):
        part = T5Bias(HEADS, num_buckets=8, max_distance=6, bidirectional=name == "t5", dtype=torch.float64)
        return part, {"added": t5(part)}
    relative = RelativeLogits(
        DIM,
        HEADS,
        K,
        bias=name != "relative without bias",
        max_distance=3 if name == "relative clamped" else None,
        dtype=torch.float64,
    )
    if relative.bias is not None:
        torch.nn.init.normal_(relative.bias)
    return relative, {"added": relative_logits(relative, scale)}


NAMES = ["rotary", "rotary halves", "alibi", "t5", "t5 causal", "relative", "relative without bias", "relative clamped"]
every_part = pytest.mark.parametrize("name", NAMES)


def given_positions(z: int = 2, n: int = 5, m: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 30, (z, n)), torch.randint(0, 30, (z, m))


# ---------------------------------------------------------------------------------------------- in cross-attention


@every_part
@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("given", ["none", "shared", "for each item"])
def test_every_legal_plan_computes_the_formula(name: str, kv_heads: int, given: str) -> None:
    part, formula = part_and_formula(name, 0.7)
    layer = CrossAttention(6, 9, positions=part, kv_heads=kv_heads, scale=0.7, **SIZES)
    a, b = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 7, 9, dtype=torch.float64)
    p, s = given_positions()
    keywords = {"query_positions": p, "context_positions": s}
    if given == "none":
        p, s, keywords = torch.arange(5).expand(2, -1), torch.arange(7).expand(2, -1), {}
    elif given == "shared":
        p, s = p[:1].expand(2, -1), s[:1].expand(2, -1)
        keywords = {"query_positions": p[0], "context_positions": s[0]}
    wanted = written_out(layer, a, b, p, s, **formula)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0, 0]]).bool()
    masked = written_out(layer, a, b, p, s, mask=mask[:, None].expand(-1, 5, -1), **formula)
    plans = [plan for plan in ALL_PLANS if not any(forbidden.hits(plan) for forbidden in part.forbids)]
    for plan in plans:
        layer.plan = plan
        assert_close(layer(a, b, **keywords), wanted)
        assert_close(layer(a, b, context_mask=mask, **keywords), masked)
    weights = {"rotary": 3, "rotary halves": 3, "alibi": 9, "t5": 9, "t5 causal": 9}
    assert len(plans) == weights.get(name, 6)


@every_part
def test_positions_change_the_output(name: str) -> None:
    part, _ = part_and_formula(name, 0.5)
    layer = CrossAttention(6, 9, positions=part, **SIZES)
    a, b = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 7, 9, dtype=torch.float64)
    assert (layer(a, b) - layer(a, b, context_positions=torch.arange(7).flip(0))).abs().max() > 1e-3


@every_part
def test_shifting_both_sequences_changes_nothing(name: str) -> None:
    part, _ = part_and_formula(name, 0.5)
    layer = CrossAttention(6, 9, positions=part, **SIZES)
    a, b = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 7, 9, dtype=torch.float64)
    p, s = given_positions()
    found = layer(a, b, query_positions=p + 11, context_positions=s + 11)
    assert_close(found, layer(a, b, query_positions=p, context_positions=s))


@every_part
def test_prepared_contexts_are_shared_and_read_in_parts(name: str) -> None:
    part, _ = part_and_formula(name, 0.5)
    layer = CrossAttention(6, 9, positions=part, **SIZES)
    a, b = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(2, 7, 9, dtype=torch.float64)
    p, s = given_positions()
    prepared = layer.prepare(b, context_positions=s)
    shared = layer.attend(a, prepared, query_positions=p)
    for beam in range(3):
        assert_close(shared[:, beam], layer(a[:, beam], b, query_positions=p, context_positions=s))
    steps = [layer.attend(a[:, :, i : i + 1], prepared, query_positions=p[:, i : i + 1]) for i in range(5)]
    assert_close(torch.cat(steps, 2), shared)


@every_part
def test_gradients_are_those_of_the_formula(name: str) -> None:
    part, formula = part_and_formula(name, 0.7)
    layer = CrossAttention(6, 9, positions=part, scale=0.7, **SIZES)
    a, b = (torch.randn(2, n, w, dtype=torch.float64, requires_grad=True) for n, w in ((5, 6), (7, 9)))
    p, s = given_positions()
    inputs = [a, b, layer.q_proj.weight, layer.k_proj.weight, *part.parameters()]
    out = layer(a, b, query_positions=p, context_positions=s)
    wanted = written_out(layer, a, b, p, s, **formula)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), inputs)
    for gradient, other in zip(found, torch.autograd.grad((wanted * weights).sum(), inputs), strict=True):
        assert_close(gradient, other)
        assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        ("rotary", Plan("context", "head"), "rotary positions stand between Wq and Wk"),
        ("rotary", Plan("query", "output"), "rotary positions stand between Wq and Wk"),
        ("relative", Plan("query", "head"), "relative logits read the projected queries"),
    ],
)
def test_forbidden_plans_are_refused_with_the_reason(name: str, plan: Plan, message: str) -> None:
    part, _ = part_and_formula(name, 0.5)
    with pytest.raises(PlanError, match=message):
        CrossAttention(6, 9, positions=part, plan=plan, **SIZES)


# ----------------------------------------------------------------------------------------------- in self-attention


@every_part
def test_causal_self_attention_computes_the_formula_whole_and_step_by_step(name: str) -> None:
    part, formula = part_and_formula(name, 0.5)
    layer = SelfAttention(6, positions=part, causal=True, scale=0.5, **SIZES)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    positions = torch.arange(7).expand(2, -1)
    causal = torch.ones(7, 7).tril().bool().expand(2, -1, -1)
    wanted = written_out(layer, x, x, positions, positions, mask=causal, **formula)
    assert_close(layer(x), wanted)
    first, cache = layer.step(x[:, :3])
    rest = []
    for i in range(3, 7):
        out, cache = layer.step(x[:, i : i + 1], cache)
        rest.append(out)
    assert_close(torch.cat((first, *rest), 1), wanted)


@pytest.mark.slow
@every_part
def test_one_exported_graph_serves_all_lengths(name: str) -> None:
    part, _ = part_and_formula(name, 0.5)
    layer = CrossAttention(6, 9, positions=part.float(), **{**SIZES, "dtype": torch.float32})
    n, m = torch.export.Dim("n", max=32), torch.export.Dim("m", max=32)
    exported = torch.export.export(layer, (torch.randn(2, 5, 6), torch.randn(2, 7, 9)), dynamic_shapes=({1: n}, {1: m}))
    for lengths in ((5, 7), (9, 3), (2, 20)):
        a, b = torch.randn(2, lengths[0], 6), torch.randn(2, lengths[1], 9)
        assert_close(exported.module()(a, b), layer(a, b))


@every_part
def test_bfloat16_stays_near_float64(name: str) -> None:
    part, _ = part_and_formula(name, 0.5)
    layer = CrossAttention(6, 9, positions=part, **SIZES)
    a, b = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 7, 9, dtype=torch.float64)
    wanted = layer(a, b)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert_close(layer.float()(a.float(), b.float()), wanted, dtype=torch.bfloat16)
    assert_close(layer.bfloat16()(a.bfloat16(), b.bfloat16()), wanted, dtype=torch.bfloat16)


# ------------------------------------------------------------------------------------------------- each by itself


def test_sinusoids_are_the_papers_interleaved() -> None:
    positions = torch.tensor([[0, 1, 400], [-3, 7, 2]])
    encoding = sinusoidal_positions(positions, 6, dtype=torch.float64)
    for row in range(2):
        for column in range(3):
            p = int(positions[row, column])
            for i in range(3):
                angle = p / 10000 ** (2 * i / 6)
                assert encoding[row, column, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
                assert encoding[row, column, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


def test_sinusoids_in_half_precision_have_angles_in_float32() -> None:
    positions = torch.arange(1000, 1010)
    encoding = sinusoidal_positions(positions, 8, dtype=torch.bfloat16)
    assert encoding.dtype == torch.bfloat16
    assert (encoding - sinusoidal_positions(positions, 8, dtype=torch.float64)).abs().max() < 2**-8


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (8, [2.0**-i for i in range(1, 9)]),
        (16, [2.0 ** (-i / 2) for i in range(1, 17)]),
        (12, [2.0**-i for i in range(1, 9)] + [2.0 ** (-i / 2) for i in (1, 3, 5, 7)]),
        (1, [2.0**-8]),
    ],
)
def test_alibi_has_the_slopes_of_its_authors(heads: int, slopes: list[float]) -> None:
    assert ALiBi(heads).slopes == pytest.approx(slopes)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (6, 200)])
def test_t5_buckets_are_hugging_faces(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    offsets = torch.arange(-300, 301)
    part = T5Bias(2, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional)
    wanted = modeling.T5Attention._relative_position_bucket(offsets, bidirectional, num_buckets, max_distance)
    assert torch.equal(part.buckets_of(offsets), wanted)
    assert set(part.buckets_of(offsets).tolist()) <= set(range(num_buckets))


@pytest.mark.parametrize("distance", [1, -1, 5])
def test_a_head_can_begin_at_a_distance(distance: int) -> None:
    """Whatever the queries hold, that distance gets the greatest part of the weights; the other heads are left as they are."""
    torch.manual_seed(0)
    part = RelativeLogits(64, 3, 16)
    before = part.r_proj.weight.detach().clone()
    part.begin_at(1, distance)
    queries, at = torch.randn(2, 3, 40, 16), torch.arange(40)
    with torch.no_grad():
        weights = part.score_bias(queries, at, at, 16**-0.5).softmax(-1)
    rows = at[8:-8]
    assert (weights[:, 1, rows].argmax(-1) == rows - distance).float().mean() > 0.95
    assert weights[:, 1, rows, rows - distance].mean() > 0.3
    assert weights[:, 0].max() < 0.5 and torch.equal(part.r_proj.weight[:16], before[:16])


def test_heads_that_cannot_begin_at_a_distance_are_refused() -> None:
    with pytest.raises(ValueError, match="built with bias=False"):
        RelativeLogits(8, 2, 4, bias=False).begin_at(0, 1)
    with pytest.raises(ValueError, match="head must be from 0 to 1 and distance from -64 to 64, got 2 and 1"):
        RelativeLogits(8, 2, 4).begin_at(2, 1)
    with pytest.raises(ValueError, match="got 0 and 65"):
        RelativeLogits(8, 2, 4).begin_at(0, 65)


def test_relative_logits_within_the_furthest_distance_are_the_unlimited_ones() -> None:
    unlimited = RelativeLogits(DIM, HEADS, K, dtype=torch.float64)
    limited = RelativeLogits(DIM, HEADS, K, max_distance=30, dtype=torch.float64)
    limited.load_state_dict(unlimited.state_dict())
    queries = torch.randn(2, HEADS, 5, K, dtype=torch.float64)
    p, s = given_positions()
    assert_close(limited.score_bias(queries, p, s, 0.5), unlimited.score_bias(queries, p, s, 0.5))
    # One sequence of learned queries, other positions for each item.
    found = limited.score_bias(queries[:1], p, s, 0.5)
    assert found.shape == (2, HEADS, 5, 7)
    assert_close(found, unlimited.score_bias(queries[:1], p, s, 0.5))


@pytest.mark.parametrize("furthest", [None, 3])
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize(
    ("p", "s"),
    [
        (range(5), range(7)),
        (range(11, 12), range(30)),
        (range(3, 7), [*range(5)] * 3),  # neighbours end to end
        ([*range(6)] * 2, range(4)),  # beams
        ([0, 1, 2, 0, 1], [4, 2, 3]),  # no runs
    ],
)
def test_relative_logits_of_runs_are_those_of_each_pair(p: list, s: list, with_gradients: bool, furthest: int | None) -> None:
    torch.manual_seed(0)
    part = RelativeLogits(DIM, HEADS, K, max_distance=furthest, dtype=torch.float64)
    torch.nn.init.normal_(part.bias)
    queries = torch.randn(2, HEADS, len(p), K, dtype=torch.float64)
    at, places = torch.tensor(list(p)), torch.tensor(list(s))
    formula = relative_logits(part, 0.5)
    wanted = torch.stack([torch.stack([formula(rows, at, places, head) for head, rows in enumerate(item)]) for item in queries])
    with torch.set_grad_enabled(with_gradients):
        found = part.score_bias(queries, at, places, 0.5)
        assert_close(found, wanted)
        if with_gradients:
            weights = torch.randn_like(wanted)
            pairs = [torch.autograd.grad((out * weights).sum(), list(part.parameters())) for out in (found, wanted)]
            for gradient, other in zip(*pairs, strict=True):
                assert_close(gradient, other)


def test_kept_distances_follow_their_weights() -> None:
    part = RelativeLogits(DIM, HEADS, K, dtype=torch.float64)
    queries, at = torch.randn(1, HEADS, 1, K, dtype=torch.float64), torch.tensor([6])
    with torch.no_grad():
        before = part.score_bias(queries, at, torch.arange(7), 0.5)
        part.r_proj.weight.mul_(2.0)
        assert_close(part.score_bias(queries, at, torch.arange(7), 0.5), 2.0 * before)


def test_transformer_xls_two_biases_are_the_query_projections_and_the_parts() -> None:
    part, _ = part_and_formula("relative", 0.5)
    layer = CrossAttention(6, 9, positions=part, scale=0.5, bias=("q_proj",), **SIZES)
    a, b = torch.randn(1, 5, 6, dtype=torch.float64), torch.randn(1, 7, 9, dtype=torch.float64)
    torch.nn.init.normal_(layer.q_proj.bias)
    u, v = layer.q_proj.bias.view(HEADS, K), layer.q_proj.bias.view(HEADS, K) + part.bias
    q = (a[0] @ layer.q_proj.weight.T).view(5, HEADS, K)
    k = (b[0] @ layer.k_proj.weight.T).view(7, HEADS, K)
    distances = torch.arange(5)[:, None] - torch.arange(7)
    r = (sinusoidal_positions(distances, DIM, dtype=torch.float64) @ part.r_proj.weight.T).view(5, 7, HEADS, K)
    scores = torch.einsum("nhk,mhk->hnm", q + u, k) + torch.einsum("nhk,nmhk->hnm", q + v, r)
    values = (b[0] @ layer.v_proj.weight.T).view(7, HEADS, -1)
    read = torch.einsum("hnm,mhv->nhv", (scores * 0.5).softmax(-1), values).flatten(1)
    assert_close(layer(a, b)[0], read @ layer.out_proj.weight.T)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sinusoidal_positions(torch.arange(3), 5), "even width, got 5"),
        (lambda: Rotary(layout="pairs"), "layout must be interleaved or halves, got 'pairs'"),
        (lambda: Rotary(base=1.0), "base must be above 1, got 1.0"),
        (lambda: ALiBi(0), "heads must be at least 1, got 0"),
        (lambda: T5Bias(0), "heads must be at least 1, got 0"),
        (lambda: T5Bias(2, num_buckets=7), "an even number of at least 4, got 7"),
        (lambda: T5Bias(2, num_buckets=2), "an even number of at least 4, got 2"),
        (lambda: T5Bias(2, num_buckets=1, bidirectional=False), "at least 2, got 1"),
        (lambda: T5Bias(2, max_distance=8), "above the 8 single distances, got 8"),
        (lambda: RelativeLogits(7, 2, 4), "dim must be even, as sinusoids come in pairs, got 7"),
        (lambda: RelativeLogits(8, 2, 4, max_distance=0), "max_distance must be at least 1, got 0"),
        (lambda: RelativeLogits(8, 0, 4), "heads must be at least 1, got 0"),
    ],
)
def test_impossible_parts_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_rotary_refuses_an_odd_head_width() -> None:
    layer = CrossAttention(6, 9, heads=2, head_dim=3, positions=Rotary())
    with pytest.raises(ValueError, match="head_dim must be even, got 3"):
        layer(torch.randn(2, 5, 6), torch.randn(2, 7, 9))
