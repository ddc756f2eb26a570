"""How many tokens a second does training read, against a plain loop over `torch.nn.Transformer`, and what did each part buy?

    python benchmarks/training.py [--threads 2] [--budget 60] [--only NAME ...] [--device cuda] [--json FILE]

The default recipe's model and batches, with AdamW and dropout. All contenders take the same batches (`--batches` of them, in
turn), of which a step is loss, backward, clipping, AdamW and reading the loss. They run in one process, interleaved in
shuffled order; figures are medians. "train()" is the library's own loop with all that it does beside; the rows under "our
step" change one thing each in the same step written out. "tokens/s" counts real source and target tokens, never padding;
"times" is the speed over torch.nn.Transformer's.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from machine import machine, print_machine
from plain_transformer import NAME as PLAIN
from plain_transformer import PlainTransformer
from timing import interleaved
from torch import Tensor, nn

from crossattention.data.batches import PairBatch
from crossattention.data.vocabulary import PAD
from crossattention.layers import Dropout
from crossattention.recipes.g2p import G2PConfig, G2PTask, default_training
from crossattention.recipes.pair_task import ModelShape
from crossattention.training.events import Step
from crossattention.training.loop import train
from crossattention.training.optimizers import build_optimizers


class TorchDropout(Dropout):
    """Ours, by torch's draws and a sum after it."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Dropout of x, plus the residual."""
        dropped = F.dropout(x, self.p, self.training)
        return dropped if residual is None else residual + dropped


@dataclass
class Setting:
    """What all contenders share."""

    task: G2PTask
    batches: list[PairBatch]
    device: torch.device
    smoothing: float

    @property
    def num_tokens(self) -> int:
        """Real tokens of all batches."""
        return sum(batch.num_tokens for batch in self.batches)


def plain_loop(setting: Setting, *, only_our_dropout: bool = False, batches: list[PairBatch] | None = None) -> Callable[[], None]:
    """Steps through all batches as a tutorial writes them."""
    model = PlainTransformer(setting.task.build_model().config, only_our_dropout=only_our_dropout).to(setting.device).train()
    training = default_training()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=training.betas, weight_decay=training.weight_decay)

    def run() -> None:
        for batch in setting.batches if batches is None else batches:
            logits = model(batch.source_ids, batch.target_ids, batch.source_mask)
            loss = F.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=PAD, label_smoothing=setting.smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm or math.inf)
            optimizer.step()
            loss.item()

    return run


def our_step(
    setting: Setting,
    *,
    optimizer: str = "adamw",
    is_fused: bool = True,
    torch_dropout: bool = False,
    no_dropout: bool = False,
    precision: str = "fp32",
    compiled: bool = False,
    batches: list[PairBatch] | None = None,
) -> Callable[[], None]:
    """Steps through all batches with our model, loss and optimizer, one thing changed."""
    model = setting.task.build_model().to(setting.device).train()
    for module in model.modules():
        if isinstance(module, Dropout):
            module.__class__ = TorchDropout if torch_dropout else Dropout
            module.p = 0.0 if no_dropout else module.p
    training = replace(default_training(), learning_rate=1e-4, optimizer=optimizer)
    optimizers = list(build_optimizers(model, training).values())
    if not is_fused:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, betas=training.betas, weight_decay=training.weight_decay)]
    parameters = list(model.parameters())
    called = torch.compile(model, dynamic=True) if compiled else model
    is_half = precision == "bf16"

    def run() -> None:
        for batch in setting.batches if batches is None else batches:
            with torch.autocast(setting.device.type, dtype=torch.bfloat16) if is_half else nullcontext():
                loss = setting.task.loss(called, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, training.clip_norm or math.inf)
            loss.item()
            for each in optimizers:
                each.step()
                each.zero_grad(set_to_none=True)

    return run


class SameBatches:
    """The recipe's task, giving the setting's batches again and again."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def __getattr__(self, name: str) -> object:
        return getattr(self._setting.task, name)

    def batch_at(self, step: int) -> PairBatch:
        """As the loop asks for it."""
        return self._setting.batches[step % len(self._setting.batches)]


def our_loop(setting: Setting, out: str, threads: int) -> Callable[[], None]:
    """The library's own loop: each call goes on until it has logged the next round of batches."""
    config = replace(
        default_training(),
        minutes=None,
        optimizer="adamw",
        steps=10**9,
        evaluate_every=10**9 - 1,
        checkpoint_minutes=1e9,
        learning_rate=1e-4,
        log_every=len(setting.batches),
        threads=threads,
        device="cpu" if setting.device.type == "cpu" else "auto",
    )
    events: Iterator[object] = train(SameBatches(setting), config, out)  # type: ignore[arg-type]

    def run() -> None:
        while not isinstance(next(events), Step):
            pass

    return run


def unsorted_batches(setting: Setting, count: int) -> list[PairBatch]:
    """Batches of examples drawn at random, whatever their lengths, as full as the recipe's allow."""
    batches = setting.task.learner.batches
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).numpy()
    found, begin = [], 0
    lengths = list(zip(batches._sources.lengths[order], batches._targets.lengths[order] + 1, strict=True))
    for end in range(1, len(order) + 1):
        widest = [max(pair[side] for pair in lengths[begin:end]) for side in (0, 1)]
        if (end - begin) * sum(widest) > batches.tokens_per_batch:
            found.append(batches._collate(order[begin : end - 1]))
            begin = end - 1
        if len(found) == count:
            break
    return found


def contenders(setting: Setting, out: str, given: argparse.Namespace) -> dict[str, tuple[Callable[[], None], int]]:
    """Name -> the call, and the real tokens that it reads."""
    loose = [batch.to(setting.device) for batch in unsorted_batches(setting, len(setting.batches))]
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        PLAIN: lambda: plain_loop(setting),
        f"{PLAIN}, dropout where ours is": lambda: plain_loop(setting, only_our_dropout=True),
        f"{PLAIN}, batches not by length": lambda: plain_loop(setting, batches=loose),
        "train()": lambda: our_loop(setting, out, given.threads),
        "our step": lambda: our_step(setting),
        "- torch's dropout": lambda: our_step(setting, torch_dropout=True),
        "- no dropout": lambda: our_step(setting, no_dropout=True),
        "- optimizer not fused": lambda: our_step(setting, is_fused=False),
        "- batches not by length": lambda: our_step(setting, batches=loose),
        "- Muon": lambda: our_step(setting, optimizer="muon"),
        "- bf16": lambda: our_step(setting, precision="bf16"),
        "- compiled": lambda: our_step(setting, compiled=True),
    }
    left_out = {"- compiled"} - set(given.only) if not given.compile else set()
    wanted = [name for name in makers if name not in left_out and (not given.only or name in {PLAIN, *given.only})]
    in_loose = sum(batch.num_tokens for batch in loose)
    return {name: (makers[name](), in_loose if "not by length" in name else setting.num_tokens) for name in wanted}


def measure(given: argparse.Namespace) -> list[dict[str, object]]:
    """Time all contenders, print the table, give its rows."""
    device = torch.device(given.device)
    task = G2PTask(G2PConfig(model=ModelShape(dropout=given.dropout)))
    config = task.config
    setting = Setting(task, [task.batch_at(step).to(device) for step in range(given.batches)], device, config.label_smoothing)
    padded = sum(batch.source_ids.numel() + batch.labels.numel() for batch in setting.batches)
    print(f"{asdict(config.model)}")
    print(f"{setting.num_tokens / given.batches:,.0f} tokens a step, {padded / setting.num_tokens - 1:.1%} padding\n")
    with tempfile.TemporaryDirectory() as out:
        calls = contenders(setting, f"{out}/run", given)
        timings = interleaved(
            {name: call for name, (call, _) in calls.items()}, budget=given.budget, rounds=3, warmup=1, device=given.device
        )
    base = setting.num_tokens / timings[PLAIN].median
    rows = []
    for name, timing in timings.items():
        speed = calls[name][1] / timing.median
        rows.append(
            {
                "name": name,
                "tokens_per_second": speed,
                "times_torch": speed / base,
                "milliseconds_a_step": 1e3 * timing.median / given.batches,
                "seconds": asdict(timing),
            }
        )
    print(f"{'contender':48}{'ms a step':>12}{'quartiles':>18}{'tokens/s':>12}{'times':>8}")
    for row in rows:
        low, high = (1e3 * row["seconds"][side] / given.batches for side in ("low_quartile", "high_quartile"))
        print(
            f"{row['name']:48}{row['milliseconds_a_step']:>12.1f}{f'{low:.1f} to {high:.1f}':>18}"
            f"{row['tokens_per_second']:>12,.0f}{row['times_torch']:>8.2f}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--dropout", type=float, default=0.1, help="of all models; the recipe's own default is none")
    parser.add_argument("--batches", type=int, default=8, help="steps of each turn")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which no round is begun")
    parser.add_argument("--only", nargs="*", default=[], help="contenders beside torch.nn.Transformer; all where none is named")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes to compile on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="file for the results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print_machine()
    rows = measure(given)
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"machine": machine(), "arguments": vars(given), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
