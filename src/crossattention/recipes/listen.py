"""The recipe that listens: a spoken word or phrase, spelled out.

What lives here: words and voices of the default data, their parts, the user's folder, evaluation. What does not: speaking
(`data.speech`), reading sounds (`data.sounds`), the model (`models.listener`), its predictions (`sound_translator`).

Default data: words of the package's dictionary, spoken by eSpeak NG in several voices. Test words are those that the hash of
`cmudict.part_of` puts aside; they are spoken in the voices of training, and in one that training never heard.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from crossattention.checkpoints.files import sha256_of
from crossattention.data.mel import log_mel
from crossattention.data.sound_batches import SoundBatch, SoundBatches
from crossattention.data.sounds import read_folder, read_sound, write_wav
from crossattention.data.speech import FrameSet, Spoken, cache_folder, speak, speech_digest, spoken_frames
from crossattention.data.vocabulary import BEGIN, END, PAD, UnknownSymbol, build_tokenizer, tokenizer_from_json
from crossattention.models.listener import Listener, ListenerConfig
from crossattention.models.transformer import label_smoothed_cross_entropy
from crossattention.recipes.cmudict import Part, part_of, read_dictionary
from crossattention.recipes.feed_forward_view import feed_forward_view
from crossattention.recipes.pair_task import ModelShape
from crossattention.recipes.recipe import Examples, OnProgress, Run
from crossattention.recipes.scores import edit_distance
from crossattention.recipes.sound_translator import Sound, SoundReader, SoundTranslator
from crossattention.recipes.translator import Alignment, Prediction
from crossattention.training.config import TrainConfig
from crossattention.training.tasks import Evaluation
from crossattention.training.together import ALONE, Together
from crossattention.views.content import AttentionView, FeedForwardView

RECIPE = "listen"

SUBSETS: Mapping[str, str] = MappingProxyType(
    {
        "": "words never trained on",
        "_new_voice": "the same in a voice never trained on",
        "_known_words": "words of training, that voice",
    }
)
"""Which sounds a score is of, by how its name ends."""

HELD_OUT_SHARE = 0.05
"""The share of a folder's texts that validation and test each take."""

_WORD = re.compile(r"[a-z']{2,16}")
_DIAGONAL_SOUNDS = 100


@dataclass(frozen=True)
class ListenConfig:
    """The settings of the recipe.

    Args:
        data: folder of sound files with a table of what is said in each; without it, eSpeak NG speaks words of the dictionary.
        transcripts: the table, a two-column file (file name, text); without it transcripts.tsv, .csv or .jsonl in the folder.
        test: a folder of sounds to test on; without it 5 % of the texts of `data`.
        skip_bad: leave out bad lines of the table, and sounds that are not there.
        words: spoken words to train on, of 113,000.
        test_words: spoken words of each of the three scores at the end.
        voices: voices that speak them, a word by one of them.
        new_voice: the voice that is heard in the test alone.
        sample_rate: samples a second; sounds of another rate are resampled.
        bands: of a frame, one every 10 ms.
        reduction: frames of one position of the encoder: 1, 2 or 4.
        evaluation_sounds: validation sounds scored at each evaluation.
        tokens_per_batch: frames and letters a step, padding included.
        label_smoothing: mass that the labels give to all other letters.
        model: size of the Transformer.
    """

    data: Path | None = None
    transcripts: Path | None = None
    test: Path | None = None
    skip_bad: bool = False
    words: int = 30_000
    test_words: int = 1000
    voices: tuple[str, ...] = ("en-us", "en-us+f2", "en-us+m3", "en-us+f4", "en-us+m7", "en-us+f5")
    new_voice: str = "en-us+f3"
    sample_rate: int = 16_000
    bands: int = 40
    reduction: int = 4
    evaluation_sounds: int = 300
    tokens_per_batch: int = 2048
    label_smoothing: float = 0.1
    model: ModelShape = field(default_factory=lambda: ModelShape(dropout=0.0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "voices", tuple(self.voices))
        for name in ("words", "test_words", "evaluation_sounds", "sample_rate", "bands"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not self.voices or self.new_voice in self.voices:
            raise ValueError(f"expected voices, and another one as new_voice, got {self.voices} and {self.new_voice!r}")
        if self.reduction not in (1, 2, 4):
            raise ValueError(f"expected a reduction of 1, 2 or 4, got {self.reduction}")
        if self.data is None and (self.transcripts is not None or self.test is not None):
            raise ValueError("transcripts and test are of a folder of sounds; name it with data (--data FOLDER)")


@dataclass(frozen=True, eq=False)
class SoundPart:
    """Sounds with what is said in them.

    Args:
        texts: one a sound.
        sounds: their frames.
        names: where each came from: a file, or "VOICE: WORD".
    """

    texts: tuple[str, ...]
    sounds: FrameSet
    names: tuple[str, ...]


def default_training() -> TrainConfig:
    """The training settings that go with the recipe's defaults."""
    return TrainConfig(minutes=20, optimizer="muon", learning_rate=6e-3)


class ListenTask:
    """The training task: a `RecipeTask`.

    Args:
        config: the recipe's settings.
        seed: of the batch order.

    Raises:
        FileNotFoundError: a folder, table or sound is missing.
        ValueError: as `read_folder`, `read_sound` and `spoken_frames`; a part is empty; a sound longer than a batch.
        ModuleNotFoundError: without a folder, without `pip install 'crossattention[speech]'`.

    Cost: one pass over all sounds; spoken words are kept in a cache.
    """

    metric = "cer"

    def __init__(self, config: ListenConfig | None = None, *, seed: int = 0) -> None:
        self.config = config or ListenConfig()
        self._source = _source_of(self.config)
        train = self._source.part("train")
        self.target = build_tokenizer("characters", train.texts)
        ids = [self.target.encode(text) for text in train.texts]
        self.batches = SoundBatches(train.sounds, ids, self.config.tokens_per_batch, seed)
        longest = max(map(len, ids))
        self.max_length = longest + longest // 2 + 1
        self.held_out = self._source.part("valid")
        self.sample = next((at for at, text in enumerate(self.held_out.texts) if _can_write(self.target, text)), None)
        if self.sample is None:
            raise ValueError("no validation text is in letters that the training part has; give more sounds")

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out of a folder, if anything."""
        return self._source.notes

    @property
    def sample_input(self) -> str:
        """The file of a validation sound, which is drawn at each evaluation."""
        return str(self._source.sample_file(self.sample or 0))

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every training sound once."""
        return self.batches.steps_per_epoch

    def build_model(self) -> Listener:
        """A new model with random weights."""
        shape = asdict(self.config.model)
        config = ListenerConfig(
            bands=self.config.bands,
            vocab_size=self.target.size,
            reduction=self.config.reduction,
            pad_id=PAD,
            begin_id=BEGIN,
            end_id=END,
            **shape,
        )
        return Listener(config)

    def batch_at(self, step: int) -> SoundBatch:
        """The batch of a step, a pure function of (seed, step)."""
        return self.batches.batch_at(step)

    def loss(self, model: nn.Module, batch: SoundBatch) -> Tensor:
        """The label-smoothed cross-entropy, mean over the letters, in nats."""
        logits = model(batch.frames, batch.target_ids, batch.source_mask if batch.is_source_padded else None)
        return label_smoothed_cross_entropy(logits, batch.labels, pad_id=PAD, smoothing=self.config.label_smoothing)

    def loss_weight(self, batch: SoundBatch) -> float:
        """The number of letters, END counted."""
        return int((batch.labels != PAD).sum())

    def evaluate(self, model: nn.Module, together: Together = ALONE) -> Evaluation:
        """Error rates of greedy predictions of validation sounds, and one sound to look at."""
        translator = self.translator(model)
        scores = score_sounds(translator, self.held_out, together=together)
        metrics = {name: scores[name] for name in ("cer", "wer")}
        if not together.is_first:
            return Evaluation(metrics)
        at = self.sample or 0
        frames, text = self.held_out.sounds.each()[at], self.held_out.texts[at]
        predicted = translator.predict_all([frames])[0].text  # type: ignore[list-item]
        alignment = asdict(translator.align(frames, predicted))  # type: ignore[arg-type]
        shown = {"source": self.held_out.names[at], "predicted": predicted, "reference": text, **alignment}
        return Evaluation(metrics, shown)

    def describe(self) -> dict[str, Any]:
        """What a run's folder holds beside the weights, for JSON."""
        return {
            "recipe": RECIPE,
            "config": _config_to_json(self.config),
            "data": self._source.digests,
            "target_tokenizer": self.target.to_json(),
            "max_length": self.max_length,
        }

    def examples(self, run: Any, count: int) -> Examples:
        """Test sounds with a run's answers."""
        part = self._source.part("test")
        texts = part.texts[:count]
        found = run.translator.predict_all(part.sounds.each()[:count])
        rows = [
            (answer.text == text, (name, answer.text, text)) for name, text, answer in zip(part.names, texts, found, strict=False)
        ]
        return Examples(("sound", "model", "said"), tuple(rows), (self.sample_input,), answers=(1,), widest={1: 40})

    def translator(self, model: nn.Module) -> SoundTranslator:
        """The model with its reader and its letters."""
        reader: Any = SoundReader(self.config.sample_rate, self.config.bands, self.config.reduction)
        return SoundTranslator(model, reader, self.target, self.max_length)


@dataclass(frozen=True)
class ListenRun(Run):
    """A trained model that spells what it hears.

    Args:
        path: the folder that holds the weights.
        recipe: "listen".
        description: what the recipe wrote of itself beside the weights.
        step: the training step of the weights, where the folder says it.
        translator: the model with its reader of sounds and its letters.
    """

    translator: SoundTranslator

    input_names: ClassVar[tuple[str, ...]] = ("SOUND",)
    has_beams: ClassVar[bool] = True
    shows_feed_forward: ClassVar[bool] = True
    subsets: ClassVar[Mapping[str, str]] = SUBSETS

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.translator.model

    def predict(
        self, inputs: Iterable[Any], *, beams: int = 4, num_hypotheses: int = 1, batch_size: int = 32
    ) -> Iterator[list[Prediction]]:
        """Spell sound files as they come; see `Translator.predict`."""
        return self.translator.predict(inputs, beams=beams, num_hypotheses=num_hypotheses, batch_size=batch_size)

    def evaluate(self, *, beams: int = 1, on_progress: OnProgress | None = None) -> dict[str, float]:
        """Score the run on sounds that training never heard.

        Returns:
            cer, wer, exact, diagonal (see `SoundTranslator.diagonality`; mean over 100 sounds and what is said) and sounds, how
            many; for spoken words the same with `_new_voice` (those words in the held-out voice) and `_known_words` (words of
            training in that voice).

        Raises:
            FileNotFoundError, ModuleNotFoundError: the data cannot be had.
            ValueError: it is not what the run was trained on.
        """
        config = config_from_json(self.description["config"])
        source = _source_of(config)
        source.check(self.description["data"])
        scores: dict[str, float] = {}
        parts = source.test_parts()
        total = sum(len(part.texts) for part in parts.values())
        done = 0
        for suffix, part in parts.items():
            begin = done

            def tell(now: int, of: int, begin: int = begin) -> None:
                if on_progress is not None:
                    on_progress(begin + now, total)

            found = score_sounds(self.translator, part, beams=beams, on_progress=tell, with_alignment=True)
            scores |= {f"{name}{suffix}": value for name, value in found.items()}
            done += len(part.texts)
        return scores

    def align(self, given: Sound, predicted: str) -> Alignment:
        """What each letter read of the sound; see `Translator.align`."""
        return self.translator.align(given, predicted)  # type: ignore[arg-type]

    def view(self, given: str, answer: str | None = None) -> AttentionView:
        """The letters over the sound's picture, in every layer and head, with the sound itself.

        Args:
            given: the file.
            answer: what is said in it; without it, the run's own best prediction.

        Raises:
            ValueError: no such sound, or the model writes nothing for it.
            UnknownSymbol: a letter of the answer was never seen in training.
        """
        if answer is None:
            [predictions] = self.predict([given])
            answer = predictions[0].text
        return self.translator.view(given, answer)

    def sample_input(self) -> str:
        """A validation sound.

        Raises:
            FileNotFoundError, ValueError, ModuleNotFoundError: the data cannot be had.
        """
        return str(_source_of(config_from_json(self.description["config"])).sample_file(0))

    def feed_forward_view(
        self, given: Any, answer: str | None = None, *, num_examples: int = 300, on_progress: OnProgress | None = None
    ) -> FeedForwardView:
        """Which keys of the decoder's feed-forward layers fire while a sound is spelled; Raises as in `view`.

        Args:
            given: the file.
            answer: what is said in it; without it, the run's own best prediction.
            num_examples: training sounds among which those are looked for on which a key fires most.
            on_progress: called with the number of these that were heard, and that of all.
        """
        if answer is None:
            [predictions] = self.predict([given])
            answer = predictions[0].text
        try:
            source = _source_of(config_from_json(self.description["config"]))
            source.check(self.description["data"])
            examples = source.training_files(num_examples)
            note = f"Sounds on which a key fires most are looked for among {len(examples)} training sounds with the data's texts."
        except (FileNotFoundError, ModuleNotFoundError, ValueError):
            examples = []
            note = "The run's data is not where it was, or has changed, so no sounds are shown on which a key fires."
        return feed_forward_view(self.translator, str(given), answer, examples, note=note, on_progress=on_progress)


def score_sounds(
    translator: SoundTranslator,
    part: SoundPart,
    *,
    beams: int = 1,
    on_progress: OnProgress | None = None,
    with_alignment: bool = False,
    together: Together = ALONE,
) -> dict[str, float]:
    """Score predictions of sounds.

    Returns:
        cer and wer (edits over the references' length, in characters and in words), exact (share of texts that are right), with
        `with_alignment` diagonal, and sounds, how many.
    """
    frames: Any = part.sounds.each()
    predictions = translator.predict_all(frames, beams=beams, on_progress=on_progress, together=together)
    found = [prediction.text for prediction in predictions]
    scores = {
        "cer": _error_rate([(list(text), list(said)) for text, said in zip(found, part.texts, strict=True)]),
        "wer": _error_rate([(text.split(), said.split()) for text, said in zip(found, part.texts, strict=True)]),
        "exact": sum(text == said for text, said in zip(found, part.texts, strict=True)) / len(found),
    }
    if with_alignment:
        some = [(sound, text) for sound, text in zip(frames, part.texts, strict=True) if _can_write(translator.target, text)]
        straight = [translator.diagonality(sound, text) for sound, text in some[:_DIAGONAL_SOUNDS]]
        known = [value for value in straight if value is not None]
        scores |= {"diagonal": sum(known) / len(known)} if known else {}
    return {**scores, "sounds": len(found)}


def config_from_json(fields: Mapping[str, Any]) -> ListenConfig:
    """The settings that a run's description holds."""
    paths = {name: None if fields[name] is None else Path(fields[name]) for name in ("data", "transcripts", "test")}
    return ListenConfig(**{**fields, **paths, "voices": tuple(fields["voices"]), "model": ModelShape(**fields["model"])})


# -------------------------------------------------------------------------------------------------- where sounds come from


class _SpokenWords:
    """Words of the dictionary, spoken by eSpeak NG."""

    notes: tuple[str, ...] = ()

    def __init__(self, config: ListenConfig) -> None:
        self.config = config
        words: dict[Part, list[str]] = {"train": [], "valid": [], "test": []}
        for word in read_dictionary():
            if _WORD.fullmatch(word):
                words[part_of(word)].append(word)
        self.words = {part: sorted(found, key=_digest) for part, found in words.items()}

    @property
    def digests(self) -> dict[str, str]:
        """What the test sounds follow from, and those of training."""
        return {name: self._digest_of(spoken) for name, spoken in {"train": self._spoken("train"), **self._tests()}.items()}

    def check(self, then: Mapping[str, str]) -> None:
        """Raise ValueError unless the test sounds are those that were held out."""
        for name, spoken in self._tests().items():
            if then.get(name) != (now := self._digest_of(spoken)):
                raise ValueError(
                    f"the spoken words of {name!r} are not those of the run: expected digest {then.get(name)}, got {now}; another "
                    "version of crossattention or of espeakng-loader trained it: score it with that"
                )

    def part(self, name: Part) -> SoundPart:
        """The sounds of a part, in the voices of training."""
        return self._sounds(self._spoken(name))

    def test_parts(self) -> dict[str, SoundPart]:
        """The sounds of each score, by the end of its name."""
        return {name.removeprefix("test"): self._sounds(spoken) for name, spoken in self._tests().items()}

    def sample_file(self, at: int) -> Path:
        """A file of a validation word, spoken anew where it is not there."""
        return self._files_of([self._spoken("valid")[at]])[0]

    def training_files(self, count: int) -> list[tuple[str, str]]:
        """Files of some training words with what is said in them, spoken anew where they are not there."""
        spoken = self._spoken("train")[:count]
        return [(str(path), word) for path, (_, word) in zip(self._files_of(spoken), spoken, strict=True)]

    def _files_of(self, spoken: Sequence[Spoken]) -> list[Path]:
        rate = self.config.sample_rate
        paths = [cache_folder() / f"{re.sub('[^a-z]', '-', word)}-{voice}-{rate}.wav" for voice, word in spoken]
        missing = {path: one for path, one in zip(paths, spoken, strict=True) if not path.is_file()}
        if missing:
            for path, samples in zip(missing, speak(list(missing.values()), sample_rate=rate), strict=True):
                write_wav(path, samples, rate)
        return paths

    def _spoken(self, part: Part) -> list[Spoken]:
        counts = {"train": self.config.words, "valid": self.config.evaluation_sounds, "test": self.config.test_words}
        voices = self.config.voices
        return [(voices[at % len(voices)], word) for at, word in enumerate(self.words[part][: counts[part]])]

    def _tests(self) -> dict[str, list[Spoken]]:
        known = self._spoken("train")[: self.config.test_words]
        unseen = self._spoken("test")
        voice = self.config.new_voice
        return {
            "test": unseen,
            "test_new_voice": [(voice, word) for _, word in unseen],
            "test_known_words": [(voice, word) for _, word in known],
        }

    def _digest_of(self, spoken: Sequence[Spoken]) -> str:
        return speech_digest(spoken, sample_rate=self.config.sample_rate, bands=self.config.bands)

    def _sounds(self, spoken: list[Spoken]) -> SoundPart:
        sounds = spoken_frames(spoken, sample_rate=self.config.sample_rate, bands=self.config.bands)
        return SoundPart(tuple(word for _, word in spoken), sounds, tuple(f"{voice}: {word}" for voice, word in spoken))


class _SoundFolder:
    """The user's sounds: parts by a hash of what is said, so that one text never stands on two sides."""

    def __init__(self, config: ListenConfig) -> None:
        assert config.data is not None
        self.config = config
        self.main = read_folder(config.data, table=config.transcripts, skip_bad=config.skip_bad)
        self.given = None if config.test is None else read_folder(config.test, skip_bad=config.skip_bad)
        found: dict[Part, list[tuple[Path, str]]] = {"train": [], "valid": [], "test": []}
        reserved = set() if self.given is None else set(self.given.texts)
        for file, text in zip(self.main.files, self.main.texts, strict=True):
            place = int.from_bytes(_digest(text), "big") / 2 ** (8 * len(_digest(text)))
            part: Part = "valid" if place < HELD_OUT_SHARE else "test" if place < 2 * HELD_OUT_SHARE else "train"
            if self.given is not None and part == "test":
                part = "train"
            if part != "train" or text not in reserved:
                found[part].append((file, text))
        if self.given is not None:
            found["test"] = list(zip(self.given.files, self.given.texts, strict=True))
        for name, pairs in found.items():
            if not pairs:
                raise ValueError(
                    f"the {name} part of {config.data} is empty: {len(self.main.files)} sounds are too few to divide by what is "
                    "said in them; give more texts"
                )
        self.pairs = found

    @property
    def notes(self) -> tuple[str, ...]:
        """How many lines were left out, if any."""
        read = [self.main, *([] if self.given is None else [self.given])]
        skipped, problems = sum(one.skipped for one in read), [problem for one in read for problem in one.problems]
        return (f"bad lines left out: {skipped:,}, such as {problems[0]}",) if skipped else ()

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of the tables, and one of all test sounds."""
        tables = {str(read.table): sha256_of(read.table) for read in (self.main, self.given) if read is not None}
        heard = hashlib.sha256("".join(sha256_of(file) for file, _ in self.pairs["test"]).encode()).hexdigest()
        return {**tables, "test sounds": heard}

    def check(self, then: Mapping[str, str]) -> None:
        """Raise ValueError unless tables and test sounds are those of the run."""
        for name, now in self.digests.items():
            if then.get(name) != now:
                raise ValueError(
                    f"{name} has changed since the run was trained: expected sha256 {then.get(name)}, got {now}; with other data, "
                    "sounds that were trained on may be scored as unseen"
                )

    def part(self, name: Part) -> SoundPart:
        """The sounds of a part."""
        pairs = self.pairs[name]
        if name == "valid":
            pairs = sorted(pairs, key=lambda pair: _digest(pair[1]))[: self.config.evaluation_sounds]
        rate, bands = self.config.sample_rate, self.config.bands
        sounds = FrameSet.of([log_mel(read_sound(file, rate), rate, bands) for file, _ in pairs])
        return SoundPart(tuple(text for _, text in pairs), sounds, tuple(str(file) for file, _ in pairs))

    def test_parts(self) -> dict[str, SoundPart]:
        """The sounds of the one score."""
        return {"": self.part("test")}

    def sample_file(self, at: int) -> Path:
        """The file of a validation sound."""
        return sorted(self.pairs["valid"], key=lambda pair: _digest(pair[1]))[at][0]

    def training_files(self, count: int) -> list[tuple[str, str]]:
        """Some training sounds with what is said in them."""
        return [(str(file), text) for file, text in self.pairs["train"][:count]]


def _source_of(config: ListenConfig) -> _SpokenWords | _SoundFolder:
    return _SpokenWords(config) if config.data is None else _SoundFolder(config)


def _config_to_json(config: ListenConfig) -> dict[str, Any]:
    paths = {name: getattr(config, name) for name in ("data", "transcripts", "test")}
    texts = {name: None if path is None else str(path) for name, path in paths.items()}
    return {**asdict(config), **texts, "voices": list(config.voices)}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()[::-1]


def _can_write(tokenizer: Any, text: str) -> bool:
    try:
        tokenizer.encode(text)
    except UnknownSymbol:
        return False
    return True


def _error_rate(pairs: Sequence[tuple[list[str], list[str]]]) -> float:
    """Edits over the references' length."""
    return sum(edit_distance(found, said) for found, said in pairs) / max(1, sum(len(said) for _, said in pairs))


CONFIG, TASK = ListenConfig, ListenTask


def open_run(path: Path, description: Mapping[str, Any], model: Any, step: int | None) -> ListenRun:
    """A run out of its parts."""
    config = config_from_json(description["config"])
    try:
        target = tokenizer_from_json(description["target_tokenizer"])
    except ValueError as error:
        raise ValueError(f"{path / 'task.json'} is damaged or of another version: {error!r}; train again") from error
    wanted, found = (
        (config.bands, config.reduction, target.size),
        tuple(getattr(model.config, name, None) for name in ("bands", "reduction", "vocab_size")),
    )
    if wanted != found:
        raise ValueError(
            f"the parts of {path} do not belong together: task.json has bands, reduction, letters {wanted}, config.json {found}; "
            "take both from one run"
        )
    reader: Any = SoundReader(config.sample_rate, config.bands, config.reduction)
    return ListenRun(path, RECIPE, description, step, SoundTranslator(model, reader, target, int(description["max_length"])))
