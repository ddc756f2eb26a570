"""How good are the planner's choices over random shapes, against every other plan and the textbook's?

    python benchmarks/planner.py [--shapes 200] [--seed 2026] [--dtype float32] [--train] [--budget 1.5]
        [--device cuda] [--json FILE]

For each shape every legal plan is forced, interleaved in one process; those estimated at over 4 times the best estimate are not
run, and those at over 1.6 times the fastest in a first run are not repeated. Printed: on how many shapes the choice takes at most
1.10 times the best plan's time, on how many it is "not slower" than the textbook's plan (at least 0.95 of its speed), and every
miss; and how the choice stands among the plans that hold no more memory than the textbook's, as the planner's rule is.
"""

import argparse
import json
import statistics

import torch
from machine import machine, print_machine
from shapes import Bench, Shape, random_shapes

from crossattention.plan import TEXTBOOK

NEAR, NOT_SLOWER = 1.10, 0.95


def judge(shape: Shape, bench: Bench, budget: float) -> dict[str, object]:
    """The choice on one shape beside the best plan and the textbook's."""
    seconds = bench.time_plans(budget)
    chosen = bench.choice.plan
    best = min(seconds, key=seconds.__getitem__)
    within = [plan for plan in seconds if not bench.choice.candidate(plan).exceeds_memory]
    return {
        "shape": str(shape),
        "chosen": str(chosen),
        "best": str(best),
        "of_best": seconds[chosen] / seconds[best],
        "of_best_within_memory": seconds[chosen] / min(seconds[plan] for plan in within),
        "best_exceeds_memory": best not in within,
        "of_textbook": seconds[chosen] / seconds[TEXTBOOK],
        "milliseconds": {str(plan): 1e3 * taken for plan, taken in seconds.items()},
        "estimated_milliseconds": {str(c.plan): 1e3 * c.cost.seconds for c in bench.choice.candidates if c.plan in seconds},
    }


def show(row: dict[str, object]) -> str:
    """One row of the table of misses."""
    return f"{row['shape']:<70}{row['chosen']:<28}{row['best']:<28}{row['of_best']:>8.2f}{row['of_textbook']:>12.2f}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shapes", type=int, default=200)
    options.add_argument("--seed", type=int, default=2026)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--train", action="store_true", help="training steps, in the place of forwards")
    options.add_argument("--limit", type=float, default=2.0, help="seconds of one textbook run above which a shape is left out")
    options.add_argument(
        "--budget", type=float, default=1.5, help="seconds of interleaved rounds for a shape, at least five rounds"
    )
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--json")
    given = options.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    print_machine()
    head = {"shape": "shape", "chosen": "chosen", "best": "best plan"}
    print(f"\n{head['shape']:<70}{head['chosen']:<28}{head['best']:<28}{'of best':>8}{'of textbook':>12}")
    rows: list[dict[str, object]] = []
    for shape in random_shapes(given.seed):
        if len(rows) == given.shapes:
            break
        if (
            shape.textbook_flops() > (1e12 if given.device == "cpu" else 4e13) * given.limit
        ):  # out of reach of any such machine: do not even try
            continue
        bench = Bench(shape, getattr(torch, given.dtype), given.train, given.device)
        if bench.textbook_seconds() > given.limit:
            continue
        row = judge(shape, bench, given.budget)
        rows.append(row)
        if row["of_best"] > NEAR or row["of_textbook"] > 1 / NOT_SLOWER:
            print(show(row), flush=True)
    near = sum(row["of_best"] <= NEAR for row in rows)
    held_back = sum(row["of_best"] > NEAR and row["best_exceeds_memory"] for row in rows)
    near_within = sum(row["of_best_within_memory"] <= NEAR for row in rows)
    slower = sum(row["of_textbook"] > 1 / NOT_SLOWER for row in rows)
    gain = statistics.median(1 / row["of_textbook"] for row in rows)
    print(f"\nwithin {NEAR:.2f} of the best plan: {near} of {len(rows)} ({100 * near / len(rows):.1f} %)")
    print(
        f"of the {len(rows) - near} others, best plans that hold more memory than the textbook's and are passed over: {held_back}"
    )
    share = f"{near_within} of {len(rows)} ({100 * near_within / len(rows):.1f} %)"
    print(f"within {NEAR:.2f} of the best plan that holds no more: {share}")
    print(f"slower than the textbook's plan (under {NOT_SLOWER} of its speed): {slower} of {len(rows)}")
    print(f"times faster than the textbook's plan: median {gain:.2f}, best {max(1 / row['of_textbook'] for row in rows):.1f}")
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"machine": machine(), "options": vars(given), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
