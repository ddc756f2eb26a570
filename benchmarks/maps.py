"""What do summaries of an attention map cost, in time and memory, against one plain forward?

    python benchmarks/maps.py [--queries 512] [--context 50176] [--budget 10] [--json FILE]

TopK(8) and Highlight together, on 512 queries x 50,176 positions x 8 heads of width 64, float32, without gradients, once from a raw
B and once from a prepared one, each against the layer's plain read of the same: `layer(a, b)` and `layer.attend(a, prepared)`. The
layer's plan is the planner's. Calls run in turn in one process in shuffled order; figures are medians. "of plain" is the summaries'
time over the plain read's. Memory is what one call adds to the resident size; "of full" is that over the bytes of the full weights,
with which the summaries are compared once before.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

import torch
from machine import free_gb, machine, print_machine
from timing import interleaved, peak_megabytes

from crossattention import CrossAttention, PreparedContext, attention_map
from crossattention.maps import Highlight, Rows, TopK

TOLERANCE = 1e-6
"""Largest difference of a summary from that of the full weights; of Highlight, in terms of the largest mass."""
SLOWEST = 1.6
"""What the summaries may take of a plain read's time."""
LARGEST = 1 / 20
"""What they may take of the full weights' bytes."""
CHECKED_QUERIES = 8
"""Queries whose top positions are compared with those of their whole rows."""
WIDTHS = (12, 12, 16, 12, 12, 16, 8)
HEAD = ("B", "plain ms", "summaries ms", "of plain", "plain MB", "summaries MB", "of full")


def make(given: argparse.Namespace) -> tuple[CrossAttention, torch.Tensor, torch.Tensor]:
    """The layer and its inputs."""
    width = given.heads * given.head_dim
    layer = CrossAttention(width, given.context_dim or width, heads=given.heads, head_dim=given.head_dim).eval()
    return layer, torch.randn(1, given.queries, width), torch.randn(1, given.context, layer.context_dim)


def check(layer: CrossAttention, a: torch.Tensor, prepared: PreparedContext, k: int) -> None:
    """Stop if the summaries are not those of the full weights, of which the rows of some queries at a time are made."""
    best, mass = attention_map(layer, a, prepared, [TopK(k), Highlight()])
    summed = torch.zeros(mass.shape, dtype=torch.float64)
    for start in range(0, a.shape[1], CHECKED_QUERIES):
        full = attention_map(layer, a[:, start : start + CHECKED_QUERIES], prepared)
        summed += full.double().sum(2)
    rows = attention_map(layer, a, prepared, [Rows(range(CHECKED_QUERIES))])[0]
    wanted, positions = rows.sort(dim=-1, descending=True, stable=True)
    same = positions[..., :k] == best.positions[:, :, :CHECKED_QUERIES]
    differences = {
        "TopK": (wanted[..., :k] - best.weights[:, :, :CHECKED_QUERIES]).abs().max().item(),
        "Highlight": ((mass - summed).abs().max() / summed.max()).item(),
    }
    wrong = {name: difference for name, difference in differences.items() if not difference <= TOLERANCE}
    if wrong or not bool(same.all()):
        raise SystemExit(f"summaries are wrong: {wrong}, {int((~same).sum())} top positions differ")
    print(f"equal to the full weights' summaries: {', '.join(f'{name} to {d:.1e}' for name, d in differences.items())}\n")


def calls_of(layer: CrossAttention, a: torch.Tensor, b: torch.Tensor, k: int) -> dict[str, dict[str, Callable[[], object]]]:
    """Plain read and summaries, from a raw and from a prepared B."""
    summaries = [TopK(k), Highlight()]
    prepared = layer.prepare(b, query_length=a.shape[1], uses=1)
    return {
        "raw": {"plain": lambda: layer(a, b), "summaries": lambda: attention_map(layer, a, b, summaries)},
        "prepared": {
            "plain": lambda: layer.attend(a, prepared),
            "summaries": lambda: attention_map(layer, a, prepared, summaries),
        },
    }


@torch.no_grad()
def measure(given: argparse.Namespace) -> list[dict[str, object]]:
    """Times and memory of each kind of B."""
    layer, a, b = make(given)
    full_bytes = 4 * given.queries * given.context * given.heads
    print(f"plan {layer.plan_for(a.shape, b.shape).plan}; the full weights take {full_bytes / 1e6:,.1f} MB")
    check(layer, a, layer.prepare(b, query_length=given.queries, uses=1), given.top)
    found: list[dict[str, object]] = []
    for kind, calls in calls_of(layer, a, b, given.top).items():
        timings = interleaved(calls, budget=given.budget)
        peaks = {name: peak_megabytes(call) for name, call in calls.items()}
        found.append(
            {
                "b": kind,
                "of_plain": timings["summaries"].median / timings["plain"].median,
                "of_full": None if peaks["summaries"] is None else peaks["summaries"] * 1e6 / full_bytes,
                "full_bytes": full_bytes,
                "peak_megabytes": peaks,
                "seconds": {name: asdict(timing) for name, timing in timings.items()},
            }
        )
    return found


def cells(result: dict[str, object]) -> tuple[str, ...]:
    """One row of the table."""
    plain, summaries = (f"{1e3 * result['seconds'][name]['median']:,.1f}" for name in ("plain", "summaries"))
    megabytes = ["?" if peak is None else f"{peak:,.1f}" for peak in result["peak_megabytes"].values()]
    of_full = "?" if result["of_full"] is None else f"1/{1 / max(result['of_full'], 1e-9):,.1f}"
    return result["b"], plain, summaries, f"{result['of_plain']:.2f}", *megabytes, of_full


def print_row(texts: tuple[str, ...]) -> None:
    print("".join(text.ljust(width) for text, width in zip(texts, WIDTHS, strict=True)).rstrip(), flush=True)


def print_summary(results: list[dict[str, object]]) -> None:
    slow = [r["b"] for r in results if not r["of_plain"] <= SLOWEST]
    large = [r["b"] for r in results if r["of_full"] is None or not r["of_full"] < LARGEST]
    print(f"\nat most {SLOWEST} of a plain read: {'yes' if not slow else 'not ' + ', '.join(slow)}")
    print(f"under 1/{round(1 / LARGEST)} of the full weights' bytes: {'yes' if not large else 'not ' + ', '.join(large)}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("queries", 512, "n"),
        ("context", 50176, "m"),
        ("heads", 8, "h"),
        ("head-dim", 64, "width of a head"),
        ("top", 8, "k of TopK"),
        ("threads", 2, "of torch"),
    ):
        options.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default {default}")
    options.add_argument("--context-dim", type=int, metavar="N", help="width of B; default heads x head-dim")
    options.add_argument("--budget", type=float, default=10.0, metavar="SECONDS", help="time for a row; five rounds are run anyhow")
    options.add_argument("--json", metavar="FILE", help="where everything is written")
    given = options.parse_args()
    needed = 4e-9 * given.context * given.heads * given.head_dim * 8
    if (free := free_gb()) is not None and free < needed:
        raise SystemExit(f"this needs some {needed:.1f} GB and {free} are free; give a smaller --context")
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    print_machine()
    results = measure(given)
    print_row(HEAD)
    for result in results:
        print_row(cells(result))
    print_summary(results)
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"machine": machine(), "options": vars(given), "rows": results}, file, indent=1)


if __name__ == "__main__":
    main()
