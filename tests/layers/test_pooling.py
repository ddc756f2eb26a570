"""Pools and resamplers against timm's map head, Set Transformer's PMA and Flamingo's resampler written out, with gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm

from crossattention import AttentionPool, Resampler, attention_map, record_attention
from crossattention.layers import FeedForward, QueryKeyLayerNorm
from crossattention.maps import TopK
from tolerances import assert_close


def drawn(part: nn.Module) -> nn.Module:
    """The part with every number drawn, biases and norms too."""
    with torch.no_grad():
        for weight in part.parameters():
            weight.copy_(torch.randn_like(weight) * 0.5)
    return part


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same_gradients(out, wanted, inputs, others=None) -> None:
    direction = torch.randn_like(out)
    found = torch.autograd.grad((out * direction).sum(), inputs)
    expected = torch.autograd.grad((wanted * direction).sum(), inputs if others is None else others)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other.reshape(one.shape))


def multihead(layer, a, b, mask=None):
    """Multi-head attention, head by head; a (z, n, a), b (z, m, b), mask (z, m)."""
    q, k, v = layer.q_proj(a), layer.k_proj(b), layer.v_proj(b)
    read = []
    for head in range(layer.heads):
        cut = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        scores = q[..., cut] @ k[..., cut].mT / layer.head_dim**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        read.append(scores.softmax(-1) @ v[..., cut])
    return layer.out_proj(torch.cat(read, -1))


def normed(x, norm):
    return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


# ---------------------------------------------------------------------------------------------------------------- pools


@pytest.mark.parametrize("num_queries", [1, 3])
def test_without_more_it_is_the_attention_of_learned_queries(num_queries) -> None:
    pool = drawn(AttentionPool(12, 9, num_queries=num_queries, heads=3, dtype=torch.float64))
    b = doubles(2, 7, 9)
    out, wanted = pool(b), multihead(pool.block.attention, pool.queries.expand(2, -1, -1), b)
    assert out.shape == (2, num_queries, 12)
    assert_close(out, wanted)
    assert_same_gradients(out, wanted, [b, pool.queries, *pool.block.attention.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"norm_layer": nn.LayerNorm, "latent_len": 3}], ids=str
)
def test_the_map_head_is_timm_s_with_the_same_weights(options) -> None:
    from timm.layers import AttentionPoolLatent

    theirs = drawn(AttentionPoolLatent(12, num_heads=3, pool_type="", mlp_ratio=2, **options).double())
    has_norm = "norm_layer" in options
    parts = {"qk_norm": QueryKeyLayerNorm(4, eps=1e-5, dtype=torch.float64)} if "qk_norm" in options else {}
    num_queries = options.get("latent_len", 1)
    norm_layer = nn.LayerNorm if has_norm else nn.Identity
    ours = AttentionPool(12, num_queries=num_queries, heads=3, hidden_dim=24, norm_layer=norm_layer, dtype=torch.float64, **parts)
    names = {
        "queries": theirs.latent[0],
        "block.attention.q_proj.weight": theirs.q.weight,
        "block.attention.q_proj.bias": theirs.q.bias,
        "block.attention.k_proj.weight": theirs.kv.weight[:12],
        "block.attention.k_proj.bias": theirs.kv.bias[:12],
        "block.attention.v_proj.weight": theirs.kv.weight[12:],
        "block.attention.v_proj.bias": theirs.kv.bias[12:],
        "block.attention.out_proj.weight": theirs.proj.weight,
        "block.attention.out_proj.bias": theirs.proj.bias,
        "block.feed_forward.up_proj.weight": theirs.mlp.fc1.weight,
        "block.feed_forward.up_proj.bias": theirs.mlp.fc1.bias,
        "block.feed_forward.down_proj.weight": theirs.mlp.fc2.weight,
        "block.feed_forward.down_proj.bias": theirs.mlp.fc2.bias,
    }
    if has_norm:
        names |= {f"block.feed_forward_norm.{name}": weight for name, weight in theirs.norm.named_parameters()}
    if "qk_norm" in options:
        names |= {f"block.attention.qk_norm.query_norm.{name}": weight for name, weight in theirs.q_norm.named_parameters()}
        names |= {f"block.attention.qk_norm.key_norm.{name}": weight for name, weight in theirs.k_norm.named_parameters()}
    ours.load_state_dict(names)
    x = doubles(2, 7, 12)
    out, wanted = ours(x), theirs(x)
    assert out.shape == (2, num_queries, 12)
    assert_close(out, wanted)
    assert_same_gradients(out, wanted, [x, ours.queries], [x, theirs.latent])


def test_with_a_norm_after_each_sum_it_is_pooling_by_multihead_attention() -> None:
    """PMA(Z) = MAB(S, rFF(Z)), MAB(X, Y) = LN(H + rFF(H)), H = LN(X + Multihead(X, Y, Y)): Lee et al. 2019."""
    pool = drawn(AttentionPool(12, 9, num_queries=3, heads=3, hidden_dim=20, norm="post", activation="relu", dtype=torch.float64))
    before, z = drawn(FeedForward(8, 11, out_dim=9, dtype=torch.float64)), doubles(2, 7, 8)
    block, seeds = pool.block, pool.queries.expand(2, -1, -1)
    h = normed(seeds + multihead(block.attention, seeds, before(z)), block.attention_norm)
    up, down = block.feed_forward.up_proj, block.feed_forward.down_proj
    wanted = normed(h + ((h @ up.weight.T + up.bias).clamp(min=0) @ down.weight.T + down.bias), block.feed_forward_norm)
    out = pool(before(z))
    assert_close(out, wanted)
    assert_same_gradients(out, wanted, [z, *pool.parameters(), *before.parameters()])
    order = torch.randperm(7)
    assert_close(pool(before(z[:, order])), out)  # it pools a set


@pytest.mark.parametrize("options", [{}, {"hidden_dim": 8, "context_norm": True}, {"hidden_dim": 8, "norm": "post"}], ids=str)
def test_a_pool_prepares_masks_and_maps(options) -> None:
    pool = drawn(AttentionPool(12, 9, num_queries=3, heads=3, dtype=torch.float64, **options))
    b, mask = doubles(2, 7, 9), torch.rand(2, 7) > 0.4
    mask[0], mask[1, 0] = False, True
    prepared = pool.prepare(b, context_mask=mask)
    out = pool(b, context_mask=mask)
    assert torch.equal(pool.attend(prepared), out)
    assert_close(pool(b[1:, mask[1]]), out[1:])
    assert_close(out[:1], pool(b[:1, :0]))  # nothing may be read, or nothing is there
    weights = attention_map(pool, None, b, context_mask=mask)
    read = b if pool.block.context_norm is None else pool.block.context_norm(b)
    assert_close(weights, attention_map(pool.block.attention, pool.queries, read, context_mask=mask))
    assert_close(attention_map(pool, None, prepared), weights)
    with record_attention(pool, [TopK(1)]) as seen:
        pool(b, context_mask=mask)
    assert_close(seen.layers["block.attention"].merged.results[0].weights, weights.topk(1).values)


def test_queries_are_projected_once_for_a_batch() -> None:
    pool, shapes = AttentionPool(12, num_queries=3, heads=3), []
    pool.block.attention.q_proj.register_forward_hook(lambda layer, args, out: shapes.append(tuple(args[0].shape)))
    pool(torch.randn(5, 7, 12))
    assert shapes == [(1, 3, 12)]


def test_half_precision_devices_and_what_a_pool_refuses() -> None:
    assert AttentionPool(12, 9, heads=3, dtype=torch.bfloat16)(torch.randn(2, 7, 9, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {weight.device.type for weight in AttentionPool(12, heads=3, hidden_dim=8, device="meta").parameters()} == {"meta"}
    with pytest.raises(ValueError, match="num_queries must be at least 1, got 0"):
        AttentionPool(12, num_queries=0)
    with pytest.raises(TypeError, match="AttentionPool takes no gated, got True"):
        AttentionPool(12, gated=True)
    pool = AttentionPool(12, 9, heads=3)
    with pytest.raises(ValueError, match="context has width 12 but this layer was built with context_dim=9"):
        pool(torch.randn(2, 7, 12))
    with pytest.raises(TypeError, match="has queries of its own, so None stands in the place of A, got Tensor"):
        attention_map(pool, torch.randn(2, 3, 12), torch.randn(2, 7, 9))
    with pytest.raises(TypeError, match=r"queries must be a tensor .*, got NoneType"):
        attention_map(pool.block, None, torch.randn(2, 7, 9))


# ----------------------------------------------------------------------------------------------------------- resamplers


def resampled(part: Resampler, b, mask=None):
    """Flamingo's resampler, written out: each layer reads B and the latents, both normalised, then its feed-forward layer."""
    x = part.latents.expand(len(b), -1, -1)
    b = b if part.context_proj is None else part.context_proj(b)
    for block in part.layers:
        latents, media = normed(x, block.attention_norm), normed(b, block.context_norm)
        read, seen = (torch.cat((media, latents), 1), mask) if part.reads_latents else (media, mask)
        if mask is not None and part.reads_latents:
            seen = torch.cat((mask, torch.ones(latents.shape[:2], dtype=bool)), 1)
        x = x + multihead(block.attention, latents, read, seen)
        if block.feed_forward is not None:
            hidden = gelu(block.feed_forward.up_proj(normed(x, block.feed_forward_norm)))
            x = x + block.feed_forward.down_proj(hidden)
    return normed(x, part.norm)


@pytest.mark.parametrize("context_dim", [12, 9])
@pytest.mark.parametrize("options", [{}, {"reads_latents": False}, {"bias": False, "hidden_dim": 0}], ids=str)
def test_a_resampler_is_flamingo_s_written_out(options, context_dim) -> None:
    part = drawn(Resampler(12, context_dim, num_latents=4, num_layers=3, heads=3, dtype=torch.float64, **options))
    b, mask = doubles(2, 7, context_dim), torch.rand(2, 7) > 0.4
    mask[:, 0] = True
    out, wanted = part(b, context_mask=mask), resampled(part, b, mask)
    assert out.shape == (2, 4, 12) and (part.context_proj is None) == (context_dim == 12 or not part.reads_latents)
    assert_close(out, wanted)
    assert_same_gradients(out, wanted, [b, *part.parameters()])


@pytest.mark.slow
def test_a_resampler_is_that_of_idefics_with_the_same_weights() -> None:
    from transformers.models.idefics.configuration_idefics import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(vision_config={"embed_dim": 12}, perceiver_config={"qk_layer_norms_perceiver": True})
    theirs = drawn(IdeficsPerceiverResampler(config, 12, 3, 2, 5, 4).double())
    part = QueryKeyLayerNorm(5, eps=1e-5, dtype=torch.float64)
    sizes = {"num_latents": 4, "num_layers": 3, "heads": 2, "head_dim": 5, "activation": "relu", "qk_norm": part}
    ours = Resampler(12, bias=False, dtype=torch.float64, **sizes)
    names = {
        "0.context_layer_norm": "context_norm",
        "0.latents_layer_norm": "attention_norm",
        "0.q_layer_norm": "attention.qk_norm.query_norm",
        "0.k_layer_norm": "attention.qk_norm.key_norm",
        "0.q_proj": "attention.q_proj",
        "0.k_proj": "attention.k_proj",
        "0.v_proj": "attention.v_proj",
        "0.output_proj": "attention.out_proj",
        "1.ln": "feed_forward_norm",
        "1.fc": "feed_forward.up_proj",
        "1.c_proj": "feed_forward.down_proj",
    }
    renamed = {}
    for name, weight in theirs.state_dict().items():
        if name.startswith("blocks."):
            _, layer, module = name.rsplit(".", 1)[0].split(".", 2)
            name = f"layers.{layer}.{names[module]}.{name.rsplit('.', 1)[1]}"
        renamed[name.replace("layer_norm", "norm") if name.startswith("layer_norm") else name] = weight
    ours.load_state_dict(renamed)
    b = doubles(2, 9, 12)
    out, wanted = ours(b), theirs(b)
    assert_close(out, wanted)
    assert_same_gradients(out, wanted, [b, ours.latents], [b, theirs.latents])


@pytest.mark.parametrize("reads_latents", [True, False])
def test_a_resampler_prepares_masks_and_maps(reads_latents) -> None:
    part = drawn(Resampler(12, 9, num_latents=4, num_layers=2, heads=3, reads_latents=reads_latents, dtype=torch.float64))
    b, mask = doubles(2, 7, 9), torch.rand(2, 7) > 0.4
    mask[0], mask[1, 0] = False, True
    prepared, out = part.prepare(b, context_mask=mask), part(b, context_mask=mask)
    assert torch.equal(part.attend(prepared), out) and torch.equal(part.attend(prepared), out)
    assert_close(part(b[1:, mask[1]]), out[1:])
    assert_close(part(b[:1, :0]), out[:1])  # nothing of B: latents read one another, or the output bias
    assert out.isfinite().all()
    with record_attention(part, [TopK(1)]) as seen:
        assert torch.equal(part(b, context_mask=mask), out)
    for layer in range(2):
        weights = attention_map(*part.reading(None, prepared, layer=layer))
        assert weights.shape == (2, 3, 4, 11 if reads_latents else 7)
        assert not weights[..., :7].masked_select(~mask[:, None, None]).any()
        assert_close(seen.layers[f"layers.{layer}.attention"].merged.results[0].weights, weights.topk(1).values)
    assert_close(attention_map(part, None, prepared), weights)
    assert attention_map(part, None, b).shape == weights.shape


def test_a_resampler_s_prepared_context_goes_out_of_date() -> None:
    part = drawn(Resampler(12, num_latents=4, num_layers=2, heads=3))
    prepared = part.prepare(torch.randn(2, 7, 12))
    with torch.no_grad():
        part.layers[1].context_norm.bias.add_(1)
    with pytest.raises(ValueError, match=r"out of date: context_norm\.bias changed"):
        part.attend(prepared)
    with pytest.raises(ValueError, match=r"out of date: .*or another layer made it"):
        copy.deepcopy(part).attend(prepared)


def test_layers_of_a_resampler_share_no_part() -> None:
    part = Resampler(12, num_layers=3, heads=3, qk_norm=QueryKeyLayerNorm(4), activation=nn.PReLU())
    assert len({id(layer.attention.qk_norm) for layer in part.layers}) == 3
    assert len({id(layer.feed_forward.activation.weight) for layer in part.layers}) == 3


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: Resampler(12, num_latents=0), ValueError, "num_latents must be at least 1, got 0"),
        (lambda: Resampler(12, num_layers=0), ValueError, "num_layers must be at least 1, got 0"),
        (lambda: Resampler(12, norm="post"), TypeError, "Resampler takes no norm, got 'post'"),
        (lambda: Resampler(12, gated=True), TypeError, "Resampler takes no gated, got True"),
        (lambda: Resampler(12, 0), ValueError, "context_dim must be at least 1, got 0"),
        (
            lambda: Resampler(12, 9, heads=3)(torch.randn(2, 7, 12)),
            ValueError,
            r"must be \(batch, length, 9\), got shape \(2, 7, 12\)",
        ),
        (lambda: Resampler(12, heads=3, num_layers=2).attend(()), ValueError, "one prepared context a layer, 2, got 0"),
        (
            lambda: Resampler(12, heads=3, num_layers=2).attend(torch.randn(2, 7, 12)),
            TypeError,
            "one prepared context a layer, 2, got Tensor",
        ),
        (lambda: Resampler(12, heads=3, num_layers=2).attend([None, None]), TypeError, "a layer, 2, got NoneType among them"),
        (
            lambda: Resampler(12, 9, heads=3)(torch.randn(2, 7, 9).double()),
            ValueError,
            "context are torch.float64 but the layer's weights",
        ),
        (
            lambda: Resampler(12, 9, heads=3)(torch.ones(2, 7, 9).long()),
            ValueError,
            "context are torch.int64 but the layer's weights",
        ),
        (lambda: Resampler("12", 9, heads=3), TypeError, "query_dim must be an integer, got str '12'"),
        (lambda: Resampler(12, heads=3, reads_latents=1), TypeError, "reads_latents must be True or False, got int 1"),
        (lambda: AttentionPool(12, heads=3, activation="relu"), ValueError, "which hidden_dim=0 leaves out, got 'relu'"),
        (lambda: attention_map(nn.Linear(2, 2), None, None), TypeError, "a part around one, got Linear"),
    ],
)
def test_what_is_refused(build, kind, message) -> None:
    with pytest.raises(kind, match=message):
        build()


def test_devices_and_dtypes_reach_every_weight() -> None:
    part = Resampler(12, 9, heads=3, num_layers=2, device="meta", dtype=torch.bfloat16)
    assert {(weight.device.type, weight.dtype) for weight in part.parameters()} == {("meta", torch.bfloat16)}


# -------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pool", "resampler", "reads B alone"])
def test_they_compile_in_one_graph_and_export_with_dynamic_lengths(kind) -> None:
    torch._dynamo.reset()
    if kind == "pool":
        part = AttentionPool(16, 24, num_queries=3, heads=4, hidden_dim=20)
    else:
        part = Resampler(16, 24, num_latents=5, num_layers=2, heads=4, reads_latents=kind == "resampler")
    part = drawn(part).eval()
    run = torch.compile(part, fullgraph=True, dynamic=True)
    b, mask = torch.randn(3, 6, 24), torch.rand(3, 6) > 0.3
    z, m = (torch.export.Dim(name) for name in "zm")
    shapes = {"b": {0: z, 1: m}, "context_mask": {0: z, 1: m}}
    program = torch.export.export(part, (b,), kwargs={"context_mask": mask}, dynamic_shapes=shapes).module()
    for m in (4, 40):
        b, mask = torch.randn(2, m, 24), torch.rand(2, m) > 0.3
        wanted = part(b, context_mask=mask)
        assert_close(run(b, context_mask=mask), wanted)
        assert_close(program(b, context_mask=mask), wanted)
