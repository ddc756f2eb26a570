"""`torch.nn.MultiheadAttention` against `CrossAttention` with its weights, over random configurations.

Drawn at random for each: widths, kdim and vdim, heads, bias, batch_first, no batch, lengths from 1, dtype, a key padding mask and a
mask of pairs, each absent, bool (True = dropped, in torch's sense here; ours is told the opposite) or floating; pairs for all heads
or for each; and which of our exact plans computes it. torch computes each by its explicit path (need_weights=True, its default) and
by its fused one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import torch
from agreement import Agreement, finite, meaning
from torch import Tensor, nn

from crossattention import CrossAttention, Plan
from crossattention.plan import CANDIDATES


@dataclass(frozen=True)
class Configuration:
    """One draw."""

    heads: int
    head_dim: int
    kdim: int | None
    vdim: int | None
    bias: bool
    batch_first: bool
    has_batch: bool
    batch: int
    n: int
    m: int
    padding: str
    pairs: str
    dtype: torch.dtype
    plan: Plan

    @classmethod
    def draw(cls, chance: random.Random) -> Configuration:
        """A random one."""
        kdim = chance.choice((None, chance.randint(1, 20)))
        return cls(
            heads=chance.randint(1, 6),
            head_dim=chance.randint(1, 9),
            kdim=kdim,
            vdim=chance.choice((None, kdim, chance.randint(1, 20))),
            bias=chance.random() < 0.7,
            batch_first=chance.random() < 0.5,
            has_batch=chance.random() < 0.8,
            batch=chance.randint(1, 4),
            n=chance.choice((1, chance.randint(1, 9))),
            m=chance.choice((1, chance.randint(1, 11), chance.randint(1, 11))),
            padding=chance.choice(("none", "bool", "float")),
            pairs=chance.choice(("none", "bool", "float", "bool, each head", "float, each head")),
            dtype=chance.choice((torch.float64, torch.float32)),
            plan=chance.choice(CANDIDATES),
        )

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


def compare(count: int, seed: int) -> list[Agreement]:
    """Agreement with both of torch's paths, over as many configurations."""
    chance = random.Random(seed)
    lines = {name: Agreement(f"torch.nn.MultiheadAttention, {name}") for name in ("need_weights=True", "need_weights=False")}
    itself = Agreement("need_weights=True against need_weights=False, torch with itself")
    for _ in range(count):
        one = Configuration.draw(chance)
        torch.manual_seed(chance.randrange(2**31))
        _compare_one(one, lines, itself)
    return [*lines.values(), itself]


def _compare_one(one: Configuration, lines: dict[str, Agreement], itself: Agreement) -> None:
    width = one.heads * one.head_dim
    mha = nn.MultiheadAttention(
        width, one.heads, bias=one.bias, kdim=one.kdim, vdim=one.vdim, batch_first=one.batch_first, dtype=one.dtype
    )
    with torch.no_grad():
        for parameter in mha.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    layer = with_weights_of(mha, one.plan)
    z = one.batch if one.has_batch else 1
    a, key, value = (
        torch.randn(z, length, dim, dtype=one.dtype, requires_grad=True)
        for length, dim in ((one.n, width), (one.m, mha.kdim), (one.m, mha.vdim))
    )
    padding, pairs = _padding(one, z), _pairs(one, z)
    live = _live(one, z, padding, pairs)
    direction = torch.randn(z, one.n, width, dtype=one.dtype) * live[..., None]
    read = (a, key, value, mha.out_proj.weight)

    ours = layer(a, torch.cat((key, value), -1), **_our_masks(one, padding, pairs, z))
    our_gradients = torch.autograd.grad((ours * direction).sum(), (a, key, value, layer.out_proj.weight))
    found = {}
    for name, line in lines.items():
        theirs = _their_output(mha, one, a, key, value, padding, pairs, need_weights=name.endswith("True"))
        their_gradients = torch.autograd.grad((theirs * direction).nan_to_num(0.0).sum(), read)
        found[name] = theirs.detach()
        has_nan = finite(their_gradients) == "NaN"
        if bool(live.all()):
            line.add(str(one), ours, theirs, live, our_gradients, their_gradients)
        else:
            line.empty_gradients[finite(their_gradients)] += 1
            compared = ((), ()) if has_nan else (our_gradients, their_gradients)
            line.add(str(one), ours, theirs, live, *compared)
            zeros = ours.detach()[~live]  # some heads may have live keys, so zero attention is what ours gives
            line.empty_rows.update(meaning(row, zero) for row, zero in zip(found[name][~live], zeros, strict=True))
    explicit, fused = found.values()
    itself.add(str(one), explicit, fused, torch.ones_like(live))


def with_weights_of(mha: nn.MultiheadAttention, plan: Plan) -> CrossAttention:
    """A layer that reads [key; value] as one context: its key projection sees the one half, its value projection the other."""
    width, context_dim = mha.embed_dim, mha.kdim + mha.vdim
    has_bias = mha.in_proj_bias is not None
    weight = mha.out_proj.weight
    layer = CrossAttention(width, context_dim, heads=mha.num_heads, bias=has_bias, plan=plan, dtype=weight.dtype)
    if mha.in_proj_weight is None:
        q, k, v = mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight
    else:
        q, k, v = mha.in_proj_weight.chunk(3)
    with torch.no_grad():
        layer.q_proj.weight.copy_(q)
        layer.k_proj.weight.zero_()[:, : mha.kdim].copy_(k)
        layer.v_proj.weight.zero_()[:, mha.kdim :].copy_(v)
        layer.out_proj.weight.copy_(weight)
        if has_bias:
            for projection, bias in zip((layer.q_proj, layer.k_proj, layer.v_proj), mha.in_proj_bias.chunk(3), strict=True):
                projection.bias.copy_(bias)
            layer.out_proj.bias.copy_(mha.out_proj.bias)
    return layer


def _padding(one: Configuration, z: int) -> Tensor | None:
    """Torch's key_padding_mask (z, m)."""
    dropped = torch.rand(z, one.m) < 0.3
    if one.padding == "none":
        return None
    return dropped if one.padding == "bool" else _floating(dropped, one.dtype)


def _pairs(one: Configuration, z: int) -> Tensor | None:
    """Torch's attn_mask (n, m) or (z h, n, m)."""
    if one.pairs == "none":
        return None
    leading = (z * one.heads,) if one.pairs.endswith("head") else ()
    dropped = torch.rand(*leading, one.n, one.m) < 0.3
    return dropped if one.pairs.startswith("bool") else _floating(dropped, one.dtype)


def _floating(dropped: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.randn(dropped.shape, dtype=dtype).masked_fill(dropped, -torch.inf)


def _allowed(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask > -torch.inf


def _by_head(one: Configuration, z: int, pairs: Tensor) -> Tensor:
    return pairs.unflatten(0, (z, one.heads)) if pairs.dim() == 3 else pairs


def _live(one: Configuration, z: int, padding: Tensor | None, pairs: Tensor | None) -> Tensor:
    """Rows (z, n) that have a live key in every head."""
    allowed = torch.ones(z, one.heads, one.n, one.m, dtype=torch.bool)
    if padding is not None:
        allowed = allowed & _allowed(padding)[:, None, None]
    if pairs is not None:
        allowed = allowed & _by_head(one, z, _allowed(pairs))
    return allowed.any(-1).all(1)


def _our_masks(one: Configuration, padding: Tensor | None, pairs: Tensor | None, z: int) -> dict[str, Tensor]:
    """The same in our sense: True = may be attended; what is floating is added."""
    masks: dict[str, Tensor] = {}
    if padding is not None and padding.dtype == torch.bool:
        masks["context_mask"] = ~padding
    if pairs is not None:
        ours = _by_head(one, z, pairs)
        masks["attn_mask"] = ~ours if ours.dtype == torch.bool else ours
    if padding is not None and padding.dtype != torch.bool:
        added = padding[:, None, None]
        given = masks.get("attn_mask")
        if given is None:
            masks["attn_mask"] = added
        else:
            masks["attn_mask"] = torch.where(given, added, -torch.inf) if given.dtype == torch.bool else given + added
    return masks


def _their_output(
    mha: nn.MultiheadAttention,
    one: Configuration,
    a: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    pairs: Tensor | None,
    *,
    need_weights: bool,
) -> Tensor:
    """Torch's output (z, n, width), given in the layout that was drawn."""
    if padding is not None and pairs is not None and padding.dtype != pairs.dtype:  # torch wants both of a kind
        padding, pairs = (
            torch.zeros(mask.shape, dtype=one.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
            for mask in (padding, pairs)
        )
    given = [a, key, value]
    if not one.has_batch:
        given = [tensor[0] for tensor in given]
        padding = None if padding is None else padding[0]
    elif not one.batch_first:
        given = [tensor.transpose(0, 1) for tensor in given]
    out, _ = mha(*given, key_padding_mask=padding, attn_mask=pairs, need_weights=need_weights)
    if not one.has_batch:
        return out.unsqueeze(0)
    return out if one.batch_first else out.transpose(0, 1)
