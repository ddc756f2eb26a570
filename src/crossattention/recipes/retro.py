"""The recipe `retro`: a language model that reads the nearest chunks of its own training text.

What lives here: the settings, the task, the sizes of the default model, and how it is scored with retrieval on, off and with
random neighbours. What does not: making the database (`retrieval`), windows and parts (`data.chunk_windows`), what a trained model
writes and shows (`retro_writer`).

The database holds all documents. A tenth of their groups is held out: these are not trained on, and no chunk, whether trained on or
scored, may read theirs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.data.cache import user_cache
from crossattention.data.chunk_windows import (
    ChunkBatch,
    ChunkWindows,
    Neighbourhood,
    Window,
    batch_of,
    parts_of,
    window_numbers,
    windows_of,
)
from crossattention.models.pretrained import find_source, load
from crossattention.models.retro import Retro, RetroConfig, retro_fit
from crossattention.recipes.recipe import Examples, OnProgress, Run
from crossattention.recipes.retro_writer import Continuation, Writer
from crossattention.retrieval import Database, Settings, build
from crossattention.retrieval.database import STATE_FILE
from crossattention.training.config import TrainConfig
from crossattention.training.tasks import Evaluation
from crossattention.training.together import ALONE, Together
from crossattention.views.content import AttentionView

RECIPE = "retro"
MODES = ("on", "off", "random")

SUBSETS: Mapping[str, str] = MappingProxyType(
    {
        "": "retrieval on",
        "_off": "retrieval off",
        "_random": "random neighbours",
        "_share": "share of the bytes",
    }
)
OVERLAPS = MappingProxyType({"overlap_to_1_8": (-1.0, 0.125), "overlap_to_1_2": (0.125, 0.5), "overlap_above": (0.5, 1.0)})
"""Scores of the chunks whose overlap with the training text lies above the first and up to the second number."""

NO_SOURCE = ("site-packages", "dist-packages", "__pycache__")
"""Folders of the standard library that hold other people's packages, or no source."""

_NO_LABEL = -100
_TOGETHER = 16  # windows that are scored at once
_PROMPT_CHUNKS = 2


@dataclass(frozen=True)
class RetroShape:
    """The size of the model, as far as the recipe leaves it open.

    Args:
        dim: width of decoder and encoder, which share one embedding.
        heads: heads of all attention; divides the width.
        layers: layers of the decoder.
        cross_layers: its layers, counted from 1, that read neighbours.
        encoder_layers: layers of the encoder.
        widening: width inside feed-forward layers, in widths of the model.
        dropout: on each sublayer's output.
    """

    dim: int = 192
    heads: int = 6
    layers: int = 4
    cross_layers: tuple[int, ...] = (2, 4)
    encoder_layers: int = 1
    widening: int = 4
    dropout: float = 0.0


@dataclass(frozen=True)
class RetroTextConfig:
    """The settings of the recipe.

    Args:
        data: folder of text; without it the Python standard library's own source.
        db: folder of the chunk database; made of `data` where there is none. Without it, one in the user's cache.
        pattern: what the names of the files must match, such as "*.txt"; without it all files, or of the standard library "*.py".
        same: pattern on document names: documents in which its groups find the same do not find each other, and stand on one side
            of the split; 'models/([^/]+)/'.
        embedder: a BERT to embed chunks with, by folder or id; without it, hashed n-grams weighted by TF-IDF.
        vocab_size: tokens of the tokenizer that is trained; 4096 where it is not given.
        neighbours: neighbours that a chunk reads; 0 trains the plain language model.
        chunks: chunks of a window, 64 tokens each.
        unread: share of the training windows that get no neighbours, so that the model learns to do without.
        batch_size: windows a step.
        evaluation_windows: validation windows scored at each evaluation; all, where there are fewer.
        test_windows: test windows scored at the end; all, where there are fewer.
        retro_fit: run of a plain language model on the same database, which gets retrieval added and stays as it is itself.
        model: size of the model.
    """

    data: Path | None = None
    db: Path | None = None
    pattern: str | None = None
    same: str | None = None
    embedder: str | None = None
    vocab_size: int | None = None
    neighbours: int = 2
    chunks: int = 8
    unread: float = 0.05
    batch_size: int = 8
    evaluation_windows: int = 48
    test_windows: int = 400
    retro_fit: Path | None = None
    model: RetroShape = field(default_factory=RetroShape)

    def __post_init__(self) -> None:
        for name, least in (("neighbours", 0), ("chunks", 2), ("batch_size", 1), ("evaluation_windows", 1), ("test_windows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}")
        if not 0.0 <= self.unread < 1.0:
            raise ValueError(f"expected unread as a share from 0 up to, not including, 1, got {self.unread}")
        if self.retro_fit is not None and not self.neighbours:
            raise ValueError(f"retro_fit={self.retro_fit} adds retrieval to a model, but neighbours=0 asks for none; leave one out")
        self.retro(1)  # its own checks, before any data is read

    def retro(self, vocab_size: int, chunk_length: int = 64) -> RetroConfig:
        """The model's sizes."""
        shape = self.model
        if shape.dim % shape.heads:
            raise ValueError(f"dim must be a multiple of heads={shape.heads}, got {shape.dim}")
        head_dim = shape.dim // shape.heads
        return RetroConfig(
            vocab_size,
            dim=shape.dim,
            heads=shape.heads,
            head_dim=head_dim,
            layers=shape.layers,
            feed_forward_dim=shape.widening * shape.dim,
            cross_layers=shape.cross_layers if self.neighbours else (),
            encoder_dim=shape.dim,
            encoder_heads=shape.heads,
            encoder_head_dim=head_dim,
            encoder_layers=shape.encoder_layers,
            encoder_feed_forward_dim=shape.widening * shape.dim,
            encoder_cross_layers=(1,),
            chunk_length=chunk_length,
            max_length=max(2048, self.chunks * chunk_length),
            dropout=shape.dropout,
            shared_embedding=True,
        )


def default_training() -> TrainConfig:
    """The training settings that go with the recipe's defaults."""
    return TrainConfig(minutes=30, learning_rate=3e-3, optimizer="muon", warmup_steps=100)


def config_from_json(fields: Mapping[str, Any]) -> RetroTextConfig:
    """The settings that a run's description holds."""
    paths = {name: None if fields[name] is None else Path(fields[name]) for name in ("data", "db", "retro_fit")}
    shape = {**fields["model"], "cross_layers": tuple(fields["model"]["cross_layers"])}
    return RetroTextConfig(**{**fields, **paths, "model": RetroShape(**shape)})


def open_database(config: RetroTextConfig) -> Database:
    """The database that the settings name: opened, or made of the text; one that was interrupted is gone on with.

    Raises:
        FileNotFoundError: the folder of text.
        ValueError: what `retrieval.build` refuses; a database of other settings.
        ImportError: without the packages of the extra `retro`.
    """
    place = _database_folder(config)
    is_made = (place / STATE_FILE).is_file()
    embedder = _embedder_of(config)
    if is_made and (config.data is None or config.db is None):
        database = with_embedder(Database.open(place, verify=False, embedder=embedder))
        for name in ("same", "vocab_size", "pattern"):
            asked, own = getattr(config, name), database.state["settings"][name]
            if asked is not None and asked != own:
                raise ValueError(
                    f"the database in {place} was made with {name}={own!r}, asked for was {asked!r}; leave it out, or make another "
                    "database"
                )
        return database
    settings = Settings(
        vocab_size=config.vocab_size or (None if is_made else 4096),
        pattern=config.pattern or ("*.py" if config.data is None else None),
        same=config.same,
    )
    # Of the processes of one run the first that comes builds; the others wait, and find it built.
    is_shared = int(os.environ.get("WORLD_SIZE") or 1) > 1
    return with_embedder(build(place, _text_of(config), settings=settings, embedder=embedder, wait=is_shared).database)


def with_embedder(database: Database) -> Database:
    """A database that can embed what a model writes: one made with a BERT gets it from where it was, if it is there.

    Raises:
        ValueError: it is not there, or another stands there now.
    """
    if database.has_embedder:
        return database
    source = database.state["embedder"].get("source")
    if source is not None and Path(source).exists():
        from crossattention.recipes.chunk_embedder import BertEmbedder

        database.use_embedder(BertEmbedder(source))
        return database
    where = f"; it was read from {source}, which is not there" if source is not None else ""
    raise ValueError(
        f"the database in {database.path} was made with an embedder that it does not hold, and a model that reads it needs it"
        f"{where}: "
        "give it (--embedder PATH)"
    )


def _database_folder(config: RetroTextConfig) -> Path:
    """Where it lies: where it is said, or in the cache, a folder for each text as it is now and each way to read it."""
    if config.db is not None:
        return config.db
    source = Path(sysconfig.get_paths()["stdlib"]) if config.data is None else config.data
    key = [str(source.resolve()), config.pattern, config.same, config.embedder, config.vocab_size, _state_of_text(config)]
    return user_cache("retro") / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _text_of(config: RetroTextConfig) -> list[Path]:
    """The folders and files to read."""
    if config.data is not None:
        return [config.data]
    entries = sorted(Path(sysconfig.get_paths()["stdlib"]).iterdir())
    pattern = config.pattern or "*.py"
    return [path for path in entries if (path.is_dir() and path.name not in NO_SOURCE) or fnmatchcase(path.name, pattern)]


def _state_of_text(config: RetroTextConfig) -> str:
    """A hash of the names, sizes and times of the files to read: what was edited, added or removed is another text."""
    pattern, found = config.pattern or ("*.py" if config.data is None else "*"), hashlib.sha256()
    for root in _text_of(config):
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if fnmatchcase(path.name, pattern) and path.is_file():
                facts = path.stat()
                found.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def _embedder_of(config: RetroTextConfig) -> Any:
    if config.embedder is None:
        return None
    from crossattention.recipes.chunk_embedder import BertEmbedder

    return BertEmbedder(config.embedder)


# ------------------------------------------------------------------------------------------------------------ task


class RetroTask:
    """The training task: a `Task` of the training loop.

    Args:
        config: the recipe's settings; the defaults where there are none.
        seed: of the windows' order.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `open_database`, `data.chunk_windows.parts_of`.

    Cost: makes the database where there is none: some minutes for 30 MB of text on two cores (docs/retrieval.md).
    """

    metric = "bits_per_byte"

    def __init__(self, config: RetroTextConfig | None = None, *, seed: int = 0) -> None:
        self.config = config or RetroTextConfig()
        self.database = open_database(self.config)
        self.parts = parts_of(self.database)
        self.neighbourhood = Neighbourhood(self.database, self.parts["train"]) if self.config.neighbours else None
        self.windows = ChunkWindows(
            self.database,
            self.parts["train"],
            chunks=self.config.chunks,
            batch_size=self.config.batch_size,
            neighbourhood=self.neighbourhood,
            k=self.config.neighbours,
            unread=self.config.unread,
            seed=seed,
        )
        # A chunk less, so that the first token of each scored chunk but a document's first follows something.
        stride = max(1, self.config.chunks - 1)
        self.valid = spread(windows_of(self.database, self.parts["valid"], chunks=self.config.chunks, stride=stride))

    @property
    def notes(self) -> tuple[str, ...]:
        """What is read, on which side, and how much of it finds neighbours."""
        database = self.database
        sides = ", ".join(f"{len(documents):,} for {part}" for part, documents in self.parts.items())
        found = [
            f"{database.num_documents:,} documents, {int(np.asarray(database.num_bytes).sum()):,} bytes in {database.num_chunks:,} "
            f"chunks of {database.chunk_length} tokens: {database.path} ({sides})"
        ]
        if self.neighbourhood is not None:
            sample = np.linspace(0, database.num_chunks - 1, min(2000, database.num_chunks)).astype(np.int64)
            share = float((self.neighbourhood.overlap(sample) > 0.5).mean())
            found.append(f"{100 * share:.1f} % of the chunks stand in a training document's by more than half, word for word")
        return tuple(found)

    @property
    def sample_input(self) -> str:
        """The beginning of a validation document."""
        return _texts(self.database, self.parts["valid"], count=1)[0][0]

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every window once."""
        return self.windows.steps_per_epoch

    def build_model(self) -> Retro:
        """A new model, or the one that retrieval is added to."""
        config = self.config.retro(self.database.vocab_size, self.database.chunk_length)
        if self.config.retro_fit is None:
            return Retro(config)
        return fitted_model(self.config.retro_fit, config, self.database)

    def batch_at(self, step: int) -> ChunkBatch:
        """The batch of a step, a pure function of (seed, step)."""
        return self.windows.batch_at(step)

    def loss(self, model: nn.Module, batch: ChunkBatch) -> Tensor:
        """The cross-entropy of the real tokens but each window's first; mean, in nats."""
        neighbours = (batch.neighbours, batch.neighbour_mask) if batch.neighbours.shape[2] else ()
        labels = batch.ids[:, 1:].masked_fill(~batch.real[:, 1:], _NO_LABEL)
        nats: Tensor = model(batch.ids[:, :-1], *neighbours, labels=labels)
        return nats / max(1, self.loss_weight(batch))  # a process's share of a batch may have none

    def loss_weight(self, batch: ChunkBatch) -> float:
        """The number of tokens that are predicted."""
        return int(batch.real[:, 1:].sum())

    def evaluate(self, model: nn.Module, together: Together = ALONE) -> Evaluation:
        """Bits per byte of validation windows, always the same ones, and a text to look at."""
        windows = self.valid[: self.config.evaluation_windows]
        scored = score(model, self.database, windows, self.config, self.neighbourhood, together=together)
        metrics = {name: value for name, value in scored.items() if name.startswith("bits_per_byte") and "share" not in name}
        if not together.is_first:
            return Evaluation(metrics)
        prompt, reference = _texts(self.database, self.parts["valid"], count=1)[0]
        written = self._writer(model).continue_texts([prompt], new_tokens=24)[0][0].text
        return Evaluation(metrics, {"source": prompt[-200:], "predicted": written, "reference": reference})

    def examples(self, run: RetroRun, count: int) -> Examples:
        """Test texts, and how a run continues them."""
        texts = _texts(self.database, self.parts["test"], count=count)
        answers = [found[0].text for found in run.writer.continue_texts([prompt for prompt, _ in texts], new_tokens=24)]
        rows = [
            (_first_line(answer) == _first_line(reference), (prompt[-60:], answer, reference))
            for (prompt, reference), answer in zip(texts, answers, strict=True)
        ]
        labels, widest = ("text before", "model", "data"), {1: 60, 2: 60, 3: 60}
        to_ask = self.sample_input.strip().split("\n", 1)[0][:60]  # a whole prompt would fill the screen
        return Examples(labels, tuple(rows), (to_ask,), answers=(1,), widest={at: widest[at + 1] for at in range(3)})

    def describe(self) -> dict[str, Any]:
        """What a run's folder holds beside the weights, for JSON."""
        config = asdict(self.config)
        for name in ("data", "db", "retro_fit"):
            config[name] = None if config[name] is None else str(config[name])
        config["model"]["cross_layers"] = list(config["model"]["cross_layers"])
        return {"recipe": RECIPE, "config": config, "database": facts_of(self.database)}

    def _writer(self, model: Any) -> Writer:
        return Writer(model, self.database, self.parts["train"], max(1, self.config.neighbours))


CONFIG = RetroTextConfig
TASK = RetroTask


def facts_of(database: Database) -> dict[str, Any]:
    """What says of a database that it is the same."""
    content = json.dumps(database.state["arrays"], sort_keys=True).encode()
    return {
        "path": str(database.path),
        "chunks": database.num_chunks,
        "documents": database.num_documents,
        "tokenizer_sha256": database.tokenizer_sha256,
        "embedder_sha256": database.embedder_sha256,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def fitted_model(source: Path, config: RetroConfig, database: Database) -> Retro:
    """The plain language model of a run, with the encoder and the cross-attention of a config.

    Raises:
        ValueError: the run's is no plain language model, or reads another tokenizer.
    """
    place = find_source(source)
    description = place / "task.json"
    known = json.loads(description.read_text(encoding="utf-8")) if description.is_file() else {}
    its_tokenizer = known.get("database", {}).get("tokenizer_sha256")
    if its_tokenizer is not None:
        database.require(tokenizer_sha256=its_tokenizer)
    model = load(place, dtype=torch.float32)
    if not isinstance(model, Retro) or model.config.cross_layers:
        found = "one that reads neighbours already" if isinstance(model, Retro) else f"a {type(model).__name__}"
        raise ValueError(
            f"expected a plain language model in {source} to add retrieval to, found {found}; `crossattention train retro "
            "--neighbours 0` trains one"
        )
    if model.config.vocab_size != database.vocab_size:
        raise ValueError(
            f"the model in {source} has {model.config.vocab_size:,} tokens, the database {database.vocab_size:,}; take the "
            "database that it was trained on"
        )
    names = (
        "encoder_dim",
        "encoder_heads",
        "encoder_head_dim",
        "encoder_layers",
        "encoder_feed_forward_dim",
        "encoder_cross_layers",
    )
    changes = {name: getattr(config, name) for name in names}
    is_one_width = model.config.dim == config.encoder_dim
    return retro_fit(
        model,
        cross_layers=config.cross_layers,
        **changes,
        chunk_length=config.chunk_length,
        shared_embedding=is_one_width,
        dropout=config.dropout,
    ).train()


# ----------------------------------------------------------------------------------------------------------- scores


def spread(windows: Iterable[Window]) -> list[Window]:
    """Windows in an order in which the first so many are taken evenly of all, always the same."""
    held = list(windows)
    return [held[place] for place in np.random.default_rng(0).permutation(len(held))]


def score(
    model: nn.Module,
    database: Database,
    windows: Sequence[Window],
    config: RetroTextConfig,
    neighbourhood: Neighbourhood | None,
    *,
    on_progress: OnProgress | None = None,
    together: Together = ALONE,
) -> dict[str, float]:
    """Bits per byte of the chunks that windows score: with retrieval on, off, and with random neighbours; by their overlap too.

    All tokens count, the first of a document as one that may be any; the bytes are those of the text.
    """
    modes = MODES if neighbourhood is not None else ("off",)

    def bits_of(begin: int) -> tuple[np.ndarray, list[np.ndarray]]:
        some = windows[begin : begin + _TOGETHER]
        numbers = window_numbers(some, config.chunks)
        from_chunk = np.array([window.scored_from for window in some])[:, None]
        is_scored = (np.arange(config.chunks) >= from_chunk) & (numbers >= 0)
        starts = np.array([window.is_start for window in some])
        found = []
        for mode in modes:
            ids = None
            if neighbourhood is not None and mode != "off":
                ids = neighbourhood.nearest(numbers[:, :-1], config.neighbours)
                if mode == "random":
                    drawn = neighbourhood.random(ids.shape, np.random.default_rng((1, begin)))
                    ids = np.where(ids >= 0, drawn, -1)
            found.append(_bits(model, batch_of(database, numbers, ids), starts)[is_scored])
        if on_progress is not None:
            on_progress(min(len(windows), begin + _TOGETHER), len(windows))
        return numbers[is_scored], found

    scored = together.map(bits_of, range(0, len(windows), _TOGETHER))
    bits = {mode: [found[place] for _, found in scored] for place, mode in enumerate(modes)}
    return _scores(bits, np.concatenate([chunks for chunks, _ in scored]), database, neighbourhood)


@torch.no_grad()
def _bits(model: nn.Module, batch: ChunkBatch, starts: np.ndarray) -> np.ndarray:
    """(z, w) bits of the chunks of windows."""
    batch = batch.to(next(model.parameters()).device)
    neighbours = (batch.neighbours, batch.neighbour_mask) if batch.neighbours.shape[2] else ()
    logits = model(batch.ids[:, :-1], *neighbours).float()
    nats = F.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")
    first = torch.from_numpy(starts * math.log(logits.shape[-1])).to(nats)
    nats = torch.cat((first[:, None], nats), 1).masked_fill(~batch.real, 0.0)
    found: np.ndarray = nats.double().unflatten(1, (batch.neighbours.shape[1] + 1, -1)).sum(-1).cpu().numpy() / math.log(2)
    return found


def _scores(
    bits: Mapping[str, Sequence[np.ndarray]], chunks: np.ndarray, database: Database, neighbourhood: Neighbourhood | None
) -> dict[str, float]:
    """Sums over chunks, all and by overlap."""
    num_bytes = np.asarray(database.num_bytes[chunks]).astype(np.float64)
    joined = {mode: np.concatenate(found) for mode, found in bits.items()}
    is_plain = neighbourhood is None
    overlap = np.zeros(len(chunks)) if neighbourhood is None else neighbourhood.overlap(chunks)
    kinds = {"bits_per_byte": np.ones(len(chunks), bool)}
    if not is_plain:
        kinds |= {name: (overlap > above) & (overlap <= most) for name, (above, most) in OVERLAPS.items()}
    scores: dict[str, float] = {}
    for mode, found in joined.items():
        suffix = "" if mode == "on" or is_plain else f"_{mode}"
        for name, which in kinds.items():
            if which.any():
                scores[f"{name}{suffix}"] = float(found[which].sum() / num_bytes[which].sum())
    if not is_plain:
        scores |= {f"{name}_share": float(num_bytes[which].sum() / num_bytes.sum()) for name, which in kinds.items()}
    return scores


# -------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class RetroRun(Run):
    """A trained model that continues texts.

    Args:
        path: the folder that holds the weights.
        recipe: "retro".
        description: what the recipe wrote of itself beside the weights.
        step: the training step of the weights, where the folder says it.
        retro: the model.
    """

    retro: Retro

    subsets: ClassVar[Mapping[str, str]] = SUBSETS

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.retro

    @cached_property
    def config(self) -> RetroTextConfig:
        """The recipe's settings."""
        return config_from_json(self.description["config"])

    @cached_property
    def database(self) -> Database:
        """The database that it was trained with.

        Raises:
            FileNotFoundError: it is gone.
            ValueError: it was made with another tokenizer or embedder.
        """
        facts = self.description["database"]
        database = Database.open(
            facts["path"], verify=False, embedder=_embedder_of(self.config), tokenizer_sha256=facts["tokenizer_sha256"]
        )
        database.require(embedder_sha256=facts["embedder_sha256"])
        return with_embedder(database)

    @cached_property
    def writer(self) -> Writer:
        """The model, as texts see it."""
        return Writer(self.retro, self.database, parts_of(self.database)["train"], max(1, self.config.neighbours))

    def predict(self, inputs: Iterable[str], *, num_hypotheses: int = 1, batch_size: int = 32) -> Iterator[list[Continuation]]:
        """Continue texts, each chunk reading its neighbours in the training documents; see `Writer.continue_texts`."""
        return self.writer.predict(inputs, num_hypotheses=num_hypotheses, batch_size=batch_size)

    def evaluate(self, *, on_progress: OnProgress | None = None) -> dict[str, float]:
        """Bits per byte of test documents, which training never saw.

        Returns:
            bits_per_byte with retrieval, and with `_off` and `_random` without and with random neighbours; the same of the chunks
            whose longest run in common with training text, over their length, is up to 1/8 (`overlap_to_1_8`), above that and up to
            1/2 (`overlap_to_1_2`), and above (`overlap_above`); with `_share` the share of the bytes that these have. Of a plain
            language model bits_per_byte alone.

        Raises:
            FileNotFoundError: the database is gone.
            ValueError: it is not what the run was trained on.
        """
        database = self.database
        if facts_of(database)["sha256"] != self.description["database"]["sha256"]:
            raise ValueError(
                f"the database in {database.path} is not as it was when the run was trained: it has {database.num_chunks:,} "
                f"chunks, then it had {self.description['database']['chunks']:,}; scores would not be of the same text: put it "
                "back, or train again"
            )
        parts = parts_of(database)
        neighbourhood = Neighbourhood(database, parts["train"]) if self.config.neighbours else None
        stride = max(1, self.config.chunks // 2)
        windows = spread(windows_of(database, parts["test"], chunks=self.config.chunks, stride=stride))
        windows = windows[: self.config.test_windows]
        return score(self.retro, database, windows, self.config, neighbourhood, on_progress=on_progress)

    def view(self, given: str, answer: str | None = None) -> AttentionView:
        """Which neighbour, and which of its tokens, each token reads; of its own continuation, or of another."""
        return self.writer.view(given, answer)


def open_run(path: Path, description: Mapping[str, Any], model: Any, step: int | None) -> RetroRun:
    """The run out of its parts.

    Raises:
        ValueError: the model is none of this recipe, or of another number of tokens or neighbours than the settings say.
    """
    config = config_from_json(description["config"])
    if not isinstance(model, Retro) or bool(model.config.cross_layers) != bool(config.neighbours):
        raise ValueError(
            f"the parts of {path} do not belong together: task.json and config.json describe different models; take both from one "
            "run"
        )
    return RetroRun(path, description["recipe"], description, step, model)


def _texts(database: Database, documents: np.ndarray, *, count: int) -> list[tuple[str, str]]:
    """The first chunks of some documents, and what follows; always the same ones."""
    found = []
    long_ones = [document for document in documents.tolist() if len(database.document_chunks(document)) > _PROMPT_CHUNKS]
    for document in long_ones[:: max(1, len(long_ones) // count)][:count] or documents[:1].tolist():
        first = database.document_chunks(document).start
        held = len(database.document_chunks(document))
        prompt = "".join(database.text(first + place) for place in range(min(_PROMPT_CHUNKS, max(1, held - 1))))
        rest = database.text(first + _PROMPT_CHUNKS) if held > _PROMPT_CHUNKS else ""
        found.append((prompt, rest[:80]))
    return found


def _first_line(text: str) -> str:
    return text.lstrip("\n").partition("\n")[0].rstrip()


__all__ = ["CONFIG", "TASK", "RetroRun", "RetroShape", "RetroTask", "RetroTextConfig"]
