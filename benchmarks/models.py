"""Are our models as fast as the libraries that people know them from, with the same weights?

    python benchmarks/models.py [crossvit ...] [--only TEXT ...] [--threads 2] [--budget 20] [--processor-time] [--json FILE]

Each architecture has its cases in a file of its own, `models_NAME.py`: a model of ours and the reference's with the same weights
and the same input, in float32 and bfloat16, batch 1 and 8, forward and training step. A training step is forward, loss and
backward, as the optimizer is the same for both. Before a case is timed, both results are compared. Ours and theirs run in turn in
one process, in shuffled order; figures are medians, "times" is the reference's median over ours, and "asked" what it must reach.
"MB" is the most memory that tensors of one call hold at once: activations, and in a training step gradients.

With `--processor-time`, seconds are those that the process computed, which on one thread does not see what else the machine does.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from machine import machine, print_machine, versions
from timing import interleaved, tensor_megabytes
from torch import Tensor

NOT_SLOWER = 0.95
"""Share of the reference's speed from which on ours counts as not slower."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = (1, 8)
MODES = ("forward", "training step")
Call = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One comparison: what is compared, how, and what is asked of it.

    Args:
        name: the model, as "CrossViT-9".
        mode: "forward", "training step", or another kind of work, as "greedy decoding".
        dtype: name of the weights' and the input's dtype.
        batch: number of items.
        build: makes the models and gives the two calls, ours and theirs; each returns what is compared. It is called when the
            case's turn comes, and what it made is dropped after it.
        tolerance: largest difference of the two results, over the largest number in theirs.
        asked: speed over the reference's that ours must reach.
        packages: libraries whose versions are recorded.
    """

    name: str
    mode: str
    dtype: str
    batch: int
    build: Callable[[], tuple[Call, Call]]
    tolerance: float
    asked: float = NOT_SLOWER
    packages: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """All that tells this case from another, in a line."""
        return f"{self.name}, {self.mode}, {self.dtype}, batch {self.batch}"


def step_of(model: torch.nn.Module, loss_of: Callable[[], Tensor]) -> Call:
    """A training step without the optimizer: loss and backward; gradients are dropped at its end, so that each call is alike."""

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def forward_of(call: Call) -> Call:
    """A call without gradients."""

    def forward() -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            return call()

    return forward


def architectures() -> list[str]:
    """Names of the files of cases beside this one."""
    return sorted(path.stem.removeprefix("models_") for path in Path(__file__).parent.glob("models_*.py"))


def chosen(given: argparse.Namespace) -> Iterator[Case]:
    """The cases that were asked for."""
    for name in given.architectures or architectures():
        for case in importlib.import_module(f"models_{name}").cases():
            fits = case.dtype in given.dtypes and case.batch in given.batches and case.mode.split()[0] in given.modes
            if fits and all(text.lower() in case.label.lower() for text in given.only):
                yield case


def difference(ours: object, theirs: object) -> float:
    """Largest difference of two results, over the largest number in the second."""
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, theirs)), strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)) for a, b in pairs)


def measure(case: Case, given: argparse.Namespace) -> dict[str, object]:
    """Compare the results of a case, time it, and weigh its memory."""
    ours, theirs = case.build()
    off = difference(ours(), theirs())
    if not off <= case.tolerance:
        raise SystemExit(f"{case.label}: results differ by {off:.1e} of the largest number, {case.tolerance:.0e} are allowed")
    clock = time.process_time if given.processor_time else time.perf_counter
    timings = interleaved({"ours": ours, "theirs": theirs}, budget=given.budget, rounds=given.rounds, warmup=2, clock=clock)
    megabytes = {"ours": tensor_megabytes(ours), "theirs": tensor_megabytes(theirs)}
    times = timings["theirs"].median / timings["ours"].median
    return {
        **{name: getattr(case, name) for name in ("name", "mode", "dtype", "batch", "asked", "tolerance")},
        "difference": off,
        "times_as_fast": times,
        "is_reached": times >= case.asked,
        "seconds": {side: asdict(timing) for side, timing in timings.items()},
        "megabytes": megabytes,
    }


COLUMNS = {"case": 56, "ours, ms": 22, "theirs, ms": 22, "times": 7, "asked": 7, "MB, ours / theirs": 20}


def cells(row: dict[str, object]) -> list[str]:
    """One row of the table."""
    times = [
        f"{1e3 * t['median']:,.1f} ({1e3 * t['low_quartile']:,.1f}-{1e3 * t['high_quartile']:,.1f})"
        for t in row["seconds"].values()
    ]
    label = f"{row['name']}, {row['mode']}, {row['dtype']}, batch {row['batch']}"
    asked = f"{row['asked']:.2f}" + ("" if row["is_reached"] else " -")
    return [label, *times, f"{row['times_as_fast']:.2f}", asked, " / ".join(f"{mb:,.0f}" for mb in row["megabytes"].values())]


def print_line(texts: list[str], markdown: bool) -> None:
    padded = [text.ljust(width) for text, width in zip(texts, COLUMNS.values(), strict=True)]
    print("| " + " | ".join(texts) + " |" if markdown else "".join(padded).rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", metavar="NAME", help=f"of {', '.join(architectures())}; default all")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="cases whose line holds all of these")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument(
        "--modes", nargs="*", default=["forward", "training", "greedy", "generation"], help="first words of the modes"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that are timed even where the budget is spent")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a case after which no round is begun")
    parser.add_argument("--processor-time", action="store_true", help="seconds that the process computed, for one thread")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", help="file for the results")
    given = parser.parse_args()
    if unknown := sorted(set(given.architectures) - set(architectures())):
        parser.error(f"no cases for {', '.join(unknown)}; there are {', '.join(architectures())}")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print_machine()
    rows, packages = [], set()
    for case in chosen(given):
        if not rows:
            print("\n" + ("processor time" if given.processor_time else "time by the clock") + "\n")
            print_line(list(COLUMNS), given.markdown)
            if given.markdown:
                print("|" + "---|" * len(COLUMNS))
        rows.append(measure(case, given))
        packages |= set(case.packages)
        print_line(cells(rows[-1]), given.markdown)
    used = versions(*sorted(packages))
    print(f"\n{', '.join(f'{name} {version}' for name, version in used.items())}")
    missed = [row for row in rows if not row["is_reached"]]
    print(f"reached what is asked: {len(rows) - len(missed)} of {len(rows)} cases")
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"machine": machine(), "versions": used, "arguments": vars(given), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
