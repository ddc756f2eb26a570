"""How long does a trained model take to answer words, against the usual loop over `torch.nn.Transformer` and against CTranslate2?

    python benchmarks/generation.py RUN [--words 10000] [--threads 2] [--budget 60] [--json FILE]

RUN is the folder of a run of `crossattention train g2p`. The words are held-out ones, shuffled, the same for all; all
contenders have the same weights in float32 and read and write the same vocabulary. "ours" goes through `Run.predict`, as
`crossattention predict` does with a flood of lines. torch.nn.Transformer runs the usual greedy loop without a cache, on the
words sorted by length, in batches of `--batch`. CTranslate2 gets the weights through its own `TransformerSpec` and sorts by
itself; its beam search divides by the length to a power of its own, so its answers may differ from ours. It waits in a process of
its own, as its threads and torch's hinder each other in one. Calls run in turn, in shuffled order; figures are medians.
"""

import argparse
import importlib.util
import json
import multiprocessing
import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection

import torch
from machine import machine, print_machine, versions
from plain_transformer import NAME as PLAIN
from plain_transformer import PlainTransformer
from timing import interleaved
from torch import nn

from crossattention.cli.questions import BATCH_SIZE
from crossattention.data.vocabulary import PAD
from crossattention.layers import sinusoidal_positions
from crossattention.models.transformer import Transformer
from crossattention.recipes.g2p import words_by_part
from crossattention.recipes.run import Run, load_run

BEAMS = 4
Answers = list[str]


def ours(run: Run, words: list[str], beams: int) -> Callable[[], Answers]:
    """`Run.predict`, as the command calls it."""
    return lambda: [found[0].text for found in run.predict(words, beams=beams, batch_size=BATCH_SIZE)]


def plain(run: Run, words: list[str], batch_size: int) -> Callable[[], Answers]:
    """The usual greedy loop."""
    translator = run.translator
    model = PlainTransformer(run.model.config)
    model.load_from(run.model)
    model.eval()

    def call() -> Answers:
        encoded = [translator.source.encode(word) for word in words]
        order = sorted(range(len(words)), key=lambda index: len(encoded[index]))
        answers = [""] * len(words)
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            width = len(encoded[rows[-1]])
            ids = torch.tensor([encoded[row] + [PAD] * (width - len(encoded[row])) for row in rows])
            for row, found in zip(rows, model.greedy(ids, ids != PAD, translator.max_length).tolist(), strict=True):
                end = found.index(model.config.end_id) if model.config.end_id in found else len(found)
                answers[row] = translator.target.decode(found[:end])
        return answers

    return call


class InAProcess:
    """A call made by a process of its own, which waits meanwhile: two OpenMP libraries in one process hinder each other."""

    def __init__(self, maker: Callable[..., Callable[[], Answers]], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, its_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(its_end, maker, args), daemon=True)
        self._process.start()
        self._pipe.recv()  # it is ready

    def __call__(self) -> Answers:
        """What the call there gives."""
        self._pipe.send(None)
        answers: Answers = self._pipe.recv()
        return answers


def _serve(pipe: Connection, maker: Callable[..., Callable[[], Answers]], args: tuple[object, ...]) -> None:
    call = maker(*args)
    pipe.send(None)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(call())


def ctranslate2_of(folder: str, words: list[str], beams: int, threads: int) -> Callable[[], Answers]:
    """CTranslate2 with the run's weights; tokens are our ids, written out."""
    import ctranslate2

    run = load_run(folder)
    translator = run.translator
    with tempfile.TemporaryDirectory() as folder:
        ctranslate2_spec(run.model).save(folder)
        engine = ctranslate2.Translator(folder, compute_type="float32", inter_threads=1, intra_threads=threads)

    def call() -> Answers:
        sources = [[str(number) for number in translator.source.encode(word)] for word in words]
        found = engine.translate_batch(
            sources, beam_size=beams, max_batch_size=256, max_decoding_length=translator.max_length, max_input_length=0
        )
        return [translator.target.decode([int(token) for token in result.hypotheses[0]]) for result in found]

    return call


def ctranslate2_spec(model: Transformer) -> object:
    """Our weights under CTranslate2's names."""
    from ctranslate2.specs import TransformerSpec

    config = model.config
    spec = TransformerSpec.from_config((config.encoder_layers, config.decoder_layers), config.heads, pre_norm=config.norm == "pre")
    encodings = sinusoidal_positions(torch.arange(512), config.dim).numpy()
    for side in ("encoder", "decoder"):
        stack, target = getattr(model, side), getattr(spec, side)
        target.scale_embeddings = True
        target.position_encodings.encodings = encodings
        _set_norm(target.layer_norm, stack.norm)
        for layer, its in zip(stack.layers, target.layer, strict=True):
            _set_attention(its.self_attention, layer.self_attention, layer.self_attention_residual, joined=3)
            if side == "decoder":
                _set_attention(its.attention, layer.cross_attention, layer.cross_attention_residual, joined=2)
            _set_norm(its.ffn.layer_norm, layer.feed_forward_residual.norm)
            _set_linear(its.ffn.linear_0, layer.feed_forward.up_proj)
            _set_linear(its.ffn.linear_1, layer.feed_forward.down_proj)
    spec.encoder.embeddings[0].weight = model.source_embedding.weight.detach().numpy()
    spec.decoder.embeddings.weight = model.target_embedding.weight.detach().numpy()
    spec.decoder.projection.weight = model.target_embedding.weight.detach().numpy()
    never = torch.zeros(config.target_vocab_size)
    never[[config.pad_id, config.begin_id]] = -1e9
    spec.decoder.projection.bias = never.numpy()
    names = [str(number) for number in range(config.source_vocab_size)]
    spec.register_source_vocabulary(names)
    spec.register_target_vocabulary([str(number) for number in range(config.target_vocab_size)])
    spec.config.add_source_bos = spec.config.add_source_eos = False
    spec.config.decoder_start_token = spec.config.bos_token = str(config.begin_id)
    spec.config.eos_token = str(config.end_id)
    spec.config.unk_token = names[-1]
    spec.validate()
    spec.optimize(quantization="float32")
    return spec


def _set_attention(spec: object, attention: nn.Module, residual: nn.Module, *, joined: int) -> None:
    """Queries, keys and values are one matrix in its self-attention, keys and values in its cross-attention."""
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    groups = [projections] if joined == 3 else [projections[:1], projections[1:]]
    for target, group in zip(spec.linear, groups, strict=False):
        target.weight = torch.cat([p.weight for p in group]).detach().numpy()
        target.bias = torch.cat([p.bias for p in group]).detach().numpy()
    _set_linear(spec.linear[-1], attention.out_proj)
    _set_norm(spec.layer_norm, residual.norm)


def _set_linear(spec: object, linear: nn.Linear) -> None:
    spec.weight, spec.bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()


def _set_norm(spec: object, norm: nn.LayerNorm) -> None:
    spec.gamma, spec.beta = norm.weight.detach().numpy(), norm.bias.detach().numpy()


def contenders(run: Run, words: list[str], given: argparse.Namespace) -> dict[str, Callable[[], Answers]]:
    """Name -> the call that answers all words."""
    calls = {
        "ours, greedy": ours(run, words, 1),
        f"ours, beam {BEAMS}": ours(run, words, BEAMS),
        f"{PLAIN}, greedy, no cache": plain(run, words, given.batch),
    }
    if importlib.util.find_spec("ctranslate2") is None:
        print("left out: CTranslate2; pip install ctranslate2")
        return calls
    calls["CTranslate2, greedy"] = InAProcess(ctranslate2_of, given.run, words, 1, given.threads)
    calls[f"CTranslate2, beam {BEAMS}"] = InAProcess(ctranslate2_of, given.run, words, BEAMS, given.threads)
    return calls


def measure(given: argparse.Namespace) -> list[dict[str, object]]:
    """Time all contenders, print the table, give its rows."""
    run = load_run(given.run)
    words = list(words_by_part(stressed=False)["test"])
    random.Random(0).shuffle(words)
    words = words[: given.words]
    calls = contenders(run, words, given)
    answers = {name: call() for name, call in calls.items()}
    timings = interleaved(calls, budget=given.budget, rounds=given.rounds, warmup=1)
    rows = []
    print(f"{len(words):,} words\n\n{'contender':44}{'seconds':>10}{'quartiles':>18}{'words/s':>10}{'as ours':>10}")
    for name, timing in timings.items():
        reference = answers["ours, greedy" if "greedy" in name else f"ours, beam {BEAMS}"]
        same = sum(a == b for a, b in zip(answers[name], reference, strict=True)) / len(words)
        rows.append(
            {"name": name, "seconds": asdict(timing), "words_per_second": len(words) / timing.median, "answers_as_ours": same}
        )
        quartiles = f"{timing.low_quartile:.2f} to {timing.high_quartile:.2f}"
        print(f"{name:44}{timing.median:>10.2f}{quartiles:>18}{len(words) / timing.median:>10,.0f}{same:>10.2%}")
    print()
    for name, against in RATIOS:
        if name in timings and against in timings:
            print(f"{name}: {timings[against].median / timings[name].median:.2f} times as fast as {against}")
    return rows


RATIOS = (
    ("ours, greedy", f"{PLAIN}, greedy, no cache"),
    (f"ours, beam {BEAMS}", "ours, greedy"),
    ("ours, greedy", "CTranslate2, greedy"),
    (f"ours, beam {BEAMS}", f"CTranslate2, beam {BEAMS}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--words", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=256, help="words of a batch of torch.nn.Transformer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which no round is begun")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are timed in any case")
    parser.add_argument("--json", help="file for the results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print_machine()
    rows = measure(given)
    if given.json:
        found = {"machine": machine(), "versions": versions("ctranslate2"), "arguments": vars(given), "rows": rows}
        with open(given.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
