"""Cross-attention modules of Hugging Face's transformers against ours, eager and sdpa, with the masks that their models make.

Each family's module gets the mask that its own model would hand it for a batch with padding, one item of which is all padding in
half of the cases.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from agreement import Agreement
from random_case import Case, copy_projections, count, draw, randomise
from torch import Tensor, nn

from crossattention import CrossAttention
from crossattention.plan import CANDIDATES


@dataclass(frozen=True)
class Module:
    """Their module, what it gives of (queries, context, mask), and its projections.

    Args:
        module: theirs.
        config: its configuration, which names the implementation.
        run: their output (z, n, o).
        projections: query, key, value and output, the last None where another module holds it.
        scale: factor of the scores, None for one over the root of the head width.
    """

    module: nn.Module
    config: Any
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    projections: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear | None]
    scale: float | None = None


def compare(cases: int, seed: int) -> list[Agreement]:
    """Agreement of each family, each implementation, over as many random sizes; then of the implementations with each other."""
    lines = []
    for name, make in (("BERT", _bert), ("BART", _bart), ("T5", _t5), ("Whisper", _whisper)):
        eager, sdpa = (Agreement(f"transformers, {name}, {way}") for way in ("eager", "sdpa"))
        itself = Agreement(f"transformers, {name}: eager against sdpa, all rows")
        _compare(make, cases, seed, eager, sdpa, itself)
        lines += [eager, sdpa, itself]
    return [*lines, _perceiver(cases, seed)]


def _compare(make: Any, cases: int, seed: int, eager: Agreement, sdpa: Agreement, itself: Agreement) -> None:
    chance = random.Random(seed)
    for _ in range(cases):
        heads, head_dim = chance.randint(1, 5), chance.randint(1, 8)
        dim = heads * head_dim
        case = draw(chance, dim, dim)
        made: Module = make(dim, heads, head_dim)
        made.module.to(case.dtype).eval()
        randomise(made.module)
        layer = _layer(made, dim, heads, case.dtype, chance)
        ours = layer(case.a, case.b, context_mask=case.real)
        found = []
        for way, line in (("eager", eager), ("sdpa", sdpa)):
            made.config._attn_implementation = way
            theirs = made.run(case.a, case.b, _mask(made.config, case))
            found.append(theirs.detach())
            count(line, case, layer, ours, theirs)
        itself.add(str(case), *found, torch.ones_like(case.live))


def _layer(made: Module, dim: int, heads: int, dtype: torch.dtype, chance: random.Random) -> CrossAttention:
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    biased = [name for name, theirs in zip(names, made.projections, strict=True) if theirs is not None and theirs.bias is not None]
    layer = CrossAttention(dim, heads=heads, bias=biased, scale=made.scale, plan=chance.choice(CANDIDATES), dtype=dtype)
    copy_projections(layer, *made.projections)
    return layer


def _mask(config: Any, case: Case) -> Tensor | None:
    """The mask that their models make of padding, for the implementation that the configuration names."""
    from transformers.masking_utils import create_bidirectional_mask

    return create_bidirectional_mask(
        config=config, inputs_embeds=case.a, attention_mask=case.real.long(), encoder_hidden_states=case.b
    )


def _bert(dim: int, heads: int, head_dim: int) -> Module:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertCrossAttention

    config = BertConfig(hidden_size=dim, num_attention_heads=heads, attention_probs_dropout_prob=0.0)
    module = BertCrossAttention(config)
    run = lambda a, b, mask: module(a, encoder_hidden_states=b, attention_mask=mask)[0]  # noqa: E731
    return Module(module, config, run, (module.query, module.key, module.value, None))


def _bart(dim: int, heads: int, head_dim: int) -> Module:
    from transformers import BartConfig
    from transformers.models.bart.modeling_bart import BartAttention

    config = BartConfig(d_model=dim, decoder_attention_heads=heads)
    module = BartAttention(dim, heads, is_decoder=True, config=config, layer_idx=0)
    run = lambda a, b, mask: module(a, key_value_states=b, attention_mask=mask)[0]  # noqa: E731
    return Module(module, config, run, (module.q_proj, module.k_proj, module.v_proj, module.out_proj))


def _t5(dim: int, heads: int, head_dim: int) -> Module:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=dim, d_kv=head_dim, num_heads=heads, dropout_rate=0.0, is_decoder=True)
    module = T5Attention(config, has_relative_attention_bias=False, layer_idx=0)
    run = lambda a, b, mask: module(a, mask=mask, key_value_states=b)[0]  # noqa: E731
    return Module(module, config, run, (module.q, module.k, module.v, module.o), scale=1.0)


def _whisper(dim: int, heads: int, head_dim: int) -> Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperAttention

    config = WhisperConfig(d_model=dim, decoder_attention_heads=heads)
    module = WhisperAttention(dim, heads, is_decoder=True, config=config, layer_idx=0)
    run = lambda a, b, mask: module(a, key_value_states=b, attention_mask=mask)[0]  # noqa: E731
    return Module(module, config, run, (module.q_proj, module.k_proj, module.v_proj, module.out_proj))


def _perceiver(cases: int, seed: int) -> Agreement:
    """Its one implementation, with the additive mask that its model makes; widths of queries, values and context all differ."""
    from transformers import PerceiverConfig
    from transformers.models.perceiver.modeling_perceiver import PerceiverSelfAttention

    line, chance = Agreement("transformers, Perceiver"), random.Random(seed)
    for _ in range(cases):
        heads = chance.randint(1, 5)
        qk, v = heads * chance.randint(1, 8), heads * chance.randint(1, 8)
        query_dim, context_dim = chance.randint(2, 20), chance.randint(2, 20)
        case = draw(chance, query_dim, context_dim)
        module = PerceiverSelfAttention(
            PerceiverConfig(attention_probs_dropout_prob=0.0),
            is_cross_attention=True,
            qk_channels=qk,
            v_channels=v,
            num_heads=heads,
            q_dim=query_dim,
            kv_dim=context_dim,
        )
        module.to(case.dtype).eval()
        randomise(module)
        layer = CrossAttention(
            query_dim,
            context_dim,
            heads=heads,
            head_dim=qk // heads,
            value_head_dim=v // heads,
            out_dim=v,
            bias=("q_proj", "k_proj", "v_proj"),
            plan=chance.choice(CANDIDATES),
            dtype=case.dtype,
        )
        copy_projections(layer, module.query, module.key, module.value, None)
        mask = (1.0 - case.real[:, None, None].to(case.dtype)) * torch.finfo(case.dtype).min
        theirs = module(case.a, inputs=case.b, inputs_mask=mask)[0]
        context = module.layernorm2(case.b)
        ours = layer(module.layernorm1(case.a), context, context_mask=case.real)
        count(line, case, layer, ours, theirs, context=context)
    return line
