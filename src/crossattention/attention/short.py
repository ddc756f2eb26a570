"""The short ways: calls that ask for the products of a plan and for nothing beside them, without the questions of the long way.

Torch takes some sixty microseconds for attention of a few rows, and on a GPU a call takes what its Python takes, so each question
shows. All that the border asks about sizes, and the plan, are kept as a `Way` for each kind of call, found by one look-up; what may
change between two calls of a kind (hooks, weights, modes) is asked each time.

Nothing is refused here. What is not known to be plain goes the long way, which names what is wrong.

Legend: z batch, n queries, m context length, b width of B, h heads, k/v head widths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from crossattention.attention.fused import read_whole
from crossattention.attention.masks import check_context_mask
from crossattention.attention.products import (
    batched,
    batched_into_float,
    has_hooks,
    is_looked_into,
    linear,
    multiplies_into_float,
    project,
)
from crossattention.plan import TEXTBOOK, Plan, speeds
from crossattention.plan.blocks import NARROW_ROW
from crossattention.plan.sizes import DTYPE_BYTES

if TYPE_CHECKING:
    from crossattention.attention.cross_attention import CrossAttention
    from crossattention.attention.prepared import PreparedQueries
    from crossattention.attention.self_attention import SelfAttention

_PLAIN = (Tensor, nn.Parameter)
HALF = (torch.bfloat16, torch.float16)
_CAST = (torch.float32, *HALF)
_MASKS = (type(None), Tensor)
_MOST_WAYS = 8192


class Way(NamedTuple):
    """What is known of a kind of call whose sizes passed the border's checks.

    Args:
        plan: the plan that the layer runs.
        how: the short way that takes it where nothing is asked for beside it; None for none.
        is_small: whether no product goes to the quicker library.
        is_cast: whether autocast is on.
        given: the layer's `plan`, kept so that its address stays its own.
    """

    plan: Plan
    how: Literal["textbook", "context"] | None
    is_small: bool
    is_cast: bool
    given: object


_ways: dict[tuple[object, ...], Way] = {}


def way_of(layer: CrossAttention, a: object, b: object) -> Way | None:
    """The way of a call that is in order and runs in plain modules, outside of graphs and transforms; None for others."""
    if type(a) not in _PLAIN or type(b) not in _PLAIN:
        return None
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    if (
        layer.qk_norm is not None
        or layer.positions is not None
        or a.is_nested
        or b.is_nested
        or is_looked_into()
        or torch_module._has_any_global_hook()
    ):
        return None
    modules = layer._modules
    for name in ("k_proj", "v_proj", "out_proj", "q_proj"):
        if not _is_plain_module(modules.get(name)):
            return None
    weight: Any = modules["q_proj"].__dict__["_parameters"]["weight"]
    device, dtype = a.device, a.dtype
    if weight.device != device or b.device != device:
        return None
    cast = None
    if torch._C._is_any_autocast_enabled() and device.type != "meta" and torch.is_autocast_enabled(device.type):
        cast = _cast_of(a, b, weight)
        if cast is None:  # the plan is one for autocast's dtype all the same: not that of such a call outside
            return None
    elif not weight.dtype == dtype == b.dtype:
        return None
    given = layer._plan
    trains = given == "auto" and torch.is_grad_enabled() and (weight.requires_grad or layer._trains(b))
    key = (
        a.shape,
        b.shape,
        layer.query_dim,
        layer.context_dim,
        layer.heads,
        layer.kv_heads,
        layer.head_dim,
        layer.value_head_dim,
        layer.out_dim,
        dtype,
        cast,
        device,
        given if type(given) is str else id(given),
        trains,
        torch.get_num_threads(),
        speeds.generation,
    )
    way = _ways.get(key)
    if way is None:
        way = _find(layer, a, b, None if cast is None else cast[0])
        if way is not None:
            if len(_ways) >= _MOST_WAYS:
                _ways.clear()
            _ways[key] = way
    return way


def _cast_of(a: Tensor, b: Tensor, weight: Tensor) -> tuple[torch.dtype, ...] | None:
    """The dtype of autocast, which is on, and those that it brings to it beside A's; None where it leaves one as it is."""
    given = a.dtype, b.dtype, weight.dtype
    return (torch.get_autocast_dtype(a.device.type), *given[1:]) if all(dtype in _CAST for dtype in given) else None


def _find(layer: CrossAttention, a: Tensor, b: Tensor, cast: torch.dtype | None) -> Way | None:
    """The way of a call of plain modules if its sizes are in order and no side is empty."""
    query_shape, context_shape = tuple(a.shape), tuple(b.shape)
    if (
        len(query_shape) not in (2, 3, 4)
        or len(context_shape) != 3
        or (query_shape[-1], context_shape[2]) != (layer.query_dim, layer.context_dim)
        or (len(query_shape) > 2 and query_shape[0] != context_shape[0])
        or 0 in query_shape
        or 0 in context_shape
        or a.device.type == "meta"
        or str(cast or a.dtype).removeprefix("torch.") not in DTYPE_BYTES
    ):
        return None
    plan = layer._plan_of(
        b, query_shape[-2], query_shape[1] if len(query_shape) == 4 else None, 1, shares_queries=len(query_shape) == 2
    )
    how: Literal["textbook", "context"] | None = None
    if layer.kv_heads == layer.heads:
        if plan == TEXTBOOK and layer.head_dim == layer.value_head_dim:
            how = "textbook"
        elif plan.scores == plan.values == "context" and plan.kernel != "blocked" and cast is None:
            how = "context"
    is_small = not a.is_cpu or cast is not None or _is_small(layer, a.numel() // query_shape[-1], *context_shape[:2])
    return Way(plan, how, is_small, cast is not None, layer._plan)


def _is_small(layer: CrossAttention, rows: int, batch: int, context_length: int) -> bool:
    """Whether no product of these short ways with so many rows of A is large enough for the quicker library."""
    most = speeds.speeds_of("cpu", "float32").quick_from
    if most == float("inf"):
        return True
    keys, values = layer.heads * layer.head_dim, layer.heads * layer.value_head_dim
    made = batch * context_length * layer.context_dim * max(keys, values)
    asked = rows * max(layer.query_dim * keys, layer.out_dim * values)
    # In context+context all heads of an item read B in one product, and each head's rows are absorbed in one.
    read = rows * max(layer.heads * context_length, layer.head_dim, layer.value_head_dim) * layer.context_dim
    return 2.0 * max(made, asked, read) < most


def run(layer: CrossAttention, a: Tensor, b: Tensor, context_mask: Tensor | None, way: Way) -> Tensor | None:
    """The output of a call by its short way, None where it has none."""
    if way.how is None or (layer.training and layer.dropout) or type(context_mask) not in _MASKS:
        return None
    if (way.is_cast or a.dtype in HALF) and torch.is_grad_enabled():
        is_usual = way.how == "textbook" and a.dim() == 3 and context_mask is None and not way.is_cast
        if not is_usual and (way.how == "context" or a.is_cpu):
            return None  # on a CPU it may run in float32
    if context_mask is not None:
        check_context_mask(context_mask, b.shape[0], b.shape[1], b.device)
    repeats = a.shape[1] if a.dim() == 4 else None
    if repeats is not None:
        a = a.flatten(1, 2)
    if way.how == "textbook":
        out = _textbook(layer, a, b, context_mask, is_small=way.is_small)
    else:
        a = a.unsqueeze(0) if a.dim() == 2 else a
        b = b if b.stride(2) == 1 else b.contiguous()
        out = attend_b_plainly(layer, a, b, way.plan.kernel, context_mask, is_small=way.is_small)
    return out if repeats is None else split_repeats(out, repeats)


def split_repeats(out: Tensor, repeats: int) -> Tensor:
    """The output of repeats laid into the length, (z, r n, o), as (z, r, n, o)."""
    split: Tensor = out.unflatten(1, (repeats, -1))
    return split


def _textbook(layer: CrossAttention, a: Tensor, b: Tensor, context_mask: Tensor | None, *, is_small: bool) -> Tensor:
    """The textbook plan by plain projections, with as many key-value heads as heads and one head width."""
    z, m, _ = b.shape
    n, heads, width = a.shape[-2], layer.heads, layer.head_dim
    modules, product = layer._modules, F.linear if is_small else linear
    weights: dict[str, Any] = modules["q_proj"].__dict__["_parameters"]
    if a.dim() == 3:
        queries = product(a, weights["weight"], weights["bias"]).view(z, n, heads, width).transpose(1, 2)
    else:
        queries = product(a.unsqueeze(0), weights["weight"], weights["bias"])
        queries = queries.view(1, n, heads, width).transpose(1, 2).expand(z, -1, -1, -1)
    weights = modules["k_proj"].__dict__["_parameters"]
    keys = product(b, weights["weight"], weights["bias"]).view(z, m, heads, width).transpose(1, 2)
    weights = modules["v_proj"].__dict__["_parameters"]
    values = product(b, weights["weight"], weights["bias"]).view(z, m, heads, width).transpose(1, 2)
    read = _fused(queries, keys, values, context_mask, layer.scale).transpose(1, 2).reshape(z, n, heads * width)
    weights = modules["out_proj"].__dict__["_parameters"]
    return product(read, weights["weight"], weights["bias"])


def _fused(queries: Tensor, keys: Tensor, values: Tensor, context_mask: Tensor | None, scale: float) -> Tensor:
    """Torch's kernel on queries (z, h, n, c), with zeros where an item's context is masked whole."""
    if context_mask is None:
        return read_whole(queries, keys, values, scale)
    z, m = context_mask.shape
    read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=context_mask.view(z, 1, 1, m), scale=scale)
    if read.is_cpu:
        return read
    return read.masked_fill(~context_mask.any(1).view(z, 1, 1, 1), 0.0)  # other kernels may leave something there


def project_plainly(layer: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries, keys and values (z, h, n, k) of a sequence (z, n, d) that is in order; None where more is asked for."""
    if (
        torch.compiler.is_compiling()  # first: a graph must not ask for lengths
        or type(x) not in _PLAIN
        or x.dim() != 3
        or x.shape[2] != layer.dim
        or not x.numel()
        or layer.qk_norm is not None
        or layer.positions is not None
        or layer.kv_heads != layer.heads
        or layer.head_dim != layer.value_head_dim
        or torch._C._is_any_autocast_enabled()
        or is_looked_into()
        or torch_module._has_any_global_hook()
        or (x.dtype in HALF and x.is_cpu and torch.is_grad_enabled())  # it may run in float32
    ):
        return None
    z, n, _ = x.shape
    modules, made = layer._modules, []
    if not _is_plain_module(modules.get("out_proj")):
        return None
    is_small = not x.is_cpu or 2.0 * x.numel() * layer.heads * layer.head_dim < speeds.speeds_of("cpu", "float32").quick_from
    product = F.linear if is_small else linear
    for name in ("q_proj", "k_proj", "v_proj"):
        module = modules.get(name)
        if not _is_plain_module(module):
            return None
        weights: dict[str, Any] = module._parameters  # type: ignore[union-attr]
        weight = weights["weight"]
        if weight.dtype != x.dtype or weight.device != x.device:
            return None
        made.append(product(x, weight, weights["bias"]).view(z, n, layer.heads, layer.head_dim).transpose(1, 2))
    return made[0], made[1], made[2]


def read_plainly(
    layer: SelfAttention, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, is_causal: bool
) -> Tensor:
    """The output (z, n, o) of what `project_plainly` gave: all positions, those of a mask (z, m), or those up to each position."""
    if is_causal:
        read = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=layer.scale)
    else:
        read = _fused(queries, keys, values, mask, layer.scale)
    weights: dict[str, Any] = layer._modules["out_proj"]._parameters  # type: ignore[union-attr]
    return linear(read.transpose(1, 2).flatten(2), weights["weight"], weights["bias"])


def _is_plain_module(module: nn.Module | None) -> bool:
    """Whether a projection is a `nn.Linear` without hooks, a forward of its own or a weight that is made anew at each call."""
    return type(module) is nn.Linear and type(module.__dict__["_parameters"].get("weight")) in _PLAIN and not has_hooks(module)


def attend_plainly(layer: CrossAttention, a: Tensor, keys: Tensor, values: Tensor, context_mask: Tensor | None = None) -> Tensor:
    """The textbook plan with no parts: the steps of `execute` without its questions, as decode steps are short."""
    if a.dim() == 4:
        return split_repeats(attend_plainly(layer, a.flatten(1, 2), keys, values, context_mask), a.shape[1])
    z, n, _ = a.shape
    projections, width = layer._modules, layer.heads * layer.value_head_dim
    queries = project(projections["q_proj"], a)  # type: ignore[arg-type]
    if n == 1:  # one row has the same layout by head as by position
        queries = queries.view(z, layer.heads, 1, layer.head_dim)
        read = _fused(queries, keys, values, context_mask, layer.scale).reshape(z, 1, width)
    else:
        queries = queries.view(z, n, layer.heads, layer.head_dim).transpose(1, 2)
        read = _fused(queries, keys, values, context_mask, layer.scale).transpose(1, 2).reshape(z, n, width)
    return project(projections["out_proj"], read)  # type: ignore[arg-type]


def attend_b_plainly(
    layer: CrossAttention,
    a: Tensor | PreparedQueries,
    b: Tensor,
    kernel: str,
    context_mask: Tensor | None = None,
    *,
    is_small: bool | None = None,
) -> Tensor:
    """The context+context plan for B (z, m, b) without parts: `execute` without `attend_heads`' questions.

    Where one query reads a long B, those and the views between them took a fifth of the time. Rows are (heads x queries) of an
    item, which read B together. Without gradients they are written over: two megabytes that the system hands out anew take longer
    than their product. `a` is (z or 1, n, a), or (z, r, n, a).
    """
    if isinstance(a, Tensor) and a.dim() == 4:
        out = attend_b_plainly(layer, a.flatten(1, 2), b, kernel, context_mask, is_small=is_small)
        return split_repeats(out, a.shape[1])
    z, m, width = b.shape
    heads, modules, is_half, has_grad = layer.heads, layer._modules, b.dtype in HALF, torch.is_grad_enabled()
    n = a.shape[1] if isinstance(a, Tensor) else a.queries.shape[2]
    if is_small is None:
        is_small = _is_small(layer, z * n, z, m)
    if isinstance(a, Tensor):
        items = a.shape[0]
        queries = project(modules["q_proj"], a).reshape(items * n, heads, layer.head_dim).transpose(0, 1)  # type: ignore[arg-type]
        weight, bias = _weight_and_bias(modules["k_proj"])
        if has_grad and bias is not None and bias.requires_grad:
            queries = queries + 0.0 * bias.sum()  # the key bias cancels; its gradient is zero, not missing
        weight = weight.view(heads, layer.head_dim, width)
        rows = torch.bmm(queries, weight) if is_small and heads > 1 else batched(queries, weight.transpose(1, 2))
        rows = rows.view(heads, items, n, width).transpose(0, 1).reshape(items, heads * n, width)
    else:
        rows = a.queries.reshape(-1, heads * n, width)
    live = None if context_mask is None else context_mask.any(1)
    if type(live) is Tensor and live.is_cpu and bool(live.all()):
        live = None
    if kernel == "fused":
        keys = b.unsqueeze(1)
        read = _fused(rows.unsqueeze(1).expand(z, -1, -1, -1), keys, keys, context_mask, layer.scale)
    else:
        rows, is_ours = (rows, isinstance(a, Tensor)) if rows.shape[0] == z else (rows.expand(z, -1, -1), False)
        read = _read_explicitly(rows, b, layer.scale, context_mask, live, is_small=is_small, is_ours=is_ours)
    read = read.reshape(z, heads, n, width).transpose(0, 1).reshape(heads, z * n, width)
    weight, bias = _weight_and_bias(modules["v_proj"])
    weight = weight.view(heads, layer.value_head_dim, width)
    if is_half:  # rounded once, after the bias
        made = batched_into_float(read, weight)
    else:
        made = torch.bmm(read, weight.transpose(1, 2)) if is_small and heads > 1 else batched(read, weight)
    if bias is not None:
        bias = bias.view(heads, 1, layer.value_head_dim)
        if live is not None:
            bias = (bias.unsqueeze(1) * live.view(1, z, 1, 1)).expand(-1, -1, n, -1).reshape(made.shape)
        made = made + bias if has_grad else made.add_(bias)
    if is_half:
        made = made.to(b.dtype)
    made = made.transpose(0, 1).reshape(z, n, heads * layer.value_head_dim)
    return project(modules["out_proj"], made)  # type: ignore[arg-type]


def _weight_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of a projection; asked of a plain module's table, as its attributes take as long as a product."""
    held = module._parameters
    return (held["weight"], held["bias"]) if "weight" in held and "bias" in held else (module.weight, module.bias)


def _read_explicitly(
    rows: Tensor, b: Tensor, scale: float, context_mask: Tensor | None, live: Tensor | None, *, is_small: bool, is_ours: bool
) -> Tensor:
    """What rows (z, r, b) read of B (z, m, b), written over them where they are ours to write to.

    Softmax runs across rows where the context is short; the fewer numbers are scaled.
    Scores and weights of half precision are float32 numbers, as everywhere.
    """
    z, m, width = b.shape
    trains = torch.is_grad_enabled() and (rows.requires_grad or b.requires_grad)
    is_ours, is_half, is_narrow = is_ours and not trains, b.dtype in HALF, m <= NARROW_ROW
    dim, scales_rows = (1 if is_narrow else 2), is_narrow or width < m
    if is_half and multiplies_into_float(rows, b):
        scores = (batched_into_float(b, rows) if is_narrow else batched_into_float(rows, b)).mul_(scale)
    else:
        read, is_ours = (b.float(), True) if is_half else (b, is_ours)
        rows = rows.float() if is_half else rows
        if scales_rows:
            rows = rows.mul_(scale) if is_ours else rows * scale
        left, right = (read, rows) if is_narrow else (rows, read)
        scores = torch.bmm(left, right.transpose(1, 2)) if is_small and z > 1 else batched(left, right)
        if not scales_rows:
            scores = scores * scale if trains else scores.mul_(scale)
    if context_mask is not None:
        forbidden = ~(context_mask.view(z, m, 1) if is_narrow else context_mask.view(z, 1, m))
        scores = scores.masked_fill(forbidden, -torch.inf) if trains else scores.masked_fill_(forbidden, -torch.inf)
    dead = None if live is None else ~live.view(z, 1, 1)
    if dead is not None:  # a row of -inf alone would be NaN, forward and backward
        scores = scores.masked_fill(dead, 0.0)
    weights = torch.softmax(scores, dim) if trains else torch.softmax(scores, dim, out=scores)
    if dead is not None:
        weights = weights.masked_fill(dead, 0.0)
    if is_narrow:
        weights = weights.transpose(1, 2)
    if is_half:
        weights = weights.to(b.dtype)
    if is_half or (is_small and z > 1):
        return torch.bmm(weights, b)
    return batched(weights, b.transpose(1, 2), out=rows if not trains and (is_ours or scales_rows) else None)
