"""The Transformer: its sizes, its three ways of decoding, its loss, and what it refuses."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crossattention.models.transformer import (
    Transformer,
    TransformerConfig,
    base,
    big,
    label_smoothed_cross_entropy,
)
from tolerances import TOLERANCES, assert_close

TINY = TransformerConfig(
    19, 23, dim=12, heads=3, encoder_layers=2, decoder_layers=3, feed_forward_dim=20, tied="target", max_length=16
)
VARIANTS = {
    "paper": TINY,
    "pre": replace(TINY, norm="pre"),
    "learned": replace(TINY, positions="learned", activation="gelu"),
    "bias": replace(TINY, activation="silu", output_bias=True),
    "tied": replace(TINY, source_vocab_size=23, tied="all"),
    "untied": replace(TINY, tied="none", norm="pre", positions="learned"),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def tiny(config: TransformerConfig = TINY, dtype: torch.dtype = torch.float64) -> Transformer:
    model = Transformer(config, dtype=dtype).eval()
    # Norms and biases away from 1 and 0, so that none can be left out unseen.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pair(z: int = 4, m: int = 7, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Source, target and a source mask with a full row, short rows and (from three rows on) an empty one."""
    lengths = torch.tensor([m, m - 2, 0, 1, m - 1][:z])
    return torch.randint(3, 19, (z, m)), torch.randint(3, 23, (z, n)), torch.arange(m) < lengths[:, None]


# ------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(("config", "millions"), [(base(), 63.082496), (big(), 214.245376)], ids=["base", "big"])
def test_presets_have_the_papers_parameter_counts(config: TransformerConfig, millions: float) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == round(millions * 1e6)


def test_a_preset_takes_changes() -> None:
    assert big(32_000, dropout=0.1) == replace(big(), source_vocab_size=32_000, target_vocab_size=32_000, dropout=0.1)


@pytest.mark.parametrize(
    ("tied", "names"),
    [
        ("all", {"target_embedding.weight"}),
        ("target", {"target_embedding.weight", "source_embedding.weight"}),
        ("none", {"target_embedding.weight", "source_embedding.weight", "out_proj.weight"}),
    ],
)
def test_tied_matrices_exist_once(tied: str, names: set[str]) -> None:
    model = Transformer(replace(TINY, source_vocab_size=23, tied=tied))
    assert {name for name in model.state_dict() if name.startswith(("source_", "target_", "out_"))} == names


def test_post_norm_has_no_norm_after_the_stacks_and_pre_norm_has_one_each() -> None:
    added = set(Transformer(replace(TINY, norm="pre")).state_dict()) - set(Transformer(TINY).state_dict())
    assert added == {f"{stack}.norm.{name}" for stack in ("encoder", "decoder") for name in ("weight", "bias")}


def test_initial_weights_follow_the_documented_policy() -> None:
    torch.manual_seed(1)
    model = Transformer(base(4000, positions="learned", encoder_layers=1, decoder_layers=1))
    for table in (model.target_embedding, model.source_positions, model.target_positions):
        assert table.weight.std().item() == pytest.approx(512**-0.5, rel=0.01)
    layer = model.decoder.layers[0]
    for linear, limit in (
        (layer.self_attention.q_proj, (6 / 1024) ** 0.5),
        (layer.cross_attention.k_proj, (6 / 1024) ** 0.5),
        (layer.feed_forward.up_proj, (6 / 2560) ** 0.5),
    ):
        assert linear.weight.abs().max().item() == pytest.approx(limit, rel=0.01)
        assert linear.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.01)
        assert not linear.bias.any()
    assert (layer.cross_attention_residual.norm.weight == 1).all()


def test_dropout_acts_where_the_paper_has_it_and_on_attention_only_if_asked() -> None:
    model = Transformer(replace(TINY, dropout=0.25))
    active = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.p == 0.25}
    residuals = {name for name, module in model.named_modules() if name.endswith("_residual")}
    assert active == {"embedding_dropout", *(f"{name}.dropout" for name in residuals)}
    assert len(residuals) == 2 * 2 + 3 * 3
    attention = [module for name, module in model.named_modules() if name.endswith("_attention")]
    assert [module.dropout for module in attention] == [0.0] * 8
    other = Transformer(replace(TINY, attention_dropout=0.5))
    assert {module.dropout for name, module in other.named_modules() if name.endswith("_attention")} == {0.5}


def test_the_model_is_written_out_by_hand() -> None:
    """Embedding, scale, positions and the shift of nothing: a model without attention's effect is known in closed form."""
    model = tiny(replace(TINY, decoder_layers=1))
    layer = model.decoder.layers[0]
    with torch.no_grad():
        for attention in (layer.self_attention, layer.cross_attention):
            attention.out_proj.weight.zero_()
            attention.out_proj.bias.zero_()
    source, target, mask = pair()
    n, d = target.shape[1], 12
    p, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d // 2, dtype=torch.float64)
    angle = p / 10000 ** (2 * i / d)
    positions = torch.empty(n, d, dtype=torch.float64)
    positions[:, 0::2], positions[:, 1::2] = angle.sin(), angle.cos()
    x = model.target_embedding.weight[target] * 12**0.5 + positions
    for norm in (layer.self_attention_residual.norm, layer.cross_attention_residual.norm):
        x = F.layer_norm(x, (d,), norm.weight, norm.bias)
    ff = layer.feed_forward
    hidden = (x @ ff.up_proj.weight.T + ff.up_proj.bias).clamp(min=0)
    norm = layer.feed_forward_residual.norm
    x = F.layer_norm(x + hidden @ ff.down_proj.weight.T + ff.down_proj.bias, (d,), norm.weight, norm.bias)
    assert_close(model(source, target, mask), x @ model.target_embedding.weight.T)


# ------------------------------------------------------------------------------------------------- ways of decoding


@every_variant
def test_forward_equals_decoding_what_was_prepared(config: TransformerConfig) -> None:
    model = tiny(config)
    source, target, mask = pair()
    states = model.encode(source, mask)
    wanted = model(source, target, mask)
    for hints in ({}, {"uses": 9, "query_length": 5}, {"uses": 1000, "query_length": 1, "repeats": 4}):
        prepared = model.prepare(states, mask, **hints)
        assert len(prepared) == config.decoder_layers
        torch.testing.assert_close(model.decode(target, prepared), wanted, atol=1e-12, rtol=1e-12)


@every_variant
def test_steps_with_caches_equal_one_decoding(config: TransformerConfig) -> None:
    model = tiny(config)
    source, target, mask = pair()
    prepared = model.prepare(model.encode(source, mask), mask)
    caches, logits = None, []
    for position in range(target.shape[1]):
        step, caches = model.step(target[:, position : position + 1], prepared, caches)
        logits.append(step)
    assert [cache.length for cache in caches] == [5, 5, 5]
    torch.testing.assert_close(torch.cat(logits, 1), model(source, target, mask), atol=1e-12, rtol=1e-12)


@every_variant
def test_several_targets_read_one_source_as_if_it_were_repeated(config: TransformerConfig) -> None:
    model = tiny(config)
    source, _, mask = pair()
    targets, target_mask = torch.randint(3, 23, (4, 3, 5)), torch.rand(4, 3, 5) > 0.3
    prepared = model.prepare(model.encode(source, mask), mask)
    wanted = model(source.repeat_interleave(3, 0), targets.flatten(0, 1), mask.repeat_interleave(3, 0), target_mask.flatten(0, 1))
    torch.testing.assert_close(model.decode(targets, prepared, target_mask), wanted.unflatten(0, (4, 3)), atol=1e-12, rtol=1e-12)
    caches, logits = None, []
    for position in range(5):
        step, caches = model.step(targets[..., position], prepared, caches)
        logits.append(step)
    torch.testing.assert_close(torch.stack(logits, 2), model.decode(targets, prepared), atol=1e-12, rtol=1e-12)


def test_several_targets_make_no_copy_of_what_was_prepared() -> None:
    model = tiny()
    source, _, mask = pair()
    prepared = model.prepare(model.encode(source, mask), mask)
    seen = []
    for layer in model.decoder.layers:
        layer.cross_attention.k_proj.register_forward_hook(lambda *_: seen.append("projected"))
    caches = None
    for _ in range(3):
        _, caches = model.step(torch.randint(3, 23, (4, 6)), prepared, caches)
    assert seen == []
    assert {context.batch for context in prepared} == {4}


def test_a_later_target_symbol_changes_no_earlier_logits() -> None:
    model = tiny()
    source, target, mask = pair()
    changed = target.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 23
    before, after = model(source, target, mask), model(source, changed, mask)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(-1).all()


def test_padding_changes_nothing_at_real_symbols() -> None:
    model = tiny()
    source, target, mask = pair()
    target_mask = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]
    wanted = model(source, target, mask, target_mask)
    other = model(source.masked_fill(~mask, 3), target.masked_fill(~target_mask, 4), mask, target_mask)
    torch.testing.assert_close(other[target_mask], wanted[target_mask], atol=1e-12, rtol=1e-12)
    longer = model(F.pad(source, (0, 2)), F.pad(target, (0, 3)), F.pad(mask, (0, 2)))
    torch.testing.assert_close(longer[:, :5][target_mask], wanted[target_mask], atol=1e-12, rtol=1e-12)


def test_a_source_of_padding_alone_gives_finite_logits_that_do_not_depend_on_it() -> None:
    model = tiny()
    source, target, mask = pair()
    logits = model(source, target, mask)
    assert logits.isfinite().all()
    assert torch.equal(logits[2], model(source.flip(1), target, mask)[2])


def test_the_cross_attention_is_called_with_the_decoders_sequence_and_the_encoders_output() -> None:
    model = tiny()
    source, target, mask = pair()
    calls = []
    for layer in model.decoder.layers:
        layer.cross_attention.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(source, target, mask)
    states = model.encode(source, mask)
    assert len(calls) == 3
    for (x, context), kwargs in calls:
        assert x.shape == (4, 5, 12)
        assert torch.equal(context, states)
        assert kwargs == {"context_mask": mask}


# ------------------------------------------------------------------------------------- compiling, training, precision


def masked_pair(z: int, m: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = torch.randint(1, m + 1, (z, 1))
    return (
        torch.randint(3, 19, (z, m)),
        torch.randint(3, 23, (z, n)),
        torch.arange(m) < lengths,
        torch.arange(n) < n,
    )


LENGTHS = ((3, 7, 5), (2, 4, 9), (5, 11, 3), (4, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "untied"])
def test_one_exported_graph_serves_all_lengths(name: str) -> None:
    model = tiny(VARIANTS[name], torch.float32)
    z, m, n = (torch.export.Dim(name, min=1, max=16) for name in "zmn")
    source, target, mask, _ = masked_pair(3, 7, 5)
    shapes = ({0: z, 1: m}, {0: z, 1: n}, {0: z, 1: m})
    exported = torch.export.export(model, (source, target, mask), dynamic_shapes=shapes).module()
    for sizes in (*LENGTHS, (1, 16, 16)):
        source, target, mask, _ = masked_pair(*sizes)
        assert_close(exported(source, target, mask), model(source, target, mask))


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param("paper", "eager", marks=pytest.mark.slow),
        pytest.param("untied", "aot_eager", marks=pytest.mark.slow),
        pytest.param("paper", "inductor", marks=pytest.mark.slow),  # compiles C++ for half a minute
    ],
)
def test_one_compiled_graph_serves_all_lengths_forward_and_backward(name: str, backend: str) -> None:
    torch._dynamo.reset()
    model = tiny(replace(VARIANTS[name], encoder_layers=1, decoder_layers=1), torch.float32)
    graphs, first = [], 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counting)
    for sizes in LENGTHS:
        source, target, mask, _ = masked_pair(*sizes)
        wanted = model(source, target, mask)
        (wanted_grad,) = torch.autograd.grad(wanted.square().mean(), model.target_embedding.weight)
        logits = compiled(source, target, mask)
        (grad,) = torch.autograd.grad(logits.square().mean(), model.target_embedding.weight)
        assert_close(logits, wanted)
        assert_close(grad, wanted_grad)
        first = first or len(graphs)
        assert len(graphs) == first  # the first lengths' graph serves all others


@pytest.mark.slow
def test_a_step_with_growing_caches_compiles_to_few_graphs() -> None:
    torch._dynamo.reset()
    model = tiny(replace(TINY, encoder_layers=1, decoder_layers=1), torch.float32)
    source, target, mask = pair()
    targets = target[:, None].repeat(1, 6, 1)
    with torch.no_grad():
        prepared = model.prepare(model.encode(source, mask), mask)
        wanted = model.decode(targets, prepared)
        graphs = []

        def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]):
            graphs.append(graph)
            return graph

        step = torch.compile(model.step, fullgraph=True, dynamic=True, backend=counting)
        caches, seen = None, []
        for position in range(5):
            logits, caches = step(targets[..., position], prepared, caches)
            assert_close(logits, wanted[..., position, :])
            seen.append(len(graphs))
    assert seen[2:] == [seen[2]] * 3  # one without caches, one for a cache of one position, one for all others


def test_layers_may_be_wrapped_in_gradient_checkpoints() -> None:
    def gradients(model: Transformer) -> dict[str, Tensor]:
        torch.manual_seed(5)  # dropout draws the same units when a layer is computed again
        source, target, mask = pair()
        model(source, target, mask).square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    torch.manual_seed(3)
    plain = tiny(replace(TINY, dropout=0.2)).train()
    wrapped = Transformer(plain.config, dtype=torch.float64).train()
    wrapped.load_state_dict(plain.state_dict())
    runs = []
    for layer in (*wrapped.encoder.layers, *wrapped.decoder.layers):
        layer.feed_forward.register_forward_hook(lambda *_: runs.append(1))
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    torch.manual_seed(4)
    wanted = gradients(plain)
    torch.manual_seed(4)
    got = gradients(wrapped)
    assert len(runs) == 2 * 5  # each layer ran again in the backward pass
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-12, rtol=1e-12)


@every_variant
def test_every_weight_gets_a_gradient(config: TransformerConfig) -> None:
    model = tiny(config)
    source, target, mask = pair()
    label_smoothed_cross_entropy(model(source, target, mask), target, pad_id=0).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert name.endswith("k_proj.bias") or parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_bfloat16_autocast_and_weights_stay_near_float64(norm: str) -> None:
    model = tiny(replace(TINY, norm=norm))
    source, target, mask = pair()
    wanted = model(source, target, mask)
    scale = wanted.abs().max().item()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        logits = model.float()(source, target, mask)
    assert logits.dtype == torch.bfloat16
    assert (logits - wanted).abs().max() < TOLERANCES[torch.bfloat16] * scale
    logits = model.to(torch.bfloat16)(source, target, mask)
    assert logits.dtype == torch.bfloat16
    assert (logits - wanted).abs().max() < 2 * TOLERANCES[torch.bfloat16] * scale


def test_autocast_trains_and_steps() -> None:
    model = tiny(dtype=torch.float32)
    source, target, mask = pair()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        loss = label_smoothed_cross_entropy(model(source, target, mask), target, pad_id=0)
        prepared = model.prepare(model.encode(source, mask), mask)
        first, caches = model.step(target[:, :1], prepared)
        second, _ = model.step(target[:, 1:2], prepared, caches)
        whole = model(source, target, mask)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    torch.testing.assert_close(torch.cat((first, second), 1), whole[:, :2], atol=0.05, rtol=0.05)


# ------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_cross_entropy_against_the_smoothed_distribution() -> None:
    logits, labels = torch.randn(3, 4, 9, dtype=torch.float64), torch.randint(0, 9, (3, 4))
    labels[0, 1:] = 2
    smoothed = torch.full((3, 4, 9), 0.1 / 8, dtype=torch.float64)
    smoothed[..., 2] = 0  # the padding
    smoothed.scatter_add_(-1, labels[..., None], torch.full((3, 4, 1), 0.9, dtype=torch.float64))
    per_symbol = -(smoothed * logits.log_softmax(-1)).sum(-1)
    assert_close(label_smoothed_cross_entropy(logits, labels, pad_id=2), per_symbol[labels != 2].mean())


def test_without_smoothing_the_loss_is_torchs_cross_entropy() -> None:
    logits, labels = torch.randn(5, 9, dtype=torch.float64), torch.tensor([3, 0, 0, 8, 1])
    loss = label_smoothed_cross_entropy(logits, labels, pad_id=0, smoothing=0.0)
    assert_close(loss, F.cross_entropy(logits, labels, ignore_index=0))


def test_the_loss_pulls_the_paddings_logit_down_only() -> None:
    logits = torch.zeros(1, 6, requires_grad=True)
    label_smoothed_cross_entropy(logits, torch.tensor([4]), pad_id=1, smoothing=0.3).backward()
    softmax = 1 / 6
    expected = torch.full((6,), softmax - 0.3 / 5)
    expected[1], expected[4] = softmax, softmax - 0.7 - 0.3 / 5
    assert_close(logits.grad[0], expected)


def test_the_loss_of_a_batch_of_padding_alone_is_zero() -> None:
    logits = torch.randn(2, 7, requires_grad=True)
    loss = label_smoothed_cross_entropy(logits, torch.tensor([0, 0]), pad_id=0)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_the_loss_is_computed_in_float32_from_half_precision() -> None:
    logits, labels = torch.randn(50, 9), torch.randint(1, 9, (50,))
    loss = label_smoothed_cross_entropy(logits.bfloat16(), labels, pad_id=0)
    assert loss.dtype == torch.float32
    assert_close(loss, label_smoothed_cross_entropy(logits.bfloat16().double(), labels, pad_id=0), dtype=torch.float32)


@pytest.mark.parametrize(
    ("labels", "keywords", "message"),
    [
        (torch.ones(2, 4, dtype=torch.long), {}, r"got \(2, 3, 9\) for labels \(2, 4\)"),
        (torch.ones(2, 3, dtype=torch.long), {"smoothing": 1.0}, "smoothing must be in .0, 1., got 1.0"),
        (torch.ones(2, 3, dtype=torch.long), {"pad_id": 9}, "pad_id=9 is outside the 9 symbols"),
    ],
)
def test_the_loss_refuses(labels: Tensor, keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_smoothed_cross_entropy(torch.zeros(2, 3, 9), labels, **{"pad_id": 0, **keywords})


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"decoder_layers": 0}, "decoder_layers must be an integer of at least 1, got 0"),
        ({"heads": 2.0}, "heads must be an integer of at least 1, got 2.0"),
        ({"pad_id": -1}, "pad_id must be an integer of at least 0, got -1"),
        ({"heads": 5}, "heads must divide dim, got heads=5 for dim=12"),
        ({"dim": 9}, "even dim, got dim=9"),
        ({"norm": "sandwich"}, "norm must be one of post, pre, got 'sandwich'"),
        ({"positions": "rotary"}, "positions must be one of sinusoidal, learned, got 'rotary'"),
        ({"activation": "swish"}, "activation must be one of relu, gelu, silu, got 'swish'"),
        ({"tied": True}, "tied must be one of all, target, none, got True"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.5}, "attention_dropout must be in .0, 1., got -0.5"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
        ({"tied": "all"}, "got source_vocab_size=19 and target_vocab_size=23"),
        ({"begin_id": 23}, "begin_id=23 is outside the target's 23 symbols"),
        ({"end_id": 0}, "end_id and pad_id must differ, got 0 for both"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3), torch.ones(2, 3).long()), ValueError, "source_ids must be .* got torch.float32 of shape"),
        ((torch.ones(3).long(), torch.ones(3, 2).long()), ValueError, r"source_ids must be .* shape \(3,\)"),
        ((torch.ones(2, 3).long(), torch.ones(4, 3).long()), ValueError, r"got \(2, 3\) and \(4, 3\)"),
        ((torch.ones(2, 3).long(), torch.ones(2, 2, 3).long()), ValueError, r"target_ids must be .* shape \(2, 2, 3\)"),
        (
            (torch.ones(2, 3).long(), torch.ones(2, 5).long(), torch.ones(2, 5).bool()),
            ValueError,
            r"source_mask must have the shape of source_ids, \(2, 3\), got \(2, 5\)",
        ),
        (
            (torch.ones(2, 3).long(), torch.ones(2, 5).long(), torch.ones(2, 3)),
            TypeError,
            "source_mask must be bool with True at real symbols, got torch.float32",
        ),
        (
            (torch.ones(2, 3).long(), torch.ones(2, 5).long(), None, torch.ones(2, 4).bool()),
            ValueError,
            r"target_mask must have the shape of target_ids, \(2, 5\), got \(2, 4\)",
        ),
    ],
)
def test_input_of_wrong_shape_or_dtype_is_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny()(*arguments)


def test_more_symbols_than_learned_positions_are_refused() -> None:
    model = tiny(VARIANTS["learned"])
    with pytest.raises(ValueError, match="length 17 is longer than the max_length=16"):
        model(torch.ones(1, 17).long(), torch.ones(1, 2).long())


def test_what_was_prepared_for_another_model_or_by_other_weights_is_refused() -> None:
    model = tiny()
    source, target, _ = pair()
    states = model.encode(source)
    prepared = model.prepare(states)
    with pytest.raises(ValueError, match="one prepared context a decoder layer, 3, got 2"):
        model.decode(target, prepared[:2])
    with pytest.raises(ValueError, match="one prepared context a decoder layer, 3, got a single one"):
        model.decode(target, prepared[0])
    with pytest.raises(ValueError, match="made by another layer"):
        tiny().decode(target, prepared)
    with torch.no_grad():
        model.decoder.layers[1].cross_attention.k_proj.weight.mul_(2)
    with pytest.raises(ValueError, match=r"k_proj.weight changed since prepare"):
        model.decode(target, prepared)


def test_steps_with_caches_that_do_not_fit_are_refused() -> None:
    model = tiny()
    source, target, _ = pair()
    prepared = model.prepare(model.encode(source))
    _, caches = model.step(target[:, :1], prepared)
    with pytest.raises(ValueError, match="one a decoder layer, 3, got 2"):
        model.step(target[:, 1:2], prepared, caches[:2])
    with pytest.raises(ValueError, match="x has batch 8 but the cache has batch 4"):
        model.step(target[:, :2], prepared, caches)
    with pytest.raises(ValueError, match=r"ids must be \(batch, targets of each source\), got shape \(4,\)"):
        model.step(target[:, 1], prepared, caches)
