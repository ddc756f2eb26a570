"""Ragged contexts against padding with a mask: is not computing padding worth it, and does it cost anything where there is none?

    python benchmarks/ragged.py                      # forward and training step, list and jagged; JSON with --out FILE
    python benchmarks/ragged.py --clock process      # processor time of one thread, for a machine that is not quiet

The peer pads the same list or jagged tensor within its time, as whoever holds such a batch has to, and calls the same layer with a
mask, whose plan the planner then chooses, or by hand projects to keys and values and calls torch's attention; with `dense` it is
what is called where all lengths are equal, and nobody needs a mask.
"""

import argparse
import json
import time

import torch
from machine import machine, print_machine
from timing import interleaved
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from crossattention import CrossAttention


def long_tail(count: int, mean: float, longest: int) -> list[int]:
    """Lengths of a log-normal tail, scaled to a mean and a longest one."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count - 1, generator=generator).exp()
    rest = (drawn / drawn.mean() * (mean * count - longest) / (count - 1)).round().clamp(1, longest)
    return [longest, *(int(length) for length in rest)]


def tiny(count: int) -> list[int]:
    """Lengths of 1 to 12."""
    return torch.randint(1, 13, (count,), generator=torch.Generator().manual_seed(0)).tolist()


WORKS: dict[str, tuple[list[int], int]] = {  # lengths of the contexts, queries on each
    "64 contexts, mean 81, longest 865; 16 queries": (long_tail(64, 81, 865), 16),
    "64 contexts of 81; 16 queries": ([81] * 64, 16),
    "2,000 contexts of 1 to 12; 4 queries": (tiny(2000), 4),
    "2,000 contexts of 1 to 12; 1 query": (tiny(2000), 1),
}
WIDTH, HEADS = 512, 8


def padded(b: list[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """One dense tensor, and what of it is real."""
    if isinstance(b, list):
        lengths = torch.tensor([len(one) for one in b])
        dense = pad_sequence(b, batch_first=True)
    else:
        lengths = b.offsets().diff()
        dense = b.to_padded_tensor(0.0)
    return dense, torch.arange(dense.shape[1]) < lengths[:, None]


def measure(name: str, form: str, train: bool, budget: float, clock: object) -> dict[str, object]:
    """Median milliseconds of ours and of the padded call."""
    lengths, queries = WORKS[name]
    torch.manual_seed(0)
    layer = CrossAttention(WIDTH, WIDTH, heads=HEADS)
    a = torch.randn(len(lengths), queries, WIDTH, requires_grad=train)
    b: list[Tensor] | Tensor = [torch.randn(length, WIDTH, requires_grad=train) for length in lengths]
    if form == "jagged":
        b = torch.nested.nested_tensor([one.detach() for one in b], layout=torch.jagged, requires_grad=train)

    def step(out: Tensor) -> None:
        if train:
            out.sum().backward()

    def ours() -> None:
        step(layer(a, b))

    def masked() -> None:
        dense, real = padded(b)
        step(layer(a, dense, context_mask=real))

    def by_hand() -> None:
        dense, real = padded(b)
        heads = [
            projection(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for projection, x in ((layer.q_proj, a), (layer.k_proj, dense), (layer.v_proj, dense))
        ]
        read = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=real[:, None, None])
        step(layer.out_proj(read.transpose(1, 2).flatten(2)))

    def dense() -> None:
        step(layer(a, padded(b)[0]))

    with torch.set_grad_enabled(train):
        found = layer(a, b)
        error = (found - layer(a, padded(b)[0], context_mask=padded(b)[1])).abs().max().item()
        calls = {"ours": ours, "padding + mask": masked, "the same by hand": by_hand}
        if len(set(lengths)) == 1:
            calls["dense"] = dense
        timings = interleaved(calls, budget=budget, clock=clock)
    milliseconds = {call: timing.median * 1e3 for call, timing in timings.items()}
    mode = "training step" if train else "forward"
    result = {"work": name, "form": form, "mode": mode, "milliseconds": milliseconds, "largest_difference": error}
    result["times"] = {call: value / milliseconds["ours"] for call, value in milliseconds.items() if call != "ours"}
    shown = ", ".join(f"{call} {value:,.1f} ms" for call, value in milliseconds.items())
    ratios = ", ".join(f"{value:.2f} of {call}" for call, value in result["times"].items())
    print(f"{name}, {form}, {mode}: {shown}; ours is {ratios}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of each comparison")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--forms", nargs="+", default=["list", "jagged"])
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print_machine()
    clock = time.process_time if options.clock == "process" else time.perf_counter
    results = [
        measure(name, form, train, options.budget, clock) for train in (False, True) for form in options.forms for name in WORKS
    ]
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"machine": machine(), "clock": options.clock, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
