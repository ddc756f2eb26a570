"""BERT of our own: what it refuses, its three ways of decoding, what is computed once, and what can be seen inside."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crossattention import attention_map, record_attention
from crossattention.maps import Highlight
from crossattention.models import (
    BertConfig,
    BertDecoder,
    BertEncoder,
    BertMaskedLM,
    EncoderDecoder,
    EncoderDecoderConfig,
    Transformer,
    TransformerConfig,
    beam_search,
    greedy,
    load,
    mean_of_states,
)
from crossattention.models.bert import base, large
from tolerances import assert_close

TINY = BertConfig(
    29, dim=12, layers=2, heads=3, feed_forward_dim=20, max_length=16, type_vocab_size=3, begin_id=1, end_id=2, dropout=0.1
)
READER = replace(TINY, dim=20, heads=4, layers=3, context_dim=12, causal=True)
Z, M, N = 3, 7, 5


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """In float64, with biases and norms away from 0 and 1."""
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def pair(encoder: BertConfig = TINY, decoder: BertConfig = READER) -> EncoderDecoder:
    return shaken(EncoderDecoder(BertEncoder(encoder), BertDecoder(decoder)))


def symbols(length: int) -> Tensor:
    return torch.randint(3, 29, (Z, length))


def mask_of(length: int) -> Tensor:
    return torch.arange(length) < torch.tensor([length, 3, 1])[:, None]


# ------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.slow
@pytest.mark.parametrize(("config", "count"), [(base(pooler=True), 109_482_240), (large(pooler=True), 335_141_888)])
def test_presets_have_the_published_sizes(config: BertConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in BertEncoder(config).parameters()) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads must divide dim, got heads=5 for dim=12"),
        ({"layers": 0}, "layers must be an integer of at least 1, got 0"),
        ({"activation": "mish"}, "activation must be one of gelu, gelu_tanh, relu, silu, got 'mish'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"end_id": 29}, "end_id=29 is outside the 29 symbols"),
        ({"end_id": 0}, "end_id and pad_id must differ, got 0 for both"),
        ({"context_dim": 0}, "context_dim must be an integer of at least 1, got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
    ],
)
def test_config_refuses_what_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": "no"}, "causal must be True or False, got str 'no'"),
        ({"tied": None}, "tied must be True or False, got NoneType None"),
        ({"dropout": "0.1"}, r"dropout must be a number in \[0, 1\), got str '0.1'"),
        ({"norm_eps": None}, "norm_eps must be a number above 0, got NoneType None"),
    ],
)
def test_config_refuses_values_of_another_kind(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        replace(TINY, **changes)


def test_a_class_refuses_the_config_of_another() -> None:
    with pytest.raises(ValueError, match="got context_dim=12"):
        BertEncoder(READER)
    with pytest.raises(ValueError, match="got pooler=True"):
        BertDecoder(replace(READER, pooler=True))
    with pytest.raises(ValueError, match="got head=False"):
        BertMaskedLM(replace(TINY, head=False))


# ------------------------------------------------------------------------------------------------------- what is refused


def test_missing_states_are_an_error_where_there_is_cross_attention() -> None:
    model = BertDecoder(READER).eval()
    with pytest.raises(ValueError, match=r"reads states \(batch, length, 12\), got none"):
        model(symbols(N))
    with pytest.raises(ValueError, match="got none"):
        model.decode(symbols(N))
    with pytest.raises(ValueError, match="got none"):
        model.step(symbols(1))
    with pytest.raises(ValueError, match="one prepared context a layer, 3, got 2"):
        model.decode(symbols(N), model.prepare(torch.randn(Z, M, 12))[:2])


def test_states_are_an_error_where_there_is_no_cross_attention() -> None:
    model = BertDecoder(replace(READER, context_dim=None)).eval()
    with pytest.raises(ValueError, match="no cross-attention, so states would not be read"):
        model(symbols(N), torch.randn(Z, M, 12))
    with pytest.raises(ValueError, match="no cross-attention, so a source_mask would not be read"):
        model(symbols(N), source_mask=mask_of(M))
    with pytest.raises(ValueError, match="prepared states would not be read"):
        model.decode(symbols(N), BertDecoder(READER).prepare(torch.randn(Z, M, 12)))


def test_input_that_does_not_fit_is_named() -> None:
    model = BertEncoder(TINY).eval()
    with pytest.raises(ValueError, match="pass ids or embeddings, got neither"):
        model(None)
    with pytest.raises(ValueError, match="pass ids or embeddings, got both"):
        model(symbols(M), embeddings=torch.randn(Z, M, 12))
    with pytest.raises(ValueError, match=r"embeddings must be \(batch, length, 12\), got shape \(3, 7, 11\)"):
        model(None, embeddings=torch.randn(Z, M, 11))
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 7\), got \(3, 6\)"):
        model(symbols(M), mask_of(6))
    with pytest.raises(TypeError, match=r"mask must be bool with True at real symbols, got torch.int64"):
        model(symbols(M), mask_of(M).long())
    with pytest.raises(ValueError, match=r"types must be int64 or int32 of shape \(3, 7\), got torch.int64 of shape \(3, 5\)"):
        model(symbols(M), types=symbols(5))
    with pytest.raises(ValueError, match="length 17 is longer than the max_length=16"):
        model(symbols(17))
    with pytest.raises(TypeError, match="ids must be a tensor, got list"):
        model([[3, 4]])
    with pytest.raises(TypeError, match="mask must be bool with True at real symbols, got list"):
        model(symbols(M), [[True] * M] * Z)
    with pytest.raises(ValueError, match="ids must be from 0 to 28, got 29 to 29"):
        model(torch.full((1, 2), 29))
    with pytest.raises(ValueError, match="types must be from 0 to 2, got 3 to 3"):
        model(symbols(M), types=torch.full((Z, M), 3))
    with pytest.raises(ValueError, match="positions must be from 0 to 15, got -1 to -1"):
        model(symbols(M), positions=torch.full((Z, M), -1))
    with pytest.raises(ValueError, match="no pooler"):
        model.pool(torch.randn(Z, M, 12))
    with pytest.raises(ValueError, match="head=False"):
        BertDecoder(replace(READER, head=False))(symbols(N), torch.randn(Z, M, 12))
    with pytest.raises(ValueError, match=r"needs BertConfig\(causal=True\)"):
        BertDecoder(replace(READER, causal=False)).step(symbols(1), ())


def test_decoders_name_what_is_no_tensor() -> None:
    model = pair()
    with pytest.raises(TypeError, match="source_ids must be a tensor with a batch, got list"):
        model([[3, 4]], symbols(N))
    with pytest.raises(TypeError, match="target_ids must be a tensor with a batch, got NoneType"):
        model(symbols(M), None)
    prepared = model.prepare(model.encode(symbols(M)))
    for wrong, given in (([[3]], "list"), (torch.zeros(Z, 1), r"torch.float32 of shape \(3, 1\)")):
        with pytest.raises(ValueError, match=rf"ids must be int64 or int32 of shape \(batch, .*, got {given}"):
            model.step(wrong, prepared)


def test_encoder_decoder_names_what_is_no_encoder_or_decoder() -> None:
    with pytest.raises(TypeError, match="the decoder must be a model of this package with prepare, decode, step, got BertEncoder"):
        EncoderDecoder(BertEncoder(TINY), BertEncoder(TINY))
    with pytest.raises(TypeError, match="the encoder must be a model of this package with encode, got Linear without encode"):
        EncoderDecoder(torch.nn.Linear(2, 3), BertDecoder(READER))
    with pytest.raises(ValueError, match="got context_dim=None, causal=True, head=True"):
        EncoderDecoder(BertEncoder(TINY), BertDecoder(replace(READER, context_dim=None)))
    nothing = replace(READER, begin_id=None)
    with pytest.raises(ValueError, match="has no begin_id, so it cannot generate"):
        greedy(pair(decoder=nothing), symbols(M), max_length=3)
    with pytest.raises(ValueError, match='there is no family "bart"'):
        EncoderDecoderConfig("bart", {}, "bert_decoder", READER)


# ------------------------------------------------------------------------------------------------------------ decoding


def test_three_ways_of_decoding_are_one_function() -> None:
    model = pair()
    source, target, mask, target_mask = symbols(M), symbols(N), mask_of(M), mask_of(N)
    whole = model(source, target, mask, target_mask)
    prepared = model.prepare(model.encode(source, mask), mask)
    assert_close(model.decode(target, prepared, target_mask), whole)
    assert_close(model.decode(target[:, None].expand(-1, 4, -1), prepared)[:, 2], model(source, target, mask))
    caches, made = None, []
    for i in range(N):
        logits, caches = model.step(target[:, i : i + 1].expand(-1, 2), prepared, caches)
        made.append(logits[:, 1])
    assert_close(torch.stack(made, 1), model(source, target, mask))


def test_a_decoder_that_is_not_causal_reads_its_whole_target() -> None:
    model = shaken(BertDecoder(replace(READER, causal=False, head=False)))
    ids, patches = symbols(N), torch.randn(Z, 9, 12, dtype=torch.float64)
    states = model.states(ids, patches)
    assert states.shape == (Z, N, 20)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] - 3 + 1) % 26 + 3
    assert not torch.allclose(model.states(changed, patches)[:, 0], states[:, 0])
    causal = shaken(BertDecoder(replace(READER, head=False)))
    assert_close(causal.states(changed, patches)[:, 0], causal.states(ids, patches)[:, 0])


def test_the_projection_between_widths_is_computed_once_a_source() -> None:
    model = pair(decoder=replace(READER, context_dim=20))
    calls: list[tuple[int, ...]] = []
    model.projection.register_forward_hook(lambda module, args, out: calls.append(tuple(out.shape)))
    beam_search(model, symbols(M), mask_of(M), beams=3, max_length=6)
    assert calls == [(Z, M, 20)]


def test_sources_are_never_repeated_for_beams() -> None:
    model = pair()
    seen: set[tuple[int, ...]] = set()
    for layer in model.decoder.layers:
        prepare = layer.cross_attention.prepare

        def spy(states: Tensor, _prepare: object = prepare, **kwargs: object) -> object:
            made = _prepare(states, **kwargs)
            seen.add((states.shape[0], made.batch))
            return made

        layer.cross_attention.prepare = spy
    beam_search(model, symbols(M), beams=4, max_length=3)
    assert seen == {(Z, Z)}


def test_a_source_of_padding_alone_gives_numbers() -> None:
    model = pair()
    mask = mask_of(M).clone()
    mask[1] = False
    logits = model(symbols(M), symbols(N), mask)
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["transformer encodes", "transformer decodes"])
def test_a_transformer_takes_either_side(kind: str) -> None:
    transformer = Transformer(TransformerConfig(29, 29, dim=16, heads=2, encoder_layers=2, decoder_layers=2, feed_forward_dim=24))
    parts = (transformer, BertDecoder(READER)) if kind == "transformer encodes" else (BertEncoder(TINY), transformer)
    model = shaken(EncoderDecoder(*parts))
    source, target, mask = symbols(M), symbols(N), mask_of(M)
    states = model.projection(parts[0].encode(source, mask))
    read = parts[1].prepare(states, mask)
    assert_close(model(source, target, mask), parts[1].decode(target, read))
    assert len(beam_search(model, source, mask, beams=2, max_length=4)) == Z


# ------------------------------------------------------------------------------------------- saving, seeing, embeddings


@pytest.mark.parametrize(
    "make",
    [
        lambda: BertEncoder(replace(TINY, pooler=True)),
        lambda: BertMaskedLM(replace(TINY, tied=False)),
        lambda: BertDecoder(READER),
        lambda: EncoderDecoder(BertEncoder(TINY), BertDecoder(replace(READER, context_dim=20))),
    ],
    ids=["encoder", "masked lm", "decoder", "encoder-decoder"],
)
def test_saved_models_come_back(make, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = shaken(make())
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert type(again) is type(model) and again.config == model.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert type(model).from_pretrained(tmp_path / "model").config == model.config


def test_what_the_decoder_reads_can_be_recorded() -> None:
    model = pair()
    source, target, mask = symbols(M), symbols(N), mask_of(M)
    with record_attention(model, [Highlight()]) as seen:
        logits = model(source, target, mask)
    assert torch.equal(logits, model(source, target, mask))
    assert len(seen.layers) == 3
    inputs: list[Tensor] = []
    layer = model.decoder.layers[1].cross_attention
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    states = model.encode(source, mask)
    model.decoder(target, states, source_mask=mask)
    hook.remove()
    weights = attention_map(layer, inputs[0], states, context_mask=mask)
    assert weights.shape == (Z, 4, N, M)
    assert_close(weights.sum(-1), torch.ones(Z, 4, N, dtype=torch.float64))


def test_generation_can_be_recorded() -> None:
    model = pair()
    with record_attention(model, [Highlight()]) as seen:
        found = beam_search(model, symbols(M), beams=2, max_length=4)
    assert found and len(seen.layers) == 3


def test_mean_of_states_counts_real_symbols_alone() -> None:
    states, mask = torch.randn(Z, M, 12, dtype=torch.float64), mask_of(M)
    means = torch.stack([states[i, : int(mask[i].sum())].mean(0) for i in range(Z)])
    assert_close(mean_of_states(states, mask, normalised=False), means)
    assert_close(mean_of_states(states, mask), means / means.norm(dim=-1, keepdim=True))
    assert_close(mean_of_states(states, torch.zeros_like(mask)), torch.zeros(Z, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 7\), got \(3, 5\)"):
        mean_of_states(states, mask_of(5))


def test_training_steps_go_through_the_whole_model() -> None:
    model = pair().train()
    torch.nn.functional.cross_entropy(model(symbols(M), symbols(N)).flatten(0, 1), symbols(N).flatten()).backward()
    unread = {name for name, p in model.named_parameters() if p.grad is None}
    assert not unread
