"""The block against its formula written out, the gate that begins as the identity, prepared contexts, and what is refused."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm

from crossattention import CrossAttention, CrossAttentionBlock, attention_map, record_attention
from crossattention.attention import reference_attention
from crossattention.layers import RMSNorm, Rotary
from crossattention.maps import TopK
from tolerances import assert_close

# All sizes different: z 2, n 5, m 7, a 6, b 9, h 3, k 4, v 5, inside the feed-forward layer 11.
SIZES = {"heads": 3, "head_dim": 4, "value_head_dim": 5, "hidden_dim": 11}


def drawn(part: nn.Module) -> nn.Module:
    """The part with every number drawn, biases, norms and gates too."""
    with torch.no_grad():
        for weight in part.parameters():
            weight.copy_(torch.randn_like(weight) * 0.5)
    return part


def make_block(**changes) -> CrossAttentionBlock:
    return drawn(CrossAttentionBlock(6, 9, **{**SIZES, "dtype": torch.float64, **changes}))


def make_inputs(n=5, m=7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True), torch.randn(
        2, m, 9, dtype=torch.float64, requires_grad=True
    )


def attended(layer: CrossAttention, a, b, mask):
    weights = {}
    for short, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "out_proj")):
        projection = getattr(layer, name)
        weights |= {f"{short}_weight": projection.weight, f"{short}_bias": projection.bias}
    return reference_attention(a, b, heads=layer.heads, kv_heads=layer.kv_heads, scale=layer.scale, context_mask=mask, **weights)[0]


def written_out(block: CrossAttentionBlock, a, b, mask=None):
    """The formula of the docstring, by functions of torch and the reference of attention."""

    def normed(x, norm):
        return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)

    def transformed(x):
        ff = block.feed_forward
        hidden = gelu(x @ ff.up_proj.weight.T + (0 if ff.up_proj.bias is None else ff.up_proj.bias))
        return hidden @ ff.down_proj.weight.T + (0 if ff.down_proj.bias is None else ff.down_proj.bias)

    c = b if block.context_norm is None else normed(b, block.context_norm)
    first, second = (1 if gate is None else gate.tanh() for gate in (block.attention_gate, block.feed_forward_gate))
    kept = a if block.query_residual else 0
    if block.norm == "post":
        x = normed(kept + attended(block.attention, a, c, mask), block.attention_norm)
        return x if block.feed_forward is None else normed(x + transformed(x), block.feed_forward_norm)
    x = kept + first * attended(block.attention, normed(a, block.attention_norm), c, mask)
    return x if block.feed_forward is None else x + second * transformed(normed(x, block.feed_forward_norm))


VARIANTS = (
    {},
    {"norm": "post"},
    {"context_norm": True},
    {"norm": "post", "context_norm": True, "bias": False},
    {"gated": True},
    {"gated": True, "hidden_dim": 0},
    {"query_residual": False, "context_norm": True},
    {"norm": "post", "query_residual": False, "hidden_dim": 0},
    {"bias": False, "kv_heads": 1},
)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_it_is_its_formula_with_gradients(changes) -> None:
    block, (a, b) = make_block(**changes), make_inputs()
    mask = torch.rand(2, 7) > 0.3
    mask[1] = False  # this item reads the output bias alone
    out, wanted = block(a, b, context_mask=mask), written_out(block, a, b, mask)
    assert_close(out, wanted)
    inputs, direction = [a, b, *block.parameters()], torch.randn_like(out)
    found, expected = (torch.autograd.grad((x * direction).sum(), inputs) for x in (out, wanted))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(("n", "m"), [(1, 7), (0, 7), (5, 0), (0, 0)])
def test_empty_and_single_sequences(n, m) -> None:
    for changes in ({}, {"norm": "post", "context_norm": True}):
        block, (a, b) = make_block(**changes), make_inputs(n, m)
        out = block(a, b)
        assert_close(out, written_out(block, a, b))
        assert out.shape == (2, n, 6)
        out.sum().backward()
        assert a.grad.isfinite().all() and all(weight.grad is None or weight.grad.isfinite().all() for weight in block.parameters())


@pytest.mark.parametrize("hidden_dim", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gated_block_begins_as_the_identity_to_the_bit_and_learns(dtype, hidden_dim) -> None:
    block = CrossAttentionBlock(12, 9, heads=3, gated=True, hidden_dim=hidden_dim, dtype=dtype)
    a, b = torch.randn(2, 5, 12, dtype=dtype), torch.randn(2, 7, 9, dtype=dtype)
    assert torch.equal(block(a, b), a)
    beams = torch.randn(2, 3, 5, 12, dtype=dtype)
    assert torch.equal(block.attend(beams, block.prepare(b)), beams)
    block(a, b).square().sum().backward()
    gates = [gate for gate in (block.attention_gate, block.feed_forward_gate) if gate is not None]
    assert len(gates) == (2 if hidden_dim is None else 1) and all(gate.grad.abs() > 0 for gate in gates)
    assert block.attention.v_proj.weight.grad.abs().max() == 0  # behind a closed gate


@pytest.mark.parametrize("changes", [*VARIANTS[:5], {"positions": Rotary()}], ids=str)
def test_forward_is_prepare_and_attend_and_readers_share_the_context(changes) -> None:
    block, (a, b) = make_block(**changes), make_inputs()
    mask = torch.rand(2, 7) > 0.3
    prepared = block.prepare(b, context_mask=mask, query_length=5, uses=1)
    assert torch.equal(block.attend(a, prepared), block(a, b, context_mask=mask))
    beams = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    shared = block.attend(beams, prepared)
    for beam in range(4):
        assert_close(shared[:, beam], block(beams[:, beam], b, context_mask=mask))
    learned = torch.randn(5, 6, dtype=torch.float64)
    assert_close(block.attend(learned, prepared), block(learned.expand(2, -1, -1), b, context_mask=mask))
    pairs = torch.rand(2, 3, 5, 7) > 0.5
    assert_close(block.attend(a, prepared, attn_mask=pairs), block(a, b, context_mask=mask, attn_mask=pairs))


@pytest.mark.parametrize("name", ["context_norm.weight", "context_norm.bias", "attention.k_proj.weight"])
def test_a_prepared_context_of_earlier_weights_is_refused(name) -> None:
    block, (a, b) = make_block(context_norm=True), make_inputs()
    prepared = block.prepare(b)
    block.attend(a, prepared)
    with torch.no_grad():
        block.get_parameter(name).mul_(2)
    with pytest.raises(ValueError, match=f"out of date: {name.removeprefix('attention.')} changed"):
        block.attend(a, prepared)


def test_a_prepared_context_of_another_block_is_refused() -> None:
    block, (a, b) = make_block(context_norm=True), make_inputs()
    with pytest.raises(ValueError, match="another layer made it"):
        block.attend(a, copy.deepcopy(block).prepare(b))
    with pytest.raises(ValueError, match="was made by another layer"):
        make_block().attend(a, make_block().prepare(b))
    with pytest.raises(TypeError, match="attend expects what this layer's prepare returned, got Tensor"):
        block.attend(a, b)


def test_maps_are_of_what_the_attention_inside_is_asked() -> None:
    for changes in ({}, {"norm": "post"}, {"context_norm": True}):
        block, (a, b) = make_block(**changes), make_inputs()
        mask = torch.rand(2, 7) > 0.3
        mask[:, 0] = True
        asked = a if block.norm == "post" else block.attention_norm(a)
        read = b if block.context_norm is None else block.context_norm(b)
        wanted = attention_map(block.attention, asked, read, context_mask=mask)
        assert_close(attention_map(block, a, b, context_mask=mask), wanted)
        assert_close(attention_map(block, a, block.prepare(b, context_mask=mask)), wanted)
        [top] = attention_map(block, a, b, [TopK(2)], context_mask=mask)
        assert_close(top.weights, wanted.topk(2).values)
        with record_attention(block, [TopK(2)]) as seen:
            out = block(a, b, context_mask=mask)
        assert torch.equal(out, block(a, b, context_mask=mask))
        assert_close(seen.layers["attention"].merged.results[0].weights, top.weights)


def test_dropout_acts_in_training_only() -> None:
    block = CrossAttentionBlock(8, heads=2, dropout=0.5)
    a, b = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    assert not torch.equal(block(a, b), block(a, b))
    block.eval()
    assert torch.equal(block(a, b), block(a, b))
    assert CrossAttentionBlock(8, heads=2, attention_dropout=0.25).attention.dropout == 0.25


def test_norms_are_of_the_given_kind_and_weights_of_the_given_dtype() -> None:
    block = CrossAttentionBlock(
        8, 6, heads=2, context_norm=True, norm_layer=RMSNorm, norm_eps=1e-3, gated=True, dtype=torch.bfloat16
    )
    norms = [block.attention_norm, block.context_norm, block.feed_forward_norm]
    assert all(type(norm) is RMSNorm and norm.eps == 1e-3 for norm in norms)
    assert {weight.dtype for weight in block.parameters()} == {torch.bfloat16}
    assert {weight.device.type for weight in CrossAttentionBlock(8, heads=2, gated=True, device="meta").parameters()} == {"meta"}
    assert block.feed_forward.up_proj.out_features == 32
    assert block(torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(2, 4, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"norm": "both"}, ValueError, 'norm must be "pre" or "post", got \'both\''),
        ({"gated": True, "norm": "post"}, ValueError, "a norm after the sum forbids"),
        ({"gated": True, "query_residual": False}, ValueError, "no residual forbids"),
        ({"out_dim": 7}, ValueError, "out_dim must be query_dim=6, the width that is added to, got 7"),
        ({"hidden_dim": -1}, ValueError, "hidden_dim must be at least 1, got -1"),
        ({"hidden_dim": True}, TypeError, "hidden_dim must be an integer, got bool True"),
        ({"dropout": 1.5}, ValueError, "1.5"),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"gate": True}, TypeError, "gate"),
        ({"bias": ("q_proj",)}, TypeError, "bias must be True or False, got tuple"),
        ({"gated": "no"}, TypeError, "gated must be True or False, got str 'no'"),
        ({"context_norm": None}, TypeError, "context_norm must be True or False, got NoneType"),
        ({"dropout": "0.1"}, TypeError, r"dropout must be a number in \[0, 1\), got str"),
        ({"attention_dropout": None}, TypeError, r"dropout must be a number in \[0, 1\), got NoneType"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps must be above 0, got 0.0"),
        ({"norm_layer": "rms"}, TypeError, "norm_layer must make norms"),
        ({"scale": "2"}, TypeError, "scale must be a number, got str '2'"),
        ({"activation": ["gelu"]}, ValueError, "activation must be one of relu, gelu, silu or a module"),
        (
            {"hidden_dim": 0, "activation": "relu"},
            ValueError,
            "activation is of the feed-forward layer, which hidden_dim=0 leaves out",
        ),
        ({"hidden_dim": 3.5}, TypeError, "hidden_dim must be an integer, got float 3.5"),
    ],
)
def test_what_is_refused(changes, kind, message) -> None:
    with pytest.raises(kind, match=message):
        make_block(**changes)


def test_wrong_input_is_named_by_the_attention_inside() -> None:
    block, (a, b) = make_block(), make_inputs()
    with pytest.raises(ValueError, match="context has width 6 but this layer was built with context_dim=9"):
        block(a, a)
    for wrong, name, width in (
        (b, "queries", "width 9 .*query_dim=6"),
        (a.float(), "queries", "float32"),
        (a[0, 0, 0], "queries", "none"),
    ):
        with pytest.raises(ValueError, match=f"{name} .*{width}"):
            block(wrong, b)
    with pytest.raises(ValueError, match="context of width 6 where this block was built with context_dim=9"):
        make_block(context_norm=True)(a, a)
    with pytest.raises(TypeError, match=r"queries must be a tensor .*, got NoneType"):
        attention_map(block, None, b)
    with pytest.raises(ValueError, match="batch 2 but the context has batch 1"):
        block(a, b[:1])
    with pytest.raises(ValueError, match="belongs to the prepared context"):
        block.attend(a, block.prepare(b), context_mask=torch.ones(2, 7, dtype=bool))


# -------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, {"gated": True, "context_norm": True}], ids=str)
def test_it_compiles_in_one_graph_and_exports_with_dynamic_lengths(changes) -> None:
    torch._dynamo.reset()
    block = drawn(CrossAttentionBlock(16, 24, heads=4, **changes)).eval()
    run = torch.compile(block, fullgraph=True, dynamic=True)
    a, b, mask = torch.randn(3, 4, 16), torch.randn(3, 6, 24), torch.rand(3, 6) > 0.3
    z, n, m = (torch.export.Dim(name) for name in "znm")
    shapes = {"a": {0: z, 1: n}, "b": {0: z, 1: m}, "context_mask": {0: z, 1: m}}
    program = torch.export.export(block, (a, b), kwargs={"context_mask": mask}, dynamic_shapes=shapes).module()
    for n, m in itertools.product((2, 9), (3, 40)):
        a, b, mask = torch.randn(2, n, 16), torch.randn(2, m, 24), torch.rand(2, m) > 0.3
        wanted = block(a, b, context_mask=mask)
        assert_close(run(a, b, context_mask=mask), wanted)
        assert_close(program(a, b, context_mask=mask), wanted)


class Attends(nn.Module):
    def __init__(self, block) -> None:
        super().__init__()
        self.block = block

    def forward(self, a, prepared):
        return self.block.attend(a, prepared)


@pytest.mark.slow
def test_attend_compiles_and_exports_with_a_prepared_context_as_input() -> None:
    torch._dynamo.reset()
    block = drawn(CrossAttentionBlock(16, 24, heads=4, context_norm=True)).eval()
    a = torch.randn(2, 5, 16)
    with torch.no_grad():
        prepared = block.prepare(torch.randn(2, 7, 24))
        assert_close(torch.compile(Attends(block), fullgraph=True)(a, prepared), block.attend(a, prepared))
        assert_close(torch.export.export(Attends(block), (a, prepared)).module()(a, prepared), block.attend(a, prepared))
