"""Sublayers that read a norm of their input and are added to it, x + f(norm(x)), with gradients that are taken together.

Left to autograd, each step of the norm, both sums and each of their gradients are a tensor of their own, written and read again.
Here what is added is added by the product, gradients of several products are summed by the products, and the norm with its
gradient and what is added to that goes through rows in blocks that stay in the processor's cache.

Legend: rows of x, d their width, f hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention.products import is_plain_linear, is_quick, is_traced, is_transformed, is_watched, multiply, project
from crossattention.attention.self_attention import SelfAttention
from crossattention.layers.dropout import Dropout
from crossattention.layers.feed_forward import FeedForward
from crossattention.layers.norms import RMSNorm

_BLOCK = 1 << 17
"""So many numbers of x, a thread, are in work at once: with their gradients they fill a core's own cache."""


def add_feed_forward(x: Tensor, norm: RMSNorm, feed_forward: FeedForward, dropout: Dropout) -> Tensor:
    """X + dropout(feed_forward(norm(x))).

    Args:
        x: (..., d).
        norm: over the last dimension.
        feed_forward: from width d to width d.
        dropout: of what is added.

    Cost: 6 rows d f multiply-adds with gradients; x, its norm, and the hidden units before and after their activation are kept.
    """
    kernels = _KERNELS.get(type(feed_forward.activation))
    if (
        kernels is None
        or not _goes_together(x, norm, dropout, feed_forward, feed_forward.up_proj, feed_forward.down_proj)
        or _drops(feed_forward.dropout)
        or is_watched(feed_forward.activation)
        or getattr(feed_forward.activation, "approximate", "none") != "none"
        or feed_forward.up_proj.bias is not None
        or feed_forward.down_proj.bias is not None
        or feed_forward.down_proj.out_features != x.shape[-1]
    ):
        return dropout(feed_forward(norm(x)), x)
    weights = norm.weight, feed_forward.up_proj.weight, feed_forward.down_proj.weight
    out: Tensor = _FeedForward.apply(x, *weights, _eps(norm, x), type(feed_forward.activation))
    return out


def add_self_attention(x: Tensor, norm: RMSNorm, attention: SelfAttention, dropout: Dropout, mask: Tensor | None = None) -> Tensor:
    """X + dropout(attention(norm(x), mask=mask)).

    Args:
        x: (z, n, d).
        norm: over the last dimension.
        attention: of width d.
        dropout: of what is added.
        mask: bool (z, n), True = may be attended.
    """
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    if not _goes_together(x, norm, dropout, attention, *projections, attention.out_proj) or attention.out_dim != x.shape[-1]:
        return dropout(attention(norm(x), mask=mask), x)
    x, *projected = projections_of_norm(x, norm, projections)
    return add_projection(x, attention.read(*projected, mask=mask), attention.out_proj)


def with_norm(x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """X itself, to be added to, and norm(x): the gradient of both is taken in one pass."""
    if not _goes_together(x, norm):
        return x, norm(x)
    found: tuple[Tensor, Tensor] = _WithNorm.apply(x, norm.weight, _eps(norm, x))
    return found


def projections_of_norm(x: Tensor, norm: RMSNorm, projections: tuple[nn.Linear, ...]) -> tuple[Tensor, ...]:
    """X itself, to be added to, and each projection of norm(x).

    So the gradient of what x is added to comes back to where that of the norm is, and both are added in one pass.
    """
    weights = [tensor for projection in projections for tensor in (projection.weight, projection.bias)]
    found: tuple[Tensor, ...] = _Projections.apply(x, norm.weight, _eps(norm, x), *weights)
    return found


def add_projection(x: Tensor, read: Tensor, projection: nn.Linear) -> Tensor:
    """X + projection(read); the sum is begun with x, so that the product is not written and read again."""
    if projection.bias is not None or is_quick(read, projection.weight):
        return x + project(projection, read)
    return torch.addmm(x.flatten(0, -2), read.flatten(0, -2), projection.weight.t()).view_as(x)


def _goes_together(x: Tensor, norm: nn.Module, *modules: nn.Module) -> bool:
    """Whether gradients of this file's own may stand for autograd's: plain parts that nobody looks at, no dropout, on a CPU.

    It does not ask which weights are frozen: a frozen model gives the numbers, to the bit, of one that is not.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and type(norm) is RMSNorm
        and norm.weight is not None
        and norm.normalized_shape == x.shape[-1:]
        and all(type(module) in _PLAIN and not is_watched(module) for module in (norm, *modules))
        and not any(_drops(module) for module in modules if isinstance(module, nn.Dropout))
        and all(is_plain_linear(module) for module in modules if isinstance(module, nn.Linear))
        and all(_is_plain(weight, x.dtype) for weight in norm.parameters())
        and all(_is_plain(weight, x.dtype) for module in modules for weight in module.parameters(recurse=False))
        and not is_transformed()
        and not is_traced()
    )


_PLAIN = (RMSNorm, Dropout, FeedForward, SelfAttention, nn.Linear)


def _is_plain(weight: Tensor, dtype: torch.dtype) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype == dtype and weight.device.type == "cpu"


def _drops(dropout: nn.Dropout) -> bool:
    return dropout.training and dropout.p > 0.0


def _eps(norm: RMSNorm, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps


# ------------------------------------------------------------------------------------------------------- their gradients


def _normed(rows: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of rows (rows, d), x s w or x s, and s = 1 / sqrt(mean(x^2) + eps), a number a row."""
    out, scales = torch.empty_like(rows, memory_format=torch.contiguous_format), torch.empty_like(rows[:, :1])
    for block in _blocks(rows):
        some, s = rows[block], scales[block]
        torch.linalg.vector_norm(some, dim=-1, keepdim=True, out=s)
        s.mul_(rows.shape[1] ** -0.5).square_().add_(eps).rsqrt_()
        normed = torch.mul(some, s, out=out[block])
        if weight is not None:
            normed.mul_(weight)
    return out, scales


def _d_unit(unit: Tensor, scales: Tensor, grad: Tensor, added: Tensor | None) -> Tensor:
    """The gradient of rows x of u = x s, of that of u, plus what is `added` to it: s g - s u / d (u g summed over the row)."""
    out, blocks = torch.empty_like(unit), _blocks(unit)
    buffer, means = torch.empty_like(unit[blocks[0]]), unit.new_full(unit.shape[1:], 1.0 / unit.shape[1])
    for block in blocks:
        u, g, s, d_some = unit[block], grad[block], scales[block], out[block]
        along = torch.mv(torch.mul(u, g, out=buffer[: len(u)]), means).unsqueeze(1)
        if added is None:
            torch.mul(g, s, out=d_some)
        else:
            torch.addcmul(added[block], g, s, out=d_some)
        d_some.addcmul_(u, along.mul_(s), value=-1.0)
    return out


def _d_normed(rows: Tensor, weight: Tensor, scales: Tensor, grad: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weight of their norm, of its gradient g, plus what is `added` to that of rows.

    dx = s w g - x s^3 / d (x w g summed over the row),   dw = x s g summed over rows
    """
    out, d_weight = torch.empty_like(rows, memory_format=torch.contiguous_format), torch.zeros_like(weight)
    blocks = _blocks(rows)
    buffer = torch.empty_like(out[blocks[0]])
    for block in blocks:
        some, g, s, d_some = rows[block], grad[block], scales[block], out[block]
        torch.mul(g, some, out=d_some)
        d_weight.addmv_(d_some.t(), s[:, 0])
        along = torch.mv(d_some, weight).unsqueeze(1)
        g = torch.mul(g, weight, out=buffer[: len(some)])
        if added is None:
            torch.mul(g, s, out=d_some)
        else:
            torch.addcmul(added[block], g, s, out=d_some)
        d_some.addcmul_(some, along.mul_(s**3), value=-1.0 / len(weight))
    return out, d_weight


def _blocks(rows: Tensor) -> list[slice]:
    at_once = max(1, _BLOCK * torch.get_num_threads() // rows.shape[1])
    return [slice(begin, begin + at_once) for begin in range(0, len(rows), at_once)]


def _added(base: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Base + rows weight^T: a copy that the product adds to."""
    return multiply(rows, weight, base.clone(memory_format=torch.contiguous_format), adds=True)


class _Kernels(NamedTuple):
    """An activation and its gradient."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], object]
    """Of the output's gradient and the input, written over the first."""


_aten = torch.ops.aten
_KERNELS: dict[type[nn.Module], _Kernels] = {
    nn.GELU: _Kernels(F.gelu, lambda grad, x: _aten.gelu_backward.grad_input(grad, x, grad_input=grad)),
    nn.SiLU: _Kernels(F.silu, lambda grad, x: _aten.silu_backward.grad_input(grad, x, grad_input=grad)),
    nn.ReLU: _Kernels(F.relu, lambda grad, x: _aten.threshold_backward.grad_input(grad, x, 0.0, grad_input=grad)),
}


class _FeedForward(torch.autograd.Function):
    """X + act(norm(x) W1^T) W2^T; the norm's weight is folded into W1, so that activations do not meet it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, up: Tensor, down: Tensor, eps: float, activation: type[nn.Module]
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        unit, scales = _normed(rows, None, eps)
        hidden = multiply(unit, up * norm_weight)
        active = _KERNELS[activation].forward(hidden)
        ctx.save_for_backward(x, norm_weight, up, down, scales, unit, hidden, active)
        ctx.eps, ctx.activation = eps, activation
        return _added(rows, active, down).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, up, down, scales, unit, hidden, active = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for: of the formula itself

            def formula(x: Tensor, norm_weight: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
                active = ctx.activation()(F.linear(F.rms_norm(x, norm_weight.shape, norm_weight, ctx.eps), up))
                return (x + F.linear(active, down),)

            return *_by_formula(formula, (x, norm_weight, up, down), ctx.needs_input_grad, (grad,)), None, None
        grads = grad.reshape(unit.shape)
        _, for_norm, for_up, for_down = ctx.needs_input_grad[:4]
        d_down = multiply(grads.t(), active.t()) if for_down else None
        d_hidden = multiply(grads, down.t())
        _KERNELS[ctx.activation].backward(d_hidden, hidden)
        d_up, d_weight = _d_folded(d_hidden, unit, up, norm_weight, for_up, for_norm)
        d_rows = _d_unit(unit, scales, multiply(d_hidden, (up * norm_weight).t()), grads)
        return d_rows.view(x.shape), d_weight, d_up, d_down, None, None


class _WithNorm(torch.autograd.Function):
    """X itself and norm(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, scales = _normed(x.reshape(-1, x.shape[-1]), weight, eps)
        ctx.save_for_backward(x, weight, scales)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return x, normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for: of the formula itself

            def formula(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
                return x, F.rms_norm(x, weight.shape, weight, ctx.eps)

            return *_by_formula(formula, (x, weight), ctx.needs_input_grad, (d_x, d_normed)), None
        if d_normed is None:
            return d_x, None, None
        rows, added = x.reshape(-1, x.shape[-1]), None if d_x is None else d_x.reshape(-1, x.shape[-1])
        d_rows, d_weight = _d_normed(rows, weight, scales, d_normed.reshape(rows.shape), added)
        return d_rows.view(x.shape), d_weight, None


class _Projections(torch.autograd.Function):
    """X itself and norm(x) W^T + b for some weights and biases: one product with all weights, the norm's folded into them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, *held: Tensor | None) -> tuple[Tensor, ...]:
        unit, scales = _normed(x.reshape(-1, x.shape[-1]), None, eps)
        weights = [weight for weight in held[::2] if weight is not None]
        whole = multiply(unit, torch.cat(weights).mul_(norm_weight))
        found = whole.view(*x.shape[:-1], -1).split([len(weight) for weight in weights], -1)
        for out, bias in zip(found, held[1::2], strict=True):
            if bias is not None:
                out.add_(bias)
        ctx.save_for_backward(x, norm_weight, scales, unit, *held)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return x, *found

    @staticmethod
    def backward(ctx: Any, d_x: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, norm_weight, scales, unit, *held = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for: of the formula itself

            def formula(x: Tensor, norm_weight: Tensor, *held: Tensor) -> tuple[Tensor, ...]:
                normed = F.rms_norm(x, norm_weight.shape, norm_weight, ctx.eps)
                return x, *(F.linear(normed, *pair) for pair in zip(held[::2], held[1::2], strict=True))

            needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[3:])
            found = _by_formula(formula, (x, norm_weight, *held), needs, (d_x, *grads))
            return *found[:2], None, *found[2:]
        d_unit, d_weight, d_held = None, None, []
        _, for_norm, _, *needs = ctx.needs_input_grad
        for number, (grad, weight) in enumerate(zip(grads, held[::2], strict=True)):
            if grad is None:
                d_held += [None, None]
                continue
            rows = grad.reshape(len(unit), -1)
            d_projection, d_norm = _d_folded(rows, unit, weight, norm_weight, needs[2 * number], for_norm)
            d_held += [d_projection, rows.sum(0) if needs[2 * number + 1] else None]
            d_weight = d_norm if d_weight is None or d_norm is None else d_weight + d_norm
            d_unit = multiply(rows, (weight * norm_weight).t(), d_unit, adds=d_unit is not None)
        if d_unit is None:
            return d_x, None, None, *d_held
        d_rows = _d_unit(unit, scales, d_unit, None if d_x is None else d_x.reshape(unit.shape))
        return d_rows.view(x.shape), d_weight, None, *d_held


def _d_folded(
    grads: Tensor, unit: Tensor, weight: Tensor, norm_weight: Tensor, for_weight: bool, for_norm: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of W and of the norm's w in u (W w)^T, of the product's: of both, what u has to do with it is g^T u."""
    if not for_weight and not for_norm:
        return None, None
    both = multiply(grads.t(), unit.t())
    return both * norm_weight if for_weight else None, (both * weight).sum(0) if for_norm else None


def _by_formula(
    formula: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of the formula at some tensors, None where none is needed, to be differentiated again."""
    asked = [tensor for tensor, needed in zip(tensors, needs, strict=False) if needed and tensor is not None]
    with torch.enable_grad():
        outputs = formula(*tensors)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    found = iter(torch.autograd.grad([out for out, _ in pairs], asked, [g for _, g in pairs], create_graph=True, allow_unused=True))
    return tuple(next(found) if needed and tensor is not None else None for tensor, needed in zip(tensors, needs, strict=False))
