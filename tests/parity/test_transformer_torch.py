"""The Transformer against `torch.nn`'s encoder and decoder stacks with the same weights: outputs and gradients.

`nn.Transformer` always adds a norm after each stack; the paper has none, so for post-norm the stacks are built with `norm=None`.
`nn.MultiheadAttention` masks in the other sense: True = may not be attended.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from crossattention.models.transformer import Transformer, TransformerConfig
from tolerances import assert_close

CONFIG = TransformerConfig(
    19, 23, dim=24, heads=4, encoder_layers=2, decoder_layers=3, feed_forward_dim=40, tied="target", dropout=0.0
)


def torch_stacks(config: TransformerConfig, dtype: torch.dtype) -> tuple[nn.TransformerEncoder, nn.TransformerDecoder]:
    keywords = {
        "dim_feedforward": config.feed_forward_dim,
        "dropout": config.dropout,
        "activation": config.activation,
        "layer_norm_eps": config.norm_eps,
        "batch_first": True,
        "norm_first": config.norm == "pre",
    }

    def norm() -> nn.LayerNorm | None:
        return nn.LayerNorm(config.dim, eps=config.norm_eps) if config.norm == "pre" else None

    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(config.dim, config.heads, **keywords),
        config.encoder_layers,
        norm=norm(),
        enable_nested_tensor=False,
    )
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(config.dim, config.heads, **keywords), config.decoder_layers, norm=norm()
    )
    return encoder.to(dtype), decoder.to(dtype)


def copied(layer: nn.Module) -> dict[str, Tensor]:
    """Weights of one of our layers under torch.nn's names."""
    decodes = hasattr(layer, "cross_attention")
    norms = ["self_attention", *(["cross_attention"] if decodes else []), "feed_forward"]
    weights = {}
    for ours, theirs in (("self_attention", "self_attn"), ("cross_attention", "multihead_attn")):
        attention = getattr(layer, ours, None)
        if attention is None:
            continue
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for kind in ("weight", "bias"):
            weights[f"{theirs}.in_proj_{kind}"] = torch.cat([getattr(p, kind) for p in projections])
            weights[f"{theirs}.out_proj.{kind}"] = getattr(attention.out_proj, kind)
    for kind in ("weight", "bias"):
        weights[f"linear1.{kind}"] = getattr(layer.feed_forward.up_proj, kind)
        weights[f"linear2.{kind}"] = getattr(layer.feed_forward.down_proj, kind)
        for number, name in enumerate(norms, 1):
            weights[f"norm{number}.{kind}"] = getattr(getattr(layer, f"{name}_residual").norm, kind)
    return weights


def copied_stack(stack: nn.Module) -> dict[str, Tensor]:
    weights = {f"layers.{i}.{n}": w for i, layer in enumerate(stack.layers) for n, w in copied(layer).items()}
    return weights | {f"norm.{name}": weight for name, weight in stack.norm.state_dict().items()}


def gradients_of(stack: nn.Module) -> dict[str, Tensor]:
    """Gradients of one of our stacks under torch.nn's names."""
    with torch.no_grad():
        weights = {parameter: parameter.clone() for parameter in stack.parameters()}
        for parameter in stack.parameters():
            parameter.copy_(parameter.grad)
        gradients = {name: tensor.clone() for name, tensor in copied_stack(stack).items()}
        for parameter, weight in weights.items():
            parameter.copy_(weight)
    return gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_outputs_and_gradients_equal_torchs_stacks(norm: str, activation: str, dtype: torch.dtype) -> None:
    config = replace(CONFIG, norm=norm, activation=activation)
    model = Transformer(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    encoder, decoder = torch_stacks(config, dtype)
    encoder.load_state_dict(copied_stack(model.encoder))
    decoder.load_state_dict(copied_stack(model.decoder))

    source, target = (torch.randn(3, length, 24, dtype=dtype, requires_grad=True) for length in (7, 5))
    source_mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    target_mask = torch.arange(5) < torch.tensor([[3], [5], [1]])
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)

    states = model.encoder(source, source_mask)
    out = model.decoder(target, states, source_mask=source_mask, target_mask=target_mask)
    theirs = encoder(source, src_key_padding_mask=~source_mask)
    wanted = decoder(target, theirs, tgt_mask=causal, tgt_key_padding_mask=~target_mask, memory_key_padding_mask=~source_mask)
    assert_close(states, theirs)
    assert_close(out, wanted)

    weights = torch.randn_like(wanted) / wanted.numel() ** 0.5
    got = torch.autograd.grad((out * weights).sum(), (source, target), retain_graph=True)
    for gradient, other in zip(
        got, torch.autograd.grad((wanted * weights).sum(), (source, target), retain_graph=True), strict=True
    ):
        assert_close(gradient, other)
    (out * weights).sum().backward(inputs=[*model.encoder.parameters(), *model.decoder.parameters()])
    (wanted * weights).sum().backward(inputs=[*encoder.parameters(), *decoder.parameters()])
    for ours, stack in ((model.encoder, encoder), (model.decoder, decoder)):
        gradients = gradients_of(ours)
        for name, parameter in stack.named_parameters():
            assert_close(gradients[name], parameter.grad)


def test_the_whole_model_is_embeddings_torchs_stacks_and_the_tied_projection() -> None:
    model = Transformer(CONFIG, dtype=torch.float64).eval()
    encoder, decoder = torch_stacks(CONFIG, torch.float64)
    encoder.load_state_dict(copied_stack(model.encoder))
    decoder.load_state_dict(copied_stack(model.decoder))
    source, target = torch.randint(3, 19, (3, 7)), torch.randint(3, 23, (3, 5))
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])

    def embed(table: nn.Embedding, ids: Tensor) -> Tensor:
        angle = torch.arange(ids.shape[1])[:, None] / 10000 ** (torch.arange(0, 24, 2, dtype=torch.float64) / 24)
        return table(ids) * 24**0.5 + torch.stack((angle.sin(), angle.cos()), -1).flatten(1)

    states = encoder(embed(model.source_embedding, source), src_key_padding_mask=~mask)
    out = decoder(
        embed(model.target_embedding, target),
        states,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
        memory_key_padding_mask=(~mask).to(torch.float64).masked_fill(~mask, -torch.inf),
    )
    assert_close(model(source, target, mask), out @ model.target_embedding.weight.T)
