"""Partial results: merged in any number of parts they equal attention over all keys, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from crossattention.attention import Part, Partial, attend_parts, merge_partials
from tolerances import assert_close

Z, H, N, C, W = 2, 3, 5, 8, 6
SCALE = 0.37


def textbook(q, k, v, mask):
    """Output and log-sum-exp with every score held."""
    scores = q @ k.transpose(-1, -2) * SCALE
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    lse = torch.where(empty[..., 0], -torch.inf, scores.masked_fill(empty, 0.0).logsumexp(-1))
    return weights @ v, lse


def work(lengths, mask_kind, dtype=torch.float64, w=W):
    m = sum(lengths)
    q, k, v = (torch.randn(Z, H, length, width, dtype=dtype, requires_grad=True) for length, width in ((N, C), (m, C), (m, w)))
    mask = {
        "none": None,
        "bool": torch.rand(Z, 1, N, m) > 0.4,
        "added": torch.randn(H, N, m, dtype=dtype),
        "empty row": torch.ones(Z, H, N, m, dtype=torch.bool),
    }[mask_kind]
    if mask_kind == "empty row":
        mask[0, :, 2] = False
        mask[1, 0, 3, : lengths[0]] = False
    return q, k, v, mask


def cut(k, v, mask, lengths):
    masks = [None] * len(lengths) if mask is None else mask.split(lengths, -1)
    return [Part(*piece) for piece in zip(k.split(lengths, 2), v.split(lengths, 2), masks, strict=True)]


@pytest.mark.parametrize("mask_kind", ["none", "bool", "added", "empty row"])
@pytest.mark.parametrize("lengths", [(7,), (3, 4), (1, 0, 4, 2), (0, 7)], ids=str)
@pytest.mark.parametrize("w", [W, C, 11])
def test_parts_equal_the_whole_with_gradients(lengths, mask_kind, w):
    q, k, v, mask = work(lengths, mask_kind, w=w)
    found = attend_parts(q, cut(k, v, mask, lengths), scale=SCALE)
    output, lse = textbook(q, k, v, mask)
    assert_close(found.output, output)
    assert torch.equal(found.lse == -torch.inf, lse == -torch.inf)
    assert_close(found.lse.nan_to_num(neginf=-9.0), lse.nan_to_num(neginf=-9.0))
    direction = torch.randn_like(output)
    for grad, wanted in zip(
        torch.autograd.grad((found.output * direction).sum(), (q, k, v)),
        torch.autograd.grad((output * direction).sum(), (q, k, v)),
        strict=True,
    ):
        assert_close(grad, wanted)


def test_the_log_sum_exp_has_an_exact_gradient_too():
    lengths = (3, 4)
    q, k, v, mask = work(lengths, "empty row")
    live = mask.any(-1)
    direction, weight = torch.randn(Z, H, N, W, dtype=torch.float64), torch.randn(Z, H, N, dtype=torch.float64)

    def value(output, lse):
        return (output * direction).sum() + (torch.where(live.expand(lse.shape), lse, 0.0) * weight).sum()

    found = attend_parts(q, cut(k, v, mask, lengths), scale=SCALE)
    got = torch.autograd.grad(value(found.output, found.lse), (q, k, v))
    wanted = torch.autograd.grad(value(*textbook(q, k, v, mask)), (q, k, v))
    for grad, want in zip(got, wanted, strict=True):
        assert_close(grad, want)
    only_lse = attend_parts(q, cut(k, v, None, lengths), scale=SCALE).lse.sum()
    assert_close(torch.autograd.grad(only_lse, q)[0], torch.autograd.grad(textbook(q, k, v, None)[1].sum(), q)[0])


def test_merging_partial_results_is_exact_and_differentiable():
    lengths = (2, 5)
    q, k, v, mask = work(lengths, "empty row")
    pieces = cut(k, v, mask, lengths)
    merged = merge_partials([Partial(*textbook(q, p.keys, p.values, p.mask)) for p in pieces])
    output, lse = textbook(q, k, v, mask)
    assert_close(merged.output, output)
    assert_close(merged.lse.nan_to_num(neginf=-9.0), lse.nan_to_num(neginf=-9.0))
    direction = torch.randn_like(output)
    for grad, wanted in zip(
        torch.autograd.grad((merged.output * direction).sum(), (q, k, v)),
        torch.autograd.grad((output * direction).sum(), (q, k, v)),
        strict=True,
    ):
        assert grad.isfinite().all()
        assert_close(grad, wanted)


def test_the_order_of_parts_does_not_matter_and_one_part_is_itself():
    lengths = (2, 3, 2)
    q, k, v, mask = work(lengths, "bool")
    pieces = cut(k, v, mask, lengths)
    assert_close(attend_parts(q, pieces, scale=SCALE).output, attend_parts(q, pieces[::-1], scale=SCALE).output)
    one = attend_parts(q, [Part(k, v)], scale=SCALE)
    assert_close(one.output, F.scaled_dot_product_attention(q, k, v, scale=SCALE))
    assert torch.equal(merge_partials([one]).output, one.output)


def test_no_query_and_no_key_do_not_stop_the_process():
    for n, m in ((0, 4), (3, 0), (0, 0)):
        q, k, v = (torch.randn(Z, H, length, C, requires_grad=True) for length in (n, m, m))
        found = attend_parts(q, [Part(k, v), Part(k, v)], scale=SCALE)
        assert found.output.shape == (Z, H, n, C) and not found.output.any()
        assert (found.lse == -torch.inf).all()
        found.output.sum().backward()
        assert not q.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_the_whole(dtype):
    lengths = (40, 25, 35)
    q, k, v, mask = work(lengths, "bool", dtype)
    found = attend_parts(q, cut(k, v, mask, lengths), scale=SCALE)
    output, _ = textbook(q.double(), k.double(), v.double(), mask)
    assert_close(found.output, output)
    found.output.sum().backward()
    assert q.grad.dtype == dtype and q.grad.isfinite().all()


def test_gradcheck_holds():
    q, k, v, mask = work((2, 3), "empty row")
    assert torch.autograd.gradcheck(lambda q, k, v: attend_parts(q, cut(k, v, mask, (2, 3)), scale=SCALE).output, (q, k, v))


def test_bad_parts_are_named():
    q, k, v, _ = work((7,), "none")
    with pytest.raises(ValueError, match="at least one part"):
        attend_parts(q, [], scale=1.0)
    with pytest.raises(ValueError, match=r"part 1: keys must be \(2, 3, m, 8\)"):
        attend_parts(q, [Part(k, v), Part(k[..., :5], v)], scale=1.0)
    with pytest.raises(ValueError, match="part 0: the mask requires a gradient"):
        attend_parts(q, [Part(k, v, torch.zeros(7, dtype=torch.float64, requires_grad=True))], scale=1.0)
    with pytest.raises(ValueError, match="got none"):
        merge_partials([])
    with pytest.raises(ValueError, match="same shapes"):
        merge_partials([Partial(q, q[..., 0]), Partial(q[:, :1], q[:, :1, :, 0])])


def test_queries_that_overlap_in_memory_are_read_right():
    frames = torch.randn(Z, H, C + N - 1, dtype=torch.float64).unfold(-1, C, 1)
    shared = torch.randn(Z, 1, N, C, dtype=torch.float64).expand(-1, H, -1, -1)
    _, k, v, _ = work((3, 4), "none")
    for q in (frames, shared, torch.randn(Z, H, C, N, dtype=torch.float64).mT):
        q = q.detach().requires_grad_()
        found, (output, _) = attend_parts(q, cut(k, v, None, (3, 4)), scale=SCALE).output, textbook(q, k, v, None)
        assert_close(found, output)
        for grad, wanted in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, output)), strict=True):
            assert_close(grad, wanted)


def test_only_minus_infinity_forbids_whatever_the_dtypes_are():
    for dtype, lowest in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        q, k, v, _ = work((4,), "none", dtype)
        mask = torch.full((N, 4), torch.finfo(lowest).min, dtype=lowest)
        found = attend_parts(q, [Part(k, v, mask)], scale=SCALE)
        assert found.lse.isfinite().all() and found.output.abs().amax() > 0
        assert (found.output - v.mean(2, keepdim=True)).abs().amax() < 2e-2  # alike for all keys, as the mask drowns the scores


def test_bfloat16_loses_nothing_by_being_cut_into_many_parts():
    q, k, v, _ = work((512,), "none", torch.bfloat16)
    wanted = textbook(q.double(), k.double(), v.double(), None)[0]
    wanted_grads = torch.autograd.grad(wanted.square().sum(), (q, k, v))

    def errors(length):
        found = attend_parts(q, cut(k, v, None, (length,) * (512 // length)), scale=SCALE).output
        grads = torch.autograd.grad(found.double().square().sum(), (q, k, v))
        pairs = zip((found, *grads), (wanted, *wanted_grads), strict=True)
        return [(x.double() - y.double()).square().mean().sqrt() for x, y in pairs]

    for many, one in zip(errors(4), errors(512), strict=True):
        assert many < 1.5 * one


def test_masks_and_dtypes_that_do_not_belong_are_refused():
    q, k, v, _ = work((4,), "none")
    for part, message in (
        (Part(k.float(), v), "part 0: queries, keys and values must have one dtype, got torch.float64, torch.float32"),
        (Part(k, v, torch.full((N, 4), torch.nan)), f"{N * 4} NaN, the first at"),
        (Part(k, v, torch.ones(N + 1, 4, dtype=torch.bool)), f"{(N + 1, 4)} does not broadcast"),
    ):
        with pytest.raises(ValueError) as caught:
            attend_parts(q, [part], scale=SCALE)
        assert message in str(caught.value)


def test_second_derivatives_are_right_or_refused():
    q, k, v = (torch.randn(1, 1, length, 3, dtype=torch.float64, requires_grad=True) for length in (2, 3, 3))
    (first,) = torch.autograd.grad(attend_parts(q, [Part(k, v)], scale=SCALE).output.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        first.sum().backward()
    assert torch.autograd.gradgradcheck(lambda *x: attend_parts(x[0], [Part(*x[1:])], scale=SCALE).lse, (q, k, v))
