"""Ragged sequences against the specification, item by item in float64: every plan, mask, part and form."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from crossattention import CrossAttention, Plan, attention_map
from crossattention.attention import PreparedRagged
from crossattention.attention import ragged as ragged_file
from crossattention.layers import ALiBi, QueryKeyRMSNorm, RelativeLogits, Rotary, T5Bias
from crossattention.maps import Alignment, Argmax, Entropy, Highlight, Rows, TopK
from crossattention.plan.plans import ALL_PLANS, CANDIDATES
from oracle import A, B, H, make_layer, specification
from tolerances import assert_close

QUERY_LENGTHS = (3, 1, 0, 3, 4, 2, 1)
CONTEXT_LENGTHS = (5, 7, 2, 5, 0, 1, 7)


def items(lengths: tuple[int, ...], width: int, *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(length, width, dtype=dtype, requires_grad=True) for length in lengths]


def jagged(sequences: list[Tensor]) -> Tensor:
    """Of the same leaves, so that gradients compare."""
    lengths = torch.tensor([0, *itertools.accumulate(s.shape[0] for s in sequences)])
    return torch.nested.nested_tensor_from_jagged(torch.cat(sequences), lengths)


def expected(layer: CrossAttention, a: list[Tensor], b: list[Tensor], **masks: list[Tensor]) -> list[Tensor]:
    """Each item by the specification."""
    found = []
    for i, (one, context) in enumerate(zip(a, b, strict=True)):
        if 0 in (one.shape[0], context.shape[0]):  # zero attention
            bias = torch.zeros(layer.out_dim, dtype=one.dtype) if layer.out_proj.bias is None else layer.out_proj.bias
            found.append(bias.expand(one.shape[0], -1))
            continue
        its = {name: mask[i][None] for name, mask in masks.items()}
        found.append(specification(layer, one[None], context[None], **its)[0][0])
    return found


def grads(outs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    total = sum((out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum() for out in outs)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def make_masks(kind: str) -> dict[str, list[Tensor]]:
    lengths = list(zip(QUERY_LENGTHS, CONTEXT_LENGTHS, strict=True))
    masks: dict[str, list[Tensor]] = {}
    if kind in ("context", "both"):
        masks["context_mask"] = [torch.rand(m) > 0.3 for _, m in lengths]
        masks["context_mask"][3] = torch.zeros(5, dtype=torch.bool)
    if kind in ("pairs", "both"):
        masks["attn_mask"] = [torch.rand(H if i % 2 else 1, n, m) > 0.4 for i, (n, m) in enumerate(lengths)]
    if kind == "additive":
        masks["attn_mask"] = [torch.randn(n, m, dtype=torch.float64) for n, m in lengths]
        masks["attn_mask"][0][0] = -torch.inf
    return masks


@pytest.mark.parametrize(
    "kind", ["none", "both", "additive", *(pytest.param(k, marks=pytest.mark.slow) for k in ("context", "pairs"))]
)
@pytest.mark.parametrize("plan", ALL_PLANS, ids=str)
def test_every_plan_and_mask_is_the_specification_item_by_item(plan: Plan, kind: str) -> None:
    layer, a, b = make_layer(plan), items(QUERY_LENGTHS, A), items(CONTEXT_LENGTHS, B)
    masks = make_masks(kind)
    outs, wanted = layer(a, b, **masks), expected(layer, a, b, **masks)
    assert isinstance(outs, list) and [len(out) for out in outs] == list(QUERY_LENGTHS)
    for out, right in zip(outs, wanted, strict=True):
        assert_close(out, right)
    leaves = [*a, *b, *layer.parameters()]
    for found, right in zip(grads(outs, leaves), grads(wanted, leaves), strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("plan", [plan for plan in CANDIDATES if plan.kernel != "fused"], ids=str)
def test_every_kernel_is_the_specification(plan: Plan) -> None:
    layer, a, b = make_layer(plan), items(QUERY_LENGTHS, A), items(CONTEXT_LENGTHS, B)
    for out, right in zip(layer(a, b), expected(layer, a, b), strict=True):
        assert_close(out, right)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"kv_heads": 2}, {"kv_heads": 1}, {"bias": False}, {"value_head_dim": 11}, {"head_dim": 2}], ids=str
)
@pytest.mark.parametrize("plan", ALL_PLANS, ids=str)
def test_grouped_heads_biases_and_unlike_widths(plan: Plan, changes: dict) -> None:
    layer, a, b = make_layer(plan, **changes), items(QUERY_LENGTHS, A), items(CONTEXT_LENGTHS, B)
    outs, wanted = layer(a, b), expected(layer, a, b)
    leaves = [*a, *b, *layer.parameters()]
    for found, right in zip([*outs, *grads(outs, leaves)], [*wanted, *grads(wanted, leaves)], strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("plan", ALL_PLANS[::4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(plan: Plan, dtype: torch.dtype) -> None:
    layer = make_layer(plan, dtype=dtype)
    a, b = items(QUERY_LENGTHS, A, dtype=dtype), items(CONTEXT_LENGTHS, B, dtype=dtype)
    for i, out in enumerate(layer(a, b)):
        assert out.dtype == dtype
        assert_close(out, layer(a[i][None], b[i][None])[0], dtype=dtype)


# -------------------------------------------------------------------------------------------------------------- forms


def test_a_jagged_a_gives_a_jagged_result_that_adds_to_it() -> None:
    layer, a, b = make_layer(out_dim=A), items(QUERY_LENGTHS, A), items(CONTEXT_LENGTHS, B)
    together = jagged(a)
    out = layer(together, jagged(b))
    assert out.is_nested and out.layout == torch.jagged
    wanted = expected(layer, a, b)
    for got, right in zip((together + out).unbind(), [w + one for w, one in zip(wanted, a, strict=True)], strict=True):
        assert_close(got, right)
    for found, right in zip(grads([out.values()], [*a, *b]), grads([torch.cat(wanted)], [*a, *b]), strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("form", ["list", "tuple", "jagged"])
def test_ragged_queries_read_a_dense_context(form: str) -> None:
    layer, a, b = make_layer(), items(QUERY_LENGTHS, A), torch.randn(len(QUERY_LENGTHS), 5, B, dtype=torch.float64)
    mask = torch.rand(len(QUERY_LENGTHS), 5) > 0.3
    given = {"list": a, "tuple": tuple(a), "jagged": jagged(a)}[form]
    wanted = expected(layer, a, list(b), context_mask=list(mask))
    for read in (layer(given, b, context_mask=mask), layer.attend(given, layer.prepare(b, context_mask=mask))):
        for out, right in zip(read.unbind() if form == "jagged" else read, wanted, strict=True):
            assert_close(out, right)


@pytest.mark.parametrize("form", ["list", "jagged"])
def test_dense_queries_read_ragged_contexts(form: str) -> None:
    layer, b = make_layer(), items(CONTEXT_LENGTHS, B)
    z = len(b)
    given = b if form == "list" else jagged(b)
    a = torch.randn(z, 3, A, dtype=torch.float64)
    out = layer(a, given)
    assert out.shape == (z, 3, layer.out_dim)
    assert_close(out, torch.stack(expected(layer, list(a), b)))
    learned = torch.randn(4, A, dtype=torch.float64)
    assert_close(layer(learned, given), torch.stack(expected(layer, [learned] * z, b)))


@pytest.mark.parametrize("plan", ALL_PLANS, ids=str)
def test_beams_read_one_ragged_context(plan: Plan) -> None:
    layer, b = make_layer(plan), items(CONTEXT_LENGTHS, B)
    beams = torch.randn(len(b), 2, 3, A, dtype=torch.float64)
    prepared = layer.prepare(b, query_length=3, repeats=2, uses=9)
    masks = [torch.rand(2, 1, 3, m) > 0.3 for m in CONTEXT_LENGTHS]
    out = layer.attend(beams, prepared, attn_mask=masks)
    for i, context in enumerate(b):
        wanted = layer(beams[i][None], context[None], attn_mask=masks[i][None])
        assert_close(out[i], wanted[0])


@pytest.mark.slow  # the first jagged view of a process imports for two seconds
def test_a_jagged_tensor_with_holes_is_read_without_them() -> None:
    layer, padded = make_layer(), torch.randn(3, 6, B, dtype=torch.float64)
    holes = torch.nested.narrow(padded, 1, torch.tensor([0, 1, 2]), torch.tensor([3, 2, 4]), layout=torch.jagged)
    a = torch.randn(3, 2, A, dtype=torch.float64)
    b = [padded[0, 0:3], padded[1, 1:3], padded[2, 2:6]]
    assert_close(layer(a, holes), torch.stack(expected(layer, list(a), b)))


@pytest.mark.parametrize("z", [0, 1, 3])
def test_equal_lengths_and_no_items_at_all(z: int) -> None:
    layer = make_layer()
    a, b = items((3,) * z, A), items((5,) * z, B)
    for out, right in zip(layer(a, b), expected(layer, a, b), strict=True):
        assert_close(out, right)
    mask = [torch.rand(5) > 0.4 for _ in range(z)]
    for out, right in zip(layer(a, b, context_mask=mask), expected(layer, a, b, context_mask=mask), strict=True):
        assert_close(out, right)
    assert layer(torch.randn(z, 3, A, dtype=torch.float64), [torch.randn(0, B, dtype=torch.float64)] * z).shape == (
        z,
        3,
        layer.out_dim,
    )


def test_no_padded_position_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, pairs = [], []
    project, attend = ragged_file.execute.project, ragged_file.execute.attend_heads
    monkeypatch.setattr(ragged_file.execute, "project", lambda p, x: rows.append(x.shape[:-1].numel()) or project(p, x))
    monkeypatch.setattr(
        ragged_file.execute,
        "attend_heads",
        lambda q, k, *args, **kwargs: pairs.append(q.shape[0] * q.shape[2] * k.shape[2]) or attend(q, k, *args, **kwargs),
    )
    make_layer(Plan())(items(QUERY_LENGTHS, A), items(CONTEXT_LENGTHS, B))
    assert sorted(rows) == sorted([sum(QUERY_LENGTHS)] * 2 + [sum(CONTEXT_LENGTHS)] * 2)
    assert sum(pairs) == sum(n * m for n, m in zip(QUERY_LENGTHS, CONTEXT_LENGTHS, strict=True))


# ----------------------------------------------------------------------------------------------------- parts, dropout


PARTS = {
    "rotary": lambda: Rotary(),
    "alibi": lambda: ALiBi(H),
    "t5": lambda: T5Bias(H, dtype=torch.float64),
    "relative": lambda: RelativeLogits(12, H, 8, dtype=torch.float64),
}


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("part", [*PARTS])
def test_positions_in_every_plan(part: str, given: bool) -> None:
    check_positions(part, given, ALL_PLANS)


@pytest.mark.parametrize("part", [*PARTS])
def test_positions_count_within_an_item_or_are_given(part: str) -> None:
    check_positions(part, part != "alibi", (Plan("context" if part != "rotary" else "head", "context"),))


def check_positions(part: str, given: bool, plans: tuple[Plan, ...]) -> None:
    """Each item as the layer reads it by itself."""
    for plan in plans:
        layer = make_layer(positions=PARTS[part](), qk_norm=QueryKeyRMSNorm(8, dtype=torch.float64) if part == "rotary" else None)
        if any(f.hits(plan) for f in layer.forbidden()):
            continue
        layer.plan = plan
        a, b = items(QUERY_LENGTHS, A), items(CONTEXT_LENGTHS, B)
        positions = {}
        if given:
            positions["query_positions"] = [torch.randint(0, 9, (n,)) for n in QUERY_LENGTHS]
            positions["context_positions"] = [torch.randint(0, 9, (m,)) for m in CONTEXT_LENGTHS]
        outs = layer(a, b, **positions)
        for i, out in enumerate(outs):
            its = {name: some[i] for name, some in positions.items()}
            assert_close(out, layer(a[i][None], b[i][None], **its)[0])
        dense = torch.randn(len(b), 2, A, dtype=torch.float64)
        beams, learned = torch.randn(len(b), 2, 2, A, dtype=torch.float64), dense[0]
        at = torch.tensor([4, 1]) if given else None
        prepared = layer.prepare(b)
        for queries in (dense, beams, learned):
            out = layer.attend(queries, prepared, query_positions=at)
            for i, context in enumerate(b):
                one = queries if queries.dim() == 2 else queries[i][None]
                assert_close(out[i], layer(one, context[None], query_positions=at)[0])
        if given:
            each = torch.randint(0, 9, (len(b), 2))
            for queries in (dense, beams, learned):
                out = layer.attend(queries, prepared, query_positions=each)
                for i, context in enumerate(b):
                    one = queries if queries.dim() == 2 else queries[i][None]
                    assert_close(out[i], layer(one, context[None], query_positions=each[i])[0])


def test_dropout_drops_and_keeps_the_mean() -> None:
    layer = make_layer(dropout=0.5, dtype=torch.float32).train()
    a, b = items((2, 3), A, dtype=torch.float32), items((4, 6), B, dtype=torch.float32)
    runs = torch.stack([torch.cat(layer(a, b)) for _ in range(100)])
    assert not torch.equal(runs[0], runs[1])
    sure = torch.cat(layer.eval()(a, b))
    assert (runs.mean(0) - sure).abs().max() < 6 * runs.std(0).max() / 10


def test_learned_masks_get_gradients() -> None:
    layer, a, b = make_layer(), items((2, 3), A), items((4, 6), B)
    masks = [
        torch.randn(H, 2, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 6, dtype=torch.float64, requires_grad=True),
    ]
    outs, wanted = layer(a, b, attn_mask=masks), expected(layer, a, b, attn_mask=masks)
    for found, right in zip(grads(outs, masks), grads(wanted, masks), strict=True):
        assert_close(found, right)


# ------------------------------------------------------------------------------------------------ prepared, staleness


@pytest.mark.parametrize("plan", ALL_PLANS, ids=str)
def test_a_prepared_ragged_context_is_read_again_and_selected_from(plan: Plan) -> None:
    layer, b = make_layer(plan), items(CONTEXT_LENGTHS, B)
    masks = [torch.rand(m) > 0.2 for m in CONTEXT_LENGTHS]
    prepared = layer.prepare(b, context_mask=masks)
    assert isinstance(prepared, PreparedRagged) and prepared.lengths == CONTEXT_LENGTHS and prepared.plan == plan
    for lengths in (QUERY_LENGTHS, (2,) * len(b)):
        a = items(lengths, A)
        for out, right in zip(layer.attend(a, prepared), expected(layer, a, b, context_mask=masks), strict=True):
            assert_close(out, right)
    rows = [4, 1, 1, 0]
    some, a = prepared.select(torch.tensor(rows)), items((2, 3, 1, 2), A)
    assert some.lengths == (0, 7, 7, 5)
    wanted = expected(layer, a, [b[row] for row in rows], context_mask=[masks[row] for row in rows])
    for out, right in zip(layer.attend(a, some), wanted, strict=True):
        assert_close(out, right)


@pytest.mark.parametrize("space", ["head", "context", "query"])
def test_prepared_queries_read_ragged_contexts(space: str) -> None:
    layer, b = make_layer(Plan(space, "head")), items(CONTEXT_LENGTHS, B)
    prepared = layer.prepare(b)
    learned, own = torch.randn(4, A, dtype=torch.float64), torch.randn(len(b), 3, A, dtype=torch.float64)
    for queries in (learned, own):
        assert_close(layer.attend(layer.prepare_queries(queries, space=space), prepared), layer.attend(queries, prepared))


def test_a_stale_or_foreign_ragged_context_is_refused() -> None:
    layer, a, b = make_layer(), items(QUERY_LENGTHS, A), items(CONTEXT_LENGTHS, B)
    prepared = layer.prepare(b)
    with pytest.raises(ValueError, match="another layer"):
        make_layer().attend(a, prepared)
    with torch.no_grad():
        layer.k_proj.weight.mul_(2)
    with pytest.raises(ValueError, match=r"out of date: k_proj\.weight"):
        layer.attend(a, prepared)
    layer.plan = Plan("context", "context")
    with torch.no_grad():
        sorted_b = jagged([torch.randn(m, B, dtype=torch.float64) for m in (1, 2, 4)])
    prepared = layer.prepare(sorted_b)  # in order already: the caller's memory is kept, and an edit of it seen
    sorted_b.values().mul_(2)
    with pytest.raises(ValueError, match="out of date: context"):
        layer.attend(items((1, 2, 3), A), prepared)


def test_a_ragged_context_is_not_extended() -> None:
    layer = make_layer()
    with pytest.raises(TypeError, match="not a ragged one"):
        layer.extend(layer.prepare(items((2, 3), B)), torch.randn(2, 1, B, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------- maps


def test_maps_and_summaries_of_ragged_calls_are_those_of_each_item() -> None:
    layer, a, b = make_layer(), items((3, 1, 4), A), items((5, 7, 2), B)
    masks = {
        "context_mask": [torch.rand(m) > 0.2 for m in (5, 7, 2)],
        "attn_mask": [torch.rand(n, m) > 0.2 for n, m in ((3, 5), (1, 7), (4, 2))],
    }
    summaries = [TopK(2), Highlight(), Entropy(heads="mean"), Argmax(), Alignment(), Rows([0])]
    whole, kept = attention_map(layer, a, b, **masks), attention_map(layer, a, b, summaries, **masks)
    assert len(kept) == len(summaries) and all(len(one) == 3 for one in kept)
    prepared = attention_map(layer, jagged(a), layer.prepare(b, context_mask=masks["context_mask"]), attn_mask=masks["attn_mask"])
    for i in range(3):
        its = {name: mask[i][None] for name, mask in masks.items()}
        right = attention_map(layer, a[i][None], b[i][None], **its)
        assert_close(whole[i], right[0])
        assert_close(prepared[i], right[0])
        by_item = attention_map(layer, a[i][None], b[i][None], summaries, **its)
        assert_close(kept[0][i].weights, by_item[0].weights[0])
        assert torch.equal(kept[0][i].positions, by_item[0].positions[0])
        for place in (1, 2, 5):
            assert_close(kept[place][i], by_item[place][0])
        assert torch.equal(kept[3][i], by_item[3][0]) and torch.equal(kept[4][i].last, by_item[4].last[0])


def test_beams_on_ragged_contexts_have_maps() -> None:
    layer, b = make_layer(), items((5, 7, 2), B)
    beams = torch.randn(3, 2, 1, A, dtype=torch.float64)
    for i, weights in enumerate(attention_map(layer, beams, layer.prepare(b))):
        assert_close(weights, attention_map(layer, beams[i][None], b[i][None])[0])


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda y, a, b: y(a, [*b[:-1], torch.randn(2, B + 1, dtype=torch.float64)]), ValueError, r"context\[2\] .* one width"),
        (
            lambda y, a, b: y(a, [torch.randn(2, B + 1, dtype=torch.float64)] * 3),
            ValueError,
            "context has width 10 .* context_dim=9",
        ),
        (lambda y, a, b: y(a, b[:-1]), ValueError, "3 sequences of queries but 2 contexts"),
        (
            lambda y, a, b: y(a, [*b[:-1], torch.randn(1, 2, B, dtype=torch.float64)]),
            ValueError,
            r"context\[2\] must be \(length, width\)",
        ),
        (lambda y, a, b: y(a, [*b[:-1], 3]), TypeError, r"context\[2\] must be a tensor, got int"),
        (lambda y, a, b: y([x.float() for x in a], b), ValueError, "queries are torch.float32"),
        (lambda y, a, b: y(a, b, attn_mask=torch.ones(3, 4)), TypeError, "one mask an item"),
        (lambda y, a, b: y(a, b, attn_mask=[torch.ones(9, 9) > 0] * 3), ValueError, r"attn_mask\[0\]: attn_mask of shape \(9, 9\)"),
        (lambda y, a, b: y(a, b, attn_mask=[torch.ones(()) > 0] * 2), ValueError, "attn_mask has 2 items but there are 3"),
        (lambda y, a, b: y(a, b, context_mask=torch.ones(3, 4) > 0), TypeError, r"context_mask .* list with one tensor"),
        (lambda y, a, b: y(a, b, context_mask=[torch.ones(4) > 0] * 3), ValueError, r"context_mask\[0\] has length 4 .* has 2"),
        (lambda y, a, b: y(a, b, context_mask=[torch.ones(m) for m in (2, 5, 4)]), TypeError, "context_mask must be bool"),
        (lambda y, a, b: y(a, b, context_positions=[torch.arange(m) for m in (2, 5, 4)]), ValueError, "no position part"),
        (lambda y, a, b: y(a, b, query_positions=[torch.arange(m) for m in (1, 2, 3)]), ValueError, "no position part"),
        (lambda y, a, b: y.attend(a, y.prepare(b), context_mask=[]), ValueError, "belongs to the prepared context"),
        (lambda y, a, b: y.prepare(b).select(torch.tensor([3])), ValueError, "indices of the 3 items"),
        (lambda y, a, b: attention_map(y, a, y.prepare(b), context_mask=[]), ValueError, "belongs to the prepared context"),
    ],
)
def test_what_does_not_fit_is_named(call, error: type[Exception], says: str) -> None:
    layer = make_layer()
    with torch.no_grad():
        a, b = [x.detach() for x in items((1, 2, 3), A)], [x.detach() for x in items((2, 5, 4), B)]
    with pytest.raises(error, match=says):
        call(layer, a, b)


def test_autocast_and_projections_of_other_kinds_are_taken() -> None:
    layer = make_layer(dtype=torch.float32)
    layer.k_proj = nn.Sequential(layer.k_proj)
    a, b = items((2, 3), A, dtype=torch.float32), items((4, 6), B, dtype=torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        for i, out in enumerate(layer(a, b)):
            assert out.dtype == torch.bfloat16
            assert_close(out, layer(a[i][None], b[i][None])[0])


# ------------------------------------------------------------------------------------------ one launch on CUDA


def varlen_by_hand(queries, keys, values, of_queries, of_keys, most_queries, most_keys, *, scale, enable_gqa=False):
    """What torch.nn.attention.varlen says that it does, item by item; NaN where a context is empty."""
    found = []
    for item in range(len(of_queries) - 1):
        q = queries[of_queries[item] : of_queries[item + 1]].transpose(0, 1)
        k, v = (t[of_keys[item] : of_keys[item + 1]].transpose(0, 1) for t in (keys, values))
        assert q.shape[1] <= most_queries and k.shape[1] <= most_keys and enable_gqa == (q.shape[0] != k.shape[0])
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
        weights = (q @ k.transpose(1, 2) * scale).softmax(-1) if k.shape[1] else torch.full((*q.shape[:2], 0), torch.nan)
        found.append((weights.to(v.dtype) @ v if k.shape[1] else torch.full_like(q, torch.nan)).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("plan", [plan for plan in ALL_PLANS if plan.values != "output"], ids=str)
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("shares_heads", [True, False])
def test_what_varlen_is_handed_is_the_call(plan: Plan, kv_heads: int, shares_heads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself needs CUDA; here its place is taken by what its documentation says. Older ones share no heads."""
    layer, b = make_layer(plan, kv_heads=kv_heads, bias=("v_proj", "out_proj")), items(CONTEXT_LENGTHS, B)
    a, learned, beams = items(QUERY_LENGTHS, A), torch.randn(3, A), torch.randn(len(b), 2, 3, A)
    prepared = layer.prepare(b)
    wanted = [layer.attend(queries, prepared) for queries in (a, learned.double(), beams.double())]
    monkeypatch.setattr(ragged_file.attend_varlen, "_kernel", lambda: (varlen_by_hand, shares_heads))
    monkeypatch.setattr(ragged_file.attend_varlen, "takes", lambda *args: True)
    for queries, right in zip((a, learned.double(), beams.double()), wanted, strict=True):
        for out, one in zip(layer.attend(queries, prepared), right, strict=True):
            assert_close(out, one)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_half_precision_on_cuda_is_one_launch(kv_heads: int) -> None:
    layer = make_layer(Plan(), kv_heads=kv_heads, value_head_dim=8, dtype=torch.bfloat16).cuda()
    a, b = (items(lengths, width, dtype=torch.bfloat16) for lengths, width in ((QUERY_LENGTHS, A), (CONTEXT_LENGTHS, B)))
    a, b = ([x.detach().cuda() for x in xs] for xs in (a, b))
    for i, out in enumerate(layer(a, b)):
        assert_close(out, layer(a[i][None], b[i][None])[0])


@pytest.mark.parametrize("offsets", [[0, 3, 3, 10, 99], [0, 5, 3, 10, 13]])
def test_offsets_that_the_values_do_not_have_are_refused(offsets):
    jagged = torch.nested.nested_tensor_from_jagged(torch.randn(13, 9), torch.tensor(offsets))
    with pytest.raises(ValueError, match=r"context\[\d\] of a jagged tensor is said to be rows \d+ to \d+ of 13"):
        CrossAttention(6, 9, heads=2)(torch.randn(4, 5, 6), jagged)


def test_a_jagged_tensor_may_begin_in_the_middle_of_its_values():
    layer, values = CrossAttention(6, 9, heads=2, dtype=torch.float64), torch.randn(19, 9).double().requires_grad_()
    a, bounds = torch.randn(4, 5, 6).double(), [2, 5, 5, 12, 15]
    found = layer(a, torch.nested.nested_tensor_from_jagged(values, torch.tensor(bounds)))
    wanted = torch.cat([layer(a[i : i + 1], values[None, bounds[i] : bounds[i + 1]]) for i in range(4)])
    assert (found - wanted).abs().max() < 1e-12
    direction = torch.randn_like(wanted)
    got, want = (torch.autograd.grad((out * direction).sum(), values)[0] for out in (found, wanted))
    assert (got - want).abs().max() < 1e-12
