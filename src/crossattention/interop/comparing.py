"""How two outputs differ: every tensor, number, text and cache in them, at the place where it stands; and copies of inputs."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference in a dtype, relative to the largest number of the output where that is above one."""
PLAIN = (str, bytes, bool, int, float, complex, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)
"""What is compared by `==`; numbers by how far they are apart."""
LONGEST = 60
"""Characters of a value that are shown."""


class Found(NamedTuple):
    """How far two things are apart, how far they may be, where that is, and what they are if no number says it."""

    apart: float
    allowed: float
    where: str = ""
    what: str = ""

    @property
    def excess(self) -> float:
        """How many times what is allowed it is; above one it is too large."""
        return self.apart / self.allowed if self.allowed else (float("inf") if self.apart else 0.0)

    def __str__(self) -> str:
        at = f" at {self.where}" if self.where else ""
        if self.what:
            return f"{self.what}{at}"
        return f"it differs by {self.apart:.1e} where {self.allowed:.1e} is allowed{at}"


def difference(own: Any, ours: Any, tolerance: float | None = None) -> Found:
    """The difference between two outputs that exceeds what is allowed the most.

    It is relative to the largest number of a tensor where that is above one, and infinite where structure, types, shapes, integers,
    texts or NaN differ. Objects are compared by their attributes, but for modules, functions and what begins with an underscore.
    """
    found = list(_differences(own, ours, "", tolerance, set()))
    return max(found, key=lambda one: one.excess, default=Found(0.0, _allowed(None, tolerance)))


def _differences(own: Any, ours: Any, where: str, tolerance: float | None, seen: set[tuple[int, int]]) -> Iterator[Found]:
    if isinstance(own, Tensor) and isinstance(ours, Tensor):
        yield _of_tensors(own, ours, where, tolerance)
    elif isinstance(own, int | float) and isinstance(ours, int | float) and not isinstance(own, bool):
        if isinstance(own, int) and isinstance(ours, int):
            yield _same(own == ours, own, ours, where, tolerance)
        else:  # a loss by `.item()`, most of all
            yield _of_tensors(torch.tensor(float(own)), torch.tensor(float(ours)), where, tolerance)
    elif isinstance(own, PLAIN) or isinstance(ours, PLAIN) or isinstance(own, Tensor) or isinstance(ours, Tensor):
        yield _same(type(own) is type(ours) and own == ours, own, ours, where, tolerance)
    elif own is ours or (id(own), id(ours)) in seen:
        return
    else:
        seen.add((id(own), id(ours)))
        yield from _of_parts(own, ours, where, tolerance, seen)


def _of_parts(own: Any, ours: Any, where: str, tolerance: float | None, seen: set[tuple[int, int]]) -> Iterator[Found]:
    if isinstance(own, Mapping) and isinstance(ours, Mapping):
        for key in {**own, **ours}:
            if key in own and key in ours:
                yield from _differences(own[key], ours[key], f"{where}[{key!r}]", tolerance, seen)
            else:
                yield _same(False, own.get(key, "nothing"), ours.get(key, "nothing"), f"{where}[{key!r}]", tolerance)
    elif isinstance(own, Set) and isinstance(ours, Set):
        yield _same(own == ours, own, ours, where, tolerance)
    elif isinstance(own, Sequence) and isinstance(ours, Sequence):
        yield _same(len(own) == len(ours), f"{len(own)} items", f"{len(ours)} items", where, tolerance)
        for index, (one, other) in enumerate(zip(own, ours, strict=False)):
            yield from _differences(one, other, f"{where}[{index}]", tolerance, seen)
    elif not isinstance(ours, type(own)):  # what is made when it is asked for is of a class made of the own one
        yield _same(False, own, ours, where, tolerance)
    elif hasattr(own, "__array__"):
        arrays = [torch.as_tensor(one) if one.dtype.kind in "biufc" else one.tolist() for one in (own, ours)]
        yield from _differences(*arrays, where, tolerance, seen)
    elif not isinstance(own, nn.Module | type) and not callable(own):
        before, after = _attributes(own), _attributes(ours)
        for name in {**before, **after}:
            yield from _differences(before.get(name), after.get(name), f"{where}.{name}", tolerance, seen)


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds, as caches hold layers, and layers tensors."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    held: dict[str, Any] = getattr(value, "__dict__", {})
    return {name: one for name, one in held.items() if not name.startswith("_") and not isinstance(one, nn.Module)}


def _same(is_same: bool, own: Any, ours: Any, where: str, tolerance: float | None) -> Found:
    """Nothing apart, or what was given instead of what."""
    if is_same:
        return Found(0.0, _allowed(None, tolerance), where)
    return Found(float("inf"), _allowed(None, tolerance), where, f"it gives {_shown(ours)} instead of {_shown(own)}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}, {value.dtype}"
    text = repr(value) if isinstance(value, PLAIN) else f"{type(value).__name__} {value!r}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _of_tensors(own: Tensor, ours: Tensor, where: str, tolerance: float | None) -> Found:
    allowed = _allowed(own, tolerance)
    if own.is_nested or ours.is_nested:
        if not (own.is_nested and ours.is_nested) or own.shape[0] != ours.shape[0]:
            return _same(False, own, ours, where, tolerance)
        found = [_of_tensors(a, b, where, tolerance) for a, b in zip(own.unbind(), ours.unbind(), strict=True)]
        return max(found, key=lambda one: one.excess, default=Found(0.0, allowed, where))
    if own.shape != ours.shape:
        return _same(False, own, ours, where, tolerance)
    own, ours = own.detach(), ours.detach()
    if own.numel() == 0:
        return Found(0.0, allowed, where)
    if not (own.is_floating_point() or own.is_complex()):
        count = int((own != ours).sum()) if own.shape == ours.shape else 0
        what = f"it gives other integers in {count} of {own.numel()} places" if count else ""
        return Found(float("inf") if count else 0.0, allowed, where, what)
    same = (own == ours) | (own.isnan() & ours.isnan())
    if bool(same.all()):
        return Found(0.0, allowed, where)
    kind = torch.complex128 if own.is_complex() else torch.float64
    own, ours = own.to(kind), ours.to(kind)
    apart = torch.where(same, 0.0, (own - ours).abs())
    finite = own[own.isfinite()].abs()
    scale = max(1.0, float(finite.amax()) if finite.numel() else 1.0)
    worst = float(apart.amax())
    if worst != worst or worst == float("inf"):
        return Found(float("inf"), allowed, where, "one of them is NaN or infinite where the other is not")
    return Found(worst / scale, allowed, where)


def _allowed(own: Tensor | None, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return TOLERANCES.get(torch.float32 if own is None else own.dtype, TOLERANCES[torch.float32])


# ------------------------------------------------------------------------------------------------------ copies of inputs


def copied(example: Any) -> Any:
    """A copy of a model's inputs, for one run of several: a cache among them is written to by each.

    Raises:
        ValueError: an input cannot be copied; it says which.
    """
    memo: dict[int, Any] = {}
    _copy_tensors(example, memo, set())
    named = example if isinstance(example, Mapping) else dict(enumerate(example)) if isinstance(example, tuple | list) else {}
    for name, value in named.items():
        try:
            copy.deepcopy(value, dict(memo))
        except Exception as error:
            why = (str(error) or "no reason given").splitlines()[0]
            raise ValueError(
                f"input {name!r} of the example, a {type(value).__name__}, cannot be copied for the second run "
                f"({type(error).__name__}: {why}); pass a function of the model that makes it anew, as "
                "`example=lambda model: model(...)`"
            ) from error
    return copy.deepcopy(example, memo)


def _copy_tensors(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Enter copies of all tensors: by itself, `deepcopy` refuses those that have a graph. Modules are shared, not copied."""
    if id(value) in seen or isinstance(value, PLAIN):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        memo[id(value)] = value.detach().clone()
    elif isinstance(value, nn.Module):
        memo[id(value)] = value
    elif isinstance(value, Mapping):
        for one in value.values():
            _copy_tensors(one, memo, seen)
    elif isinstance(value, Sequence):
        for one in value:
            _copy_tensors(one, memo, seen)
    else:
        for one in _attributes(value).values():
            _copy_tensors(one, memo, seen)
