"""`set_attn_implementation("crossattention")`: same outputs and masks, weights where asked for, others refused with the reason."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from crossattention.interop import register_attention
from crossattention.interop.huggingface_kernel import attend
from huggingface_models import (
    SOURCE,
    TARGET,
    Run,
    bart,
    bert,
    detr,
    drawn,
    eager_of,
    marian,
    mllama,
    pegasus,
    perceiver,
    qformer,
    read_by_queries,
    read_pictures,
    read_pixels,
    read_sound,
    read_text,
    t5,
    t5gemma,
    trocr,
    whisper,
)
from tolerances import assert_close

transformers = pytest.importorskip("transformers")
slow = pytest.mark.slow


def llama() -> nn.Module:
    """Causal self-attention of two heads for four of queries, with padding."""
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))


def read_own(model: nn.Module, **options: Any) -> Any:
    mask = torch.ones_like(SOURCE)
    mask[1, :3] = 0
    return model(input_ids=SOURCE, attention_mask=mask, **options)


def read_alone(model: nn.Module, **options: Any) -> Any:
    return model(input_ids=SOURCE, **options)


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (bart, read_text),
        *(
            pytest.param(make, read, marks=slow)
            for make, read in (
                (t5, read_text),
                (marian, read_text),
                (pegasus, read_text),
                (bert, read_text),
                (whisper, read_sound),
                (qformer, read_by_queries),
                (detr, read_pixels),
                (mllama, read_pictures),
                (llama, read_own),
                (llama, read_alone),
            )
        ),
    ],
)
def test_models_give_the_same_and_weights_where_they_are_asked_for(make: Callable[[], nn.Module], read: Run) -> None:
    register_attention()
    model = drawn(make())
    eager = eager_of(model)
    expected = read(eager)[0]
    model.set_attn_implementation("crossattention")
    out = read(model)[0]
    if make is llama:  # rows of padding have no live key
        expected, out = expected[:, 3:], out[:, 3:]
    assert_close(out, expected)
    out.sum().backward()
    read(eager)[0][:, 3:].sum().backward() if make is llama else expected.sum().backward()
    for (name, own), ours in zip(eager.named_parameters(), model.parameters(), strict=True):
        if own.grad is not None:
            scale = own.grad.abs().amax().clamp(min=1.0)
            assert_close(ours.grad / scale, own.grad / scale)
        else:
            assert ours.grad is None, name
    if make in (bart, t5, bert):
        found, wanted = (read(m, output_attentions=True).cross_attentions for m in (model, eager))
        assert len(found) == len(wanted) == 2
        for ours, own in zip(found, wanted, strict=True):
            assert_close(ours, own)


@slow
@pytest.mark.parametrize("make", [bart, t5, llama])
def test_generation_gives_the_same_tokens(make: Callable[[], nn.Module]) -> None:
    register_attention()
    model = drawn(make())
    for options in ({"num_beams": 3}, {"num_beams": 1}, {"use_cache": False}):
        model.set_attn_implementation("sdpa")
        expected = model.generate(SOURCE, max_new_tokens=6, do_sample=False, **options)
        model.set_attn_implementation("crossattention")
        assert torch.equal(model.generate(SOURCE, max_new_tokens=6, do_sample=False, **options), expected)


def test_masks_biases_groups_and_dropout() -> None:
    drawn_ = torch.Generator(torch.get_default_device()).manual_seed(0)
    query, key, value = (torch.randn(2, heads, n, 8, generator=drawn_) for heads, n in ((4, 3), (2, 5), (2, 5)))
    bias = torch.randn(1, 4, 3, 5, generator=drawn_)
    open_ = torch.rand(2, 1, 3, 5, generator=drawn_) > 0.4
    open_[0, :, 1] = False
    spread = [tensor.repeat_interleave(2, 1).double() for tensor in (key, value)]

    def expected(added: torch.Tensor) -> torch.Tensor:
        scores = query.double() @ spread[0].transpose(2, 3) * 0.5 + added.double()
        return (torch.softmax(scores, -1).nan_to_num() @ spread[1]).transpose(1, 2).float()

    closed = torch.zeros(2, 1, 3, 5).masked_fill(~open_, -torch.inf)
    lowest = closed.clamp(min=torch.finfo(torch.float32).min)
    module = nn.Module()
    for mask in (open_, closed, lowest):
        assert_close(attend(module, query, key, value, mask, scaling=0.5)[0], expected(closed))
        assert_close(attend(module, query, key, value, mask, scaling=0.5, position_bias=bias)[0], expected(closed + bias))
    causal = torch.zeros(3, 5).masked_fill(torch.ones(3, 5).triu(1).bool(), -torch.inf)
    assert_close(attend(module, query, key, value, None, scaling=0.5)[0], expected(causal))
    assert_close(attend(module, query, key, value, None, scaling=0.5, position_bias=bias)[0], expected(causal + bias))
    assert_close(attend(module, query, key, value, None, scaling=0.5, is_causal=False)[0], expected(torch.zeros(1)))
    assert_close(attend(module, query[:1], key, value, None, scaling=0.5, is_causal=False)[0][0], expected(torch.zeros(1))[0])
    out, weights = attend(module, query, key, value, open_, scaling=0.5, output_attentions=True)
    assert_close(out, expected(closed)) and weights.shape == (2, 4, 3, 5)
    assert weights[0, :, 1].abs().max() == 0.0
    torch.manual_seed(0)
    dropped = attend(module, query, key, value, open_, dropout=0.5, scaling=0.5)[0]
    assert not torch.equal(dropped, out) and dropped.isfinite().all()
    with pytest.raises(ValueError, match=r"cannot run Module: it caps its scores \(softcap\)"):
        attend(module, query, key, value, None, softcap=30.0)
    with pytest.raises(ValueError, match="it has sinks"):
        attend(module, query, key, value, None, s_aux=torch.zeros(4))


@slow
def test_models_that_ask_for_more_are_refused_with_the_reason() -> None:
    register_attention()
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    capped = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes))
    sinking = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, num_local_experts=2))
    for model, why in (
        (trocr(), "its attention does not go through transformers' AttentionInterface"),
        (perceiver(), "its attention does not go through transformers' AttentionInterface"),
        (t5gemma(), r"it caps its scores \(softcap\)"),
        (capped, r"it caps its scores \(softcap\), config.attn_logit_softcapping is 50.0"),
        (sinking, "it has sinks"),
    ):
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match=rf'attn_implementation="crossattention" cannot run {type(model).__name__}.*: {why}'):
            model.set_attn_implementation("crossattention")
        assert model.config._attn_implementation == before
        model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="cannot run GptOss"):
        transformers.AutoModelForCausalLM.from_config(sinking.config, attn_implementation="crossattention")
    uncapped = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, attn_logit_softcapping=None))
    eager = eager_of(drawn(uncapped))
    uncapped.set_attn_implementation("crossattention")
    assert_close(uncapped(TARGET).logits, eager(TARGET).logits)


@slow
def test_it_is_registered_once_and_only_when_it_is_asked_for() -> None:
    import subprocess

    code = (
        "import sys, crossattention.interop; assert 'transformers' not in sys.modules\n"
        "import transformers; assert 'crossattention' not in transformers.AttentionInterface._global_mapping\n"
        "from crossattention.interop import register_attention; register_attention(); register_attention()\n"
        "from transformers.masking_utils import AttentionMaskInterface\n"
        "assert 'crossattention' in AttentionMaskInterface._global_mapping"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@slow
def test_a_sped_up_model_keeps_its_gain_under_it() -> None:
    from crossattention import speed_up

    register_attention()
    model = drawn(bart())
    expected = model.generate(SOURCE, num_beams=3, max_new_tokens=6)
    changes = speed_up(model)
    model.set_attn_implementation("crossattention")
    assert torch.equal(model.generate(SOURCE, num_beams=3, max_new_tokens=6), expected)
    assert "kept) x" in str(changes)
