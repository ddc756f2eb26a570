"""Measure this machine's `Speeds` and write them to a file that crossattention can plan with.

    python benchmarks/calibrate.py --out speeds.json [--minutes 6] [--dtype float32 bfloat16] [--train] [--device cuda]

Every plan is timed on random shapes; then the constants of the cost model are moved, one after the other, as long as that betters
what counts: how much slower than the best plan those are that the estimates prefer, and how far the estimates are off. Constants
that the times say little of stay near those in use. Use the file in a process with `crossattention.plan.use_speeds("speeds.json")`,
for one question with `crossattention plan --speeds speeds.json`, or always by naming it in ~/.config/crossattention/config.toml:

    speeds = "speeds.json"
"""

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from machine import machine, print_machine
from shapes import Bench, random_shapes

from crossattention.plan import TEXTBOOK, Plan, Sizes, Speeds, speeds_of, use_speeds, write_speeds
from crossattention.plan.choose import ADVANTAGE
from crossattention.plan.cost import CostModel

Times = list[tuple[Sizes, dict[Plan, float]]]
FIXED = {"is_measured", "threads", "quick_from", "new_from", "online_softmax", "fused_widest", "few_queries_from"}
BLUR = 0.08
"""Difference of two logarithmic estimates at which the dearer one is still preferred about a quarter of the time."""
PRICE = 0.003
"""Price of a constant that has moved by a factor of e."""


def gather(minutes: float, dtype: torch.dtype, trains: bool, seed: int, longest: float, device: str, budget: float) -> Times:
    """Seconds of the plans on random shapes, for some minutes; small shapes more often than large ones."""
    found: Times = []
    end = time.perf_counter() + 60 * minutes
    rate = 1.6e11 if device == "cpu" else 4e13
    for count, shape in enumerate(random_shapes(seed)):
        if time.perf_counter() > end:
            return found
        share = ((count * 0.618034) % 1.0) ** 2  # of the longest time: spread evenly, towards the small
        if shape.textbook_flops() * (3 if trains else 1) > rate * longest * share:
            continue
        bench = Bench(shape, dtype, trains, device)
        found.append((bench.sizes, bench.time_plans(budget=budget)))
        print(f"\r{len(found)} shapes", end="", flush=True)
    return found


def error(times: Times, speeds: Speeds) -> float:
    """Root mean square error of the logarithm of the estimates; plans near the best count most, single outliers little."""
    total = weights = 0.0
    for sizes, seconds in times:
        model, best = CostModel(sizes, speeds), min(seconds.values())
        for plan, taken in seconds.items():
            weight = 1.0 if taken < 1.5 * best else 0.3
            total += weight * min(math.log(model.cost(plan).seconds / taken) ** 2, 1.0)
            weights += weight
    return math.sqrt(total / weights)


def regret(sizes: Sizes, seconds: dict[Plan, float], speeds: Speeds) -> float:
    """What the estimates of one shape cost: the slowness of what they prefer, and, for half as much, their error.

    What is preferred is taken softly: estimates that differ by less than `BLUR` share the choice. Slower than the textbook counts
    twice more; the textbook has the head start that the planner gives it.
    """
    model, best = CostModel(sizes, speeds), min(seconds.values())
    logs = {plan: math.log(model.cost(plan).seconds) for plan in seconds}
    errors = [min((logs[p] - math.log(taken)) ** 2, 1.0) * (1.0 if taken < 1.5 * best else 0.3) for p, taken in seconds.items()]
    logs[TEXTBOOK] += math.log(ADVANTAGE)
    lowest = min(logs.values())
    shares = {plan: math.exp((lowest - log) / BLUR) for plan, log in logs.items()}
    cost = sum(
        share * (min(3 * math.log(seconds[p] / best), 1.0) + 2 * max(0.0, math.log(seconds[p] / seconds[TEXTBOOK])))
        for p, share in shares.items()
    )
    return cost / sum(shares.values()) + 0.5 * sum(errors) / len(errors)


def loss(times: Times, speeds: Speeds, start: Speeds, names: Iterable[str]) -> float:
    """Mean regret, and a small price for each constant that has left where it started."""
    moved = sum(math.log(getattr(speeds, name) / getattr(start, name)) ** 2 for name in names)
    return sum(regret(sizes, seconds, speeds) for sizes, seconds in times) / len(times) + PRICE * moved


def fit(times: Times, speeds: Speeds, names: Iterable[str], seconds: float) -> Speeds:
    """The speeds with each named constant moved up and down, by ever smaller factors, as long as that lowers the loss."""
    start, end = speeds, time.perf_counter() + seconds
    factors = {name: 1.4 for name in names if getattr(speeds, name) > 0}
    lowest = loss(times, speeds, start, factors)
    while time.perf_counter() < end and max(factors.values()) > 1.02:
        for name, factor in factors.items():
            for value in (getattr(speeds, name) * factor, getattr(speeds, name) / factor):
                tried = replace(speeds, **{name: value})
                if (found := loss(times, tried, start, factors)) < lowest:
                    lowest, speeds = found, tried
                    break
            else:
                factors[name] = factor**0.6
    return speeds


def constants(dtype: str, trains: bool, device: str) -> list[str]:
    """Names of the constants that such times can say anything of."""
    names = [name for name, value in asdict(speeds_of(device, dtype)).items() if name not in FIXED and value > 0]
    names = [name for name in names if trains or name != "fused_backward"]
    return [name for name in names if (dtype == "float32" and device == "cpu") or not name.startswith("quick")]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", required=True, help="file to write")
    options.add_argument("--minutes", type=float, default=6.0, help="minutes of timing for each dtype")
    options.add_argument("--dtype", nargs="+", choices=["float32", "float64", "bfloat16"], default=["float32", "bfloat16"])
    options.add_argument("--train", action="store_true", help="time training steps too, to fit what the backward pass costs")
    options.add_argument("--seed", type=int, default=1, help="of the shapes; benchmarks/planner.py judges by others")
    options.add_argument("--longest", type=float, default=0.12, help="seconds of a textbook run above which a shape is left out")
    options.add_argument("--fit-seconds", type=float, default=120.0, help="seconds of fitting for each table")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--budget", type=float, default=0.5, help="seconds for the timing of one shape")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--keep", help="file to write the times themselves to")
    given = options.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    print_machine()
    table: dict[tuple[str, str], Speeds] = {}
    for dtype in sorted(given.dtype, reverse=True):  # float32 before half precision, whose scores are taken at its speeds
        table[given.device, dtype] = calibrate(dtype, given)
        use_speeds(table)
    write_speeds(given.out, table, machine())
    print(f"wrote {given.out}")


def calibrate(dtype: str, given: argparse.Namespace) -> Speeds:
    """The constants of one dtype."""
    speeds = replace(speeds_of(given.device, dtype), threads=given.threads if given.device == "cpu" else 1, is_measured=True)
    for trains in (False, True) if given.train else (False,):
        times = gather(given.minutes, getattr(torch, dtype), trains, given.seed, given.longest, given.device, given.budget)
        if given.keep:
            kept = [
                {"sizes": asdict(s), "seconds": {" ".join(asdict(p).values()): t for p, t in each.items()}} for s, each in times
            ]
            Path(f"{given.keep}.{dtype}.{'train' if trains else 'forward'}.json").write_text(json.dumps(kept))
        before = error(times, speeds)
        names = ["fused_backward"] if trains else constants(dtype, trains, given.device)
        speeds = fit(times, speeds, names, given.fit_seconds)
        what = "training steps" if trains else "forwards"
        print(
            f"\r{dtype} {what}: {len(times)} shapes; root mean square error of log time {before:.3f} -> {error(times, speeds):.3f}"
        )
    return speeds


if __name__ == "__main__":
    main()
