"""Partial results: attention over parts of a context that merge exactly, forward and backward.

A partial result is (output, log-sum-exp of the scores). Two of them over disjoint parts of the keys merge to the result over
both: this one identity gives contexts in blocks, streamed, ragged or sharded.

Legend: z batch, h heads, n queries, m keys of one part, c width of scores, w width of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossattention.attention.fused import to_one_width, widen
from crossattention.attention.masks import check_attn_mask, to_score_dtype


@dataclass(frozen=True)
class Partial:
    """Attention over some keys: the output over them alone, and how much they weigh.

    Args:
        output: (z, h, n, w), zero where no key is live.
        lse: (z, h, n), log of the sum of exponentials of the scores; -inf where no key is live.
    """

    output: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Part:
    """Some keys with their values.

    Args:
        keys: (z, h, m, c); m may be 0.
        values: (z, h, m, w).
        mask: bool (True = may be attended) or float added to the scores, broadcastable to (z, h, n, m); None if all are live.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


def merge_partials(partials: Sequence[Partial]) -> Partial:
    """Partial results over disjoint keys, merged to the result over all of them; differentiable in outputs and log-sum-exps.

    lse = log sum_i exp(lse_i),   output = sum_i exp(lse_i - lse) output_i

    Args:
        partials: one or more, of the same shapes.

    Returns:
        Their merge: output zero and lse -inf where no part has a live key. The order of the parts does not matter.

    Raises:
        ValueError: no partial, or shapes that differ.

    Source: Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682.
    """
    if not partials:
        raise ValueError("merge_partials needs at least one partial result, got none")
    shapes = {(tuple(p.output.shape), tuple(p.lse.shape)) for p in partials}
    if len(shapes) > 1:
        raise ValueError(f"partial results must have the same shapes to be merged, got {sorted(shapes)}")
    lses = torch.stack([p.lse for p in partials])
    live = lses > -torch.inf
    anywhere = live.any(0)
    # Rows of -inf alone would be NaN in the backward pass: they go through as zeros and are cut afterwards.
    total = torch.where(live | ~anywhere, torch.where(anywhere, lses, 0.0), -torch.inf).logsumexp(0)
    shares = torch.where(live, lses - total, -torch.inf).exp()
    # The log-sum-exps are in float32 at least, and so is the sum; it is rounded once.
    output = sum((share.unsqueeze(-1) * p.output for share, p in zip(shares, partials, strict=True)))
    assert isinstance(output, Tensor)
    return Partial(output.to(partials[0].output.dtype), torch.where(anywhere, total, -torch.inf))


def attend_parts(queries: Tensor, parts: Sequence[Part], *, scale: float) -> Partial:
    """Attention over a context that comes in parts, exact, with memory for one part's scores at the most.

    Equals attention over the parts' keys and values laid end to end. The backward pass goes part by part too, from the merged
    output and log-sum-exp, and gives exact gradients of queries, keys and values for both results.

    Args:
        queries: (z, h, n, c); n may be 0.
        parts: keys, values and masks, each part of any length, also empty or wholly masked.
        scale: factor of the scores.

    Returns:
        The merged partial result.

    Raises:
        ValueError: no part; shapes or dtypes that do not belong together; NaN or +inf in a mask; a mask that requires a gradient,
            which this pass has none for.
        TypeError: a mask that is neither bool nor floating.

    Cost: n m (c + w) multiply-adds a head forward, 2.5 times that backward; nothing of size n m is kept.
    Source: Dao et al. 2022, arXiv:2205.14135, algorithm 4 (backward from the merged log-sum-exp).
    """
    _check_parts(queries, parts)
    tensors = [tensor for part in parts for tensor in (part.keys, part.values, part.mask)]
    # The kernel lays its output out by the strides of the queries, and goes wrong where these overlap.
    queries = queries.contiguous()
    output, lse = _AttendParts.apply(scale, queries, *tensors)
    return Partial(output, lse)


class _AttendParts(torch.autograd.Function):
    """Forward: merge as the parts come. Backward: each part's gradients from the merged output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, scale: float, queries: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        parts = _as_parts(tensors)
        merged: Partial | None = None
        for part in parts:
            one = attend_part(queries, part, scale)
            # Half precision waits in float32: rounded after each of many parts, it would be lost.
            merged = Partial(one.output.to(one.lse.dtype), one.lse) if merged is None else merge_partials((merged, one))
        assert merged is not None
        output = merged.output.to(parts[0].values.dtype)
        ctx.save_for_backward(queries, output, merged.lse, *tensors)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return output, merged.lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_lse = grads
        queries, output, lse, *tensors = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        grad_queries = torch.zeros_like(queries, dtype=lse.dtype)
        found: list[Tensor | None] = []
        for part in _as_parts(tensors):
            one = backward_of_part(queries, part, output, lse, grad_output, grad_lse, ctx.scale)
            grad_queries += one[0]
            found += [one[1], one[2], None]
        return None, grad_queries.to(queries.dtype), *found


def _as_parts(tensors: Sequence[Tensor | None]) -> list[Part]:
    triples = zip(tensors[0::3], tensors[1::3], tensors[2::3], strict=True)
    return [Part(keys, values, mask) for keys, values, mask in triples if keys is not None and values is not None]


def attend_part(queries: Tensor, part: Part, scale: float) -> Partial:
    """One part's result: the CPU's flash kernel where it can, else the scores of the part, held."""
    if not _flash_runs(queries, part):
        scores = scores_of_part(queries, part, scale)
        lse = _row_lse(scores)
        # Not exp(scores - lse): numbers so large that log m is lost in them are still a row of weights.
        weights = scores.softmax(-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
        return Partial((weights.to(part.values.dtype) @ part.values), lse)
    keys, values = to_one_width(part.keys, part.values)
    mask = _float_mask(queries, part)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        widen(queries, keys.shape[-1]), keys, values, attn_mask=mask, scale=scale
    )
    if mask is not None:  # the kernel says 0 for a row without a live key, where the sum of exponentials is 0 and its log -inf
        live = (mask > -torch.inf).any(-1).expand(lse.shape)
        lse = lse.masked_fill(~live, -torch.inf)
        output = output.masked_fill(~live.unsqueeze(-1), 0.0)
    return Partial(output[..., : part.values.shape[-1]], lse)


def backward_of_part(
    queries: Tensor,
    part: Part,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    *,
    wants_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of queries, keys and values that come through one part; and of a mask that is added, where it is wanted.

    P = exp(S - lse),  dS = P (dO V^T - rowsum(dO O) + dlse),  dQ = dS K scale,  dK = dS^T Q scale,  dV = P^T dO
    """
    if grad_lse is None and not wants_mask and _flash_runs(queries, part):
        keys, values = to_one_width(part.keys, part.values)
        width = keys.shape[-1]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            widen(grad_output, width).contiguous(),
            widen(queries, width),
            keys,
            values,
            widen(output, width),
            _finite(lse),
            0.0,
            False,
            attn_mask=_float_mask(queries, part),
            scale=scale,
        )
        widths = (queries.shape[-1], part.keys.shape[-1], part.values.shape[-1])
        dq, dk, dv = (grad[..., :w] for grad, w in zip(grads, widths, strict=True))
        return dq, dk, dv, None
    weights = (scores_of_part(queries, part, scale) - _finite(lse).unsqueeze(-1)).exp()
    wide = weights.dtype
    delta = (grad_output * output).sum(-1, dtype=wide)
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide)
    grad_scores = weights * (grad_output.to(wide) @ part.values.to(wide).transpose(-1, -2) - delta.unsqueeze(-1))
    grad_mask = None
    if wants_mask and part.mask is not None:
        grad_mask = grad_scores.sum_to_size(part.mask.shape).to(part.mask.dtype)
    grad_scores = grad_scores * scale
    return (
        (grad_scores @ part.keys.to(wide)).to(queries.dtype),
        (grad_scores.transpose(-1, -2) @ queries.to(wide)).to(part.keys.dtype),
        (weights.transpose(-1, -2) @ grad_output.to(wide)).to(part.values.dtype),
        grad_mask,
    )


def _flash_runs(queries: Tensor, part: Part) -> bool:
    """Whether the CPU's flash kernel can take this part: it stops the process for empty dimensions."""
    return queries.device.type == "cpu" and queries.numel() > 0 and part.keys.numel() > 0 and part.values.numel() > 0


def scores_of_part(queries: Tensor, part: Part, scale: float) -> Tensor:
    """Masked scores of one part, half precision in float32."""
    wide = torch.float32 if queries.dtype in (torch.bfloat16, torch.float16) else queries.dtype
    scores = (queries.to(wide) * scale) @ part.keys.to(wide).transpose(-1, -2)
    if part.mask is None:
        return scores
    if part.mask.dtype == torch.bool:
        return scores.masked_fill(~part.mask, -torch.inf)
    return scores + to_score_dtype(part.mask, wide)


def _row_lse(scores: Tensor) -> Tensor:
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    return scores.logsumexp(-1)


def _finite(lse: Tensor) -> Tensor:
    """The log-sum-exp with 0 for rows without a live key, whose scores are all -inf anyway."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _float_mask(queries: Tensor, part: Part) -> Tensor | None:
    """The mask as the flash kernel takes it: added, in the queries' dtype or float32, four dimensions, the last one whole."""
    if part.mask is None:
        return None
    mask, dtype = part.mask, torch.promote_types(queries.dtype, torch.float32)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    mask = to_score_dtype(mask, dtype)
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    return mask.expand(*mask.shape[:-1], part.keys.shape[2])


def _check_parts(queries: Tensor, parts: Sequence[Part]) -> None:
    if not parts:
        raise ValueError("attend_parts needs at least one part, got none; an empty context is one part with keys of length 0")
    z, h, n, c = queries.shape
    for place, part in enumerate(parts):
        keys, values = tuple(part.keys.shape), tuple(part.values.shape)
        m = keys[2] if len(keys) == 4 else None
        if keys != (z, h, m, c) or len(values) != 4 or values[:3] != (z, h, m) or values[3] != parts[0].values.shape[-1]:
            raise ValueError(
                f"part {place}: keys must be ({z}, {h}, m, {c}) to fit queries {tuple(queries.shape)}, and values ({z}, {h}, m, "
                f"{parts[0].values.shape[-1]}); got keys {keys} and values {values}"
            )
        if {queries.dtype} != {part.keys.dtype, part.values.dtype}:
            raise ValueError(
                f"part {place}: queries, keys and values must have one dtype, got {queries.dtype}, {part.keys.dtype} and "
                f"{part.values.dtype}"
            )
        if part.mask is None:
            continue
        check_attn_mask(part.mask, (z, h, n, keys[2]), queries.device)
        if part.mask.requires_grad:
            raise ValueError(f"part {place}: the mask requires a gradient, which attend_parts does not compute; detach it")
