"""timm's CrossViT with our weights: the names of both, written out independently of `checkpoints`."""

import torch
from torch import Tensor, nn

from crossattention.models.crossvit import CrossViT, CrossViTConfig


def timm_model(config: CrossViTConfig, **changes: object) -> nn.Module:
    """timm's model of these sizes, built by its class."""
    from timm.models.crossvit import CrossVit

    given = {
        "img_size": config.image_size,
        "img_scale": config.scales,
        "patch_size": config.patch_sizes,
        "in_chans": config.channels,
        "num_classes": config.classes,
        "embed_dim": config.dims,
        "depth": [[*config.layers, 0]] * config.encoders,
        "num_heads": config.heads,
        "mlp_ratio": [config.feed_forward_ratio, config.feed_forward_ratio, 1],
        "multi_conv": config.stem == "convolutions",
        "drop_path_rate": config.stochastic_depth,
    }
    return CrossVit(**given | changes)


def named(model: CrossViT, of: str = "data") -> dict[str, Tensor]:
    """Our weights, or their gradients with `of="grad"`, under timm's names."""

    def get(parameter: nn.Parameter) -> Tensor:
        found = getattr(parameter, of)
        return torch.zeros_like(parameter) if found is None else found.detach().clone()

    weights: dict[str, Tensor] = {}

    def put(name: str, *modules: nn.Module) -> None:
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"] = torch.cat([get(getattr(module, kind)) for module in modules])

    for i in (0, 1):
        weights[f"pos_embed_{i}"] = get(model.positions[i])
        weights[f"cls_token_{i}"] = get(model.class_tokens[i])
        if model.config.stem == "linear":
            put(f"patch_embed.{i}.proj", model.embeddings[i][0])
        else:
            for part in (0, 2, 4):
                put(f"patch_embed.{i}.proj.{part}", model.embeddings[i][part])
        put(f"norm.{i}", model.norms[i])
        put(f"head.{i}", model.heads[i])
        for k, encoder in enumerate(model.encoders):
            for j, layer in enumerate(encoder.branches[i]):
                at, attention = f"blocks.{k}.blocks.{i}.{j}", layer.attention
                put(f"{at}.norm1", layer.attention_norm)
                put(f"{at}.attn.qkv", attention.q_proj, attention.k_proj, attention.v_proj)
                put(f"{at}.attn.proj", attention.out_proj)
                put(f"{at}.norm2", layer.feed_forward_norm)
                put(f"{at}.mlp.fc1", layer.feed_forward.up_proj)
                put(f"{at}.mlp.fc2", layer.feed_forward.down_proj)
            fusion = encoder.fusions[i]
            put(f"blocks.{k}.projs.{i}.0", fusion.enter_norm)
            put(f"blocks.{k}.projs.{i}.2", fusion.enter_proj)
            put(f"blocks.{k}.fusion.{i}.norm1", fusion.attention_norm)
            for ours, theirs in (("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"), ("out_proj", "proj")):
                put(f"blocks.{k}.fusion.{i}.attn.{theirs}", getattr(fusion.attention, ours))
            put(f"blocks.{k}.revert_projs.{i}.0", fusion.leave_norm)
            put(f"blocks.{k}.revert_projs.{i}.2", fusion.leave_proj)
    return weights
