"""Draw how bits per byte of validation text fall with retrieval on, off and with random neighbours, for docs/retro.md.

    python benchmarks/retro_plot.py RUN [RUN ...] [--out docs/retro-training.png]

RUN is a folder that `crossattention train retro` wrote; its metrics.jsonl is read. Of a plain language model (--neighbours 0) there
is one curve.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

LINES = {
    "bits_per_byte": ("retrieval on", "#1f6fb4", "-"),
    "bits_per_byte_off": ("retrieval off", "#9aa0a6", "-"),
    "bits_per_byte_random": ("random neighbours", "#d1602c", "--"),
}


def evaluations(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and scores of each evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(row["step"], row["metrics"]) for row in rows if row["event"] == "evaluation"]
    if not found:
        raise SystemExit(f"{run} holds no evaluation yet")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/retro-training.png"))
    given = parser.parse_args()
    figure, axes = plt.subplots(1, len(given.runs), figsize=(5.0 * len(given.runs), 3.4), squeeze=False, sharey=True)
    for ax, run in zip(axes[0], given.runs, strict=True):
        found = evaluations(run)
        is_plain = "bits_per_byte_off" not in found[-1][1]
        for name, (label, colour, style) in LINES.items():
            points = [(step, metrics[name]) for step, metrics in found if name in metrics]
            if points:
                label = "plain language model" if is_plain else label
                ax.plot(*zip(*points, strict=True), style, color=colour, label=f"{label}: {points[-1][1]:.3f}")
        ax.set(title=run.name, xlabel="step", ylabel="bits per byte, validation")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(given.out, dpi=150)
    print(given.out)


if __name__ == "__main__":
    main()
