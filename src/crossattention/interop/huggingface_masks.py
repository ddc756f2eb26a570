"""The masks that `transformers` hands to its attention, as ours: True = may be attended, and one for all rows that read one source.

Its kernels get bool masks (True = may be attended), or numbers that are added to the scores, the lowest of the dtype where nothing
may be attended.
"""

from __future__ import annotations

import sys
import weakref

import torch
from torch import Tensor


class Masks:
    """Turns masks, and remembers the last: all layers of a model get the same one."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, Tensor | None] | None = None

    def read(self, mask: Tensor, rows: int, length: int) -> tuple[Tensor | None, Tensor | None]:
        """A context mask, or a pair mask, of what is masked.

        Args:
            mask: (z r or 1, h or 1, n or 1, m), bool or floating.
            rows: how many rows read each source, r; their queries are laid into the length.
            length: n.

        Returns:
            bool (z, m), or None; and bool or floating, broadcastable to (z, h, r n, m), or None. Both None where nothing is masked.
        """
        turned = self._as_ours(mask)
        if turned is None:
            return None, None
        mask = turned
        if mask.shape[2] == 1 or mask.stride(2) == 0:  # the same for all queries, as padding is
            mask = mask[::rows, :, :1] if mask.shape[0] > 1 else mask[:, :, :1]
            if mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[0] > 1:
                return mask[:, 0, 0], None
            return None, mask
        if rows > 1:
            heads, context_length = mask.shape[1], mask.shape[3]
            if mask.shape[0] == 1:
                mask = mask.expand(rows, -1, -1, -1)
            mask = mask.unflatten(0, (-1, rows)).transpose(1, 2).reshape(-1, heads, rows * length, context_length)
        return None, mask

    def forget(self) -> None:
        """Drop what is remembered."""
        self._last = None

    def _as_ours(self, mask: Tensor) -> Tensor | None:
        """A mask whose lowest numbers forbid: bool where it has no others but zero, None where it forbids nothing."""
        if mask.dtype == torch.bool and mask.device.type != "cpu":  # another device would be waited for
            return mask
        if mask.is_inference() or mask.requires_grad:  # without a version, or with a graph of its own
            return _unless_open(forbidding(mask))
        last = self._last  # read and written at once, as other threads turn masks too
        if last is not None and last[0]() is mask and last[1] == mask._version:
            return last[2]
        turned = _unless_open(forbidding(mask))
        self._last = weakref.ref(mask, self._gone), mask._version, turned
        return turned

    def _gone(self, gone: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is gone:
            self.forget()


def forbidding(mask: Tensor) -> Tensor:
    """Half of the dtype's lowest number and less is a masked position, also where something was added to it."""
    if mask.dtype == torch.bool:
        return mask
    closed = mask <= torch.finfo(mask.dtype).min / 2
    if not mask.requires_grad and bool(((mask == 0) | closed).all()):
        return ~closed
    return mask.masked_fill(closed, -torch.inf)


def _unless_open(mask: Tensor) -> Tensor | None:
    """A mask, or None where it is one of padding that pads nothing, as most are: kernels have less to do without one."""
    return None if mask.dtype == torch.bool and bool(mask.all()) else mask


def weights_are_collected() -> bool:
    """Whether a model that runs in this thread was asked for its attention weights: its hooks take them from its modules."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    collected = None if collector is None else collector.get()
    return bool(collected) and any("attention" in name for name in collected)
