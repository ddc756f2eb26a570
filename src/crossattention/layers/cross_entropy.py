"""The cross-entropy of a vocabulary's logits without the logits: in blocks of rows, forward and backward.

Legend: rows of x, d width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crossattention.attention.products import is_traced, is_transformed

IGNORED = -100
"""The label of a row that is not scored, as `F.cross_entropy` has it."""

_BLOCK = {"cpu": 1 << 21}
_OTHER_BLOCK = 1 << 26


def summed_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of log sum_v exp(x w_v) - x w_label, in nats: `F.cross_entropy(x W^T, labels, reduction="sum")`.

    Written out, logits, their log-softmax and their gradient are (rows, V) each; here no more than a block of rows is held, whose
    gradient is taken while it is there. In half precision, under autocast and inside graphs they are written out.

    Args:
        x: (..., d).
        weight: (V, d), the output projection or the embedding.
        labels: integers (...), `IGNORED` where a row is not scored.

    Returns:
        A number, differentiable by x and weight, twice.

    Raises:
        ValueError: shapes that do not go together.
        IndexError: a label that is not there.

    Cost: 3 rows d V multiply-adds with gradients, one without.

    Example:
        >>> x, weight, labels = torch.randn(2, 5, 8), torch.randn(30, 8), torch.randint(30, (2, 5))
        >>> whole = F.cross_entropy((x @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
        >>> torch.allclose(summed_cross_entropy(x, weight, labels), whole)
        True
    """
    if x.shape[:-1] != labels.shape or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"expected x (..., d), a weight (V, d) and labels (...), got {tuple(x.shape)}, {tuple(weight.shape)} and "
            f"{tuple(labels.shape)}"
        )
    rows, targets = x.reshape(-1, x.shape[-1]), labels.reshape(-1).long()
    if (
        torch.compiler.is_compiling()
        or is_transformed()
        or is_traced()
        or torch.is_autocast_enabled(x.device.type)
        or x.dtype != weight.dtype
        or x.dtype not in (torch.float32, torch.float64)
        or not len(rows)
    ):
        return _written_out(rows, weight, targets)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        nats: Tensor = _Summed.apply(rows, weight, targets)
        return nats
    return _blocks(rows, weight, targets, None, None)


def _written_out(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(rows, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORED, reduction="sum")


def _blocks(rows: Tensor, weight: Tensor, labels: Tensor, d_rows: Tensor | None, d_weight: Tensor | None) -> Tensor:
    """The sum; its gradients are written to `d_rows` and added to `d_weight` where they are given."""
    at_once = max(1, _BLOCK.get(rows.device.type, _OTHER_BLOCK) // len(weight))
    total = rows.new_zeros(())
    buffer = rows.new_empty(min(at_once, len(rows)), len(weight))
    for begin in range(0, len(rows), at_once):
        x, label = rows[begin : begin + at_once], labels[begin : begin + at_once]
        block = buffer[: len(x)]
        torch.mm(x, weight.t(), out=block)
        torch.log_softmax(block, -1, out=block)
        total += F.nll_loss(block, label, ignore_index=IGNORED, reduction="sum")
        if d_rows is None and d_weight is None:
            continue
        is_scored = label != IGNORED
        block.exp_()
        block.scatter_add_(1, label.clamp(min=0).unsqueeze(1), -block.new_ones(len(x), 1))
        if not bool(is_scored.all()):
            block.masked_fill_(~is_scored.unsqueeze(1), 0.0)
        if d_rows is not None:
            torch.mm(block, weight, out=d_rows[begin : begin + at_once])
        if d_weight is not None:
            d_weight.addmm_(block.t(), x)
    return total


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        for_rows, for_weight, _ = ctx.needs_input_grad
        d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format) if for_rows else None
        d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if for_weight else None
        total = _blocks(rows, weight, labels, d_rows, d_weight)
        ctx.save_for_backward(rows, weight, labels)
        ctx.gradients = d_rows, d_weight
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if not torch.is_grad_enabled():
            d_rows, d_weight = ctx.gradients
            return None if d_rows is None else d_rows * grad, None if d_weight is None else d_weight * grad, None
        rows, weight, labels = ctx.saved_tensors  # a gradient of the gradient is asked for: of the formula itself
        asked = [tensor for tensor, needed in zip((rows, weight), ctx.needs_input_grad, strict=False) if needed]
        found = iter(torch.autograd.grad(_written_out(rows, weight, labels), asked, grad, create_graph=True))
        return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None
