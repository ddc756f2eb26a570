"""Draw what attention.py and planner.py measured, for docs/planning.md.

    python benchmarks/plots.py [--attention FILE] [--planner FILE] [--docs docs]

planning-speedup.png: how many times as fast as the best peer the planner's choice is, one bar a row of work, with the chosen plan.
planning-choices.png: which pair of meeting spaces was fastest on each random shape, by its lengths; shapes on which the choice took
more than 1.10 times the best plan's time have a black ring.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

PIXELS, DPI = 1600, 200
"""Twice the width that the pages show, for sharp screens; text sizes are those of 8 inches."""
NEAR = 1.10
"""Times the best plan's time up to which a choice is no miss, as planner.py has it."""
COLOURS = {"head": "#9aa0a6", "context": "#1f6fb4", "query": "#d1602c"}
"""One colour a meeting space of scores."""
MARKERS = {"head": "o", "context": "s", "output": "^"}
"""One marker a meeting space of values."""
SHAPE = re.compile(r"\((\d+) on (\d+)\)")
KERNEL = re.compile(r" \(\w+\)$")


def load(path: str) -> tuple[list[dict[str, object]], str]:
    """The rows of a result file, and the machine and kind of work that they are of."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    if not data.get("rows"):
        raise SystemExit(f"{path} holds no rows")
    machine, options = data["machine"], data["options"]
    device = machine["accelerator"] if options.get("device") == "cuda" else f"{machine['processor']}, {options['threads']} threads"
    work = "training step" if options["train"] else "forward"
    return data["rows"], f"{options['dtype']}, {work}, {device}, torch {machine['torch'].split('+')[0]}, {machine['date']}"


def plain(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis as a plain number."""
    return f"{value:,g}"


def bare(axes: Axes) -> None:
    """Only the two axes that are read."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------------------- speed-up


def draw_speedup(rows: list[dict[str, object]], what: str, path: Path) -> None:
    """One bar a row: times as fast as the best peer, on a logarithmic axis that starts at the line of 1."""
    figure, axes = plt.subplots(figsize=(PIXELS / DPI, 1.1 + 0.34 * len(rows)), layout="constrained")
    ratios = [float(row["times_as_fast"]) for row in rows]
    places = range(len(rows), 0, -1)
    axes.barh(places, [ratio - 1 for ratio in ratios], left=1, height=0.62, color=COLOURS["context"])
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min(1.0, *ratios), 6 * max(1.0, *ratios))  # room for the labels right of the bars
    axes.axvline(1, color="black", linewidth=1)
    for place, row, ratio in zip(places, rows, ratios, strict=True):
        axes.annotate(
            f"{ratio:.{2 if ratio < 9.995 else 1}f}  {row['chosen']}",
            (max(1.0, ratio), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=8,
        )
    axes.set_yticks(list(places), [str(row["work"]) for row in rows], size=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"times as fast as the best peer, and the plan chosen\n{what}", size=8)
    bare(axes)
    save(figure, path)


# -------------------------------------------------------------------------------------------------------------- choices


def draw_choices(rows: list[dict[str, object]], what: str, path: Path) -> None:
    """One mark a shape at its lengths: colour and form say which spaces were fastest, a ring that the choice missed them."""
    figure, axes = plt.subplots(figsize=(PIXELS / DPI, 5.2), layout="constrained")
    by_pair: dict[str, list[tuple[int, int]]] = {}
    missed: list[tuple[int, int]] = []
    for row in rows:
        n, m = lengths(str(row["shape"]))
        by_pair.setdefault(KERNEL.sub("", str(row["best"])), []).append((n, m))
        if float(row["of_best"]) > NEAR:
            missed.append((n, m))
    for pair, points in sorted(by_pair.items(), key=lambda item: -len(item[1])):
        scores, values = pair.split("+")
        axes.scatter(
            *zip(*points, strict=True),
            s=30,
            c=COLOURS[scores],
            marker=MARKERS[values],
            linewidths=0,
            label=f"{pair}: {len(points)}",
        )
    if missed:
        ring = f"choice over {NEAR:.2f} times the best: {len(missed)}"
        axes.scatter(*zip(*missed, strict=True), s=95, facecolors="none", edgecolors="black", linewidths=0.9, label=ring)
    for axis in (axes.xaxis, axes.yaxis):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.set_xlabel(f"n, queries\n{what}", size=8)
    axes.set_ylabel("m, context length", size=8)
    axes.legend(title="fastest spaces, scores+values: shapes", loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    axes.get_legend().get_title().set_fontsize(8)
    axes.get_legend().get_frame().set_linewidth(0)
    bare(axes)
    save(figure, path)


def lengths(shape: str) -> tuple[int, int]:
    """The lengths n and m of a shape as planner.py writes it: "4 x (17 on 300), widths ..."."""
    found = SHAPE.search(shape)
    if found is None:
        raise SystemExit(f'no "(n on m)" in shape {shape!r}')
    return int(found[1]), int(found[2])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--attention", metavar="FILE", help="JSON of benchmarks/attention.py")
    options.add_argument("--planner", metavar="FILE", help="JSON of benchmarks/planner.py")
    options.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs", help="folder to write to")
    given = options.parse_args()
    if not given.attention and not given.planner:
        options.error("name --attention FILE, --planner FILE, or both")
    if given.attention:
        draw_speedup(*load(given.attention), given.docs / "planning-speedup.png")
    if given.planner:
        draw_choices(*load(given.planner), given.docs / "planning-choices.png")


if __name__ == "__main__":
    main()
