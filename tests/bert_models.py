"""Tiny random BERTs of `transformers` and the same weights as models of ours; no two sizes are alike."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from crossattention.checkpoints import bert_huggingface as family
from crossattention.checkpoints.rules import to_ours

VOCAB, DIM, HEADS, LAYERS, INNER, LENGTH = 37, 24, 4, 3, 40, 20
PAD, BEGIN, END = 0, 1, 2


def their_config(**changes: Any) -> Any:
    return transformers.BertConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": DIM,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": INNER,
            "max_position_embeddings": LENGTH,
            "type_vocab_size": 3,
            "layer_norm_eps": 1e-6,
            "pad_token_id": PAD,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "initializer_range": 0.2,
            **changes,
        }
    )


def decoder_config(**changes: Any) -> Any:
    return their_config(**{"is_decoder": True, "add_cross_attention": True, **changes})


def their_model(name: str, config: Any, *, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    """A model of theirs whose norms and biases are away from 1 and 0, so that none can be left out unseen."""
    model = getattr(transformers, name)(config, **kwargs).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.config.architectures = [name]
    return model


def their_pair(encoder: Any = None, decoder: Any = None, *, dtype: torch.dtype = torch.float64) -> Any:
    """An EncoderDecoderModel; by default the encoder is narrower than the decoder."""
    encoder = (
        their_config(hidden_size=18, num_attention_heads=3, intermediate_size=28, num_hidden_layers=2)
        if encoder is None
        else encoder
    )
    pair = transformers.EncoderDecoderModel(
        encoder=their_model("BertModel", encoder, dtype=dtype),
        decoder=their_model("BertLMHeadModel", decoder_config() if decoder is None else decoder, dtype=dtype),
    )
    pair = pair.to(dtype).eval()
    for config in (pair.config, pair.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = BEGIN, PAD, END
    pair.config.architectures = ["EncoderDecoderModel"]
    return pair


def ours_of(theirs: Any) -> Any:
    """The same model as one of ours, of the same dtype."""
    tensors: dict[str, Tensor] = theirs.state_dict()
    cls = family.model_class(theirs.config.to_dict(), tensors, None)
    config = family.config_to_ours(theirs.config.to_dict(), names=tensors, model_class=cls)
    model: nn.Module = cls(config).to(next(theirs.parameters()).dtype)
    model.load_state_dict(to_ours(tensors, family.rules(config, model_class=cls), model.state_dict()))
    return model.eval()


def prefix_mask(lengths: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]
