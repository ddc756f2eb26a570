"""What stands before and behind a Perceiver IO: inputs become rows of features and positions, output queries become predictions.

An input adapter turns a batch of one kind into a `Tokens`, `Grid` or `Mixture`: rows that know their position part, so that the
encoder can project it once (`parts`, `project`) or read the joined rows (`joined`). An output adapter makes the rows of output
queries that are asked for, and finishes what the decoder made of them. The configurations say which, and of what size.

Legend: z batch, m input rows, c width of an input row, k output rows asked for, d width of an output query.

Source: Jaegle et al. 2021, arXiv:2107.14795, section 3.2, appendices A, E to H.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention.checks import is_above_zero, is_number, look_up
from crossattention.attention.once import Once
from crossattention.attention.products import linear, project

# -------------------------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class TextInput:
    """Symbols with learned positions, their embeddings added.

    Args:
        vocab_size: number of symbols; 256 bytes and 6 special ones.
        dim: width of an embedding.
        max_length: number of learned positions.
    """

    vocab_size: int = 262
    dim: int = 768
    max_length: int = 2048
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class ImageInput:
    """Pixels, or a feature map of them, each with its position behind it.

    Args:
        size: height and width; learned positions are for this size alone, Fourier features resolve up to it.
        channels: of the image.
        stem: "pixels" as they are, "conv1x1" a projection of each pixel, "conv" a 7 x 7 convolution and pooling, a quarter of each
            side.
        stem_dim: width after the stem; without one the channels.
        positions: "fourier" or "learned" (`position_dim` wide, projected once more).
        bands: frequencies of the Fourier features on each axis.
        position_dim: width of learned positions.
        padding: of the "conv" stem: "transformers" leaves the border of the pooling out (55 x 55 rows of a 224 x 224 image), "same"
            pads as DeepMind's does (56 x 56).
    """

    size: tuple[int, int] = (224, 224)
    channels: int = 3
    stem: Literal["pixels", "conv1x1", "conv"] = "pixels"
    stem_dim: int = 64
    positions: Literal["fourier", "learned"] = "fourier"
    bands: int = 64
    position_dim: int = 256
    padding: Literal["transformers", "same"] = "transformers"
    kind: Literal["image"] = "image"


@dataclass(frozen=True)
class FlowInput:
    """Two frames, a patch around each pixel of both, projected, with Fourier features of the pixel's position.

    Args:
        size: height and width, which the flow has too.
        channels: of a frame.
        patch: side of the patch around a pixel, odd.
        dim: width after the projection.
        bands: frequencies of the Fourier features on each axis.
    """

    size: tuple[int, int] = (368, 496)
    channels: int = 3
    patch: int = 3
    dim: int = 64
    bands: int = 64
    kind: Literal["flow"] = "flow"


@dataclass(frozen=True)
class VideoInput:
    """A video in patches, its sound in patches and its label, one after the other, each filled up to one width by learned numbers.

    Args:
        frames: number of frames.
        size: height and width of a frame.
        channels: of a frame.
        patch: side of an image patch.
        bands: frequencies of the Fourier features of a patch's place, on each axis.
        audio_samples: samples of sound that belong to all frames.
        audio_patch: samples in one patch.
        audio_bands: frequencies of the Fourier features of a sound patch's time.
        num_labels: classes.
        padding: numbers that the widest kind is filled up by.
        mask_probs: probability that a row of (audio, image, label) is replaced by a learned one; 1 hides a kind always.
    """

    frames: int = 16
    size: tuple[int, int] = (224, 224)
    channels: int = 3
    patch: int = 4
    bands: int = 32
    audio_samples: int = 30_720
    audio_patch: int = 16
    audio_bands: int = 192
    num_labels: int = 700
    padding: int = 4
    mask_probs: tuple[float, float, float] = (0.0, 0.0, 1.0)
    kind: Literal["video"] = "video"


@dataclass(frozen=True)
class TokenOutput:
    """Logits of the symbol at each position; the output matrix is the input's embedding.

    Args:
        num_queries: learned output queries, one a position.
        heads: heads of the decoder.
        qk_dim: width of its queries and keys, all heads together.
    """

    num_queries: int = 2048
    heads: int = 8
    qk_dim: int = 256
    kind: Literal["tokens"] = "tokens"


@dataclass(frozen=True)
class ClassOutput:
    """Logits of classes, from one learned output query as wide as a latent.

    Args:
        num_labels: classes.
        heads: heads of the decoder.
        query_residual: whether the query is added to what it reads.
    """

    num_labels: int = 1000
    heads: int = 1
    query_residual: bool = True
    kind: Literal["class"] = "class"


@dataclass(frozen=True)
class FlowOutput:
    """Two numbers a pixel: how far it moves. The output queries are the input's own rows.

    Args:
        heads: heads of the decoder.
        rescale: what the projection is divided by.
    """

    heads: int = 1
    rescale: float = 100.0
    kind: Literal["flow"] = "flow"


@dataclass(frozen=True)
class VideoOutput:
    """Sound, video and label of a `VideoInput` again; queries are positions, filled up to one width by learned numbers.

    Args:
        dim: width that the decoder's output is projected to before each kind's own projection.
        heads: heads of the decoder.
        label_dim: width of the label's learned query.
        padding: numbers that the widest kind is filled up by.
    """

    dim: int = 512
    heads: int = 1
    label_dim: int = 1024
    padding: int = 2
    kind: Literal["video"] = "video"


InputConfig = TextInput | ImageInput | FlowInput | VideoInput
OutputConfig = TokenOutput | ClassOutput | FlowOutput | VideoOutput
INPUTS: dict[str, type] = {"text": TextInput, "image": ImageInput, "flow": FlowInput, "video": VideoInput}
OUTPUTS: dict[str, type] = {"tokens": TokenOutput, "class": ClassOutput, "flow": FlowOutput, "video": VideoOutput}
VIDEO_KINDS = ("audio", "image", "label")
"""Order in which the kinds of a video stand one after the other."""


def config_of(name: str, given: Any, kinds: Mapping[str, type]) -> Any:
    """An adapter's configuration, checked; made of its fields where they were read from a file.

    Raises:
        ValueError: another kind, an unknown field, a value of another kind or out of range.
    """
    if isinstance(given, Mapping):
        kind = given.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"{name} must have a kind of {', '.join(kinds)}, got {kind!r}")
        if unknown := sorted(map(str, set(given) - {known.name for known in fields(kinds[kind])})):
            raise ValueError(f"{name} has fields that {kinds[kind].__name__} does not know: {', '.join(unknown)}")
        given = kinds[kind](**given)
    if type(given) not in kinds.values():
        wanted = ", ".join(kind.__name__ for kind in kinds.values())
        raise ValueError(f"{name} must be one of {wanted}, got {given!r}")
    given = replace(given, **{key: tuple(value) for key, value in vars(given).items() if isinstance(value, list)})
    for known in fields(given):
        fault = _fault_of(known.name, str(known.type), getattr(given, known.name), kinds, type(given))
        if fault is not None:
            raise ValueError(f"{name}.{known.name} must be {fault}, got {getattr(given, known.name)!r}")
    return given


def _fault_of(key: str, written: str, value: Any, kinds: Mapping[str, type], given: type) -> str | None:
    """What a field must be, where its value is not; `written` is its annotation."""
    if key == "kind":
        wanted = next(name for name, kind in kinds.items() if kind is given)
        return None if value == wanted else f'"{wanted}"'
    if key == "mask_probs":
        is_good = isinstance(value, tuple) and len(value) == 3 and all(is_number(p) and 0.0 <= p <= 1.0 for p in value)
        return None if is_good else "three probabilities (audio, image, label)"
    if key == "size":
        is_good = isinstance(value, tuple) and len(value) == 2 and all(_is_whole(side, 1) for side in value)
        return None if is_good else "(height, width), integers of at least 1"
    if written == "int":
        lowest = 0 if key == "padding" else 1
        return None if _is_whole(value, lowest) else f"an integer of at least {lowest}"
    if written == "bool":
        return None if isinstance(value, bool) else "True or False"
    if written == "float":
        return None if is_above_zero(value) else "a number above 0"
    choices = _CHOICES[key]
    return None if isinstance(value, str) and value in choices else f"one of {', '.join(choices)}"


def _is_whole(value: object, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


_CHOICES = {"stem": ("pixels", "conv1x1", "conv"), "positions": ("fourier", "learned"), "padding": ("transformers", "same")}

# -------------------------------------------------------------------------------------------------------- positions


class FourierPositions(nn.Module):
    """Sines and cosines of a position in frequencies that grow evenly from 1 to half the resolution of each axis.

    features(p) = [p_1 .. p_D, sin(pi f p) for all axes and frequencies f, cos(pi f p) likewise],   p in [-1, 1]

    Each axis has a table of its own, computed once: a grid of H x W positions takes H + W sines and cosines a frequency, in float32
    as the published models have them, and any position is put together from its rows.

    Args:
        bands: frequencies on each axis.
        resolution: of each axis; its half is the highest frequency.
        spacing: "ends" puts n positions at -1 .. 1 with both ends, "steps" at -1 + 2 i / n, as decoding at given places does.

    Source: Jaegle et al. 2021, arXiv:2103.03206, section 3.2.

    Example:
        >>> positions = FourierPositions(4, (8, 6))
        >>> positions((8, 6), torch.zeros(())).shape, positions.dim
        (torch.Size([48, 18]), 18)
    """

    def __init__(self, bands: int, resolution: Sequence[int], *, spacing: Literal["ends", "steps"] = "ends") -> None:
        super().__init__()
        self.bands, self.resolution, self.spacing = bands, tuple(resolution), spacing
        self._tables: Once[list[Tensor]] = Once()

    @property
    def dim(self) -> int:
        """Width of the features of a position."""
        return len(self.resolution) * (2 * self.bands + 1)

    def forward(self, grid: Sequence[int], like: Tensor, where: Tensor | None = None) -> Tensor:
        """Features (m, dim) of all positions of a grid, or (*where, dim) of some.

        Args:
            grid: length of each axis, as many as there are resolutions.
            like: gives dtype and device.
            where: integer indices into the flattened grid, any shape.
        """
        out = like.new_empty((*(grid if where is None else where.shape), self.dim))
        self.write(out, grid, where)
        return out.flatten(0, -2) if where is None else out

    def write(self, out: Tensor, grid: Sequence[int], where: Tensor | None = None) -> None:
        """Write them into a tensor (..., *grid, dim), or (*where, dim); leading dimensions get copies."""
        tables = self._tables.get((), lambda: self._make_tables(grid, out), tuple(grid), out.dtype, out.device)
        axes, bands = len(tables), self.bands
        places = None if where is None else torch.unravel_index(where, tuple(grid))
        for axis, table in enumerate(tables):
            if places is None:
                rows = table.view(*(table.shape[0] if axis == other else 1 for other in range(axes)), -1)
            else:
                rows = table[places[axis]]
            out[..., axis] = rows[..., 0]
            sines = axes + axis * bands
            out[..., sines : sines + bands] = rows[..., 1 : 1 + bands]
            out[..., sines + axes * bands : sines + (axes + 1) * bands] = rows[..., 1 + bands :]

    def _make_tables(self, grid: Sequence[int], like: Tensor) -> list[Tensor]:
        """Of each axis (length, 1 + 2 bands): position, sines, cosines."""
        if len(grid) != len(self.resolution):
            raise ValueError(f"positions have {len(self.resolution)} axes, got a grid {tuple(grid)}")
        tables = []
        for length, resolution in zip(grid, self.resolution, strict=True):
            if self.spacing == "ends":
                at = torch.linspace(-1.0, 1.0, length, device=like.device, dtype=torch.float32)
            else:
                at = -1 + 2 * torch.arange(length, device=like.device) / torch.tensor(length, device=like.device)
            frequencies = torch.linspace(1.0, resolution / 2, self.bands, device=like.device, dtype=torch.float32)
            angles = math.pi * (at[:, None] * frequencies)
            tables.append(torch.cat((at[:, None], angles.sin(), angles.cos()), 1).to(like.dtype))
        return tables


class LearnedPositions(nn.Module):
    """A learned vector for each position of a grid, projected once more."""

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, dim))
        self.proj = nn.Linear(dim, dim)
        self._projected: Once[Tensor] = Once()

    @property
    def dim(self) -> int:
        """Width of a position's vector."""
        return self.table.shape[1]

    def forward(self) -> Tensor:
        """All positions (m, dim)."""
        made_of = (self.table, self.proj.weight, self.proj.bias)
        return self._projected.get(made_of, lambda: self.proj(self.table))


# ------------------------------------------------------------------------------------------------- rows of an input

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Tokens:
    """Rows that are a symbol's vector plus a position's.

    Args:
        ids: (z, m).
        table: (vocabulary, c).
        positions: (max_length, c).
    """

    ids: Tensor
    table: Tensor
    positions: Tensor

    @property
    def length(self) -> int:
        """Number of rows, m."""
        return self.ids.shape[1]

    def joined(self) -> Tensor:
        """The rows themselves (z, m, c)."""
        return look_up("inputs", self.ids, self.table) + self.positions[: self.length]

    def made_of(self) -> tuple[Tensor, ...]:
        """The weights that `parts` depends on."""
        return self.table, self.positions

    def parts(self, weight: Tensor) -> Parts:
        """What a projection makes of the weights alone: of each symbol and of each position."""
        return linear(self.table.to(weight.dtype), weight), linear(self.positions.to(weight.dtype), weight)

    def project(self, parts: Parts) -> Tensor:
        """The projected rows (z, m, w): a symbol's part plus a position's, no product."""
        return look_up("inputs", self.ids, parts[0]) + parts[1][: self.length]

    def deviation(self, eps: float, parts: Parts) -> Tensor:
        """Standard deviation of each row, (z, m, 1)."""
        return (self.joined().to(parts[0].dtype).var(-1, unbiased=False, keepdim=True) + eps).sqrt()


@dataclass(frozen=True)
class Grid:
    """Rows that are features with a position's vector behind them.

    Args:
        features: (z, m, f).
        grid: lengths of the axes that m goes over.
        positions: makes the position vectors.
    """

    features: Tensor
    grid: tuple[int, ...]
    positions: FourierPositions | LearnedPositions

    @property
    def length(self) -> int:
        """Number of rows, m."""
        return self.features.shape[1]

    def joined(self) -> Tensor:
        """The rows themselves (z, m, c)."""
        z, m, f = self.features.shape
        if torch.is_grad_enabled() or isinstance(self.positions, LearnedPositions):
            return torch.cat((self.features, self._table().expand(z, -1, -1)), -1)
        out = self.features.new_empty(z, m, f + self.positions.dim)
        out[..., :f] = self.features
        self.positions.write(out[..., f:].unflatten(1, self.grid), self.grid)
        return out

    def rows(self, where: Tensor) -> Tensor:
        """Some of the rows, (z, k, c), where (k,) or (z, k) indices say."""
        if where.dim() == 1:
            features = self.features[:, where]
        else:
            features = self.features.gather(1, where[..., None].expand(-1, -1, self.features.shape[-1]))
        table = self.positions(self.grid, features, where) if isinstance(self.positions, FourierPositions) else self._table()[where]
        return torch.cat((features, table.expand(features.shape[0], -1, -1)), -1)

    def _table(self) -> Tensor:
        return self.positions() if isinstance(self.positions, LearnedPositions) else self.positions(self.grid, self.features)

    def made_of(self) -> tuple[Tensor, ...]:
        """The weights that `parts` depends on."""
        return tuple(self.positions.parameters())

    def parts(self, weight: Tensor) -> Parts:
        """The features' columns of a projection's weight, the positions projected, and their mean and spread."""
        f, table = self.features.shape[-1], self._table().to(weight.dtype)
        mean = table.mean(-1, keepdim=True)
        return weight[:, :f], linear(table, weight[:, f:]), mean, (table - mean).square().sum(-1, keepdim=True)

    def project(self, parts: Parts) -> Tensor:
        """The projected rows (z, m, w): only the features go through a product."""
        return linear(self.features.to(parts[0].dtype), parts[0]) + parts[1]

    def deviation(self, eps: float, parts: Parts) -> Tensor:
        """Standard deviation of each row, (z, m, 1), out of that of its features and of its position."""
        features = self.features.to(parts[0].dtype)
        f, p = features.shape[-1], self.positions.dim
        own = features.mean(-1, keepdim=True)
        spread = (features - own).square().sum(-1, keepdim=True) + parts[3] + f * p / (f + p) * (own - parts[2]).square()
        return (spread / (f + p) + eps).sqrt()


@dataclass(frozen=True)
class Mixture:
    """Rows of several kinds, put together already: nothing of them is projected in parts."""

    vectors: Tensor

    @property
    def length(self) -> int:
        """Number of rows, m."""
        return self.vectors.shape[1]

    def joined(self) -> Tensor:
        """The rows themselves (z, m, c)."""
        return self.vectors


Rows = Tokens | Grid | Mixture

# --------------------------------------------------------------------------------------------------- input adapters


class TextAdapter(nn.Module):
    """Ids (z, m) as rows."""

    def __init__(self, config: TextInput) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_length, config.dim)

    @property
    def dim(self) -> int:
        """Width of a row, c."""
        return self.config.dim

    def forward(self, ids: Tensor) -> Tokens:
        """Rows of ids (z, m)."""
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"inputs must be ids, int64 or int32 of shape (batch, length), got {_described(ids)}")
        if ids.shape[1] > self.config.max_length:
            raise ValueError(
                f"a sequence of length {ids.shape[1]} is longer than the max_length={self.config.max_length} learned positions; "
                "shorten it, or build the model with a larger max_length"
            )
        return Tokens(ids, self.embedding.weight, self.positions.weight)


class ImageAdapter(nn.Module):
    """Images (z, channels, H, W) as rows."""

    def __init__(self, config: ImageInput) -> None:
        super().__init__()
        self.config = config
        self.stem: nn.Module | None = None
        if config.stem == "conv1x1":
            self.stem = nn.Linear(config.channels, config.stem_dim)
        elif config.stem == "conv":
            self.stem = ConvStem(config.channels, config.stem_dim, config.padding)
        self.features_dim = config.channels if config.stem == "pixels" else config.stem_dim
        height, width = config.size
        if config.positions == "learned":
            if config.stem == "conv":
                raise ValueError('positions="learned" are one a pixel and do not go with stem="conv"; take positions="fourier"')
            self.positions: LearnedPositions | FourierPositions = LearnedPositions(height * width, config.position_dim)
        else:
            quarter = (math.ceil(height / 4), math.ceil(width / 4))
            self.positions = FourierPositions(config.bands, quarter if config.stem == "conv" else config.size)

    @property
    def dim(self) -> int:
        """Width of a row, c."""
        return self.features_dim + self.positions.dim

    def forward(self, images: Tensor) -> Grid:
        """Rows of images (z, channels, H, W); with Fourier positions of any size."""
        config = self.config
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != config.channels:
            raise ValueError(f"inputs must be images (batch, {config.channels}, height, width), got {_described(images)}")
        if config.positions == "learned" and tuple(images.shape[2:]) != tuple(config.size):
            raise ValueError(
                f"learned positions are for images of {config.size[0]} x {config.size[1]}, got {tuple(images.shape)}; resize them"
            )
        if config.stem == "conv":
            assert self.stem is not None
            least = 1 if config.padding == "same" else 5
            if min(images.shape[2:]) < least:
                raise ValueError(
                    f"images must have sides of at least {least} for this stem to leave a row, got {tuple(images.shape)}"
                )
            images = self.stem(images)
        features = images.flatten(2).transpose(1, 2)
        if config.stem == "conv1x1":
            assert self.stem is not None
            features = project(self.stem, features)
        return Grid(features, tuple(images.shape[2:]), self.positions)


class ConvStem(nn.Module):
    """A 7 x 7 convolution of stride 2, batch norm, ReLU, and a 3 x 3 maximum of stride 2."""

    def __init__(self, channels: int, dim: int, padding: str) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, dim, 7, stride=2, bias=False)
        self.norm = BatchNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images (z, channels, H, W) to maps (z, dim, h, w), about a quarter as high and wide."""
        around = (3, 3, 3, 3) if self.padding == "transformers" else _same_padding(images.shape[2:], 7, 2)
        maps = F.relu(self.norm(self.conv(F.pad(images, around))))
        if self.padding == "same":
            maps = F.pad(maps, _same_padding(maps.shape[2:], 3, 2), value=-torch.inf)
        return F.max_pool2d(maps, 3, 2)


class BatchNorm(nn.Module):
    """`torch.nn.BatchNorm2d` without its count of batches, which only one without momentum uses."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (z, dim, h, w), normalised over all but the second dimension; in evaluation by what training has seen."""
        return F.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, self.training)


def _same_padding(size: Sequence[int], kernel: int, stride: int) -> tuple[int, int, int, int]:
    """Columns left and right, rows above and below, so that a side of n gives ceil(n / stride); the odd one comes last."""
    needed = [max(0, (math.ceil(n / stride) - 1) * stride + kernel - n) for n in (size[1], size[0])]
    return needed[0] // 2, needed[0] - needed[0] // 2, needed[1] // 2, needed[1] - needed[1] // 2


class FlowAdapter(nn.Module):
    """Two frames as rows, one a pixel."""

    def __init__(self, config: FlowInput) -> None:
        super().__init__()
        if config.patch % 2 == 0:
            raise ValueError(f"inputs.patch must be odd, a patch around a pixel, got {config.patch}")
        self.config = config
        self.patch_channels = config.channels * config.patch**2
        self.proj = nn.Linear(2 * self.patch_channels, config.dim)
        self.positions = FourierPositions(config.bands, config.size)

    @property
    def dim(self) -> int:
        """Width of a row, c."""
        return self.config.dim + self.positions.dim

    def forward(self, frames: Tensor) -> Grid:
        """Rows of frames (z, 2, channels, H, W), or of their patches (z, 2, channels patch^2, H, W) as transformers wants them."""
        config, wanted = self.config, (self.config.channels, self.patch_channels)
        if not isinstance(frames, Tensor) or frames.dim() != 5 or frames.shape[1] != 2 or frames.shape[2] not in wanted:
            raise ValueError(
                f"inputs must be two frames (batch, 2, {wanted[0]}, height, width) or their patches "
                f"(batch, 2, {wanted[1]}, height, width), got {_described(frames)}"
            )
        if tuple(frames.shape[3:]) != tuple(config.size):
            raise ValueError(
                f"frames must be {config.size[0]} x {config.size[1]}, as this model was built, got {tuple(frames.shape)}; "
                "cut larger ones into tiles of that size"
            )
        if frames.shape[2] == config.channels and config.patch > 1:
            frames = patches_around(frames, config.patch)
        height, width = frames.shape[3:]
        features = frames.flatten(1, 2).flatten(2).transpose(1, 2)  # each pixel: the first frame's patch, then the second's
        return Grid(project(self.proj, features), (height, width), self.positions)


def patches_around(frames: Tensor, patch: int = 3) -> Tensor:
    """The patch around each pixel, (..., channels patch^2, H, W): by row, column, then channel; zero outside of the frame."""
    *leading, channels, height, width = frames.shape
    around = patch // 2
    taken = F.unfold(frames.reshape(-1, channels, height, width), patch, padding=around)
    taken = taken.unflatten(1, (channels, patch * patch)).transpose(1, 2)
    return taken.reshape(*leading, channels * patch * patch, height, width)


class VideoAdapter(nn.Module):
    """A video with its sound and label as rows: audio (z, samples, 1), image (z, frames, channels, H, W), label (z, labels)."""

    def __init__(self, config: VideoInput) -> None:
        super().__init__()
        if config.audio_samples % config.audio_patch:
            raise ValueError(
                f"inputs.audio_patch must divide audio_samples, got {config.audio_patch} for {config.audio_samples} samples"
            )
        if config.size[0] % config.patch or config.size[1] % config.patch:
            raise ValueError(f"inputs.patch must divide both sides, got {config.patch} for {config.size[0]} x {config.size[1]}")
        self.config = config
        self.audio_positions = FourierPositions(config.audio_bands, (config.audio_samples,))
        self.image_positions = FourierPositions(config.bands, (config.frames, *config.size))
        widths = self.widths()
        self.padding = nn.ParameterDict({kind: torch.empty(self.dim - widths[kind]) for kind in VIDEO_KINDS})
        self.hidden = nn.ParameterDict({kind: torch.empty(self.dim) for kind in VIDEO_KINDS})

    def widths(self) -> dict[str, int]:
        """Width of each kind's rows before they are filled up."""
        config = self.config
        return {
            "audio": config.audio_patch + self.audio_positions.dim,
            "image": config.channels * config.patch**2 + self.image_positions.dim,
            "label": config.num_labels,
        }

    @property
    def dim(self) -> int:
        """Width of a row, c."""
        return max(self.widths().values()) + self.config.padding

    def forward(self, inputs: Mapping[str, Tensor]) -> Mixture:
        """Rows of audio, then image, then label."""
        self._check(inputs)
        config = self.config
        audio = inputs["audio"].reshape(inputs["audio"].shape[0], -1, config.audio_patch)
        image, p = inputs["image"], config.patch
        z, frames, channels, height, width = image.shape
        patches = image.view(z, frames, channels, height // p, p, width // p, p).permute(0, 1, 3, 5, 4, 6, 2)
        grid = (frames, height // p, width // p)
        rows = {
            "audio": Grid(audio, (audio.shape[1],), self.audio_positions).joined(),
            "image": Grid(patches.reshape(z, -1, channels * p * p), grid, self.image_positions).joined(),
            "label": inputs["label"][:, None],
        }
        return Mixture(torch.cat([self._fill(kind, probability, rows.pop(kind)) for kind, probability in self._masks()], 1))

    def _masks(self) -> list[tuple[str, float]]:
        return list(zip(VIDEO_KINDS, self.config.mask_probs, strict=True))

    def _fill(self, kind: str, probability: float, rows: Tensor) -> Tensor:
        """Rows of one kind, filled up to the common width; some, or all, replaced by the kind's hidden row."""
        if probability == 1.0:
            return self.hidden[kind].expand(*rows.shape[:2], -1)
        rows = torch.cat((rows, self.padding[kind].expand(*rows.shape[:2], -1)), -1)
        if probability == 0.0:
            return rows
        hides = torch.rand(*rows.shape[:2], 1, device=rows.device) < probability
        return torch.where(hides, self.hidden[kind], rows)

    def _check(self, inputs: Mapping[str, Tensor]) -> None:
        config = self.config
        wanted = {
            "audio": (config.audio_samples, 1),
            "image": (config.frames, config.channels, *config.size),
            "label": (config.num_labels,),
        }
        if not isinstance(inputs, Mapping) or set(inputs) != set(wanted):
            got = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(f"inputs must be a dictionary of audio, image and label, got {got}")
        for kind, shape in wanted.items():
            given, sizes = inputs[kind], ", ".join(map(str, shape))
            if not isinstance(given, Tensor) or tuple(given.shape[1:]) != shape:
                raise ValueError(f'inputs["{kind}"] must be (batch, {sizes}), got {_described(given)}')
        if any(inputs[kind].shape[0] != inputs["image"].shape[0] for kind in wanted):
            batches = ", ".join(f"{kind} {inputs[kind].shape[0]}" for kind in wanted)
            raise ValueError(f"inputs must have one batch size, got {batches}")


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def make_input(config: InputConfig) -> TextAdapter | ImageAdapter | FlowAdapter | VideoAdapter:
    """The adapter that a configuration names."""
    makers: dict[str, Any] = {"text": TextAdapter, "image": ImageAdapter, "flow": FlowAdapter, "video": VideoAdapter}
    made: TextAdapter | ImageAdapter | FlowAdapter | VideoAdapter = makers[config.kind](config)
    return made


# -------------------------------------------------------------------------------------------------- output adapters


@dataclass(frozen=True)
class Question:
    """Output queries that are asked for together.

    Args:
        name: of the kind of output.
        length: number of queries that there are.
        where: integer indices of those asked for, (k,) or (z, k); None for all in order.
        learned: the queries themselves (length, d) where they are learned, so that they are projected once.
        make: makes the rows of queries, (k, d) for all items alike or (z, k, d), of indices (k,) or (z, k).
    """

    name: str
    length: int
    where: Tensor | None
    learned: Tensor | None = None
    make: Any = field(default=None)

    @property
    def count(self) -> int:
        """Number of queries asked for, k."""
        return self.length if self.where is None else self.where.shape[-1]


class TokenAdapter(nn.Module):
    """A learned query for each position; logits by the symbols' own vectors."""

    def __init__(self, config: TokenOutput, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.query_dim, self.qk_dim, self.value_dim = dim, config.qk_dim, dim
        self.heads, self.query_residual = config.heads, False
        self.queries = nn.Parameter(torch.empty(config.num_queries, dim))
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def ask(self, outputs: Tensor | None, rows: Rows, batch: int) -> list[Question]:
        """The positions (k,) or (z, k), or those where a mask (z, n) is True; each item's fill up to the most of any."""
        n = self.config.num_queries
        if isinstance(outputs, Tensor) and outputs.dtype == torch.bool:
            if outputs.dim() != 2 or outputs.shape[0] != batch or outputs.shape[1] > n:
                raise ValueError(f"a mask of outputs must be ({batch}, up to {n}), got {tuple(outputs.shape)}")
            most = int(outputs.sum(1).max()) if outputs.numel() else 0
            outputs = outputs.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        else:
            check_where("outputs", outputs, n, batch)
        return [Question("tokens", n, outputs, learned=self.queries)]

    def finish(self, name: str, x: Tensor, inputs: nn.Module) -> Tensor:
        """Logits (z, k, vocabulary)."""
        return linear(x, inputs.embedding.weight, self.bias)

    def answer(self, answers: dict[str, Tensor], outputs: Tensor | None) -> Tensor:
        """Logits (z, k, vocabulary); of a mask, those at its True positions one after the other, (all of them, vocabulary)."""
        logits = answers["tokens"]
        if isinstance(outputs, Tensor) and outputs.dtype == torch.bool:
            is_real = torch.arange(logits.shape[1], device=logits.device) < outputs.sum(1, keepdim=True)
            return logits[is_real]
        return logits


class ClassAdapter(nn.Module):
    """One learned query; logits of classes."""

    def __init__(self, config: ClassOutput, latent_dim: int) -> None:
        super().__init__()
        self.query_dim = self.qk_dim = self.value_dim = latent_dim
        self.heads, self.query_residual = config.heads, config.query_residual
        self.queries = nn.Parameter(torch.empty(1, latent_dim))
        self.proj = nn.Linear(latent_dim, config.num_labels)

    def ask(self, outputs: None, rows: Rows, batch: int) -> list[Question]:
        """The one query."""
        if outputs is not None:
            raise ValueError("a classifier has one output query, so there are no outputs to choose; leave outputs away")
        return [Question("class", 1, None, learned=self.queries)]

    def finish(self, name: str, x: Tensor, inputs: nn.Module) -> Tensor:
        """Logits (z, 1, classes)."""
        return project(self.proj, x)

    def answer(self, answers: dict[str, Tensor], outputs: None) -> Tensor:
        """Logits (z, classes)."""
        return answers["class"][:, 0]


class FlowOutputAdapter(nn.Module):
    """The input's rows as queries; how far each pixel moves."""

    def __init__(self, config: FlowOutput, dim: int, latent_dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.size = config, tuple(size)
        self.query_dim, self.qk_dim, self.value_dim = dim, latent_dim, latent_dim
        self.heads, self.query_residual = config.heads, False
        self.proj = nn.Linear(dim, 2)

    def ask(self, outputs: Tensor | None, rows: Rows, batch: int) -> list[Question]:
        """The pixels (k,) or (z, k), indices into the flattened image."""
        assert isinstance(rows, Grid)
        check_where("outputs", outputs, rows.length, batch)
        return [Question("flow", rows.length, outputs, make=rows.rows)]

    def finish(self, name: str, x: Tensor, inputs: nn.Module) -> Tensor:
        """Flow (z, k, 2)."""
        return project(self.proj, x) / self.config.rescale

    def answer(self, answers: dict[str, Tensor], outputs: Tensor | None) -> Tensor:
        """Flow (z, H, W, 2) of all pixels, or (z, k, 2) of some."""
        return answers["flow"].unflatten(1, self.size) if outputs is None else answers["flow"]


class VideoOutputAdapter(nn.Module):
    """Positions as queries; sound, video and label again."""

    def __init__(self, config: VideoOutput, video: VideoInput, latent_dim: int) -> None:
        super().__init__()
        self.config, self.video = config, video
        self.audio_positions = FourierPositions(video.audio_bands, (video.audio_samples,), spacing="steps")
        self.image_positions = FourierPositions(video.bands, (video.frames, *video.size), spacing="steps")
        widths = {"audio": self.audio_positions.dim, "image": self.image_positions.dim, "label": config.label_dim}
        self.query_dim = max(widths.values()) + config.padding
        self.qk_dim = self.value_dim = latent_dim
        self.heads, self.query_residual = config.heads, False
        self.label_query = nn.Parameter(torch.empty(1, config.label_dim))
        self.padding = nn.ParameterDict({kind: torch.empty(self.query_dim - widths[kind]) for kind in VIDEO_KINDS})
        self.proj = nn.Linear(self.query_dim, config.dim)
        self.audio_proj = nn.Linear(config.dim, video.audio_patch)
        self.image_proj = nn.Linear(config.dim, video.channels)
        self.label_proj = nn.Linear(config.dim, video.num_labels)
        self.grids = {"audio": (video.audio_samples // video.audio_patch,), "image": (video.frames, *video.size), "label": (1,)}

    def ask(self, outputs: Mapping[str, Tensor | None] | None, rows: Rows, batch: int) -> list[Question]:
        """For each kind that is named, the places (k,) or (z, k); None for all of a kind."""
        if outputs is None:
            outputs = dict.fromkeys(VIDEO_KINDS)
        if not isinstance(outputs, Mapping) or not outputs or set(outputs) - set(VIDEO_KINDS):
            got = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise ValueError(f"outputs must be a dictionary with some of {', '.join(VIDEO_KINDS)}, got {got}")
        questions = []
        for kind in VIDEO_KINDS:
            if kind in outputs:
                length = math.prod(self.grids[kind])
                check_where(f'outputs["{kind}"]', outputs[kind], length, batch)
                questions.append(Question(kind, length, outputs[kind], make=getattr(self, f"_{kind}_queries")))
        return questions

    def _audio_queries(self, where: Tensor) -> Tensor:
        return self._fill("audio", self.audio_positions(self.grids["audio"], self.label_query, where))

    def _image_queries(self, where: Tensor) -> Tensor:
        return self._fill("image", self.image_positions(self.grids["image"], self.label_query, where))

    def _label_queries(self, where: Tensor) -> Tensor:
        return self._fill("label", self.label_query[where])

    def _fill(self, kind: str, rows: Tensor) -> Tensor:
        return torch.cat((rows, self.padding[kind].expand(*rows.shape[:-1], -1)), -1)

    def finish(self, name: str, x: Tensor, inputs: nn.Module) -> Tensor:
        """Of one kind: (z, k, samples of a patch), (z, k, channels) or (z, k, labels)."""
        return project(getattr(self, f"{name}_proj"), project(self.proj, x))

    def answer(self, answers: dict[str, Tensor], outputs: Mapping[str, Tensor | None] | None) -> dict[str, Tensor]:
        """By kind: audio (z, samples), image (z, T, H, W, channels) or at some places (z, k, channels), label (z, labels)."""
        made = {}
        for kind, out in answers.items():
            asks_all = outputs is None or outputs[kind] is None
            if kind == "image":
                made[kind] = out.unflatten(1, self.grids["image"]) if asks_all else out
            else:
                made[kind] = out.flatten(1) if kind == "audio" else out[:, 0]
        return made


OutputAdapter = TokenAdapter | ClassAdapter | FlowOutputAdapter | VideoOutputAdapter


def make_output(config: OutputConfig, inputs: InputConfig, dim: int, latent_dim: int) -> OutputAdapter:
    """The adapter that a configuration names, for an input of some configuration whose rows have a width.

    Raises:
        ValueError: an output that this input has nothing for.
    """
    if isinstance(config, ClassOutput):
        return ClassAdapter(config, latent_dim)
    if isinstance(config, TokenOutput) and isinstance(inputs, TextInput):
        return TokenAdapter(config, dim, inputs.vocab_size)
    if isinstance(config, FlowOutput) and isinstance(inputs, FlowInput):
        return FlowOutputAdapter(config, dim, latent_dim, inputs.size)
    if isinstance(config, VideoOutput) and isinstance(inputs, VideoInput):
        return VideoOutputAdapter(config, inputs, latent_dim)
    wants = {"tokens": "TextInput", "flow": "FlowInput", "video": "VideoInput"}[config.kind]
    raise ValueError(f"{type(config).__name__} needs a {wants}, got {type(inputs).__name__}")


def check_where(name: str, where: Tensor | None, length: int, batch: int) -> None:
    """Refuse what is no set of indices below a length, (k,) or (z, k)."""
    if where is None:
        return
    if not isinstance(where, Tensor):
        raise TypeError(f"{name} must be integer indices (k,) or (batch, k), got {type(where).__name__}")
    if where.dtype != torch.int64 or where.dim() not in (1, 2) or (where.dim() == 2 and where.shape[0] != batch):
        raise ValueError(f"{name} must be int64 indices (k,) or ({batch}, k), got {where.dtype} of shape {tuple(where.shape)}")
    if not torch.compiler.is_compiling() and where.numel() and not 0 <= int(where.min()) <= int(where.max()) < length:
        raise ValueError(f"{name} must be indices from 0 to {length - 1}, got {int(where.min())} to {int(where.max())}")
