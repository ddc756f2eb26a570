"""Maps of kernels that are not ours, whose rows are made when they are asked for, from what was handed to the kernel.

Legend: z batch, h heads, g key-value heads, n queries, m context positions, k width of a head; t steps of a generation, f sequences
that it gave.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossattention.attention import execute
from crossattention.attention.masks import ScoreMask, combine_masks, part_of

FORBIDDEN = 0.5
"""A number below this share of a dtype's lowest one forbids a position, as -inf does: libraries add `finfo.min`, with a bias."""

CLOSE = 2e-6
"""Largest difference between a softmax and what its queries and keys are thought to give, in float32."""


class KernelRows:
    """Rows of softmax(queries keys^T scale + mask), block by block; half precision is computed in float32, as fused kernels do.

    Args:
        queries: (z or 1, h, n, k).
        keys: (z or 1, g, m, k), g a divisor of h.
        mask: bool (True = may be attended) or floating and added, broadcastable to (z, h, n, m).
        scale: factor of the scores.
        is_causal: whether query i reads positions up to i only.
    """

    repeats = None
    makes_all_heads = False

    def __init__(self, queries: Tensor, keys: Tensor, mask: Tensor | None, *, scale: float, is_causal: bool = False) -> None:
        self.queries, self.keys = execute.to_autocast_dtype(queries.detach(), keys.detach())
        self.mask = None if mask is None else mask.detach().reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        self.scale, self.is_causal = scale, is_causal
        self._context_mask: Tensor | None = None
        self._last_keys: tuple[tuple[slice, slice], Tensor] | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Of the whole map: z, 1, h, n, m."""
        z, h, n, m = self.shape
        return z, 1, h, n, m

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the whole map: (z, h, n, m)."""
        z = max(self.queries.shape[0], self.keys.shape[0]) if 0 not in (self.queries.shape[0], self.keys.shape[0]) else 0
        return z, self.queries.shape[1], self.queries.shape[2], self.keys.shape[2]

    @property
    def key_heads(self) -> int:
        """Number of heads that the keys have."""
        return self.keys.shape[1]

    @property
    def key_width(self) -> int:
        """Width in which scores meet."""
        return self.keys.shape[3]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.queries.device

    @property
    def context_mask(self) -> Tensor | None:
        """Bool (z, m): False at positions that no query may attend; None without a mask."""
        if self.mask is None or 0 in self.mask.shape:
            return None
        if self._context_mask is None:
            some = _some_allowed(self.mask)
            z, _, _, m = self.shape
            self._context_mask = some.expand(z, m)
        return self._context_mask

    def weights(self, items: slice, repeats: slice, heads: slice, queries: slice) -> Tensor:
        """The weights (items, heads, queries, m), new in memory; `repeats` is slice(0, 1)."""
        m, n = self.shape[3], queries.stop - queries.start
        count = items.stop - items.start
        if 0 in (count, n, m):
            dtype = torch.float64 if self.queries.dtype == torch.float64 else torch.float32
            return torch.zeros(count, heads.stop - heads.start, n, m, dtype=dtype, device=self.keys.device)
        some, keys = part_of(self.queries, items, slice(None), queries)[:, heads], self._keys_of(items, heads)
        with torch.autocast(some.device.type, enabled=False):
            return execute.explicit_weights(some, keys.expand(count, -1, -1, -1), self._mask(items, heads, queries), self.scale)

    def _keys_of(self, items: slice, heads: slice) -> Tensor:
        """The keys that some heads read; those of one head are laid out whole, once, as other rows of it will follow."""
        share = self.shape[1] // self.key_heads
        groups = slice(heads.start // share, (heads.stop - 1) // share + 1)
        keys = part_of(self.keys, items)[:, groups]
        if groups.stop - groups.start > 1:
            return keys
        if self._last_keys is None or self._last_keys[0] != (items, groups):
            dtype = torch.float32 if keys.dtype in (torch.bfloat16, torch.float16) else keys.dtype
            self._last_keys = None  # before the next is made, so that two are never held
            self._last_keys = (items, groups), keys.to(dtype).contiguous()
        return self._last_keys[1]

    def _mask(self, items: slice, heads: slice, queries: slice) -> ScoreMask:
        """What is added to or cut from some scores."""
        mask = None if self.mask is None else part_of(self.mask, items, heads, queries)
        m, device = self.shape[3], self.keys.device
        if self.is_causal:
            causal = torch.ones(queries.stop - queries.start, m, dtype=torch.bool, device=device).tril(queries.start)
            mask = _only_where(causal, mask)
        return combine_masks(None, mask, None, m, self.queries.dtype)

    def step_after(self, last: KernelRows | None) -> KernelRows:
        """What a generation keeps of these rows: keys once, and a mask once while it does not change.

        Args:
            last: what it keeps of the step before; None for the first one.
        """
        if last is None:
            return KernelRows(self.queries, self.keys, self.mask, scale=self.scale)
        mask = None if self.mask is None else self.mask[:, :, -1:]
        if mask is not None and last.mask is not None:
            before = last.mask[:, :, -1:]
            mask = last.mask if before.shape == mask.shape and torch.equal(before, mask) else mask.clone()
        none = self.keys.new_empty(0, *self.keys.shape[1:])  # a view of none would keep all
        return KernelRows(self.queries[:, :, -1:], none, mask, scale=self.scale)

    @classmethod
    def of_steps(cls, steps: Sequence[KernelRows], picks: Tensor) -> KernelRows:
        """The rows of whole sequences out of those of their steps.

        Args:
            steps: the first with all its queries, of the others the last one counts.
            picks: (f, t) the item of each step that a sequence goes through; -1 where it has ended, whose rows are zero.
        """
        first = steps[0]
        items = picks.clamp(min=0)
        parts = [_items(step.queries, items[:, s]) for s, step in enumerate(steps)]
        n0, queries = parts[0].shape[2], torch.cat(parts, 2)
        mask = cls._mask_of_steps(steps, items, n0)
        if bool((picks < 0).any()):
            is_real = torch.cat((picks[:, :1].expand(-1, n0), picks[:, 1:]), 1) >= 0
            mask = _only_where(is_real[:, None, :, None], mask)
        return cls(queries, _items(first.keys, items[:, 0]), mask, scale=first.scale)

    @staticmethod
    def _mask_of_steps(steps: Sequence[KernelRows], items: Tensor, n0: int) -> Tensor | None:
        """One mask (f or 1, h or 1, 1, m) where the steps share it, else one with a row for each query."""
        masks = [step.mask for step in steps]
        first = masks[0]
        if first is not None and all(mask is first for mask in masks):
            row = first[:, :, -1:]
            if torch.equal(first, row.expand_as(first)):
                return _items(row, items[:, 0])
        if all(mask is None for mask in masks):
            return None
        shown = [_as_added(mask, steps[0].keys) for mask in masks]
        parts = [_items(mask if s == 0 else mask[:, :, -1:], items[:, s]) for s, mask in enumerate(shown)]
        parts[0] = parts[0].expand(-1, -1, n0, -1)
        f, h = max(part.shape[0] for part in parts), max(part.shape[1] for part in parts)
        return torch.cat([part.expand(f, h, -1, -1) for part in parts], 2)


class WeightRows:
    """Rows of a map that a model made whole itself, by a softmax of its own.

    Args:
        whole: (z, h, n, m), before dropout.
        guesses: maps of queries and keys of which one may be this one.
        mask: what the call had as a mask, bool or added to scores; only where it is one of four dimensions tells it of positions.
    """

    repeats = None
    makes_all_heads = False
    key_width = 1

    def __init__(self, whole: Tensor, guesses: Sequence[KernelRows] = (), mask: Tensor | None = None) -> None:
        self.whole, self._guesses = whole.detach(), guesses
        is_of_these = mask is not None and mask.dim() == 4 and 0 not in mask.shape and _broadcasts(mask.shape, self.shape)
        self._mask = mask.detach() if mask is not None and is_of_these else None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Of the whole map: z, 1, h, n, m."""
        z, h, n, m = self.shape
        return z, 1, h, n, m

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the whole map: (z, h, n, m)."""
        z, h, n, m = self.whole.shape
        return z, h, n, m

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.whole.device

    @property
    def key_heads(self) -> int:
        """Every head has rows of its own."""
        return self.whole.shape[1]

    @property
    def context_mask(self) -> Tensor | None:
        """Bool (z, m): False at positions that the mask of the call forbids every query; None without one."""
        z, _, _, m = self.shape
        return None if self._mask is None else _some_allowed(self._mask).expand(z, m)

    def weights(self, items: slice, repeats: slice, heads: slice, queries: slice) -> Tensor:
        """The weights (items, heads, queries, m), in float32 at least; `repeats` is slice(0, 1)."""
        some = self.whole[items, heads, queries]
        return some.float() if some.dtype in (torch.bfloat16, torch.float16) else some

    def step_after(self, last: WeightRows | KernelRows | None) -> WeightRows | KernelRows:
        """What a generation keeps of these rows: queries and keys where they are known to give them, else the rows themselves.

        Raises:
            ValueError: queries and keys gave the steps before, and do not give this one.
        """
        if not isinstance(last, WeightRows):
            known = next((guess for guess in self._guesses if self._is(guess)), None)
            if known is not None:
                return known.step_after(last)
            if last is not None:
                raise ValueError("its first steps were a softmax of queries and keys with their mask, and a later one is not")
        if last is not None:
            return WeightRows(self.whole[:, :, -1:].clone())
        return WeightRows(self.whole.clone(), mask=None if self._mask is None else self._mask[:, :, -1:].clone())

    def _is(self, guess: KernelRows) -> bool:
        """Whether a guess gives the first and the last of these rows."""
        z, h, n, m = self.shape
        mask = guess.mask
        if 0 in (z, n, m) or (mask is not None and not _broadcasts(mask.shape, self.shape)):
            return False
        items, heads = slice(0, z), slice(0, h)
        ends = [guess.weights(items, slice(0, 1), heads, slice(row, row + 1)) for row in (0, n - 1)]
        tolerance = CLOSE if self.whole.dtype in (torch.float32, torch.float64) else torch.finfo(self.whole.dtype).eps
        difference = (torch.cat(ends, 2) - self.whole[:, :, [0, n - 1]]).abs().amax()
        return bool(difference <= tolerance)

    @classmethod
    def of_steps(cls, steps: Sequence[WeightRows], picks: Tensor) -> WeightRows:
        """The rows of whole sequences out of those of their steps; Args as for `KernelRows.of_steps`."""
        items = picks.clamp(min=0)
        parts = [_items(step.whole, items[:, s]) * (picks[:, s] >= 0)[:, None, None, None] for s, step in enumerate(steps)]
        mask = steps[0]._mask
        return cls(torch.cat(parts, 2), mask=None if mask is None else _items(mask, items[:, 0]))


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    return all(size in (1, wanted) for size, wanted in zip(shape, target, strict=True))


def _some_allowed(mask: Tensor) -> Tensor:
    """Bool (z or 1, m): whether some head of some query may attend each position; without a matrix in between."""
    if mask.dtype == torch.bool:
        return mask.amax((1, 2))
    return mask.amax((1, 2)) > torch.finfo(mask.dtype).min * FORBIDDEN


def _only_where(allowed: Tensor, mask: Tensor | None) -> Tensor:
    """A mask that forbids what it forbade and what is not allowed."""
    if mask is None:
        return allowed
    return mask & allowed if mask.dtype == torch.bool else torch.where(allowed, mask, -torch.inf)


def _as_added(mask: Tensor | None, like: Tensor) -> Tensor:
    """A mask as numbers to add, of four dimensions."""
    if mask is None:
        return torch.zeros(1, 1, 1, like.shape[2], device=like.device)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask


def _items(tensor: Tensor, rows: Tensor) -> Tensor:
    """Some items of the first dimension; one that is shared by all stays so."""
    return tensor if tensor.shape[0] == 1 and len(rows) != 1 else tensor.index_select(0, rows)
