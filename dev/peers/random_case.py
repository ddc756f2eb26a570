"""What the comparisons with whole modules share: random sizes, random weights, padding with an empty item, and the counting."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from agreement import Agreement, finite, meaning
from torch import Tensor, nn

from crossattention import CrossAttention


@dataclass(frozen=True)
class Case:
    """Inputs of one comparison.

    Args:
        a: queries (z, n, a).
        b: context (z, m, b).
        real: bool (z, m), True = may be attended; in half of the cases the first item has none.
        dtype: of all.
    """

    a: Tensor
    b: Tensor
    real: Tensor
    dtype: torch.dtype

    @property
    def live(self) -> Tensor:
        """Rows (z, n) that have a live key."""
        return self.real.any(-1, keepdim=True).expand(-1, self.a.shape[1])

    def __str__(self) -> str:
        return f"a {tuple(self.a.shape)}, b {tuple(self.b.shape)}, {self.dtype}, live items {self.real.any(-1).tolist()}"


def draw(chance: random.Random, query_dim: int, context_dim: int, *, masked: bool = True) -> Case:
    """Random lengths from 1, float64 or float32."""
    torch.manual_seed(chance.randrange(2**31))
    dtype = chance.choice((torch.float64, torch.float32))
    z, n, m = chance.randint(1, 4), chance.choice((1, chance.randint(1, 9))), chance.randint(1, 12)
    real = torch.rand(z, m) < 0.7
    real[torch.arange(z), torch.randint(m, (z,))] = True
    if not masked:
        real[:] = True
    elif chance.random() < 0.5:
        real[0] = False
    a, b = (torch.randn(z, length, dim, dtype=dtype, requires_grad=True) for length, dim in ((n, query_dim), (m, context_dim)))
    return Case(a, b, real, dtype)


def randomise(module: nn.Module) -> None:
    """Weights that no mistake can hide in, biases and norms too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)


def copy_projections(layer: CrossAttention, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear | None) -> None:
    """Their projections' weights into ours; without an output projection ours becomes the identity."""
    with torch.no_grad():
        for ours, theirs in ((layer.q_proj, q), (layer.k_proj, k), (layer.v_proj, v), (layer.out_proj, out)):
            ours.weight.copy_(torch.eye(*ours.weight.shape, dtype=ours.weight.dtype) if theirs is None else theirs.weight)
            if ours.bias is not None:
                ours.bias.zero_() if theirs is None or theirs.bias is None else ours.bias.copy_(theirs.bias)


def count(
    line: Agreement,
    case: Case,
    layer: CrossAttention,
    ours: Tensor,
    theirs: Tensor,
    *,
    inputs: Sequence[Tensor] | None = None,
    context: Tensor | None = None,
) -> None:
    """Add one comparison to a line, with gradients of the inputs, and what rows without a live key give.

    Args:
        line: where to.
        case: the inputs.
        layer: ours.
        ours: our output (z, n, o).
        theirs: theirs.
        inputs: what gradients are asked of; default queries and context.
        context: what values are made of, where that is not the context itself.
    """
    inputs = (case.a, case.b) if inputs is None else inputs
    live = case.live
    direction = torch.randn_like(ours) * live[..., None]
    our_gradients = torch.autograd.grad((ours * direction).sum(), inputs, retain_graph=True)
    their_gradients = torch.autograd.grad((theirs * direction).nan_to_num(0.0).sum(), inputs, retain_graph=True)
    if finite(their_gradients) == "finite":
        line.add(str(case), ours, theirs, live, our_gradients, their_gradients)
    else:
        line.add(str(case), ours, theirs, live)
    if bool(live.all()):
        return
    line.empty_gradients[finite(their_gradients)] += 1
    with torch.no_grad():
        values = layer.v_proj(case.b if context is None else context).mean(1).unflatten(-1, (layer.kv_heads, -1))
        even = layer.out_proj(values.repeat_interleave(layer.heads // layer.kv_heads, 1).flatten(1))
        for item, position in (~live).nonzero().tolist():
            line.empty_rows[meaning(theirs[item, position], ours[item, position], even[item])] += 1
