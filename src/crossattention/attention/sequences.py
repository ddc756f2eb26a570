"""Sequences of unlike lengths at the border: lists of tensors and jagged nested tensors, packed end to end and given back.

Lists and jagged tensors are forms of input and output, nothing is computed in them: here they become one tensor of rows, item after
item in any order that is asked for, and a result of such rows becomes what the input was.

Legend: z items, n rows of one item, t rows of all items together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Form = Literal["list", "jagged", "dense"]
Rows: TypeAlias = Any
"""A tensor; of ragged sequences a list with one tensor an item, or a jagged tensor. Checked at the border."""


def is_ragged(value: object) -> bool:
    """Whether something is a list of tensors or a nested tensor."""
    return isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.is_nested)


def check_is_tensor(name: str, value: object) -> None:
    """Refuse what is no dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor (batch, length, width), got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor here, got a nested one; pad it with nested.to_padded_tensor(0.0) and say in "
            "context_mask what is real"
        )


@dataclass(frozen=True, eq=False)
class Sequences:
    """Items of unlike lengths, and the form that they came in.

    Args:
        form: "list", "jagged" or "dense".
        lengths: rows of each item.
        items: the tensors (n, ...) of a list; else empty.
        rows: (t or more, ...), all items' rows, of a jagged or dense tensor.
        starts: where in `rows` each item begins.
        offsets: of a jagged tensor, which its result shares, so that both have one ragged dimension.
    """

    form: Form
    lengths: tuple[int, ...]
    items: tuple[Tensor, ...] = ()
    rows: Tensor | None = None
    starts: tuple[int, ...] = ()
    offsets: Tensor | None = None

    @classmethod
    def of(cls, name: str, value: object, dims: int = 2) -> Sequences:
        """The sequences that a list or a jagged tensor holds.

        Args:
            name: what the value is called in errors.
            value: a list of tensors of `dims` dimensions, or a jagged tensor of one more.
            dims: dimensions of one item, the ragged one first.

        Raises:
            TypeError: neither, an item that is no tensor, or a nested tensor of another layout than jagged.
            ValueError: an item, or the jagged tensor, has another number of dimensions; offsets that its values do not have.
        """
        if isinstance(value, list | tuple):
            _check_items(name, value, dims)
            return cls("list", tuple(item.shape[0] for item in value), items=tuple(value))
        if not isinstance(value, Tensor) or not value.is_nested:
            raise TypeError(f"{name} must be a list of tensors or a jagged nested tensor, got {type(value).__name__}")
        if value.layout != torch.jagged:
            raise TypeError(
                f"{name} are a nested tensor of layout {value.layout}; build it with torch.nested.nested_tensor(..., "
                "layout=torch.jagged), or pass the list nested.unbind()"
            )
        if value.dim() != dims + 1 or getattr(value, "_ragged_idx", 1) != 1:
            raise ValueError(
                f"{name} as a jagged tensor must have {dims + 1} dimensions, the second of them ragged, got shape "
                f"{tuple(value.shape)}"
            )
        offsets, held = _bounds_of(value)
        bounds = offsets.tolist()
        starts = tuple(bounds[:-1])
        lengths = tuple(e - s for s, e in pairwise(bounds)) if held is None else tuple(held.tolist())
        rows = value.values().shape[0]
        wrong = next((i for i, (s, n) in enumerate(zip(starts, lengths, strict=True)) if s < 0 or n < 0 or s + n > rows), None)
        if wrong is not None:
            end = starts[wrong] + lengths[wrong]
            raise ValueError(
                f"{name}[{wrong}] of a jagged tensor is said to be rows {starts[wrong]} to {end} of {rows}; "
                "offsets must not decrease, nor end after the values"
            )
        return cls("jagged", lengths, rows=value.values(), starts=starts, offsets=offsets if held is None else None)

    @classmethod
    def of_dense(cls, tensor: Tensor) -> Sequences:
        """The items of a tensor (z, n, ...), all of one length."""
        z, n = tensor.shape[:2]
        return cls("dense", (n,) * z, rows=tensor.flatten(0, 1), starts=tuple(range(0, z * n, n)) if n else (0,) * z)

    @property
    def total(self) -> int:
        """Rows of all items, t."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Rows of the longest item; 0 without items."""
        return max(self.lengths, default=0)

    @property
    def are_equal(self) -> bool:
        """Whether all items have one length, so that they are a dense tensor."""
        return len(set(self.lengths)) == 1

    def sample(self) -> Tensor | None:
        """A tensor with the items' dtype, device and widths; None of an empty list."""
        return self.rows if self.rows is not None else next(iter(self.items), None)

    def requires_grad(self) -> bool:
        """Whether a gradient is asked of any item."""
        return any(t.requires_grad for t in (self.items if self.rows is None else (self.rows,)))

    def packed(self, order: Sequence[int] | None = None) -> Tensor:
        """All items' rows (t, ...), item after item in some order, by default theirs; no copy where they lie so already."""
        order = range(len(self.lengths)) if order is None else order
        if self.rows is None:
            return torch.cat([self.items[i] for i in order])
        starts, lengths = [self.starts[i] for i in order], [self.lengths[i] for i in order]
        if starts == starts_of(lengths):
            return self.rows if self.rows.shape[0] == self.total else self.rows[: self.total]
        return self.rows.index_select(0, rows_at(starts, lengths, self.rows.device))

    def dense(self) -> Tensor:
        """Items of one length as a tensor (z, n, ...)."""
        if self.rows is None:
            return torch.stack(self.items)
        rows = self.packed()
        return rows.view(len(self.lengths), self.lengths[0], *rows.shape[1:])

    def like(self, packed: Tensor, order: Sequence[int]) -> Tensor | list[Tensor]:
        """Rows (t, ...) that stand for the items in some order, in the items' own order and form."""
        lengths = [self.lengths[i] for i in order]
        if self.form == "list":
            found: list[Tensor] = [packed] * len(lengths)
            for item, rows in zip(order, packed.split(lengths) if lengths else (), strict=True):
                found[item] = rows
            return found
        where = dict(zip(order, starts_of(lengths), strict=True))
        starts = [where[i] for i in range(len(lengths))]
        if starts != starts_of(self.lengths):
            packed = packed.index_select(0, rows_at(starts, self.lengths, packed.device))
        if self.form == "dense":
            dense: Tensor = packed.view(len(lengths), self.lengths[0] if lengths else 0, *packed.shape[1:])
            return dense
        offsets = self.offsets
        if offsets is None:
            offsets = torch.tensor([0, *accumulate(self.lengths)], device=packed.device)
        jagged: Tensor = torch.nested.nested_tensor_from_jagged(packed, offsets)
        return jagged

    def of_equal(self, tensor: Tensor) -> Tensor | list[Tensor]:
        """A dense result (z, n, ...) of items of one length, in the items' form."""
        return list(tensor.unbind()) if self.form == "list" else self.like(tensor.flatten(0, 1), range(len(self.lengths)))


def _bounds_of(jagged: Any) -> tuple[Tensor, Tensor | None]:
    """Offsets of a jagged tensor, and lengths where it has holes: methods that torch's types do not know."""
    return jagged.offsets(), jagged.lengths()


def starts_of(lengths: Sequence[int]) -> list[int]:
    """Where each of some items begins when they lie end to end."""
    return [0, *accumulate(lengths)][:-1]


def rows_at(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Indices of the rows of items that begin at `starts` and have `lengths`, one item after the other."""
    counts, begins = (torch.tensor(list(numbers), dtype=torch.int64, device="cpu") for numbers in (lengths, starts))
    shifts = begins - (counts.cumsum(0) - counts)
    return (torch.repeat_interleave(shifts, counts) + torch.arange(int(counts.sum()), device="cpu")).to(device)


def _check_items(name: str, items: Sequence[object], dims: int) -> None:
    """Refuse a list of anything but tensors of so many dimensions, of one dtype and device and of the same widths."""
    first: Tensor | None = None
    for place, item in enumerate(items):
        if not isinstance(item, Tensor):
            raise TypeError(f"{name}[{place}] must be a tensor, got {type(item).__name__}; a list holds one tensor an item")
        if item.is_nested or item.dim() != dims:
            wanted = "(length, width)" if dims == 2 else "(length,)"
            raise ValueError(
                f"{name}[{place}] must be {wanted}, got {tuple(item.shape)}; a list holds items without a batch dimension"
            )
        first = item if first is None else first
        if item.dtype != first.dtype or item.device != first.device or item.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{name}[{place}] is {item.dtype} {tuple(item.shape)} on {item.device}, but {name}[0] {first.dtype} "
                f"{tuple(first.shape)} on {first.device}; all items must have one width, dtype and device"
            )
