"""How fast is the planner's choice, and how much memory does it take, against every peer and against every plan?

    python benchmarks/attention.py [--dtype bfloat16] [--train] [--device cuda [--graphs]] [--only "1 x 1,500"] [--json FILE]
        [--markdown]

Each row is one piece of work. The peers are hand-written projections with `F.scaled_dot_product_attention`, torch's, timm's,
x-transformers' and Hugging Face's layers where they apply, all with the same weights; then every legal plan forced, and the
planner's choice. Every result is compared with the hand-written one before anything is timed. All run in turn in one process;
figures are medians; memory is the most that the tensors which one call makes hold at once, gradients included (the growth of the
resident size is in the JSON). With --graphs each call is captured in a CUDA graph and its replays are timed: what the GPU takes,
without the host's launches; calls that cannot be captured are left out. "times as fast" is the best peer's time over the choice's,
"of best plan" the choice's time over that of the fastest forced plan.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from machine import free_gb, machine, print_machine, versions
from peers import BY_HAND, COMMON_WAYS, PACKAGES, Call, peer_calls
from report import AUTO, cells, print_header, print_line, print_summary
from rows import ROWS, Inputs, Row, make_inputs, make_layer
from timing import Timing, interleaved, peak_megabytes, seconds_of, tensor_megabytes
from torch import Tensor

from crossattention import CrossAttention, Plan
from crossattention.plan import CANDIDATES, TEXTBOOK, Choice

OUT_OF_REACH = 1.5
HOPELESS = 2.0
"""A forced plan that takes this many times the textbook's time is timed once, and marked."""

SURE_SECONDS = 0.5
"""A first call that takes longer needs no second one to show what it is about."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference from the hand-written result, in terms of that result's largest value."""


@dataclass(frozen=True)
class Options:
    """What the whole run shares."""

    dtype: torch.dtype
    train: bool
    device: str
    budget: float
    graphs: bool = False


# ---------------------------------------------------------------------------------------------------------- contenders


def our_call(layer: CrossAttention, row: Row, inputs: Inputs) -> Call:
    """The row's work by a layer of ours; in a decode row the context is prepared within the call, once."""
    parameters = tuple(layer.parameters())
    if row.kind != "decode":
        return Call(lambda: layer(inputs.queries(), inputs.b), parameters)

    def decode() -> Tensor:
        prepared = layer.prepare(inputs.b, query_length=row.query_length, uses=row.steps)
        return torch.stack([layer.attend(a, prepared) for a in inputs.queries().unbind()])

    return Call(decode, parameters)


def pinned(layer: CrossAttention, row: Row, plan: Plan) -> CrossAttention:
    """A layer with the same weights and a plan of its own, so that nothing but the call is timed."""
    other = make_layer(row, layer.q_proj.weight.dtype, "meta", plan=plan)
    other.q_proj, other.k_proj, other.v_proj, other.out_proj = layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj
    return other.train(layer.training)


def forced_calls(
    layer: CrossAttention, row: Row, inputs: Inputs, choice: Choice, options: Options
) -> tuple[dict[str, Call], dict[str, str]]:
    """Every legal plan's call by name, and why the others are left out: illegal, or too large for the memory that is free."""
    calls, left_out, free = {}, {}, free_gb(options.device)
    for plan in CANDIDATES:
        candidate = choice.candidate(plan)
        held = candidate.cost.prepared_bytes / 1e9
        times = candidate.cost.seconds / choice.candidate(TEXTBOOK).cost.seconds
        if not candidate.is_legal:
            left_out[str(plan)] = "; ".join(candidate.reasons)
        elif free is not None and held * (8 if options.train else 4) > free:
            left_out[str(plan)] = f"what it makes of the context takes {held:.1f} GB, too much of {free:.1f} GB"
        elif times > OUT_OF_REACH:
            left_out[str(plan)] = f"it is estimated at over {OUT_OF_REACH} times the textbook's plan"
        else:
            calls[str(plan)] = our_call(pinned(layer, row, plan), row, inputs)
    return calls, left_out


def training_step(call: Call, inputs: Inputs, gradient: Tensor) -> Callable[[], Tensor]:
    """Forward and backward with gradients to all weights, A and B, as inside a model."""
    leaves = [*inputs.leaves, *call.parameters]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        out = call.run()
        out.backward(gradient)
        return out

    return step


# ------------------------------------------------------------------------------------------------------------- checking


@dataclass(frozen=True)
class Checked:
    """One contender's first call: its difference from the hand-written one, and its seconds, start-up costs included."""

    difference: float
    seconds: float


def results_of(run: Callable[[], Tensor], inputs: Inputs, options: Options) -> list[Tensor]:
    """The output and, of a training step, the gradients of A and B, when the device has finished them."""
    out = run()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return [out.detach(), *(leaf.grad for leaf in inputs.leaves if leaf.grad is not None)]


def difference(results: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of any result, in terms of its largest expected value; infinite for NaN or another shape."""
    if [got.shape for got in results] != [want.shape for want in expected]:
        return float("inf")
    pairs = [(got.float(), want.float()) for got, want in zip(results, expected, strict=True)]
    return max(((got - want).abs().max() / want.abs().max()).nan_to_num(nan=torch.inf).item() for got, want in pairs)


def check(
    row: Row, runs: dict[str, Callable[[], Tensor]], plans: dict[str, Call], inputs: Inputs, options: Options
) -> tuple[dict[str, Checked], dict[str, str]]:
    """Run every contender once, against the hand-written one: what came of each, and the message of each that failed.

    Raises:
        SystemExit: a result is wrong.
        Exception: whatever ours or the hand-written one raised; a forced plan may run out of the device's memory.
    """
    expected = results_of(runs[BY_HAND], inputs, options)
    checked, failed = {}, {}
    for name, run in runs.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a kernel that refuses says why in warnings
                begun = time.perf_counter()
                results = results_of(run, inputs, options)
                seconds = time.perf_counter() - begun
                checked[name] = Checked(difference(results, expected), seconds)
        except Exception as error:
            may_fail = isinstance(error, torch.OutOfMemoryError) if name in plans else name not in (AUTO, BY_HAND)
            if not may_fail:
                raise
            failed[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            continue
        if checked[name].difference > TOLERANCE[options.dtype]:
            raise SystemExit(
                f"{row.name}: {name} is wrong: it differs from {BY_HAND} by {checked[name].difference:.2g} of the largest value, "
                f"more than {TOLERANCE[options.dtype]:.2g}"
            )
    return checked, failed


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(row: Row, options: Options) -> dict[str, object]:
    """Check, time and weigh every contender on one row."""
    layer = make_layer(row, options.dtype, options.device).train(options.train)
    inputs = make_inputs(row, options.dtype, options.device, options.train)
    with torch.set_grad_enabled(options.train):
        choice = layer.plan_for(row.query_shape, row.context_shape, uses=row.steps, trains=options.train)
        peers, left_out = peer_calls(layer, row, inputs, options.device)
        plans, plans_left_out = forced_calls(layer, row, inputs, choice, options)
        calls = peers | {AUTO: our_call(layer, row, inputs)} | plans
        runs = {name: call.run for name, call in calls.items()}
        if options.train:
            gradient = torch.randn_like(runs[BY_HAND]().detach(), memory_format=torch.contiguous_format)
            runs = {name: training_step(call, inputs, gradient) for name, call in calls.items()}
        checked, failed = check(row, runs, plans, inputs, options)
        runs = {name: run for name, run in runs.items() if name not in failed}
        timed: dict[str, Callable[[], object]] = dict(runs)
        if options.graphs:
            timed, uncaptured = captured(runs)
            failed |= uncaptured
            runs = {name: run for name, run in runs.items() if name in timed}
        timings, hopeless = time_all(timed, plans, checked, options)
        megabytes = weigh_all(runs, calls, inputs, options)
    contenders = {}
    for name in runs:
        kind = "choice" if name == AUTO else "plan" if name in plans else "peer"
        found = {**megabytes[name], "difference": checked[name].difference, "hopeless": name in hopeless}
        contenders[name] = {"kind": kind, **as_milliseconds(timings[name]), **found}
    return {
        "work": row.name,
        "sizes": asdict(row),
        "chosen": str(choice.plan),
        "why": choice.why,
        **verdict(row, contenders),
        "contenders": contenders,
        "left_out": left_out | plans_left_out,
        "failed": failed,
        "estimated_milliseconds": {str(c.plan): 1e3 * c.cost.seconds for c in choice.candidates},
    }


def captured(runs: dict[str, Callable[[], Tensor]]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The replay of a CUDA graph of each call, and the message of each that cannot be captured.

    Raises:
        SystemExit: a replay does not give what the call gives.
    """
    replays, failed = {}, {}
    for name, run in runs.items():
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        try:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                expected = run().clone()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                out = run()
        except RuntimeError as error:
            if name in (AUTO, BY_HAND):
                raise
            torch.cuda.synchronize()
            failed[name] = f"not captured: {str(error).strip().splitlines()[0]}"
            continue
        graph.replay()
        if difference([out], [expected]) > 1e-2:
            raise SystemExit(f"{name}: the graph's result is another than the call's")
        replays[name] = graph.replay
    return replays, failed


def time_all(
    runs: dict[str, Callable[[], object]], plans: dict[str, Call], checked: dict[str, Checked], options: Options
) -> tuple[dict[str, Timing], set[str]]:
    """Timings of all, and the names of those plans that the first warm-up round shows to be hopeless: that round is theirs.

    A call that took so long when it was checked that its start-up costs do not show in it has had its first round there.
    """
    first = {}
    for name, run in runs.items():
        seconds = checked[name].seconds
        first[name] = seconds if seconds > SURE_SECONDS else seconds_of(run, device=options.device)
    limit = HOPELESS * first.get(str(TEXTBOOK), float("inf"))
    hopeless = {name for name in plans if name in first and first[name] > limit}
    rest = {name: run for name, run in runs.items() if name not in hopeless}
    timings = interleaved(rest, budget=options.budget, warmup=1, device=options.device)
    return timings | {name: Timing.of([first[name]]) for name in hopeless}, hopeless


def weigh_all(
    runs: dict[str, Callable[[], Tensor]], calls: dict[str, Call], inputs: Inputs, options: Options
) -> dict[str, dict[str, float | None]]:
    """Megabytes that one call of each adds; gradients of the calls before it are dropped first, so that its own are counted."""
    leaves = [*inputs.leaves, *(weight for call in calls.values() for weight in call.parameters)]
    megabytes: dict[str, dict[str, float | None]] = {name: {} for name in runs}
    for name, run in runs.items():
        for what, weigh in (("megabytes", tensor_megabytes), ("resident_megabytes", peak_megabytes)):
            for leaf in leaves:
                leaf.grad = None
            megabytes[name][what] = weigh(run, options.device)
    return megabytes


def as_milliseconds(timing: Timing) -> dict[str, float]:
    """A timing as it stands in the JSON."""
    return {
        "milliseconds": 1e3 * timing.median,
        "low_quartile": 1e3 * timing.low_quartile,
        "high_quartile": 1e3 * timing.high_quartile,
        "rounds": timing.rounds,
    }


def verdict(row: Row, contenders: dict[str, dict[str, object]]) -> dict[str, object]:
    """The choice against the best peer, the fastest forced plan, and what is usually written."""
    times = {name: contender["milliseconds"] for name, contender in contenders.items()}
    of_kind = {kind: [name for name, c in contenders.items() if c["kind"] == kind] for kind in ("peer", "plan")}
    best = {kind: min(names, key=times.__getitem__, default=None) for kind, names in of_kind.items()}
    common = COMMON_WAYS.get(row.kind)
    common = common if common in times else None
    return {
        "best_peer": best["peer"],
        "times_as_fast": times[best["peer"]] / times[AUTO],
        "best_plan": best["plan"],
        "of_best_plan": None if best["plan"] is None else times[AUTO] / times[best["plan"]],
        "common_way": common,
        "times_as_fast_as_common_way": None if common is None else times[common] / times[AUTO],
    }


# ----------------------------------------------------------------------------------------------------------------- main


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--train", action="store_true", help="time forward and backward")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--graphs", action="store_true", help="time replays of CUDA graphs; forward only")
    parser.add_argument("--only", default="", metavar="TEXT", help="part of a row's name")
    parser.add_argument("--budget", type=float, default=20.0, metavar="SECONDS", help="time for a row; five rounds are run anyhow")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="where everything is written, after each row")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    rows = [row for row in ROWS if given.only in row.name]
    if not rows:
        raise SystemExit(f"no row's name contains {given.only!r}; the rows are: {'; '.join(row.name for row in ROWS)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("highest")  # no TF32
    if given.graphs and (given.device != "cuda" or given.train):
        raise SystemExit("--graphs is for --device cuda without --train")
    options = Options(getattr(torch, given.dtype), given.train, given.device, given.budget, given.graphs)
    print_machine()
    print_header(given.dtype, "training step" if given.train else "forward", given.device, given.markdown)
    results: list[dict[str, object]] = []
    for row in rows:
        results.append(measure(row, options))
        print_line(cells(results[-1]), given.markdown)
        if given.json:
            report = {"machine": machine(), "peers": versions(*PACKAGES), "options": vars(given), "rows": results}
            with open(given.json, "w") as file:
                json.dump(report, file, indent=1)
    print_summary(results)


if __name__ == "__main__":
    main()
