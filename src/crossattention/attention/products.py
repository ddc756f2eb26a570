"""Matrix products by the machine's quickest exact library: what projections and the blocked kernel are made of.

On x86 processors torch multiplies float32 matrices with MKL. On those of AMD, MKL reaches half (Zen 5) to nine tenths (Zen 4) of
what oneDNN does, which torch also ships but calls for half precision only (dev/LOG.md, 2026-11-23 and 25). Large float32 products
therefore go to oneDNN where the active `Speeds` say that it is worth its launch; everything else, and everything that a transform
looks into, is `F.linear`.

Legend: rows, inner, columns: (rows, inner) times (columns, inner) transposed gives (rows, columns).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from crossattention.plan.devices import built_in
from crossattention.plan.speeds import speeds_of

_LIBRARY = torch.library.Library("crossattention", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
# Of graphs, which cannot read a configuration while they are traced: from how many FLOPs on this kind of processor gains.
_QUICK_FROM = built_in("cpu", "float32").quick_from
_has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """A projection of x (..., inner): `linear` if it is a plain `nn.Linear`, else whatever the module does."""
    if is_plain_linear(projection):
        held = projection._parameters  # asked of the module, each takes as long as all that is asked here
        return linear(x, held["weight"], held["bias"])  # type: ignore[arg-type]
    projected: Tensor = projection(x)
    return projected


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X (..., inner) times weight (columns, inner) transposed, plus bias: `F.linear`, by the quicker library."""
    if not _is_quick(x, weight):
        return F.linear(x, weight, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
    ):
        out: Tensor = torch.ops.crossattention.linear.default(flat, weight, bias)
    else:  # without the operator around it, which takes some microseconds to ask what this has just asked
        out = _onednn(flat, weight, bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def batched(x: Tensor, weights: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Products x (p, rows, inner) times weights (p, columns, inner) transposed: (p, rows, columns).

    Few large ones are taken one by one, by the quicker library; many small ones in one call. `out` is memory that may be written
    to, where no gradient is asked for: what is returned lies there or elsewhere.
    """
    if not torch.compiler.is_compiling() and _are_surely_small(x, weights):  # first, as the slices below take as long as a product
        if x.shape[0] == 1 and out is None:
            return F.linear(x[0], weights[0]).unsqueeze(0)
        return torch.bmm(x, weights.transpose(1, 2)) if out is None else torch.bmm(x, weights.transpose(1, 2), out=out)
    if out is not None and not _is_quick(x[0], weights[0]):
        return torch.bmm(x, weights.transpose(1, 2), out=out)
    if x.shape[0] == 1:
        return linear(x[0], weights[0]).unsqueeze(0)
    if not torch.compiler.is_compiling() and x.shape[0] and _is_quick(x[0], weights[0]):
        return torch.stack([linear(one, weight) for one, weight in zip(x.unbind(), weights.unbind(), strict=True)])
    return torch.bmm(x, weights.transpose(1, 2))


def _are_surely_small(x: Tensor, weights: Tensor) -> bool:
    """Whether each of some products is too small for the quicker library; of none at all, False."""
    return bool(2.0 * x.numel() * weights.shape[1] < x.shape[0] * speeds_of("cpu", "float32").quick_from)


def batched_into_float(x: Tensor, weights: Tensor) -> Tensor:
    """`batched`, with half precision's sums kept in float32: on CUDA from the matrix units, elsewhere by float32 products."""
    if multiplies_into_float(x, weights):
        trains = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
        product: Tensor = _IntoFloat.apply(x, weights) if trains else torch.bmm(x, weights.transpose(1, 2), out_dtype=torch.float32)
        return product
    return batched(unrounded(x), unrounded(weights))


def unrounded(tensor: Tensor) -> Tensor:
    """Half precision in float32, for a step that the textbook does inside one product: a sum, or a product and its bias."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def multiplies_into_float(x: Tensor, weights: Tensor) -> bool:
    """Whether products of half precision reach float32 without their operands written out in it: on CUDA, seen by nobody else.

    Both ways round the same: what the matrix units multiply is exact in float32, and float32 is what they sum in.
    """
    return (
        x.device.type == "cuda"
        and x.dtype == weights.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and _keeps_float
        and not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and type(weights) in _PLAIN
        and not torch.is_autocast_enabled("cuda")
        and not is_transformed()
        and not is_traced()
    )


_keeps_float = hasattr(torch.ops.aten.bmm, "dtype")  # torch 2.8 has it for CUDA, without a gradient


class _IntoFloat(torch.autograd.Function):
    """Products of half precision in float32; the gradient is rounded to half precision first, as a fused kernel rounds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        return torch.bmm(x, weights.transpose(1, 2), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weights = ctx.saved_tensors
        grad = grad.to(x.dtype)
        for_x, for_weights = ctx.needs_input_grad
        return (
            torch.bmm(grad, weights) if for_x else None,
            torch.bmm(grad.transpose(1, 2), x) if for_weights else None,
        )


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """X (rows, inner) times weight (columns, inner) transposed, outside of autograd and of graphs."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and _is_large(x.shape[0], *weight.shape):
        return _onednn(x, weight, None)
    return x @ weight.t()


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module does nothing but multiply by its weight and add its bias: no subclass, no hooks, no forward of its own."""
    # Without "weight" among its parameters it is pruned: made anew by a hook.
    return type(module) is nn.Linear and "weight" in module._parameters and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks, its own or everybody's, or a forward of its own, would see or change what the module computes."""
    return has_hooks(module) or bool(torch_module._has_any_global_hook())


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks or a forward of its own."""
    held = module.__dict__  # asked of the module, each takes as long as all of this
    return bool(
        "forward" in held
        or held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
    )


def _is_large(rows: int, columns: int, inner: int) -> bool:
    flops = 2.0 * rows * columns * inner
    return _has_onednn and 0.0 < flops >= speeds_of("cpu", "float32").quick_from


def _is_quick(x: Tensor, weight: Tensor) -> bool:
    """Whether a product goes to oneDNN: large, float32, on a CPU, and not looked into by anything that knows only torch's own."""
    if torch.compiler.is_compiling():
        return x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and _is_quick_in_graphs(x, weight)
    if 2.0 * x.numel() * weight.shape[0] < speeds_of("cpu", "float32").quick_from:  # first, as a decode step asks it twice
        return False
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and _is_large(x.numel() // max(1, x.shape[-1]), *weight.shape)
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
        and not is_traced()
    )


_PLAIN = (Tensor, nn.Parameter)


def _is_quick_in_graphs(x: Tensor, weight: Tensor) -> bool:
    """In compiled code the operator decides by its real sizes; an exported program must run without this library.

    Where the graph's sizes are fixed and too small anyhow, the operator, which takes some 15 microseconds, is left out; of a length
    that may vary this asks nothing, so that no graph comes to depend on it.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # half a second, and only graphs need it

    return (
        not torch.compiler.is_exporting()
        and _has_onednn
        and _QUICK_FROM < float("inf")
        and not torch.is_autocast_enabled("cpu")
        and not statically_known_true(2 * x.numel() * weight.shape[0] < _QUICK_FROM)
    )


def is_cast(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; asked of all devices first, as the name of one takes as long as a view."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False
    return torch.is_autocast_enabled(tensor.device.type)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Where autocast is off for the device of a tensor; where it is off anyhow, nothing is done, which takes a twentieth."""
    if not torch.compiler.is_compiling() and not is_cast(tensor):
        return _AS_IT_IS
    return torch.autocast(tensor.device.type, enabled=False)


_AS_IT_IS = nullcontext()


def is_transformed() -> bool:
    """Whether vmap, functorch's or forward-mode derivatives look into what is computed: they know torch's own operators."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether `torch.jit.trace` or an exporter built on it looks on: it loses what is written in place through a view."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_looked_into() -> bool:
    """Whether anything that a call does is written down by somebody: a transform, a trace, a mode that is handed each operator."""
    return is_transformed() or is_traced() or torch._C._len_torch_dispatch_stack() > 0


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(_with_plain_rows(x), _dense(weight), bias, "none", [], "")
    return out


def _with_plain_rows(matrix: Tensor) -> Tensor:
    """A matrix whose rows or columns lie whole in memory; an expanded one is written out, as oneDNN would crawl through it."""
    across, down = matrix.stride()
    if (down == 1 and across >= matrix.shape[1]) or (across == 1 and down >= matrix.shape[0]):
        return matrix
    return matrix.contiguous()


def _dense(weight: Tensor) -> Tensor:
    """A second operand without gaps: through one with gaps between its rows oneDNN was measured to crawl, at 1/150 of its speed."""
    across, down = weight.stride()
    if (down == 1 and across == weight.shape[1]) or (across == 1 and down == weight.shape[0]):
        return weight
    return weight.contiguous()


# --------------------------------------------------------------------------------------------- the operator with its gradient


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float32 and _is_large(x.shape[0], *weight.shape):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    return (
        torch.ops.crossattention.linear(grad, weight.t(), None) if for_x else None,
        torch.ops.crossattention.linear(grad.t(), x.t(), None) if for_weight else None,
        grad.sum(0) if for_bias else None,
    )


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear", _linear, "CUDA")
torch.library.register_fake("crossattention::linear", _linear_shape, lib=_LIBRARY)
torch.library.register_autograd("crossattention::linear", _linear_backward, setup_context=_save, lib=_LIBRARY)
