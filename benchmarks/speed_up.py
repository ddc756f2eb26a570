"""How much faster do models that people have become by `speed_up`?

    python benchmarks/speed_up.py [--only WORD] [--budget 20] [--threads 2] [--processor-time] [--json FILE]

Models with random weights at real sizes (nothing is downloaded; float32, no gradients, unless the line says "training"), as they
are and sped up, in turn in one process in shuffled order; figures are medians. Before, outputs are compared. A case is a function
that gives a model and how it is called; cases of libraries that are not installed are left out, and named. Where a model generates
with beams, the bytes of keys and values of the source are told that are alive at its last step.
"""

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import speed_up_transformers as of_transformers
import torch
from machine import machine, print_machine, versions
from timing import interleaved
from torch import nn

from crossattention import speed_up

FLOOR = 0.95
"""No case may fall below this share of the model's own speed."""
CLOSE = 1e-5
"""Largest difference of outputs, relative to the largest output where that is above one."""


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
        name: what is run.
        make: gives the model and a function that runs a model, with what is to be equal.
        wanted: how many times faster it is to be.
        needs: the library that it takes.
        trains: whether gradients are made.
        memory: gives the bytes of keys and values of the source that a model holds while it is run.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], object]]]
    wanted: float = FLOOR
    needs: str = "torch"
    trains: bool = False
    memory: Callable[[nn.Module, Callable[[nn.Module], object]], int] | None = None


def attention_pool(batch: int, tokens: int) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    """The map head of SigLIP-base."""
    from timm.layers import AttentionPoolLatent

    x = torch.randn(batch, tokens, 768)
    return AttentionPoolLatent(768, num_heads=12, norm_layer=nn.LayerNorm).eval(), lambda model: model(x)


def crossvit(batch: int) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    """CrossViT-15 on pictures of 240 x 240."""
    import timm

    x = torch.randn(batch, 3, 240, 240)
    return timm.create_model("crossvit_15_240").eval(), lambda model: model(x)


def decoder_steps(batch: int, memory_length: int, new: int, steps: int) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    """Torch's decoder of the Transformer paper's base size, called with the newest positions only, on one memory."""
    memory = torch.randn(batch, memory_length, 512)
    targets = [torch.randn(batch, new, 512) for _ in range(steps)]
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(512, 8, 2048, batch_first=True), 6).eval()
    return model, lambda model: [model(target, memory) for target in targets]


def decoder_prefixes(batch: int, memory_length: int, steps: int) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    """The same, called with the whole prefix at each step, as it has no cache of its own."""
    memory, target = torch.randn(batch, memory_length, 512), torch.randn(batch, steps, 512)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(512, 8, 2048, batch_first=True), 6).eval()
    causal = nn.Transformer.generate_square_subsequent_mask(steps)

    def run(model: nn.Module) -> object:
        return [model(target[:, :n], memory, tgt_mask=causal[:n, :n], tgt_is_causal=True)[:, -1] for n in range(1, steps + 1)]

    return model, run


def multihead(batch: int, n: int, m: int, need_weights: bool) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    """`torch.nn.MultiheadAttention` on two contexts in turn, so that each is another one than the last."""
    query, contexts = torch.randn(batch, n, 512), [torch.randn(batch, m, 512) for _ in range(2)]

    def run(model: nn.Module) -> object:
        return [model(query, context, context, need_weights=need_weights)[0] for context in contexts]

    return nn.MultiheadAttention(512, 8, batch_first=True), run


def denoising(pixels: int, width: int) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    """The cross-attention of one block of Stable Diffusion 1.5 over 8 steps, with a text of 77 tokens, guided (batch 2)."""
    from diffusers.models.attention_processor import Attention

    text, states = torch.randn(2, 77, 768), [torch.randn(2, pixels, width) for _ in range(8)]
    model = Attention(width, cross_attention_dim=768, heads=8, dim_head=width // 8).eval()
    return model, lambda model: [model(x, text) for x in states]


def cross_attender() -> tuple[nn.Module, Callable[[nn.Module], object]]:
    """Sixteen latents read 1,024 positions in four layers of x-transformers."""
    from x_transformers import CrossAttender

    x, context = torch.randn(2, 16, 512), torch.randn(2, 1024, 512)
    return CrossAttender(dim=512, depth=4, heads=8).eval(), lambda model: model(x, context=context)


def training(make: Callable[[], tuple[nn.Module, Callable[[nn.Module], object]]]) -> Callable[..., object]:
    """The same with its backward pass."""

    def made() -> tuple[nn.Module, Callable[[nn.Module], object]]:
        model, run = make()

        def step(model: nn.Module) -> object:
            model.zero_grad()
            out = run(model)
            sum(tensor.square().sum() for tensor in (out if isinstance(out, list) else [out])).backward()
            return out

        return model, step

    return made


CASES = (
    Case("attention pooling, 1 x 196 tokens", lambda: attention_pool(1, 196), 3.0, "timm"),
    Case("attention pooling, 8 x 196 tokens", lambda: attention_pool(8, 196), 3.0, "timm"),
    Case("attention pooling, 1 x 4,096 tokens", lambda: attention_pool(1, 4096), 3.0, "timm"),
    Case("attention pooling, training, 8 x 196", training(lambda: attention_pool(8, 196)), FLOOR, "timm", True),
    Case("CrossViT-15, 4 pictures", lambda: crossvit(4), FLOOR, "timm"),
    Case("torch decoder, 1 new of 1 sequence", lambda: decoder_steps(1, 512, 1, 4), 5.0),
    Case("torch decoder, 1 new of 4 sequences", lambda: decoder_steps(4, 512, 1, 4), 5.0),
    Case("torch decoder, prefixes to 16, 4 sequences", lambda: decoder_prefixes(4, 512, 16), FLOOR),
    Case("MultiheadAttention, 8 x 1 x 1,024", lambda: multihead(8, 1, 1024, False)),
    Case("MultiheadAttention, 8 x 1 x 1,024, weights", lambda: multihead(8, 1, 1024, True)),
    Case("MultiheadAttention, 8 x 128 x 128", lambda: multihead(8, 128, 128, False)),
    Case("MultiheadAttention, 1 x 8 x 16", lambda: multihead(1, 8, 16, False)),
    Case("MultiheadAttention, training, 8 x 1 x 1,024", training(lambda: multihead(8, 1, 1024, False)), FLOOR, "torch", True),
    Case("denoising, 4,096 positions of 320", lambda: denoising(4096, 320), FLOOR, "diffusers"),
    Case("denoising, 256 positions of 1,280", lambda: denoising(256, 1280), FLOOR, "diffusers"),
    Case("x-transformers, 16 latents on 1,024", cross_attender, FLOOR, "x_transformers"),
    Case("Q-Former, 1 image", of_transformers.qformer, 1.2, "transformers"),
    Case("Q-Former, 1 image for one text after another", of_transformers.qformer_again, 1.2, "transformers"),
    Case("Q-Former, 8 images", of_transformers.qformer_batch, FLOOR, "transformers"),
    Case("BART-base, 4 beams, source 1,024", of_transformers.bart_base, 1.5, "transformers", False, of_transformers.cross_bytes),
    Case("T5-base, 4 beams, source 1,024", of_transformers.t5_base, 1.5, "transformers", False, of_transformers.cross_bytes),
    Case("Whisper-tiny, 5 beams", of_transformers.whisper_tiny, 1.3, "transformers", False, of_transformers.cross_bytes),
    Case("Marian, greedy, source 32", of_transformers.marian_short, FLOOR, "transformers"),
    Case("BART-base's decoder, 2 x 128 x 512", of_transformers.bart_forward, FLOOR, "transformers"),
    Case("Perceiver, 256 latents on 2,048", of_transformers.perceiver_language, FLOOR, "transformers"),
    Case("DETR's decoder, 100 x 850", of_transformers.detr_decoder, FLOOR, "transformers"),
)


def tensors(out: object) -> Iterator[torch.Tensor]:
    """The tensors of an output."""
    if isinstance(out, torch.Tensor):
        yield out.detach()
    elif isinstance(out, list | tuple):
        for one in out:
            yield from tensors(one)


def measure(case: Case, given: argparse.Namespace) -> dict[str, object]:
    """Times of a model as it is and sped up."""
    torch.manual_seed(0)
    model, run = case.make()
    fast = copy.deepcopy(model)
    changes = speed_up(fast)
    with torch.set_grad_enabled(case.trains):
        for _ in range(3):
            for own, ours in zip(tensors(run(model)), tensors(run(fast)), strict=True):
                apart = float((own - ours).abs().amax()) / max(1.0, float(own.abs().amax()))
                if not apart <= CLOSE:
                    raise SystemExit(f"{case.name}: outputs differ by {apart:.1e}")
        calls = {"own": lambda: run(model), "sped up": lambda: run(fast)}
        clock = time.process_time if given.processor_time else time.perf_counter
        timings = interleaved(calls, budget=given.budget, clock=clock)
    faster = timings["own"].median / timings["sped up"].median
    memory = None if case.memory is None else {"own": case.memory(model, run), "sped up": case.memory(fast, run)}
    return {
        "case": case.name,
        "wanted": case.wanted,
        "faster": faster,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "cross_bytes": memory,
        "changes": str(changes),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", metavar="WORD", help="only cases whose name has this in it")
    options.add_argument(
        "--budget", type=float, default=20.0, metavar="SECONDS", help="time for a case; five rounds are run anyhow"
    )
    options.add_argument("--threads", type=int, default=2, metavar="N", help="of torch; default 2")
    options.add_argument("--processor-time", action="store_true", help="time of the processor, for one thread on a busy machine")
    options.add_argument("--json", metavar="FILE", help="where everything is written")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    print_machine()
    print(f"{'case':<46}{'own ms':>10}{'sped up ms':>12}{'times':>8}{'wanted':>8}")
    results, left_out = [], []
    for case in CASES:
        if given.only not in case.name:
            continue
        if importlib.util.find_spec(case.needs) is None:
            left_out.append(f"{case.name} (needs {case.needs})")
            continue
        results.append(found := measure(case, given))
        own, ours = (1e3 * found["seconds"][name]["median"] for name in ("own", "sped up"))
        memory = found["cross_bytes"]
        share = "" if memory is None else f"  {memory['sped up'] / 1e6:.1f} of {memory['own'] / 1e6:.1f} MB for the source"
        print(f"{case.name:<46}{own:>10.2f}{ours:>12.2f}{found['faster']:>8.2f}{case.wanted:>8.2f}{share}", flush=True)
    if left_out:
        print(f"\nleft out: {', '.join(left_out)}")
    slow = [str(found["case"]) for found in results if not found["faster"] >= found["wanted"]]
    print(f"\nas fast as wanted: {'all' if not slow else 'not ' + '; '.join(slow)}")
    if given.json:
        with open(given.json, "w") as file:
            packages = versions("timm", "diffusers", "x-transformers", "transformers")
            json.dump({"machine": machine(), "versions": packages, "options": vars(given), "rows": results}, file, indent=1)


if __name__ == "__main__":
    main()
