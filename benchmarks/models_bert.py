"""Cases of `models.py`: BERT, and its encoder-decoder, against those of transformers.

Forward passes and training steps are of the base size, 512 symbols of source and 64 of target. Generation is of that size too, 4
beams, 64 new symbols, end excluded, so that both take all 64 steps. The cross-attention's keys and values of that case, in bytes:

    python benchmarks/models_bert.py
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from crossattention.checkpoints import bert_huggingface as family
from crossattention.checkpoints.rules import to_theirs
from crossattention.models import BeamRules, BertDecoder, BertEncoder, EncoderDecoder, beam_search
from crossattention.models.bert import base
from models import BATCHES, DTYPES, MODES, NOT_SLOWER, Call, Case, forward_of, step_of

SOURCE, TARGET, BEAMS, GENERATED = 512, 64, 4, 64
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}


def cases() -> Iterator[Case]:
    """Each model in every mode, dtype and batch; and generation."""
    for (name, make), mode, dtype, batch in itertools.product(MODELS.items(), MODES, DTYPES, BATCHES):
        build = partial(build_pair, make, mode, dtype, batch)
        yield Case(f"BERT {name}", mode, dtype, batch, build, TOLERANCES[dtype], NOT_SLOWER, ("transformers",))
    for dtype, batch in itertools.product(DTYPES, (1, 4, 8)):
        asked = 2.0 if batch == 4 else NOT_SLOWER
        # In bfloat16 the two round differently, so that their symbols part; the time of 64 steps is the same whatever they are.
        tolerance = 0.0 if dtype == "float32" else float("inf")
        build = partial(build_generation, dtype, batch)
        yield Case("BERT encoder-decoder", f"generation of {BEAMS} beams", dtype, batch, build, tolerance, asked, ("transformers",))


def encoder() -> tuple[nn.Module, Callable[[nn.Module, bool], Tensor], Callable[[int], dict[str, Tensor]]]:
    """The encoder, how either side is called, and its input."""

    def call(model: nn.Module, is_ours: bool, ids: Tensor) -> Tensor:
        return model(ids) if is_ours else model(ids).last_hidden_state

    return BertEncoder(base(**NO_DROPOUT)), call, lambda batch: {"ids": torch.randint(1000, 30_000, (batch, SOURCE))}


def encoder_decoder() -> tuple[nn.Module, Callable[[nn.Module, bool], Tensor], Callable[[int], dict[str, Tensor]]]:
    """The encoder-decoder, likewise."""

    def call(model: nn.Module, is_ours: bool, source: Tensor, target: Tensor) -> Tensor:
        return model(source, target) if is_ours else model(input_ids=source, decoder_input_ids=target).logits

    def inputs(batch: int) -> dict[str, Tensor]:
        return {"source": torch.randint(1000, 30_000, (batch, SOURCE)), "target": torch.randint(1000, 30_000, (batch, TARGET))}

    return pair_of_ours(), call, inputs


MODELS = {"encoder": encoder, "encoder-decoder": encoder_decoder}


def pair_of_ours() -> EncoderDecoder:
    """Two BERTs of the base size."""
    return EncoderDecoder(BertEncoder(base(**NO_DROPOUT)), BertDecoder(base(causal=True, context_dim=768, **NO_DROPOUT)))


def theirs_of(ours: nn.Module) -> nn.Module:
    """Their model of our weights."""
    import transformers

    config = family.config_to_theirs(ours.config, model_class=type(ours))
    if isinstance(ours, EncoderDecoder):
        theirs = transformers.EncoderDecoderModel(transformers.EncoderDecoderConfig(**config))
    else:
        theirs = transformers.BertModel(transformers.BertConfig(**config), add_pooling_layer=False)
    theirs.load_state_dict(to_theirs(ours.state_dict(), family.rules(ours.config, model_class=type(ours))))
    return theirs


def build_pair(make: Callable[[], tuple], mode: str, dtype: str, batch: int) -> tuple[Call, Call]:
    """Our model and theirs with its weights, on the same input."""
    torch.manual_seed(0)
    ours, call, inputs = make()
    theirs = theirs_of(ours)
    given = inputs(batch)
    calls = [
        partial(call, model.to(DTYPES[dtype]).train(mode != "forward"), is_ours, **given)
        for model, is_ours in ((ours, True), (theirs, False))
    ]
    if mode == "forward":
        return forward_of(calls[0]), forward_of(calls[1])
    return tuple(
        step_of(model, lambda one=one: (one().float() - 0.5).square().mean())
        for model, one in ((ours, calls[0]), (theirs, calls[1]))
    )


def build_generation(dtype: str, batch: int) -> tuple[Call, Call]:
    """Beam search by both, all 64 steps, symbols compared."""
    torch.manual_seed(0)
    ours = pair_of_ours().eval()
    end = ours.config.end_id
    with torch.no_grad():
        ours.decoder.head.bias[end] = -1e4  # neither ends before the limit
        for parameter in ours.decoder.head.dense.parameters():
            parameter.mul_(3.0)  # logits that differ by more than rounding
    theirs = theirs_of(ours).to(DTYPES[dtype]).eval()
    ours = ours.to(DTYPES[dtype])
    source = torch.randint(1000, 30_000, (batch, SOURCE))
    mask = torch.ones_like(source)

    def mine() -> Tensor:
        found = beam_search(
            ours, source, beams=BEAMS, max_length=GENERATED, length_penalty=1.0, rules=BeamRules.huggingface(), never=()
        )
        return torch.tensor([row[0].ids for row in found])

    def yours() -> Tensor:
        return theirs.generate(source, attention_mask=mask, num_beams=BEAMS, max_new_tokens=GENERATED, do_sample=False)[:, 1:]

    return mine, yours


def cross_attention_megabytes(batch: int = 4) -> tuple[float, float]:
    """Megabytes of keys and values that cross-attention holds while 4 beams are searched, ours and theirs."""
    ours = pair_of_ours().eval()
    theirs = theirs_of(ours).eval()
    source = torch.randint(1000, 30_000, (batch, SOURCE))
    with torch.no_grad():
        prepared = ours.prepare(ours.encode(source), uses=GENERATED, query_length=1, repeats=BEAMS)
        repeated = source.repeat_interleave(BEAMS, 0)  # as `generate` repeats the states
        cache = theirs(input_ids=repeated, decoder_input_ids=repeated[:, :1], use_cache=True).cache.cross_attention_cache
    held = {t.data_ptr(): t for context in prepared for t in (context.keys, context.values)}  # what layers share counts once
    mine = sum(t.numel() * t.element_size() for t in held.values())
    yours = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return mine / 1e6, yours / 1e6


if __name__ == "__main__":
    mine, yours = cross_attention_megabytes()
    print(f"keys and values of cross-attention, batch 4, {BEAMS} beams: {mine:,.1f} MB of theirs {yours:,.1f} ({mine / yours:.3f})")
