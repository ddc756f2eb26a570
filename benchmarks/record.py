"""What does it cost to record a model's cross-attention while it runs, in time and memory?

    python benchmarks/record.py [--batch 4] [--queries 128] [--context 512] [--budget 30] [--json FILE]

A forward pass of BART-base (transformers; random weights, nothing is downloaded; fused attention, float32, no gradients) as it is,
and within `record_attention(model, [TopK(8), Highlight()])`, in turn in one process in shuffled order; figures are medians. Before,
outputs are compared bit by bit. "MB" are what a pass adds to the resident size, "kept" what the recording holds afterwards,
"weights" the float32 maps of all layers, which are never held.
"""

import argparse
import json
from dataclasses import asdict

import torch
from machine import machine, print_machine, versions
from timing import interleaved, peak_megabytes

from crossattention import record_attention
from crossattention.maps import Highlight, TopK

MOST = 1.15
"""What a recorded pass may take of a plain one's time."""
WIDTHS = (18, 12, 14, 12, 12, 14, 12, 12)
HEAD = ("batch x n x m", "plain ms", "recorded ms", "of plain", "plain MB", "recorded MB", "kept MB", "weights MB")


def make_model() -> torch.nn.Module:
    """BART-base with random weights."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        d_model=768,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
    )
    return BartForConditionalGeneration(config).eval()


def kept_bytes(results: object) -> int:
    """Bytes of the tensors in results."""
    if isinstance(results, torch.Tensor):
        return results.numel() * results.element_size()
    parts = results if isinstance(results, list | tuple) else vars(results).values()
    return sum(kept_bytes(part) for part in parts)


@torch.no_grad()
def measure(model: torch.nn.Module, batch: int, n: int, m: int, given: argparse.Namespace) -> dict[str, object]:
    """Times and memory of one shape."""
    source, target = torch.randint(4, 50000, (batch, m)), torch.randint(4, 50000, (batch, n))
    mask = torch.ones_like(source)
    mask[0, m // 2 :] = 0
    summaries = [TopK(given.top), Highlight()]

    def plain() -> torch.Tensor:
        return model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits

    def recorded() -> torch.Tensor:
        with record_attention(model, summaries):
            return plain()

    if not torch.equal(plain(), recorded()):
        raise SystemExit("the recorded pass gives other outputs than the plain one")
    with record_attention(model, summaries) as seen:
        plain()
    timings = interleaved({"plain": plain, "recorded": recorded}, budget=given.budget)
    weights = [layer.merged.shape for layer in seen.layers.values()]
    return {
        "batch": batch,
        "queries": n,
        "context": m,
        "of_plain": timings["recorded"].median / timings["plain"].median,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "peak_megabytes": {"plain": peak_megabytes(plain), "recorded": peak_megabytes(recorded)},
        "kept_megabytes": sum(kept_bytes(layer.merged.results) for layer in seen.layers.values()) / 1e6,
        "weights_megabytes": sum(4 * torch.Size(shape).numel() for shape in weights) / 1e6,
    }


def cells(result: dict[str, object]) -> tuple[str, ...]:
    """One row of the table."""
    shape = f"{result['batch']} x {result['queries']} x {result['context']}"
    times = [f"{1e3 * result['seconds'][name]['median']:,.1f}" for name in ("plain", "recorded")]
    peaks = ["?" if peak is None else f"{peak:,.1f}" for peak in result["peak_megabytes"].values()]
    held = (f"{result[name]:,.1f}" for name in ("kept_megabytes", "weights_megabytes"))
    return shape, *times, f"{result['of_plain']:.3f}", *peaks, *held


def print_row(texts: tuple[str, ...]) -> None:
    print("".join(text.ljust(width) for text, width in zip(texts, WIDTHS, strict=True)).rstrip(), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("batch", 4, "sequences at once"),
        ("queries", 128, "n, length of the target"),
        ("context", 512, "m, length of the source"),
        ("top", 8, "k of TopK"),
        ("threads", 2, "of torch"),
    ):
        options.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default {default}")
    options.add_argument("--budget", type=float, default=30.0, metavar="SECONDS", help="time for a row; five rounds are run anyhow")
    options.add_argument("--json", metavar="FILE", help="where everything is written")
    given = options.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    print_machine()
    model = make_model()
    print_row(HEAD)
    results = []
    for batch, n, m in ((given.batch, given.queries, given.context), (1, given.queries, given.context), (1, 1024, 1024)):
        results.append(measure(model, batch, n, m, given))
        print_row(cells(results[-1]))
    slow = [r for r in results if not r["of_plain"] <= MOST]
    print(f"\nat most {MOST} of a plain pass: {'yes' if not slow else f'not on {len(slow)} of {len(results)} shapes'}")
    if given.json:
        with open(given.json, "w") as file:
            found = {"machine": machine(), "versions": versions("transformers"), "options": vars(given), "rows": results}
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
