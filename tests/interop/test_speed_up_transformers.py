"""Sped-up models of transformers give what they gave: forward, backward, generation; and keep what their callers rely on."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossattention import record_attention, speed_up
from crossattention.interop.huggingface_families import FAMILIES
from crossattention.interop.huggingface_masks import Masks
from crossattention.maps import Rows
from huggingface_models import (
    MASK,
    SOURCE,
    M,
    N,
    Run,
    bart,
    bert,
    bert_decoder,
    detr,
    drawn,
    eager_of,
    instructed_qformer,
    marian,
    mllama,
    pegasus,
    perceiver,
    picture_to_text,
    pictures_and_text,
    qformer,
    read_by_queries,
    read_inputs,
    read_pictures,
    read_pixels,
    read_sound,
    read_states,
    read_text,
    read_wide_states,
    t5,
    t5gemma,
    trocr,
    two_berts,
    whisper,
)
from tolerances import assert_close

transformers = pytest.importorskip("transformers")
slow = pytest.mark.slow
every_call_runs_a_plan = pytest.mark.usefixtures("plans_for_all")

READ: list[tuple[Callable[[], nn.Module], Run, int]] = [  # the model, its call, and how many modules cross
    (bart, read_text, 2),
    (t5, read_text, 2),
    (marian, read_text, 2),
    (pegasus, read_text, 2),
    (bert, read_text, 2),
    (two_berts, read_text, 2),
    (bert_decoder, read_wide_states, 2),
    (whisper, read_sound, 2),
    (trocr, read_states, 2),
    (perceiver, read_inputs, 1),
    (qformer, read_by_queries, 2),
    (instructed_qformer, read_by_queries, 2),
    (detr, read_pixels, 2),
    (mllama, read_pictures, 2),
]
ALL_BUT_FIRST = [READ[0], *(pytest.param(*case, marks=slow) for case in READ[1:])]
OWN_KERNEL = (trocr, perceiver)
"""Written out in the module, whatever implementation is asked for."""


def sped_up(model: nn.Module) -> tuple[nn.Module, Any]:
    """A copy that runs by plans, and its changes."""
    faster = copy.deepcopy(model)
    return faster, speed_up(faster)


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# ----------------------------------------------------------------------------------------------------- one pass


@every_call_runs_a_plan
@pytest.mark.parametrize(("make", "read", "count"), ALL_BUT_FIRST)
@pytest.mark.parametrize("kernel", [pytest.param("sdpa", marks=slow), "eager"])
def test_outputs_and_gradients_are_the_same(make: Callable[[], nn.Module], read: Run, count: int, kernel: str) -> None:
    model = drawn(make())
    if kernel == "eager" and make not in OWN_KERNEL:
        model.set_attn_implementation("eager")
    faster, changes = sped_up(model)
    assert len(changes.replaced) == count, changes
    expected, out = read(model)[0], read(faster)[0]
    assert_close(out, expected)
    wanted, found = gradients(model, expected), gradients(faster, out)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert_close(found[name] / gradient.abs().amax().clamp(min=1.0), gradient / gradient.abs().amax().clamp(min=1.0))


@every_call_runs_a_plan
@slow
@pytest.mark.parametrize(("make", "read", "count"), READ)
def test_without_a_cache_and_in_float64_too(make: Callable[[], nn.Module], read: Run, count: int) -> None:
    model = drawn(make())
    options = {} if make in (perceiver, qformer, instructed_qformer, detr) else {"use_cache": False}
    faster, changes = sped_up(model)
    assert_close(read(faster, **options)[0], read(model, **options)[0])
    assert "context" in str(changes) or "head+head" in str(changes)
    if make in (bart, t5, bert):
        model, faster = model.double(), faster.double()
        assert_close(read(faster, **options)[0], read(model, **options)[0], dtype=torch.float64)


@slow
@pytest.mark.parametrize(("make", "read", "count"), READ)
def test_undone_the_model_is_what_it_was(make: Callable[[], nn.Module], read: Run, count: int) -> None:
    model = drawn(make())
    before, methods, names = read(model)[0], [dict(module.__dict__) for module in model.modules()], list(model.state_dict())
    changes = speed_up(model)
    assert list(model.state_dict()) == names
    read(model)
    changes.undo()
    for module, then in zip(model.modules(), methods, strict=True):
        assert {"forward", "generate", "_expand_inputs_for_generation"} & (module.__dict__.keys() - then.keys()) == set()
    assert torch.equal(read(model)[0], before)


@slow
@pytest.mark.parametrize(("make", "read", "count"), READ)
def test_an_example_is_checked_with_eager_attention_too(make: Callable[[], nn.Module], read: Run, count: int) -> None:
    for kernel in ("sdpa", "eager"):
        model = drawn(make())
        if make not in OWN_KERNEL and kernel == "eager":
            model.set_attn_implementation(kernel)
        assert "largest difference" in str(speed_up(model, example=lambda m: read(m)[0]))


@every_call_runs_a_plan
def test_rows_without_a_live_key_read_zero_and_are_left_out_of_the_check() -> None:
    model = drawn(bart())
    model.set_attn_implementation("eager")
    mask = MASK.long().clone()
    mask[1] = 0

    def read(m: nn.Module) -> Tensor:
        states = torch.linspace(-1, 1, 2 * M * 16).view(2, M, 16)
        return m(encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=SOURCE[:, :N]).logits

    expected = read(model)[0]
    changes = speed_up(model, example=read)
    assert "rows without a live key were left out" in str(changes)
    assert_close(read(model)[0], expected)


@slow
def test_weights_that_are_asked_for_come_from_the_module_s_own_forward() -> None:
    for make, read in ((bart, read_text), (t5, read_text), (bert, read_text), (whisper, read_sound)):
        model = eager_of(drawn(make()))
        faster, _ = sped_up(model)
        expected, out = (read(m, output_attentions=True) for m in (model, faster))
        assert len(out.cross_attentions) == 2
        for found, wanted in zip(out.cross_attentions, expected.cross_attentions, strict=True):
            assert torch.equal(found, wanted)
    faster = drawn(bart())
    faster.set_attn_implementation("eager")
    speed_up(faster)
    faster.config.output_attentions = True
    assert len(read_text(faster).cross_attentions) == 2


def test_hooks_read_the_weights_that_eager_attention_gives() -> None:
    model = drawn(bart())
    model.set_attn_implementation("eager")
    faster, changes = sped_up(model)
    read_text(faster)
    seen: list[Tensor] = []
    for m in (model, faster):
        m.get_submodule(changes.replaced[0]).register_forward_hook(lambda module, args, out: seen.append(out[1]))
        read_text(m)
    assert torch.equal(*seen)


@slow
def test_dropout_draws_what_it_drew() -> None:
    model = drawn(bart(attention_dropout=0.5, dropout=0.0)).train()
    faster, _ = sped_up(model)
    outs = []
    for m in (model, faster):
        torch.manual_seed(0)
        outs.append(read_text(m)[0])
    assert torch.equal(*outs)


@every_call_runs_a_plan
@slow
@pytest.mark.parametrize(("make", "read", "count"), [READ[0], READ[4], READ[10]])
def test_hooks_adapters_and_weights_set_later_are_seen(make: Callable[[], nn.Module], read: Run, count: int) -> None:
    model = drawn(make())
    faster, changes = sped_up(model)
    read(faster)
    seen = []
    for m in (model, faster):
        module = m.get_submodule(changes.replaced[0])
        name = "k_proj" if make is bart else "key"
        old = getattr(module, name)
        adapter = nn.Linear(old.in_features, old.out_features)
        adapter.load_state_dict({key: 1.5 * value for key, value in old.state_dict().items()})
        setattr(module, name, adapter)
        adapter.register_forward_hook(lambda *_: seen.append(1))
        module.register_forward_hook(lambda module, args, out: (2 * out[0], *out[1:]))
    assert_close(read(faster)[0], read(model)[0])
    assert len(seen) == 2


@every_call_runs_a_plan
@slow
def test_half_precision_and_autocast() -> None:
    model = drawn(bart(), 0.2)
    faster, _ = sped_up(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(read_text(faster)[0].float(), read_text(model)[0].float(), dtype=torch.bfloat16)
    expected = read_text(model)[0]
    half, own = read_text(faster.bfloat16())[0].float(), read_text(model.bfloat16())[0].float()
    assert (half - expected).abs().max() <= 2 * (own - expected).abs().max() + 1e-3


@every_call_runs_a_plan
@slow
def test_checkpointed_layers_train_the_same() -> None:
    model = drawn(t5())
    faster, _ = sped_up(model)
    for m in (model, faster):
        m.train()
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
    getattr(faster, "activation_checkpointing_enable", faster.gradient_checkpointing_enable)()
    wanted, found = (gradients(m, read_text(m)[0]) for m in (model, faster))
    for name, gradient in wanted.items():
        assert_close(found[name], gradient)


# ----------------------------------------------------------------------------------------------------- generation

MODES: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"num_beams": 1},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 3, "use_cache": False},
    {"use_cache": False},
    {"do_sample": True, "num_return_sequences": 2},
]
GENERATE = (bart, t5, marian, pegasus, bert, two_berts, whisper, picture_to_text, mllama)


def generate(model: nn.Module, **options: Any) -> Any:
    """Eight tokens, of what the model reads."""
    torch.manual_seed(1)
    options = {"max_new_tokens": 6, **options}
    if isinstance(model, transformers.WhisperForConditionalGeneration):
        return model.generate(
            torch.randn(2, 8, 20, generator=torch.Generator(torch.get_default_device()).manual_seed(0)), **options
        )
    if isinstance(model, transformers.VisionEncoderDecoderModel):
        return model.generate(
            pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator(torch.get_default_device()).manual_seed(0)), **options
        )
    if isinstance(model, transformers.MllamaForConditionalGeneration):
        return model.generate(**pictures_and_text(), **{"do_sample": False, **options})
    return model.generate(input_ids=SOURCE, attention_mask=MASK.long(), **options)


@every_call_runs_a_plan
@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(make, mode, marks=() if (make, mode) == (bart, MODES[0]) else slow)
        for make in GENERATE
        for mode in MODES
        if make is not mllama or mode.get("use_cache", True)
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_same_tokens_are_generated(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = drawn(make())
    faster, changes = sped_up(model)
    assert torch.equal(generate(faster, **options), generate(model, **options))
    ran = str(changes)
    assert "kept) x" in ran or make is mllama
    if make is bart and options == MODES[1]:
        with torch.inference_mode():
            assert torch.equal(generate(faster, **options), generate(model, **options))
        changes.undo()
        assert torch.equal(generate(faster, **options), generate(model, **options))


class Calls:
    """How many rows went through modules, by their names."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        self.rows: dict[str, list[int]] = {}
        for name, module in model.named_modules():
            if name.endswith(names):
                self.rows[name] = []
                module.register_forward_pre_hook(lambda module, args, name=name: self.rows[name].append(args[0].shape[0]))


@every_call_runs_a_plan
@pytest.mark.parametrize("options", [MODES[0], *(pytest.param(mode, marks=slow) for mode in (MODES[3], MODES[5]))])
def test_keys_and_values_are_projected_once_for_a_source_and_never_reordered(options: dict[str, Any], monkeypatch: Any) -> None:
    model = drawn(bart())
    speed_up(model)
    calls = Calls(model, "encoder_attn.k_proj", "encoder_attn.v_proj")
    sizes = []
    own = transformers.EncoderDecoderCache.reorder_cache

    def reorder(cache: Any, beams: Tensor) -> None:
        sizes.append(cache.cross_attention_cache.get_seq_length())
        own(cache, beams)

    monkeypatch.setattr(transformers.EncoderDecoderCache, "reorder_cache", reorder)
    generate(model, **options)
    assert len(calls.rows) == 4
    for name, rows in calls.rows.items():
        assert rows == [2], f"{name} saw {rows} rows where two sources were read"
    assert not any(sizes)


@every_call_runs_a_plan
@slow
def test_states_of_another_width_are_projected_once_for_a_source() -> None:
    model = drawn(two_berts())
    multiplied = []
    own = model.enc_to_dec_proj.forward
    model.enc_to_dec_proj.forward = lambda states: (multiplied.append(states.shape[0]), own(states))[1]
    expected = generate(model, num_beams=3)
    assert len(multiplied) > 1 and set(multiplied) == {6}
    del model.enc_to_dec_proj.forward
    changes = speed_up(model)
    multiplied.clear()
    linear = torch.nn.functional.linear
    weight = model.enc_to_dec_proj.weight

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is linear and args[1] is weight:
                multiplied.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        out = generate(model, num_beams=3)
    assert torch.equal(out, expected) and multiplied == [2], changes


@every_call_runs_a_plan
@slow
@pytest.mark.parametrize("make", [bart, t5, two_berts, whisper])
def test_a_cache_that_generate_gives_back_is_full(make: Callable[[], nn.Module]) -> None:
    model = drawn(make())
    faster, _ = sped_up(model)
    wanted, found = (generate(m, num_beams=2, return_dict_in_generate=True, output_scores=True) for m in (model, faster))
    assert torch.equal(found.sequences, wanted.sequences)
    name = next(name for name in ("cache", "past_key_values") if name in wanted)
    for ours, own in zip(found[name].cross_attention_cache.layers, wanted[name].cross_attention_cache.layers, strict=True):
        assert_close(ours.keys, own.keys)
        assert_close(ours.values, own.values)


@every_call_runs_a_plan
@slow
@pytest.mark.parametrize("make", [bart, t5, bert, two_berts])
def test_steps_by_hand_fill_and_read_the_cache_as_before(make: Callable[[], nn.Module]) -> None:
    model = drawn(make())
    faster, _ = sped_up(model)
    outs = []
    for m in (model, faster):
        states = m.get_encoder()(SOURCE, attention_mask=MASK.long())
        given, logits = {"encoder_outputs": states, "attention_mask": MASK.long()}, []
        out = m(**given, decoder_input_ids=SOURCE[:, :1], use_cache=True)
        name = next(name for name in ("cache", "past_key_values") if name in out)
        for step in range(1, 4):
            logits.append(out.logits)
            out = m(**given, decoder_input_ids=SOURCE[:, step : step + 1], **{name: out[name]}, use_cache=True)
        assert out[name].cross_attention_cache.layers[0].keys.shape[2] == M
        outs.append(torch.cat([*logits, out.logits], 1))
    assert_close(outs[1], outs[0])


@every_call_runs_a_plan
@slow
@pytest.mark.parametrize("cache", [True, False])
def test_what_is_kept_is_never_stale(cache: bool) -> None:
    """Weights and states that change while something is generated are seen as the module itself would see them."""
    options = {"num_beams": 1, "max_new_tokens": 6, "min_new_tokens": 6, "use_cache": cache}

    class Meddle(transformers.LogitsProcessor):
        def __init__(self, model: nn.Module, states: Tensor) -> None:
            self.model, self.states, self.steps = model, states, 0

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.steps += 1
            if self.steps == 2:
                with torch.no_grad():
                    self.states.mul_(-1.0)
                    self.model.get_decoder().layers[0].encoder_attn.v_proj.weight.mul_(-2.0)
            return scores

    found = []
    for faster, meddles in ((False, True), (True, True), (True, False)):
        model = drawn(bart())
        states = model.get_encoder()(SOURCE, attention_mask=MASK.long()).last_hidden_state.detach()
        if faster:
            speed_up(model)
        outputs = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=states)
        given = {"encoder_outputs": outputs, "attention_mask": MASK.long(), "return_dict_in_generate": True, "output_scores": True}
        changes = [Meddle(model, states)] if meddles else []
        found.append(model.generate(**given, **options, logits_processor=changes))
    own, ours, undisturbed = found
    assert_close(ours.scores[1], undisturbed.scores[1])
    assert not torch.allclose(ours.scores[2], undisturbed.scores[2], atol=1e-3)
    if not cache:  # with a cache, the module itself goes on with what it projected before
        assert torch.equal(own.sequences, ours.sequences)
        for before, after in zip(own.scores, ours.scores, strict=True):
            assert_close(after, before)


@every_call_runs_a_plan
@slow
def test_other_sources_weights_and_threads_follow_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = drawn(bart())
    faster, _ = sped_up(model)
    other = SOURCE.flip(1)
    for ids in (SOURCE, other, SOURCE):
        assert torch.equal(faster.generate(ids, num_beams=3, max_new_tokens=6), model.generate(ids, num_beams=3, max_new_tokens=6))
    for m in (model, faster):
        with torch.no_grad():
            for parameter in m.parameters():
                parameter.mul_(1.1)
    expected = [model.generate(ids, num_beams=3, max_new_tokens=6) for ids in (SOURCE, other)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda ids: faster.generate(ids, num_beams=3, max_new_tokens=6), (SOURCE, other)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_call_runs_a_plan
@slow
@pytest.mark.parametrize("make", [bart, t5, bert])
def test_recordings_of_a_sped_up_model_are_those_of_the_model(make: Callable[[], nn.Module]) -> None:
    model = drawn(make())
    faster, _ = sped_up(model)
    for run in (read_text, lambda m: generate(m, num_beams=3)):
        merged = []
        for m in (model, faster):
            with torch.no_grad(), record_attention(m, [Rows(range(3))]) as seen:
                run(m)
            merged.append({name: layer.merged[0] for name, layer in seen.layers.items()})
        assert merged[0].keys() == merged[1].keys() and len(merged[0]) == 2
        for name, rows in merged[0].items():
            assert_close(merged[1][name], rows)


# ----------------------------------------------------------------------------------------------------- what is left alone


@slow
def test_classes_that_are_not_known_are_left_alone_with_the_reason() -> None:
    model = t5gemma()
    changes = speed_up(model)
    assert changes.replaced == () and len(changes.left) == 2
    assert "T5GemmaCrossAttention is no class whose forward pass is known here" in str(changes)

    class Mine(type(bart().model.decoder.layers[0].encoder_attn)):  # type: ignore[misc]
        """A class of somebody else."""

    model = bart()
    model.model.decoder.layers[0].encoder_attn.__class__ = Mine
    changes = speed_up(model)
    assert changes.replaced == ("model.decoder.layers.1.encoder_attn",)
    assert [left.name for left in changes.left] == ["model.decoder.layers.0.encoder_attn"]


@slow
def test_every_class_of_a_family_has_the_forward_pass_of_its_family() -> None:
    """By name, each class in the table exists; its projections and sizes have the attributes that the family names."""
    from pathlib import Path

    found = {}
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        code = file.read_text(encoding="utf-8")
        found |= {name: code for name in FAMILIES if f"\nclass {name}(nn.Module)" in code}
    assert found.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        body = found[name].split(f"\nclass {name}(nn.Module)")[1].split("\nclass ")[0]
        for attribute in (*filter(None, family.projections), family.head_dim, *filter(None, (family.heads, family.kv_heads))):
            assert f"self.{attribute} = " in body, (name, attribute)
        assert family.context in body and family.mask in body and f"self.{family.dropout} = " in body


# ----------------------------------------------------------------------------------------------------- masks


def test_masks_are_turned_into_ours() -> None:
    lowest = torch.finfo(torch.float32).min
    open_ = torch.tensor([[True, True, False], [True, False, False]])
    padding = torch.zeros(2, 1, 4, 3).masked_fill(~open_[:, None, None], lowest)
    masks = Masks()
    context, pairs = masks.read(padding[:, :, :1], 1, 4)
    assert pairs is None and torch.equal(context, open_)
    context, pairs = masks.read(padding, 1, 4)
    assert context is None and torch.equal(pairs, open_[:, None, None].expand(2, 1, 4, 3))
    added = padding.clone()
    added[:, :, :, 0] = 0.5
    context, pairs = masks.read(added, 1, 4)
    assert context is None and torch.equal(pairs[0, 0, 0], torch.tensor([0.5, 0.0, -torch.inf]))
    beams = padding.repeat_interleave(3, 0)
    assert torch.equal(masks.read(beams[:, :, :1], 3, 1)[0], open_)
    assert masks.read(beams, 3, 4)[1].shape == (2, 1, 12, 3)
    once = masks.read(padding, 1, 4)[1]
    assert masks.read(padding, 1, 4)[1] is once
    padding[0, 0, 0, 0] = lowest
    assert not masks.read(padding, 1, 4)[1][0, 0, 0, 0]


def test_masks_that_forbid_nothing_are_none() -> None:
    masks, added = Masks(), torch.zeros(2, 1, 1, 3)
    assert masks.read(added, 1, 1) == (None, None) == masks.read(torch.ones(2, 1, 4, 3, dtype=torch.bool), 1, 4)
    added[1, 0, 0, 2] = -torch.inf
    assert masks.read(added, 1, 1)[0].tolist() == [[True] * 3, [True, True, False]]


# ----------------------------------------------------------------------------------------- nothing to gain


def plans_of(changes: Any) -> list[Any]:
    return [plans for one in changes._replacements for plans in one.what.plans]


@slow
@pytest.mark.parametrize(("make", "read"), [(bart, read_text), (bert, read_text), (detr, read_pixels), (qformer, read_by_queries)])
def test_calls_whose_plan_is_the_module_s_own_run_its_code(make: Callable[[], nn.Module], read: Run) -> None:
    model = drawn(make())
    faster, changes = sped_up(model)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(read(faster)[0], read(model)[0])
    assert all(
        "none has run yet" in (line := plans.describe()[0]) and "calls left to its own forward" in line
        for plans in plans_of(changes)
    )
    assert all("none has run yet" in plans.describe()[0] for plans in plans_of(changes))
    model.set_attn_implementation("eager")
    faster.set_attn_implementation("eager")
    assert_close(read(faster)[0], read(model)[0])
    assert not all("none has run yet" in plans.describe()[0] for plans in plans_of(changes)) or make is qformer


@slow
def test_one_short_source_for_each_row_is_left_and_beams_are_not() -> None:
    model = drawn(bart())
    faster, changes = sped_up(model)
    assert torch.equal(generate(faster), generate(model))
    assert all("none has run yet" in plans.describe()[0] for plans in plans_of(changes))
    assert torch.equal(generate(faster, num_beams=3), generate(model, num_beams=3))
    assert all("(kept) x" in plans.describe()[0] for plans in plans_of(changes))
