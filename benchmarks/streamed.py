"""A context read from disk in blocks: is memory constant in its length, and how much of the speed in memory is left?

    python benchmarks/streamed.py                              # 100 thousand to 1 million rows, float32
    python benchmarks/streamed.py --rows 100000 1000000 10000000 --file-dtype float16 --train    # 5 GB on disk

Each length runs in a process of its own, whose highest resident size is told beside what it was before the first block. The file
is written to `--folder`, read once so that it is in the page cache, and deleted. In memory, where it fits, the same layer reads one
tensor of all rows, by the plan that it chooses. Times by `--clock process` count the reading thread too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import machine, print_machine
from timing import interleaved

from crossattention import CrossAttention
from crossattention.data.row_files import RowFile

WIDTH = 256


def write(path: Path, rows: int, dtype: str) -> None:
    """Random rows, the same 65,536 over and over: what they are does not change what reading them costs."""
    again = np.random.default_rng(0).standard_normal((1 << 16, WIDTH), np.float32).astype(dtype)
    with open(path, "wb") as file:
        told = {"descr": np.lib.format.dtype_to_descr(again.dtype), "fortran_order": False, "shape": (rows, WIDTH)}
        np.lib.format.write_array_header_1_0(file, told)
        for start in range(0, rows, len(again)):
            file.write(again[: rows - start].tobytes())


def resident() -> float:
    """MB that the process holds now."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3


def measure(options: argparse.Namespace, rows: int) -> dict[str, object]:
    """One length, in this process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layer = CrossAttention(WIDTH, WIDTH, heads=8)
    a = torch.randn(1, options.queries, WIDTH, requires_grad=options.train)
    path = Path(options.folder) / f"rows-{rows}.npy"
    write(path, rows, options.file_dtype)
    file = RowFile(path, dtype=torch.float32)
    clock = time.process_time if options.clock == "process" else time.perf_counter
    for _ in RowFile(path):  # into the page cache
        pass

    def step(out: torch.Tensor) -> None:
        if options.train:
            out.sum().backward()

    with torch.set_grad_enabled(options.train):
        step(layer.attend_blocks(a, list(file.from_block(len(file) - 1))))  # libraries and buffers are there
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before, begun = resident(), clock()
        step(layer.attend_blocks(a, file))
        seconds = clock() - begun
        result: dict[str, object] = {"rows": rows, "seconds": seconds, "resident_before": before}
        with open("/proc/self/status") as lines:
            result["resident_peak"] = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
        result["file_megabytes"] = path.stat().st_size / 1e6
        if rows <= options.in_memory:
            b = torch.cat(list(file))[None]
            plan = layer.plan_for(a.shape, b.shape, trains=options.train).plan
            calls = {"blocks": lambda: step(layer.attend_blocks(a, file)), "memory": lambda: step(layer(a, b))}
            timings = interleaved(calls, budget=options.budget, rounds=3, warmup=1, clock=clock)
            result |= {f"seconds_{name}": timing.median for name, timing in timings.items()}
            result |= {"share_of_speed": timings["memory"].median / timings["blocks"].median, "plan_in_memory": str(plan)}
    path.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--file-dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--train", action="store_true", help="with the backward pass")
    parser.add_argument("--in-memory", type=int, default=1_000_000, help="rows up to which the context is also read in memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--budget", type=float, default=5.0)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the file is written")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options, options.one)))
        return
    print_machine()
    results = []
    for rows in options.rows:
        words = sys.argv[1:]
        ran = subprocess.run([sys.executable, __file__, *words, "--one", str(rows)], capture_output=True, text=True, check=False)
        if ran.returncode:
            sys.exit(ran.stderr)
        result = json.loads(ran.stdout.splitlines()[-1])
        results.append(result)
        share = ""
        if "share_of_speed" in result:
            share = f"; {result['share_of_speed']:.2f} of the speed in memory ({result['plan_in_memory']})"
        held = f"resident {result['resident_before']:,.0f} MB before, {result['resident_peak']:,.0f} at most"
        print(f"{rows:,} rows, {result['file_megabytes']:,.0f} MB on disk: {result['seconds']:.2f} s, {held}{share}", flush=True)
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"machine": machine(), "options": vars(options), "results": results}, file, indent=1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
