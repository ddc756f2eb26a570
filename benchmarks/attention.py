"""When is which plan faster than projecting B to keys and values, always?

    python benchmarks/attention.py [--repeats 15] [--dtype float32] [--train] [--json FILE]

Each row is one piece of work. The peer is hand-written projections with `F.scaled_dot_product_attention`, the same weights;
then every legal plan pinned, and the planner's choice. All run interleaved in one process; figures are medians, ratios are
peer time / our time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import machine, print_machine

from crossattention import CrossAttention
from crossattention.plan import CANDIDATES

# name: z, r (beams on one context, 1 = none), n, m, a, b, heads, head width
WORK = {
    "class token 8x1x401, 384, 6h": (8, 1, 1, 401, 384, 384, 6, 64),
    "1 x 65,536, 768, 12h": (1, 1, 1, 65536, 768, 768, 12, 64),
    "1 x 1,500, 384, 6h": (1, 1, 1, 1500, 384, 384, 6, 64),
    "8 x 16,384, 768, 12h": (1, 1, 8, 16384, 768, 768, 12, 64),
    "32 x 4,096, 1024, 16h": (1, 1, 32, 4096, 1024, 1024, 16, 64),
    "512 x 50,176, b=261, 1h": (1, 1, 512, 50176, 1024, 261, 1, 261),
    "4,096 x 4, a=320, b=768, 8h": (1, 1, 4096, 4, 320, 768, 8, 40),
    "1,024 x 16, a=1280, 20h": (1, 1, 1024, 16, 1280, 768, 20, 64),
    "4,096 x 77, a=320, b=768, 8h": (1, 1, 4096, 77, 320, 768, 8, 40),
    "8 beams on 1 x 1,024, 512, 8h": (1, 8, 1, 1024, 512, 512, 8, 64),
    "256 x 2,048, 1280 on 768, 8h": (1, 1, 256, 2048, 1280, 768, 8, 160),
}


def by_hand(layer: CrossAttention, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What a user writes: repeat the context for beams, project it, call the fused kernel."""
    if a.dim() == 4:
        b = b.repeat_interleave(a.shape[1], 0)
        return by_hand(layer, a.flatten(0, 1), b).unflatten(0, a.shape[:2])
    q = layer.q_proj(a).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    k, v = (p(b).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for p in (layer.k_proj, layer.v_proj))
    out = F.scaled_dot_product_attention(q, k, v)
    return layer.out_proj(out.transpose(1, 2).flatten(2))


def interleaved(calls: dict[str, Callable[[], object]], repeats: int, budget: float) -> dict[str, float]:
    """Median seconds of each call, taken in turn; at least three rounds, then until the budget of seconds is spent."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    for round_ in range(repeats + 1):
        if round_ > 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def measure(name: str, dtype: torch.dtype, train: bool, repeats: int) -> dict[str, object]:
    z, r, n, m, a_dim, b_dim, heads, k = WORK[name]
    layer = CrossAttention(a_dim, b_dim, heads=heads, head_dim=k, dtype=dtype).requires_grad_(train)
    a = torch.randn(z, r, n, a_dim, dtype=dtype) if r > 1 else torch.randn(z, n, a_dim, dtype=dtype)
    b = torch.randn(z, m, b_dim, dtype=dtype)

    def step(run: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return (lambda: run().sum().backward()) if train else run

    def pinned(plan: object) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            layer.plan = plan  # type: ignore[assignment]
            return layer(a, b)

        return run

    textbook = layer.plan_for(a.shape, b.shape).candidate(CANDIDATES[0]).cost.seconds
    costs = {c.plan: c.cost.seconds for c in layer.plan_for(a.shape, b.shape).candidates}
    tried = [plan for plan in CANDIDATES if costs[plan] < 4 * textbook]
    calls = {"by hand": step(lambda: by_hand(layer, a, b)), "auto": step(pinned("auto"))}
    calls |= {str(plan): step(pinned(plan)) for plan in tried}
    with torch.set_grad_enabled(train):
        times = interleaved(calls, repeats, budget=20)
    layer.plan = "auto"
    best = min((plan for plan in times if plan not in ("by hand", "auto")), key=times.__getitem__)
    return {
        "work": name,
        "chosen": str(layer.plan_for(a.shape, b.shape).plan),
        "best": best,
        "times_faster": times["by hand"] / times["auto"],
        "auto_of_best": times["auto"] / times[best],
        "milliseconds": {plan: 1e3 * t for plan, t in times.items()},
        "estimated_milliseconds": {str(plan): 1e3 * costs[plan] for plan in tried},
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=15)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments.add_argument("--train", action="store_true", help="time forward and backward")
    arguments.add_argument("--only", help="part of a row's name")
    arguments.add_argument("--json")
    given = arguments.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    print_machine()
    print(f"\n{'work (n x m)':<32}{'chosen':<28}{'best plan':<28}{'times faster':>13}{'of best':>9}{'by hand ms':>12}")
    rows = []
    for name in WORK:
        if given.only and given.only not in name:
            continue
        row = measure(name, getattr(torch, given.dtype), given.train, given.repeats)
        rows.append(row)
        print(
            f"{name:<32}{row['chosen']:<28}{row['best']:<28}{row['times_faster']:>13.2f}{row['auto_of_best']:>9.2f}"
            f"{row['milliseconds']['by hand']:>12.2f}",
            flush=True,
        )
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"machine": machine(), "dtype": given.dtype, "train": given.train, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
