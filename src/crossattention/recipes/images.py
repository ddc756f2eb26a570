"""Pictures by class: CrossViT on any folder of class folders.

Without a folder, easy-vqa's 5,000 pictures of one coloured shape each, by colour and shape: 24 classes, its official parts. What
lives here: the parts, the defaults for five minutes on two cores, batches, evaluation, and what the class tokens read. What does
not: files (`data`), the model (`models.crossvit`).

Legend: z batch, c channels, S side of the squares in pixels, h heads, m positions of a branch: its class token and its patches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.data.easy_vqa import EasyVQA, Part, hold_out, load_easy_vqa, shape_and_color
from crossattention.data.picture_folders import PictureData, Pictures, digest_of, load_picture_folder, read_square
from crossattention.maps import attention_map
from crossattention.models.crossvit import CrossViT, CrossViTConfig
from crossattention.recipes.pictures import PictureMap, Prediction, png_of
from crossattention.recipes.recipe import Examples, OnProgress, Run
from crossattention.training.config import TrainConfig
from crossattention.training.tasks import Evaluation
from crossattention.training.together import ALONE, Together
from crossattention.views.content import AttentionLayer, AttentionView, ImageSide, TextSide

RECIPE = "images"

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""By which pixels from 0 to 1 are normalised: ImageNet's, which published weights expect."""

BRANCHES = ("small patches", "large patches")
_TOGETHER = 256  # pictures that are answered at once


@dataclass(frozen=True)
class VisionShape:
    """The size of the model.

    Args:
        patch_sizes: side of the patches of each branch.
        dims: width of each branch.
        heads: attention heads of each branch.
        layers: layers of each branch in each encoder.
        encoders: encoders, each with a fusion both ways at its end.
        feed_forward_ratio: width inside the feed-forward layers over that of the branch.
        stochastic_depth: probability of leaving out the last layer's sublayers in training; rises linearly from zero.
        scales: factor from the picture's size to what each branch sees; published models have 1 and 224/240.
        stem: "linear", or "convolutions" as the published models with a dagger have.
    """

    patch_sizes: tuple[int, int] = (8, 16)
    dims: tuple[int, int] = (48, 96)
    heads: tuple[int, int] = (3, 3)
    layers: tuple[int, int] = (1, 2)
    encoders: int = 2
    feed_forward_ratio: float = 3.0
    stochastic_depth: float = 0.0
    scales: tuple[float, float] = (1.0, 1.0)
    stem: Literal["linear", "convolutions"] = "linear"


@dataclass(frozen=True)
class ImagesConfig:
    """The settings of the recipe; the defaults are for five minutes on two cores.

    Args:
        data: a folder whose folders are classes, with PNG or JPEG files; or a folder of easy-vqa. Without it an installed package
            easy_vqa, else what was fetched before, else it is fetched by pip.
        image_size: side of the squares that pictures become: scaled by their shorter side, then the middle.
        held_out: share of the pictures for validation; of class folders, by a hash of the file's name.
        test_share: share for the final score, likewise; easy-vqa has a test part of its own.
        skip_broken: leave out files that cannot be read, and say which, where otherwise they end the command.
        flip: show pictures mirrored, left for right, half of the time.
        shift: pixels by which pictures are moved at most, each way, in training.
        batch_size: pictures a step.
        model: size of the model.
    """

    data: Path | None = None
    image_size: int = 64
    held_out: float = 0.1
    test_share: float = 0.1
    skip_broken: bool = False
    flip: bool = False
    shift: int = 4
    batch_size: int = 64
    model: VisionShape = field(default_factory=VisionShape)

    def __post_init__(self) -> None:
        for name, least in (("image_size", 1), ("batch_size", 1), ("shift", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}")
        if self.shift >= self.image_size:
            raise ValueError(f"expected a shift of less than the {self.image_size} pixels of a picture, got {self.shift}")
        for name in ("held_out", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"expected {name} between 0 and 1, got {getattr(self, name)}")


def default_training() -> TrainConfig:
    """The training settings that go with the recipe's defaults (dev/LOG.md)."""
    return TrainConfig(minutes=5, optimizer="muon", learning_rate=2e-2, warmup_steps=100)


def load_data(config: ImagesConfig) -> PictureData:
    """Read the pictures that the settings name: class folders, or easy-vqa.

    Raises:
        FileNotFoundError, ConnectionError, ValueError, ModuleNotFoundError: as `load_picture_folder` and `load_easy_vqa`.
    """
    if config.data is None or any((config.data / inner / "answers.txt").is_file() for inner in ("", "data", "easy_vqa/data")):
        return _of_easy_vqa(load_easy_vqa(config.data, say=_say), config)
    return load_picture_folder(
        config.data, config.image_size, valid_share=config.held_out, test_share=config.test_share, skip_broken=config.skip_broken
    )


def _of_easy_vqa(data: EasyVQA, config: ImagesConfig) -> PictureData:
    train, valid = hold_out(data.train, config.held_out)
    named = {
        name: [_class_of(*seen) for seen in shape_and_color(part)]
        for name, part in (("train", train), ("valid", valid), ("test", data.test))
    }
    classes = tuple(sorted({name for names in named.values() for name in names if name is not None}))
    parts, untold = {}, 0
    for part_name, part, folder in (("train", train, "train"), ("valid", valid, "train"), ("test", data.test, "test")):
        told = [index for index, name in enumerate(named[part_name]) if name is not None]
        untold += len(part.images) - len(told)
        parts[part_name] = _pictures(
            part, told, [classes.index(named[part_name][index]) for index in told], data.folder / folder, config
        )
    notes = (f"{untold} pictures whose questions do not tell shape and colour are left out",) if untold else ()
    return PictureData(data.folder, classes, **parts, sha256=digest_of(classes, *parts.values()), notes=notes)


def _pictures(part: Part, chosen: Sequence[int], labels: Sequence[int], folder: Path, config: ImagesConfig) -> Pictures:
    if part.images.shape[1:3] != (config.image_size, config.image_size):
        height, width = part.images.shape[1:3]
        raise ValueError(f"easy-vqa's pictures are {width} x {height} pixels, got image_size={config.image_size}; leave it out")
    paths = tuple(folder / "images" / f"{part.image_numbers[index]}.png" for index in chosen)
    return Pictures(part.images[list(chosen)], np.array(labels, np.int64), paths)


def _class_of(shape: str | None, color: str | None) -> str | None:
    return None if shape is None or color is None else f"{color} {shape}"


# ---------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class ImageBatch:
    """Pictures with their classes.

    Args:
        images: (z, S, S, 3) uint8.
        labels: (z,) int64.
        indices: which pictures these are.
    """

    images: Tensor
    labels: Tensor
    indices: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """The number of pictures: what is counted a second."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same batch on another device."""
        return replace(self, images=self.images.to(device, non_blocking=True), labels=self.labels.to(device, non_blocking=True))


def normalised(images: Tensor) -> Tensor:
    """Pictures (z, S, S, 3) uint8 as the model reads them: (z, 3, S, S), by ImageNet's mean and deviation of each channel."""
    mean, deviation = (torch.tensor(numbers, device=images.device) for numbers in (MEAN, DEVIATION))
    return ((images.float() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()


def changed(images: Tensor, *, flip: bool, shift: int, rng: np.random.Generator) -> Tensor:
    """Pictures (z, S, S, 3), each moved by up to `shift` pixels both ways, its border repeated, and maybe mirrored."""
    if shift:
        z, side = images.shape[:2]
        moves = torch.from_numpy(rng.integers(-shift, shift + 1, (2, z, 1)))
        rows, columns = (torch.arange(side) + moves).clamp(0, side - 1)
        images = images[torch.arange(z)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if flip:
        mirrored = torch.from_numpy(rng.random(len(images)) < 0.5)
        images = torch.where(mirrored[:, None, None, None], images.flip(2), images)
    return images


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


# ------------------------------------------------------------------------------------------------------------- task


class ImagesTask:
    """The training task: a `RecipeTask`.

    Args:
        config: the recipe's settings.
        seed: of the batch order and of how pictures are moved.

    Raises:
        FileNotFoundError, ConnectionError, ValueError, ModuleNotFoundError: as `load_data`.
    """

    metric = "loss"

    def __init__(self, config: ImagesConfig | None = None, *, seed: int = 0) -> None:
        self.config, self.seed = config or ImagesConfig(), seed
        self.data = load_data(self.config)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the data is."""
        data = self.data
        counts = f"{len(data.train):,} to learn from, {len(data.valid):,} for validation, {len(data.test):,} to be scored on"
        return (f"{data.folder}: pictures of {len(data.classes)} classes, {counts}", *data.notes)

    @property
    def sample_input(self) -> str:
        """A validation picture."""
        return str(self.data.valid.paths[0])

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every training picture once."""
        return -(-len(self.data.train) // self.config.batch_size)

    def build_model(self) -> CrossViT:
        """A new model with random weights."""
        shape = asdict(self.config.model)
        return CrossViT(CrossViTConfig(classes=len(self.data.classes), image_size=self.config.image_size, **shape))

    def batch_at(self, step: int) -> ImageBatch:
        """The batch of a step, a pure function of (seed, step)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        size, train = self.config.batch_size, self.data.train
        indices = _order(self.seed, epoch, len(train))[place * size : (place + 1) * size]
        images = torch.from_numpy(train.images[indices])
        rng = np.random.default_rng([self.seed, step, 1])
        images = changed(images, flip=self.config.flip, shift=self.config.shift, rng=rng)
        return ImageBatch(images, torch.from_numpy(train.labels[indices]), tuple(indices.tolist()))

    def loss(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """The cross-entropy of the class, in nats."""
        return F.cross_entropy(model(normalised(batch.images)).float(), batch.labels)

    def loss_weight(self, batch: ImageBatch) -> float:
        """The number of pictures."""
        return len(batch.labels)

    def evaluate(self, model: nn.Module, together: Together = ALONE) -> Evaluation:
        """Cross-entropy and accuracy on the validation part, and one picture of it with what the class tokens read."""
        classifier = Classifier(model, self.data.classes)
        logs, labels = classifier.predict(self.data.valid.images, together=together), torch.from_numpy(self.data.valid.labels)
        metrics = {"loss": float(F.nll_loss(logs, labels)), "accuracy": _share(logs.argmax(1) == labels)}
        if not together.is_first:
            return Evaluation(metrics)
        place = int(logs.gather(1, labels[:, None]).argmin())  # the one that is hardest now
        path = self.data.valid.paths[place]
        sample = {
            "source": f"{path.parent.name}/{path.name}",
            "predicted": self.data.classes[int(logs[place].argmax())],
            "reference": self.data.classes[int(labels[place])],
            **asdict(classifier.map_of(self.data.valid.images[place])),
        }
        return Evaluation(metrics, sample)

    def describe(self) -> dict[str, Any]:
        """What a run's folder holds beside the weights, for JSON."""
        config = asdict(self.config)
        config["data"] = None if self.config.data is None else str(self.config.data)
        config["model"] = {name: list(value) if isinstance(value, tuple) else value for name, value in config["model"].items()}
        return {
            "recipe": RECIPE,
            "config": config,
            "data": {"folder": str(self.data.folder), "sha256": self.data.sha256},
            "classes": list(self.data.classes),
        }

    def examples(self, run: ImagesRun, count: int) -> Examples:
        """Some test pictures with a run's answers: those that are wrong first."""
        test = self.data.test
        logs = run.classifier.predict(test.images)
        right = logs.argmax(1).numpy() == test.labels
        spread = [index * len(test) // min(count, len(test)) for index in range(min(count, len(test)))]
        wrong = [int(index) for index in np.flatnonzero(~right)[: count // 2]]
        chosen = list(dict.fromkeys([*wrong, *spread]))[:count]
        rows = tuple(
            (
                bool(right[index]),
                (test.paths[index].name, self.data.classes[int(logs[index].argmax())], self.data.classes[int(test.labels[index])]),
            )
            for index in chosen
        )
        return Examples(("picture", "model", "data"), rows, (str(test.paths[chosen[0]]),), answers=(1,))


# -------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Classifier:
    """A model with the names of its classes.

    Args:
        model: a `CrossViT`, in evaluation mode.
        classes: their names.
    """

    model: Any
    classes: tuple[str, ...]

    def predict(self, images: np.ndarray, *, on_progress: OnProgress | None = None, together: Together = ALONE) -> Tensor:
        """The log-probability of each class for pictures (z, S, S, 3): (z, classes)."""
        device = next(self.model.parameters()).device

        def answer(begin: int) -> Tensor:
            batch = torch.from_numpy(images[begin : begin + _TOGETHER]).to(device)
            with torch.no_grad():
                found: Tensor = self.model(normalised(batch)).float().log_softmax(-1).cpu()
            if on_progress is not None:
                on_progress(min(begin + _TOGETHER, len(images)), len(images))
            return found

        return torch.cat(together.map(answer, range(0, len(images), _TOGETHER)))

    def ask(self, image: np.ndarray, *, num_hypotheses: int = 1) -> list[Prediction]:
        """The most probable classes of a picture (S, S, 3)."""
        scores, places = self.predict(image[None])[0].topk(num_hypotheses)
        return [
            Prediction(self.classes[place], score, float(np.exp(score)))
            for score, place in zip(scores.tolist(), places.tolist(), strict=True)
        ]

    def maps(self, image: np.ndarray) -> list[tuple[str, Tensor]]:
        """What the class token reads in each fusion, by its name: (h, m), the class token's own place first."""
        seen: list[tuple[str, nn.Module, tuple[Tensor, ...]]] = []
        fusions = [
            (k, i, fusion.attention) for k, encoder in enumerate(self.model.encoders) for i, fusion in enumerate(encoder.fusions)
        ]
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args, name=f"encoder {k + 1}: {BRANCHES[i]} read {BRANCHES[1 - i]}": seen.append(
                    (name, module, args)
                )
            )
            for k, i, layer in fusions
        ]
        try:
            with torch.no_grad():
                self.model(normalised(torch.from_numpy(image[None]).to(next(self.model.parameters()).device)))
                return [(name, attention_map(module, *args)[0, :, 0].cpu()) for name, module, args in seen]
        finally:
            for hook in hooks:
                hook.remove()

    def heat(self, image: np.ndarray) -> list[tuple[str, Tensor]]:
        """The same on the grid of the small patches, (h, 1 + rows columns): a large patch's weight lies on what it covers."""
        return [(name, self._spread(weights)) for name, weights in self.maps(image)]

    def map_of(self, image: np.ndarray) -> PictureMap:
        """The mean of all fusions and heads, as a map of the small patches."""
        mean = torch.stack([weights[:, 1:].mean(0) for _, weights in self.heat(image)]).mean(0).reshape(self.grid)
        patch = self.model.config.patch_sizes[0]
        rows, columns = ([str(patch * place) for place in range(count)] for count in self.grid)
        return PictureMap(rows, columns, [[round(weight, 4) for weight in row] for row in mean.tolist()])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the small patches."""
        return self.model.config.grids[0]

    def _spread(self, weights: Tensor) -> Tensor:
        config = self.model.config
        grid = next(grid for grid in config.grids if weights.shape[1] == 1 + grid[0] * grid[1])
        if grid == self.grid:
            return weights
        sides = [patch / scale for patch, scale in zip(config.patch_sizes, config.scales, strict=True)]  # in the picture's pixels
        down, across = (_overlaps(fine, coarse, *sides) for fine, coarse in zip(self.grid, grid, strict=True))
        patches = down @ weights[:, 1:].unflatten(1, grid) @ across.T
        return torch.cat((weights[:, :1], patches.flatten(1)), 1)


def _overlaps(fine: int, coarse: int, fine_patch: float, coarse_patch: float) -> Tensor:
    """Which share of each large patch lies on each small one along a side, (fine, coarse)."""
    begin, start = torch.arange(fine)[:, None] * fine_patch, torch.arange(coarse)[None] * coarse_patch
    covered = torch.minimum(begin + fine_patch, start + coarse_patch) - torch.maximum(begin, start)
    covered = covered.clamp(min=0).float()
    return covered / covered.sum(0).clamp(min=torch.finfo(covered.dtype).tiny)


@dataclass(frozen=True)
class ImagesRun(Run):
    """A trained model that tells the class of pictures.

    Args:
        path: the folder that holds the weights.
        recipe: "images".
        description: what the recipe wrote of itself beside the weights.
        step: the training step of the weights, where the folder says it.
        classifier: the model with the names of its classes.
    """

    classifier: Classifier

    input_names: ClassVar[tuple[str, ...]] = ("PICTURE",)

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.classifier.model

    def predict(self, inputs: Iterable[str], *, num_hypotheses: int = 1, batch_size: int = 32) -> Iterator[list[Prediction]]:
        """Tell the class of pictures as they come, one after the other; `batch_size` changes nothing.

        Raises:
            ValueError: at once: `num_hypotheses` is not from 1 to the number of classes; while iterating: a picture that cannot be
                read.
            FileNotFoundError: while iterating: there is no such picture.
        """
        most = len(self.classifier.classes)
        if not 1 <= num_hypotheses <= most:
            raise ValueError(f"expected 1 to {most} answers, as many as there are classes, got {num_hypotheses}")
        if batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, got {batch_size}")
        return (self.classifier.ask(self._read(given), num_hypotheses=num_hypotheses) for given in inputs)

    def align(self, given: str, predicted: str) -> PictureMap:
        """What the class tokens read of the picture, mean of all fusions and heads; the answer plays no part in it."""
        return self.classifier.map_of(self._read(given))

    def view(self, given: str, answer: str | None = None) -> AttentionView:
        """Which patches the class token reads, in every fusion and head, on the grid of the small patches.

        Args:
            given: the picture's file.
            answer: not taken: what the class tokens read does not depend on it.

        Raises:
            ValueError: an answer is given; a picture that cannot be read.
        """
        if answer is not None:
            raise ValueError(f"what the class tokens read does not depend on an answer, got {answer!r}; leave --answer out")
        image = self._read(given)
        [found] = self.classifier.ask(image)
        layers = tuple(
            AttentionLayer.of_weights(name, "cross-attention", weights[:, None].numpy())
            for name, weights in self.classifier.heat(image)
        )
        picture = ImageSide(png_of(image), *self.classifier.grid, leading=("class token",))
        title = f"{Path(given).name} → {found.text} ({100 * found.probability:.1f} %)"
        return AttentionView(title, TextSide(("class token",)), picture, layers)

    def evaluate(self, *, on_progress: OnProgress | None = None) -> dict[str, float]:
        """Score the run on the test part.

        Returns:
            pictures, accuracy, accuracy_worst_class (of the class with the lowest), accuracy_commonest_class (of the answer that
            was commonest in training, whatever the picture).

        Raises:
            FileNotFoundError, ConnectionError: the data cannot be had.
            ValueError: the data is not what the run was trained on.
        """
        data = load_data(config_from_json(self.description["config"]))
        then = self.description["data"]["sha256"]
        if data.sha256 != then:
            raise ValueError(
                f"{self.path} was trained on other data (sha256 {then}) than {data.folder} holds ({data.sha256}); scores would not "
                "be of unseen pictures: give the folder it was trained on, or train again"
            )
        right = self.classifier.predict(data.test.images, on_progress=on_progress).argmax(1).numpy() == data.test.labels
        commonest = np.bincount(data.train.labels).argmax()
        return {
            "pictures": len(data.test),
            "accuracy": float(right.mean()),
            "accuracy_worst_class": min(float(right[data.test.labels == label].mean()) for label in np.unique(data.test.labels)),
            "accuracy_commonest_class": float((data.test.labels == commonest).mean()),
        }

    def _read(self, given: str) -> np.ndarray:
        return read_square(given, self.model.config.image_size[0])


def config_from_json(fields: Mapping[str, Any]) -> ImagesConfig:
    """The settings that a run's description holds."""
    model = VisionShape(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields["model"].items()})
    return ImagesConfig(**{**fields, "data": None if fields["data"] is None else Path(fields["data"]), "model": model})


def open_run(path: Path, description: Mapping[str, Any], model: Any, step: int | None) -> ImagesRun:
    """A run out of its parts."""
    classes = tuple(description["classes"])
    if not isinstance(model, CrossViT) or model.config.classes != len(classes):
        held = model.config.classes if isinstance(model, CrossViT) else f"a {type(model).__name__}"
        raise ValueError(
            f"the parts of {path} do not belong together: task.json has {len(classes)} classes, config.json {held}; take both from "
            "one run"
        )
    return ImagesRun(path, RECIPE, description, step, Classifier(model, classes))


def _share(is_right: Tensor) -> float:
    return float(is_right.double().mean())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


CONFIG, TASK = ImagesConfig, ImagesTask
