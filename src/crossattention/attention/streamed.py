"""Streamed cross-attention: a context that comes in blocks and is never held whole, forward and backward.

Each block becomes keys and values, queries read it, and its partial result is merged with what earlier blocks gave; then it is
dropped. The backward pass reads the blocks a second time and makes each one's gradients from the merged output and log-sum-exp, so
that it holds one block too. Every plan is a way to read a block; whatever the context's length, what is kept is of query size.

Legend: z batch, n queries (all repeats of one context together), m positions of one block, h heads, g heads that the keys or values
have, s = h / g heads that share one, c/w widths in which scores and values meet.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from crossattention.attention import execute
from crossattention.attention.fused import spread
from crossattention.attention.masks import combine_masks
from crossattention.attention.partial import Part, Partial, attend_part, backward_of_part, merge_partials, scores_of_part
from crossattention.attention.prepared import fingerprint, watch
from crossattention.attention.products import multiply
from crossattention.plan import Plan
from crossattention.plan.blocks import BLOCK_SCORES

if TYPE_CHECKING:
    from crossattention.attention.cross_attention import CrossAttention

PLANNED_ROWS = 1 << 16
"""Context length that a plan is chosen for: from some thousand rows on, the cost of each is the same."""


class BlocksState:
    """How far a pass over blocks has come: the partial result of the blocks read so far, from which an interrupted pass goes on.

    Made empty by the caller and handed to `attend_blocks(..., state=)`, which brings it up to date after each block; or handed by
    it to `progress`. The same call with the same state later reads on after the last whole block.

    Example:
        >>> import torch, crossattention
        >>> layer, state = crossattention.CrossAttention(48, 32, heads=4), BlocksState()
        >>> a, blocks = torch.randn(1, 5, 48), [torch.randn(1, 7, 32), torch.randn(1, 3, 32)]
        >>> with torch.no_grad():
        ...     out = layer.attend_blocks(a, blocks, state=state)
        >>> state.blocks, state.rows
        (2, 10)
    """

    def __init__(self) -> None:
        # One value, replaced as a whole, so that an interruption never leaves half of it.
        self._done: tuple[Partial, int, int] | None = None
        self.digest = ""

    @property
    def blocks(self) -> int:
        """Whole blocks that are in the partial result."""
        return 0 if self._done is None else self._done[1]

    @property
    def rows(self) -> int:
        """Context positions that were read."""
        return 0 if self._done is None else self._done[2]

    @property
    def partial(self) -> Partial | None:
        """The merged partial result, (z, g, s n, w) and (z, g, s n); None before the first block."""
        return None if self._done is None else self._done[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as safetensors: beside, flushed, then renamed, so that a file of this name is always whole.

        Args:
            path: of the file.

        Raises:
            ValueError: nothing was read yet.
        """
        from safetensors.torch import save

        if self._done is None:
            raise ValueError("no block was read yet, so there is nothing to save")
        partial, blocks, rows = self._done
        told = {"blocks": str(blocks), "rows": str(rows), "digest": self.digest}
        content = save({"output": partial.output.contiguous(), "lse": partial.lse.contiguous()}, told)
        path = Path(path)
        beside = path.with_name(path.name + ".part")
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> BlocksState:
        """Read what `save` wrote.

        Args:
            path: of the file.
            device: where the partial result is wanted: that of the queries.

        Raises:
            ValueError: the file is damaged, or is something else.
            FileNotFoundError: there is no such file.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).exists():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                told = file.metadata() or {}
                state = cls()
                state.digest = told["digest"]
                partial = Partial(file.get_tensor("output"), file.get_tensor("lse"))  # on the CPU, until a call goes on with it
                state._done = (partial, int(told["blocks"]), int(told["rows"]))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no state of attend_blocks, or is damaged: {str(error).splitlines()[0]}") from None
        return state


def attend_streamed(
    layer: CrossAttention,
    a: Tensor,
    blocks: Iterable[Any],
    *,
    progress: Callable[[BlocksState], object] | None,
    state: BlocksState | None,
    query_positions: Tensor | None,
    plan: Plan | None,
) -> Tensor:
    """`CrossAttention.attend_blocks`, which says what it does."""
    if layer.training and layer.dropout:
        raise ValueError(
            f"attend_blocks drops no weights, but the layer trains with dropout={layer.dropout}; build it with dropout=0.0, or "
            "call eval()"
        )
    stream = Stream(layer, a, blocks, query_positions, plan)
    trains = torch.is_grad_enabled() and (a.requires_grad or any(p.requires_grad for p in layer.parameters()))
    if trains and stream.is_once:
        raise ValueError(
            "the backward pass reads the blocks again, but an iterator can be read once; pass something that can be iterated anew "
            "(a list, a RowFile, an object with __iter__), or call under torch.no_grad()"
        )
    if not isinstance(state, BlocksState | None):
        raise TypeError(f"state must be a BlocksState, got {type(state).__name__}")
    if state is not None or progress is not None:  # nobody else sees a state, which then need not say of what it is
        state = BlocksState() if state is None else state
        stream.start(state)
    state = BlocksState() if state is None else state
    parameters = stream.parameters if trains else []
    read = _Streamed.apply(stream, state, progress, stream.queries, stream.projected, *parameters)
    return stream.finish(read)


_digests: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], bytes]] = weakref.WeakKeyDictionary()


def _weights_digest(layer: nn.Module) -> bytes:
    """The digest of a layer's weights, made anew only where one has changed: it costs a read of them all."""
    tensors = [*layer.parameters(), *layer.buffers()]
    watch(*tensors)
    prints = tuple((*fingerprint(tensor), tensor.device) for tensor in tensors)
    kept = _digests.get(layer)
    if kept is not None and kept[0] == prints:
        return kept[1]
    found = hashlib.sha256()
    _add_content(found, tensors)
    if all(one[1] != -1 for one in prints):  # tensors of inference mode do not tell that they changed
        _digests[layer] = prints, found.digest()
    return found.digest()


def _add_content(found: Any, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        found.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)


class Stream:
    """Queries in the meeting space of a plan, and blocks that become keys and values there.

    Args:
        layer: the layer.
        a: queries (z, n, a), (n, a), or (z, r, n, a).
        blocks: tensors (z, m, b) or (m, b), or pairs of one and a mask (z, m) or (m,).
        query_positions: as `attend` takes them.
        plan: the plan; None chooses.
    """

    def __init__(
        self, layer: CrossAttention, a: Tensor, blocks: Iterable[Any], query_positions: Tensor | None, plan: Plan | None
    ) -> None:
        self.layer, self.a, self.blocks = layer, a, blocks
        if isinstance(blocks, Tensor) or not isinstance(blocks, Iterable):
            raise TypeError(
                f"blocks must be an iterable of tensors (batch, length, {layer.context_dim}) or of (tensor, mask), got "
                f"{type(blocks).__name__}; one context in memory is layer(a, b)"
            )
        layer._check_tensor("queries", a)  # first, as blocks follow them to their device
        self.device = a.device
        iterator = iter(blocks)
        self.is_once = iterator is blocks
        first = next(iterator, None)
        if first is None:
            raise ValueError("blocks holds no block; an empty context is one block of length 0")
        self._first: Any = chain([first], iterator) if self.is_once else None
        if not self.is_once and callable(getattr(iterator, "close", None)):
            iterator.close()  # type: ignore[attr-defined]  # a file that is read ahead stops
        start, _ = self._checked(first, 0, None)
        self.batch = start.shape[0]
        layer._check_shapes(tuple(a.shape), (self.batch, 0, layer.context_dim))
        total = getattr(blocks, "rows", None)
        length = min(PLANNED_ROWS, total) if isinstance(total, int) else PLANNED_ROWS
        if plan is None:
            repeats = a.shape[1] if a.dim() == 4 else None
            stand_in = start.new_empty(1).expand(self.batch, length, start.shape[2])
            plan = layer._plan_of(stand_in, a.shape[-2], repeats, 1, a.dim() == 2)
        self.plan = Plan("head", plan.values, plan.kernel) if plan.scores == "query" and layer.scale == 0.0 else plan
        self.autocast = torch.is_autocast_enabled(start.device.type), torch.get_autocast_dtype(start.device.type)
        at = None if layer.positions is None else torch.arange(0, device=start.device)
        nothing = layer._prepare(start[:, :0], None, at, self.plan, stamped=False)
        queries, projected, self._query_positions = layer._ask(a, nothing, query_positions)
        self.projected = projected if layer.positions is not None and layer.positions.reads_queries else None
        if nothing.key_bias is not None:
            queries, _ = execute.join_key_bias(queries, nothing.keys, nothing.key_bias)
        self.queries = self._folded(queries, max(nothing.keys.shape[1], nothing.values.shape[1]))
        self.parameters = [p for p in layer.parameters() if p.requires_grad]
        self._live: Tensor | None = None

    # --------------------------------------------------------------------------------------------------- blocks

    def _checked(self, block: Any, place: int, batch: int | None) -> tuple[Tensor, Tensor | None]:
        """A block (z, m, b) and its mask (z, m)."""
        mask = None
        if isinstance(block, tuple | list):
            if len(block) != 2:
                raise TypeError(f"block {place} must be a tensor or a pair (tensor, mask), got {len(block)} things")
            block, mask = block
        if not isinstance(block, Tensor):
            raise TypeError(f"block {place} must be a tensor (batch, length, {self.layer.context_dim}), got {type(block).__name__}")
        if block.dim() == 2:
            block, mask = block.unsqueeze(0), mask.unsqueeze(0) if isinstance(mask, Tensor) and mask.dim() == 1 else mask
        if block.device.type == "cpu" and self.device.type != "cpu":  # as files and loaders give them
            block, mask = block.to(self.device), mask.to(self.device) if isinstance(mask, Tensor) else mask
        try:
            self.layer._check_context(tuple(block.shape))
            self.layer._check_tensor("context", block)
        except ValueError as error:
            raise ValueError(f"block {place}: {error}") from None
        if batch is not None and block.shape[0] != batch:
            raise ValueError(f"block {place} has batch {block.shape[0]} but the first block has batch {batch}")
        if block.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"block {place} requires a gradient, which attend_blocks does not keep; detach it, or call layer(a, b)"
            )
        return block, mask

    def read_from(self, skipped: int, rows: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The blocks after the first few, which held `rows` rows, checked.

        Raises:
            ValueError: they hold another number of rows: cut otherwise, some would be read twice or never.
        """
        source, self._first = self._first, None
        if source is None and all(callable(getattr(self.blocks, name, None)) for name in ("from_block", "rows_before")):
            before = self.blocks.rows_before(skipped)  # type: ignore[attr-defined]
            rest: Iterator[Any] = iter(self.blocks.from_block(skipped)) if before == rows else iter(())  # type: ignore[attr-defined]
        else:
            rest = iter(self.blocks) if source is None else source
            skip = enumerate(islice(rest, skipped))
            before = sum(self._checked(block, place, self.batch)[0].shape[1] for place, block in skip)
        if before != rows:
            raise ValueError(
                f"the state has read {rows:,} rows in {skipped:,} blocks, but these blocks hold {before:,}; go on over the blocks "
                "that it began with, cut as they were"
            )
        for place, block in enumerate(rest, skipped):
            yield self._checked(block, place, self.batch)

    def part(self, block: Tensor, mask: Tensor | None, start: int, projected: Tensor | None) -> Part:
        """Keys, values and what is added to their scores, laid for `queries`; differentiable in weights and projected queries."""
        layer = self.layer
        at = None if layer.positions is None else torch.arange(start, start + block.shape[1], device=block.device)
        prepared = layer._prepare(block, mask, at, self.plan, stamped=False)
        keys = prepared.keys
        if prepared.key_bias is not None:
            none = keys.new_empty(1, 1, 0, layer.query_dim)
            _, keys = execute.join_key_bias(none, keys, prepared.key_bias / layer.scale)
        values = prepared.values[..., : self.value_width]
        keys, values = execute.to_autocast_dtype(keys[..., : self.queries.shape[3]], values)
        groups = max(keys.shape[1], values.shape[1])
        bias = None
        if layer.positions is not None and layer.positions.adds_to_scores:
            assert self._query_positions is not None and at is not None
            bias = layer.positions.score_bias(projected, self._query_positions, at, layer.scale)
        added = combine_masks(prepared.mask, None, bias, block.shape[1], keys.dtype).tensor
        if added is not None and added.shape[1] > 1 and groups < layer.heads:
            added = added.unflatten(1, (groups, -1)).expand(-1, -1, -1, self._length, -1).flatten(2, 3)
        elif added is not None and added.shape[2] > 1 and groups < layer.heads:
            added = added.unsqueeze(2).expand(-1, -1, layer.heads // groups, -1, -1).flatten(2, 3)
        return Part(spread(keys, groups), spread(values, groups), added)

    @property
    def value_width(self) -> int:
        """Width in which values meet."""
        layer = self.layer
        return {"head": layer.value_head_dim, "context": layer.context_dim, "output": layer.out_dim}[self.plan.values]

    def _folded(self, queries: Tensor, groups: int) -> Tensor:
        """Queries (z or 1, h or 1, n, c) as (z, g, s n, c): heads that share keys and values are laid into the length."""
        queries = execute.to_autocast_dtype(queries)[0]
        heads = self.layer.heads
        queries = queries.expand(self.batch, heads, -1, -1)
        self._length = queries.shape[2]
        folded: Tensor = queries.unflatten(1, (groups, heads // groups)).flatten(2, 3).contiguous()
        return folded

    # -------------------------------------------------------------------------------------------------- results

    def start(self, state: BlocksState) -> None:
        """Check that a state is of this call, or make it so."""
        digest = self.digest()
        if state.partial is None:
            state.digest = digest
        elif state.digest != digest:
            raise ValueError(
                "this state is of a pass with other queries, weights, plan or positions; hand over those it was begun with, or a "
                "new BlocksState()"
            )

    def digest(self) -> str:
        """What tells this call from another: its queries, weights and plan."""
        found = hashlib.sha256(f"{self.plan} {self.layer.scale} {self.batch} {tuple(self.queries.shape)}".encode())
        _add_content(found, [t for t in (self.queries, self._query_positions) if t is not None])
        found.update(_weights_digest(self.layer))
        return found.hexdigest()

    def read(
        self, state: BlocksState, progress: Callable[[BlocksState], object] | None, queries: Tensor, projected: Any
    ) -> Partial:
        """Read the blocks that the state lacks; the merged result of all."""
        if state._done is not None:  # of a file, it lies on the CPU
            partial, count, rows = state._done
            state._done = Partial(partial.output.to(queries.device), partial.lse.to(queries.device)), count, rows
        for block, mask in self.read_from(state.blocks, state.rows):
            merged, rows = state.partial, state.rows
            part = self.part(block, mask, rows, projected)
            with torch.autocast(queries.device.type, enabled=False):  # scores are never taken in half precision
                one = read_part(queries, part, self.layer.scale, self.plan.kernel)
            one = Partial(one.output.to(one.lse.dtype), one.lse)  # rounded after each of many blocks, half precision would be lost
            merged = one if merged is None else merge_partials((merged, one))
            state._done = (merged, state.blocks + 1, rows + block.shape[1])
            del block, mask, part
            if progress is not None:
                progress(state)
        assert state.partial is not None
        return state.partial

    def finish(self, read: Tensor) -> Tensor:
        """The layer's output from the merged one, (z, g, s n, w)."""
        layer, plan, dtype = self.layer, self.plan, self.queries.dtype
        heads = read.unflatten(2, (layer.heads // read.shape[1], -1)).flatten(1, 2)
        sums = None
        if self._live is not None and not bool(self._live.all()):
            sums = self._live.view(*heads.shape[:3], 1)
        if plan.values == "head":
            heads = heads.to(dtype)  # as one kernel hands it to the product that follows
        if plan.values == "output":
            heads = heads.sum(1, keepdim=True)
        out = execute.finish(layer, plan.values, heads, sums, dtype)
        return out.unflatten(1, (self.a.shape[1], self.a.shape[2])) if self.a.dim() == 4 else out


Progress: TypeAlias = Callable[[BlocksState], object] | None


class _Streamed(torch.autograd.Function):
    """Forward: merge block after block. Backward: block after block again, from the merged output and log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, stream: Stream, state: BlocksState, progress: Any, queries: Tensor, projected: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        merged = stream.read(state, progress, queries, projected)
        stream._live = merged.lse > -torch.inf
        ctx.stream = stream
        output = merged.output.clone()
        ctx.save_for_backward(queries, projected, output, merged.lse, *parameters)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stream: Stream = ctx.stream
        queries, projected, output, lse, *parameters = ctx.saved_tensors
        leaves = list(parameters)
        if projected is not None:
            projected = projected.detach().requires_grad_()
            leaves.append(projected)
        grad_queries, found, rows = torch.zeros_like(queries, dtype=lse.dtype), [torch.zeros_like(leaf) for leaf in leaves], 0
        output, grad = output.to(queries.dtype), grad.to(queries.dtype).contiguous()
        is_cast, dtype = stream.autocast
        cast = torch.autocast(queries.device.type, dtype) if is_cast else contextlib.nullcontext()
        for block, mask in stream.read_from(0):
            with torch.enable_grad(), cast:
                part = stream.part(block, mask, rows, projected)
            rows += block.shape[1]
            held = Part(part.keys.detach(), part.values.detach(), None if part.mask is None else part.mask.detach())
            wants_mask = part.mask is not None and part.mask.requires_grad
            made = backward_of_part(queries, held, output, lse, grad, None, stream.layer.scale, wants_mask=wants_mask)
            grad_queries += made[0]
            given = [
                (t, g)
                for t, g in zip((part.keys, part.values, part.mask), made[1:], strict=True)
                if t is not None and t.requires_grad
            ]
            if given and leaves:
                brought = torch.autograd.grad([t for t, _ in given], leaves, [g for _, g in given], allow_unused=True)
                for total, more in zip(found, brought, strict=True):
                    if more is not None:
                        total += more
        grad_projected = None if projected is None else found.pop()
        return None, None, None, grad_queries.to(queries.dtype), grad_projected, *found


def read_part(queries: Tensor, part: Part, scale: float, kernel: str) -> Partial:
    """One block's partial result: by the fused kernel, or by products of a block of scores at a time."""
    if kernel == "fused" or queries.numel() == 0 or part.keys.numel() == 0 or part.values.numel() == 0:
        return attend_part(queries, part, scale)
    rows = queries.shape[0] * queries.shape[1] * queries.shape[2]
    step = max(1, BLOCK_SCORES // rows)
    found = None
    for start in range(0, part.keys.shape[2], step):
        here = slice(start, start + step)
        one = _by_products(queries, Part(part.keys[:, :, here], part.values[:, :, here], _columns(part.mask, here)), scale)
        found = one if found is None else merge_partials((found, one))
    assert found is not None
    return found


def _columns(mask: Tensor | None, here: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[-1] == 1 else mask[..., here]


def _by_products(queries: Tensor, part: Part, scale: float) -> Partial:
    """Softmax statistics of explicit scores; one head of one item by the machine's quickest product."""
    if queries.shape[0] * queries.shape[1] > 1 or part.mask is not None or queries.dtype not in (torch.float32, torch.float64):
        scores = scores_of_part(queries, part, scale)
    else:
        scores = multiply(queries[0, 0] * scale, part.keys[0, 0])[None, None]
    highest = scores.amax(-1, keepdim=True)
    if part.mask is not None:
        highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    values = part.values
    if queries.shape[0] * queries.shape[1] > 1:
        out = weights.to(values.dtype) @ values
    else:
        out = multiply(weights[0, 0].to(values.dtype), values[0, 0].t())[None, None]
    lse = (highest + total.log()).squeeze(-1)
    return Partial(out / total.masked_fill(total == 0.0, 1.0).to(out.dtype), lse)
