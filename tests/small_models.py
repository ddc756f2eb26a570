"""A tiny model of every architecture: what is exported and compiled; sizes that no swap can hide in."""

from collections.abc import Callable

from torch import nn

from crossattention.models import (
    BertConfig,
    BertDecoder,
    BertEncoder,
    BertMaskedLM,
    CrossViT,
    CrossViTConfig,
    EncoderDecoder,
    PerceiverIO,
    PictureReader,
    PictureReaderConfig,
    Transformer,
    TransformerConfig,
)
from crossattention.models import perceiver as presets
from crossattention.models.listener import Listener, ListenerConfig
from crossattention.models.perceiver_adapters import ClassOutput, FlowInput, ImageInput, VideoInput, VideoOutput

FEW = {"num_latents": 5, "latent_dim": 32, "blocks": 2, "layers_per_block": 1}


def _bert(**changes: object) -> BertConfig:
    sizes = {"dim": 16, "layers": 2, "heads": 2, "feed_forward_dim": 28, "max_length": 40, "begin_id": 1, "end_id": 2}
    return BertConfig(50, **{**sizes, **changes})


def _transformer(**changes: object) -> Transformer:
    sizes = {"dim": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 2, "feed_forward_dim": 28}
    return Transformer(TransformerConfig(30, 30, **{**sizes, **changes}))


def _crossvit(**changes: object) -> CrossViT:
    sizes = {"classes": 5, "image_size": 48, "scales": (1.0, 40 / 48), "patch_sizes": (6, 10), "dims": (16, 24), "heads": (2, 3)}
    return CrossViT(CrossViTConfig(**{**sizes, "layers": (1, 1), **changes}))


def _imagenet(preset: Callable[..., presets.PerceiverIOConfig], **inputs: object) -> PerceiverIO:
    return PerceiverIO(preset(**FEW, inputs=ImageInput(**inputs), outputs=ClassOutput(7)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": _transformer,
    "transformer, learned positions": lambda: _transformer(norm="pre", positions="learned", max_length=20, tied="none"),
    "listener": lambda: Listener(ListenerConfig(bands=8, vocab_size=30, dim=16, heads=2, feed_forward_dim=28)),
    "bert encoder": lambda: BertEncoder(_bert(pooler=True)),
    "bert masked lm": lambda: BertMaskedLM(_bert()),
    "bert decoder": lambda: BertDecoder(_bert(causal=True, context_dim=24)),
    "bert decoder, both ways": lambda: BertDecoder(_bert(context_dim=24)),
    "encoder-decoder": lambda: EncoderDecoder(BertEncoder(_bert(dim=24)), BertDecoder(_bert(causal=True, context_dim=16))),
    "picture reader": lambda: PictureReader(PictureReaderConfig(height=16, width=32, decoder=_bert(context_dim=16))),
    "crossvit": _crossvit,
    "crossvit, convolutions": lambda: _crossvit(stem="convolutions", image_size=96, scales=(1.0, 80 / 96), patch_sizes=(12, 16)),
    "perceiver, learned": lambda: _imagenet(
        presets.imagenet_learned, size=(12, 10), stem="conv1x1", stem_dim=8, positions="learned", position_dim=8
    ),
    "perceiver, fourier": lambda: _imagenet(presets.imagenet_fourier, size=(12, 10), bands=4),
    "perceiver, conv": lambda: _imagenet(presets.imagenet_conv, size=(32, 40), stem="conv", stem_dim=8, bands=4),
    "perceiver, language": lambda: PerceiverIO(
        presets.language(20, 16, 24, num_latents=3, latent_dim=32, layers_per_block=1, qk_dim=16)
    ),
    "perceiver, flow": lambda: PerceiverIO(
        presets.optical_flow(
            (8, 12), inputs=FlowInput((8, 12), bands=4, dim=8), num_latents=6, latent_dim=32, layers_per_block=1, self_heads=2
        )
    ),
    "perceiver, video": lambda: PerceiverIO(
        presets.multimodal(
            inputs=VideoInput(frames=3, size=(8, 8), bands=2, audio_samples=32, audio_patch=4, audio_bands=3, num_labels=5),
            outputs=VideoOutput(dim=16, label_dim=8),
            num_latents=6,
            latent_dim=32,
            layers_per_block=1,
        )
    ),
}
