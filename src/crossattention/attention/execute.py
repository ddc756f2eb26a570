"""Running a plan: one small function for each meeting space, and the two kernels between them.

`make_keys`, `make_values` turn B into what the plan wants; `make_queries` does so with A; `attend_heads` lets queries read keys and
values; `finish` brings the result to the output. Nothing is decided here and nothing is checked: plans come from `plan`, input is
checked at the border (`cross_attention`).

Legend: z batch, n queries (all repeats of one context together), m context length, a/b/o widths of A, B and output, h heads,
g key-value heads, s = h / g heads that share one, k/v head widths, c/w widths in which scores and values meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention.blocks import attend_blocks
from crossattention.attention.dropout import drawn_factors
from crossattention.attention.fused import attend_fused, to_one_width, widen
from crossattention.attention.learned import attend_learned, runs_learned
from crossattention.attention.masks import ScoreMask
from crossattention.attention.products import (
    batched,
    batched_into_float,
    is_cast,
    is_traced,
    is_transformed,
    linear,
    multiplies_into_float,
    project,
    unrounded,
    without_autocast,
)
from crossattention.plan import Plan
from crossattention.plan.blocks import NARROW_ROW

if TYPE_CHECKING:
    from crossattention.attention.cross_attention import CrossAttention
    from crossattention.attention.parts import PositionPart, QueryKeyNorm


class HasParts(Protocol):
    """A layer with the two parts that stand between projection and scores."""

    qk_norm: QueryKeyNorm | None
    positions: PositionPart | None


def learns_scores(part: PositionPart | None) -> bool:
    """Whether a gradient may flow into what a position part adds to the scores, which no fused kernel computes.

    Not whether it does: frozen weights give what they gave while they were trained, to the bit.
    """
    if part is None or not part.adds_to_scores or not torch.is_grad_enabled():
        return False
    return part.reads_queries or any(True for _ in part.parameters())


# --------------------------------------------------------------------------------------------------------------------------
# What is made of B
# --------------------------------------------------------------------------------------------------------------------------


def make_keys(layer: CrossAttention, space: str, b: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keys (z, h or g or 1, m, c) in a meeting space of scores, and the extra score of each key (z, h, m) or None."""
    if space == "context":
        return _with_whole_rows(b).unsqueeze(1), None
    if space == "head":
        keys_zgmk = split_heads(project(layer.k_proj, b), layer.kv_heads).transpose(1, 2)
        return place_keys(layer, keys_zgmk, positions), None
    # The key bias may stay in: A Wq bk is the same for every key and cancels in the softmax.
    keys_zmgk = split_heads(_project_unrounded(layer.k_proj, b), layer.kv_heads)
    weight = layer.q_proj.weight.unflatten(0, (layer.heads, -1)).transpose(1, 2)
    keys = _rounded(_by_head(keys_zmgk, weight), b)
    if layer.q_proj.bias is None:
        return keys, None
    keys_zmgk = unrounded(keys_zmgk)
    with without_autocast(b):  # an extra score, and scores are float32 numbers
        bias = _grouped_rows(layer.q_proj.bias, layer).to(keys_zmgk.dtype)
        key_bias = torch.einsum("zmgk,gsk->zgsm", keys_zmgk, bias).flatten(1, 2)
    return keys, key_bias * layer.scale


def make_some_keys(layer: CrossAttention, b: Tensor, groups: slice, *, biased: bool = True) -> Tensor:
    """Keys (z, groups, m, k) of some key-value heads, as the "head" space has them where no part stands behind the projection."""
    rows = slice(groups.start * layer.head_dim, groups.stop * layer.head_dim)
    bias = None if layer.k_proj.bias is None or not biased else layer.k_proj.bias[rows]
    return split_heads(linear(b, layer.k_proj.weight[rows], bias), groups.stop - groups.start).transpose(1, 2)


def make_values(layer: CrossAttention, space: str, b: Tensor) -> Tensor:
    """Values (z, h or g or 1, m, w) in a meeting space of values."""
    if space == "context":
        return _with_whole_rows(b).unsqueeze(1)
    if space == "head":
        return split_heads(project(layer.v_proj, b), layer.kv_heads).transpose(1, 2)
    values_zmgv = split_heads(_project_unrounded(layer.v_proj, b), layer.kv_heads)
    weight = layer.out_proj.weight.unflatten(1, (layer.heads, -1)).transpose(0, 1)
    return _rounded(_by_head(values_zmgv, weight), b)


def make_keys_and_values(
    layer: CrossAttention,
    plan: Plan,
    b: Tensor,
    positions: Tensor | None,
    *,
    only_keys: bool = False,
    values_of: tuple[CrossAttention, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys (z, g or h or 1, m, c), values (z, g or h or 1, m, w) and the bias of each key, in a plan's spaces.

    Args:
        layer: whose projections.
        plan: it names the spaces.
        b: context (z, m, b).
        positions: of the context, where a part wants them.
        only_keys: whether values are not asked for; the keys then stand in their place.
        values_of: the layer and the context that values are made of, where these are others.
    """
    keys, key_bias = make_keys(layer, plan.scores, b, positions)
    if only_keys or (values_of is None and plan.scores == plan.values == "context"):
        return keys, keys, key_bias
    values = make_values(layer, plan.values, b) if values_of is None else make_values(values_of[0], plan.values, values_of[1])
    if plan.kernel == "fused":
        keys, values = to_one_width(keys, values)
    return keys, values, key_bias


def _by_head(made_zmgk: Tensor, weight_hck: Tensor) -> Tensor:
    """What is made of B, (z, m, g, k), times each head's weight (h, c, k) transposed: (z, h, m, c)."""
    z, m, groups, k = made_zmgk.shape
    heads, width, _ = weight_hck.shape
    flat = made_zmgk.permute(2, 0, 1, 3).reshape(groups, z * m, k)
    if heads > groups:
        flat = flat.repeat_interleave(heads // groups, 0)
    return batched(flat, weight_hck.to(flat.dtype)).view(heads, z, m, width).transpose(0, 1)


def _with_whole_rows(b: Tensor) -> Tensor:
    """B with its width innermost: fused kernels take no other layout. A copy only where it is not, as in (z, b, m) transposed."""
    return b if b.stride(-1) == 1 else b.contiguous()


def _project_unrounded(projection: nn.Module, b: Tensor) -> Tensor:
    """A projection of B that another product follows: half precision stays in float32, to be rounded once, after both.

    Two roundings were measured at up to 2.3 times the textbook's error, which rounds once there (docs/exactness.md). A projection
    that does more than its product (an adapter, a hook) is called as it is, in its own precision.
    """
    if b.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(b.device.type) or does_more(projection):
        return project(projection, b)
    assert isinstance(projection, nn.Linear)
    bias = None if projection.bias is None else projection.bias.float()
    if multiplies_into_float(b, projection.weight):
        product = batched_into_float(b.reshape(1, -1, b.shape[-1]), projection.weight.unsqueeze(0)).view(
            *b.shape[:-1], projection.weight.shape[0]
        )
        return product if bias is None else product + bias
    return F.linear(b.float(), projection.weight.float(), bias)


def _rounded(product: Tensor, b: Tensor) -> Tensor:
    """A product of B in B's dtype; under autocast it is in autocast's dtype already, and stays so."""
    return product if is_cast(b) else product.to(b.dtype)


def place_keys(layer: HasParts, keys: Tensor, positions: Tensor | None) -> Tensor:
    """Projected keys (z, g, m, k), normalised and turned by the layer's parts."""
    if layer.qk_norm is not None:
        keys = layer.qk_norm.normalise_keys(keys)
    if layer.positions is not None:
        assert positions is not None
        keys = layer.positions.turn_keys(keys, positions)
    return keys


# --------------------------------------------------------------------------------------------------------------------------
# What is made of A
# --------------------------------------------------------------------------------------------------------------------------


def make_queries(layer: CrossAttention, space: str, a: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Queries (z, h or 1, n, c) in a meeting space of scores, and the projected queries where a part reads them.

    One head means that all heads share these queries: in the "query" space they are A itself.
    """
    if space == "query":
        # All heads share A, so a kernel sees overlapping queries. The CPU's lays its output out by their strides and goes wrong,
        # silently, where two rows overlap (frames by `unfold`) or a length of one has a stray stride: written out, they are plain.
        return a.contiguous().reshape(a.shape[0], 1, a.shape[1], a.shape[2]), None
    projected = split_heads(project(layer.q_proj, a), layer.heads).transpose(1, 2)
    if space == "head":
        return place_queries(layer, projected, positions), projected
    bias = layer.k_proj.bias
    queries = projected
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        queries = queries + 0.0 * bias.sum()  # the key bias cancels; its gradient is zero, not missing
    weight = layer.k_proj.weight.view(layer.kv_heads, layer.head_dim, layer.context_dim)
    return _by_group(queries, weight.transpose(1, 2)), projected


def join_key_bias(queries: Tensor, keys: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (z, 1, n, a) and keys (z, h, m, a or more) with more columns, in which ones meet the extra score of each key.

    In half precision the score is the sum of two columns: one alone would round what stays a float32 number elsewhere. Zeros fill
    up to a multiple of 16 columns, so that rows stay aligned. Queries are A itself here, keys may have been padded to the values'
    width.
    """
    width = queries.shape[-1]
    high = key_bias.to(keys.dtype)
    columns = [high] if high.dtype == key_bias.dtype else [high, (key_bias - high).to(keys.dtype)]
    more = len(columns) + -(width + len(columns)) % 16
    ones = F.pad(queries.new_ones(len(columns)), (0, more - len(columns))).expand(*queries.shape[:-1], more)
    column = F.pad(torch.stack(columns, -1), (0, more - len(columns)))
    return torch.cat((queries, ones), -1), torch.cat((keys[..., :width], column), -1)


def _by_group(heads_zhnk: Tensor, weight_gck: Tensor, product: Callable[[Tensor, Tensor], Tensor] = batched) -> Tensor:
    """Each head (z, h, n, k) times the weight (g, c, k) of its group, transposed: (z, h, n, c)."""
    z, heads, n, k = heads_zhnk.shape
    groups, width, _ = weight_gck.shape
    share = heads // groups
    if share == 1:
        single = heads_zhnk.transpose(0, 1).reshape(heads, z * n, k)
        return product(single, weight_gck).view(heads, z, n, width).transpose(0, 1)
    grouped = heads_zhnk.unflatten(1, (groups, share)).transpose(0, 1).reshape(groups, z * share * n, k)
    return product(grouped, weight_gck).view(groups, z, share, n, width).transpose(0, 1).flatten(1, 2)


def place_queries(layer: HasParts, queries: Tensor, positions: Tensor | None) -> Tensor:
    """Projected queries (z, h, n, k), normalised and turned by the layer's parts."""
    if layer.qk_norm is not None:
        queries = layer.qk_norm.normalise_queries(queries)
    if layer.positions is not None:
        assert positions is not None
        queries = layer.positions.turn_queries(queries, positions)
    return queries


# --------------------------------------------------------------------------------------------------------------------------
# Where they meet
# --------------------------------------------------------------------------------------------------------------------------


def attend_heads(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: ScoreMask,
    *,
    scale: float,
    dropout: float = 0.0,
    kernel: str = "fused",
    sums_heads: bool = False,
    wants_row_sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Let queries read keys and values.

    Args:
        queries: (z or 1, h or 1, n, c); one head or one item is shared by all.
        keys: (z, g, m, c).
        values: (z, g', m, w).
        mask: what is masked or added.
        scale: factor of the scores.
        dropout: probability of dropping a weight; the same pairs are dropped by every plan for one state of the generator.
        kernel: "fused", "explicit" or "blocked".
        sums_heads: whether the heads' results are summed, giving (z, 1, n, w).
        wants_row_sums: whether the sum of each row of weights is asked for.

    Returns:
        (z, h, n, w), zero where nothing may be attended, and the row sums broadcastable to (z, h, n, 1), None where all are one.
    """
    queries, keys, values = to_autocast_dtype(queries, keys, values)
    if mask.is_learned:
        if dropout == 0.0 and not sums_heads and runs_learned(queries, keys, values, mask):
            return attend_learned(queries, keys, values, mask, scale), mask.live
        mask = mask.joined()
    learned_mask = mask.tensor is not None and mask.tensor.requires_grad and torch.is_grad_enabled()
    if kernel != "explicit" and dropout == 0.0 and not learned_mask and not _has_empty_side(queries, keys):
        if kernel == "fused" or torch.compiler.is_exporting():
            out = attend_fused(queries, keys, values, mask, scale)
            return (unrounded(out).sum(1, keepdim=True) if sums_heads else out.to(queries.dtype)), mask.live
        if not is_transformed():
            with without_autocast(queries):
                return attend_blocks(queries, keys, values, mask.tensor, mask.live, scale, sums_heads), mask.live
    with without_autocast(queries):
        weights = explicit_weights(queries, keys, mask, scale)
        if dropout > 0.0:
            weights = weights * _dropout_factors(weights, dropout)
        row_sums = mask.live
        if wants_row_sums and (dropout > 0.0 or _has_empty_side(queries, keys)):
            row_sums = weights.sum(-1, keepdim=True).to(values.dtype)
        return _explicit_values(weights, values, sums_heads), row_sums


def explicit_weights(queries: Tensor, keys: Tensor, mask: ScoreMask, scale: float) -> Tensor:
    """The weights (z, h, n, m) themselves; half precision is computed in float32, as the fused kernels do inside."""
    mask = mask.joined()
    dtype = torch.float32 if queries.dtype in (torch.bfloat16, torch.float16) else queries.dtype
    queries = widen(queries, keys.shape[-1])
    is_ours = _is_for_no_gradient(queries, keys, mask)
    if multiplies_into_float(queries, keys):
        scores = _explicit_scores(queries, keys, batched_into_float)
        scores = scores.mul_(scale) if is_ours else scores * scale
    elif not torch.compiler.is_compiling() and keys.numel() < queries.numel():  # scale the fewer numbers
        scores = _explicit_scores(queries.to(dtype), keys.to(dtype) * scale)
    else:
        scores = _explicit_scores(queries.to(dtype) * scale, keys.to(dtype))
    if is_ours:
        return _softmax_in_place(scores, mask)
    if mask.tensor is not None:
        if mask.tensor.dtype == torch.bool:
            scores = scores.masked_fill(~mask.tensor, -torch.inf)
        else:
            scores = scores + mask.tensor.to(dtype)
    if mask.live is None:
        return _softmax(scores)
    # A row of -inf alone would be NaN, forward and backward; as a row of zeros it is finite, and then cut.
    return _softmax(scores.masked_fill(~mask.live, 0.0)).masked_fill(~mask.live, 0.0)


def _is_for_no_gradient(queries: Tensor, keys: Tensor, mask: ScoreMask) -> bool:
    """Whether nothing will ask for the scores again: no backward pass, and no transform or graph that forbids writing in place."""
    if torch.compiler.is_compiling() or is_transformed() or is_traced():
        return False
    read = (queries, keys) if mask.tensor is None else (queries, keys, mask.tensor)
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read))


def _softmax_in_place(scores: Tensor, mask: ScoreMask) -> Tensor:
    """The weights in the memory of their scores: memory that is new to the process is slow to get (docs/planning.md)."""
    if mask.tensor is not None:
        if mask.tensor.dtype == torch.bool:
            scores.masked_fill_(~mask.tensor, -torch.inf)
        else:
            scores.add_(mask.tensor)
    if mask.live is not None:
        scores.masked_fill_(~mask.live, 0.0)
    across, _, dim = _by_layout(scores)
    torch.softmax(across, dim, out=across)
    return scores if mask.live is None else scores.masked_fill_(~mask.live, 0.0)


_LAYOUTS = (  # of scores (z, h, n, m): dimensions in the order of memory, the order that leads back, and where m stands
    ((0, 1, 2, 3), (0, 1, 2, 3), 3),
    ((0, 2, 1, 3), (0, 2, 1, 3), 3),
    ((0, 1, 3, 2), (0, 1, 3, 2), 2),
    ((0, 3, 1, 2), (0, 2, 3, 1), 1),
)


def _by_layout(scores: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    """The scores with their dimensions in the order of memory, what leads back from it, and the dimension of m."""
    for order, back, dim in _LAYOUTS:
        laid = scores.permute(order)
        if laid.is_contiguous():
            return laid, back, dim
    return scores, (0, 1, 2, 3), 3


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over m of (z, h, n, m), in the layout that the scores have: torch's would write them out row by row first."""
    if torch.compiler.is_compiling():
        return scores.softmax(-1)
    across, back, dim = _by_layout(scores)
    return across.softmax(dim).permute(back)


def _explicit_scores(queries: Tensor, keys: Tensor, product: Callable[[Tensor, Tensor], Tensor] = batched) -> Tensor:
    """(z, h, n, m). Where the context is short, as (z, h, m, n) in memory: softmax across rows beats that along short ones."""
    z, groups, m, width = keys.shape
    heads, n = queries.shape[1], queries.shape[2]
    queries = queries.expand(z, heads, n, queries.shape[3])
    if heads == 1:  # one product for all groups, which share the queries
        left, right = queries[:, 0], keys.flatten(1, 2)
        if _is_narrow(m):
            return product(right, left).view(z, groups, m, n).transpose(2, 3)
        return product(left, right).view(z, n, groups, m).transpose(1, 2)
    share = heads // groups
    left, right = queries.reshape(z * groups, share * n, width), keys.flatten(0, 1)
    if _is_narrow(m) and (groups == 1 or share == 1):
        across = product(right, left).view(z, groups, m, share, n)
        return across.permute(0, 1, 3, 4, 2).flatten(1, 2)
    return product(left, right).view(z, heads, n, m)


def _is_narrow(context_length: int) -> bool:
    """Whether rows are short; a graph never branches on lengths."""
    return not torch.compiler.is_compiling() and context_length <= NARROW_ROW


def _explicit_values(weights: Tensor, values: Tensor, sums_heads: bool) -> Tensor:
    """What the weights read: (z, h, n, w), or the sum over heads (z, 1, n, w)."""
    z, heads, n, m = weights.shape
    if sums_heads:
        across = weights.transpose(2, 3)
        if not torch.compiler.is_compiling() and across.is_contiguous():
            joined = across.reshape(z, heads * m, n).transpose(1, 2)
        else:
            joined = weights.transpose(1, 2).reshape(z, n, heads * m)
        return batched(joined, unrounded(values).flatten(1, 2).transpose(1, 2)).unsqueeze(1)
    groups, width = values.shape[1], values.shape[3]
    grouped = weights.to(values.dtype).reshape(z * groups, heads // groups * n, m)
    return batched(grouped, values.flatten(0, 1).transpose(1, 2)).view(z, heads, n, width)


def _dropout_factors(weights: Tensor, dropout: float) -> Tensor:
    """0 or 1 / (1 - p) for each weight, drawn in the order of (z, h, n, m) whatever the layout of the weights is."""
    factors, scale = drawn_factors(weights.shape, dropout, weights.dtype, weights.device)
    return factors.mul_(scale)


def _has_empty_side(queries: Tensor, keys: Tensor) -> bool:
    """Whether there is no query or no key; graphs are made for lengths of one or more and never branch on them."""
    return not torch.compiler.is_compiling() and (queries.shape[2] == 0 or keys.shape[2] == 0)


def to_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast where it is on; float64 stays."""
    if not is_cast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


# --------------------------------------------------------------------------------------------------------------------------
# What is made of the result
# --------------------------------------------------------------------------------------------------------------------------


def finish(layer: CrossAttention, space: str, read: Tensor, row_sums: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The layer's output (z, n, o), in a dtype, from what the heads read, (z, h or 1, n, w)."""
    if space == "output":
        bias = layer.out_proj.bias
        summed = read[:, 0]
        if bias is not None:
            is_ours = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed()
            summed = summed.add_(bias.to(summed.dtype)) if is_ours else summed + bias.to(summed.dtype)
        return summed.to(dtype)
    if space == "context":
        weight = layer.v_proj.weight.view(layer.kv_heads, layer.value_head_dim, layer.context_dim)
        read = _by_group(read, weight, batched_into_float)
        if layer.v_proj.bias is not None:
            read = read + _value_bias(layer, row_sums, read)
        read = read.to(dtype)
    return project(layer.out_proj, read.transpose(1, 2).flatten(2))


def _value_bias(layer: CrossAttention, row_sums: Tensor | None, read: Tensor) -> Tensor:
    """What the value bias brings: the bias times the sum of each row's weights, (z, h, n, v)."""
    bias: Tensor = layer.v_proj.bias.to(read.dtype).view(layer.kv_heads, 1, 1, layer.value_head_dim)
    share = layer.heads // layer.kv_heads
    bias_h1v: Tensor = bias.expand(-1, share, -1, -1).flatten(0, 1)
    return bias_h1v if row_sums is None else bias_h1v * row_sums.to(read.dtype)


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """(z, length, heads x width) as (z, length, heads, width)."""
    width = projected.shape[-1] // heads
    split: Tensor = projected.view(*projected.shape[:-1], heads, width)
    return split


def _grouped_rows(weight: Tensor, layer: CrossAttention) -> Tensor:
    """The query projection's weight (h k, a) as (g, s, k, a), or its bias (h k) as (g, s, k)."""
    grouped: Tensor = weight.unflatten(0, (layer.kv_heads, -1, layer.head_dim))
    return grouped


def execute(
    layer: CrossAttention,
    plan: Plan,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: ScoreMask,
    dropout: float,
) -> Tensor:
    """From queries, keys and values in the plan's meeting spaces to the layer's output (z, n, o)."""
    read, row_sums = attend_heads(
        queries,
        keys,
        values,
        mask,
        scale=layer.scale,
        dropout=dropout,
        kernel=plan.kernel,
        sums_heads=plan.values == "output",
        wants_row_sums=plan.values == "context" and layer.v_proj.bias is not None,
    )
    width = {"head": layer.value_head_dim, "context": layer.context_dim, "output": layer.out_dim}[plan.values]
    return finish(layer, plan.values, read[..., :width], row_sums, to_autocast_dtype(values)[0].dtype)


def linear_reason(module: nn.Module, name: str) -> str | None:
    """Why the weights of a projection may not be absorbed, or None if they may."""
    if type(module) is not nn.Linear:
        return f"{name} is a {type(module).__name__}, not a plain nn.Linear, so its weight cannot be absorbed"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own, which absorbing its weight would skip"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has forward hooks, which absorbing its weight would skip"
    if module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has backward hooks, which absorbing its weight would skip"
    return None


def does_more(module: nn.Module) -> bool:
    """Whether a projection does more than multiply by its weight and add its bias."""
    return linear_reason(module, "") is not None
