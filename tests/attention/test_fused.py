"""The fused kernel's stand-in for a few queries on a short context: two batched products."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from crossattention import CrossAttention
from crossattention.attention import fused
from crossattention.plan.devices import built_in
from crossattention.plan.speeds import use_speeds


@pytest.fixture
def from_one_head():
    """Speeds by which few queries are written out from one head on."""
    use_speeds({("cpu", "float32"): replace(built_in("cpu", "float32"), few_queries_from=1.0)})
    yield
    use_speeds(None)


def drawn(z, heads, n, m, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(z + 7 * heads + 11 * n + 13 * m)
    shapes = ((z, n, heads, width), (z, heads, m + 3, width), (z, heads, m + 3, width))
    queries, keys, values = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return queries.transpose(1, 2), keys[:, :, :m], values[:, :, :m]  # as caches with room and split heads are laid


@pytest.mark.parametrize(("n", "m"), [(1, 9), (1, 16), (1, 40), (2, 15), (5, 7), (8, 3), (8, 40)])
def test_few_queries_are_read_as_in_float64(from_one_head, n, m):
    queries, keys, values = drawn(3, 5, n, m, 48)
    with torch.no_grad():
        assert fused._are_few(queries, keys)
        found = fused.read_whole(queries, keys, values, 0.7)
    exact = F.scaled_dot_product_attention(queries.double(), keys.double(), values.double(), scale=0.7)
    assert found.shape == (3, 5, n, 48)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_it_is_taken_only_where_it_was_measured_to_win(from_one_head):
    few = drawn(3, 5, 1, 12, 48)
    with torch.no_grad():
        assert fused._are_few(*few[:2])
        assert not fused._are_few(*drawn(3, 5, 9, 12, 48)[:2])  # too many queries
        assert not fused._are_few(*drawn(3, 5, 1, 41, 48)[:2])  # too long a context
        assert not fused._are_few(*drawn(3, 5, 1, 8, 48)[:2])  # products that torch does itself
        assert not fused._are_few(*drawn(3, 5, 1, 12, 48, torch.float64)[:2])
    assert not fused._are_few(*few[:2])  # a gradient may be asked for
    use_speeds({("cpu", "float32"): replace(built_in("cpu", "float32"), few_queries_from=16.0)})
    with torch.no_grad():
        assert not fused._are_few(*few[:2])  # 15 heads


def test_hooked_and_plain_layers_take_it_alike(from_one_head):
    layer = CrossAttention(24, 24, heads=4).eval()
    a, b = torch.randn(6, 1, 24), torch.randn(6, 30, 24)
    with torch.no_grad():
        prepared = layer.prepare(b, query_length=1, uses=30)
        plain = layer.attend(a, prepared)
        handle = layer.out_proj.register_forward_hook(lambda *call: None)
        hooked = layer.attend(a, prepared)
        handle.remove()
    assert torch.equal(plain, hooked)
