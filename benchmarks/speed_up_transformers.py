"""Models of transformers at real sizes, with random weights, for `benchmarks/speed_up.py`, and the memory of their sources."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from crossattention.interop import huggingface_generation

STEPS = 48
"""Tokens that are generated."""
Made = tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]
"""A model, and what runs it or a copy of it."""


def _be_quiet() -> None:
    """Keep transformers' advice on arguments out of the table."""
    from transformers import logging

    logging.set_verbosity_error()


def _generation(model: nn.Module, source: int, beams: int) -> Made:
    _be_quiet()
    ids = torch.randint(4, 30000, (1, source))
    options = {"num_beams": beams, "max_new_tokens": STEPS, "min_new_tokens": STEPS}
    return model, lambda m: m.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def bart_base() -> Made:
    """BART-base, 6 + 6 layers of width 768: beam search."""
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 6), ("attention_heads", 12))}
    config = BartConfig(d_model=768, **sides, encoder_ffn_dim=3072, decoder_ffn_dim=3072, forced_eos_token_id=None)
    return _generation(BartForConditionalGeneration(config).eval(), 1024, 4)


def t5_base() -> Made:
    """T5-base, 12 + 12 layers of width 768: beam search."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
    return _generation(T5ForConditionalGeneration(config).eval(), 1024, 4)


def whisper_tiny() -> Made:
    """Whisper-tiny, 4 + 4 layers of width 384, on thirty seconds of sound: beam search."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration(WhisperConfig(suppress_tokens=None, begin_suppress_tokens=None)).eval()
    _be_quiet()
    sound = torch.randn(1, 80, 3000)
    return model, lambda m: m.generate(sound, num_beams=5, max_new_tokens=STEPS, min_new_tokens=STEPS)


def marian_short() -> Made:
    """Marian, 6 + 6 layers of width 512, on a sentence of 32 tokens, greedily: the case with the least to gain."""
    from transformers import MarianConfig, MarianMTModel

    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 6), ("attention_heads", 8))}
    config = MarianConfig(
        d_model=512,
        **sides,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        vocab_size=32000,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    config.forced_eos_token_id = None
    return _generation(MarianMTModel(config).eval(), 32, 1)


def _fresh(model: nn.Module, name: str, states: torch.Tensor, **others: Any) -> Made:
    """A forward pass whose context is another tensor each time, as it is in use: nothing can be kept."""

    def run(m: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return m(**{name: states.clone()}, **others)[0]

    return model, run


def qformer() -> Made:
    """The Q-Former of BLIP-2: 32 queries read the 257 states of an image, 1408 wide."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    model = Blip2QFormerModel(Blip2QFormerConfig()).eval()
    return _fresh(model, "encoder_hidden_states", torch.randn(1, 257, 1408), query_embeds=torch.randn(1, 32, 768))


def qformer_again() -> Made:
    """The same image for one text after another: its keys and values are kept from the second time on."""
    model, _ = qformer()
    states = torch.randn(1, 257, 1408)

    def run(m: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return m(query_embeds=torch.ones(1, 32, 768), encoder_hidden_states=states)[0]

    return model, run


def qformer_batch() -> Made:
    """The same for 8 images."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    model = Blip2QFormerModel(Blip2QFormerConfig()).eval()
    return _fresh(model, "encoder_hidden_states", torch.randn(8, 257, 1408), query_embeds=torch.randn(8, 32, 768))


def bart_forward() -> Made:
    """BART-base's decoder: 128 tokens read 512 states, with a cache, as a forward pass has it by default."""
    model = bart_base()[0].model.decoder
    ids = torch.randint(4, 30000, (2, 128))
    return _fresh(model, "encoder_hidden_states", torch.randn(2, 512, 768), input_ids=ids)


def perceiver_language() -> Made:
    """The Perceiver's encoder on bytes, at the language model's widths: 256 latents of 1280 read 2,048 inputs of 768."""
    from transformers import PerceiverConfig, PerceiverModel

    model = PerceiverModel(PerceiverConfig(num_self_attends_per_block=2)).eval()
    return _fresh(model, "inputs", torch.randn(1, 2048, 768))


def detr_decoder() -> Made:
    """DETR's decoder: 100 object queries read 850 positions of an image, 256 wide."""
    from transformers import DetrConfig
    from transformers.models.detr.modeling_detr import DetrDecoder

    model = DetrDecoder(DetrConfig()).eval()
    queries, places = torch.randn(1, 100, 256), torch.randn(1, 850, 256)
    others = {"spatial_position_embeddings": places, "object_queries_position_embeddings": queries}
    return _fresh(model, "encoder_hidden_states", torch.randn(1, 850, 256), inputs_embeds=torch.zeros(1, 100, 256), **others)


def cross_bytes(model: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> int:
    """Bytes of keys and values of the source that are alive at the last step: in caches, and kept in their place."""
    from transformers import EncoderDecoderCache

    largest = [0]
    own, own_keep = EncoderDecoderCache.reorder_cache, huggingface_generation.Session.keep
    sessions: list[Any] = []

    def reorder(cache: Any, beams: torch.Tensor) -> None:
        layers = cache.cross_attention_cache.layers
        held = [t for layer in layers for t in (layer.keys, layer.values) if isinstance(t, torch.Tensor)]
        kept = {id(t): t for session in sessions[-1:] for one in session.kept.values() for t in _tensors(one.value)}
        largest[0] = max(largest[0], sum(t.numel() * t.element_size() for t in (*held, *kept.values())))
        own(cache, beams)

    def keep(session: Any, *args: Any, **kwargs: Any) -> Any:
        sessions.append(session)
        return own_keep(session, *args, **kwargs)

    EncoderDecoderCache.reorder_cache, huggingface_generation.Session.keep = reorder, keep
    try:
        run(model)
    finally:
        EncoderDecoderCache.reorder_cache, huggingface_generation.Session.keep = own, own_keep
    return largest[0]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [value.keys, value.values]
