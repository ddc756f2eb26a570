"""Does torch.compile make a layer slower or faster than it is eagerly?

    python benchmarks/compiled.py [--only "1 x 1,500"] [--budget 5] [--json FILE]

Each row of rows.py: the layer with the planner's plan fixed, eager against compiled (inductor, one graph), float32 forward without
gradients; of the decode row, all its steps on one context that was prepared before. Both run in turn in one process; figures are
medians, and compilation is not in them. "eager / compiled" is the eager time over the compiled one: above 1, compiling helps.
Beside the decode row's stands the same of projections and `F.scaled_dot_product_attention` written by hand: a compiled call
costs, some 30 microseconds of checks before anything runs, and so short a step shows it.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from machine import machine, print_machine
from report import NOT_SLOWER
from rows import ROWS, Inputs, Row, make_inputs, make_layer
from timing import interleaved
from torch import Tensor

from crossattention import CrossAttention

TOLERANCE = 1e-4
"""Largest difference of the compiled result from the eager one, in terms of the eager result's largest value."""
WIDTHS = (42, 28, 12, 14, 22, 12)
HEAD = ("work (queries x context, widths, heads)", "plan fixed", "eager ms", "compiled ms", "eager / compiled", "compiling s")


def rows(only: str) -> list[Row]:
    """The rows to run."""
    found = [row for row in ROWS if only in row.name]
    if not found:
        raise SystemExit(f"no row's name contains {only!r}; the rows are: {'; '.join(r.name for r in ROWS)}")
    return found


def call_of(row: Row, layer: CrossAttention, inputs: Inputs, *, is_compiled: bool) -> Callable[[], Tensor]:
    """The row's work as one call, eager or compiled."""
    if row.kind != "decode":
        forward = torch.compile(layer, fullgraph=True) if is_compiled else layer
        return lambda: forward(inputs.queries(), inputs.b)
    prepared = layer.prepare(inputs.b, query_length=row.query_length, uses=row.steps)
    attend = torch.compile(layer.attend, fullgraph=True) if is_compiled else layer.attend
    return lambda: torch.stack([attend(a, prepared) for a in inputs.queries().unbind()])


def by_hand(row: Row, layer: CrossAttention, inputs: Inputs, *, is_compiled: bool) -> Callable[[], Tensor]:
    """The steps of a decode row on kept keys and values, written by hand."""
    query, out, heads, width = layer.q_proj, layer.out_proj, row.heads, layer.head_dim
    keys, values = (
        projection(inputs.b).unflatten(-1, (heads, width)).transpose(1, 2).contiguous()
        for projection in (layer.k_proj, layer.v_proj)
    )

    def step(a: Tensor) -> Tensor:
        queries = F.linear(a, query.weight, query.bias).unflatten(-1, (heads, width)).transpose(1, 2)
        read = F.scaled_dot_product_attention(queries, keys, values, scale=layer.scale)
        return F.linear(read.transpose(1, 2).flatten(2), out.weight, out.bias)

    run = torch.compile(step, fullgraph=True) if is_compiled else step
    return lambda: torch.stack([run(a) for a in inputs.queries().unbind()])


@torch.no_grad()
def measure(row: Row, budget: float) -> dict[str, object]:
    """Eager and compiled calls of one row, compared once and then timed."""
    layer = make_layer(row, torch.float32, "cpu").eval()
    lengths = {"query_length": row.query_length, "context_length": row.context_length, "batch": row.batch}
    plan = layer.fix_plan(**lengths, uses=row.steps, repeats=row.repeats, shares_queries=row.kind == "learned")
    inputs = make_inputs(row, torch.float32, "cpu", train=False)
    torch._dynamo.reset()
    calls = {name: call_of(row, layer, inputs, is_compiled=name == "compiled") for name in ("eager", "compiled")}
    begun = time.perf_counter()
    found = calls["compiled"]()
    compiling = time.perf_counter() - begun
    check(row, found, calls["eager"]())
    if row.kind == "decode":
        for name in ("eager", "compiled"):
            calls[f"by hand, {name}"] = by_hand(row, layer, inputs, is_compiled=name == "compiled")
            check(row, calls[f"by hand, {name}"](), found)
    timings = interleaved(calls, budget=budget)
    return {
        "work": row.name,
        "sizes": asdict(row),
        "plan": str(plan),
        "eager_over_compiled": timings["eager"].median / timings["compiled"].median,
        "eager_over_compiled_by_hand": timings["by hand, eager"].median / timings["by hand, compiled"].median
        if "by hand, eager" in timings
        else None,
        "first_call_seconds": compiling,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
    }


def check(row: Row, found: Tensor, wanted: Tensor) -> None:
    """Stop if the compiled layer gives something else than the eager one."""
    difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
    if not difference <= TOLERANCE:
        raise SystemExit(
            f"{row.name}: compiled is wrong: it differs by {difference:.2g} of the largest value, more than {TOLERANCE}"
        )


def print_row(texts: tuple[str, ...]) -> None:
    print("".join(text.ljust(width) for text, width in zip(texts, WIDTHS, strict=True)).rstrip(), flush=True)


def cells(result: dict[str, object]) -> tuple[str, ...]:
    """One row of the table."""
    eager, compiled = (1e3 * result["seconds"][name]["median"] for name in ("eager", "compiled"))
    ratio, first = result["eager_over_compiled"], result["first_call_seconds"]
    hand = result["eager_over_compiled_by_hand"]
    ratios = f"{ratio:.2f}" if hand is None else f"{ratio:.2f} ({hand:.2f} by hand)"
    return result["work"], result["plan"], f"{eager:,.2f}", f"{compiled:,.2f}", ratios, f"{first:.1f}"


def print_summary(results: list[dict[str, object]]) -> None:
    slower = [f"{r['work']} ({r['eager_over_compiled']:.2f})" for r in results if r["eager_over_compiled"] < NOT_SLOWER]
    others = f"; slower: {', '.join(slower)}" if slower else ""
    print(f"\nnot slower (at least {NOT_SLOWER} of the eager speed): {len(results) - len(slower)} of {len(results)} rows{others}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", metavar="TEXT", help="part of a row's name")
    options.add_argument("--budget", type=float, default=5.0, metavar="SECONDS", help="time for a row; five rounds are run anyhow")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--json", metavar="FILE", help="where everything is written, after each row")
    given = options.parse_args()
    chosen = rows(given.only)
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    print_machine()
    print("\nfloat32, forward, cpu\n")
    print_row(HEAD)
    results: list[dict[str, object]] = []
    for row in chosen:
        results.append(measure(row, given.budget))
        print_row(cells(results[-1]))
        if given.json:
            with open(given.json, "w") as file:
                json.dump({"machine": machine(), "options": vars(given), "rows": results}, file, indent=1)
    print_summary(results)


if __name__ == "__main__":
    main()
