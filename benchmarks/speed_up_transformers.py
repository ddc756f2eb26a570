"""How much faster do models of transformers run after `speed_up`, and how much memory of the source do they keep?

    python benchmarks/speed_up_transformers.py [CASE ...] [--steps 64] [--rounds 5] [--clock process] [--threads 1] [--json FILE]

Random weights at real sizes, nothing is downloaded; float32, evaluation mode, no gradients. Each case runs a model as it is and a
copy after `speed_up`, in turn in one process in shuffled order; figures are medians. Before, outputs are compared: tokens must be
the same, numbers within 1e-5 of the largest. The memory is that of keys and values of the source that are alive at the last step:
those of the model's cache, and what `speed_up` keeps in its place.
"""

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from machine import machine, print_machine, versions
from timing import interleaved
from torch import nn

from crossattention import speed_up
from crossattention.interop import huggingface_generation

LEAST = 0.95
"""What every case has to reach at least."""


@dataclass(frozen=True)
class Case:
    """One model at a real size.

    Args:
        make: the model, and what runs it.
        wanted: how many times as fast it should be.
        rows: beams that read each source, whose share of memory is asked for; 0 where nothing is generated.
    """

    make: Callable[[int], tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]]
    wanted: float
    rows: int = 0


def _generation(model: nn.Module, source: int, beams: int, steps: int) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    ids = torch.randint(4, 30000, (1, source))
    options = {"num_beams": beams, "max_new_tokens": steps, "min_new_tokens": steps}
    return model, lambda m: m.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def bart_base(steps: int, source: int = 1024) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """BART-base, 6 + 6 layers of width 768: beam search."""
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 6), ("attention_heads", 12))}
    config = BartConfig(d_model=768, **sides, encoder_ffn_dim=3072, decoder_ffn_dim=3072, forced_eos_token_id=None)
    return _generation(BartForConditionalGeneration(config).eval(), source, 4, steps)


def t5_base(steps: int) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """T5-base, 12 + 12 layers of width 768: beam search."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
    return _generation(T5ForConditionalGeneration(config).eval(), 1024, 4, steps)


def whisper_tiny(steps: int) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """Whisper-tiny, 4 + 4 layers of width 384, on thirty seconds of sound: beam search."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration(WhisperConfig(suppress_tokens=None, begin_suppress_tokens=None)).eval()
    sound = torch.randn(1, 80, 3000)
    return model, lambda m: m.generate(sound, num_beams=5, max_new_tokens=steps, min_new_tokens=steps)


def marian_short(steps: int) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """Marian, 6 + 6 layers of width 512, on a sentence of 32 tokens, greedily: the case with the least to gain."""
    from transformers import MarianConfig, MarianMTModel

    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 6), ("attention_heads", 8))}
    config = MarianConfig(
        d_model=512,
        **sides,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        vocab_size=32000,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    config.forced_eos_token_id = None
    return _generation(MarianMTModel(config).eval(), 32, 1, steps)


def _fresh(
    model: nn.Module, name: str, states: torch.Tensor, **others: Any
) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """A forward pass whose context is another tensor each time, as it is in use: nothing can be kept."""

    def run(m: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return m(**{name: states.clone()}, **others)[0]

    return model, run


def qformer(steps: int) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """The Q-Former of BLIP-2: 32 queries read the 257 states of an image, 1408 wide."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    model = Blip2QFormerModel(Blip2QFormerConfig()).eval()
    return _fresh(model, "encoder_hidden_states", torch.randn(1, 257, 1408), query_embeds=torch.randn(1, 32, 768))


def qformer_again(steps: int) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """The same image for one text after another: its keys and values are kept from the second time on."""
    model, _ = qformer(steps)
    states = torch.randn(1, 257, 1408)

    def run(m: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return m(query_embeds=torch.ones(1, 32, 768), encoder_hidden_states=states)[0]

    return model, run


def qformer_batch(steps: int) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """The same for 8 images."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    model = Blip2QFormerModel(Blip2QFormerConfig()).eval()
    return _fresh(model, "encoder_hidden_states", torch.randn(8, 257, 1408), query_embeds=torch.randn(8, 32, 768))


def bart_forward(steps: int) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """BART-base's decoder: 128 tokens read 512 states, with a cache, as a forward pass has it by default."""
    model = bart_base(1)[0].model.decoder
    ids = torch.randint(4, 30000, (2, 128))
    return _fresh(model, "encoder_hidden_states", torch.randn(2, 512, 768), input_ids=ids)


def perceiver_language(steps: int) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """The Perceiver's encoder on bytes, at the language model's widths: 256 latents of 1280 read 2,048 inputs of 768."""
    from transformers import PerceiverConfig, PerceiverModel

    model = PerceiverModel(PerceiverConfig(num_self_attends_per_block=2)).eval()
    return _fresh(model, "inputs", torch.randn(1, 2048, 768))


def detr_decoder(steps: int) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """DETR's decoder: 100 object queries read 850 positions of an image, 256 wide."""
    from transformers import DetrConfig
    from transformers.models.detr.modeling_detr import DetrDecoder

    model = DetrDecoder(DetrConfig()).eval()
    queries, places = torch.randn(1, 100, 256), torch.randn(1, 850, 256)
    others = {"spatial_position_embeddings": places, "object_queries_position_embeddings": queries}
    return _fresh(model, "encoder_hidden_states", torch.randn(1, 850, 256), inputs_embeds=torch.zeros(1, 100, 256), **others)


CASES = {
    "bart-base": Case(bart_base, 1.5, 4),
    "t5-base": Case(t5_base, 1.5, 4),
    "whisper-tiny": Case(whisper_tiny, 1.3, 5),
    "marian-short": Case(marian_short, LEAST, 1),
    "qformer": Case(qformer, 1.2),
    "qformer-again": Case(qformer_again, 1.2),
    "qformer-batch": Case(qformer_batch, LEAST),
    "bart-forward": Case(bart_forward, LEAST),
    "perceiver": Case(perceiver_language, LEAST),
    "detr": Case(detr_decoder, LEAST),
}


def cross_bytes(model: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> int:
    """Bytes of keys and values of the source that are alive at the last step: in caches, and kept in their place."""
    from transformers import EncoderDecoderCache

    largest = [0]
    own, own_keep = EncoderDecoderCache.reorder_cache, huggingface_generation.Session.keep
    sessions: list[Any] = []

    def reorder(cache: Any, beams: torch.Tensor) -> None:
        layers = cache.cross_attention_cache.layers
        held = [t for layer in layers for t in (layer.keys, layer.values) if isinstance(t, torch.Tensor)]
        kept = {id(t): t for session in sessions[-1:] for one in session.kept.values() for t in _tensors(one.value)}
        largest[0] = max(largest[0], sum(t.numel() * t.element_size() for t in (*held, *kept.values())))
        own(cache, beams)

    def keep(session: Any, *args: Any, **kwargs: Any) -> Any:
        sessions.append(session)
        return own_keep(session, *args, **kwargs)

    EncoderDecoderCache.reorder_cache, huggingface_generation.Session.keep = reorder, keep
    try:
        run(model)
    finally:
        EncoderDecoderCache.reorder_cache, huggingface_generation.Session.keep = own, own_keep
    return largest[0]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [value.keys, value.values]


def measure(name: str, given: argparse.Namespace) -> dict[str, object]:
    """Times and memory of one case."""
    case = CASES[name]
    torch.manual_seed(0)
    model, run = case.make(given.steps)
    faster = copy.deepcopy(model)
    changes = speed_up(faster)
    plain, quick = run(model), run(faster)
    same = torch.equal(plain, quick) if not plain.is_floating_point() else _is_close(plain, quick)
    if not same:
        raise SystemExit(f"{name}: after speed_up it gives something else")
    clock = time.process_time if given.clock == "process" else time.perf_counter
    calls = {"own": lambda: run(model), "sped up": lambda: run(faster)}
    timings = interleaved(calls, budget=given.budget, rounds=given.rounds, warmup=1, clock=clock)
    memory = {label: cross_bytes(m, run) for label, m in (("own", model), ("sped up", faster))} if case.rows > 1 else None
    return {
        "case": name,
        "what": " ".join((case.make.__doc__ or "").split()),
        "times_as_fast": timings["own"].median / timings["sped up"].median,
        "wanted": case.wanted,
        "rows": case.rows,
        "seconds": {label: asdict(timing) for label, timing in timings.items()},
        "cross_bytes": memory,
        "plans": str(changes).splitlines()[2].strip(),
    }


def _is_close(plain: torch.Tensor, quick: torch.Tensor) -> bool:
    return float((plain - quick).abs().max()) <= 1e-5 * max(1.0, float(plain.abs().max()))


def line(result: dict[str, Any]) -> str:
    """A result as a row of the table."""
    own, quick = (1e3 * result["seconds"][label]["median"] for label in ("own", "sped up"))
    row = f"{result['case']:<14}{own:>11,.1f}{quick:>13,.1f}{result['times_as_fast']:>8.2f}{result['wanted']:>8.2f}"
    memory = result["cross_bytes"]
    if memory is None:
        return row
    return row + f"{memory['own'] / 1e6:>11,.1f}{memory['sped up'] / 1e6:>13,.1f}{memory['sped up'] / memory['own']:>8.3f}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("cases", nargs="*", metavar="CASE", help=f"default: {', '.join(CASES)}")
    options.add_argument("--steps", type=int, default=64, metavar="N", help="tokens that are generated; default 64")
    options.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds that are run anyhow; default 5")
    options.add_argument("--budget", type=float, default=30.0, metavar="SECONDS", help="time for a case; default 30")
    options.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: processor time; one thread only")
    options.add_argument("--threads", type=int, default=2, metavar="N", help="of torch; default 2")
    options.add_argument("--json", metavar="FILE", help="where everything is written")
    given = options.parse_args()
    if unknown := sorted(set(given.cases) - set(CASES)):
        options.error(f"no case is called {', '.join(unknown)}; there are {', '.join(CASES)}")
    if given.clock == "process" and given.threads != 1:
        options.error("processor time adds up the threads; pass --threads 1")
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(given.threads)
    print_machine()
    print(f"{'case':<14}{'own ms':>11}{'sped up ms':>13}{'times':>8}{'wanted':>8}{'own MB':>11}{'sped up MB':>13}{'share':>8}")
    results = []
    for name in given.cases or CASES:
        results.append(measure(name, given))
        print(line(results[-1]), flush=True)
    short = [f"{r['case']} ({r['times_as_fast']:.2f} of {r['wanted']:.2f})" for r in results if r["times_as_fast"] < r["wanted"]]
    print(f"\nas fast as wanted: {len(results) - len(short)} of {len(results)}{'; not: ' + ', '.join(short) if short else ''}")
    if given.json:
        with open(given.json, "w") as file:
            found = {"machine": machine(), "versions": versions("transformers"), "options": vars(given), "rows": results}
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
