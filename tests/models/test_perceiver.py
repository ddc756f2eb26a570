"""Perceiver IO: subsets of outputs, what is computed once and when it is not, masks, blocks, what its attention shows."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from crossattention import attention_map, record_attention
from crossattention.maps import Rows
from crossattention.models import perceiver
from crossattention.models.perceiver import PerceiverIO, PerceiverIOConfig
from crossattention.models.perceiver_adapters import (
    ClassOutput,
    FlowInput,
    FlowOutput,
    FourierPositions,
    ImageInput,
    TextInput,
    TokenOutput,
    VideoInput,
    VideoOutput,
    patches_around,
)
from crossattention.models.pretrained import load
from crossattention.plan import Plan
from tolerances import assert_close

CORE = {"num_latents": 5, "latent_dim": 24, "blocks": 2, "layers_per_block": 2, "cross_heads": 1, "self_heads": 3}
TEXT = PerceiverIOConfig(
    TextInput(19, 16, 13), TokenOutput(13, heads=4, qk_dim=8), **{**CORE, "cross_heads": 4, "self_heads": 2}, qk_dim=8, value_dim=24
)
VIDEO = VideoInput(frames=2, size=(8, 4), audio_samples=24, audio_patch=4, num_labels=7, bands=3, audio_bands=5)
CONFIGS = {
    "text": TEXT,
    "text classes": PerceiverIOConfig(TextInput(19, 16, 13), ClassOutput(7), **CORE),
    "learned": PerceiverIOConfig(
        ImageInput((6, 4), stem="conv1x1", stem_dim=8, positions="learned", position_dim=9), ClassOutput(7), **CORE
    ),
    "fourier": PerceiverIOConfig(ImageInput((6, 4), bands=3), ClassOutput(7), **CORE),
    "conv": PerceiverIOConfig(ImageInput((24, 20), stem="conv", stem_dim=8, bands=3), ClassOutput(7), **CORE),
    "flow": PerceiverIOConfig(FlowInput((6, 4), bands=3, dim=8), FlowOutput(), **CORE),
    "video": PerceiverIOConfig(VIDEO, VideoOutput(9, label_dim=11), **CORE),
}

QUICK = ("text", "flow")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS]


def model_of(name: str, dtype: torch.dtype = torch.float64, **changes: object) -> PerceiverIO:
    model = PerceiverIO(replace(CONFIGS[name], **changes), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def inputs_of(name: str, dtype: torch.dtype = torch.float64) -> Tensor | dict[str, Tensor]:
    if name.startswith("text"):
        return torch.randint(19, (2, 11))
    if name == "flow":
        return torch.randn(2, 2, 3, 6, 4, dtype=dtype)
    if name == "video":
        return {
            "audio": torch.randn(2, 24, 1, dtype=dtype),
            "image": torch.randn(2, 2, 3, 8, 4, dtype=dtype),
            "label": torch.randn(2, 7, dtype=dtype),
        }
    return torch.randn(2, 3, *((24, 20) if name == "conv" else (6, 4)), dtype=dtype)


@pytest.fixture(params=[False, True], ids=["kept", "with gradients"])
def grad(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled(request.param):
        yield


# ------------------------------------------------------------------------------------------------ output queries


@pytest.mark.parametrize(
    "where", [torch.tensor([4, 12, 0]), torch.tensor([[4, 12, 0], [1, 1, 7]]), torch.tensor([], dtype=torch.int64)]
)
@pytest.mark.parametrize("name", ["text", "flow"])
@pytest.mark.usefixtures("grad")
def test_a_subset_of_outputs_equals_the_same_rows_of_all(name: str, where: Tensor) -> None:
    model, inputs = model_of(name), inputs_of(name)
    every = model(inputs)
    every = every.flatten(1, 2) if name == "flow" else every
    wanted = torch.stack([row[at] for row, at in zip(every, where.expand(2, -1) if where.dim() == 1 else where, strict=True)])
    assert_close(model(inputs, outputs=where), wanted)


@pytest.mark.usefixtures("grad")
def test_a_mask_of_outputs_gives_the_rows_where_it_is_true() -> None:
    model, inputs = model_of("text"), inputs_of("text")
    wanted = torch.rand(2, 11) > 0.5
    wanted[1, 3:] = False  # another number for each item
    assert_close(model(inputs, outputs=wanted), model(inputs)[:, :11][wanted])
    none = torch.zeros(2, 11, dtype=torch.bool)
    assert model(inputs, outputs=none).shape == (0, 19)


@pytest.mark.usefixtures("grad")
def test_places_of_a_video_equal_the_same_rows_of_all() -> None:
    model, inputs = model_of("video"), inputs_of("video")
    every = model(inputs)
    assert every["audio"].shape == (2, 24)
    assert every["image"].shape == (2, 2, 8, 4, 3)
    assert every["label"].shape == (2, 7)
    some = {"audio": torch.tensor([5, 2]), "image": torch.tensor([[63, 0, 17], [5, 5, 1]])}
    out = model(inputs, outputs=some)
    assert set(out) == {"audio", "image"}
    assert_close(out["audio"], every["audio"].unflatten(1, (6, 4))[:, some["audio"]].flatten(1))
    pixels = every["image"].flatten(1, 3)
    assert_close(out["image"], torch.stack([pixels[i, some["image"][i]] for i in range(2)]))


@pytest.mark.parametrize("name", ["text", "flow", "video"])
def test_blocks_of_queries_give_what_all_at_once_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of(name), inputs_of(name)
    with torch.no_grad():
        wanted = model(inputs)
        monkeypatch.setattr(perceiver, "BLOCK_QUERIES", 10)  # five of each item
        out = model(inputs)
        if name == "text":
            some = torch.tensor([[12, 0, 3, 4, 5, 6, 7], [1, 2, 3, 3, 4, 9, 9]])
            assert_close(model(inputs, outputs=some), torch.stack([wanted[i, some[i]] for i in range(2)]))
    for kind in wanted if isinstance(wanted, dict) else [...]:
        assert_close(out[kind], wanted[kind])


@pytest.mark.parametrize("name", ["text", "flow", "video", "fourier"])
def test_decode_reads_what_encode_made(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    more = {"inputs": inputs} if name == "flow" else {}
    out, wanted = model.decode(model.encode(inputs), **more), model(inputs)
    for kind in wanted if isinstance(wanted, dict) else [...]:
        assert_close(out[kind], wanted[kind])


# -------------------------------------------------------------------------------------------------- computed once


def calls_of(model: PerceiverIO, inputs: object) -> list[str]:
    """Names of the projections that a forward pass calls on more than a context, and of what is made anew."""
    made = []
    layers = {"encoder": model.encoder, "decoder": model.decoder}
    for name, layer in layers.items():
        for method in ("prepare_queries",):
            original = getattr(layer.attention, method)

            def spy(*args: object, original=original, label=f"{name}.{method}", **kwargs: object) -> object:
                made.append(label)
                return original(*args, **kwargs)

            setattr(layer.attention, method, spy)
        original = layer._make_parts
        layer._make_parts = lambda rows, original=original, name=name: (made.append(f"{name}.parts"), original(rows))[1]
    for name, module in model.named_modules():
        if isinstance(module, FourierPositions):
            original = module._make_tables
            module._make_tables = lambda *a, original=original, name=name: (made.append(f"{name}.tables"), original(*a))[1]
    with torch.no_grad():
        model(inputs)
    return made


@pytest.mark.parametrize("name", EVERY)
def test_what_depends_on_weights_alone_is_made_once(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    first = calls_of(model, inputs)
    assert "encoder.prepare_queries" in first
    assert ("decoder.prepare_queries" in first) == (name not in ("flow", "video"))
    assert calls_of(model, inputs) == []


def test_text_makes_keys_and_values_of_the_kept_parts() -> None:
    model, inputs = model_of("text"), inputs_of("text")
    assert "encoder.parts" in calls_of(model, inputs)
    with torch.no_grad():
        wanted = model(inputs)
        model.encoder.attention.plan = Plan("context", "context")  # reads the joined rows themselves
        assert_close(model(inputs), wanted)


@pytest.mark.parametrize("name", ["fourier", "learned", "conv", "flow"])
@pytest.mark.usefixtures("grad")
def test_the_position_part_of_keys_and_values_is_kept_where_images_are_projected(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    model.encoder.attention.plan = Plan("context", "context")
    wanted = model(inputs)
    model.encoder.attention.plan = "textbook"
    model.encoder._parts.forget()
    assert_close(model(inputs), wanted)
    assert (model.encoder._parts._kept is None) == torch.is_grad_enabled()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("change", ["in place", "optimizer", "load", "cast"])
def test_nothing_kept_goes_stale(name: str, change: str) -> None:
    model, other = model_of(name), model_of(name)
    inputs = inputs_of(name)
    with torch.no_grad():
        model(inputs)
    if change == "in place":
        with torch.no_grad():
            for mine, yours in zip(model.parameters(), other.parameters(), strict=True):
                mine.copy_(yours)
    elif change == "load":
        model.load_state_dict(other.state_dict())
    elif change == "cast":
        model.float()
        other.load_state_dict(model.state_dict())
        other.float()
        inputs = inputs_of(name, torch.float32)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        out = model(inputs)
        sum(o.square().sum() for o in (out.values() if isinstance(out, dict) else [out])).backward()
        optimizer.step()
        other.load_state_dict(model.state_dict())
    with torch.no_grad():
        out = model(inputs)
        torch.manual_seed(0)
        wanted = other(inputs)
    for kind in wanted if isinstance(wanted, dict) else [...]:
        assert_close(out[kind], wanted[kind])


def test_what_is_kept_is_not_saved_and_not_copied() -> None:
    import copy
    import pickle

    model, inputs = model_of("text"), inputs_of("text")
    names = set(model.state_dict())
    with torch.no_grad():
        wanted = model(inputs)
    assert set(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.encoder._parts._kept is None
        with torch.no_grad():
            assert_close(other(inputs), wanted)


def test_what_inference_mode_kept_is_not_met_by_autograd() -> None:
    model, inputs = model_of("fourier"), inputs_of("fourier").requires_grad_()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        wanted = model(inputs.detach())
    out = model(inputs)
    out.sum().backward()
    assert inputs.grad is not None
    assert_close(out, wanted.clone())


def test_each_learned_position_gets_its_gradient() -> None:
    model, ids = model_of("text"), inputs_of("text")
    model(ids).square().sum().backward()
    grad = model.inputs.positions.weight.grad
    assert grad is not None
    assert bool((grad[: ids.shape[1]].abs().sum(1) > 0).all())
    assert not grad[ids.shape[1] :].any()


# ------------------------------------------------------------------------------------------------- masks, attention


@pytest.mark.usefixtures("grad")
def test_an_input_that_may_not_be_read_at_all_reads_zero() -> None:
    model, ids = model_of("text"), inputs_of("text")
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[1] = True
    out = model(ids, mask)
    other = model(torch.randint(19, (2, 11)), mask)
    assert bool(out.isfinite().all())
    assert_close(out[0], other[0])
    assert not torch.allclose(out[1], other[1])


def test_masked_rows_are_as_if_cut_off() -> None:
    model, ids = model_of("text"), inputs_of("text")
    mask = torch.arange(11) < torch.tensor([[11], [6]])
    with torch.no_grad():
        assert_close(model(ids, mask)[1], model(ids[1:, :6])[0])


@pytest.mark.parametrize("name", ["text", "fourier", "flow"])
def test_recording_shows_what_attention_map_says_and_changes_nothing(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    with torch.no_grad():
        wanted = model(inputs)
        count = 24 if name == "flow" else model.outputs.queries.shape[0]
        with (
            record_attention(model) as seen,
            record_attention(model.encoder, [Rows(range(5))]) as read_first,
            record_attention(model.decoder, [Rows(range(count))]) as read_last,
        ):
            out = model(inputs)
    assert torch.equal(out, wanted)
    assert set(seen.layers) == {"encoder.attention", "decoder.attention"}
    with torch.no_grad():
        rows, layer = model.inputs(inputs), model.encoder
        asked, read = layer.query_norm(model.latents), layer.context_norm(rows.joined())
        assert_close(read_first.layers["attention"].calls[0][0], attention_map(layer.attention, asked, read))
        queries = rows.joined() if name == "flow" else model.outputs.queries
        asked, read = model.decoder.query_norm(queries), model.decoder.context_norm(model.encode(inputs))
        assert_close(read_last.layers["attention"].calls[0][0], attention_map(model.decoder.attention, asked, read))


def test_attention_map_takes_prepared_queries() -> None:
    model, inputs = model_of("text"), inputs_of("text")
    layer = model.encoder
    with torch.no_grad():
        prepared = layer.read(model.inputs(inputs), None, 5)
        asked = layer.ask_learned(model.latents, prepared.plan.scores)
        wanted = attention_map(layer.attention, layer.query_norm(model.latents), layer.context_norm(model.inputs(inputs).joined()))
        assert_close(attention_map(layer.attention, asked, prepared), wanted)


# ------------------------------------------------------------------------------------------- positions and patches


def test_fourier_features_are_the_papers() -> None:
    positions = FourierPositions(3, (8, 10))
    made = positions((4, 5), torch.zeros((), dtype=torch.float64))
    for index, (i, j) in enumerate((i, j) for i in range(4) for j in range(5)):
        p = torch.tensor([-1 + 2 * i / 3, -1 + 2 * j / 4], dtype=torch.float64)
        angles = torch.pi * torch.outer(p, torch.ones(3, dtype=torch.float64))
        angles *= torch.stack([torch.linspace(1, 4, 3), torch.linspace(1, 5, 3)])
        wanted = torch.cat((p, angles.sin().flatten(), angles.cos().flatten()))
        torch.testing.assert_close(made[index], wanted, atol=1e-5, rtol=0)
    where = torch.tensor([[3, 19], [0, 7]])
    assert torch.equal(positions((4, 5), torch.zeros((), dtype=torch.float64), where), made[where])


def test_patches_stand_around_their_pixels() -> None:
    frames = torch.randn(2, 2, 3, 6, 4)
    patches = patches_around(frames)
    assert patches.shape == (2, 2, 27, 6, 4)
    around = torch.nn.functional.pad(frames, (1, 1, 1, 1))
    for row, column in ((0, 0), (2, 3), (5, 1)):
        wanted = around[..., row : row + 3, column : column + 3].permute(0, 1, 3, 4, 2).flatten(2)
        assert torch.equal(patches[..., row, column], wanted)
    model = model_of("flow", torch.float32)
    assert torch.equal(model(frames), model(patches))


@pytest.mark.slow
def test_a_stem_with_deepminds_padding_gives_a_quarter_of_each_side() -> None:
    for padding, rows in (("same", 56 * 56), ("transformers", 55 * 55)):
        config = PerceiverIOConfig(ImageInput(stem="conv", bands=2, padding=padding), ClassOutput(3), **CORE)
        with torch.no_grad():
            assert PerceiverIO(config).eval().inputs(torch.randn(1, 3, 224, 224)).length == rows


def test_hidden_kinds_of_a_video_are_not_read() -> None:
    model, inputs = model_of("video"), inputs_of("video")
    other = {**inputs, "label": torch.randn(2, 7, dtype=torch.float64)}
    assert_close(model(other)["image"], model(inputs)["image"])
    shown = PerceiverIO(replace(CONFIGS["video"], inputs=replace(VIDEO, mask_probs=(0.0, 0.5, 0.0))), dtype=torch.float64)
    shown.load_state_dict(model.state_dict())
    assert not torch.allclose(shown(other)["label"], shown(inputs)["label"])
    torch.manual_seed(1)
    first = shown(inputs)["label"]
    assert not torch.equal(first, shown(inputs)["label"])  # other rows are hidden


# --------------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize("name", EVERY)
def test_a_model_is_saved_and_loaded(name: str, tmp_path) -> None:
    model, inputs = model_of(name), inputs_of(name)
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == model.config
    with torch.no_grad():
        out, wanted = again(inputs), model(inputs)
    for kind in wanted if isinstance(wanted, dict) else [...]:
        assert torch.equal(out[kind], wanted[kind])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_narrower_numbers_are_near(name: str, dtype: torch.dtype) -> None:
    model, inputs = model_of(name), inputs_of(name)
    narrow = PerceiverIO(model.config, dtype=dtype).eval()
    narrow.load_state_dict(model.state_dict())
    if isinstance(inputs, dict):
        less = {kind: value.to(dtype) for kind, value in inputs.items()}
    else:
        less = inputs.to(dtype) if inputs.is_floating_point() else inputs
    with torch.no_grad():
        out, wanted = narrow(less), model(inputs)
    for kind in wanted if isinstance(wanted, dict) else [...]:
        scale = wanted[kind].abs().max()
        bound = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
        assert (out[kind].double() - wanted[kind]).abs().max() <= bound * scale
        assert out[kind].dtype == dtype


@pytest.mark.parametrize("name", ["text", "fourier"])
def test_autocast_is_near(name: str) -> None:
    model, inputs = model_of(name, torch.float32), inputs_of(name, torch.float32)
    with torch.no_grad():
        wanted = model(inputs)
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            out = model(inputs)
            again = model(inputs)
        assert_close(model(inputs), wanted)  # what autocast kept is not what full precision reads
    assert torch.equal(out, again)
    assert (out.float() - wanted).abs().max() <= 0.1 * wanted.abs().max()


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("text", lambda m: m(torch.randint(19, (2, 14))), "length 14 is longer than the max_length=13"),
        ("text", lambda m: m(torch.randn(2, 5)), "inputs must be ids, int64 or int32 .* got torch.float32 of shape \\(2, 5\\)"),
        ("text", lambda m: m(torch.randint(19, (2, 5)), torch.ones(2, 4, dtype=torch.bool)), "\\(2, 4\\)"),
        ("text", lambda m: m(torch.randint(19, (2, 5)), outputs=torch.tensor([13])), "from 0 to 12, got 13 to 13"),
        ("text", lambda m: m(torch.randint(19, (2, 5)), outputs=torch.tensor([[1], [2], [3]])), "\\(2, k\\), got .* \\(3, 1\\)"),
        ("text", lambda m: m.decode(torch.randn(2, 5, 23).double()), "latents must be \\(batch, latents, 24\\)"),
        ("text", lambda m: m.decode(m.encode(torch.randint(19, (2, 5))), inputs=torch.randint(19, (2, 5))), "would be ignored"),
        ("fourier", lambda m: m(torch.randn(2, 6, 4).double()), "images \\(batch, 3, height, width\\), got .* \\(2, 6, 4\\)"),
        ("fourier", lambda m: m(inputs_of("fourier"), outputs=torch.tensor([0])), "leave outputs away"),
        ("learned", lambda m: m(torch.randn(2, 3, 5, 4).double()), "for images of 6 x 4"),
        ("flow", lambda m: m(torch.randn(2, 2, 3, 6, 5).double()), "frames must be 6 x 4"),
        ("flow", lambda m: m.decode(m.encode(inputs_of("flow"))), "pass decode\\(latents, inputs=frames\\)"),
        ("video", lambda m: m({"audio": torch.zeros(1)}), "audio, image and label, got \\['audio'\\]"),
        (
            "video",
            lambda m: m({**inputs_of("video"), "audio": torch.zeros(2, 23, 1).double()}),
            'inputs\\["audio"\\] must be .*24, 1',
        ),
        (
            "video",
            lambda m: m({**inputs_of("video"), "label": [0.0] * 7}),
            'inputs\\["label"\\] must be .*7.*got list',
        ),
        ("video", lambda m: m({**inputs_of("video"), "label": torch.zeros(1, 7).double()}), "audio 2, image 2, label 1"),
        ("text", lambda m: m(torch.full((2, 5), 19)), "inputs must be from 0 to 18, got 19 to 19"),
        ("text", lambda m: m.decode([0.0]), "latents must be .* got list"),
        ("text", lambda m: m.decode(torch.randn(2, 5, 24)), "latents are torch.float32 but the model's weights are torch.float64"),
        ("fourier", lambda m: m(torch.zeros(2, 3, 6, 4, dtype=torch.uint8)), "inputs are torch.uint8 but the model's weights"),
        ("conv", lambda m: m(torch.randn(2, 3, 9, 4).double()), "sides of at least 5 for this stem"),
        ("video", lambda m: m(inputs_of("video"), outputs={"sound": None}), "some of audio, image, label, got \\['sound'\\]"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model_of(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_latents": 0}, "num_latents must be an integer of at least 1, got 0"),
        ({"value_dim": 8}, "value_dim=8"),
        ({"activation": "relu"}, "activation must be one of gelu, gelu_tanh, got 'relu'"),
        ({"inputs": {"kind": "sound"}}, "inputs must have a kind of text, image, flow, video, got 'sound'"),
        ({"inputs": TextInput(0)}, "inputs.vocab_size must be an integer of at least 1, got 0"),
        ({"inputs": TextInput("262")}, "inputs.vocab_size must be an integer of at least 1, got '262'"),
        ({"inputs": ImageInput(stem="patches")}, "inputs.stem must be one of pixels, conv1x1, conv, got 'patches'"),
        ({"inputs": ImageInput(stem=None)}, "inputs.stem must be one of pixels, conv1x1, conv, got None"),
        ({"inputs": ImageInput(size=(5.5, 6))}, "inputs.size must be .height, width., integers of at least 1"),
        ({"inputs": VideoInput(mask_probs=("0", 0, 1))}, "inputs.mask_probs must be three probabilities"),
        ({"inputs": {"kind": "text", "words": 3}}, "inputs has fields that TextInput does not know: words"),
        ({"inputs": {"kind": ["text"]}}, "inputs must have a kind of text"),
        ({"inputs": TextInput(kind="image")}, "inputs.kind must be \"text\", got 'image'"),
        ({"outputs": FlowOutput(rescale=0)}, "outputs.rescale must be a number above 0, got 0"),
        ({"outputs": ClassOutput(query_residual="no")}, "outputs.query_residual must be True or False, got 'no'"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TEXT, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_residual": "no"}, "query_residual must be True or False, got str 'no'"),
        ({"attention_dropout": "0.1"}, r"attention_dropout must be a number in \[0, 1\), got str '0.1'"),
        ({"norm_eps": None}, "norm_eps must be a number above 0, got NoneType None"),
    ],
)
def test_values_of_another_kind_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        replace(TEXT, **changes)


def test_a_size_may_be_a_list_and_becomes_a_pair() -> None:
    assert replace(TEXT, inputs=ImageInput(size=[6, 5]), outputs=ClassOutput(3)).inputs.size == (6, 5)


def test_an_output_needs_its_input() -> None:
    with pytest.raises(ValueError, match="FlowOutput needs a FlowInput, got TextInput"):
        PerceiverIO(replace(TEXT, outputs=FlowOutput()))


# ------------------------------------------------------------------------------------------------------ full size


@pytest.mark.slow
def test_more_output_queries_take_no_more_memory_than_a_block_of_them() -> None:
    from torch.profiler import ProfilerActivity, profile

    def most_held(count: int) -> int:
        where = torch.arange(count)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            model.decode(latents, {"image": where})
        events = recorded.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        return max(accumulate((change for _, change in changes), initial=0))

    config = replace(CONFIGS["video"], inputs=VideoInput(frames=2, size=(256, 256), audio_samples=32, num_labels=7))
    model = PerceiverIO(config).eval()
    with torch.no_grad():
        latents = torch.randn(1, 5, 24)
        block, many = most_held(perceiver.BLOCK_QUERIES), most_held(5 * perceiver.BLOCK_QUERIES)
    answers = 5 * perceiver.BLOCK_QUERIES * 3 * 4
    assert many <= block * 1.1 + answers
