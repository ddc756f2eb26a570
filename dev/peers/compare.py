"""Hold our layer against its peers, weights copied, over random configurations, and print a table: python dev/peers/compare.py.

Options: --configurations of torch.nn.MultiheadAttention (1000), --cases of every other module (100), --seed, --json FILE.
A library that is not installed is named and left out. The machine, the versions and the command stand above the table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent
for folder in (HERE, HERE.parents[1] / "benchmarks"):
    sys.path.insert(0, str(folder))
PEERS = {"torch": "torch_mha", "x_transformers": "with_x_transformers", "timm": "with_timm", "transformers": "with_huggingface"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", type=int, default=1000)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    from agreement import table
    from machine import machine, print_machine, versions

    print(f"python dev/peers/compare.py --configurations {given.configurations} --cases {given.cases} --seed {given.seed}")
    print_machine()
    held = versions("crossattention", "torch", "transformers", "timm", "x-transformers")
    print(", ".join(f"{name} {version or 'not installed'}" for name, version in held.items()) + "\n")
    lines, begun = [], time.process_time()
    for library, module in PEERS.items():
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed; left out", file=sys.stderr)
            continue
        count = given.configurations if library == "torch" else given.cases
        lines += importlib.import_module(module).compare(count, given.seed)
    print(table(lines))
    print(f"\n{time.process_time() - begun:.0f} s of one core")
    for line in lines:
        for case in line.disagreeing[:1]:
            print(f"\n{line.peer}, the first of {line.cases - line.agreeing} that do not agree: {case}")
    if given.json is not None:
        record = {"machine": machine(), "versions": held, "seed": given.seed, "lines": [line.to_json() for line in lines]}
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
