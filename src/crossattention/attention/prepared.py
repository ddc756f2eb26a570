"""What is made once and read many times: `PreparedContext` of B, `PreparedQueries` of learned queries; and the stamp of both.

Legend: z batch, n queries, m context length, a width of the queries, h heads, g key-value heads, c width in which scores meet.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as pytree

from crossattention.plan import Plan

# Fused optimizers change weights without touching `Tensor._version`; the steps over parameters that a stamp watches are counted
# here, by the parameter's id, which stays in the table as long as the parameter lives.
_optimizer_steps: dict[int, int] = {}

# Weights that FSDP2 gathers before each use lie at another address each time, and change where their shards are written to, which
# torch keeps beside them: its record of each by the gathered weight's id.
_records: dict[int, weakref.ref[Any]] = {}


def _count_steps(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _optimizer_steps:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in _optimizer_steps:
                _optimizer_steps[id(parameter)] += 1


register_optimizer_step_post_hook(_count_steps)


def watch(*tensors: Tensor) -> None:
    """Count the optimizer steps over parameters from now on; of those that FSDP2 gathers, over their shards."""
    new = [t for t in tensors if isinstance(t, nn.Parameter) and id(t) not in _optimizer_steps and id(t) not in _records]
    fsdp = sys.modules.get("torch.distributed.fsdp") if new else None
    kept = {id(r._unsharded_param): r for r in _records_of_fsdp()} if fsdp is not None and fsdp.FSDPModule.__subclasses__() else {}
    for parameter in new:
        record = kept.get(id(parameter))
        if record is not None:
            _records[id(parameter)] = weakref.ref(record)
            weakref.finalize(parameter, _records.pop, id(parameter), None)
        counted = parameter if record is None else record.sharded_param
        if id(counted) not in _optimizer_steps:
            _optimizer_steps[id(counted)] = 0
            weakref.finalize(counted, _optimizer_steps.pop, id(counted), None)


def _records_of_fsdp() -> list[Any]:
    """What torch keeps of each weight that `fully_shard` has sharded and that was gathered once.

    None of its names are public. Where a torch has others nothing is found, and a weight that was gathered anew counts as changed.
    """
    try:
        from torch.distributed._composable_state import _get_module_state, _module_state_mapping

        states = [_get_module_state(module) for module in list(_module_state_mapping)]
        groups = []
        for state in states:  # before torch 2.12 a state had one group
            groups += getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        return [record for group in groups if group for record in group.fsdp_params if hasattr(record, "_unsharded_param")]
    except (ImportError, AttributeError, AssertionError):
        return []


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor is replaced, moved, or written to by an optimizer, by loading, or in place."""
    key = id(tensor)
    if _records and key in _records:
        record = _records[key]()
        if record is not None:
            shard = record.sharded_param
            local = shard._local_tensor
            return key, shard._version, local._version, local.data_ptr(), tensor.dtype, id(shard), _optimizer_steps.get(id(shard))
    try:
        return key, tensor._version, tensor.data_ptr(), tensor.dtype, _optimizer_steps.get(key)
    except RuntimeError:  # inference tensors have no version, wrappers have no address
        return key, -1, -1, tensor.dtype, _optimizer_steps.get(key)


KEPT_CONTEXT = "context"
"""Name, in a stamp, of the B that a prepared context keeps."""


def _print_of(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """The fingerprint of what stands under a name; of a B that is kept, that of its memory, as engines hand on aliases."""
    return fingerprint(tensor)[1:] if name == KEPT_CONTEXT else fingerprint(tensor)


@dataclass(frozen=True, eq=False)
class Stamp:
    """Which layer made a prepared context, of which weights and which B; stamps compare equal, so graphs never depend on them."""

    owner: int | None
    names: tuple[str, ...] = ()
    prints: tuple[tuple[Any, ...], ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stamp)

    def __hash__(self) -> int:
        return hash(Stamp)

    @classmethod
    def of(cls, owner: int, tensors: Iterable[tuple[str, Tensor]]) -> Stamp:
        """A stamp of a layer's token and of the named tensors that the prepared context was made of."""
        named = tuple(tensors)
        watch(*(tensor for _, tensor in named))
        return cls(owner, tuple(name for name, _ in named), tuple(_print_of(*one) for one in named))

    def changed_since(self, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names of the tensors that are not what they were."""
        named = list(tensors)
        if len(named) == len(self.prints) and all(_print_of(*one) == then for one, then in zip(named, self.prints, strict=True)):
            return []
        now = {name: _print_of(name, tensor) for name, tensor in named}
        return [name for name, then in zip(self.names, self.prints, strict=True) if now.get(name) != then]

    def without(self, *names: str) -> Stamp:
        """The stamp with some names left out."""
        kept = [(n, p) for n, p in zip(self.names, self.prints, strict=True) if n not in names]
        return Stamp(self.owner, tuple(n for n, _ in kept), tuple(p for _, p in kept))

    def followed_by(self, tensors: Iterable[tuple[str, Tensor]]) -> Stamp:
        """The stamp with more named tensors, for a part that makes something of B before the layer does."""
        assert self.owner is not None
        more = Stamp.of(self.owner, tensors)
        return Stamp(self.owner, self.names + more.names, self.prints + more.prints)

    def changed_among(self, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names of these tensors that are not what they were, or that the stamp does not know."""
        then = dict(zip(self.names, self.prints, strict=True))
        return [name for name, tensor in tensors if then.get(name) != _print_of(name, tensor)]


UNCHECKED = Stamp(None)
"""The stamp of what is made inside a graph, where nothing is checked."""


@dataclass(frozen=True, repr=False)
class PreparedContext:
    """What a plan makes of B: a value that `attend` reads any number of times and never changes.

    In the "head" spaces this is the cross-attention key-value cache; in the "context" spaces it is B itself.
    It belongs to one layer and to the weights that made it: `attend` refuses it after those weights, or a B that it keeps, changed.
    It is a pytree, so it passes through `torch.compile` and `torch.export`.

    Args:
        keys: (z, h or g or 1, m, width), what queries are compared with.
        values: the same with the values' width; the same tensor as `keys` where both are B.
        key_bias: (z, h, m), one extra score for each key, in the "query" space of scores only.
        mask: bool (z, m), True = may be attended; None if all may.
        positions: integer positions of the context, where a position part wants them.
        plan: the plan it was made by.
        stamp: which layer and weights made it.

    Example:
        >>> import torch, crossattention
        >>> layer = crossattention.CrossAttention(48, 32, heads=4)
        >>> prepared = layer.prepare(torch.randn(2, 7, 32))
        >>> prepared.batch, prepared.context_length, str(prepared.plan)
        (2, 7, 'head+head')
        >>> prepared
        PreparedContext(batch=2, context_length=7, plan=head+head, nbytes=5376, torch.float32 on cpu)
    """

    keys: Tensor
    values: Tensor
    key_bias: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    plan: Plan
    stamp: Stamp

    @property
    def batch(self) -> int:
        """Number of contexts, z."""
        return self.keys.shape[0]

    @property
    def context_length(self) -> int:
        """Length of each context, m."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes that the prepared context keeps alive; B counts once where keys and values are both B."""
        return bytes_of(self.keys, self.values, self.key_bias, self.mask, self.positions)

    def __repr__(self) -> str:
        return (
            f"PreparedContext(batch={self.batch}, context_length={self.context_length}, plan={self.plan}, nbytes={self.nbytes}, "
            f"{self.keys.dtype} on {self.keys.device})"
        )

    def select(self, rows: Tensor) -> PreparedContext:
        """The prepared context of some items of the batch, in the given order (as when finished items are dropped).

        Args:
            rows: integer indices into the batch, (any number,).

        Cost: one copy of what is kept.
        """
        keys = self.keys.index_select(0, rows)
        positions = self.positions
        if positions is not None and positions.dim() == 2:
            positions = positions.index_select(0, rows)
        return replace(
            self,
            keys=keys,
            values=keys if self.values is self.keys else self.values.index_select(0, rows),
            key_bias=None if self.key_bias is None else self.key_bias.index_select(0, rows),
            mask=None if self.mask is None else self.mask.index_select(0, rows),
            positions=positions,
            stamp=self.stamp.without(KEPT_CONTEXT),
        )

    def followed_by(self, more: PreparedContext) -> PreparedContext:
        """The prepared context of two contexts end to end; `CrossAttention.extend` is the public way here.

        Args:
            more: what the same layer made of the second by the same plan.

        Cost: one copy of what both keep.
        """
        keys = torch.cat((self.keys, more.keys), 2)
        key_bias = None
        if self.key_bias is not None and more.key_bias is not None:
            key_bias = torch.cat((self.key_bias, more.key_bias), 2)
        return replace(
            self,
            keys=keys,
            values=keys if self.values is self.keys else torch.cat((self.values, more.values), 2),
            key_bias=key_bias,
            mask=_joined_masks(self, more),
            positions=_joined_positions(self.positions, more.positions),
            stamp=self.stamp.without(KEPT_CONTEXT),
        )


def _joined_masks(first: PreparedContext, second: PreparedContext) -> Tensor | None:
    """The masks of both end to end; None where every position of both may be attended."""
    if first.mask is None and second.mask is None:
        return None
    masks = (
        part.keys.new_ones(part.batch, part.context_length, dtype=torch.bool) if part.mask is None else part.mask
        for part in (first, second)
    )
    return torch.cat(tuple(masks), 1)


def _joined_positions(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The positions of both end to end, (m,) or (z, m); None without a position part."""
    if first is None or second is None:
        return None
    if first.dim() != second.dim():
        batch = (first if first.dim() == 2 else second).shape[0]
        first, second = (p if p.dim() == 2 else p.expand(batch, -1) for p in (first, second))
    return torch.cat((first, second), -1)


@dataclass(frozen=True, repr=False)
class PreparedQueries:
    """Queries brought into a meeting space, to read any number of contexts: what learned queries need only once.

    It belongs to one layer and to the weights that made it: `attend` refuses it after those weights changed.

    Args:
        queries: (z or 1, h or 1, n, c) in the meeting space of scores.
        shape: of the queries that it was made of, (n, a) or (z, n, a).
        space: the meeting space of scores: "head", "context" or "query".
        stamp: which layer and weights made it.

    Example:
        >>> import torch, crossattention
        >>> layer = crossattention.CrossAttention(48, 32, heads=4)
        >>> queries = layer.prepare_queries(torch.randn(5, 48))
        >>> layer.attend(queries, layer.prepare(torch.randn(2, 7, 32))).shape
        torch.Size([2, 5, 48])
        >>> queries.select(torch.tensor([4, 0])).shape
        (2, 48)
    """

    queries: Tensor
    shape: tuple[int, ...]
    space: str
    stamp: Stamp

    def dim(self) -> int:
        """Number of dimensions of the queries that it was made of: 2 for learned ones, 3 with a batch."""
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.queries.device

    def __repr__(self) -> str:
        return f"PreparedQueries(shape={self.shape}, space={self.space}, {self.queries.dtype} on {self.queries.device})"

    def select(self, rows: Tensor) -> PreparedQueries:
        """Some of the queries, in the given order.

        Args:
            rows: integer indices of queries, (k,), the same for every item; or of each item, (z, k).
        """
        width = self.shape[-1]
        if rows.dim() == 1:
            shape = (*self.shape[:-2], rows.shape[0], width)
            return replace(self, queries=self.queries.index_select(2, rows), shape=shape)
        queries = self.queries.expand(rows.shape[0], -1, -1, -1)
        at = rows[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        return replace(self, queries=queries.gather(2, at), shape=(*rows.shape, width))


pytree.register_constant(Plan)
pytree.register_constant(Stamp)
torch.export.register_dataclass(PreparedContext, serialized_type_name="crossattention.PreparedContext")


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of some tensors; one that comes several times counts once."""
    held = {id(tensor): tensor for tensor in tensors if tensor is not None}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())
