"""Recordings of transformers' models equal the weights that they return with eager attention; their outputs do not change a bit.

Tiny random models, nothing is downloaded. n, m, heads and widths differ; some sources are padded.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossattention import record_attention
from crossattention.interop.rows import WeightRows
from crossattention.maps import Alignment, Argmax, Entropy, Highlight, Rows, TopK
from huggingface_models import (
    MASK,
    SOURCE,
    M,
    N,
    Run,
    bart,
    bert,
    eager_of,
    marian,
    pegasus,
    perceiver,
    read_inputs,
    read_sound,
    read_states,
    read_text,
    t5,
    t5gemma,
    trocr,
    whisper,
)
from tolerances import assert_close

transformers = pytest.importorskip("transformers")

WHOLE = Rows(range(N))
FAMILIES = [
    (bart, read_text),
    *(
        pytest.param(make, read, marks=pytest.mark.slow)
        for make, read in (
            (t5, read_text),
            (marian, read_text),
            (pegasus, read_text),
            (bert, read_text),
            (t5gemma, read_text),
            (whisper, read_sound),
            (trocr, read_states),
            (perceiver, read_inputs),
        )
    ),
]

FAMILIES_THAT_MAKE_ROWS = [(t5, read_text), (bert, read_text), (t5gemma, read_text), (trocr, read_states), (perceiver, read_inputs)]


@pytest.mark.parametrize(("make", "read"), FAMILIES)
@torch.no_grad()
def test_a_forward_pass_shows_the_weights_of_eager_attention(make: Callable[[], nn.Module], read: Run) -> None:
    model = make().eval()
    plain = read(model)
    with record_attention(model, [WHOLE, TopK(3), Highlight()]) as seen:
        out = read(model)
    assert torch.equal(plain[0], out[0])
    expected = read(eager_of(model), output_attentions=True).cross_attentions
    assert [layer.kind for layer in seen.layers.values()] == ["cross"] * len(expected)
    for layer, weights in zip(seen.layers.values(), expected, strict=True):
        rows, top, mass = layer.merged.results
        assert_close(rows, weights)
        assert_close(top.weights, weights.topk(3).values)
        assert_close(mass, weights.sum(2))
    assert not [name for name, module in model.named_modules() if {"forward", "generate"} & {*module.__dict__}]


@pytest.mark.parametrize(
    ("make", "read"), [(bart, read_text), *(pytest.param(*one, marks=pytest.mark.slow) for one in FAMILIES_THAT_MAKE_ROWS)]
)
@torch.no_grad()
def test_a_path_leaves_padding_out_also_where_the_model_makes_the_matrix_itself(make: Callable[[], nn.Module], read: Run) -> None:
    model = eager_of(make().eval())
    with record_attention(model, [Alignment(), WHOLE]) as seen:
        read(model)
    for layer in seen.layers.values():
        path, rows = layer.merged.results
        assert path.last[:, -1].tolist() == [M - 1, 3] and not rows[1, :, :, 4:].any()
        assert bool((path.first <= path.last).all())


@pytest.mark.slow
@torch.no_grad()
def test_self_attention_is_shown_where_it_is_asked_for_causal_too() -> None:
    model = bart().eval()
    with record_attention(model, [WHOLE], self_attention=True) as seen:
        read_text(model)
    expected = read_text(eager_of(model), output_attentions=True)
    assert len(seen.layers) == 6
    for name, layer in seen.layers.items():
        of = "encoder" if ".encoder." in name else "decoder" if "self_attn" in name else "cross"
        assert layer.kind == ("cross" if of == "cross" else "self")
        weights = expected[f"{of}_attentions"][int(name.split("layers.")[1][0])]
        assert_close(layer.merged[0], weights[:, :, :N])


@pytest.mark.slow
def test_half_precision_training_and_gradients() -> None:
    model = bart(attention_dropout=0.5).train()
    torch.manual_seed(1)
    plain = read_text(model)[0]
    torch.manual_seed(1)
    with record_attention(model, [WHOLE]) as seen:
        out = read_text(model)[0]
    assert torch.equal(plain, out)
    out.sum().backward()
    sums = seen.layers["model.decoder.layers.0.encoder_attn"].merged[0].sum(-1)
    assert_close(sums, torch.ones_like(sums))  # before dropout
    half = bart().eval().bfloat16()
    with record_attention(half, [WHOLE]) as seen, torch.no_grad():
        read_text(half)
    for layer, weights in zip(
        seen.layers.values(), read_text(eager_of(half), output_attentions=True).cross_attentions, strict=True
    ):
        assert layer.merged[0].dtype == torch.float32
        assert_close(layer.merged[0], weights.float(), dtype=torch.bfloat16)


# -------------------------------------------------------------------------------------------------------- generation


def traced(found: Any, layer: int, rows: int) -> Tensor:
    """The weights (f, h, t, m) of the sequences that `generate` returned, step by step along their beams; zero after their ends."""
    steps = [step[layer][:, :, -1] for step in found.cross_attentions]
    beams = getattr(found, "beam_indices", None)
    if beams is None:
        beams = torch.arange(rows).unsqueeze(1).expand(-1, len(steps))
    parts = [steps[t][beams[:, t].clamp(min=0)] * (beams[:, t] >= 0)[:, None, None] for t in range(beams.shape[1])]
    return torch.stack(parts, 2)


def ending(model: nn.Module, end: int = 2) -> nn.Module:
    """A model that ends sequences early, some before others."""
    bias = torch.zeros(1, 30)
    bias[0, end] = 3.0
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(bias)
    return model


MODES: list[dict[str, Any]] = [
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 1},
    {"num_beams": 3, "use_cache": False},
    {"do_sample": True, "num_return_sequences": 2},
]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (bart, MODES[0]),
        *(pytest.param(bart, mode, marks=pytest.mark.slow) for mode in MODES[1:]),
        *(pytest.param(make, mode, marks=pytest.mark.slow) for make in (t5, bert, marian) for mode in MODES[:2]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_generation_is_merged_along_the_beams_that_it_returns(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = ending(make().eval())
    given = {"input_ids": SOURCE, "attention_mask": MASK.long(), "max_new_tokens": 8, **options}

    def generate(which: nn.Module, **more: Any) -> Any:
        torch.manual_seed(1)
        return which.generate(**given, **more)

    plain = generate(model)
    found = generate(eager_of(model), output_attentions=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, plain)
    length = traced(found, 0, len(plain)).shape[2]
    with record_attention(model, [Rows(range(length)), Argmax(), Entropy(), Alignment()]) as seen:
        out = generate(model)
    assert torch.equal(plain, out)
    for number, layer in enumerate(seen.layers.values()):
        expected = traced(found, number, len(plain))
        assert_close(layer.merged[0], expected)
        assert torch.equal(layer.merged[1] >= 0, expected.any(-1))
        assert_close(layer.merged[2], torch.special.entr(expected).sum(-1))
        assert layer.merged[3].first.shape == expected.shape[:1] + expected.shape[2:3]
        assert [call.shape[:1] for call in layer.calls] == [step[number].shape[:1] for step in found.cross_attentions]
    if make is bart and "num_beams" in options and options["num_beams"] > 1:
        assert found.beam_indices.min() == -1  # some end before others


@pytest.mark.slow
@torch.no_grad()
def test_sound_is_generated_from_with_whisper_s_own_generate() -> None:
    model = whisper().eval()
    sound = torch.randn(2, 8, 20)
    plain = model.generate(sound, max_new_tokens=6)
    with record_attention(model, [Argmax()]) as seen:
        out = model.generate(sound, max_new_tokens=6)
    assert torch.equal(plain, out)
    layer = seen.layers["model.decoder.layers.0.encoder_attn"]
    assert layer.merged.shape[0] == 2 and layer.merged.shape[-1] == 10


@pytest.fixture
def no_rows_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging the rows that a model made itself, instead of making them again of queries and keys, is an error."""

    def refuse(steps: Any, picks: Tensor) -> None:
        raise ValueError("rows were kept")

    monkeypatch.setattr(WeightRows, "of_steps", refuse)


@pytest.mark.slow
@pytest.mark.parametrize("make", [bart, t5, marian, bert])
def test_of_eager_attention_queries_and_keys_are_kept_and_no_rows(make: Callable[[], nn.Module], no_rows_kept: None) -> None:
    model = eager_of(ending(make().eval()))
    given = {"input_ids": SOURCE, "attention_mask": MASK.long(), "max_new_tokens": 8, "num_beams": 3}
    found = model.generate(**given, output_attentions=True, return_dict_in_generate=True)
    length = traced(found, 0, len(found.sequences)).shape[2]
    with record_attention(model, [Rows(range(length))]) as seen:
        out = model.generate(**given)
    assert torch.equal(found.sequences, out)
    for number, layer in enumerate(seen.layers.values()):
        assert_close(layer.merged[0], traced(found, number, len(out)))


@pytest.mark.slow
def test_a_softmax_of_something_else_keeps_its_rows() -> None:
    """T5Gemma caps its scores by a tanh."""
    model = t5gemma().eval()
    with torch.no_grad():
        [parameter.mul_(3.0) for name, parameter in model.named_parameters() if "cross_attn" in name]
    given = {"input_ids": SOURCE, "attention_mask": MASK.long(), "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    found = model.generate(**given, output_attentions=True, return_dict_in_generate=True)
    with record_attention(model, [Rows(range(4)), Alignment()]) as seen:
        model.generate(**given)
    for number, layer in enumerate(seen.layers.values()):
        assert_close(layer.merged[0], traced(found, number, 2))
        assert layer.merged[1].last[:, -1].tolist() == [M - 1, 3]


@pytest.mark.slow
@torch.no_grad()
def test_trocr_generates_along_its_beams(no_rows_kept: None) -> None:
    vision = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    encoder, decoder = transformers.ViTModel(vision, add_pooling_layer=False), trocr()
    model = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    given = {"pixel_values": torch.randn(2, 3, 8, 8), "max_new_tokens": 6, "num_beams": 3, "decoder_start_token_id": 1}
    given |= {"pad_token_id": 0, "eos_token_id": 2}
    plain = model.generate(**given)
    with record_attention(model, [Rows([0])]) as seen:
        out = model.generate(**given)
    assert torch.equal(plain, out)
    found = model.generate(**given, output_attentions=True, return_dict_in_generate=True)
    for number, layer in enumerate(seen.layers.values()):
        assert_close(layer.merged[0], traced(found, number, len(plain))[:, :, :1])


@pytest.mark.slow
@torch.no_grad()
def test_what_cannot_be_recorded_is_said() -> None:
    from transformers import AttentionInterface

    def unseen(module, query, key, value, attention_mask, scaling=None, **kwargs):
        weights = (query @ key.transpose(-1, -2) * scaling).exp()
        return ((weights / weights.sum(-1, keepdim=True)) @ value).transpose(1, 2), None

    AttentionInterface.register("unseen", unseen)
    model = bart().eval()
    model.set_attn_implementation("unseen")
    with record_attention(model) as seen:
        read_text(model)
    with pytest.raises(ValueError, match=r'neither torch\'s scaled_dot_product_attention nor a softmax .*"unseen"'):
        print(seen.layers)
    encoder = transformers.BertModel(transformers.BertConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=1))
    with pytest.raises(ValueError, match="BertModel has 1 attention layers, and none that reads another sequence"):
        record_attention(encoder)


# ------------------------------------------------------------------------------------------ other libraries' modules


@pytest.mark.slow
@torch.no_grad()
def test_crossvit_of_timm_shows_what_its_class_tokens_read() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("crossvit_9_240").eval()
    image = torch.randn(1, 3, 240, 240)
    plain = model(image)
    with record_attention(model, [Rows([0]), TopK(3)]) as seen:
        out = model(image)
    assert torch.equal(plain, out)
    layer = model.blocks[0].fusion[0].attn
    inputs = []
    handle = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(image)
    handle.remove()
    q, k = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p, x in ((layer.wq, inputs[0][:, :1]), (layer.wk, inputs[0])))
    assert_close(seen.layers["blocks.0.fusion.0.attn"].merged[0], (q @ k.transpose(-1, -2) * layer.scale).softmax(-1))


@pytest.mark.slow
@torch.no_grad()
def test_diffusers_attention_is_shown_with_its_fused_and_its_written_out_processor() -> None:
    processors = pytest.importorskip(
        "diffusers.models.attention_processor", reason="diffusers is not installed: pip install diffusers"
    )
    layer = processors.Attention(16, cross_attention_dim=12, heads=4, dim_head=8)
    x, context = torch.randn(2, N, 16), torch.randn(2, M, 12)
    q, k = (layer.head_to_batch_dim(p(given)) for p, given in ((layer.to_q, x), (layer.to_k, context)))
    expected = layer.get_attention_scores(q, k).unflatten(0, (2, 4))
    for processor in (processors.AttnProcessor2_0(), processors.AttnProcessor()):
        layer.set_processor(processor)
        plain = layer(x, encoder_hidden_states=context)
        with record_attention(nn.ModuleDict({"attn": layer}), [WHOLE]) as seen:
            out = layer(x, encoder_hidden_states=context)
        assert torch.equal(plain, out)
        assert_close(seen.layers["attn"].merged[0], expected)
