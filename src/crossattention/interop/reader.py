"""`Reader`: the attention of somebody else's module, run by the planner on the module's own weights.

Legend: z batch, r sequences that read one context, n queries, m context length, a/b/o widths of A, B and output, h heads.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.attention import CrossAttention, Once, PreparedContext, PreparedQueries, execute
from crossattention.attention.masks import ScoreMask, combine_masks, fold_repeats
from crossattention.attention.prepared import UNCHECKED
from crossattention.interop.borrowing import Borrowing
from crossattention.interop.keeping import Kept
from crossattention.interop.replacement import watchers_of
from crossattention.plan import Forbidden, Plan, choose_plan
from crossattention.plan.choose import ADVANTAGE
from crossattention.plan.plans import reasons_against

LEAST_FLOPS = 5_000_000
"""Operations of the projections of a context below which a call is left to the module: planning takes some 20 microseconds."""
KEPT_USES = 32
"""Reads that a context which arrived twice is planned for."""


@dataclass(frozen=True)
class Read:
    """What a call's attention came to.

    Args:
        out: (z, n, o) or (z, r, n, o).
        weights: (z, h, n, m), where they were asked for.
        live: bool, broadcastable to (z, h, n or r n, 1): whether a row had anything to attend; None if all had.
    """

    out: Tensor
    weights: Tensor | None = None
    live: Tensor | None = None

    def live_rows(self) -> Tensor | None:
        """Bool (z or 1, n or 1, 1): rows in which all heads had something to attend; None if all rows had."""
        return None if self.live is None else self.live.all(1)


class Reader:
    """Runs a module's attention by plans.

    Args:
        owner: the module; recordings of it are told.
        borrowing: its sizes and weights.
        own_is_fused: whether the module's own pass runs the textbook's plan through a fused kernel: where that plan is chosen, and
            nothing is kept, `read` then leaves the call to the module.
        keeps: whether contexts may be kept, from the second time in a row that one arrives.
    """

    def __init__(self, owner: nn.Module, borrowing: Borrowing, *, own_is_fused: bool = True, keeps: bool = True) -> None:
        self.owner, self.borrowing, self.own_is_fused, self.keeps = owner, borrowing, own_is_fused, keeps
        self._kept = Kept()
        self._queries: Once[PreparedQueries] = Once()
        self._plans: dict[Any, Plan] = {}
        value_width = borrowing.value_head_dim or borrowing.head_dim
        self._flops_per_number = 2 * (borrowing.kv_heads or borrowing.heads) * (borrowing.head_dim + value_width)
        self._has_modules = bool(borrowing.projections())
        self._left: set[tuple[Any, ...]] = set()
        self._passed: weakref.ref[Tensor] | None = None
        self.left_calls = 0
        self._ran: dict[tuple[Any, ...], int] = {}

    # ------------------------------------------------------------------------------------------------- one call

    def is_small(self, context: Tensor) -> bool:
        """Whether a context is so small that nothing can be gained; asked first, as such calls are short."""
        return context.numel() * self._flops_per_number < LEAST_FLOPS

    @property
    def leaves_any(self) -> bool:
        """Whether calls of some sizes were left to the module before."""
        return bool(self._left)

    def passes(self, query_shape: Sequence[int], b: Tensor, context_shape: Sequence[int], wants_weights: bool = False) -> bool:
        """Whether a call is of sizes that were left to the module before, and brings another context than the one before it.

        Asked first, and of few things: where projections take half a millisecond, what `read` asks is a tenth of it.

        Args:
            query_shape: (z, n, a).
            b: the context as the caller holds it.
            context_shape: its shape as (z, m, b).
            wants_weights: whether weights are asked for.
        """
        is_building = torch.is_grad_enabled()
        if (query_shape, context_shape, b.dtype, is_building, wants_weights) not in self._left:
            return False
        if not self.keeps or is_building:
            self.left_calls += 1
            return True
        if (self._passed is not None and self._passed() is b) or self._kept.was_last(b):
            return False
        self._kept.forget()
        self._passed = weakref.ref(b)
        self.left_calls += 1
        return True

    def read(
        self,
        a: Tensor,
        b: Tensor,
        values_from: Tensor | None = None,
        *,
        arrived: tuple[Tensor, ...] = (),
        own_is_fused: bool | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        wants_weights: bool = False,
        must: bool = False,
    ) -> Read | None:
        """Let queries read a context, without dropout.

        Args:
            a: queries (z, n, a), learned ones (n, a), or (z, r, n, a).
            b: what keys are made of, (z, m, b); values too, unless `values_from` is given.
            values_from: what values are made of, (z, m, b'), where it is another tensor.
            arrived: the contexts as the caller holds them, where `b` and `values_from` are views made of them at each call.
            own_is_fused: as the reader has it, where that depends on the call.
            context_mask: bool (z, m), True = may be attended.
            attn_mask: bool or floating, broadcastable to (z, h, n, m), or (z, r, h, n, m).
            wants_weights: whether the weights are asked for too.
            must: whether the call may not be left to the module, as where that gives NaN in rows without a live key.

        Returns:
            None if the module's own pass is as quick or the context small (`is_small`), or the tensors are not such that this can
            run (of other widths, dtypes or devices than the weights, of a subclass, empty): call the own method then.
        """
        if not must and self.is_small(b):
            self.left_calls += 1
            return None
        contexts = (b,) if values_from is None or values_from is b else (b, values_from)
        is_building = torch.is_grad_enabled()
        short = (a.shape, b.shape, a.dtype, is_building, wants_weights)
        arrival, is_again = self._kept.arrival(contexts, arrived) if self.keeps and not is_building else (None, False)
        if arrival is not None:
            passed, self._passed = self._passed, None
            is_again = is_again or (passed is not None and passed() is (arrived or contexts)[0])
        if short in self._left and not must and not is_again:
            self.left_calls += 1
            return None
        keys_layer, values_layer = self.borrowing.layers()
        if not self._fits(keys_layer, values_layer, a, contexts):
            return None
        weights = self.borrowing.weights()
        makes_graph = is_building and any(t.requires_grad for t in (*contexts, *weights))
        trains = makes_graph or (is_building and a.requires_grad)
        if self.keeps and is_building and not makes_graph and not (trains and _is_checkpointed()):
            arrival, is_again = self._kept.arrival(contexts, arrived)
        if is_again and not self.borrowing.repeats_itself(keys_layer._modules["k_proj"], values_layer._modules["v_proj"]):
            arrival, is_again = None, False
        plan = self._plan(keys_layer, a, b, uses=KEPT_USES if is_again else 1, trains=trains, explicit=wants_weights)
        prepared, is_kept = None, False
        if arrival is not None and is_again and not plan.scores == plan.values == "context":
            recalled = arrival.recall(contexts, weights)
            if recalled is not None and _still_fits(recalled[0].plan, plan, recalled[1], a.shape[-2]):
                prepared = recalled[0]
            else:
                with torch.no_grad():
                    prepared = _prepare(keys_layer, values_layer, plan, contexts, written_out=True)
                arrival.keep(contexts, weights, prepared, a.shape[-2])
            is_kept = True
        if prepared is None:
            if (self.own_is_fused if own_is_fused is None else own_is_fused) and plan.is_textbook and not must:
                if (makes_graph or not is_building or not self.keeps) and len(self._left) < 4096:
                    self._left.add(short)
                self.left_calls += 1
                return None
            prepared = _prepare(keys_layer, values_layer, plan, contexts)
        if context_mask is not None:
            prepared = replace(prepared, mask=context_mask)
        self._note(prepared.plan, a, b, is_kept)
        for listener in watchers_of(self.owner):
            if listener.wants("cross"):
                listener.take(self.owner, "cross", lambda: keys_layer.score_rows(a, prepared, attn_mask=attn_mask))
        if (
            a.dim() == 2
            and not trains
            and prepared.plan.scores != "query"
            and self.borrowing.repeats_itself(keys_layer._modules["q_proj"])
        ):  # learned queries are projected once
            space, learned = prepared.plan.scores, a
            held = learned if learned._base is None else learned._base  # the owner's parameter, where they are a view of it
            view = (learned.data_ptr(), learned.shape, learned.stride())
            a = self._queries.get((held, *weights), lambda: keys_layer.prepare_queries(learned, space=space), space, view)
        if context_mask is None and attn_mask is None and not wants_weights and keys_layer is values_layer and len(contexts) == 1:
            return Read(keys_layer._attend(a, prepared, None, None))
        return self._read_with(keys_layer, values_layer, a, prepared, attn_mask, wants_weights)

    def forget(self) -> None:
        """Drop what is kept of contexts, of learned queries and of weights."""
        self._kept.forget()
        self._queries.forget()
        self.borrowing.forget()
        self._passed = None

    def _read_with(
        self,
        keys_layer: CrossAttention,
        values_layer: CrossAttention,
        a: Tensor | PreparedQueries,
        prepared: PreparedContext,
        attn_mask: Tensor | None,
        wants_weights: bool,
    ) -> Read:
        """The read with masks, weights, or values of another context."""
        if attn_mask is not None and isinstance(a, Tensor) and a.dim() == 4:
            attn_mask = fold_repeats(attn_mask, a.shape[1], a.shape[2])
        queries, _, _ = keys_layer._ask(a, prepared, None)
        bias = None if prepared.key_bias is None else prepared.key_bias.unsqueeze(2)
        mask = combine_masks(prepared.mask, attn_mask, bias, prepared.context_length, queries.dtype)
        weights = None
        if wants_weights:
            out, weights = _explicitly(values_layer, prepared, queries, mask, keys_layer.scale)
        else:
            out = execute.execute(values_layer, prepared.plan, queries, prepared.keys, prepared.values, mask, 0.0)
        if isinstance(a, Tensor) and a.dim() == 4:
            out = out.unflatten(1, (a.shape[1], a.shape[2]))
        return Read(out, weights, mask.live)

    # ------------------------------------------------------------------------------------------------- plans

    def _plan(self, layer: CrossAttention, a: Tensor, b: Tensor, *, uses: int, trains: bool, explicit: bool) -> Plan:
        device = a.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
        forbidden = layer.forbidden() if self._has_modules else self._forbidden_by_parts()
        key = (a.shape, b.shape, uses, trains, explicit, dtype, device, torch.get_num_threads(), forbidden)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 4096:  # lengths that never come again
                self._plans.clear()
            plan = self._plans[key] = self._choose(layer, a, b, uses, trains, explicit, dtype, forbidden)
        return plan

    def _forbidden_by_parts(self) -> tuple[Forbidden, ...]:
        return () if self.borrowing.qk_norm is None else self.borrowing.qk_norm.forbids

    def _choose(
        self,
        layer: CrossAttention,
        a: Tensor,
        b: Tensor,
        uses: int,
        trains: bool,
        explicit: bool,
        dtype: torch.dtype,
        forbidden: tuple[Forbidden, ...],
    ) -> Plan:
        repeats = a.shape[1] if a.dim() == 4 else 1
        sizes = layer._sizes(tuple(b.shape), a.shape[-2], repeats, uses, dtype, shares_queries=a.dim() == 2, trains=trains)
        choice = choose_plan(sizes, forbidden)
        if not explicit:
            return choice.plan
        legal = [c for c in choice.candidates if c.plan.kernel == "explicit" and not reasons_against(c.plan, forbidden)]
        best = min(legal, key=lambda c: (c.exceeds_memory, c.cost.seconds))
        usual = next(c for c in legal if c.plan.is_textbook)
        return best.plan if best.cost.seconds < ADVANTAGE * usual.cost.seconds else usual.plan

    def _note(self, plan: Plan, a: Tensor, b: Tensor, is_kept: bool) -> None:
        key = (plan, tuple(a.shape), tuple(b.shape), is_kept)
        if key in self._ran or len(self._ran) < 64:
            self._ran[key] = self._ran.get(key, 0) + 1

    def describe(self) -> list[str]:
        """Lines for `print(changes)`."""
        of = self.borrowing
        context = (
            f"{of.context_dim}" if of.value_context_dim in (None, of.context_dim) else f"{of.context_dim}/{of.value_context_dim}"
        )
        groups = "" if of.kv_heads in (None, of.heads) else f" ({of.kv_heads} key-value heads)"
        line = f"width {of.query_dim} reads {context}, {of.heads} heads{groups} of {of.head_dim}"
        left = f"; {self.left_calls} calls left to its own forward, as quick there" if self.left_calls else ""
        if not self._ran:
            return [f"{line}: plan chosen by size at each call; none has run yet{left}"]
        times: dict[tuple[str, bool], int] = {}
        for (plan, _, _, is_kept), count in self._ran.items():
            times[str(plan), is_kept] = times.get((str(plan), is_kept), 0) + count
        ran = ", ".join(f"{plan}{' (kept)' if is_kept else ''} x {count}" for (plan, is_kept), count in times.items())
        a, b = next(reversed(self._ran))[1:3]
        return [f"{line}: plan by size; ran {ran}; last {tuple(a)} on {tuple(b)}{left}"]

    # ------------------------------------------------------------------------------------------------- border

    @staticmethod
    def _fits(keys_layer: CrossAttention, values_layer: CrossAttention, a: Tensor, contexts: Sequence[Tensor]) -> bool:
        """Whether the tensors are of the layer's widths, one dtype and device, dense and not empty."""
        weight = keys_layer._modules["k_proj"]._parameters.get("weight")  # type: ignore[union-attr]
        if type(weight) not in _PLAIN:
            return False
        is_cast = torch.is_autocast_enabled(a.device.type)
        widths = (keys_layer.context_dim, values_layer.context_dim)
        return (
            a.dim() in (2, 3, 4)
            and a.shape[-1] == keys_layer.query_dim
            and type(a) in _PLAIN
            and (a.dtype == weight.dtype or is_cast)
            and a.device == weight.device
            and a.is_floating_point()
            and a.numel() > 0
            and all(
                type(b) in _PLAIN
                and not b.is_nested
                and b.dim() == 3
                and b.shape[2] == width
                and b.shape[1] == contexts[0].shape[1]
                and b.shape[0] == (b.shape[0] if a.dim() == 2 else a.shape[0]) == contexts[0].shape[0]
                and (b.dtype == weight.dtype or is_cast)
                and b.device == weight.device
                and b.numel() > 0
                for b, width in zip(contexts, widths, strict=False)
            )
        )


_PLAIN = (Tensor, nn.Parameter)


def _is_checkpointed() -> bool:
    """Whether a checkpoint runs this, for the first time or again: both must save the same tensors, whatever arrived in between."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _still_fits(kept: Plan, wanted: Plan, planned_length: int, length: int) -> bool:
    """Whether what was made by one plan goes on to be read: a plan that length changed is made anew where it changed by half."""
    return kept == wanted or (kept.is_textbook and wanted.is_textbook) or planned_length / 2 < length < planned_length * 2


def _prepare(
    keys_layer: CrossAttention,
    values_layer: CrossAttention,
    plan: Plan,
    contexts: Sequence[Tensor],
    *,
    written_out: bool = False,
) -> PreparedContext:
    """What a plan makes of the context, or of the two that keys and values come from."""
    others = None if len(contexts) == 1 and keys_layer is values_layer else (values_layer, contexts[-1])
    keys, values, key_bias = execute.make_keys_and_values(keys_layer, plan, contexts[0], None, values_of=others)
    if written_out and "context" not in (plan.scores, plan.values):
        keys, values = keys.contiguous(), values.contiguous()
    return PreparedContext(keys, values, key_bias, None, None, plan, UNCHECKED)


def _explicitly(
    layer: CrossAttention, prepared: PreparedContext, queries: Tensor, mask: ScoreMask, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and the weights that gave it."""
    plan = prepared.plan
    queries, keys, values = execute.to_autocast_dtype(queries, prepared.keys, prepared.values)
    with torch.autocast(queries.device.type, enabled=False):
        weights = execute.explicit_weights(queries, keys, mask, scale)
        read = execute._explicit_values(weights, values, plan.values == "output")
    width = {"head": layer.value_head_dim, "context": layer.context_dim, "output": layer.out_dim}[plan.values]
    out = execute.finish(layer, plan.values, read[..., :width], mask.live, values.dtype)
    return out, weights.expand(prepared.batch, -1, -1, -1).to(values.dtype)
