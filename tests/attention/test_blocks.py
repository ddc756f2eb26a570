"""The blocked kernel against explicit weights: every way in which heads share, every mask, every way of cutting, with gradients."""

import pytest
import torch

from crossattention import CrossAttention, Plan
from crossattention.attention.blocks import attend_blocks
from crossattention.attention.execute import attend_heads
from crossattention.attention.masks import combine_masks
from crossattention.plan import blocks as cuts

HEADS = 4
# groups of keys, groups of values, heads of queries, whether keys are the values, whether heads are summed
SHARING = [
    (4, 4, 4, False, False),
    (1, 1, 4, True, False),
    (2, 2, 4, False, False),
    (1, 4, 4, False, False),
    (4, 1, 4, False, False),
    (2, 1, 4, False, False),
    (1, 2, 4, False, False),
    (4, 4, 1, False, True),
    (4, 4, 1, False, False),
    (4, 1, 1, False, False),
    (1, 4, 4, False, True),
    (2, 4, 4, False, True),
]
# scores of a block, longest row, positions and rows of a part, length of a narrow row: as they are, without narrow rows, and so
# small that all is cut
CUTS = [
    (1 << 20, 8192, 2048, 512, 16),
    (1 << 20, 8192, 2048, 512, 0),
    (40, 8192, 2048, 512, 16),
    (40, 10, 4, 3, 0),
    (7, 5, 2, 5, 4),
]
LENGTHS = [(1, 9), (5, 7), (11, 2)]


def cut(monkeypatch, values):
    for name, value in zip(("BLOCK_SCORES", "LONGEST_ROW", "PART", "PART_ROWS", "NARROW_ROW"), values, strict=True):
        monkeypatch.setattr(cuts, name, value)


def tensors(n, m, groups, value_groups, query_heads, same, z=3, items=3, dtype=torch.float64):
    queries = torch.randn(items, query_heads, n, 6, dtype=dtype, requires_grad=True)
    keys = torch.randn(z, groups, m, 6, dtype=dtype, requires_grad=True)
    values = keys if same else torch.randn(z, value_groups, m, 5, dtype=dtype, requires_grad=True)
    return queries, keys, values


def masks(kind, n, m, dtype=torch.float64, z=3):
    context = torch.rand(z, m) > 0.4
    context[0] = False
    pairs = torch.rand(z, HEADS, n, m) > 0.3
    added = torch.randn(1, HEADS, n, m, dtype=dtype).masked_fill(~pairs[:1], -torch.inf)
    given = {
        "none": (None, None),
        "context": (context, None),
        "pairs": (None, pairs),
        "both": (context, pairs),
        "rows": (context, torch.randn(n, m, dtype=dtype)),
        "added": (None, added),
    }[kind]
    return combine_masks(*given, None, m, dtype)


@pytest.mark.parametrize("cuts_", [*CUTS[:-1], pytest.param(CUTS[-1], marks=pytest.mark.slow)], ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("kind", ["none", "context", "pairs", "both", "rows", "added"])
def test_blocks_equal_explicit_weights_with_gradients(monkeypatch, cuts_, kind):
    cut(monkeypatch, cuts_)
    for n, m in LENGTHS:
        for groups, value_groups, query_heads, same, sums in SHARING:
            for items in (3, 1) if n == 5 else (3,):
                queries, keys, values = tensors(n, m, groups, value_groups, query_heads, same, items=items)
                mask = masks(kind, n, m)
                found = attend_blocks(queries, keys, values, mask.tensor, mask.live, 0.37, sums)
                wanted, _ = attend_heads(queries, keys, values, mask, scale=0.37, kernel="explicit", sums_heads=sums)
                torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
                inputs = (queries, keys) if same else (queries, keys, values)
                grad = torch.randn_like(wanted)
                for got, want in zip(*(torch.autograd.grad(out, inputs, grad) for out in (found, wanted)), strict=True):
                    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("cuts_", [CUTS[0], CUTS[-1]], ids=["whole rows", "parts"])
@pytest.mark.parametrize("same", [False, True])
def test_first_and_second_derivatives(monkeypatch, cuts_, same):
    cut(monkeypatch, cuts_)
    queries, keys, values = tensors(2, 6, 2, 2, HEADS, same, z=1, items=1)  # every number is moved by itself: few of them

    def read(queries, keys, *others):
        return attend_blocks(queries, keys, others[0] if others else keys, None, None, 0.5, False)

    inputs = (queries, keys) if same else (queries, keys, values)
    assert torch.autograd.gradcheck(read, inputs) and torch.autograd.gradgradcheck(read, inputs)


def test_only_the_gradients_that_are_asked_for_are_made():
    queries, keys, values = tensors(5, 7, HEADS, HEADS, HEADS, False)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        inputs = [t.detach().requires_grad_(w) for t, w in zip((queries, keys, values), wanted, strict=True)]
        attend_blocks(*inputs, None, None, 0.5, False).sum().backward()
        assert [t.grad is not None for t in inputs] == list(wanted)


def test_a_long_context_is_read_in_parts_and_float32_keeps_its_precision():
    layer = CrossAttention(32, 24, heads=2, plan=Plan("context", "context", "blocked"))
    a, b = torch.randn(2, 3, 32), torch.randn(2, 20000, 24)
    exact = CrossAttention(32, 24, heads=2, plan="textbook").double()
    exact.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(a, b), exact(a.double(), b.double()).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_under_vmap_and_forward_derivatives_the_explicit_kernel_stands_in():
    layer = CrossAttention(8, 6, heads=2, plan=Plan("head", "head", "blocked")).double()
    a, b = torch.randn(3, 2, 4, 8).double(), torch.randn(3, 2, 5, 6).double()
    each = torch.stack([layer(x, y) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(torch.func.vmap(layer)(a, b), each)
    _, slope = torch.func.jvp(lambda x: layer(x, b[0]), (a[0],), (torch.ones_like(a[0]),))
    step = 1e-6
    torch.testing.assert_close(slope, (layer(a[0] + step, b[0]) - layer(a[0] - step, b[0])) / (2 * step), atol=1e-7, rtol=1e-5)


def test_memory_does_not_grow_with_the_pairs():
    """Counted, not timed: no tensor of n x m scores is made, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    Largest.numbers = max(Largest.numbers, tensor.numel())
            return out

    queries, keys, values = (torch.randn(1, 2, 3000, 4, requires_grad=True) for _ in range(3))
    with Largest():
        attend_blocks(queries, keys, values, None, None, 0.5, False).sum().backward()
    assert 3000 * 4 <= Largest.numbers <= cuts.BLOCK_SCORES < 3000 * 3000
