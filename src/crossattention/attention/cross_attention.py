"""`CrossAttention`: the layer, and the border at which its input is checked and its plan is chosen.

Legend: z batch, r repeats (beams, samples) on one context, n queries, m context length, a/b/o widths of A, B and output, h heads,
g key-value heads, k/v head widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import count
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from crossattention.attention import execute, short
from crossattention.attention.by_distance import attend_by_distance, runs_by_distance
from crossattention.attention.checks import check_probability
from crossattention.attention.fused import to_one_width
from crossattention.attention.masks import ScoreMask, check_attn_mask, check_context_mask, combine_masks, fold_repeats
from crossattention.attention.parts import PositionPart, QueryKeyNorm
from crossattention.attention.prepared import (
    KEPT_CONTEXT,
    UNCHECKED,
    PreparedContext,
    PreparedQueries,
    Stamp,
    fingerprint,
)
from crossattention.attention.products import is_cast, is_looked_into
from crossattention.attention.ragged import PreparedRagged, attend_ragged, contexts_of, forward_ragged, prepare_ragged
from crossattention.attention.score_rows import ScoreRows
from crossattention.attention.sequences import Rows, Sequences, is_ragged
from crossattention.attention.sequences import check_is_tensor as check_is_tensor
from crossattention.attention.sharded import RAGGED_ON_SHARDS, PreparedShard, attend_shard, is_sharded, prepare_shard
from crossattention.attention.streamed import BlocksState, attend_streamed
from crossattention.plan import TEXTBOOK, Choice, Forbidden, Plan, PlanError, Sizes, Speeds, choose_plan
from crossattention.plan.plans import reasons_against

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
ABSORBED: tuple[tuple[str, Literal["scores", "values"], str], ...] = (
    ("q_proj", "scores", "query"),
    ("k_proj", "scores", "context"),
    ("v_proj", "values", "context"),
    ("out_proj", "values", "output"),
)
"""The projection whose weight each meeting space, other than the textbook's, moves to the other side."""

WRITTEN_OUT_USES = 8
"""From so many reads on, keys and values are written out head by head: reads of one query were measured a quarter shorter."""

_tokens = count()
Part = TypeVar("Part", bound=nn.Module)


@lru_cache(maxsize=8192)
def _cached_sizes(
    batch: int,
    query_length: int,
    context_length: int,
    query_dim: int,
    context_dim: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    out_dim: int,
    repeats: int,
    uses: int,
    dtype: torch.dtype,
    device: str,
    shares_queries: bool,
    trains: bool,
    threads: int,
) -> Sizes:
    """`Sizes`, checked once for each combination: a layer asks at every call."""
    return Sizes(
        batch=batch,
        query_length=query_length,
        context_length=context_length,
        query_dim=query_dim,
        context_dim=context_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        out_dim=out_dim,
        repeats=repeats,
        uses=uses,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        shares_queries=shares_queries,
        trains=trains,
        threads=threads,
    )


class CrossAttention(nn.Module):
    """Queries from A read keys and values from B; A gives the output its length, B is what is read.

    weights[z, h, n, m] = softmax over m of (A Wq + bq)(B Wk + bk)^T scale, zero in rows that may attend nothing
    out[z, n]           = concat over h of (weights (B Wv + bv)) Wo + bo

    The products may be bracketed in nine exact ways (`Plan`); by default the layer chooses by the sizes it meets.

    Args:
        query_dim: width of A, a.
        context_dim: width of B, b; default `query_dim`.
        heads: number of query heads, h.
        head_dim: width k of each head's queries and keys; default query_dim // heads. heads * head_dim need not be query_dim.
        value_head_dim: width v of each head's values; default `head_dim`.
        out_dim: width of the output, o; default `query_dim`.
        kv_heads: number of key-value heads, g, a divisor of `heads`, the default; query head i reads key-value head i // (h / g).
        bias: True or False for all four projections, or the names of those that have one, as ("q_proj", "v_proj", "out_proj").
        qk_norm: part that normalises each head's queries and keys.
        positions: part that turns queries and keys or adds to the scores.
        dropout: probability of dropping a weight while training.
        scale: factor of the scores; default 1 / sqrt(head_dim).
        plan: "auto" chooses by size, "textbook" projects B to keys and values always, a `Plan` pins it.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        ValueError: sizes below one, heads that do not divide, an unknown projection or plan name, dropout outside [0, 1).
        PlanError: a pinned plan that a part forbids.

    Cost: see `print(layer.plan_for(a.shape, b.shape))`.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2; the plans: docs/planning.md.

    Example:
        >>> layer = CrossAttention(query_dim=48, context_dim=32, heads=4)
        >>> layer(torch.randn(2, 5, 48), torch.randn(2, 7, 32)).shape
        torch.Size([2, 5, 48])
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        out_dim: int | None = None,
        kv_heads: int | None = None,
        bias: bool | Collection[str] = True,
        qk_norm: QueryKeyNorm | None = None,
        positions: PositionPart | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        plan: Literal["auto", "textbook"] | Plan = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = head_widths(query_dim, heads, head_dim, value_head_dim, kv_heads)
        self.head_dim, self.value_head_dim, self.kv_heads = widths
        self.query_dim, self.heads = query_dim, heads
        self.context_dim = query_dim if context_dim is None else context_dim
        self.out_dim = query_dim if out_dim is None else out_dim
        for name in ("query_dim", "context_dim", "out_dim"):
            check_size(name, getattr(self, name))
        check_probability("dropout", dropout)
        self.dropout = dropout
        self.scale = check_scale(scale, self.head_dim)

        biased = biased_projections(bias)
        kwargs = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(query_dim, heads * self.head_dim, bias="q_proj" in biased, **kwargs)
        self.k_proj = nn.Linear(self.context_dim, self.kv_heads * self.head_dim, bias="k_proj" in biased, **kwargs)
        self.v_proj = nn.Linear(self.context_dim, self.kv_heads * self.value_head_dim, bias="v_proj" in biased, **kwargs)
        self.out_proj = nn.Linear(heads * self.value_head_dim, self.out_dim, bias="out_proj" in biased, **kwargs)
        self.qk_norm = check_part("qk_norm", qk_norm, QueryKeyNorm)
        self.positions = check_part("positions", positions, PositionPart)
        self._token = next(_tokens)
        self.plan = plan
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases, as `torch.nn.MultiheadAttention` has them."""
        reset_projections(self.q_proj, self.k_proj, self.v_proj, self.out_proj)

    # --------------------------------------------------------------------------------------------------- plans

    @property
    def plan(self) -> Literal["auto", "textbook"] | Plan:
        """How the plan is found: "auto" by size, "textbook", or a pinned `Plan`. May be set."""
        return self._plan

    @plan.setter
    def plan(self, plan: Literal["auto", "textbook"] | Plan) -> None:
        if isinstance(plan, str):
            if plan not in ("auto", "textbook"):
                raise ValueError(f'plan must be "auto", "textbook" or a Plan, got {plan!r}')
        elif not isinstance(plan, Plan):
            raise TypeError(f'plan must be "auto", "textbook" or a Plan, got {type(plan).__name__}')
        else:
            refuse_illegal(plan, self.forbidden())
        self._plan = plan

    def forbidden(self) -> tuple[Forbidden, ...]:
        """The meeting spaces that this layer's parts and projections forbid, each with its reason; no dtype forbids any."""
        found = [f for part in (self.qk_norm, self.positions) if part is not None for f in part.forbids]
        for name, chain, space in ABSORBED:
            why = execute.linear_reason(getattr(self, name), name)
            if why is not None:
                found.append(Forbidden(chain, space, why))
        return tuple(found)

    def plan_for(
        self,
        query_shape: Sequence[int],
        context_shape: Sequence[int],
        *,
        uses: int = 1,
        dtype: torch.dtype | None = None,
        trains: bool = False,
        speeds: Speeds | Mapping[tuple[str, str], Speeds] | None = None,
    ) -> Choice:
        """The plan that the layer would run for these shapes, and every other plan: cost, why, what was illegal and why.

        Args:
            query_shape: shape of A: (z, n, a), (z, r, n, a), or (n, a) for learned queries.
            context_shape: shape of B: (z, m, b).
            uses: how many times one prepared B is read.
            dtype: dtype that the work runs in; default the weights', or autocast's where it is on.
            trains: whether a backward pass follows.
            speeds: constants of the device, or a table by device type and dtype, as `crossattention.plan.read_speeds` gives;
                default those in use (`use_speeds`).

        Returns:
            The choice; `print` it for the table, `as_dict()` for JSON. If the plan is pinned, the choice says so.

        Raises:
            ValueError: shapes that the layer cannot take.
        """
        query_shape, context_shape = tuple(query_shape), tuple(context_shape)
        self._check_shapes(query_shape, context_shape)
        repeats = query_shape[1] if len(query_shape) == 4 else 1
        sizes = self._sizes(
            context_shape, query_shape[-2], repeats, uses, dtype, shares_queries=len(query_shape) == 2, trains=trains
        )
        choice = choose_plan(sizes, self.forbidden(), speeds)
        if self.plan == "auto":
            return choice
        pinned = TEXTBOOK if self.plan == "textbook" else self.plan
        assert isinstance(pinned, Plan)
        return Choice(pinned, "given to the layer", sizes, choice.candidates)

    def plan_between(
        self,
        scores: Literal["head", "context", "query"],
        values: Literal["head", "context", "output"],
        query_shape: Sequence[int],
        context_shape: Sequence[int],
        *,
        trains: bool = False,
    ) -> Plan:
        """The plan of given meeting spaces by the kernel that is estimated to be the quickest: for callers who know what they save.

        Args:
            scores: meeting space of scores.
            values: meeting space of values.
            query_shape: shape of A, as in `plan_for`.
            context_shape: shape of B.
            trains: whether a backward pass follows.

        Returns:
            The plan; inside graphs, which do not look at lengths, that of the fused kernel.

        Raises:
            PlanError: a space that something forbids.
        """
        refuse_illegal(Plan(scores, values), self.forbidden())
        if torch.compiler.is_compiling():
            return Plan(scores, values)
        choice = self.plan_for(query_shape, context_shape, trains=trains)
        fitting = [c for c in choice.candidates if (c.plan.scores, c.plan.values) == (scores, values) and c.is_legal]
        return min(fitting, key=lambda c: (c.exceeds_memory, c.cost.seconds)).plan

    def fix_plan(
        self,
        *,
        query_length: int,
        context_length: int,
        uses: int = 1,
        batch: int = 1,
        repeats: int = 1,
        shares_queries: bool = False,
        trains: bool = False,
    ) -> Plan:
        """Choose a plan for these sizes and pin it, so that graphs traced later run it; `layer.plan = "auto"` frees it again.

        Args:
            query_length: typical n.
            context_length: typical m.
            uses: typical number of reads of one prepared context.
            batch: typical z.
            repeats: typical r.
            shares_queries: whether the queries are learned ones, (n, a), projected once for the whole batch.
            trains: whether a backward pass follows.

        Returns:
            The plan that was pinned.
        """
        sizes = self._sizes(
            (batch, context_length, self.context_dim),
            query_length,
            repeats,
            uses,
            None,
            shares_queries=shares_queries,
            trains=trains,
        )
        self.plan = choose_plan(sizes, self.forbidden()).plan
        return self.plan

    def _sizes(
        self,
        context_shape: Sequence[int],
        query_length: int,
        repeats: int,
        uses: int,
        dtype: torch.dtype | None,
        *,
        shares_queries: bool = False,
        trains: bool = False,
    ) -> Sizes:
        weight = floating_weight(self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        device = "cpu" if weight is None else weight.device.type
        if dtype is None:
            held = torch.get_default_dtype() if weight is None else weight.dtype
            is_cast = device != "meta" and torch.is_autocast_enabled(device)  # asked of meta, autocast raises
            dtype = torch.get_autocast_dtype(device) if is_cast else held
        widths = (self.query_dim, self.context_dim, self.heads, self.kv_heads, self.head_dim, self.value_head_dim, self.out_dim)
        threads = torch.get_num_threads() if device == "cpu" else 1
        return _cached_sizes(
            context_shape[0],
            query_length,
            context_shape[1],
            *widths,
            repeats,
            uses,
            dtype,
            device,
            shares_queries,
            trains,
            threads,
        )

    def _plan_of(
        self, b: Tensor, query_length: int | None, repeats: int | None, uses: int | None, shares_queries: bool = False
    ) -> Plan:
        """The plan to prepare B by: pinned, the textbook's inside graphs and without hints, else chosen by size."""
        is_traced = torch.compiler.is_compiling()
        if isinstance(self._plan, Plan):
            if not self._plan.is_textbook and not is_traced:
                refuse_illegal(self._plan, self.forbidden())
            return self._plan
        hinted = query_length is not None or uses is not None or repeats is not None
        if self._plan == "textbook" or not hinted or is_traced:
            return TEXTBOOK
        sizes = self._sizes(
            b.shape,
            1 if query_length is None else query_length,
            repeats or 1,
            uses or 1,
            None,
            shares_queries=shares_queries,
            trains=self._trains(b),
        )
        return choose_plan(sizes, self.forbidden()).plan

    def _trains(self, b: Tensor) -> bool:
        """Whether a backward pass may follow what is made of B; queries are not asked, as `prepare` does not know them."""
        if not torch.is_grad_enabled():
            return False
        return b.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def _runs_its_own(self) -> bool:
        """Whether a call runs through this class's own methods: recordings put others in their place, and subclasses may."""
        own = type(self)
        return (
            self.__dict__.keys().isdisjoint(_OWN_NAMES)
            and (own.forbidden, own._plan_of, own._prepare, own._attend) == _OWN  # methods of classes compare by identity
        )

    # ------------------------------------------------------------------------------------------------- running

    def forward(
        self,
        a: Tensor | Sequence[Tensor],
        b: Tensor | Sequence[Tensor],
        *,
        context_mask: Rows | None = None,
        attn_mask: Rows | None = None,
        query_positions: Rows | None = None,
        context_positions: Rows | None = None,
    ) -> Tensor | list[Tensor]:
        """Let every query of A read B: `attend(a, prepare(b, query_length=n, uses=1))` by the same plan.

        Args:
            a: queries (z, n, a); or learned queries (n, a), projected once for the whole batch; or (z, r, n, a), r sequences that
                read one B; or, of unlike lengths, a list of z tensors (n, a) or a jagged nested tensor.
            b: context (z, m, b); any length m, also 0; or a list of z tensors (m, b) or a jagged nested tensor. Masks and
                positions of what is ragged come as lists too, one tensor an item (docs/any_size.md).
            context_mask: bool (z, m), True = may be attended.
            attn_mask: bool, or floating and added to the scaled scores; broadcasts to (z, h, n, m), or (z, r, h, n, m).
            query_positions: integers (n,) or (z, n), for a position part; default 0, 1, ...
            context_positions: integers (m,) or (z, m), for a position part; default 0, 1, ...

        Returns:
            (z, n, o), or (z, r, n, o); a list where A is a list, jagged where A is jagged. A query that may attend nothing gets the
            output bias.

        Raises:
            ValueError: wrong widths, batches, dtypes or mask shapes; NaN or +inf in a mask; positions without a position part.
            TypeError: a mask that is neither bool nor, for `attn_mask`, floating.

        Cost: see `plan_for`.
        """
        if not torch.compiler.is_compiling() and self._runs_its_own() and (way := short.way_of(self, a, b)) is not None:
            assert isinstance(a, Tensor) and isinstance(b, Tensor)
            if attn_mask is None and query_positions is None and context_positions is None:
                out = short.run(self, a, b, context_mask, way)
                if out is not None:
                    return out
            return self._attend(
                a, self._prepare(b, context_mask, context_positions, way.plan, stamped=False), attn_mask, query_positions
            )
        of_context = {"context_mask": context_mask, "context_positions": context_positions}
        if is_ragged(a) or is_ragged(b):
            if is_sharded(b):
                raise TypeError(RAGGED_ON_SHARDS)
            return forward_ragged(self, a, b, attn_mask=attn_mask, query_positions=query_positions, **of_context)
        check_is_tensor("queries", a)
        assert isinstance(a, Tensor)
        if is_sharded(b):
            prepared = self.prepare(
                b,
                context_mask=context_mask,
                query_length=a.shape[-2],
                repeats=a.shape[1] if a.dim() == 4 else None,
                uses=1,
                shares_queries=a.dim() == 2,
                context_positions=context_positions,
            )
            of_shards: Tensor = self.attend(a, prepared, attn_mask=attn_mask, query_positions=query_positions)
            return of_shards
        check_is_tensor("context", b)
        assert isinstance(b, Tensor)
        self._check_shapes(tuple(a.shape), tuple(b.shape))
        self._check_tensor("queries", a)
        plan = self._plan_of(b, a.shape[-2], a.shape[1] if a.dim() == 4 else None, 1, shares_queries=a.dim() == 2)
        prepared = self._prepare(b, context_mask, context_positions, plan, stamped=False)
        return self._attend(a, prepared, attn_mask, query_positions)

    def prepare(
        self,
        b: Rows,
        *,
        context_mask: Rows | None = None,
        query_length: int | None = None,
        repeats: int | None = None,
        uses: int | None = None,
        shares_queries: bool = False,
        context_positions: Rows | None = None,
        plan: Plan | None = None,
    ) -> PreparedContext | PreparedRagged | PreparedShard:
        """Make of B, once, what `attend` reads any number of times: the cross-attention key-value cache, as a value.

        Args:
            b: context (z, m, b); or, of unlike lengths, a list of z tensors (m, b) or a jagged nested tensor.
            context_mask: bool (z, m), True = may be attended; of a ragged context a list with one (m,) an item, or jagged. It
                belongs to the prepared context.
            query_length: hint for the planner: n of each read.
            repeats: hint: r of each read, where queries come as (z, r, n, a).
            uses: hint: how many reads there will be. Without any hint the textbook's keys and values are made; with some, the
                others count as 1.
            shares_queries: hint: each read has learned queries (n, a), projected once for the whole batch.
            context_positions: integers (m,) or (z, m), for a position part; of a ragged context a list, and each item counts from 0
                by default.
            plan: prepare by this one, whatever the layer's is.

        Returns:
            The prepared context; `PreparedRagged` of a ragged one. It is refused after the weights that made it changed.

        Raises:
            ValueError: wrong width, dtype or mask shape.
            TypeError: a mask that is not bool.
            PlanError: a given plan that something forbids.

        Cost: two projections of B by the textbook plan, nothing by context+context.

        Example:
            >>> layer = CrossAttention(48, 32, heads=4)
            >>> prepared = layer.prepare(torch.randn(2, 7, 32), query_length=1, uses=200)
            >>> layer.attend(torch.randn(2, 3, 1, 48), prepared).shape  # 3 beams read one context
            torch.Size([2, 3, 1, 48])
        """
        ragged: Sequences | None = None
        if is_ragged(b):
            ragged, b = contexts_of(self, b)
        for name, hint in (("query_length", query_length), ("repeats", repeats), ("uses", uses)):
            lowest = 0 if name == "query_length" else 1
            if hint is not None and hint < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {hint}")
        if plan is not None and not plan.is_textbook and not torch.compiler.is_compiling():
            refuse_illegal(plan, self.forbidden())
        if is_sharded(b):
            hints = (query_length, repeats, uses, shares_queries)
            return prepare_shard(self, b, context_mask, context_positions, plan, *hints)
        check_is_tensor("context", b)
        assert isinstance(b, Tensor)
        self._check_context(tuple(b.shape))
        if plan is None:
            plan = self._plan_of(b, query_length, repeats, uses, shares_queries)
        if ragged is not None:
            return prepare_ragged(self, ragged, context_mask, context_positions, plan)
        return self._prepare(b, context_mask, context_positions, plan, stamped=True, uses=uses or 1)

    def extend(
        self,
        prepared: PreparedContext,
        more: Tensor,
        *,
        context_mask: Tensor | None = None,
        context_positions: Tensor | None = None,
    ) -> PreparedContext:
        """What `prepare` would make of the context and more of it after its end, without making the first part again.

        Args:
            prepared: result of this layer's `prepare`. Not changed.
            more: further positions (z, m', b).
            context_mask: bool (z, m'), True = may be attended.
            context_positions: integers (m',) or (z, m'), for a position part; default m, m + 1, ...

        Returns:
            The prepared context of all m + m' positions, by the plan of the first part.

        Raises:
            ValueError: another width, batch, dtype or mask shape; another layer prepared the context, or weights changed since.
            TypeError: `prepared` is no prepared context, or a mask is not bool.

        Cost: two projections of m' positions by the textbook plan; one copy of what both parts keep.

        Example:
            >>> layer = CrossAttention(48, 32, heads=4)
            >>> prepared = layer.extend(layer.prepare(torch.randn(2, 7, 32)), torch.randn(2, 3, 32))
            >>> prepared.context_length
            10
        """
        if isinstance(prepared, PreparedRagged):
            raise TypeError("extend takes a dense prepared context, not a ragged one; prepare the longer sequences again")
        if isinstance(prepared, PreparedShard):
            raise TypeError(
                "a sharded context cannot be extended: what follows its end would all lie in the last process; prepare it whole"
            )
        if not isinstance(prepared, PreparedContext):
            raise TypeError(
                f"extend expects what this layer's prepare returned, got {type(prepared).__name__}; call prepare(b) first"
            )
        check_is_tensor("context", more)
        self._check_context(tuple(more.shape))
        self._check_prepared(prepared)
        if more.shape[0] != prepared.batch:
            raise ValueError(f"more of the context has batch {more.shape[0]} but the prepared context has batch {prepared.batch}")
        if self.positions is not None and context_positions is None:
            start = prepared.context_length
            context_positions = torch.arange(start, start + more.shape[1], device=more.device)
        after = self._prepare(more, context_mask, context_positions, prepared.plan, stamped=False)
        if after.keys.dtype != prepared.keys.dtype:
            raise ValueError(
                f"the prepared context is {prepared.keys.dtype} but more of it would be {after.keys.dtype}; extend under the "
                "torch.autocast that prepare ran under"
            )
        return prepared.followed_by(after)

    def prepare_projected(self, keys: Tensor, values: Tensor, *, context_mask: Tensor | None = None) -> PreparedContext:
        """A prepared context of keys and values that the caller made, as where parts of their projections are kept.

        Args:
            keys: (z, m, g k), what the key projection would give.
            values: (z, m, g v), what the value projection would give.
            context_mask: bool (z, m), True = may be attended.

        Returns:
            The prepared context of the textbook plan. It is not checked for staleness: whoever made the keys answers for them.

        Raises:
            ValueError: widths that are not the layer's, shapes that differ, parts that stand behind the key projection.
            TypeError: a mask that is not bool.
        """
        if self.qk_norm is not None or self.positions is not None:
            raise ValueError("prepare_projected takes keys as they are, but this layer has a part behind its key projection")
        wanted = (self.kv_heads * self.head_dim, self.kv_heads * self.value_head_dim)
        if keys.dim() != 3 or keys.shape[:2] != values.shape[:2] or (keys.shape[-1], values.shape[-1]) != wanted:
            raise ValueError(
                f"keys and values must be (batch, length, {wanted[0]}) and (batch, length, {wanted[1]}), got "
                f"{tuple(keys.shape)} and {tuple(values.shape)}"
            )
        if context_mask is not None:
            check_context_mask(context_mask, keys.shape[0], keys.shape[1], keys.device)
        keys = execute.split_heads(keys, self.kv_heads).transpose(1, 2)
        values = execute.split_heads(values, self.kv_heads).transpose(1, 2)
        keys, values = to_one_width(keys, values)
        return PreparedContext(keys, values, None, context_mask, None, TEXTBOOK, UNCHECKED)

    def prepare_queries(self, a: Tensor, *, space: Literal["head", "context", "query"] = "head") -> PreparedQueries:
        """Bring queries into a meeting space, once, to read any number of contexts: what learned queries ask for.

        Args:
            a: learned queries (n, a), or queries (z, n, a).
            space: the meeting space of scores of the plan that the contexts are prepared by: `prepared.plan.scores`.

        Returns:
            The prepared queries, which `attend` takes in the place of queries. They are refused after the weights that made them
            changed.

        Raises:
            ValueError: another space, a wrong width or dtype; a layer with a position part, which places queries at each read.
            PlanError: a space that a part forbids.

        Cost: one projection of the queries; in the "context" space a second one.
        """
        check_is_tensor("queries", a)
        if space not in ("head", "context", "query"):
            raise ValueError(f'space must be "head", "context" or "query", got {space!r}')
        if self.positions is not None:
            raise ValueError(
                "queries of a layer with a position part are placed at each read and cannot be prepared; attend with them"
            )
        if a.dim() not in (2, 3) or a.shape[-1] != self.query_dim:
            raise ValueError(
                f"queries must be learned (length, {self.query_dim}) or (batch, length, {self.query_dim}), got {tuple(a.shape)}"
            )
        self._check_tensor("queries", a)
        if space != "head" and not torch.compiler.is_compiling():
            refuse_illegal(Plan(space, "head"), self.forbidden())
        queries, _ = execute.make_queries(self, space, a.unsqueeze(0) if a.dim() == 2 else a, None)
        stamp = UNCHECKED
        if not torch.compiler.is_compiling():
            stamp = Stamp.of(self._token, self._queries_made_of(space))
        return PreparedQueries(queries, tuple(a.shape), space, stamp)

    def attend(
        self,
        a: Rows | PreparedQueries,
        prepared: PreparedContext | PreparedRagged | PreparedShard,
        *,
        attn_mask: Rows | None = None,
        query_positions: Rows | None = None,
        context_mask: None = None,
    ) -> Rows:
        """Let every query read the prepared context.

        out[z, n] = sum over heads of softmax(A Wq Wk^T B^T scale) B Wv Wo, evaluated in the order that `prepared` was made for.

        Args:
            a: queries (z, n, a), learned queries (n, a), or (z, r, n, a): r beams or samples that read one context without a copy
                of it or of its projections; or what `prepare_queries` made of queries, in the space of this context's plan; or, of
                unlike lengths, a list of z tensors (n, a) or a jagged nested tensor.
            prepared: result of this layer's `prepare`. Not changed.
            attn_mask: bool, or floating and added to the scaled scores; broadcasts to (z, h, n, m), or (z, r, h, n, m).
            query_positions: integers (n,) or (z, n), for a position part; default 0, 1, ...
            context_mask: not taken here: it belongs to `prepare`.

        Returns:
            (z, n, o), or (z, r, n, o); a list where A is a list, jagged where A is jagged. A query that may attend nothing gets the
            output bias.

        Raises:
            ValueError: width or batch of the queries is wrong; another layer prepared the context, or weights changed since; a
                `context_mask` was passed; NaN or +inf in a mask.
            TypeError: `prepared` is no prepared context, or a mask of a wrong dtype.

        Cost: n m (k + v) multiply-adds a head in the "head" spaces; see `plan_for`.
        """
        if attn_mask is None and query_positions is None and context_mask is None and self._is_plain_step(a, prepared):
            assert isinstance(a, Tensor) and isinstance(prepared, PreparedContext)
            return short.attend_plainly(self, a, prepared.keys, prepared.values, prepared.mask)
        if not isinstance(prepared, PreparedContext | PreparedRagged | PreparedShard):
            raise TypeError(
                f"attend expects what this layer's prepare returned, got {type(prepared).__name__}; for a raw context call "
                "layer(a, b), or layer.attend(a, layer.prepare(b))"
            )
        if context_mask is not None:
            raise ValueError(
                "context_mask belongs to the prepared context and would be ignored here; pass it to prepare(b, context_mask=...), "
                "or mask single pairs with attn_mask"
            )
        if isinstance(prepared, PreparedShard):
            if is_ragged(a):
                raise TypeError(RAGGED_ON_SHARDS)
        elif isinstance(prepared, PreparedRagged) or is_ragged(a):
            return attend_ragged(self, a, prepared, attn_mask, query_positions)
        assert isinstance(a, Tensor | PreparedQueries)
        if isinstance(a, PreparedQueries) and query_positions is not None:
            raise ValueError(
                "query_positions were passed but prepared queries have none to place; attend with the queries themselves"
            )
        if isinstance(prepared, PreparedShard):
            return attend_shard(self, a, prepared, attn_mask, query_positions)
        self._check_attendable(a, prepared)
        return self._attend(a, prepared, attn_mask, query_positions)

    def attend_blocks(
        self,
        a: Tensor,
        blocks: Iterable[Tensor | tuple[Tensor, Tensor]],
        *,
        progress: Callable[[BlocksState], object] | None = None,
        state: BlocksState | None = None,
        query_positions: Tensor | None = None,
        plan: Plan | None = None,
    ) -> Tensor:
        """Let every query read a context that comes in blocks and is never held whole: `layer(a, b)` of the blocks end to end.

        lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i,   over the blocks i

        Args:
            a: queries (z, n, a), learned queries (n, a), or (z, r, n, a).
            blocks: tensors (z, m, b), or (m, b) where z is 1, each of any length; or pairs of one and a bool mask (z, m) or (m,),
                True = may be attended. A generator, a list, or a file (`crossattention.data.row_files.RowFile`). The backward pass
                reads them a second time, so an iterator, which can be read once, is taken only where no gradient is asked for.
                Blocks on the CPU go to the queries' device one by one.
            progress: called after each block with the state, whose `.rows` and `.blocks` tell how far the pass is.
            state: an empty `BlocksState` that is brought up to date after each block; one of an interrupted pass, from which this
                call goes on with the same blocks, after those that it has.
            query_positions: integers (n,) or (z, n), for a position part. Context positions count through all blocks.
            plan: read by this plan; default the layer's, or chosen for a long context.

        Returns:
            (z, n, o), or (z, r, n, o). Gradients reach queries and weights.

        Raises:
            ValueError: no block; a block of another width, batch or dtype, or that requires a gradient; an iterator where gradients
                are asked for; dropout while training; a state of another call.
            TypeError: blocks or a mask of a wrong type.

        Cost: memory of one block, forward and backward, and of the queries' size; keys are made a second time in the backward pass.
        Source: Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682.

        Example:
            >>> layer = CrossAttention(48, 32, heads=4)
            >>> a, b = torch.randn(1, 5, 48), torch.randn(1, 700, 32)
            >>> bool((layer.attend_blocks(a, b.split(256, 1)) - layer(a, b)).abs().max() < 1e-5)
            True
        """
        check_is_tensor("queries", a)
        if plan is not None:
            refuse_illegal(plan, self.forbidden())
        return attend_streamed(self, a, blocks, progress=progress, state=state, query_positions=query_positions, plan=plan)

    def _prepare(
        self,
        b: Tensor,
        context_mask: Tensor | None,
        positions: Tensor | None,
        plan: Plan,
        *,
        stamped: bool,
        uses: int = 1,
        only_keys: bool = False,
    ) -> PreparedContext:
        self._check_tensor("context", b)
        if context_mask is not None:
            check_context_mask(context_mask, b.shape[0], b.shape[1], b.device)
        positions = self._positions_of("context_positions", positions, b.shape[0], b.shape[1], b.device)
        keys, values, key_bias = execute.make_keys_and_values(self, plan, b, positions, only_keys=only_keys)
        if uses >= WRITTEN_OUT_USES and "context" not in (plan.scores, plan.values):
            keys, values = keys.contiguous(), values.contiguous()
        stamp = UNCHECKED
        if stamped and not torch.compiler.is_compiling():
            stamp = Stamp.of(self._token, self._made_of(plan, keys, values))
        return PreparedContext(keys, values, key_bias, context_mask, positions, plan, stamp)

    def _attend(
        self, a: Tensor | PreparedQueries, prepared: PreparedContext, attn_mask: Tensor | None, query_positions: Tensor | None
    ) -> Tensor:
        if attn_mask is None and query_positions is None:
            if isinstance(a, Tensor) and self._is_plain_step(a, prepared):
                return short.attend_plainly(self, a, prepared.keys, prepared.values, prepared.mask)
            if self._is_plain_read_of_b(a, prepared):
                return short.attend_b_plainly(self, a, prepared.keys[:, 0], prepared.plan.kernel, prepared.mask)
        if isinstance(a, Tensor) and attn_mask is None and execute.learns_scores(self.positions):
            out = self._attend_by_distance(a, prepared, query_positions)
            if out is not None:
                return out
        joins = self._joins_key_bias(prepared)
        queries, mask = self._meet(a, prepared, attn_mask, query_positions, adds_key_bias=not joins)
        keys = prepared.keys
        if joins:
            assert prepared.key_bias is not None
            queries, keys = execute.join_key_bias(queries, keys, prepared.key_bias / self.scale)
        dropout = self.dropout if self.training else 0.0
        out = execute.execute(self, prepared.plan, queries, keys, prepared.values, mask, dropout)
        return out.unflatten(1, (a.shape[1], a.shape[2])) if a.dim() == 4 else out

    def _attend_by_distance(self, a: Tensor, prepared: PreparedContext, query_positions: Tensor | None) -> Tensor | None:
        """The output where the position part is a table of distances that projected queries meet; None where it is not."""
        plan = prepared.plan
        is_textbook = plan.scores == plan.values == "head" and self.qk_norm is None and not (self.training and self.dropout)
        if self.positions is None or not is_textbook or prepared.positions is None or torch.compiler.is_compiling():
            return None
        queries, _, positions = self._ask(a, prepared, query_positions)
        assert positions is not None
        values = prepared.values[..., : self.value_head_dim]
        if not runs_by_distance(queries, prepared.keys, values):
            return None
        distances = self.positions.distances(queries, positions, prepared.positions)
        if distances is None:
            return None
        read = attend_by_distance(queries, prepared.keys, values, distances, scale=self.scale, mask=prepared.mask)
        out = execute.finish(self, "head", read, None, values.dtype)
        return out.unflatten(1, (a.shape[1], a.shape[2])) if a.dim() == 4 else out

    def _joins_key_bias(self, prepared: PreparedContext | PreparedRagged) -> bool:
        """Whether the extra score of each key goes in as a column of the keys: no kernel is fused for a mask that is trained.

        A GPU's kernels are quicker without any mask, and would round it to half precision.
        """
        bias = prepared.key_bias
        if bias is None or prepared.plan.kernel == "explicit" or self.scale == 0.0:
            return False
        return bias.device.type != "cpu" or (bias.requires_grad and torch.is_grad_enabled())

    def _is_plain(self, a: Tensor | PreparedQueries, prepared: PreparedContext) -> bool:
        """Whether nothing stands beside the products of a plan and no graph is traced; of lengths, none is zero."""
        return (
            not torch.compiler.is_compiling()  # first: a graph must not ask for lengths
            and self.qk_norm is None
            and self.positions is None
            and self.kv_heads == self.heads
            and not (self.training and self.dropout)
            and (a.dim() > 2 or type(a) is PreparedQueries)
            and 0 not in a.shape
            and 0 not in prepared.keys.shape
            and not torch._C._is_any_autocast_enabled()
            and ((prepared.mask is None and a.dim() < 4) or not (_trains_in_half(prepared) or is_looked_into()))
        )

    def _is_plain_step(self, a: Rows | PreparedQueries, prepared: PreparedContext | PreparedRagged | PreparedShard) -> bool:
        """Whether the textbook's products are all that is asked for and nothing is wrong.

        Decode steps are so short that questions show in them: these take the place of the checks that name what is wrong; those
        follow where one fails.
        """
        if type(prepared) is not PreparedContext or type(a) is not Tensor:
            return False
        plan, keys, weight = prepared.plan, prepared.keys, self._modules["q_proj"]._parameters.get("weight")  # type: ignore[union-attr]
        return (
            (plan is TEXTBOOK or plan == TEXTBOOK)
            and self._is_plain(a, prepared)
            and self.head_dim == self.value_head_dim
            and a.shape[0] == keys.shape[0]
            and a.shape[-1] == self.query_dim
            and weight is not None
            and a.dtype == weight.dtype == keys.dtype == prepared.values.dtype
            and a.device == weight.device
            and self._is_fresh_cache(prepared)
        )

    def _is_plain_read_of_b(self, a: Tensor | PreparedQueries, prepared: PreparedContext) -> bool:
        """Whether a B that is kept as it is can be read in few steps."""
        plan = prepared.plan
        return (
            plan.scores == plan.values == "context"
            and plan.kernel != "blocked"
            and self._is_plain(a, prepared)
            and not _trains_in_half(prepared)
            and (a.dtype == prepared.keys.dtype if isinstance(a, Tensor) else a.queries.dtype == prepared.keys.dtype)
            and not is_looked_into()
        )

    def _meet(
        self,
        a: Tensor | PreparedQueries,
        prepared: PreparedContext,
        attn_mask: Tensor | None,
        query_positions: Tensor | None,
        *,
        adds_key_bias: bool = True,
    ) -> tuple[Tensor, ScoreMask]:
        """The queries in the plan's meeting space, repeats laid into the length, and the one mask of all scores."""
        if attn_mask is not None:
            self._check_attn_mask(a, prepared, attn_mask)
            if a.dim() == 4:
                attn_mask = fold_repeats(attn_mask, a.shape[1], a.shape[2])
        queries, projected, positions = self._ask(a, prepared, query_positions)
        bias = prepared.key_bias.unsqueeze(2) if prepared.key_bias is not None and adds_key_bias else None
        if self.positions is not None and self.positions.adds_to_scores:
            assert positions is not None and prepared.positions is not None
            read = projected if self.positions.reads_queries else None
            added = self.positions.score_bias(read, positions, prepared.positions, self.scale)
            bias = added if bias is None else bias + added
        is_learned = bias is not None and prepared.key_bias is None and execute.learns_scores(self.positions)
        masks = (prepared.mask, attn_mask, bias, prepared.context_length)
        return queries, combine_masks(*masks, queries.dtype, is_learned=is_learned)

    def _ask(
        self, a: Tensor | PreparedQueries, prepared: PreparedContext, query_positions: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries in the plan's meeting space, projected queries where a part reads them, and positions; repeats in the length."""
        if isinstance(a, PreparedQueries):
            return a.queries, None, None
        positions = self._positions_of("query_positions", query_positions, prepared.batch, a.shape[-2], a.device)
        if a.dim() == 4:
            repeats = a.shape[1]
            a = a.flatten(1, 2)
            positions = None if positions is None else positions.repeat(*(1,) * (positions.dim() - 1), repeats)
        elif a.dim() == 2:
            a = a.unsqueeze(0)
        return *execute.make_queries(self, prepared.plan.scores, a, positions), positions

    def _check_attn_mask(self, a: Tensor | PreparedQueries, prepared: PreparedContext, attn_mask: Tensor) -> None:
        repeats = () if a.dim() != 4 else (a.shape[1],)
        target = (prepared.batch, *repeats, self.heads, a.shape[-2], prepared.context_length)
        check_attn_mask(attn_mask, target, a.device)

    def score_map(
        self,
        a: Tensor | PreparedQueries,
        prepared: PreparedContext,
        *,
        attn_mask: Tensor | None = None,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """The weights themselves, (z, h, n, m) or (z, r, h, n, m), by the same scores that `attend` computes; without dropout.

        `crossattention.attention_map` is the public way here.
        """
        self._check_attendable(a, prepared)
        queries, mask = self._meet(a, prepared, attn_mask, query_positions)
        queries, keys = execute.to_autocast_dtype(queries, prepared.keys)
        with torch.autocast(a.device.type, enabled=False):  # as `attend` takes its scores
            weights = execute.explicit_weights(queries, keys, mask, self.scale)
        weights = weights.expand(prepared.batch, -1, -1, -1)
        return weights.unflatten(2, (a.shape[1], a.shape[2])).transpose(1, 2) if a.dim() == 4 else weights

    def score_rows(
        self,
        a: Tensor | PreparedQueries,
        b: Tensor | PreparedContext,
        *,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        query_positions: Tensor | None = None,
        context_positions: Tensor | None = None,
        takes_heads_in_turn: bool = False,
    ) -> ScoreRows:
        """The same weights as rows that are made when they are asked for; of a raw context, no values are made.

        `crossattention.attention_map` with summaries is the public way here. A context mask and context positions belong to a raw
        context. If heads are taken in turn, all rows of some before those of others, their keys are made when their turn comes,
        unless a part or another module than `nn.Linear` makes them.
        """
        makes_keys_late = False
        if isinstance(b, PreparedContext):
            prepared = b
            self._check_attendable(a, prepared)
        else:
            if isinstance(a, PreparedQueries):
                raise TypeError(
                    "prepared queries read a prepared context, got a raw one; pass layer.prepare(b, ...), or the queries"
                )
            check_is_tensor("queries", a)
            check_is_tensor("context", b)
            self._check_shapes(tuple(a.shape), tuple(b.shape))
            self._check_tensor("queries", a)
            plan = self._plan_of(b, a.shape[-2], a.shape[1] if a.dim() == 4 else None, 1, shares_queries=a.dim() == 2)
            has_parts = self.positions is not None or self.qk_norm is not None
            is_plain = plan.scores == "head" and not has_parts and execute.linear_reason(self.k_proj, "k_proj") is None
            makes_keys_late = takes_heads_in_turn and is_plain
            kept = Plan("context", "context") if makes_keys_late else plan
            prepared = self._prepare(b, context_mask, context_positions, kept, stamped=False, only_keys=True)
            prepared = replace(prepared, plan=plan)
        if attn_mask is not None:
            self._check_attn_mask(a, prepared, attn_mask)
        queries, projected, positions = self._ask(a, prepared, query_positions)
        if self.positions is None or not self.positions.reads_queries:
            projected = None
        repeats = a.shape[1] if a.dim() == 4 else None
        return ScoreRows(self, prepared, queries, projected, positions, attn_mask, repeats, a.shape[-2], makes_keys=makes_keys_late)

    # -------------------------------------------------------------------------------------------------- border

    def _made_of(self, plan: Plan, keys: Tensor, values: Tensor) -> list[tuple[str, Tensor]]:
        """The named tensors that a prepared context of this plan depends on: weights, and B itself where the plan keeps it.

        Keys or values that are a view of B share its version, so an edit of B in place is seen through them.
        """
        named: list[tuple[str, Tensor]] = []
        if plan.scores != "context":
            named += _named_weights("k_proj", self.k_proj)
            named += _named_weights("qk_norm", self.qk_norm)
            named += _named_weights("positions", self.positions)
        if plan.scores == "query":
            named += _named_weights("q_proj", self.q_proj)
        if plan.values != "context":
            named += _named_weights("v_proj", self.v_proj)
        if plan.values == "output":
            named += _named_weights("out_proj", self.out_proj)
        if plan.scores == "context":
            named.append((KEPT_CONTEXT, keys))
        if plan.values == "context" and values is not keys:
            named.append((KEPT_CONTEXT, values))
        return named

    def _queries_made_of(self, space: str) -> list[tuple[str, Tensor]]:
        """The named weights that prepared queries were made of; in the "query" space they are the queries themselves, of none."""
        if space == "query":
            return []
        named = _named_weights("q_proj", self.q_proj) + _named_weights("qk_norm", self.qk_norm)
        return named + _named_weights("k_proj", self.k_proj) if space == "context" else named

    def _check_queries(self, a: PreparedQueries, prepared: PreparedContext | PreparedRagged) -> None:
        """Whether these prepared queries are this layer's, up to date, and in the space of this prepared context."""
        if torch.compiler.is_compiling():
            return
        if a.space != prepared.plan.scores:
            raise ValueError(
                f'these queries were prepared for the "{a.space}" space but the context by the plan {prepared.plan}; call '
                f'prepare_queries(a, space="{prepared.plan.scores}")'
            )
        if a.dim() == 3 and a.shape[0] != prepared.batch:
            raise ValueError(f"the prepared queries have batch {a.shape[0]} but the prepared context has batch {prepared.batch}")
        if a.stamp.owner is None:
            return
        if a.stamp.owner != self._token:
            raise ValueError("these queries were prepared by another layer; call this layer's prepare_queries(a)")
        if changed := a.stamp.changed_since(self._queries_made_of(a.space)):
            raise ValueError(
                f"these prepared queries are out of date: {', '.join(changed)} changed since prepare_queries; call it again"
            )

    def _check_attendable(self, a: Tensor | PreparedQueries, prepared: PreparedContext | PreparedRagged) -> None:
        """Whether these queries may read this prepared context."""
        self._check_prepared(prepared)
        if isinstance(a, PreparedQueries):
            return self._check_queries(a, prepared)
        weight = self.q_proj.weight if type(self.q_proj) is nn.Linear else None
        if (
            type(a) is Tensor
            and a.dim() == 3
            and a.shape[2] == self.query_dim
            and a.shape[0] == prepared.batch
            and weight is not None
            and a.dtype == weight.dtype == prepared.keys.dtype == prepared.values.dtype
            and a.device == weight.device
        ):
            return  # the usual case, in one go
        check_is_tensor("queries", a)
        assert isinstance(a, Tensor)
        self._check_shapes(tuple(a.shape), (prepared.batch, prepared.context_length, self.context_dim))
        self._check_tensor("queries", a)
        self._check_dtype(a, prepared)

    def _check_dtype(self, a: Tensor, prepared: PreparedContext | PreparedRagged) -> None:
        """Whether queries have the dtype that the context was prepared in."""
        made = next((t.dtype for t in (prepared.keys, prepared.values) if t.dtype != a.dtype), None)
        if made is not None and not is_cast(a):
            raise ValueError(
                f"the prepared context is {made} but the queries are {a.dtype}; attend under the "
                "torch.autocast that prepare ran under, or prepare again outside of it"
            )

    def _check_prepared(self, prepared: PreparedContext | PreparedRagged) -> None:
        if torch.compiler.is_compiling() or prepared.stamp.owner is None:
            return
        if prepared.stamp.owner != self._token:
            raise ValueError(
                "this prepared context was made by another layer; a prepared context belongs to the layer whose weights made it: "
                "call this layer's prepare(b)"
            )
        if self._is_fresh_cache(prepared):
            return
        changed = prepared.stamp.changed_since(self._made_of(prepared.plan, prepared.keys, prepared.values))
        if changed:
            raise ValueError(
                f"this prepared context is out of date: {', '.join(changed)} changed since prepare (by an optimizer step, by "
                "loading, moving, copying or an edit in place); call prepare(b) again"
            )

    def _is_fresh_cache(self, prepared: PreparedContext | PreparedRagged) -> bool:
        """Whether plain key and value projections are what they were: what decode steps ask, without lists of names."""
        if self.qk_norm is not None or self.positions is not None or (prepared.plan is not TEXTBOOK and prepared.plan != TEXTBOOK):
            return False
        stamp = prepared.stamp
        if stamp.owner != self._token:
            return stamp.owner is None  # made within `forward`, or inside a graph
        prints, seen = stamp.prints, 0
        for name in ("k_proj", "v_proj"):
            projection = self._modules[name]
            if type(projection) is not nn.Linear or "weight" not in projection._parameters:
                return False
            for weight in projection._parameters.values():
                if weight is not None:
                    if seen == len(prints) or prints[seen] != fingerprint(weight):
                        return False
                    seen += 1
        return seen == len(prints)

    def _check_shapes(self, query_shape: tuple[int, ...], context_shape: tuple[int, ...]) -> None:
        self._check_context(context_shape)
        if len(query_shape) not in (2, 3, 4):
            raise ValueError(
                f"queries must be (batch, length, {self.query_dim}), learned (length, {self.query_dim}), or (batch, repeats, "
                f"length, {self.query_dim}), got shape {query_shape}"
            )
        if query_shape[-1] != self.query_dim:
            raise ValueError(
                f"queries have width {query_shape[-1]} but this layer was built with query_dim={self.query_dim}; got shape "
                f"{query_shape}; project them first or build CrossAttention(query_dim={query_shape[-1]})"
            )
        if len(query_shape) > 2 and query_shape[0] != context_shape[0]:
            raise ValueError(
                f"queries have batch {query_shape[0]} but the context has batch {context_shape[0]} (shapes {query_shape} and "
                f"{context_shape}); several query sequences for one context go in as (batch, repeats, length, width)"
            )

    def _check_context(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise ValueError(
                f"context must be (batch, length, {self.context_dim}), got shape {shape}"
                + ("; add a batch dimension with context[None]" if len(shape) == 2 else "")
            )
        if shape[-1] != self.context_dim:
            raise ValueError(
                f"context has width {shape[-1]} but this layer was built with context_dim={self.context_dim}; got shape {shape}; "
                f"project it first or build CrossAttention(context_dim={shape[-1]})"
            )

    def _check_tensor(self, name: str, tensor: Tensor) -> None:
        module = self._modules.get("q_proj")  # asked of its table, as an attribute takes as long as all else here
        weight: Tensor | None = module._parameters.get("weight") if type(module) is nn.Linear else None
        weight = floating_weight(self.q_proj) if weight is None or not weight.is_floating_point() else weight
        if weight is None:  # quantised: what it takes is for it to say
            return
        if tensor.device != weight.device:
            raise ValueError(f"{name} are on {tensor.device} but the layer's weights on {weight.device}; move one of them")
        if tensor.dtype == weight.dtype or is_cast(tensor):
            return
        raise ValueError(
            f"{name} are {tensor.dtype} but the layer's weights are {weight.dtype}; convert one, or run under torch.autocast"
        )

    def _positions_of(self, name: str, given: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor | None:
        """The positions a part will see: those given, else 0, 1, ...; None without a part."""
        if self.positions is None:
            if given is not None:
                raise ValueError(f"{name} were passed but the layer has no position part to use them; build it with positions=...")
            return None
        if given is None:
            return torch.arange(length, device=device)
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor of integers, got {type(given).__name__}")
        # Compared number by number: a graph would take away from two tuples of unlike lengths that batch and length must differ.
        fits = given.dim() in (1, 2) and given.shape[-1] == length and (given.dim() == 1 or given.shape[0] == batch)
        if given.dtype.is_floating_point or given.dtype == torch.bool or not fits:
            raise ValueError(
                f"{name} must be integers, ({length},) or ({batch}, {length}), got {given.dtype} of shape {tuple(given.shape)}"
            )
        return given

    def extra_repr(self) -> str:
        """The sizes that tell this layer from another."""
        groups = f", kv_heads={self.kv_heads}" if self.kv_heads != self.heads else ""
        values = f", value_head_dim={self.value_head_dim}" if self.value_head_dim != self.head_dim else ""
        out = f", out_dim={self.out_dim}" if self.out_dim != self.query_dim else ""
        plan = f', plan="{self.plan}"' if isinstance(self.plan, str) else f", plan={self.plan}"
        return (
            f"query_dim={self.query_dim}, context_dim={self.context_dim}, heads={self.heads}, head_dim={self.head_dim}"
            f"{values}{groups}{out}{plan}"
        )


_OWN_NAMES = ("forbidden", "_plan_of", "_prepare", "_attend")
_OWN = (CrossAttention.forbidden, CrossAttention._plan_of, CrossAttention._prepare, CrossAttention._attend)


def _trains_in_half(prepared: PreparedContext) -> bool:
    """Whether a backward pass may follow in half precision, for which other kernels may be taken."""
    return prepared.keys.dtype in short.HALF and torch.is_grad_enabled()


# ------------------------------------------------------------------------------------------- construction, shared


def check_size(name: str, value: int) -> None:
    """Refuse a size that is no positive integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores, by default 1 / sqrt(head_dim); refused if it is no finite number."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number, got {type(scale).__name__} {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def head_widths(
    query_dim: int, heads: int, head_dim: int | None, value_head_dim: int | None, kv_heads: int | None
) -> tuple[int, int, int]:
    """Head width of scores, head width of values and key-value heads, with their defaults filled in and checked."""
    check_size("query_dim", query_dim)
    check_size("heads", heads)
    if head_dim is None:
        if query_dim % heads:
            raise ValueError(
                f"heads must divide query_dim where head_dim is not given, got query_dim={query_dim} and heads={heads}; "
                f"pass head_dim, or heads that divide {query_dim}"
            )
        head_dim = query_dim // heads
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    kv_heads = heads if kv_heads is None else kv_heads
    for name, size in (("head_dim", head_dim), ("value_head_dim", value_head_dim), ("kv_heads", kv_heads)):
        check_size(name, size)
    if heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads, got kv_heads={kv_heads} and heads={heads}")
    return head_dim, value_head_dim, kv_heads


def biased_projections(bias: bool | Collection[str]) -> frozenset[str]:
    """Names of the projections that have a bias."""
    if not isinstance(bias, bool | Collection):
        raise TypeError(f"bias must be True, False or names of projections, got {bias!r}")
    if isinstance(bias, bool):
        return frozenset(PROJECTIONS if bias else ())
    unknown = sorted({bias} - set(PROJECTIONS)) if isinstance(bias, str) else sorted(set(bias) - set(PROJECTIONS))
    if unknown:
        raise ValueError(f"bias names {', '.join(unknown)}, but the projections are {', '.join(PROJECTIONS)}")
    return frozenset((bias,)) if isinstance(bias, str) else frozenset(bias)


def _named_weights(name: str, module: nn.Module | None) -> list[tuple[str, Tensor]]:
    """A module's parameters under the layer's names; asked for at every `attend`, so plain linears take a short way."""
    if module is None:
        return []
    if type(module) is not nn.Linear or "weight" not in module._parameters:  # pruned: made anew at each call, of another
        return [(f"{name}.{path}", weight) for path, weight in module.named_parameters()]
    held = module._parameters
    return [(f"{name}.{path}", weight) for path, weight in held.items() if weight is not None]


def floating_weight(*projections: nn.Module) -> Tensor | None:
    """The first floating weight among projections that may have been replaced by others; None if all are quantised."""
    for projection in projections:
        weight = getattr(projection, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight
        for parameter in projection.parameters():
            if parameter.is_floating_point():
                return parameter
    return None


def reset_projections(*projections: nn.Linear) -> None:
    """Xavier-uniform weights, zero biases."""
    for projection in projections:
        nn.init.xavier_uniform_(projection.weight)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)


def check_part(name: str, part: Part | None, kind: type[Part]) -> Part | None:
    """Refuse a part that is not of its kind."""
    if part is not None and not isinstance(part, kind):
        raise TypeError(f"{name} must be a {kind.__name__} (a module; see crossattention.layers), got {type(part).__name__}")
    return part


def refuse_illegal(plan: Plan, forbidden: tuple[Forbidden, ...]) -> None:
    """Raise if something forbids a pinned plan.

    Raises:
        PlanError: with every reason.
    """
    reasons = reasons_against(plan, forbidden)
    if reasons:
        raise PlanError(f'plan {plan} is illegal here: {"; ".join(reasons)}; choose another, or plan="auto"')
