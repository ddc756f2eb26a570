"""Tiny random models of transformers' families of cross-attention, and what each is called with; nothing is downloaded.

n, m, heads and widths differ; some sources are padded.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

N, M = 5, 7
SOURCE, TARGET = (
    torch.randint(4, 30, (2, length), generator=torch.Generator(torch.get_default_device()).manual_seed(0)) for length in (M, N)
)
MASK = torch.arange(M) < torch.tensor([[M], [4]])
SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
QFORMER_SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "encoder_hidden_size": 12,
}
Run = Callable[..., Any]


def bart(**changes: Any) -> nn.Module:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SIZES, init_std=0.3, **changes))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=3, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def marian() -> nn.Module:
    return transformers.MarianMTModel(transformers.MarianConfig(**SIZES, pad_token_id=0, decoder_start_token_id=0))


def pegasus() -> nn.Module:
    return transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**SIZES))


def bert() -> nn.Module:
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    both = [transformers.BertConfig(**sizes), transformers.BertConfig(**sizes)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*both)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config=config)


def t5gemma() -> nn.Module:
    """Two heads for four of queries; it has eager attention only, with capped scores."""
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    config = transformers.T5GemmaConfig(encoder=dict(sizes), decoder=dict(sizes, cross_attention_hidden_size=16))
    return transformers.T5GemmaForConditionalGeneration(config)


def read_text(model: nn.Module, **options: Any) -> Any:
    return model(input_ids=SOURCE, attention_mask=MASK.long(), decoder_input_ids=TARGET, **options)


def whisper() -> nn.Module:
    sizes = {name: size for name, size in SIZES.items() if name != "max_position_embeddings"}
    config = transformers.WhisperConfig(
        **sizes,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def read_sound(model: nn.Module, **options: Any) -> Any:
    sound = torch.randn(2, 8, 20, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    return model(input_features=sound, decoder_input_ids=TARGET, **options)


def trocr() -> nn.Module:
    sizes = {
        name: SIZES[name] for name in ("vocab_size", "d_model", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim")
    }
    return transformers.TrOCRForCausalLM(
        transformers.TrOCRConfig(**sizes, max_position_embeddings=32, cross_attention_hidden_size=12)
    )


def read_states(model: nn.Module, **options: Any) -> Any:
    states = torch.randn(2, M, 12, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    return model(input_ids=TARGET, encoder_hidden_states=states, encoder_attention_mask=MASK.long(), **options)


def perceiver() -> nn.Module:
    config = transformers.PerceiverConfig(
        num_latents=N,
        d_latents=16,
        d_model=12,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=2,
        qk_channels=8,
        v_channels=16,
    )
    return transformers.PerceiverModel(config)


def read_inputs(model: nn.Module, **options: Any) -> Any:
    inputs = torch.randn(2, M, 12, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    return model(inputs=inputs, attention_mask=MASK, **options)


def eager_of(model: nn.Module) -> nn.Module:
    """A copy that returns its weights."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager


def two_berts() -> nn.Module:
    """An encoder of another width than the decoder, so that its states are projected."""
    sizes = {"vocab_size": 30, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    both = [transformers.BertConfig(hidden_size=width, **sizes) for width in (12, 16)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*both)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config=config)


def bert_decoder() -> nn.Module:
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return transformers.BertLMHeadModel(transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True))


def read_wide_states(model: nn.Module, **options: Any) -> Any:
    states = torch.randn(2, M, 16, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    return model(input_ids=TARGET, encoder_hidden_states=states, encoder_attention_mask=MASK.long(), **options)


def qformer() -> nn.Module:
    return transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**QFORMER_SIZES))


def instructed_qformer() -> nn.Module:
    return transformers.InstructBlipQFormerModel(transformers.InstructBlipQFormerConfig(**QFORMER_SIZES))


def read_by_queries(model: nn.Module, **options: Any) -> Any:
    drawn = torch.Generator(torch.get_default_device()).manual_seed(0)
    queries, states = torch.randn(2, N, 16, generator=drawn), torch.randn(2, M, 12, generator=drawn)
    if "Instruct" in type(model).__name__:
        options |= {"input_ids": TARGET, "attention_mask": torch.ones(2, 2 * N)}
    return model(query_embeds=queries, encoder_hidden_states=states, encoder_attention_mask=MASK.long(), **options)


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4)
    sizes = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "max_position_embeddings")}
    config = transformers.DetrConfig(
        **sizes, num_queries=N, use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone
    )
    return transformers.DetrForObjectDetection(config)


def read_pixels(model: nn.Module, **options: Any) -> Any:
    pixels, real = (
        torch.randn(2, 3, 64, 96, generator=torch.Generator(torch.get_default_device()).manual_seed(0)),
        torch.ones(2, 64, 96),
    )
    real[1, :, 40:] = 0
    return model(pixel_values=pixels, pixel_mask=real, **options)


def mllama() -> nn.Module:
    text = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"intermediate_size": 32, "cross_attention_layers": [1, 3], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"hidden_size": 12, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "intermediate_size": 24}
    vision |= {"vision_output_dim": 24, "image_size": 8, "patch_size": 4, "max_num_tiles": 2, "intermediate_layers_indices": [0]}
    vision |= {"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    return transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=39)
    )


def pictures_and_text() -> dict[str, Any]:
    ids = torch.tensor([[1, 39, 5, 6, 7, 8], [1, 39, 9, 10, 3, 4]])
    pixels = torch.randn(2, 1, 2, 3, 8, 8, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0]], [[1, 0]]]),
        "attention_mask": torch.ones_like(ids),
        "cross_attention_mask": torch.tensor([1, 0]).view(1, 1, 1, 2).repeat(2, 6, 1, 1),
    }


def read_pictures(model: nn.Module, **options: Any) -> Any:
    return model(**pictures_and_text(), **options)


def picture_to_text() -> nn.Module:
    """TrOCR's decoder on a ViT of another width."""
    vision = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, trocr().config)
    model = transformers.VisionEncoderDecoderModel(config=config)
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 1, 0
    return model


def drawn(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """The model, in evaluation mode, with weights so large that attention and tokens differ."""
    numbers = torch.Generator(torch.get_default_device()).manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=numbers))
    return model.eval()
