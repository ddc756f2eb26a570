"""What does a context that is sharded over processes cost: bytes that travel, and time, with 1, 2 and 4 processes?

    python benchmarks/scale.py [--processes 1 2 4] [--context 4096 65536] [--queries 64] [--rounds 5] [--json FILE]

`layer(a, b)` and its backward pass, float32, B as a DTensor sharded on its length over gloo processes of one thread each on this
machine. Outputs and gradients are compared with those of one process first ("off", the largest difference in terms of the largest
number). "sent" is what the code hands to collectives, counted by it in each process; it must equal the formula of docs/scale.md and
does not depend on the context. Time is the slowest process's by the clock, and its processor time of both: where there are fewer
cores than processes only the latter says how the work is shared. Medians of the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from machine import machine, print_machine

from crossattention import CrossAttention, Plan
from crossattention.attention import count_traffic
from crossattention.attention.sharded import FACTS

PLANS = (Plan(), Plan("context", "context"))
WIDTHS = (11, 18, 10, 10, 14, 14, 12, 12, 12, 12)
HEAD = ("processes", "plan", "m", "off", "sent KB fwd", "sent KB bwd", "formula", "fwd ms", "fwd+bwd ms", "cpu ms")


def formula(plan: Plan, layer: CrossAttention, batch: int, n: int) -> tuple[int, int]:
    """Bytes that a process hands to collectives, forward and backward: docs/scale.md."""
    rows = batch * layer.heads * n
    w = {"head": layer.value_head_dim, "context": layer.context_dim, "output": layer.out_dim}[plan.values]
    c = {"head": layer.head_dim, "context": layer.context_dim, "query": layer.query_dim}[plan.scores]
    width = max(w, c) if plan.kernel == "fused" and (plan.scores, plan.values) != ("context", "context") else w
    on_b = 0
    if plan.scores == "head":
        on_b += sum(p.numel() for p in layer.k_proj.parameters())
    if plan.values == "head":
        on_b += sum(p.numel() for p in layer.v_proj.parameters())
    return 4 * rows * (width + 2) + 8 * len(FACTS), 4 * (rows * c + on_b)


def work(given: argparse.Namespace) -> None:
    """One of the processes: measures, and the first writes what it found."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.FileStore(os.environ["MEETING_FILE"], world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=600))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    found = []
    for plan in PLANS:
        for m in given.context:
            torch.manual_seed(0)
            layer = CrossAttention(given.width, heads=given.heads, plan=plan)
            a = torch.randn(given.batch, given.queries, given.width, requires_grad=True)
            b = torch.randn(given.batch, m, given.width)
            inputs = [a, *layer.parameters()]

            def both(context: torch.Tensor, layer: CrossAttention = layer, a: torch.Tensor = a, inputs: list = inputs) -> list:
                out = layer(a, context)
                return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

            wanted = both(b)
            context = distribute_tensor(b, mesh, [Shard(1)], src_data_rank=None)
            off = max(
                ((x - y).abs().max() / max(1.0, largest_of(wanted, place))).item()
                for place, (x, y) in enumerate(zip(both(context), wanted, strict=True))
            )
            del wanted
            if world > 1:
                del b
            with count_traffic() as forward:
                out = layer(a, context)
            with count_traffic() as backward:
                torch.autograd.grad(out.square().sum(), inputs)
            times: dict[str, list[float]] = {"forward": [], "both": [], "cpu": []}
            for round_ in range(given.rounds + 1):
                dist.barrier()
                begun, cpu = time.perf_counter(), time.process_time()
                with torch.no_grad():
                    layer(a, context)
                dist.barrier()
                middle = time.perf_counter()
                both(context)
                dist.barrier()
                if round_:
                    taken = time.process_time() - cpu
                    for name, seconds in zip(times, (middle - begun, time.perf_counter() - middle, taken), strict=True):
                        times[name].append(seconds)
            slowest = torch.tensor([statistics.median(seconds) for seconds in times.values()], dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            wants = formula(plan, layer, given.batch, given.queries)
            if (forward.nbytes, backward.nbytes) != wants:
                raise SystemExit(f"{plan}: {forward.nbytes} and {backward.nbytes} bytes were counted, but the formula says {wants}")
            found.append(
                {
                    "processes": world,
                    "plan": str(plan),
                    "context": m,
                    "off": off,
                    "sent_bytes": {"forward": forward.nbytes, "backward": backward.nbytes},
                    "ring_bytes": {"forward": forward.ring_bytes(world), "backward": backward.ring_bytes(world)},
                    "formula_bytes": dict(zip(("forward", "backward"), wants, strict=True)),
                    "seconds": dict(zip(times, slowest.tolist(), strict=True)),
                }
            )
    if rank == 0:
        Path(given.found).write_text(json.dumps(found))
    dist.destroy_process_group()


def largest_of(wanted: list[torch.Tensor], place: int) -> float:
    """Of the output itself; of gradients, of all of them: some are sums of terms that cancel."""
    return max(tensor.abs().max().item() for tensor in (wanted[:1] if place == 0 else wanted[1:]))


def measure(given: argparse.Namespace, world: int) -> list[dict[str, object]]:
    """Start the processes of one row and wait for them."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--found", str(found)]
        places = {"WORLD_SIZE": str(world), "MEETING_FILE": str(Path(folder) / "meeting"), "OMP_NUM_THREADS": "1"}
        children = [subprocess.Popen(command, env={**os.environ, **places, "RANK": str(rank)}) for rank in range(world)]
        try:
            codes = [child.wait(timeout=1800) for child in children]
        finally:
            for child in children:
                child.kill()
        if any(codes):
            raise SystemExit(f"of {world} processes some failed: {codes}")
        return json.loads(found.read_text())


def cells(row: dict) -> tuple[str, ...]:
    """One row of the table."""
    sent, seconds = row["sent_bytes"], row["seconds"]
    return (
        *(str(row["processes"]), row["plan"], f"{row['context']:,}", f"{row['off']:.1e}"),
        *(f"{sent[name] / 1e3:,.1f}" for name in ("forward", "backward")),
        "equal" if sent == row["formula_bytes"] else "differs",
        *(f"{1e3 * seconds[name]:,.1f}" for name in ("forward", "both", "cpu")),
    )


def print_row(texts: tuple[str, ...]) -> None:
    print("".join(text.ljust(width) for text, width in zip(texts, WIDTHS, strict=True)).rstrip(), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], metavar="P", help="default 1 2 4")
    options.add_argument("--context", type=int, nargs="+", default=[4096, 65536], metavar="M", help="m; default 4096 65536")
    for name, default, what in (
        ("batch", 1, "z"),
        ("queries", 64, "n"),
        ("width", 256, "a, b and o"),
        ("heads", 4, "h"),
        ("rounds", 5, "that are timed"),
    ):
        options.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default {default}")
    options.add_argument("--json", metavar="FILE", help="where everything is written")
    options.add_argument("--found", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.found:
        return work(given)
    torch.set_num_threads(1)
    print_machine()
    print_row(HEAD)
    rows = []
    for world in given.processes:
        for row in measure(given, world):
            rows.append(row)
            print_row(cells(row))
    if given.json:
        options_of = {name: value for name, value in vars(given).items() if name != "found"}
        with open(given.json, "w") as file:
            json.dump({"machine": machine(), "options": options_of, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
