"""How long does a training step of RETRO take, in how much memory, and how long a sampled token, against RETRO-pytorch?

    python benchmarks/retro.py [--sizes small paper] [--threads 1] [--budget 60] [--processor-time] [--json FILE]

RETRO-pytorch 0.3.9 is installed by `pip install --no-deps retro-pytorch==0.3.9 einops`; its import of `autofaiss`, which its model
does not use, is answered by an empty module. It ignores `heads` (always 8): here its encoder and decoder are built with the number
that is asked for. Both models have the same widths, layers, heads, chunks, neighbours and vocabulary, and read neighbours in the
same layers; RETRO-pytorch has one embedding for both stacks, as ours has here. A training step is the forward pass, the loss and
the backward pass, each by the model's own loss: labels given to ours, `return_loss` to RETRO-pytorch's. Sampling continues a prompt
by tokens drawn at temperature 1, with neighbours from a function that costs nothing; RETRO-pytorch's runs its own
`TrainingWrapper.generate`. Calls run in turn, in shuffled order; figures are medians.
"""

import argparse
import contextlib
import functools
import io
import json
import sys
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from machine import machine, print_machine, versions
from timing import interleaved, peak_megabytes, tensor_megabytes
from torch import Tensor

from crossattention.models.retro import Retro, RetroConfig

PEER = "retro-pytorch"


@dataclass(frozen=True)
class Size:
    """What both models are."""

    vocab_size: int
    dim: int
    encoder_dim: int
    heads: int
    head_dim: int
    layers: int
    cross_layers: tuple[int, ...]
    encoder_layers: int
    length: int
    batch: int
    neighbours: int = 2
    chunk: int = 64


SIZES = {
    "small": Size(8192, 256, 256, 4, 64, 4, (2, 4), 1, 512, 4),
    "medium": Size(16384, 512, 512, 8, 64, 6, (3, 6), 2, 512, 2),
    "paper": Size(32000, 896, 896, 16, 64, 12, (6, 9, 12), 2, 1024, 1),
}
"""The last is the paper's smallest model at half its length, with a vocabulary that fits a small machine."""


def ours_of(size: Size) -> Retro:
    """Our model."""
    return Retro(
        RetroConfig(
            size.vocab_size,
            dim=size.dim,
            heads=size.heads,
            head_dim=size.head_dim,
            layers=size.layers,
            feed_forward_dim=4 * size.dim,
            cross_layers=size.cross_layers,
            encoder_dim=size.encoder_dim,
            encoder_heads=size.heads,
            encoder_head_dim=size.head_dim,
            encoder_layers=size.encoder_layers,
            encoder_feed_forward_dim=4 * size.encoder_dim,
            encoder_cross_layers=(1,),
            chunk_length=size.chunk,
            shared_embedding=size.dim == size.encoder_dim,
            tied=False,
        )
    )


def theirs_of(size: Size) -> torch.nn.Module:
    """RETRO-pytorch's, with the number of heads that is asked for."""
    sys.modules.setdefault("autofaiss", types.SimpleNamespace(build_index=None))
    import retro_pytorch.retro_pytorch as module

    stacks = module.Encoder, module.Decoder
    module.Encoder, module.Decoder = (functools.partial(stack, heads=size.heads) for stack in stacks)
    try:
        return module.RETRO(
            num_tokens=size.vocab_size,
            max_seq_len=size.length + 1,
            enc_dim=size.encoder_dim,
            enc_depth=size.encoder_layers,
            enc_cross_attn_layers=(1,),
            dec_depth=size.layers,
            dec_cross_attn_layers=size.cross_layers,
            dec_dim=size.dim,
            dim_head=size.head_dim,
            chunk_size=size.chunk,
            pad_id=-1,
        )
    finally:
        module.Encoder, module.Decoder = stacks


def inputs_of(size: Size) -> tuple[Tensor, Tensor]:
    """Ids with one more than the model reads, and neighbours of its whole chunks."""
    torch.manual_seed(0)
    ids = torch.randint(1, size.vocab_size, (size.batch, size.length + 1))
    chunks = size.length // size.chunk
    return ids, torch.randint(1, size.vocab_size, (size.batch, chunks, size.neighbours, 2 * size.chunk))


def steps_of(size: Size) -> dict[str, Callable[[], None]]:
    """A training step of each."""
    ids, neighbours = inputs_of(size)
    mine, theirs = ours_of(size).train(), theirs_of(size).train()

    def my_step() -> None:
        (mine(ids[:, :-1], neighbours, labels=ids[:, 1:]) / ids[:, 1:].numel()).backward()
        mine.zero_grad(set_to_none=True)

    def their_step() -> None:
        theirs(ids, neighbours, return_loss=True).backward()
        theirs.zero_grad(set_to_none=True)

    return {"ours": my_step, PEER: their_step}


def samplers_of(size: Size, new_tokens: int) -> dict[str, Callable[[], Tensor]]:
    """The continuation of one prompt of half a window by each."""
    from retro_pytorch.training import TrainingWrapper

    ids, neighbours = inputs_of(size)
    prompt, found = ids[:1, : size.length // 2], neighbours[:1, 0]
    mine, theirs = ours_of(size).eval(), theirs_of(size).eval()

    class Wrapper(TrainingWrapper):
        """The wrapper without its database."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.retro, self.chunk_size, self.max_seq_len = theirs, size.chunk, prompt.shape[1] + new_tokens - 1
            self.fetch_knn_chunks_fn = lambda chunks: found.expand(chunks.shape[0], -1, -1)

    wrapper = Wrapper().eval()

    def their_sample() -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):
            return wrapper.generate(prompt)

    return {
        "ours": lambda: mine.sample(prompt, lambda chunk: (found, None), new_tokens=new_tokens),
        PEER: their_sample,
    }


def compared(calls: dict[str, Callable[[], object]], budget: float, clock: Callable[[], float]) -> dict[str, object]:
    """Timings and memory of both."""
    timings = interleaved(calls, budget=budget, rounds=3, warmup=1, clock=clock)
    return {
        name: {
            **asdict(timing),
            "resident_megabytes": peak_megabytes(calls[name]),
            "tensor_megabytes": tensor_megabytes(calls[name]),
        }
        for name, timing in timings.items()
    }


def line(what: str, found: dict[str, object]) -> str:
    """One comparison in words."""
    mine, theirs = found["ours"], found[PEER]
    times = theirs["median"] / mine["median"]
    memory = f"{mine['tensor_megabytes']:,.0f} / {theirs['tensor_megabytes']:,.0f} MB of tensors"
    return f"{what}: {1e3 * mine['median']:,.1f} / {1e3 * theirs['median']:,.1f} ms, {times:.2f} times as fast, {memory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "medium"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds a comparison")
    parser.add_argument("--processor-time", action="store_true", help="measure the process's own time; with --threads 1")
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.processor_time else time.perf_counter
    print_machine()
    results = {}
    for name in given.sizes:
        size = SIZES[name]
        found = {
            "step": compared(steps_of(size), given.budget, clock),
            "sample": compared(samplers_of(size, given.new_tokens), given.budget, clock),
        }
        print(f"\n{name}: {size}")
        print(line(f"training step of {size.batch} x {size.length} tokens, ours / {PEER}", found["step"]))
        print(line(f"{given.new_tokens} tokens after {size.length // 2}, ours / {PEER}", found["sample"]), flush=True)
        results[name] = {"size": asdict(size), **found}
    if given.json:
        facts = {"machine": machine(), "versions": versions(PEER, "torch"), "clock": clock.__name__, "results": results}
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)


if __name__ == "__main__":
    main()
