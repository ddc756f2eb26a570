"""Dynamic time warping, row by row: the monotonic path through a map, read once in the order of its queries.

Legend: n queries, m context positions, i, j indices of both; a dot before the last dimensions: any number of maps at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Paths:
    """Paths of least cost from (0, 0) to (n - 1, length - 1) by steps of one query, one position, or one of both.

    D[i, j] = 1 - w[i, j] + min(D[i-1, j-1], D[i-1, j], D[i, j-1])

    Within a row, the chain of minima from the left has a closed form: with C the running sum of the row's costs and E the better of
    the two cells above, D[j] = C[j] + (running minimum of E[j] - C[j-1]). Of each cell two bits are kept: whether the best path to
    it enters the row there, and whether it would enter by the diagonal; equal costs go by the diagonal.

    Args:
        shape: (..., n, m) of all maps.
        device: where they are.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        *maps, n, m = shape
        self._above = torch.zeros(*maps, m, dtype=torch.float64, device=device)
        self._bits = torch.zeros(2, *maps, n, -(-m // 8), dtype=torch.uint8, device=device)
        self._columns = torch.arange(m, device=device)

    def read(self, place: tuple[slice, ...], i: int, weights: Tensor) -> None:
        """Row i of the maps at `place`: weights (..., m)."""
        costs = 1.0 - weights.double()
        sums = costs.cumsum(-1)
        if i == 0:
            self._above[place] = sums
            is_entry = (self._columns == 0).expand(sums.shape)
            by_diagonal = torch.zeros_like(is_entry)
        else:
            above = self._above[place]
            diagonal = torch.nn.functional.pad(above[..., :-1], (1, 0), value=torch.inf)
            by_diagonal = diagonal <= above
            best, entry = (torch.minimum(above, diagonal) - (sums - costs)).cummin(-1)
            self._above[place] = sums + best
            is_entry = entry == self._columns
        for kind, bits in enumerate((is_entry, by_diagonal)):
            self._bits[kind][(*place, i)] = _packed(bits)

    def trace(self, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First and last position of each query on its map's path, (..., n), and the costs (...).

        Args:
            lengths: (...), how many positions the path runs through; at least 1.
        """
        n = self._bits.shape[-2]
        last = (lengths - 1).expand(self._above.shape[:-1]).unsqueeze(-1)
        costs = self._above.gather(-1, last).squeeze(-1)
        firsts, lasts = torch.empty(2, *self._above.shape[:-1], n, dtype=torch.int64, device=last.device).unbind()
        for i in reversed(range(n)):
            is_entry, by_diagonal = (_unpacked(bits[..., i, :])[..., : self._columns.shape[0]] for bits in self._bits)
            first = torch.where(is_entry & (self._columns <= last), self._columns, 0).amax(-1, keepdim=True)
            firsts[..., i], lasts[..., i] = first.squeeze(-1), last.squeeze(-1)
            last = first - by_diagonal.gather(-1, first).long()
        return firsts, lasts, costs


_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)


def _packed(bits: Tensor) -> Tensor:
    """Bool (..., m) as bytes (..., m / 8, rounded up)."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded * torch.tensor(_VALUES, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """Bytes (..., c) as bool (..., 8 c)."""
    return (packed.unsqueeze(-1) & torch.tensor(_VALUES, dtype=torch.uint8, device=packed.device)).bool().flatten(-2)
