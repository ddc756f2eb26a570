"""The planner's choice as text and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crossattention.plan.choose import Choice

ABSORBED = {
    ("scores", "context"): "Wk is absorbed into A",
    ("scores", "query"): "Wq is absorbed into B",
    ("values", "context"): "Wv is applied after reading B",
    ("values", "output"): "Wo is absorbed into B",
}


def show_choice(choice: Choice) -> str:
    """The table that `print(layer.plan_for(...))` shows: the choice, then every plan, cheapest first, illegal ones with reasons."""
    return "\n".join((*_head(choice), *_rows(choice)))


def _head(choice: Choice) -> Iterator[str]:
    s = choice.sizes
    repeats = f" x {s.repeats} on one context" if s.repeats > 1 else ""
    shared = " (learned, shared by the batch)" if s.shares_queries else ""
    groups = f" ({s.kv_heads} key-value heads)" if s.kv_heads != s.heads else ""
    yield (
        f"{s.query_length} queries of width {s.query_dim}{repeats}{shared}, {s.context_length} context positions of width "
        f"{s.context_dim}, batch {s.batch}"
    )
    yield (
        f"{s.heads} heads{groups} of {s.head_dim} (values {s.value_head_dim}), output {s.out_dim}, {s.dtype} on {s.device}, "
        f"{s.uses} use{'s' if s.uses != 1 else ''} of one prepared context"
    )
    yield f"chosen: {choice.plan} - {choice.why}"
    for chain in ("scores", "values"):
        note = ABSORBED.get((chain, getattr(choice.plan, chain)))
        if note:
            yield f"        {chain}: {note} (weight absorption)"


def _rows(choice: Choice) -> Iterator[str]:
    yield ""
    yield f"  {'scores+values (kernel)':<26}{'ms':>10}{'of textbook':>13}{'prepare GF':>12}{'attend GF':>12}{'held MB':>10}"
    textbook = next(c.cost.seconds for c in choice.candidates if c.plan.is_textbook and c.plan.kernel == "fused")
    for candidate in choice.candidates:
        cost, mark = candidate.cost, "*" if candidate.plan == choice.plan else " "
        name = f"{candidate.plan.scores}+{candidate.plan.values} ({candidate.plan.kernel})"
        if candidate.is_legal:
            yield (
                f"{mark} {name:<26}{cost.seconds * 1e3:>10.3f}{cost.seconds / textbook:>13.2f}{cost.prepare_flops / 1e9:>12.4f}"
                f"{cost.attend_flops / 1e9:>12.4f}{cost.prepared_bytes / 1e6:>10.2f}"
                + ("  passed over: holds more at once" if candidate.exceeds_memory else "")
            )
        else:
            yield f"{mark} {name:<26}   illegal: {'; '.join(candidate.reasons)}"


def choice_as_dict(choice: Choice) -> dict[str, object]:
    """The choice as plain data: sizes, plan, why, and every candidate with cost and reasons."""
    return {
        "plan": asdict(choice.plan),
        "why": choice.why,
        "sizes": asdict(choice.sizes),
        "candidates": [
            {
                "plan": asdict(candidate.plan),
                "is_legal": candidate.is_legal,
                "reasons": list(candidate.reasons),
                "exceeds_memory": candidate.exceeds_memory,
                "seconds": candidate.cost.seconds,
                **asdict(candidate.cost),
            }
            for candidate in choice.candidates
        ],
    }
