"""The k largest of long rows, exactly, equal ones by lowest index: by the maxima of blocks of columns where rows are long.

Each of the k largest stands in one of the k blocks whose maxima are the largest: were it in another, each of these k blocks would
hold a number that comes before it. So a long row is read once, for the maxima, and only k blocks of it are searched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORTH_BLOCKS = 32
"""Blocks are taken where a row has so many numbers for each of the k: from there on they were measured to be quicker, two to five
times (dev/LOG.md)."""


def top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, the largest first, equal ones by lowest index; and their indices.

    Args:
        values: (..., m), not negative.
        k: 1 to m.

    Returns:
        Values and indices, both (..., k).
    """
    m = values.shape[-1]
    if m < WORTH_BLOCKS * k:
        return _top_of_all(values, k)
    size = 1 << round(math.log2(m / k) / 2)  # of a block: as many maxima are searched as numbers of k blocks
    whole = m // size * size
    highest = values[..., :whole].unflatten(-1, (-1, size)).amax(-1)
    if whole < m:
        highest = torch.cat((highest, values[..., whole:].amax(-1, keepdim=True)), -1)
    # In the order of columns, so that among the candidates too the lowest index comes first.
    blocks = _taken(highest, k)[1].sort(-1).values
    columns = (blocks.unsqueeze(-1) * size + torch.arange(size, device=values.device)).flatten(-2)
    candidates = values.gather(-1, columns.clamp(max=m - 1))
    if whole < m:
        candidates.masked_fill_(columns >= m, -1.0)
    best, at = _top_of_all(candidates, k)
    return best, columns.gather(-1, at)


def _top_of_all(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same by torch's topk, which leaves open which of equal numbers it takes and in what order."""
    best, at = _taken(values, k)
    if bool((best[..., 1:] >= best[..., :-1]).any()):
        at, order = at.sort(-1)
        best, order = best.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        at = at.gather(-1, order)
    return best, at


def _taken(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest, the first ones of those that are equal to the smallest; in descending order but for rows with equal ones."""
    best, at = values.topk(min(k + 1, values.shape[-1]))
    if best.shape[-1] > k:
        is_open = best[..., k - 1] == best[..., k]  # equal numbers on both sides of the border
        best, at = best[..., :k].contiguous(), at[..., :k].contiguous()
        if bool(is_open.any()):
            best[is_open], at[is_open] = _first_of_equals(values[is_open], best[is_open][:, -1:], k)
    return best, at


def _first_of_equals(rows: Tensor, lowest: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of rows (t, m): all numbers above the lowest that is taken (t, 1), and of those equal to it the first ones, k together."""
    is_above, is_equal = rows > lowest, rows == lowest
    wanted = k - is_above.sum(-1, keepdim=True)
    is_taken = is_above | (is_equal & (is_equal.cumsum(-1, dtype=torch.int32) <= wanted))
    at = is_taken.nonzero()[:, 1].view(-1, k)
    return rows.gather(-1, at), at
