"""CrossViT: two branches of a vision transformer, on small and on large patches, whose class tokens read each other's patches.

Chen, Fan, Panda: "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", 2021, arXiv:2103.14899.
The model and the sizes that its authors and timm name.

Where this file follows the authors' code because the paper is silent or says otherwise:
- the projections f and g of the fusion are each a norm, a GELU and a linear map (the paper: "projection functions");
- both fusions of an encoder read what the branches were before either fusion;
- the class token that goes back, g(y), takes the place of the branch's class token: nothing of the old one is added to it;
- the large branch sees the image resized (bicubic), where its size times `scales` is another one; "CrossViT-9" and its like
  read 240 x 240 and 224 x 224 pixels, although the paper speaks of 224;
- the rate of stochastic depth rises linearly over the layers of the longer branch; a fusion has that of its encoder's last layer.

What that code computes and nothing reads is not computed here: the norm of patches after the last fusion, the sequences put
together after it, and the sublayers of images that stochastic depth leaves out. The result is the same.

Legend: z batch, c channels, H W height and width of the image, p patches of a branch, d width of a branch, s the small-patch branch
and l the large-patch branch; pairs are in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention import CrossAttention, Plan, SelfAttention
from crossattention.attention.checks import is_above_zero
from crossattention.layers.feed_forward import FeedForward
from crossattention.layers.resizing import resize_bicubic
from crossattention.models.pretrained import Pretrained

CONVOLUTIONS: dict[int, tuple[tuple[int, int, int], ...]] = {
    12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)),
    16: ((7, 4, 3), (3, 2, 1), (3, 2, 1)),
}
"""Kernel, stride and padding of the three convolutions that may take the place of the linear patch embedding, by patch size."""

ABSORBED = Plan("context", "context")
"""The plan of a fusion: its query and its result come to the patches, so that the projections of these are absorbed.

Pinned, so that compiled and exported graphs run it too. Where an adapter takes the place of a projection, set
`fusion.attention.plan = "auto"`.
"""

# ------------------------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class CrossViTConfig:
    """Sizes and choices of a `CrossViT`; the defaults are the paper's CrossViT-S.

    Args:
        classes: number of classes.
        image_size: height and width of the images, or one number for both. A branch's size need not be a multiple of its patch:
            what fills no patch at the right and at the bottom is not read, as by any convolution.
        scales: factor from the image's size to what each branch sees, rounded down.
        patch_sizes: side of the patches of each branch; with `stem="convolutions"` 12 or 16.
        dims: width of each branch.
        heads: attention heads of each branch; a fusion has those of the branch that it reads.
        layers: transformer layers of each branch in each encoder, the paper's N and M.
        encoders: multi-scale encoders, the paper's K; each ends with a fusion both ways.
        feed_forward_ratio: width inside the feed-forward layers over the width of the branch, the paper's r.
        stem: "linear" embeds a patch by one linear map, "convolutions" by three convolutions (the paper's dagger).
        channels: channels of the images, c.
        stochastic_depth: probability of leaving out the last layer's sublayers for an image in training; rises linearly from zero.
        norm_eps: added to the variance in each norm.

    Raises:
        ValueError: a size below 1, heads that do not divide, an unknown stem, convolutions for another patch size, an image too
            small for one patch, a rate outside [0, 1).
    """

    classes: int = 1000
    image_size: int | tuple[int, int] = 240
    scales: tuple[float, float] = (1.0, 224 / 240)
    patch_sizes: tuple[int, int] = (12, 16)
    dims: tuple[int, int] = (192, 384)
    heads: tuple[int, int] = (6, 6)
    layers: tuple[int, int] = (1, 4)
    encoders: int = 3
    feed_forward_ratio: float = 4.0
    stem: Literal["linear", "convolutions"] = "linear"
    channels: int = 3
    stochastic_depth: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if _is_integer(self.image_size):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        for name in ("image_size", "scales", "patch_sizes", "dims", "heads", "layers"):
            value = getattr(self, name)
            kind = "numbers above 0" if name == "scales" else "integers of at least 1"
            if (
                not isinstance(value, tuple | list)
                or len(value) != 2
                or not all(map(is_above_zero if name == "scales" else _is_size, value))
            ):
                raise ValueError(f"{name} must be a pair of {kind}, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("classes", "encoders", "channels"):
            if not _is_size(getattr(self, name)):
                raise ValueError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        for dim, heads in zip(self.dims, self.heads, strict=True):
            if dim % heads:
                raise ValueError(f"heads must divide dims, got heads={self.heads} for dims={self.dims}")
        for name in ("feed_forward_ratio", "norm_eps"):
            if not is_above_zero(getattr(self, name)):
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)!r}")
        if min(self.feed_forward_dims) < 1:
            raise ValueError(f"feed_forward_ratio={self.feed_forward_ratio} leaves no width for dims={self.dims}")
        if not isinstance(self.stochastic_depth, int | float) or not 0.0 <= self.stochastic_depth < 1.0:
            raise ValueError(f"stochastic_depth must be in [0, 1), got {self.stochastic_depth!r}")
        if self.stem not in ("linear", "convolutions"):
            raise ValueError(f"stem must be linear or convolutions, got {self.stem!r}")
        if self.stem == "convolutions" and (unknown := [size for size in self.patch_sizes if size not in CONVOLUTIONS]):
            raise ValueError(f'stem="convolutions" knows patches of {" and ".join(map(str, CONVOLUTIONS))}, got {unknown}')
        for (height, width), patch, grid in zip(self.branch_sizes, self.patch_sizes, self.grids, strict=True):
            if min(grid) < 1:
                raise ValueError(
                    f"a branch that sees {height} x {width} pixels has no patch of {patch}; image_size={self.image_size}"
                )

    @property
    def branch_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of what each branch sees."""
        height, width = self.image_size  # type: ignore[misc]
        small, large = ((int(height * scale), int(width * scale)) for scale in self.scales)
        return small, large

    @property
    def grids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of patches of each branch."""
        small, large = (
            (self._patches_along(height, patch), self._patches_along(width, patch))
            for (height, width), patch in zip(self.branch_sizes, self.patch_sizes, strict=True)
        )
        return small, large

    @property
    def feed_forward_dims(self) -> tuple[int, int]:
        """Width inside the feed-forward layers of each branch."""
        return int(self.dims[0] * self.feed_forward_ratio), int(self.dims[1] * self.feed_forward_ratio)

    def depth_rates(self) -> list[list[float]]:
        """Rate of stochastic depth, by encoder and layer of its longer branch."""
        depth = max(self.layers)
        rates = torch.linspace(0.0, self.stochastic_depth, self.encoders * depth, device="cpu").tolist()
        return [rates[start : start + depth] for start in range(0, len(rates), depth)]

    def _patches_along(self, side: int, patch: int) -> int:
        for kernel, stride, padding in CONVOLUTIONS[patch] if self.stem == "convolutions" else ((patch, patch, 0),):
            side = (side + 2 * padding - kernel) // stride + 1
        return side


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_integer(value) and value >= 1


def crossvit_tiny_240(**changes: Any) -> CrossViTConfig:
    """CrossViT-Ti: 7.0 M parameters with 1,000 classes.

    Args:
        changes: fields of `CrossViTConfig` that shall differ.

    Source: Chen et al. 2021, table 1, as all sizes here; names are timm's, by the size of the images.
    """
    return CrossViTConfig(**{"dims": (96, 192), "heads": (3, 3), **changes})


def crossvit_small_240(**changes: Any) -> CrossViTConfig:
    """CrossViT-S: 26.9 M parameters."""
    return CrossViTConfig(**changes)


def crossvit_base_240(**changes: Any) -> CrossViTConfig:
    """CrossViT-B: 105.0 M parameters."""
    return CrossViTConfig(**{"dims": (384, 768), "heads": (12, 12), **changes})


def crossvit_9_240(**changes: Any) -> CrossViTConfig:
    """CrossViT-9: 8.6 M parameters."""
    return CrossViTConfig(**{"dims": (128, 256), "heads": (4, 4), "layers": (1, 3), "feed_forward_ratio": 3.0, **changes})


def crossvit_15_240(**changes: Any) -> CrossViTConfig:
    """CrossViT-15: 27.5 M parameters."""
    return CrossViTConfig(**{"layers": (1, 5), "feed_forward_ratio": 3.0, **changes})


def crossvit_18_240(**changes: Any) -> CrossViTConfig:
    """CrossViT-18: 43.3 M parameters."""
    return CrossViTConfig(**{"dims": (224, 448), "heads": (7, 7), "layers": (1, 6), "feed_forward_ratio": 3.0, **changes})


def crossvit_9_dagger_240(**changes: Any) -> CrossViTConfig:
    """CrossViT-9 with convolutions for a stem: 8.8 M parameters."""
    return crossvit_9_240(**{"stem": "convolutions", **changes})


def crossvit_15_dagger_240(**changes: Any) -> CrossViTConfig:
    """CrossViT-15 with convolutions for a stem: 28.2 M parameters."""
    return crossvit_15_240(**{"stem": "convolutions", **changes})


def crossvit_15_dagger_408(**changes: Any) -> CrossViTConfig:
    """CrossViT-15 with convolutions for a stem, on 408 x 408 pixels: 28.5 M parameters."""
    return crossvit_15_dagger_240(**{"image_size": 408, "scales": (1.0, 384 / 408), **changes})


def crossvit_18_dagger_240(**changes: Any) -> CrossViTConfig:
    """CrossViT-18 with convolutions for a stem: 44.3 M parameters."""
    return crossvit_18_240(**{"stem": "convolutions", **changes})


def crossvit_18_dagger_408(**changes: Any) -> CrossViTConfig:
    """CrossViT-18 with convolutions for a stem, on 408 x 408 pixels: 44.6 M parameters."""
    return crossvit_18_dagger_240(**{"image_size": 408, "scales": (1.0, 384 / 408), **changes})


# ----------------------------------------------------------------------------------------------------------- blocks


class StochasticDepth(nn.Module):
    """The residual sum around a sublayer, which in training leaves the sublayer out for some of the images.

    x <- x + sublayer(x) * kept / (1 - rate),   kept 0 with probability rate, else 1, drawn for each image

    On a CPU the sublayer runs on the images that are kept, and on no others.

    Source: Huang et al. 2016, arXiv:1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, sublayer: Callable[..., Tensor], *read: Tensor) -> Tensor:
        """The sum for x (z, n, d), with what else the sublayer reads of each image."""
        if not self.training or self.rate == 0.0:
            return x + sublayer(x, *read)
        is_kept = x.new_empty(x.shape[0], 1, 1).bernoulli_(1.0 - self.rate)
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # a device would have to wait for the number of images
            return x + sublayer(x, *read) * (is_kept / (1.0 - self.rate))
        kept = is_kept.flatten().nonzero().flatten()
        if len(kept) == len(x):
            return torch.add(x, sublayer(x, *read), alpha=1.0 / (1.0 - self.rate))
        return x.index_add(0, kept, sublayer(x[kept], *(tensor[kept] for tensor in read)), alpha=1.0 / (1.0 - self.rate))

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate:.3f}"


class Block(nn.Module):
    """A layer of a branch: self-attention and a feed-forward layer, each on the norm of its input and added to it."""

    def __init__(self, config: CrossViTConfig, branch: int, rate: float) -> None:
        super().__init__()
        dim = config.dims[branch]
        self.attention_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attention = SelfAttention(dim, heads=config.heads[branch])
        self.feed_forward_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(dim, config.feed_forward_dims[branch], activation="gelu")
        self.residual = StochasticDepth(rate)

    def forward(self, x: Tensor) -> Tensor:
        """One layer on x (z, 1 + p, d)."""
        x = self.residual(x, self._attend)
        return self.residual(x, self._transform)

    def _attend(self, x: Tensor) -> Tensor:
        return self.attention(self.attention_norm(x))

    def _transform(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.feed_forward_norm(x))


class Fusion(nn.Module):
    """The class token of one branch reads the patches of the other, and itself among them, in the other's width.

    q = f(class token);   y = q + attention(norm(q), norm([q; patches]));   class token <- g(y)

    f and g are each a norm, a GELU and a linear map. One query meets all patches where they are, in the patches' own width: the
    projections to keys and values are absorbed by the query and the result, so none of the patches is projected.

    Source: Chen et al. 2021, eq. 5 to 7.
    """

    def __init__(self, config: CrossViTConfig, branch: int, rate: float) -> None:
        super().__init__()
        dim, other = config.dims[branch], config.dims[1 - branch]
        self.enter_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.enter_proj = nn.Linear(dim, other)
        self.attention_norm = nn.LayerNorm(other, eps=config.norm_eps)
        self.attention = CrossAttention(other, heads=config.heads[1 - branch], plan=ABSORBED)
        self.residual = StochasticDepth(rate)
        self.leave_norm = nn.LayerNorm(other, eps=config.norm_eps)
        self.leave_proj = nn.Linear(other, dim)

    def forward(self, class_token: Tensor, patches: Tensor) -> Tensor:
        """The class token (z, 1, d) after reading the patches (z, p, d) of the other branch."""
        query = self.enter_proj(F.gelu(self.enter_norm(class_token)))
        query = self.residual(query, self._read, patches)
        return self.leave_proj(F.gelu(self.leave_norm(query)))

    def _read(self, query: Tensor, patches: Tensor) -> Tensor:
        tokens = self.attention_norm(torch.cat((query, patches), 1))
        return self.attention(tokens[:, :1], tokens)


class MultiScaleEncoder(nn.Module):
    """The layers of each branch, then a fusion both ways."""

    def __init__(self, config: CrossViTConfig, rates: list[float]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.ModuleList(Block(config, branch, rates[layer]) for layer in range(config.layers[branch])) for branch in (0, 1)
        )
        self.fusions = nn.ModuleList(Fusion(config, branch, rates[-1]) for branch in (0, 1))

    def forward(self, class_tokens: list[Tensor], patches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Class tokens (z, 1, d) and patches (z, p, d) of both branches, a layer stack and a fusion later."""
        class_tokens, patches = list(class_tokens), list(patches)
        for branch, layers in enumerate(self.branches):
            x = torch.cat((class_tokens[branch], patches[branch]), 1)
            for layer in layers:
                x = layer(x)
            class_tokens[branch], patches[branch] = x.split((1, x.shape[1] - 1), 1)
        fused = [fusion(class_tokens[branch], patches[1 - branch]) for branch, fusion in enumerate(self.fusions)]
        return fused, patches


class PatchEmbedding(nn.Sequential):
    """Patches of an image as vectors: one linear map, or three convolutions with a ReLU after each but the last.

    Source: Chen et al. 2021, sections 3.1 and 4.1 (the dagger: convolutions as in Graham et al. 2021 and others).
    """

    def __init__(self, config: CrossViTConfig, branch: int) -> None:
        patch, dim = config.patch_sizes[branch], config.dims[branch]
        if config.stem == "linear":
            super().__init__(nn.Conv2d(config.channels, dim, patch, patch))
            return
        widths = (config.channels, dim // 4, dim // 2, dim)
        parts: list[nn.Module] = []
        for number, (kernel, stride, padding) in enumerate(CONVOLUTIONS[patch]):
            parts += [nn.Conv2d(widths[number], widths[number + 1], kernel, stride, padding), nn.ReLU()]
        super().__init__(*parts[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """Patches (z, p, d) of images (z, c, H, W), row by row."""
        return super().forward(images).flatten(2).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------ model


class CrossViT(Pretrained, nn.Module):
    """A vision transformer of two branches that exchange what they see through their class tokens.

    class token, patches <- embedding of a branch's image + positions
    encoder, K times:       the branch's layers on [class token; patches], then a fusion of both class tokens
    logits                = mean over the branches of (norm(class token) W + b)

    Args:
        config: its sizes; `crossvit_9_240()` and its like give those of the paper.

    Raises:
        TypeError: `config` is no `CrossViTConfig`.

    Cost: the layers of the large branch are most of it; a fusion takes about 2 h p d multiply-adds for its p patches, where
        projecting them would take 2 p d d.
    Source: Chen et al. 2021, arXiv:2103.14899.

    Example:
        >>> config = CrossViTConfig(classes=5, image_size=48, scales=(1.0, 1.0), patch_sizes=(6, 12), dims=(16, 32), heads=(2, 2))
        >>> CrossViT(config)(torch.randn(2, 3, 48, 48)).shape
        torch.Size([2, 5])
    """

    family: ClassVar[str] = "crossvit"
    config_class: ClassVar[type] = CrossViTConfig
    made_for_data: ClassVar[Mapping[str, str]] = MappingProxyType({"classes": "heads"})

    def __init__(self, config: CrossViTConfig) -> None:
        super().__init__()
        if not isinstance(config, CrossViTConfig):
            raise TypeError(f"CrossViT expects a CrossViTConfig, got {type(config).__name__}")
        self.config = config
        self.embeddings = nn.ModuleList(PatchEmbedding(config, branch) for branch in (0, 1))
        self.class_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, dim)) for dim in config.dims)
        self.positions = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 1 + rows * columns, dim))
            for (rows, columns), dim in zip(config.grids, config.dims, strict=True)
        )
        self.encoders = nn.ModuleList(MultiScaleEncoder(config, rates) for rates in config.depth_rates())
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=config.norm_eps) for dim in config.dims)
        self.heads = nn.ModuleList(nn.Linear(dim, config.classes) for dim in config.dims)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Truncated-normal weights of standard deviation 0.02, zero biases; convolutions as torch has them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
        for parameter in (*self.class_tokens, *self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images: the mean of both branches'.

        Args:
            images: (z, c, H, W) of the size the model was built for, normalised as in training.

        Returns:
            (z, classes).

        Raises:
            ValueError: images of another size, number of channels or dtype.
            TypeError: `images` is no tensor.
        """
        small, large = self.branch_logits(images)
        return (small + large) / 2

    def branch_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (z, classes) of the small-patch and of the large-patch branch; arguments and errors as of `forward`."""
        small, large = (head(token) for head, token in zip(self.heads, self.class_states(images), strict=True))
        return small, large

    def class_states(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised class tokens (z, d) of both branches, which the heads read; arguments and errors as of `forward`."""
        self._check(images)
        class_tokens, patches = [], []
        for branch, embedding in enumerate(self.embeddings):
            positions = self.positions[branch]
            seen = resize_bicubic(images, self.config.branch_sizes[branch])
            class_tokens.append((self.class_tokens[branch] + positions[:, :1]).expand(images.shape[0], -1, -1))
            patches.append(embedding(seen) + positions[:, 1:])
        for encoder in self.encoders:
            class_tokens, patches = encoder(class_tokens, patches)
        small, large = (norm(token[:, 0]) for norm, token in zip(self.norms, class_tokens, strict=True))
        return small, large

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor (batch, channels, height, width), got {type(images).__name__}")
        wanted = (self.config.channels, *self.config.image_size)  # type: ignore[misc]
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f"images must be (batch, {', '.join(map(str, wanted))}) as this model was built for, got shape "
                f"{tuple(images.shape)}; resize them, or build the model with another image_size or channels"
            )
        dtype = self.positions[0].dtype
        if images.dtype != dtype and not (images.is_floating_point() and torch.is_autocast_enabled(images.device.type)):
            raise ValueError(
                f"images are {images.dtype} but the model's weights are {dtype}; convert one, or run under torch.autocast"
            )
