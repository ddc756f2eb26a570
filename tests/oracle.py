"""What every attention test compares with: the specification run on a layer's own weights, and sizes that no swap can hide in.

Sizes are all different: z batch 2, n queries 5, m context 7, a 6, b 9, h heads 4 (or 3), k 8, v 3, o 10.
"""

import torch
from torch import Tensor

from crossattention import CrossAttention, Plan
from crossattention.attention import reference_attention

Z, N, M, A, B, H, K, V, O = 2, 5, 7, 6, 9, 4, 8, 3, 10
MASKS = ("none", "some", "empty row", "pairs", "additive", "both")


def make_layer(plan: Plan | str = "auto", *, dtype: torch.dtype = torch.float64, **changes: object) -> CrossAttention:
    """A layer with all sizes different and every weight random, biases too."""
    sizes = {"heads": H, "head_dim": K, "value_head_dim": V, "out_dim": O, **changes}
    layer = CrossAttention(A, B, plan=plan, dtype=dtype, **sizes)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer


def make_inputs(n: int = N, m: int = M, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Queries (z, n, a) and a context (z, m, b) that want gradients."""
    return torch.randn(Z, n, A, dtype=dtype, requires_grad=True), torch.randn(Z, m, B, dtype=dtype, requires_grad=True)


def make_masks(kind: str, n: int = N, m: int = M, *, heads: int = H, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Masks of a kind, as keyword arguments."""
    masks: dict[str, Tensor] = {}
    if kind in ("some", "both", "empty row"):
        masks["context_mask"] = torch.rand(Z, m) > 0.3
    if kind == "empty row":
        masks["context_mask"][0] = False
    if kind in ("pairs", "both"):
        masks["attn_mask"] = torch.rand(Z, heads, n, m) > 0.4
    if kind == "additive":
        masks["attn_mask"] = torch.randn(heads, n, m, dtype=dtype)
        masks["attn_mask"][:, :1] = -torch.inf
    return masks


def specification(layer: CrossAttention, a: Tensor, b: Tensor, **masks: Tensor) -> tuple[Tensor, Tensor]:
    """Output and weights by the specification, with the layer's weights, in the inputs' dtype."""
    weights: dict[str, Tensor | None] = {}
    for short, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "out_proj")):
        projection = getattr(layer, name)
        weights[f"{short}_weight"] = projection.weight.to(a.dtype)
        weights[f"{short}_bias"] = None if projection.bias is None else projection.bias.to(a.dtype)
    return reference_attention(a, b, heads=layer.heads, kv_heads=layer.kv_heads, scale=layer.scale, **weights, **masks)


def gradients(out: Tensor, inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a random projection of `out`; a missing one is an error."""
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator(torch.get_default_device()).manual_seed(seed))
    return list(torch.autograd.grad((out * direction).sum(), inputs))
