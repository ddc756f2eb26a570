"""Contexts that are sharded on their length: every process reads its own part, and only query-sized numbers travel.

A process makes of its part of B what the plan wants, reads it, and merges its partial result (output, log-sum-exp) with those of
the others by two all-reduces, a maximum and a sum; nothing of B, of keys or of values is sent. Inside a group all processes hold
the same queries and the same weights and get the same output; each must derive the same loss from it. Gradients, in every process:

- of the queries, and of everything that stands on their side: whole, as queries that enter the part of a process have their
  gradients summed over the group;
- of the weights that B goes through (`k_proj`, `v_proj`, a key norm, and what the plan absorbs into them): whole too. The layer
  sums them, in one all-reduce, so the mean that DDP or FSDP takes over equal gradients changes nothing;
- of B: of the process's own part.

Legend: P processes, z batch, h heads, g key-value heads, n queries, m context length, c / w widths in which scores and values meet.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crossattention.attention import execute
from crossattention.attention.fused import fold_mask, spread, widen
from crossattention.attention.masks import combine_masks, fold_repeats
from crossattention.attention.partial import Part, Partial, attend_part, backward_of_part, merge_partials, scores_of_part
from crossattention.attention.prepared import PreparedContext, PreparedQueries, Stamp
from crossattention.attention.products import unrounded
from crossattention.plan import CANDIDATES, Plan, PlanError, choose_plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

    from crossattention.attention.cross_attention import CrossAttention

PIECE_SCORES = 1 << 24
"""Scores that are held at once where no fused kernel gives a log-sum-exp."""

FACTS = ("length", "part", "plan", "is chosen", "batch", "queries", "repeats")
"""What a process tells the others at each `prepare` or `forward`, 8 bytes each, so that all do the same or all refuse."""


# ----------------------------------------------------------------------------------------------------- what travels


@dataclass
class Traffic:
    """What this process handed to collectives within `count_traffic`.

    Args:
        sent: one entry for each collective: its name, and the bytes of the tensor that it took.
    """

    sent: list[tuple[str, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that collectives took."""
        return sum(size for _, size in self.sent)

    def ring_bytes(self, processes: int) -> float:
        """Bytes that this process sends where each all-reduce runs as a ring: 2 (P - 1) / P of its tensor."""
        reduced = sum(size for name, size in self.sent if name.startswith("all_reduce"))
        return reduced * 2 * (processes - 1) / processes + (self.nbytes - reduced) * (processes - 1)


_counters: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the bytes that sharded attention hands to collectives in this process; the backward pass counts where it runs inside.

    Example:
        >>> with count_traffic() as traffic:
        ...     pass
        >>> traffic.nbytes
        0
    """
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters.remove(traffic)


def _note(name: str, tensor: Tensor) -> None:
    for counter in _counters:
        counter.sent.append((name, tensor.numel() * tensor.element_size()))


def all_reduce(tensor: Tensor, operation: str, group: dist.ProcessGroup) -> Tensor:
    """The "sum" or "max" of a tensor over a group, in the tensor's own memory, which is whole."""
    if tensor.numel():
        _note(f"all_reduce {operation}", tensor)
        with _naming_the_lost(group):
            dist.all_reduce(tensor, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX, group=group)
    return tensor


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The tensors of all processes of a group, in their order; all of one shape."""
    tensor = tensor.contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    if tensor.numel():
        _note("all_gather", tensor)
        with _naming_the_lost(group):
            dist.all_gather(gathered, tensor, group=group)
    return gathered


@contextmanager
def _naming_the_lost(group: dist.ProcessGroup) -> Iterator[None]:
    """Say what a failed collective call means.

    Raises:
        ConnectionError: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        said = next(iter(str(error).splitlines()), "")
        raise ConnectionError(
            f"of the {dist.get_world_size(group)} processes that share this context one has ended, failed, or did not come to the "
            "same call in the group's time (all must call the layer in the same order, with queries of one shape); look at what "
            f"the others say, and start all again. The collective call said: {said}"
        ) from error


# -------------------------------------------------------------------------------------------- how a context is sharded


@dataclass(frozen=True, eq=False)
class Shards:
    """How a context lies over the processes of a group.

    Args:
        group: the processes that share it.
        lengths: the length of each process's part, in the order of the group.
        rank: this process's place in the group.
        layout: mesh, placements and mesh dimension of the DTensor that the context came as; None for a `ContextShard`.
        batch: items of that DTensor, over all of the mesh.
    """

    group: dist.ProcessGroup
    lengths: tuple[int, ...]
    rank: int
    layout: tuple[DeviceMesh, tuple[Placement, ...], int] | None = None
    batch: int = 0

    @property
    def length(self) -> int:
        """Length of the whole context, m."""
        return sum(self.lengths)

    @property
    def start(self) -> int:
        """Position in the whole context at which this process's part begins."""
        return sum(self.lengths[: self.rank])

    @property
    def part(self) -> slice:
        """The positions of this process's part."""
        return slice(self.start, self.start + self.lengths[self.rank])

    def along_context(self, local: Tensor, dim: int) -> Tensor:
        """What each process has of its own positions, along `dim`: a DTensor sharded there where the context came as one."""
        if self.layout is None:
            return local
        from torch.distributed.tensor import DTensor, Shard

        mesh, placements, mesh_dim = self.layout
        dim %= local.dim()
        placed = [Shard(dim) if place == mesh_dim else placement for place, placement in enumerate(placements)]
        shape = list(local.shape)
        shape[dim] = self.length
        if any(place != mesh_dim and placement.is_shard(0) for place, placement in enumerate(placed)):
            shape[0] = self.batch  # the parts may be uneven
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local.contiguous(), mesh, placed, run_check=False, shape=torch.Size(shape), stride=stride)


@dataclass(frozen=True, eq=False)
class ContextShard:
    """This process's part of a context that is split along its length in any way, in the place of B.

    For splits that are not torch's own (those come as a DTensor). Parts follow each other in the order of the mesh; any of them may
    be empty. Making one is a collective call: the processes tell each other their lengths. Masks and positions that are passed with
    it are of this part alone.

    Args:
        local: (z, m of this process, b).
        mesh: a mesh of one dimension, or a process group.
        shards: how the whole lies, where that is known from another `ContextShard` of the same lengths: no collective call then.

    Raises:
        TypeError: `local` is no dense tensor, or `mesh` neither a mesh nor a group.
        ValueError: a mesh of several dimensions; parts whose batch, width or dtype differ, said by every process; a part of another
            length than `shards` tells.

    Example:
        >>> import tempfile, torch, torch.distributed as dist
        >>> from crossattention import CrossAttention
        >>> store = dist.FileStore(tempfile.NamedTemporaryFile().name, 1)
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> layer = CrossAttention(48, 32, heads=4)
        >>> shard = ContextShard(torch.randn(2, 7, 32), dist.group.WORLD)
        >>> layer(torch.randn(2, 5, 48), shard).shape
        torch.Size([2, 5, 48])
        >>> dist.destroy_process_group()
    """

    local: Tensor
    mesh: DeviceMesh | dist.ProcessGroup
    shards: Shards = field(default=None, repr=False)  # type: ignore[assignment]  # filled in; an argument, so that copies keep it

    def __post_init__(self) -> None:
        if not isinstance(self.local, Tensor) or self.local.is_nested or is_dtensor(self.local):
            raise TypeError(
                f"ContextShard takes this process's part as a dense tensor (batch, length, width), got {type(self.local).__name__}"
                + ("; a DTensor is passed to the layer as it is" if is_dtensor(self.local) else "")
            )
        if self.local.dim() != 3:
            raise ValueError(f"ContextShard takes (batch, length, width), got shape {tuple(self.local.shape)}")
        group = _group_of(self.mesh)
        z, m, width = self.local.shape
        if self.shards is not None:
            told = self.shards.lengths[self.shards.rank]
            if told != m:
                raise ValueError(f"shards tells of {told} positions in this process, but the part has {m}; leave shards out")
            return
        facts = torch.tensor([z, m, width, _DTYPES.index(self.local.dtype)], device=self.local.device)
        seen = torch.stack(all_gather(facts, group)).tolist()
        if len({(batch, wide, dtype) for batch, _, wide, dtype in seen}) > 1:
            told = "; ".join(f"process {r}: {s[:3]} {_DTYPES[s[3]]}" for r, s in enumerate(seen))
            raise ValueError(f"the parts of one context must have the same batch, width and dtype, got {told}")
        object.__setattr__(self, "shards", Shards(group, tuple(s[1] for s in seen), dist.get_rank(group)))

    @property
    def shape(self) -> torch.Size:
        """Of the whole context."""
        z, _, width = self.local.shape
        return torch.Size((z, self.shards.length, width))


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, *(torch.int64, torch.int32, torch.bool, torch.uint8))


def _group_of(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh of one dimension or a process group, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, the one that the context's length is split over, got {mesh.ndim}; take it out of the "
            'mesh by its name, as mesh["length"]'
        )
    return mesh.get_group()


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor; without importing them, as none exists before somebody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


RAGGED_ON_SHARDS = "queries of unlike lengths cannot read a sharded context; pad them to one length, or go one by one"


def is_sharded(value: object) -> bool:
    """Whether a context, raw or prepared, lies over several processes."""
    return type(value) is not Tensor and (isinstance(value, ContextShard | PreparedShard) or is_dtensor(value))


def open_context(b: DTensor | ContextShard) -> tuple[Tensor, Shards]:
    """This process's part of a context, and how the whole lies.

    Raises:
        ValueError: a DTensor that is not sharded on its length over exactly one mesh dimension, or not as torch chunks it.
    """
    if isinstance(b, ContextShard):
        return b.local, b.shards
    from torch.distributed.tensor import Replicate, Shard

    placements = tuple(b.placements)
    over = [place for place, placement in enumerate(placements) if type(placement) is Shard and placement.dim == 1]
    others = [p for place, p in enumerate(placements) if place not in over and type(p) is not Replicate and p != Shard(0)]
    if b.dim() != 3 or len(over) != 1 or others:
        raise ValueError(
            "a context as a DTensor must be (batch, length, width), sharded on its length, Shard(1), over exactly one dimension of "
            f"its mesh, and replicated or sharded on its batch, Shard(0), over the others; got shape {tuple(b.shape)} with "
            f"{placements}; redistribute it, or pass this process's part as ContextShard(local, mesh)"
        )
    mesh, dim = b.device_mesh, over[0]
    count, rank = mesh.size(dim), mesh.get_local_rank(dim)
    chunk = -(-b.shape[1] // count)
    lengths = tuple(max(0, min(chunk, b.shape[1] - place * chunk)) for place in range(count))
    local = b.to_local()
    if local.shape[1] != lengths[rank]:
        raise ValueError(
            f"this DTensor is said to have length {b.shape[1]} over {count} processes, of which torch gives process {rank} "
            f"{lengths[rank]}, but its part has {local.shape[1]}; DTensor.from_local does not know uneven parts: pass them as "
            "ContextShard(local, mesh)"
        )
    return local, Shards(mesh.get_group(dim), lengths, rank, (mesh, placements, dim), b.shape[0])


def own_part(name: str, given: Tensor | None, shards: Shards, dim: int = -1) -> Tensor | None:
    """What is passed along a context, such as a mask, cut to this process's part; a last dimension of one stays.

    With a DTensor: a DTensor sharded as the context is, or a whole tensor. With a `ContextShard`: of this part already.
    """
    if given is None or (shards.layout is None and not is_dtensor(given)):
        return given
    if is_dtensor(given):
        if shards.layout is None:
            raise TypeError(f"{name} came as a DTensor but the context as a ContextShard; pass what belongs to this process's part")
        from torch.distributed.tensor import Shard

        placement = given.placements[shards.layout[2]]  # type: ignore[attr-defined]
        if given.device_mesh != shards.layout[0] or (not placement.is_replicate() and placement != Shard(given.dim() - 1)):  # type: ignore[attr-defined]
            raise ValueError(
                f"{name} as a DTensor must lie on the context's mesh, sharded on its last dimension as the context on its length, "
                f"or replicated; got {given.placements} on {given.device_mesh}"  # type: ignore[attr-defined]
            )
        local: Tensor = given.to_local()  # type: ignore[attr-defined]
        if not placement.is_replicate():
            return local
        given = local
    if isinstance(given, Tensor) and given.requires_grad:
        raise ValueError(f"{name} requires a gradient, which each process would have a part of alone; shard it as the context is")
    if not isinstance(given, Tensor) or given.dim() == 0 or given.shape[-1] == 1 != shards.length:
        return given
    if given.shape[-1] != shards.length:
        raise ValueError(
            f"{name} must be of the whole context, of length {shards.length}, or a DTensor sharded as it is, got shape "
            f"{tuple(given.shape)}"
        )
    return given[..., shards.part]


# ------------------------------------------------------------------------------------------------- prepared contexts


@dataclass(frozen=True, eq=False, repr=False)
class PreparedShard:
    """What a plan makes of a sharded context, in this process: `attend` reads it any number of times and never changes it.

    Args:
        local: what the plan makes of this process's part.
        shards: how the whole lies.
    """

    local: PreparedContext
    shards: Shards

    @property
    def plan(self) -> Plan:
        """The plan it was made by, the same in all processes."""
        return self.local.plan

    @property
    def batch(self) -> int:
        """Number of contexts, z."""
        return self.local.batch

    @property
    def context_length(self) -> int:
        """Length of the whole of each context, m."""
        return self.shards.length

    @property
    def nbytes(self) -> int:
        """Bytes that this process keeps alive."""
        return self.local.nbytes

    def __repr__(self) -> str:
        return (
            f"PreparedShard(batch={self.batch}, context_length={self.context_length} of which {self.local.context_length} here, "
            f"plan={self.plan}, nbytes={self.nbytes}, process {self.shards.rank} of {len(self.shards.lengths)})"
        )

    def select(self, rows: Tensor) -> PreparedShard:
        """The prepared context of some items of the batch, as `PreparedContext.select`; all processes select the same.

        Args:
            rows: integer indices into the batch, (any number,).
        """
        return replace(self, local=self.local.select(rows))


def prepare_shard(
    layer: CrossAttention,
    b: DTensor | ContextShard,
    context_mask: Tensor | None,
    context_positions: Tensor | None,
    plan: Plan | None,
    query_length: int | None = None,
    repeats: int | None = None,
    uses: int | None = None,
    shares_queries: bool = False,
    *,
    stamped: bool = True,
    only_keys: bool = False,
) -> PreparedShard:
    """`CrossAttention.prepare` of this process's part, by a plan that all processes agree on."""
    local, shards = open_context(b)
    layer._check_context(tuple(local.shape))
    asked = (local.shape[0], -1 if query_length is None else query_length, repeats or 1)
    if plan is None:
        plan, is_chosen = _plan_of(layer, local, shards, query_length, repeats, uses, shares_queries)
    else:
        is_chosen = False
    plan = _agree(shards, plan, is_chosen, asked, local.device)
    context_mask = own_part("context_mask", context_mask, shards)
    context_positions = own_part("context_positions", context_positions, shards)
    if layer.positions is not None and context_positions is None:
        context_positions = torch.arange(shards.part.start, shards.part.stop, device=local.device)
    with _summed_gradients(shards.group, *_modules_on_b(layer, plan)):
        made = layer._prepare(local, context_mask, context_positions, plan, stamped=False, uses=uses or 1, only_keys=only_keys)
    if stamped:  # of the weights themselves, not of what stood in their place
        made = replace(made, stamp=Stamp.of(layer._token, layer._made_of(plan, made.keys, made.values)))
    return PreparedShard(made, shards)


def _plan_of(
    layer: CrossAttention,
    local: Tensor,
    shards: Shards,
    query_length: int | None,
    repeats: int | None,
    uses: int | None,
    shares_queries: bool,
) -> tuple[Plan, bool]:
    """This process's plan for the longest part, and whether it was chosen by size, so that the first process's is everybody's."""
    hinted = query_length is not None or uses is not None or repeats is not None
    if layer.plan != "auto" or not hinted:
        return layer._plan_of(local, None, None, None), False
    n = 1 if query_length is None else query_length
    shape = (local.shape[0], max(shards.lengths), local.shape[2])
    trains = layer._trains(local)
    sizes = layer._sizes(shape, n, repeats or 1, uses or 1, None, shares_queries=shares_queries, trains=trains)
    candidates = choose_plan(sizes, layer.forbidden()).candidates
    # Results of the "output" space are as wide as the output for each head, and would all travel.
    fitting = [c for c in candidates if c.is_legal and c.plan.kernel == "fused" and c.plan.values != "output"]
    return min(fitting, key=lambda c: (c.exceeds_memory, c.cost.seconds)).plan, True


def _agree(shards: Shards, plan: Plan, is_chosen: bool, asked: tuple[int, int, int], device: torch.device) -> Plan:
    """The first process's plan, once the processes have told each other what they take the call to be.

    A collective call each time: a process that remembered an earlier answer would leave one that does not know it waiting.
    """
    own = (shards.length, shards.lengths[shards.rank], CANDIDATES.index(plan), int(is_chosen), *asked)
    seen = torch.stack(all_gather(torch.tensor(own, device=device), shards.group)).tolist()
    if len({length for length, *_ in seen}) > 1 or sum(part for _, part, *_ in seen) != shards.length:
        told = "; ".join(f"process {rank}: {length}, of which {part} there" for rank, (length, part, *_) in enumerate(seen))
        raise ValueError(
            f"the processes take the context to be of different lengths ({told}); DTensor.from_local does not know uneven parts: "
            "pass them as ContextShard(local, mesh)"
        )
    if len({tuple(facts[4:]) for facts in seen}) > 1:
        told = "; ".join(f"process {rank}: {z} contexts, {n} queries, {r} repeats" for rank, (*_, z, n, r) in enumerate(seen))
        raise ValueError(
            f"the processes that share a context must ask the same of it, got {told}; pass all of them the same queries"
        )
    if len({facts[3] for facts in seen}) > 1 or (not is_chosen and len({facts[2] for facts in seen}) > 1):
        told = ", ".join(("auto: " if chosen else "") + str(CANDIDATES[place]) for _, _, place, chosen, *_ in seen)
        raise PlanError(f"the layers of the processes have different plans, {told}; give all of them the same")
    agreed: Plan = CANDIDATES[seen[0][2]]
    return agreed


# ------------------------------------------------------------------------------------------------------------ reading


def attend_shard(
    layer: CrossAttention,
    a: Tensor | PreparedQueries,
    prepared: PreparedShard,
    attn_mask: Tensor | None,
    query_positions: Tensor | None,
) -> Tensor:
    """`CrossAttention.attend` over all processes: (z, n, o), the same in each; a DTensor placed as the queries where they are one.

    Raises:
        ValueError: attention dropout in training; queries that are sharded over the processes that share the context.
    """
    if layer.training and layer.dropout:
        raise ValueError(
            f"attention dropout (dropout={layer.dropout}) is not computed over a sharded context: the processes would have to draw "
            "one mask of the whole map; build the layer with dropout=0.0, or call layer.eval()"
        )
    if is_dtensor(a):
        return _replaced(
            a, attend_shard(layer, open_queries(a, prepared.shards), prepared, attn_mask, query_positions), prepared.shards
        )
    local, shards = prepared.local, prepared.shards
    layer._check_attendable(a, local)
    queries, keys, values, mask = _meet(layer, a, prepared, attn_mask, query_positions)
    read, lse = _read(shards.group, layer.scale, queries, keys, values, mask)
    plan = local.plan
    width = {"head": layer.value_head_dim, "context": layer.context_dim, "output": layer.out_dim}[plan.values]
    read = read[..., :width]
    if plan.values == "output":
        read = unrounded(read).sum(1, keepdim=True)
    live = (lse > -torch.inf).unsqueeze(-1)
    out = execute.finish(layer, plan.values, read, live, execute.to_autocast_dtype(local.values)[0].dtype)
    return out.unflatten(1, (a.shape[1], a.shape[2])) if a.dim() == 4 else out


def open_queries(a: Any, shards: Shards) -> Tensor:
    """Queries that came as a DTensor, as this process has them: whole, among those that share the context."""
    layout = shards.layout
    placements = a.placements
    if layout is None or a.device_mesh != layout[0]:
        raise ValueError("queries came as a DTensor but the context on no mesh, or on another; pass queries as a plain tensor")
    over = placements[layout[2]]
    if not over.is_replicate() or any(not p.is_replicate() and not p.is_shard(0) for p in placements):
        raise ValueError(
            f"queries must be whole in every process that has a part of the context: replicated over mesh dimension {layout[2]}, "
            f"and replicated or sharded on their batch over the others, got {placements}; redistribute them"
        )
    local: Tensor = a.to_local()
    return local


def _replaced(a: Any, out: Tensor, shards: Shards) -> Tensor:
    """The output as a DTensor, placed as the queries; of learned queries, which have no batch, as the context over its batch."""
    from torch.distributed.tensor import DTensor, Replicate

    assert shards.layout is not None
    mesh, placements, _ = shards.layout
    placed = a.placements if a.dim() > 2 else [p if p.is_shard(0) else Replicate() for p in placements]
    batch = a.shape[0] if a.dim() > 2 else shards.batch
    shape = torch.Size((batch, *out.shape[1:]))  # told, as the parts of a batch may be uneven
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(out.contiguous(), mesh, placed, run_check=False, shape=shape, stride=stride)


def _meet(
    layer: CrossAttention,
    a: Tensor | PreparedQueries,
    prepared: PreparedShard,
    attn_mask: Tensor | None,
    query_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys and values in the plan's meeting spaces, and what is masked or added of this process's pairs."""
    local, shards = prepared.local, prepared.shards
    attn_mask = own_part("attn_mask", attn_mask, shards)
    if attn_mask is not None:
        layer._check_attn_mask(a, local, attn_mask)
        if a.dim() == 4:
            attn_mask = fold_repeats(attn_mask, a.shape[1], a.shape[2])
    queries, projected, positions = layer._ask(a, local, query_positions)
    part = layer.positions if layer.positions is not None and layer.positions.adds_to_scores else None
    read = projected if part is not None and part.reads_queries else None
    [queries, read] = _sum_gradients(shards.group, [queries, read])
    bias = None
    if part is not None:
        assert positions is not None and local.positions is not None
        with _summed_gradients(shards.group, part):
            bias = part.score_bias(read, positions, local.positions, layer.scale)
    keys, values = local.keys, local.values
    if local.key_bias is not None and layer.scale != 0.0:
        queries, keys = execute.join_key_bias(queries, keys, local.key_bias / layer.scale)
    elif local.key_bias is not None:
        bias = local.key_bias.unsqueeze(2) if bias is None else bias + local.key_bias.unsqueeze(2)
    mask = combine_masks(local.mask, attn_mask, bias, local.context_length, queries.dtype).tensor
    queries, keys, values = execute.to_autocast_dtype(queries, keys, values)
    return queries, keys, values, mask


def _read(
    group: dist.ProcessGroup, scale: float, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What queries (z or 1, h or 1, n, c) read of all keys (z, g, m, c), values (z, g', m, w): (z, h, n, w), and lse (z, h, n)."""
    heads = max(queries.shape[1], keys.shape[1], values.shape[1])
    groups = max(keys.shape[1], values.shape[1])
    queries, keys, mask, share = _folded(queries, keys, heads, groups, mask)
    out, lse = _AttendShard.apply(group, scale, queries, keys, spread(values, groups), mask)
    if share > 1:
        out, lse = out.unflatten(2, (share, -1)).flatten(1, 2), lse.unflatten(2, (share, -1)).flatten(1, 2)
    return out, lse


@torch.no_grad()
def share_of_rows(
    layer: CrossAttention,
    a: Tensor | PreparedQueries,
    prepared: PreparedShard,
    attn_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Tensor:
    """How much of each row's weight lies on this process's part, (z, h, n) or (z, r, h, n).

    The softmax over the part alone, times this, is the map of the part.

    share = exp(lse of the part - lse of the whole), zero where either has no live key

    Cost: one read of the keys, and two all-reduces of z h n numbers.
    """
    layer._check_attendable(a, prepared.local)
    queries, keys, _, mask = _meet(layer, a, prepared, attn_mask, query_positions)
    heads, length = max(queries.shape[1], keys.shape[1]), queries.shape[2]
    queries, keys, mask, share = _folded(queries, keys, heads, keys.shape[1], mask)
    with torch.autocast(queries.device.type, enabled=False):
        lses = [attend_part(queries, part, layer.scale).lse for part in _pieces(queries, keys, keys, mask)]
        own = torch.stack(lses).logsumexp(0) if len(lses) > 1 else lses[0]
        whole = merge_over(prepared.shards.group, Partial(own.new_empty(*own.shape, 0), own)).lse
    part_of_rows: Tensor = (own - whole.masked_fill(whole == -torch.inf, 0.0)).exp().unflatten(2, (share, length)).flatten(1, 2)
    if a.dim() != 4:
        return part_of_rows
    by_repeat: Tensor = part_of_rows.unflatten(2, (a.shape[1], a.shape[2])).transpose(1, 2)
    return by_repeat


def _folded(
    queries: Tensor, keys: Tensor, heads: int, groups: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Queries (z, g, s n, c) with heads that read the same keys laid into the length, keys (z, g, m, c), the mask so, and s."""
    queries = widen(queries, keys.shape[-1]).expand(keys.shape[0], heads, -1, -1)
    share, length = heads // groups, queries.shape[2]
    if share > 1:
        queries = queries.unflatten(1, (groups, share)).flatten(2, 3)
        mask = None if mask is None else fold_mask(mask, groups, share, length)
    return queries.contiguous(), spread(keys, groups), mask, share


class _AttendShard(torch.autograd.Function):
    """Forward: this process's partial result, merged with the others'. Backward: its own gradients, from the merged numbers."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, scale: float, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(queries.device.type, enabled=False):
            own: Partial | None = None
            for part in _pieces(queries, keys, values, mask):
                one = attend_part(queries, part, scale)
                one = Partial(one.output.to(one.lse.dtype), one.lse)
                own = one if own is None else merge_partials((own, one))
            assert own is not None
            merged = merge_over(group, own)
        output = merged.output.to(values.dtype)
        ctx.save_for_backward(queries, keys, values, mask, output, merged.lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(merged.lse)
        return output, merged.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        queries, keys, values, mask, output, lse = ctx.saved_tensors
        grad_queries = torch.zeros_like(queries, dtype=lse.dtype)
        found: list[tuple[Tensor, Tensor]] = []
        masks: list[Tensor] = []
        with torch.autocast(queries.device.type, enabled=False):
            for part in _pieces(queries, keys, values, mask):
                dq, dk, dv, _ = backward_of_part(queries, part, output, lse, grad_output, None, ctx.scale)
                grad_queries += dq
                found.append((dk, dv))
                if ctx.needs_input_grad[5]:
                    masks.append(_mask_gradient(queries, part, output, lse, grad_output, ctx.scale))
        grad_keys, grad_values = (grads[0] if len(grads) == 1 else torch.cat(grads, 2) for grads in zip(*found, strict=True))
        grad_mask = torch.cat(masks, -1) if masks else None
        return None, None, grad_queries.to(queries.dtype), grad_keys, grad_values, grad_mask


def _pieces(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Iterator[Part]:
    """The part whole where a fused kernel reads it (on a CPU), else in pieces whose scores are few; at least one."""
    m = keys.shape[2]
    step = m if is_fused(queries) else PIECE_SCORES // max(1, queries.shape[0] * queries.shape[1] * queries.shape[2])
    for start in range(0, max(1, m), max(1, step)):
        piece = slice(start, start + max(1, step))
        yield Part(keys[:, :, piece], values[:, :, piece], None if mask is None else mask[..., piece])


def is_fused(queries: Tensor) -> bool:
    """Whether a part is read without holding its scores."""
    return queries.device.type == "cpu"


def merge_over(group: dist.ProcessGroup, own: Partial) -> Partial:
    """The partial results of all processes of a group, merged, in all of them; not differentiable by itself.

    highest = max over processes of lse,   output = sum exp(lse - highest) output / sum exp(lse - highest)

    Args:
        group: the processes.
        own: of this process: output (z, h, n, w) and lse (z, h, n), in one dtype; zero and -inf where it has no live key.

    Returns:
        The merge; zero and -inf where no process has a live key.

    Cost: two all-reduces, of z h n and of z h n (w + 1) numbers.
    """
    highest = all_reduce(own.lse.clone(memory_format=torch.contiguous_format), "max", group)
    live = highest > -torch.inf
    base = highest.masked_fill(~live, 0.0)
    share = (own.lse - base).exp()
    width = own.output.shape[-1]
    sums = torch.empty(*own.lse.shape, width + 1, dtype=own.lse.dtype, device=own.lse.device)
    torch.mul(own.output, share.unsqueeze(-1), out=sums[..., :width])
    sums[..., width] = share
    all_reduce(sums, "sum", group)
    total = sums[..., width]
    output = sums[..., :width] / total.masked_fill(~live, 1.0).unsqueeze(-1)
    return Partial(output, (base + total.log()).masked_fill(~live, -torch.inf))


def _mask_gradient(queries: Tensor, part: Part, output: Tensor, lse: Tensor, grad_output: Tensor, scale: float) -> Tensor:
    """The gradient of what is added to the scores of one part, dS = P (dO V^T - rowsum(dO O)), in the mask's shape."""
    assert part.mask is not None
    weights = (scores_of_part(queries, part, scale) - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    wide = weights.dtype
    delta = (grad_output * output).sum(-1, keepdim=True, dtype=wide)
    grad = weights * (grad_output.to(wide) @ part.values.to(wide).transpose(-1, -2) - delta)
    return grad.sum_to_size(part.mask.shape).to(part.mask.dtype)


# ---------------------------------------------------------------------------------------------------------- gradients


class _SumGradients(torch.autograd.Function):
    """Forward: the tensors as they are. Backward: their gradients summed over the group, in one all-reduce."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wide = torch.float32
        for grad in grads:  # half precision is summed in float32
            wide = torch.promote_types(wide, grad.dtype)
        flat = torch.cat([grad.reshape(-1).to(wide) for grad in grads])
        all_reduce(flat, "sum", ctx.group)
        pieces = flat.split([grad.numel() for grad in grads])
        return None, *(piece.view(grad.shape).to(grad.dtype) for piece, grad in zip(pieces, grads, strict=True))


def _sum_gradients(group: dist.ProcessGroup, tensors: Sequence[Tensor | None]) -> list[Any]:
    """The tensors, whose gradients will be summed over the group; None, and what needs no gradient, stays."""
    trained = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return list(tensors)
    summed = iter(_SumGradients.apply(group, *trained))
    return [next(summed) if tensor is not None and tensor.requires_grad else tensor for tensor in tensors]


@contextmanager
def _summed_gradients(group: dist.ProcessGroup, *modules: nn.Module | None) -> Iterator[None]:
    """Inside, the modules compute with weights whose gradients will be summed over the group, all in one all-reduce."""
    held = [
        (inner, name, parameter)
        for module in dict.fromkeys(m for m in modules if m is not None)
        for inner in module.modules()
        for name, parameter in inner._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    if not held or not torch.is_grad_enabled():
        yield
        return
    unique = list(dict.fromkeys(parameter for _, _, parameter in held))
    summed = dict(zip(unique, _sum_gradients(group, unique), strict=True))
    try:
        for inner, name, parameter in held:
            inner._parameters[name] = summed[parameter]
        yield
    finally:
        for inner, name, parameter in held:
            inner._parameters[name] = parameter


def _modules_on_b(layer: CrossAttention, plan: Plan) -> list[nn.Module | None]:
    """What B goes through in `prepare`: each process puts another part of B through it."""
    modules: list[nn.Module | None] = []
    if plan.scores != "context":
        modules += [layer.k_proj, layer.qk_norm, layer.positions]
    if plan.scores == "query":
        modules.append(layer.q_proj)
    if plan.values != "context":
        modules.append(layer.v_proj)
    if plan.values == "output":
        modules.append(layer.out_proj)
    return modules
