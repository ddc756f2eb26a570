"""A picture that words read: a small encoder of patches, and a BERT decoder whose words attend to them.

What lives here: the encoder, and the two together as one model that answers a question about a picture. What does not: the
decoder itself (`bert`), words and pictures as files (`data`), training (`recipes.vqa`).

The decoder is BERT with cross-attention (`bert.BertDecoder`), not causal: every word knows the whole question before it reads the
picture. Each word gives an answer by BERT's own masked-word head, in words of its vocabulary, and the words' mean decides.
So each word has a reason to look, and a map of each word means something; of a decoder of which only one state is used, the other
words' attention in the last layer is never trained.

The patches do not attend to each other. Self-attention among them would carry the shape's features to patches of plain
background, and the words could then answer while they read those.

Legend: z batch, H W height and width in pixels, p side of a patch, m = (H / p) (W / p) patches, n words of the question, d width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crossattention.layers.feed_forward import FeedForward
from crossattention.models.bert import BertConfig, BertDecoder
from crossattention.models.pretrained import Pretrained


@dataclass(frozen=True)
class PictureReaderConfig:
    """Sizes of a `PictureReader`.

    Args:
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        channels: width of each convolution before the last; with the last, one halving of the picture each, so that a patch has
            2 ** (len(channels) + 1) pixels a side.
        decoder: the words' side; its `context_dim` is the width of the patches. As a dict, as it stands in a file, too.

    Raises:
        ValueError: a size below 1, a picture that is no whole number of patches, a decoder that reads nothing, is causal or has no
            head.
    """

    height: int = 64
    width: int = 64
    channels: tuple[int, ...] = (16, 32)
    decoder: BertConfig | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON gives a list
        if isinstance(self.decoder, dict):
            if unknown := sorted(set(self.decoder) - {field.name for field in fields(BertConfig)}):
                raise ValueError(f"the decoder has fields that BertConfig does not know: {', '.join(unknown)}")
            object.__setattr__(self, "decoder", BertConfig(**self.decoder))
        for name, value in (("height", self.height), ("width", self.width), *(("channels", width) for width in self.channels)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be integers of at least 1, got {value!r}")
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(
                f"a picture must be whole patches of {self.patch} x {self.patch} pixels, got {self.width} x {self.height}; "
                f"{len(self.channels)} channels before the last make patches of that size"
            )
        decoder = self.decoder
        if not isinstance(decoder, BertConfig) or decoder.context_dim is None or decoder.causal or not decoder.head:
            raise ValueError(f"decoder must be a BertConfig with a context_dim and a head, not causal, got {decoder!r}")

    @property
    def patch(self) -> int:
        """Pixels of a patch's side, p."""
        return int(2 ** (len(self.channels) + 1))

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom, and from left to right."""
        return self.height // self.patch, self.width // self.patch


class PatchEncoder(nn.Module):
    """States of a picture's patches, each of the pixels around it and of its place; patches do not attend to each other.

    x = norm(convolutions(picture) + places);   states = norm(x + feed_forward(x))

    Each convolution (3 x 3, stride 2) halves the picture, so a patch's state knows 7 (p = 4) or 15 (p = 8) pixels a side.
    """

    def __init__(self, config: PictureReaderConfig) -> None:
        super().__init__()
        dim = config.decoder.context_dim
        widths = (3, *config.channels, dim)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1), nn.GELU()]
        self.convolutions = nn.Sequential(*layers[:-1])
        self.places = nn.Parameter(torch.empty(config.grid[0] * config.grid[1], dim))
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, 4 * dim, activation="gelu")
        self.feed_forward_norm = nn.LayerNorm(dim)
        nn.init.normal_(self.places, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """States (z, m, d), row by row from the upper left patch, of images (z, 3, H, W) from -1 to 1."""
        x = self.norm(self.convolutions(images).flatten(2).transpose(1, 2) + self.places)
        return self.feed_forward_norm(x + self.feed_forward(x))


class PictureReader(Pretrained, nn.Module):
    """Answers a question about a picture: the words attend to the patches, each gives an answer, their mean decides.

    log p(answer) = mean over words of log softmax over V of decoder(words, patches(picture))

    Args:
        config: sizes.
        device: device of the weights.
        dtype: dtype of the weights.

    Cost: the convolutions', 9 / 4 H W times the product of both widths for the first and a quarter of the pixels for each next one;
        then the decoder's, whose cross-attention reads m patches.
    Source: the decoder: Devlin et al. 2019, arXiv:1810.04805, with cross-attention as in Rothe et al. 2020, arXiv:1907.12461; that
        each word answers is this project's (dev/LOG.md).

    Example:
        >>> sizes = {"dim": 16, "layers": 1, "heads": 2, "feed_forward_dim": 32, "context_dim": 16}
        >>> words = BertConfig(40, max_length=8, begin_id=1, end_id=2, **sizes)
        >>> model = PictureReader(PictureReaderConfig(height=16, width=32, decoder=words))
        >>> picture, question = torch.rand(2, 3, 16, 32) * 2 - 1, torch.randint(3, 40, (2, 5))
        >>> model(picture, question).shape  # an answer of each word
        torch.Size([2, 5, 40])
        >>> model.answer(picture, question, choices=[7, 9]).exp().sum(-1).shape
        torch.Size([2])
    """

    family: ClassVar[str] = "picture_reader"
    config_class: ClassVar[type] = PictureReaderConfig

    def __init__(
        self,
        config: PictureReaderConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = PatchEncoder(config)
        self.decoder = BertDecoder(config.decoder)
        self._reset_decoder()
        self.to(device=device, dtype=dtype)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each word answers.

        Args:
            images: (z, 3, H, W), from -1 to 1.
            ids: the questions' words, (z, n).
            mask: bool (z, n), True = a word; without it all are.

        Returns:
            Logits (z, n, V).

        Raises:
            ValueError: pictures of another size; what `BertDecoder` refuses.
        """
        return self.decoder(ids, self.encode(images), target_mask=mask)

    def encode(self, images: Tensor) -> Tensor:
        """States (z, m, c) of the patches of pictures (z, 3, H, W); Raises as `forward`."""
        expected = (3, self.config.height, self.config.width)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must be (batch, {', '.join(map(str, expected))}), got shape {tuple(images.shape)}")
        return self.encoder(images)

    def answer(self, images: Tensor, ids: Tensor, mask: Tensor | None = None, *, choices: Sequence[int]) -> Tensor:
        """The log-probability of each possible answer, (z, number of choices).

        The words' log-probabilities among the choices are averaged and normalised again.

        Args:
            images: as in `forward`.
            ids: as in `forward`.
            mask: as in `forward`.
            choices: the answers, as words of the vocabulary.

        Raises:
            ValueError: as `forward`; a question without a word.
        """
        logits = self(images, ids, mask)[..., list(choices)].log_softmax(-1)
        if mask is None:
            return logits.mean(1).log_softmax(-1)
        count = mask.sum(1, keepdim=True)
        if not bool(count.all()):
            raise ValueError("every question must have a word, got one whose mask is False everywhere")
        mean = logits.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1) / count
        return mean.log_softmax(-1)

    @torch.no_grad()
    def _reset_decoder(self) -> None:
        # A deviation of 0.02, BERT's, is made for widths of 768: at a width of 64 the attention begins even and learns late.
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(self.decoder.embeddings.words.weight, std=self.config.decoder.dim**-0.5)


def pixels(images: Tensor) -> Tensor:
    """Pictures as a model takes them, (z, 3, H, W) from -1 to 1, of bytes (z, H, W, 3)."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
