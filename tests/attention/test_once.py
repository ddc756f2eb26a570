"""`Once`, prepared queries, and contexts of keys and values that the caller projected."""

import pytest
import torch

from crossattention.attention import CrossAttention, Once
from crossattention.plan import Plan
from oracle import make_inputs, make_layer
from tolerances import assert_close


def test_a_value_is_made_again_when_what_it_was_made_of_changes() -> None:
    once, weight, made = Once(), torch.nn.Parameter(torch.ones(3)), []

    def value(*also: object) -> int:
        return once.get((weight, None), lambda: made.append(0) or len(made), *also)

    with torch.no_grad():
        assert (value(), value()) == (1, 1)
        weight.mul_(2.0)
        assert (value(), value()) == (2, 2)
        assert (value("other"), value("other")) == (3, 3)
        optimizer = torch.optim.AdamW([weight], fused=True)
        weight.grad = torch.ones(3)
        optimizer.step()
        assert (value("other"), value("other")) == (4, 4)
        weight.data = weight.data.double()
        assert value("other") == 5
    assert (value("other"), value("other")) == (6, 7)  # gradients may flow: nothing is kept
    with torch.no_grad():
        assert value("other") == 5
    once.forget()
    with torch.no_grad():
        assert value("other") == 8
    with torch.inference_mode():
        assert value("other") == 9
    with torch.no_grad():
        assert value("other") == 10


@pytest.mark.parametrize("scores", ["head", "context", "query"])
@pytest.mark.parametrize("shared", [True, False])
def test_prepared_queries_read_as_the_queries_do(scores: str, shared: bool) -> None:
    layer, (a, b) = make_layer(Plan(scores, "head")), make_inputs()
    a = a[0] if shared else a
    mask = torch.rand(b.shape[:2]) > 0.3
    wanted = layer(a, b, context_mask=mask)
    prepared = layer.prepare(b, context_mask=mask)
    queries = layer.prepare_queries(a, space=scores)
    assert_close(layer.attend(queries, prepared), wanted)
    assert_close(layer.score_map(queries, prepared), layer.score_map(a, prepared))
    rows = torch.tensor([3, 0])
    assert_close(layer.attend(queries.select(rows), prepared), wanted[:, rows])
    each = torch.tensor([[3, 0, 0], [1, 2, 4]])
    assert_close(layer.attend(queries.select(each), prepared), torch.stack([wanted[i, each[i]] for i in range(2)]))
    pairs = torch.rand(2, layer.heads, a.shape[-2], b.shape[1]) > 0.4
    assert_close(layer.attend(queries, prepared, attn_mask=pairs), layer.attend(a, prepared, attn_mask=pairs))
    layer.attend(queries, prepared).sum().backward()
    assert layer.q_proj.weight.grad is not None


def test_prepared_queries_are_refused_where_they_do_not_belong() -> None:
    layer, other, (a, b) = make_layer("textbook"), make_layer("textbook"), make_inputs()
    prepared = layer.prepare(b)
    with pytest.raises(ValueError, match='prepared for the "context" space but the context by the plan head'):
        layer.attend(layer.prepare_queries(a, space="context"), prepared)
    with pytest.raises(ValueError, match="by another layer"):
        layer.attend(other.prepare_queries(a), prepared)
    with pytest.raises(ValueError, match=r'space must be "head", "context" or "query", got "?\'?both'):
        layer.prepare_queries(a, space="both")
    with pytest.raises(ValueError, match="batch 1 but the prepared context has batch 2"):
        layer.attend(layer.prepare_queries(a[:1]), prepared)
    with pytest.raises(ValueError, match=r"got \(2, 5, 3\)"):
        layer.prepare_queries(torch.randn(2, 5, 3, dtype=torch.float64))
    queries = layer.prepare_queries(a)
    with torch.no_grad():
        layer.q_proj.weight.mul_(2.0)
    with pytest.raises(ValueError, match=r"out of date: q_proj.weight changed"):
        layer.attend(queries, prepared)


def test_keys_and_values_of_the_caller_are_read_as_the_layer_s() -> None:
    layer, (a, b) = make_layer("textbook"), make_inputs()
    mask = torch.rand(b.shape[:2]) > 0.3
    prepared = layer.prepare_projected(layer.k_proj(b), layer.v_proj(b), context_mask=mask)
    assert_close(layer.attend(a, prepared), layer(a, b, context_mask=mask))
    with pytest.raises(ValueError, match=r"\(batch, length, 32\) and \(batch, length, 12\), got \(2, 7, 12\)"):
        layer.prepare_projected(layer.v_proj(b), layer.k_proj(b))


def test_self_attention_that_writes_its_scores_out_is_the_same() -> None:
    from crossattention.attention import SelfAttention

    for widths in ({"head_dim": 96}, {"head_dim": 16, "value_head_dim": 40}):
        layer = SelfAttention(64, heads=2, **widths).eval()
        x, mask = torch.randn(2, 70, 64), torch.rand(2, 70) > 0.3
        mask[1] = False
        wanted = layer.double()(x.double(), mask=mask)
        layer.float()
        with torch.no_grad():
            assert_close(layer(x, mask=mask), wanted)


def test_learned_queries_of_a_batch_of_contexts() -> None:
    layer = CrossAttention(6, 9, heads=2)
    with torch.no_grad():
        a, b = torch.randn(5, 6), torch.randn(3, 7, 9)
        queries = layer.prepare_queries(a)
        assert_close(layer.attend(queries, layer.prepare(b)), layer(a, b))
