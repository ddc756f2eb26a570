"""`Once`: a value that is computed once and kept for as long as what it was made of is unchanged.

For what depends on weights alone: projections of learned queries, of learned positions, of a vocabulary. Of changes it sees what a
`PreparedContext` sees (`prepared.fingerprint`): optimizer steps, loading, moving, casting, edits in place; not an edit in place
through `.data`, which leaves no trace: call `forget` after one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from crossattention.attention.prepared import fingerprint, watch
from crossattention.attention.products import is_traced, is_transformed

Value = TypeVar("Value")


class Once(Generic[Value]):
    """Keeps one value made of some tensors; makes it anew where one of them changed.

    Nothing is kept where a gradient has to flow into the tensors, nor inside graphs and transforms: there the value is made at each
    call. It is no parameter and no buffer, so it is not in a state dict, is not copied with its module, and follows its module to
    another device or dtype by being made again.

    Example:
        >>> once, table = Once(), torch.randn(3, 4)
        >>> first = once.get((table,), lambda: table @ table.T)
        >>> once.get((table,), lambda: table @ table.T) is first, once.get((table.mul_(2),), lambda: table @ table.T) is first
        (True, False)
    """

    def __init__(self) -> None:
        self._kept: tuple[Hashable, tuple[Any, ...], Value] | None = None

    def get(self, made_of: Sequence[Tensor | None], make: Callable[[], Value], *also: Hashable) -> Value:
        """The value: kept, or made now.

        Args:
            made_of: all tensors that it depends on; None where there is none (a bias).
            make: makes it.
            also: what else it depends on, as a size.

        Cost: a microsecond a tensor where it is kept.
        """
        tensors = [tensor for tensor in made_of if tensor is not None]
        trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if torch.compiler.is_compiling() or trains or is_transformed() or is_traced():
            return make()
        for tensor in tensors:
            watch(tensor)
        device = tensors[0].device.type if tensors else "cpu"
        is_cast = torch.is_autocast_enabled(device)
        # A tensor of inference mode must not be met by autograd, so the two modes keep values of their own.
        mode = (torch.is_inference_mode_enabled(), torch.get_autocast_dtype(device) if is_cast else None)
        key = (also, mode, tuple((*fingerprint(tensor), tensor.device) for tensor in tensors))
        kept = self._kept  # read and written at once, so that a thread never meets half of what another one made
        if kept is not None and kept[0] == key:
            return kept[2]
        self._kept = kept = None  # before the next is made, so that two are never held
        with torch.no_grad():
            value = make()
        # The tensors themselves are held too: the address of one that is gone may be another's.
        self._kept = key, tuple(tensors), value
        return value

    def forget(self) -> None:
        """Drop what is kept."""
        self._kept = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Once[Value]:
        return Once()

    def __reduce__(self) -> tuple[Any, ...]:
        return Once, ()
