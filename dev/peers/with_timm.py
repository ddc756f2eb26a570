"""timm's cross-attention against ours: the fusion of CrossViT, and the attention pooling of SigLIP's head."""

from __future__ import annotations

import random

import torch
from agreement import Agreement
from random_case import copy_projections, count, draw, randomise
from torch import nn

from crossattention import CrossAttention
from crossattention.plan import CANDIDATES


def compare(cases: int, seed: int) -> list[Agreement]:
    """Agreement over as many random sizes for each."""
    return [_fusion(cases, seed), *(_pooling(cases, seed, is_fused=fused) for fused in (True, False))]


def _fusion(cases: int, seed: int) -> Agreement:
    from timm.models.crossvit import CrossAttention as Fusion

    line, chance = Agreement("timm, CrossViT's CrossAttention"), random.Random(seed)
    for _ in range(cases):
        heads = chance.randint(1, 5)
        dim = heads * chance.randint(1, 8)
        case = draw(chance, dim, dim, masked=False)
        theirs = Fusion(dim, heads, qkv_bias=chance.random() < 0.5).to(case.dtype).eval()
        randomise(theirs)
        bias = True if theirs.wq.bias is not None else ("out_proj",)
        layer = CrossAttention(dim, heads=heads, bias=bias, plan=chance.choice(CANDIDATES), dtype=case.dtype)
        copy_projections(layer, theirs.wq, theirs.wk, theirs.wv, theirs.proj)
        tokens = torch.cat((case.a[:, :1], case.b), 1)  # the class token reads itself too
        one = type(case)(case.a[:, :1], case.b, case.real, case.dtype)
        count(line, one, layer, layer(tokens[:, :1], tokens), theirs(tokens), inputs=(case.a, case.b))
    return line


def _pooling(cases: int, seed: int, *, is_fused: bool) -> Agreement:
    from timm.layers import AttentionPoolLatent

    line, chance = Agreement(f"timm, AttentionPoolLatent, {'fused' if is_fused else 'not fused'}"), random.Random(seed)
    for _ in range(cases):
        heads = chance.randint(1, 5)
        dim, latents = heads * chance.randint(1, 8), chance.randint(1, 4)
        case = draw(chance, dim, dim, masked=False)
        theirs = AttentionPoolLatent(dim, embed_dim=dim, num_heads=heads, latent_len=latents, pool_type="")
        theirs.fused_attn, theirs.mlp = is_fused, nn.Identity()
        theirs = theirs.to(case.dtype).eval()
        randomise(theirs)
        layer = CrossAttention(dim, heads=heads, plan=chance.choice(CANDIDATES), dtype=case.dtype)
        keys, values = nn.Linear(dim, dim), nn.Linear(dim, dim)
        keys.weight, values.weight = (nn.Parameter(part) for part in theirs.kv.weight.detach().chunk(2))
        keys.bias, values.bias = (nn.Parameter(part) for part in theirs.kv.bias.detach().chunk(2))
        copy_projections(layer, theirs.q, keys, values, theirs.proj)
        read = layer(theirs.latent[0], case.b)
        ours = read + theirs.norm(read)  # their residual around the norm and what was its MLP
        one = type(case)(theirs.latent.expand(case.b.shape[0], -1, -1), case.b, case.real, case.dtype)
        count(line, one, layer, ours, theirs(case.b), inputs=(case.b, theirs.latent))
    return line
