"""Seeing what a module hands to its attention kernel: torch's fused one, or a softmax of its own. Both run as they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crossattention.interop.rows import KernelRows, WeightRows
from crossattention.maps.blocks import MapRows

SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)


class _Open(threading.local):
    """The watches that are open in this thread, the innermost last."""

    def __init__(self) -> None:
        self.watches: list[KernelWatch] = []


_open = _Open()


class KernelWatch(TorchFunctionMode):
    """While it is entered, each attention kernel of this thread that no inner watch sees is told of, after it has run.

    Args:
        tell: called with the rows of the kernel's map.
        batch: items of the batch, by which a map of (z h, n, m) is taken apart.
        length: n of the queries; None if the kernel has it right. Fused kernels may get grouped heads laid into it.
        guess: the mask and the scale that a softmax of the module's own is likely of.
    """

    def __init__(
        self,
        tell: Callable[[MapRows], None],
        batch: int,
        length: int | None = None,
        guess: tuple[Tensor | None, float] = (None, 1.0),
    ) -> None:
        super().__init__()
        self._tell, self._batch, self._length, self._guess = tell, batch, length, guess
        self._last_product: tuple[Tensor, Tensor] | None = None
        self.seen = 0

    def __enter__(self) -> KernelWatch:
        super().__enter__()
        _open.watches.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _open.watches.pop()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and look at it if it is a kernel."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _open.watches[-1] is self:
            if func is F.scaled_dot_product_attention:
                self._take(self._fused_rows(*args, **kwargs))
            elif func in PRODUCTS:
                self._last_product = args[:2] if len(args) > 1 else None
            elif func in SOFTMAXES and _is_over_rows(out, args, kwargs):
                self._take(WeightRows(self._by_item(out), self._guesses(out), self._guess[0]))
        return out

    def _take(self, rows: MapRows) -> None:
        self.seen += 1
        if self.seen == 1:
            self._tell(rows)

    def _fused_rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> KernelRows:
        if attn_mask is not None and query.dim() == attn_mask.dim() == 3 and attn_mask.shape[0] > 1:
            attn_mask = self._by_item(attn_mask)
        query, key = self._by_item(query), self._by_item(key)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self._length is not None and query.shape[2] != self._length:
            query, attn_mask = _unpacked(query, self._length), None if attn_mask is None else _unpacked(attn_mask, self._length)
        return KernelRows(query, key, attn_mask, scale=scale, is_causal=is_causal)

    def _guesses(self, weights: Tensor) -> list[KernelRows]:
        """What the softmax may have been of: the product before it, scaled there or earlier, and the mask."""
        if self._last_product is None:
            return []
        queries, keys = self._last_product
        if queries.dim() != weights.dim() or keys.dim() != weights.dim() or (*queries.shape[:-1], keys.shape[-1]) != weights.shape:
            return []
        queries, keys = self._by_item(queries), self._by_item(keys).transpose(-1, -2)
        mask, scale = self._guess
        scales = dict.fromkeys((scale, 1.0, queries.shape[-1] ** -0.5))
        return [KernelRows(queries, keys, mask, scale=one) for one in scales]

    def _by_item(self, tensor: Tensor) -> Tensor:
        """(z, h, n, m) of the same, or of (z h, n, m)."""
        if tensor.dim() == 4:
            return tensor
        items = self._batch if self._batch and tensor.shape[0] % self._batch == 0 else 1
        return tensor.unflatten(0, (items, -1))


def watch_kernel(
    listeners: Sequence[Any],
    module: nn.Module,
    kind: str,
    forward: Callable[[], Any],
    *,
    batch: int,
    length: int | None = None,
    cache: object = None,
    mask: Tensor | None = None,
) -> Any:
    """Run a module's forward pass, and tell those who want attention of this kind of its one kernel.

    Args:
        listeners: recordings.
        module: whose forward pass it is.
        kind: "cross" or "self".
        forward: the pass.
        batch: items of the batch.
        length: n; None if the kernel gets queries as (z, h, n, k).
        cache: what tells a generation from another.
        mask: what a softmax of the module's own is likely to add to its scores, where the call has it.
    """
    wanting = [listener for listener in listeners if listener.wants(kind)]
    if not wanting:
        return forward()

    def tell(rows: MapRows) -> None:
        for listener in wanting:
            listener.take(module, kind, lambda: rows, cache)

    scale = next((s for name in ("scaling", "scale") if isinstance(s := getattr(module, name, None), float)), 1.0)
    with KernelWatch(tell, batch, length, (mask, scale)) as watch:
        out = forward()
    if watch.seen != 1:
        for listener in wanting:
            listener.trouble(module, kind, _reason(module, watch.seen))
    return out


def innermost(model: nn.Module, is_attention: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Of a model's attention modules those that hold no other one: they run the kernels."""
    found = [module for module in model.modules() if is_attention(module)]
    known = {id(module) for module in found}
    return [module for module in found if not any(id(inner) in known for inner in module.modules() if inner is not module)]


def _reason(module: nn.Module, seen: int) -> str:
    """Why a module's kernels cannot be shown."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    using = "" if name is None else f' (attn_implementation="{name}")'
    if seen:
        return f"it ran {seen} kernels in one call, as attention in slices does{using}; switch slicing off to see one map"
    return (
        f"it ran neither torch's scaled_dot_product_attention nor a softmax over rows{using}; "
        'load the model with attn_implementation="sdpa" or "eager", or without a kernel of its own'
    )


def _is_over_rows(out: Tensor, args: Any, kwargs: Any) -> bool:
    """Whether a softmax gave rows of maps, (z, h, n, m) or (z h, n, m)."""
    return out.dim() in (3, 4) and kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, out.dim() - 1)


def _unpacked(tensor: Tensor, length: int) -> Tensor:
    """Heads (z, g, s n, ...) that share keys and were laid into the length, as (z, g s, n, ...)."""
    if tensor.shape[2] in (1, length):
        return tensor
    return tensor.unflatten(2, (-1, length)).flatten(1, 2)
