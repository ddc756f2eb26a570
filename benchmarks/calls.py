"""What does a call of a few rows take beside the operators that it runs?

    python benchmarks/calls.py [--device cuda] [--clock process] [--budget 3] [--json FILE]

A layer of width 64 with four heads, 2 x 4 queries on 2 x 6 positions and one query on 512, against the same weights through three
projections, `F.scaled_dot_product_attention` and the output projection written by hand. Torch's operators take some five
microseconds each on a processor, so a layer's own questions show here as nowhere else; on a GPU, which waits for them, they show at
larger sizes too. All calls of a group run in turn in one process; figures are medians, and "beside" is what a call takes over its
group's first line, the one by hand.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

import torch
import torch.nn.functional as F
from machine import machine, print_machine
from timing import interleaved
from torch import Tensor

from crossattention import CrossAttention, Plan

WIDTH, HEADS = 64, 4
BATCH, QUERIES, CONTEXT = 2, 4, 6
PLANS = {
    "textbook, pinned": Plan(),
    'plan="auto"': "auto",
    "context+context (explicit), pinned": Plan("context", "context", "explicit"),
    "context+context, pinned": Plan("context", "context"),
}


def by_hand(layer: CrossAttention, a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """The textbook's attention with a layer's weights."""
    query, key, value, out = layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj

    def heads(projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], HEADS, -1).transpose(1, 2)

    read = F.scaled_dot_product_attention(
        heads(F.linear(a, query.weight, query.bias)),
        heads(F.linear(b, key.weight, key.bias)),
        heads(F.linear(b, value.weight, value.bias)),
        attn_mask=None if mask is None else mask[:, None, None, :],
    )
    return F.linear(read.transpose(1, 2).reshape(a.shape[0], a.shape[1], -1), out.weight, out.bias)


def groups(device: str) -> dict[str, tuple[tuple[str, ...], dict[str, Callable[[], object]]]]:
    """Calls that are compared, by the name of their group, with what is on while they run; by hand first."""
    found: dict[str, tuple[tuple[str, ...], dict[str, Callable[[], object]]]] = {}
    layers = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layers[dtype] = {
            name: CrossAttention(WIDTH, heads=HEADS, plan=plan, device=device, dtype=dtype) for name, plan in PLANS.items()
        }
    a, b = torch.randn(BATCH, QUERIES, WIDTH, device=device), torch.randn(BATCH, CONTEXT, WIDTH, device=device)
    one, long = torch.randn(1, 1, WIDTH, device=device), torch.randn(1, 512, WIDTH, device=device)
    mask = torch.ones(BATCH, CONTEXT, dtype=torch.bool, device=device)
    mask[1, CONTEXT - 2 :] = False
    for name, modes, dtype, (x, y), context_mask in (
        ("float32", (), torch.float32, (a, b), None),
        ("float32, context mask", (), torch.float32, (a, b), mask),
        ("float32, 1 query on 512", (), torch.float32, (one, long), None),
        ("float32, gradients wanted", ("grad",), torch.float32, (a, b), None),
        ("bfloat16", (), torch.bfloat16, (a.bfloat16(), b.bfloat16()), None),
        ("float32 under autocast to bfloat16", ("cast",), torch.float32, (a, b), None),
    ):
        chosen = layers[dtype]
        calls: dict[str, Callable[[], object]] = {
            "by hand": lambda layer=chosen["textbook, pinned"], x=x, y=y, m=context_mask: by_hand(layer, x, y, m)
        }
        for plan, layer in chosen.items():
            calls[plan] = lambda layer=layer, x=x, y=y, m=context_mask: layer(x, y, context_mask=m)
        found[name] = (modes, calls)
    layer = layers[torch.float32]["textbook, pinned"]
    prepared = layer.prepare(b)
    found["float32, in two steps"] = (
        (),
        {
            "by hand": found["float32"][1]["by hand"],
            "prepare, then attend": lambda: layer.attend(a, layer.prepare(b)),
            "attend alone": lambda: layer.attend(a, prepared),
        },
    )
    return found


def measure(modes: tuple[str, ...], calls: dict[str, Callable[[], object]], given: argparse.Namespace) -> dict[str, object]:
    """The calls of one group, in turn."""
    clock = time.process_time if given.clock == "process" else time.perf_counter
    with ExitStack() as on:
        on.enter_context(torch.set_grad_enabled("grad" in modes))
        if "cast" in modes:
            on.enter_context(torch.autocast(given.device, torch.bfloat16))
        timings = interleaved(calls, budget=given.budget, rounds=20, device=given.device, clock=clock)
    return {name: asdict(timing) for name, timing in timings.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--clock", default="wall", choices=("wall", "process"), help="on a CPU: by the clock, or processor time")
    options.add_argument(
        "--budget", type=float, default=3.0, metavar="SECONDS", help="time for a group; twenty rounds are run anyhow"
    )
    options.add_argument("--json", metavar="FILE", help="where everything is written")
    given = options.parse_args()
    torch.set_num_threads(1)
    print_machine()
    results = {}
    for name, (modes, calls) in groups(given.device).items():
        results[name] = measure(modes, calls, given)
        hand = results[name]["by hand"]["median"]
        print(f"\n{name:<40}{'us':>8}{'beside':>10}")
        for call, timing in results[name].items():
            print(f"  {call:<38}{1e6 * timing['median']:8.1f}{1e6 * (timing['median'] - hand):10.1f}", flush=True)
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"machine": machine(), "options": vars(given), "groups": results}, file, indent=1)


if __name__ == "__main__":
    main()
