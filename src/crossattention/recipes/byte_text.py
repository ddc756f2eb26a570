"""The recipe `bytes`: Perceiver IO fills masked bytes in, of any folder of text.

What lives here: the settings, the task, the sizes of the default model and how its weights begin, the scores beside those of
n-grams. What does not: reading folders (`data.text_folder`), windows and masks (`data.byte_windows`), counts (`byte_ngrams`), what
a trained model answers and shows (`byte_filler`).

As in the paper, 15 % of the bytes are masked, in whole words divided by blanks, each byte replaced by MASK, and only these are
predicted: the decoder is asked one query for each masked byte and none for the others.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.data.byte_windows import (
    END,
    VOCAB_SIZE,
    ByteStream,
    MaskedBatch,
    MaskedWindows,
    check_window,
    decode,
)
from crossattention.data.text_folder import TextFolder, list_text
from crossattention.models.perceiver import PerceiverIO, PerceiverIOConfig
from crossattention.models.perceiver_adapters import TextInput, TokenOutput
from crossattention.recipes.byte_filler import ByteFiller, Filling, Question, hide_word
from crossattention.recipes.byte_ngrams import ByteNGrams, read_text, score_masked
from crossattention.recipes.recipe import Examples, OnProgress, Run
from crossattention.training.config import TrainConfig
from crossattention.training.tasks import Evaluation
from crossattention.training.together import ALONE, Together
from crossattention.views.content import AttentionView

RECIPE = "bytes"

SUBSETS: Mapping[str, str] = MappingProxyType(
    {
        "": "the model",
        "_unigram": "unigrams",
        "_ngram_left": "n-grams, what is visible before",
        "_ngram_both": "n-grams, what is visible before and behind",
        "_ngram_told": "5-grams that are told the bytes before, masked or not",
    }
)

NO_SOURCE = ("site-packages", "dist-packages")
"""Folders of the standard library that hold other people's packages."""

_TOGETHER = 50  # windows that are scored at once
_SHOWN_BYTES = 120
_MOST_LISTED = 20_000


@dataclass(frozen=True)
class PerceiverShape:
    """The size of the Perceiver IO, as far as the recipe leaves it open.

    Args:
        dim: width of embeddings and of output queries.
        num_latents: latents that read the window.
        latent_dim: width of a latent.
        layers: self-attention layers of the latents.
        heads: heads of all attention; divides the widths.
        qk_dim: width of queries and keys, all heads together.
        widening: width inside the latents' feed-forward layers, in widths of a latent.
    """

    dim: int = 128
    num_latents: int = 32
    latent_dim: int = 128
    layers: int = 2
    heads: int = 4
    qk_dim: int = 64
    widening: int = 2


@dataclass(frozen=True)
class BytesConfig:
    """The settings of the recipe.

    Args:
        data: folder of text; without it the Python standard library's own source.
        pattern: what the names of its files must match, such as "*.txt"; without it all files, or of the standard library "*.py".
        length: bytes that are read at once, and the most that `predict` can be given.
        mask_share: share of them that is masked.
        batch_size: windows a step.
        evaluation_windows: validation windows scored at each evaluation; all, where there are fewer.
        test_windows: test windows scored at the end; all, where there are fewer.
        model: size of the Perceiver IO.
    """

    data: Path | None = None
    pattern: str | None = None
    length: int = 64
    mask_share: float = 0.15
    batch_size: int = 64
    evaluation_windows: int = 200
    test_windows: int = 1000
    model: PerceiverShape = field(default_factory=PerceiverShape)

    def __post_init__(self) -> None:
        check_window(self.length, self.mask_share)
        for name in ("batch_size", "evaluation_windows", "test_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        self.perceiver  # noqa: B018  its own checks, before any data is read

    @property
    def perceiver(self) -> PerceiverIOConfig:
        """The model's sizes: the paper's language model, smaller."""
        shape = self.model
        for name in ("dim", "latent_dim", "qk_dim"):
            if getattr(shape, name) % shape.heads:
                raise ValueError(f"{name} must be a multiple of heads={shape.heads}, got {getattr(shape, name)}")
        return PerceiverIOConfig(
            inputs=TextInput(VOCAB_SIZE, shape.dim, self.length),
            outputs=TokenOutput(self.length, heads=shape.heads, qk_dim=shape.qk_dim),
            num_latents=shape.num_latents,
            latent_dim=shape.latent_dim,
            layers_per_block=shape.layers,
            cross_heads=shape.heads,
            self_heads=shape.heads,
            qk_dim=shape.qk_dim,
            value_dim=shape.latent_dim,
            self_widening=shape.widening,
        )


def default_training() -> TrainConfig:
    """The training settings that go with the recipe's defaults."""
    return TrainConfig(minutes=10, learning_rate=2e-3, optimizer="muon", warmup_steps=100)


def config_from_json(fields: Mapping[str, Any]) -> BytesConfig:
    """The settings that a run's description holds."""
    data = None if fields["data"] is None else Path(fields["data"])
    return BytesConfig(**{**fields, "data": data, "model": PerceiverShape(**fields["model"])})


def read_folder(config: BytesConfig) -> TextFolder:
    """The files that the settings name, each read once; Raises as `list_text`."""
    if config.data is not None:
        return list_text(config.data, pattern=config.pattern or "*")
    return list_text(sysconfig.get_paths()["stdlib"], pattern=config.pattern or "*.py", without=NO_SOURCE)


class BytesTask:
    """The training task: a `Task` of the training loop.

    Args:
        config: the recipe's settings; the defaults where there are none.
        seed: of the windows' order, cuts and masks.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder.
        ValueError: it has fewer than three text files, or a part of it is shorter than a window.

    Cost: reads every file once.
    """

    metric = "bits_per_byte"

    def __init__(self, config: BytesConfig | None = None, *, seed: int = 0) -> None:
        self.config = config or BytesConfig()
        self.folder = read_folder(self.config)
        self._parts = self.folder.parts()
        self.streams = {part: ByteStream(self.folder, indices) for part, indices in self._parts.items()}
        self.windows = _windows(self.config, self.streams["train"], batch_size=self.config.batch_size, seed=seed, varies=True)
        # Found to be too short now, not after the training:
        self.valid = _windows(self.config, self.streams["valid"])
        self.test = _windows(self.config, self.streams["test"])

    @property
    def notes(self) -> tuple[str, ...]:
        """Which files are read, on which side, and what was left out."""
        folder = self.folder
        sides = ", ".join(f"{len(indices):,} for {part}" for part, indices in self._parts.items())
        found = [f"{len(folder.files):,} text files, {folder.num_bytes:,} bytes in {folder.path} ({sides})"]
        if folder.num_undecodable:
            found.append(f"{folder.num_undecodable:,} of them are not UTF-8 and are read as they are, bytes being bytes")
        if folder.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in folder.left_out.items())
            named = f"; such as {'; '.join(folder.problems)}" if folder.problems else ""
            found.append(f"left out: {reasons}{named}")
        return tuple(found)

    @property
    def sample_input(self) -> str:
        """A validation text with a word hidden."""
        return _questions(self.streams["valid"], self.config.length, count=1)[0].marked

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every window once."""
        return self.windows.steps_per_epoch

    def build_model(self) -> PerceiverIO:
        """A new model whose attention begins near by; see `begin_local`."""
        model = PerceiverIO(self.config.perceiver)
        begin_local(model)
        return model

    def batch_at(self, step: int) -> MaskedBatch:
        """The batch of a step, a pure function of (seed, step)."""
        return self.windows.batch_at(step)

    def loss(self, model: nn.Module, batch: MaskedBatch) -> Tensor:
        """The cross-entropy of the masked bytes, which alone are decoded; mean, in nats."""
        logits = model(batch.ids, outputs=batch.positions)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())

    def loss_weight(self, batch: MaskedBatch) -> float:
        """The number of masked bytes."""
        return batch.labels.numel()

    def evaluate(self, model: nn.Module, together: Together = ALONE) -> Evaluation:
        """Bits per byte and accuracy on masked bytes of validation windows, always the same ones, and one text to look at."""
        scores = score_model(model, self.valid, min(self.config.evaluation_windows, self.valid.num_windows), together=together)
        metrics = {name: scores[name] for name in ("bits_per_byte", "accuracy")}
        if not together.is_first:
            return Evaluation(metrics)
        [question] = _questions(self.streams["valid"], self.config.length, count=1)
        filler = ByteFiller(model, self.config.length)
        filling = filler.fill([question.marked])[0][0]
        alignment = filler.align(question.marked)
        sample = {"source": question.marked, "predicted": filling.text, "reference": question.text, **asdict(alignment)}
        return Evaluation(metrics, sample)

    def examples(self, run: BytesRun, count: int) -> Examples:
        """Test texts with a word hidden, and what a run fills in."""
        asked = _questions(self.streams["test"], self.config.length, count=count)
        filled = run.filler.fill([question.marked for question in asked])
        rows = [
            (found[0].filled == question.hidden, (question.marked, found[0].filled, question.hidden))
            for question, found in zip(asked, filled, strict=True)
        ]
        return Examples(("text", "model", "data"), tuple(rows), (self.sample_input,), answers=(1,))

    def describe(self) -> dict[str, Any]:
        """What a run's folder holds beside the weights, for JSON."""
        folder = self.folder
        config = {**asdict(self.config), "data": None if self.config.data is None else str(self.config.data)}
        listed = {file.label: f"{file.size} {file.sha256.hex()[:16]}" for file in folder.files[:_MOST_LISTED]}
        return {
            "recipe": RECIPE,
            "config": config,
            "data": {"files": len(folder.files), "bytes": folder.num_bytes, "sha256": folder.sha256},
            "files": listed,
        }


CONFIG = BytesConfig
TASK = BytesTask


@dataclass(frozen=True)
class BytesRun(Run):
    """A trained model that fills masked bytes in.

    Args:
        path: the folder that holds the weights.
        recipe: "bytes".
        description: what the recipe wrote of itself beside the weights.
        step: the training step of the weights, where the folder says it.
        filler: the model, as texts see it.
    """

    filler: ByteFiller

    subsets: ClassVar[Mapping[str, str]] = SUBSETS

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.filler.model

    def predict(self, inputs: Iterable[str], *, num_hypotheses: int = 1, batch_size: int = 32) -> Iterator[list[Filling]]:
        """Fill the marked bytes of texts in; see `ByteFiller.fill`."""
        return self.filler.predict(inputs, num_hypotheses=num_hypotheses, batch_size=batch_size)

    def evaluate(self, *, on_progress: OnProgress | None = None) -> dict[str, float]:
        """Score the model and the counts on masked bytes of test windows, the same for all.

        Returns:
            bits_per_byte and accuracy of the model; the same with `_unigram`, `_ngram_left`, `_ngram_both` and `_ngram_told` (see
            `byte_ngrams.score_masked`), counted on the training files; masked, the number of bytes.

        Raises:
            FileNotFoundError: the folder is gone.
            ValueError: its files are not those of the training; names some that differ.

        Cost: reads every file once to compare it; counting and scoring 1,000 windows of 128 bytes: some 40 s on one core.
        """
        config = config_from_json(self.description["config"])
        folder = read_folder(config)
        check_same(folder, self.description)
        parts = folder.parts()
        windows = _windows(config, ByteStream(folder, parts["test"]))
        count = min(config.test_windows, windows.num_windows)

        def show(done: int, more: int = 0) -> None:
            if on_progress is not None:
                on_progress(done + more, 2 * count)

        scores = score_model(self.model, windows, count, on_progress=show)
        ngrams = ByteNGrams(read_text(ByteStream(folder, parts["train"])))
        batch = _first(windows, count)
        arrays = [tensor.numpy() for tensor in (batch.ids, batch.positions, batch.labels)]
        for name, found in score_masked(ngrams, *arrays, on_progress=lambda done, _: show(done, count)).items():
            scores |= {f"bits_per_byte_{name}": found.bits_per_byte, f"accuracy_{name}": found.accuracy}
        return scores

    def align(self, given: str, predicted: str) -> Any:
        """What the masked bytes read, mean over the heads; see `ByteFiller.maps`."""
        return self.filler.align(given, predicted)

    def view(self, given: str, answer: str | None = None) -> AttentionView:
        """What the masked bytes read, for each head; see `ByteFiller.view`."""
        return self.filler.view(given, answer)


def open_run(path: Path, description: Mapping[str, Any], model: Any, step: int | None) -> BytesRun:
    """The run out of its parts.

    Raises:
        ValueError: the model is of another length than the settings say.
    """
    config = config_from_json(description["config"])
    if not isinstance(model, PerceiverIO) or model.config != config.perceiver:
        raise ValueError(
            f"the parts of {path} do not belong together: task.json and config.json describe different models; take both from one "
            "run"
        )
    return BytesRun(path, description["recipe"], description, step, ByteFiller(model, config.length))


def score_model(
    model: nn.Module, windows: MaskedWindows, count: int, *, on_progress: Any | None = None, together: Together = ALONE
) -> dict[str, float]:
    """Bits per byte and accuracy of a model on the first `count` windows, and how many bytes these are of."""
    device = next(model.parameters()).device

    def score(begin: int) -> tuple[float, int, int]:
        batch = _first(windows, min(_TOGETHER, count - begin), begin=begin).to(device)
        logits = model(batch.ids, outputs=batch.positions).flatten(0, 1).float()
        labels = batch.labels.flatten()
        if on_progress is not None:
            on_progress(begin + len(batch.indices))
        nats = float(F.cross_entropy(logits, labels, reduction="sum"))
        return nats, int((logits.argmax(-1) == labels).sum()), labels.numel()

    with torch.no_grad():
        scored = together.map(score, range(0, count, _TOGETHER))
    nats, right, total = (sum(column) for column in zip(*scored, strict=True))
    return {"bits_per_byte": nats / total / math.log(2), "accuracy": right / total, "masked": total}


def check_same(folder: TextFolder, description: Mapping[str, Any]) -> None:
    """Check that a folder is the one that a run was trained on.

    Raises:
        ValueError: it is not; names up to five files that differ.
    """
    if folder.sha256 == description["data"]["sha256"]:
        return
    then = description["files"]
    now = {file.label: f"{file.size} {file.sha256.hex()[:16]}" for file in folder.files}
    named = [f"{name} is gone" for name in then if name not in now]
    named += [f"{name} has changed" for name in then if name in now and now[name] != then[name]]
    if len(then) < _MOST_LISTED:
        named += [f"{name} is new" for name in now if name not in then]
    shown = "; ".join(named[:5]) + (f"; and {len(named) - 5:,} more" if len(named) > 5 else "")
    raise ValueError(
        f"{folder.path} is not as it was when the run was trained: {shown or 'files that the run does not list differ'}. Other "
        "files would be held out, and some that were trained on scored as unseen: put the files back to score"
    )


@torch.no_grad()
def begin_local(model: PerceiverIO) -> None:
    """Begin with attention to what is near by, so that which place is which need not be found by chance.

    Positions, output queries and latents begin as sinusoids of the places 0 .. length - 1, the latents' evenly spread over the
    window, and the two cross-attentions with the same projection for queries and keys, so that like places match. All of it is
    trained.

    Source: the sinusoids are those of Vaswani et al. 2017, section 3.5, with wavelengths from 8 to twice the window.
    """
    config = model.config
    assert isinstance(config.inputs, TextInput)
    length, dim = config.inputs.max_length, config.inputs.dim
    places = torch.arange(length, dtype=torch.float32)
    model.inputs.embedding.weight.normal_(std=dim**-0.5)
    model.inputs.positions.weight.copy_(_sinusoids(places, dim, length) * dim**-0.5)
    model.outputs.queries.copy_(_sinusoids(places, dim, length) * dim**-0.5)
    spread = (torch.arange(config.num_latents, dtype=torch.float32) + 0.5) * length / config.num_latents
    model.latents.copy_(_sinusoids(spread, config.latent_dim, length) * 0.5)
    for layer in (model.encoder, model.decoder):
        queries, keys = layer.attention.q_proj.weight, layer.attention.k_proj.weight
        queries.mul_(1.5)
        if queries.shape == keys.shape:
            keys.copy_(queries)


def _sinusoids(places: Tensor, dim: int, longest: int) -> Tensor:
    """(places, dim) sines and cosines, root mean square 1."""
    share = torch.arange(-(-dim // 2)) / max(1, -(-dim // 2) - 1)
    angles = places[:, None] * (2 * math.pi / (8 * (max(longest, 5) / 4) ** share))
    return torch.cat((angles.sin(), angles.cos()), -1)[:, :dim] * 2**0.5


def _windows(config: BytesConfig, stream: ByteStream, *, batch_size: int = 1, seed: int = 0, varies: bool = False) -> MaskedWindows:
    return MaskedWindows(
        stream,
        length=config.length,
        batch_size=batch_size,
        mask_share=config.mask_share,
        seed=seed,
        shortest=min(config.length, max(2, config.length // 8)) if varies else None,
    )


def _first(windows: MaskedWindows, count: int, *, begin: int = 0) -> MaskedBatch:
    """Some windows from the `begin`-th on, each with its own masks, whatever the number that is taken at once."""
    batches = [windows.batch_at(number) for number in range(begin, begin + count)]
    tensors = [torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids", "positions", "labels")]
    return MaskedBatch(*tensors, indices=tuple(place for batch in batches for place in batch.indices))


def _questions(stream: ByteStream, length: int, *, count: int) -> list[Question]:
    """Stretches of held-out text with a word hidden, always the same ones."""
    size = min(_SHOWN_BYTES, length, len(stream))
    found: list[Question] = []
    places = MaskedWindows(stream, length=size, batch_size=1, seed=0)
    for number in range(min(50 * count, places.num_windows)):
        ids = stream.read(places.place(number), size)
        lines = decode(ids[ids != END]).decode("utf-8", "ignore").splitlines()
        question = hide_word(max(lines, key=len, default="").strip())
        if question is not None and question not in found:
            found.append(question)
        if len(found) == count:
            break
    return found or [Question("[MASK]", "e", "e")]
