"""x-transformers' attention with a context against ours: plain and flash, grouped heads in both layouts.

Where several query heads share a key-value head, x-transformers lays query head i on key-value head i mod g, torch and this library
on i // (h / g). The weights are therefore copied twice: head by head in its layout, and as they stand.
"""

from __future__ import annotations

import random

import torch
from agreement import Agreement
from random_case import count, draw, randomise
from torch import nn

from crossattention import CrossAttention
from crossattention.plan import CANDIDATES


def compare(cases: int, seed: int) -> list[Agreement]:
    """Agreement over as many random sizes for each way."""
    lines = []
    for is_flash in (False, True):
        way = "flash" if is_flash else "plain"
        lines.append(_compare(f"x-transformers, {way}", cases, seed, is_flash, shares=False, permutes=False))
        lines.append(
            _compare(f"x-transformers, {way}, grouped heads, in its layout", cases, seed, is_flash, shares=True, permutes=True)
        )
        lines.append(
            _compare(
                f"x-transformers, {way}, grouped heads, weights as they stand", cases, seed, is_flash, shares=True, permutes=False
            )
        )
    return lines


def _compare(name: str, cases: int, seed: int, is_flash: bool, *, shares: bool, permutes: bool) -> Agreement:
    from x_transformers.x_transformers import Attention

    line, chance = Agreement(name), random.Random(seed)
    for _ in range(cases):
        groups, share = chance.randint(2, 3) if shares else chance.randint(1, 4), chance.randint(2, 3) if shares else 1
        heads, width = groups * share, chance.randint(1, 8)
        query_dim, context_dim = chance.randint(2, 20), chance.randint(2, 20)
        case = draw(chance, query_dim, context_dim)
        sizes = {"dim_head": width, "dim_context": context_dim, "heads": heads, "kv_heads": groups}
        theirs = Attention(query_dim, **sizes, flash=is_flash, project_out=True)  # without, one head's output keeps its own width
        theirs.to(case.dtype).eval()
        randomise(theirs)
        layer = CrossAttention(
            query_dim,
            context_dim,
            heads=heads,
            kv_heads=groups,
            head_dim=width,
            bias=False,
            plan=chance.choice(CANDIDATES),
            dtype=case.dtype,
        )
        order = torch.arange(heads).view(share, groups).t().flatten() if permutes else torch.arange(heads)
        _copy(layer, theirs, order)
        out = theirs(case.a, context=case.b, context_mask=case.real)
        count(line, case, layer, layer(case.a, case.b, context_mask=case.real), out[0] if isinstance(out, tuple) else out)
    return line


def _copy(layer: CrossAttention, theirs: nn.Module, order: torch.Tensor) -> None:
    """Their weights, query heads in an order."""
    with torch.no_grad():
        layer.q_proj.weight.copy_(theirs.to_q.weight.unflatten(0, (layer.heads, -1))[order].flatten(0, 1))
        layer.k_proj.weight.copy_(theirs.to_k.weight)
        layer.v_proj.weight.copy_(theirs.to_v.weight)
        layer.out_proj.weight.copy_(theirs.to_out.weight.unflatten(1, (layer.heads, -1))[:, order].flatten(1, 2))
