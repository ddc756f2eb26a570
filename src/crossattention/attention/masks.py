"""Masks: what may be passed, how context mask, pair mask and score biases become one, and which rows have a live key.

One sense everywhere: True = may be attended. Legend: z batch, r repeats on one context, h heads, n queries, m context positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreMask:
    """All that is added to or cut from the scores, in one tensor.

    Args:
        tensor: bool (True = may be attended) or float (added to the scaled scores), broadcastable to (z, h, n, m) with a full last
            dimension; None if nothing is masked.
        live: bool, broadcastable to (z, h, n, 1): whether the row has anything to attend; None if every row of a non-empty
            context has.
        allowed: bool, broadcastable to (z, h, n, m), what may be attended, where `tensor` is a bias that may be learned and is kept
            apart from what is cut; else None.
        is_learned: whether it is.
    """

    tensor: Tensor | None
    live: Tensor | None
    allowed: Tensor | None = None
    is_learned: bool = False

    def joined(self) -> ScoreMask:
        """The same with what is cut in the tensor."""
        if not self.is_learned:
            return self
        assert self.tensor is not None
        tensor = self.tensor if self.allowed is None else torch.where(self.allowed, self.tensor, -torch.inf)
        return ScoreMask(tensor, self.live)


def check_context_mask(mask: Tensor, batch: int, context_length: int, device: torch.device) -> None:
    """Refuse a context mask that is not bool (z, m).

    Raises:
        TypeError: not a bool tensor.
        ValueError: another shape or device.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"context_mask must be a bool tensor (batch, context length), got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"context_mask must be bool with True = may be attended, got {mask.dtype}; for a 0/1 mask pass mask.bool(), "
            "scores to add go into attn_mask"
        )
    if tuple(mask.shape) != (batch, context_length):
        raise ValueError(
            f"context_mask must have shape (batch, context length) = ({batch}, {context_length}), got {tuple(mask.shape)}"
        )
    _check_device("context_mask", mask, device)


def check_attn_mask(mask: Tensor, target: tuple[int, ...], device: torch.device) -> None:
    """Refuse a pair mask that does not broadcast to `target`, of a wrong dtype, or with NaN or +inf in it.

    Raises:
        TypeError: neither bool nor floating.
        ValueError: a shape that does not broadcast, another device, NaN or +inf.
    """
    names = "(batch, repeats, heads, queries, context)" if len(target) == 5 else "(batch, heads, queries, context)"
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a bool or floating tensor that broadcasts to {names}, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(
            f"attn_mask must be bool (True = may be attended) or floating (added to the scores), got {mask.dtype}; "
            "for a 0/1 mask pass mask.bool()"
        )
    fits = mask.dim() <= len(target) and all(
        size in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask of shape {tuple(mask.shape)} does not broadcast to {names} = {target}; sizes are matched from the right, "
            "so a mask for each item is (batch, 1, queries, context)"
        )
    _check_device("attn_mask", mask, device)
    if torch.compiler.is_compiling() or mask.dtype == torch.bool or mask.numel() == 0:
        return
    highest = float(mask.detach().amax())  # one pass finds both faults: a NaN is the maximum of anything
    if highest != highest:
        first = torch.isnan(mask).nonzero()[0].tolist()
        raise ValueError(
            f"attn_mask has {int(torch.isnan(mask).sum())} NaN, the first at {first}; use -inf to forbid a pair, 0 to leave it"
        )
    if highest == torch.inf:
        first = (mask == torch.inf).nonzero()[0].tolist()
        raise ValueError(f"attn_mask has +inf at index {first}, which makes the softmax undefined; -inf forbids a pair")


def _check_device(name: str, mask: Tensor, device: torch.device) -> None:
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device} but what it masks is on {device}; move the mask there")


def part_of(tensor: Tensor, *slices: slice) -> Tensor:
    """Slices of the first dimensions; one that has a single number for all keeps it."""
    return tensor[tuple(some if size > 1 else slice(None) for size, some in zip(tensor.shape, slices, strict=False))]


def fold_repeats(mask: Tensor, repeats: int, query_length: int) -> Tensor:
    """A pair mask that broadcasts to (z, r, h, n, m), as one that broadcasts to (z, h, r n, m)."""
    mask = mask.reshape((1,) * (5 - mask.dim()) + tuple(mask.shape))
    if mask.shape[1] == 1 and mask.shape[3] == 1:
        return mask[:, 0]
    return mask.expand(-1, repeats, -1, query_length, -1).transpose(1, 2).flatten(2, 3)


def combine_masks(
    context_mask: Tensor | None,
    attn_mask: Tensor | None,
    score_bias: Tensor | None,
    context_length: int,
    dtype: torch.dtype,
    *,
    is_learned: bool = False,
) -> ScoreMask:
    """One mask out of a context mask (z, m), a pair mask (z, h, n, m) and a finite score bias (z, h, n, m), each optional.

    Args:
        context_mask: bool (z, m).
        attn_mask: bool or float, four dimensions, broadcastable.
        score_bias: float, broadcastable; finite, so it never empties a row.
        context_length: m.
        dtype: dtype of the queries.
        is_learned: whether a gradient may flow into the score bias, which is then kept apart from what is cut.
    """
    dtype = _score_dtype(dtype)
    allowed = None if context_mask is None else context_mask[:, None, None, :]
    added = score_bias
    live_pairs = allowed
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
        if attn_mask.dtype == torch.bool:
            allowed = attn_mask if allowed is None else allowed & attn_mask
            live_pairs = allowed
        else:
            attn_mask = _within_reach(attn_mask)
            possible = attn_mask > -torch.inf
            live_pairs = possible if allowed is None else allowed & possible
            added = to_score_dtype(attn_mask, dtype) if added is None else added + attn_mask
    live = None if live_pairs is None else live_pairs.any(-1, keepdim=True)
    if live is not None and context_length == 0:
        live = torch.zeros_like(live)
    if added is None:
        return ScoreMask(_full_last(allowed, context_length), live)
    added = to_score_dtype(added, dtype)
    if is_learned and (attn_mask is None or attn_mask.dtype == torch.bool):
        return ScoreMask(_full_last(added, context_length), live, allowed, is_learned=True)
    if allowed is not None:
        added = torch.where(allowed, added, -torch.inf)
    return ScoreMask(_full_last(added, context_length), live)


def _within_reach(mask: Tensor) -> Tensor:
    """A float mask whose finite numbers stay finite on a GPU: kernels there take exponentials to base 2, of scores times 1.44."""
    lowest = torch.finfo(torch.float32).min / 2
    if mask.device.type == "cpu" or mask.dtype == torch.float16:
        return mask
    return torch.where(mask == -torch.inf, mask, mask.clamp(min=lowest))


def score_dtype_of(queries: Tensor) -> torch.dtype:
    """The dtype that float masks are brought to, that of the queries.

    It is float32 where the queries are in half precision: a mask in half precision would be the coarsest number of all. Only a
    GPU's fused kernel wants it so (`fused`).
    """
    return _score_dtype(queries.dtype)


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def to_score_dtype(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A float mask in the scores' dtype; a large negative number stays finite, as only -inf forbids a pair."""
    if torch.finfo(mask.dtype).max <= torch.finfo(dtype).max:
        return mask.to(dtype)
    narrowed = mask.clamp(min=torch.finfo(dtype).min).to(dtype)
    return torch.where(mask == -torch.inf, -torch.inf, narrowed)


def _full_last(mask: Tensor | None, context_length: int) -> Tensor | None:
    """The mask with its last dimension written out: kernels read it as it stands in memory."""
    if mask is None or mask.shape[-1] == context_length:
        return mask
    return mask.expand(*mask.shape[:-1], context_length).contiguous()
