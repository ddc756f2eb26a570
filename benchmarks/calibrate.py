"""Measure this machine's `Speeds` and write them to a file that crossattention can plan with.

    python benchmarks/calibrate.py --out speeds.json [--minutes 6] [--dtype float32 bfloat16] [--train]

Every plan is timed on random shapes; then the constants of the cost model are fitted to those times, one after the other, until
none can be bettered. Use the file in a process with `crossattention.plan.use_speeds("speeds.json")`, for one question with
`crossattention plan --speeds speeds.json`, or always by naming it in ~/.config/crossattention/config.toml:

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

from crossattention.plan import Plan, Sizes, Speeds, speeds_of, write_speeds
from crossattention.plan.cost import CostModel

Times = list[tuple[Sizes, dict[Plan, float]]]
FIXED = {"is_measured", "threads", "quick_from", "new_from"}


def gather(minutes: float, dtype: torch.dtype, trains: bool, seed: int, longest: float) -> Times:
    """Seconds of the plans on random shapes, for some minutes; small shapes more often than large ones."""
    found: Times = []
    end = time.perf_counter() + 60 * minutes
    for count, shape in enumerate(random_shapes(seed)):
        if time.perf_counter() > end:
            return found
        share = ((count * 0.618034) % 1.0) ** 2  # of the longest time: spread evenly, towards the small
        if shape.textbook_flops() * (3 if trains else 1) > 1.6e11 * longest * share:
            continue
        bench = Bench(shape, dtype, trains)
        found.append((bench.sizes, bench.time_plans(budget=0.5)))
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


def fit(times: Times, speeds: Speeds, names: Iterable[str], seconds: float) -> Speeds:
    """The speeds with each named constant moved up and down, by ever smaller factors, as long as that lowers the error."""
    factors = dict.fromkeys(names, 1.5)
    lowest, end = error(times, speeds), time.perf_counter() + seconds
    while time.perf_counter() < end and max(factors.values()) > 1.02:
        for name, factor in factors.items():
            for value in (getattr(speeds, name) * factor, getattr(speeds, name) / factor):
                tried = replace(speeds, **{name: value})
                if (err := error(times, tried)) < lowest:
                    lowest, speeds = err, tried
                    break
            else:
                factors[name] = factor**0.6
    return speeds


def constants(dtype: str, trains: bool) -> list[str]:
    """Names of the constants that such times can say anything of."""
    names = [name for name in asdict(speeds_of("cpu", dtype)) if name not in FIXED]
    names = [name for name in names if trains or name != "fused_backward"]
    return [name for name in names if dtype == "float32" or not name.startswith("quick")]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", required=True, help="file to write")
    options.add_argument("--minutes", type=float, default=6.0, help="minutes of timing for each dtype")
    options.add_argument("--dtype", nargs="+", choices=["float32", "float64", "bfloat16"], default=["float32", "bfloat16"])
    options.add_argument("--train", action="store_true", help="time training steps too, to fit what the backward pass costs")
    options.add_argument("--seed", type=int, default=1, help="of the shapes; benchmarks/planner.py judges by others")
    options.add_argument("--longest", type=float, default=0.12, help="seconds of a textbook run above which a shape is left out")
    options.add_argument("--fit-seconds", type=float, default=60.0)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--keep", help="file to write the times themselves to")
    given = options.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    print_machine()
    table: dict[tuple[str, str], Speeds] = {}
    for dtype in given.dtype:
        table["cpu", dtype] = calibrate(dtype, given)
    write_speeds(given.out, table, machine())
    print(f"wrote {given.out}")


def calibrate(dtype: str, given: argparse.Namespace) -> Speeds:
    """The constants of one dtype."""
    speeds = replace(speeds_of("cpu", dtype), threads=given.threads, is_measured=True)
    for trains in (False, True) if given.train else (False,):
        times = gather(given.minutes, getattr(torch, dtype), trains, given.seed, given.longest)
        if given.keep:
            kept = [
                {"sizes": asdict(s), "seconds": {" ".join(asdict(p).values()): t for p, t in each.items()}} for s, each in times
            ]
            Path(f"{given.keep}.{dtype}.{'train' if trains else 'forward'}.json").write_text(json.dumps(kept))
        before = error(times, speeds)
        names = ["fused_backward"] if trains else constants(dtype, trains)
        speeds = fit(times, speeds, names, given.fit_seconds)
        what = "training steps" if trains else "forwards"
        print(
            f"\r{dtype} {what}: {len(times)} shapes; root mean square error of log time {before:.3f} -> {error(times, speeds):.3f}"
        )
    return speeds


if __name__ == "__main__":
    main()
