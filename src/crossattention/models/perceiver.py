"""Perceiver IO (Jaegle et al. 2021): a few latents read an input of any length, work among themselves, and are read by queries.

    encode    latents <- cross(latents, input rows)                       one cross-attention
    process   latents <- self(latents)                                    L layers, the same block of them several times
    decode    outputs <- cross(output queries, latents)                   one cross-attention

    cross(q, b):  x = attention(norm(q), norm(b)) (+ q);   x + MLP(norm(x)),   MLP = linear, GELU, linear

Inputs of all kinds come as rows, and output queries as rows (`perceiver_adapters`). What depends on weights alone is computed once
and kept while they are unchanged (`attention.once`): Fourier features, the position part of keys and values, projections of the
latents and of learned output queries. With gradients it is made at each call, so that they flow.

The position part: a row y = features + positions, or [features, positions], enters through a norm, and the norm's mean and
deviation d(y) are all that couples the two. With the norm's gain g and shift s, and W' = (W g) made orthogonal to ones,

    norm(y) W^T = (features W1'^T + positions W2'^T) / d(y) + s W^T

so positions W2'^T is kept, and of text features W1'^T is too: the whole vocabulary, projected.

The model follows `transformers` 5 (`PerceiverForMaskedLM` and its relatives), whose published weights it reads. Where that differs
from DeepMind's code (deepmind-research/perceiver, in JAX):

1. GELU is exact there and a tanh approximation in JAX (`activation="gelu_tanh"`).
2. The stem of the ImageNet-conv model pools without padding, which gives 55 x 55 rows instead of 56 x 56, and pads its convolution
   evenly (`ImageInput(padding="same")` is DeepMind's).
3. The ImageNet-learned classifier adds its query to what it reads; DeepMind's does not (`ClassOutput(query_residual=False)`).
4. A mask of output queries is accepted and ignored there; DeepMind's zeroes what masked queries read. Here there is none: ask for
   the outputs that are wanted.
5. An input that is masked wholly is averaged there; DeepMind's reads zero, and so does this model.
6. Attention weights are dropped with probability 0.1 in training by default there; DeepMind's are not, and here 0 is the default.
   The configuration's `layer_norm_eps` is unused there: norms add 1e-5, as in JAX.
7. A subset of output positions of the video model stands at -1 + 2 i / n, in both codes, all positions of a full decode between -1
   and 1 with both ends. In transformers a full decode of the video model fails. Here each stands at -1 + 2 i / n always, so that a
   subset equals the same rows of a full decode.
8. A masked-language model there decodes all positions whatever the input's length; here too, unless `outputs` says which.

Legend: z batch, m input rows, n latents, k output queries, d width of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from crossattention.attention.checks import check_switches
from crossattention.attention.cross_attention import CrossAttention
from crossattention.attention.once import Once
from crossattention.attention.prepared import PreparedContext, PreparedQueries
from crossattention.attention.products import linear
from crossattention.attention.self_attention import SelfAttention
from crossattention.layers.feed_forward import FeedForward
from crossattention.models.perceiver_adapters import (
    INPUTS,
    OUTPUTS,
    BatchNorm,
    ClassOutput,
    FlowInput,
    FlowOutput,
    Grid,
    ImageInput,
    InputConfig,
    Mixture,
    OutputConfig,
    Parts,
    Question,
    Rows,
    TextInput,
    TokenOutput,
    Tokens,
    VideoInput,
    VideoOutput,
    config_of,
    make_input,
    make_output,
)
from crossattention.models.pretrained import Pretrained

BLOCK_QUERIES = 16_384
"""Output queries, of all items together, that are decoded at once without gradients."""

# ------------------------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class PerceiverIOConfig:
    """Sizes and choices of a `PerceiverIO`; the defaults are the paper's language model on bytes.

    Args:
        inputs: what the input is, one of `TextInput`, `ImageInput`, `FlowInput`, `VideoInput`.
        outputs: what is predicted, one of `TokenOutput`, `ClassOutput`, `FlowOutput`, `VideoOutput`.
        num_latents: number of latents, n.
        latent_dim: width of a latent, d.
        blocks: how many times the block of self-attention layers is applied, with the same weights.
        layers_per_block: self-attention layers of the block.
        cross_heads: heads of the encoder's cross-attention.
        self_heads: heads of the self-attention.
        qk_dim: width of queries and keys, all heads together; default the latents' in self-attention, and in the encoder what
            `cross_width` says.
        value_dim: width of values likewise; default `qk_dim`. In self-attention it must be the latents'.
        cross_width: default width of the encoder's queries and keys: "kv" that of the input's rows, "q" that of the latents.
        cross_widening: width inside the encoder's MLP, in widths of a latent.
        self_widening: the same of the self-attention layers.
        query_residual: whether the encoder adds the latents to what they read.
        activation: "gelu", or "gelu_tanh", its approximation by tanh.
        attention_dropout: probability of dropping an attention weight in training.
        norm_eps: added to the variance in each norm.

    Raises:
        ValueError: a size below 1, heads that do not divide, an unknown choice, an output that the input has nothing for.
        TypeError: a number or a truth value of another kind.
    """

    inputs: InputConfig = field(default_factory=TextInput)
    outputs: OutputConfig = field(default_factory=TokenOutput)
    num_latents: int = 256
    latent_dim: int = 1280
    blocks: int = 1
    layers_per_block: int = 26
    cross_heads: int = 8
    self_heads: int = 8
    qk_dim: int | None = None
    value_dim: int | None = None
    cross_width: Literal["kv", "q"] = "kv"
    cross_widening: int = 1
    self_widening: int = 1
    query_residual: bool = True
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    attention_dropout: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", config_of("inputs", self.inputs, INPUTS))
        object.__setattr__(self, "outputs", config_of("outputs", self.outputs, OUTPUTS))
        for name in (f.name for f in fields(self) if f.type in ("int", "int | None")):
            value = getattr(self, name)
            if value is None and name in ("qk_dim", "value_dim"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name, choices in (("cross_width", ("kv", "q")), ("activation", ("gelu", "gelu_tanh"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        check_switches(self)
        if (self.value_dim or self.qk_dim or self.latent_dim) != self.latent_dim:
            raise ValueError(
                f"values of the self-attention must be as wide as a latent, got value_dim={self.value_dim} and "
                f"qk_dim={self.qk_dim} for latent_dim={self.latent_dim}; pass value_dim={self.latent_dim}"
            )


def language(vocab_size: int = 262, dim: int = 768, max_length: int = 2048, **changes: Any) -> PerceiverIOConfig:
    """The masked-language model on UTF-8 bytes: 201.1 M parameters (the paper says 201 M).

    Args:
        vocab_size: number of symbols.
        dim: width of an embedding.
        max_length: positions of input and output.
        changes: fields of `PerceiverIOConfig` that shall differ.

    Source: Jaegle et al. 2021, section 4.1, table 5; `deepmind/language-perceiver`.
    """
    given = {
        "inputs": TextInput(vocab_size, dim, max_length),
        "outputs": TokenOutput(max_length),
        "qk_dim": 256,
        "value_dim": changes.get("latent_dim", 1280),
    }
    return PerceiverIOConfig(**{**given, **changes})


def _imagenet(inputs: ImageInput, changes: dict[str, Any]) -> PerceiverIOConfig:
    given = {
        "inputs": inputs,
        "outputs": ClassOutput(1000),
        "num_latents": 512,
        "latent_dim": 1024,
        "blocks": 8,
        "layers_per_block": 6,
        "cross_heads": 1,
    }
    return PerceiverIOConfig(**{**given, **changes})


def imagenet_learned(**changes: Any) -> PerceiverIOConfig:
    """The ImageNet classifier with learned positions: 62.3 M parameters, as in the paper; `deepmind/vision-perceiver-learned`."""
    return _imagenet(ImageInput(stem="conv1x1", stem_dim=256, positions="learned"), changes)


def imagenet_fourier(**changes: Any) -> PerceiverIOConfig:
    """The ImageNet classifier with Fourier features: 48.4 M parameters, as in the paper; `deepmind/vision-perceiver-fourier`."""
    return _imagenet(ImageInput(), changes)


def imagenet_conv(**changes: Any) -> PerceiverIOConfig:
    """The ImageNet classifier with a convolutional stem: 48.6 M parameters, as in the paper; `deepmind/vision-perceiver-conv`."""
    return _imagenet(ImageInput(stem="conv"), changes)


def optical_flow(size: tuple[int, int] = (368, 496), **changes: Any) -> PerceiverIOConfig:
    """Optical flow between two frames: 41.1 M parameters (the paper says 27.9 M); `deepmind/optical-flow-perceiver`.

    Args:
        size: height and width of the frames.
        changes: fields of `PerceiverIOConfig` that shall differ.
    """
    given = {
        "inputs": FlowInput(size),
        "outputs": FlowOutput(),
        "num_latents": 2048,
        "latent_dim": 512,
        "layers_per_block": 24,
        "cross_heads": 1,
        "self_heads": 16,
    }
    return PerceiverIOConfig(**{**given, **changes})


def multimodal(**changes: Any) -> PerceiverIOConfig:
    """Autoencoding of video, sound and label: 19.9 M parameters (the paper says 20.0 M); `deepmind/multimodal-perceiver`."""
    given = {
        "inputs": VideoInput(),
        "outputs": VideoOutput(),
        "num_latents": 784,
        "latent_dim": 512,
        "layers_per_block": 8,
        "cross_heads": 1,
    }
    return PerceiverIOConfig(**{**given, **changes})


# ----------------------------------------------------------------------------------------------------------- layers


def _feed_forward(dim: int, widening: int, config: PerceiverIOConfig) -> FeedForward:
    activation: str | nn.Module = "gelu" if config.activation == "gelu" else nn.GELU(approximate="tanh")
    return FeedForward(dim, widening * dim, activation=activation)


def _head_width(name: str, width: int, heads: int) -> int:
    if width % heads:
        raise ValueError(f"{name} must be a multiple of its {heads} heads, got {width}")
    return width // heads


class CrossLayer(nn.Module):
    """Queries read rows, then an MLP: x = attention(norm(q), norm(b)) (+ q); x + MLP(norm(x)).

    `read` and `ask` prepare both sides, `forward` brings them together: learned queries are asked once, and blocks of output
    queries read one prepared context.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        config: PerceiverIOConfig,
        *,
        heads: int,
        qk_dim: int,
        value_dim: int,
        widening: int = 1,
        query_residual: bool,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(query_dim, eps=config.norm_eps)
        self.context_norm = nn.LayerNorm(context_dim, eps=config.norm_eps)
        self.attention = CrossAttention(
            query_dim,
            context_dim,
            heads=heads,
            head_dim=_head_width("width of queries and keys", qk_dim, heads),
            value_head_dim=_head_width("width of values", value_dim, heads),
            dropout=config.attention_dropout,
        )
        self.norm = nn.LayerNorm(query_dim, eps=config.norm_eps)
        self.feed_forward = _feed_forward(query_dim, widening, config)
        self.query_residual = query_residual
        self._asked: Once[PreparedQueries] = Once()
        self._parts: Once[tuple[Parts, Tensor]] = Once()

    def forward(self, queries: Tensor, asked: Tensor | PreparedQueries, prepared: PreparedContext) -> Tensor:
        """(z, k, query_dim) of queries (k, query_dim) or (z, k, query_dim), what was asked with them, and what is read."""
        x = self.attention.attend(asked, prepared)
        if self.query_residual:
            x = x + queries
        return x + self.feed_forward(self.norm(x))

    def ask_learned(self, queries: Tensor, space: Any) -> PreparedQueries:
        """What learned queries (k, query_dim) ask in a meeting space: made once."""
        made_of = [queries, *self.query_norm.parameters(), *self.attention.q_proj.parameters()]
        if space == "context":
            made_of += self.attention.k_proj.parameters()
        return self._asked.get(made_of, lambda: self.attention.prepare_queries(self.query_norm(queries), space=space), space)

    def read(self, rows: Rows, mask: Tensor | None, query_length: int) -> PreparedContext:
        """Input rows, to be read once by learned queries: as they are, or projected part by part."""
        attention = self.attention
        # One text's parts are more rows than the text, where they are made anew for their gradients.
        is_one_text = isinstance(rows, Tokens) and rows.ids.shape[0] == 1 and torch.is_grad_enabled()
        if isinstance(rows, Mixture) or is_one_text or not self._projects(attention.k_proj.weight.device.type):
            context = self.context_norm(rows.joined())
            plan = self._plan_of_rows(context, query_length)
            return attention.prepare(context, context_mask=mask, query_length=query_length, uses=1, shares_queries=True, plan=plan)
        weights = (attention.k_proj.weight, attention.k_proj.bias, attention.v_proj.weight, attention.v_proj.bias)
        made_of = (*weights, self.context_norm.weight, self.context_norm.bias, *rows.made_of())
        parts, shift = self._parts.get(made_of, lambda: self._make_parts(rows))
        projected, deviation = rows.project(parts), rows.deviation(self.context_norm.eps, parts)
        if projected.requires_grad or torch.compiler.is_compiling():
            projected = projected / deviation + shift
        else:  # a long input's keys and values are the largest tensors there are: none is made twice
            projected.div_(deviation).add_(shift)
        keys, values = projected.to(weights[0].dtype).split((weights[0].shape[0], weights[2].shape[0]), -1)
        return attention.prepare_projected(keys, values, context_mask=mask)

    def _keeps_rows(self) -> bool:
        """Whether scores and values of the rows themselves take no more products than those of keys and values.

        So it is with one head as wide as a row, as in all published encoders but the language model's: the rows are then read as
        they are, and neither keys nor values are made or held.
        """
        layer = self.attention
        is_plain = all(type(p) is nn.Linear for p in (layer.k_proj, layer.v_proj))
        return is_plain and 2 * layer.heads * layer.context_dim <= layer.kv_heads * (layer.head_dim + layer.value_head_dim)

    def _projects(self, device: str) -> bool:
        """Whether keys and values are made of parts: by the textbook's plan, where reading the rows themselves is no cheaper."""
        plan = self.attention.plan
        is_textbook = plan == "textbook" or (not isinstance(plan, str) and plan.is_textbook)
        is_plain = all(type(p) is nn.Linear for p in (self.attention.k_proj, self.attention.v_proj))
        chosen = is_textbook or (plan == "auto" and not self._keeps_rows())
        return chosen and is_plain and not torch.is_autocast_enabled(device)

    def _plan_of_rows(self, context: Tensor, query_length: int) -> Any:
        """The plan that reads the rows themselves, where that is the cheapest way; None leaves the choice to the layer."""
        layer = self.attention
        if layer.plan != "auto" or not self._keeps_rows() or layer.forbidden():
            return None
        shape = tuple(context.shape)
        return layer.plan_between("context", "context", (query_length, layer.query_dim), shape, trains=torch.is_grad_enabled())

    def _make_parts(self, rows: Tokens | Grid) -> tuple[Parts, Tensor]:
        """What the projections of keys and values make of weights alone, and what they add to every row; float32 at least."""
        k_proj, v_proj, norm = self.attention.k_proj, self.attention.v_proj, self.context_norm
        dtype = torch.promote_types(k_proj.weight.dtype, torch.float32)
        weight, bias = torch.cat((k_proj.weight, v_proj.weight)).to(dtype), torch.cat((k_proj.bias, v_proj.bias)).to(dtype)
        shift = linear(norm.bias.to(dtype), weight, bias)
        weight = weight * norm.weight.to(dtype)
        return rows.parts(weight - weight.mean(-1, keepdim=True)), shift


class SelfLayer(nn.Module):
    """Latents read each other, then an MLP: x = x + attention(norm(x)); x + MLP(norm(x))."""

    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__()
        dim = config.latent_dim
        self.attention_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attention = SelfAttention(
            dim,
            heads=config.self_heads,
            head_dim=_head_width("qk_dim", config.qk_dim or dim, config.self_heads),
            value_head_dim=_head_width("value_dim", dim, config.self_heads),
            dropout=config.attention_dropout,
        )
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.feed_forward = _feed_forward(dim, config.self_widening, config)

    def forward(self, x: Tensor) -> Tensor:
        """One layer on latents (z, n, d)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.norm(x))


# ------------------------------------------------------------------------------------------------------------ model


class PerceiverIO(Pretrained, nn.Module):
    """Perceiver IO: any input, any output, by way of a few latents.

    latents = process(encode(latents, rows of the input)),   outputs = decode(output queries, latents)

    Args:
        config: sizes and choices; `language()`, `imagenet_learned()`, `imagenet_fourier()`, `imagenet_conv()`, `optical_flow()` and
            `multimodal()` are those of the published models.
        device: device of the weights.
        dtype: dtype of the weights.

    Source: Jaegle et al. 2021, arXiv:2107.14795, section 3.

    Example:
        >>> model = PerceiverIO(language(20, 16, 12, num_latents=3, latent_dim=32, layers_per_block=2, qk_dim=16))
        >>> ids = torch.randint(20, (2, 9))
        >>> model(ids).shape
        torch.Size([2, 12, 20])
        >>> model(ids, outputs=torch.tensor([4, 7])).shape  # two of the twelve output queries
        torch.Size([2, 2, 20])
        >>> latents = model.encode(ids)
        >>> model.decode(latents, torch.tensor([[4, 7], [1, 2]])).shape  # others for each item
        torch.Size([2, 2, 20])
    """

    family: ClassVar[str] = "perceiver"
    config_class: ClassVar[type] = PerceiverIOConfig

    def __init__(
        self, config: PerceiverIOConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.inputs = make_input(config.inputs)
        self.outputs = make_output(config.outputs, config.inputs, self.inputs.dim, config.latent_dim)
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.latent_dim))
        qk_dim = config.qk_dim or (self.inputs.dim if config.cross_width == "kv" else config.latent_dim)
        self.encoder = CrossLayer(
            config.latent_dim,
            self.inputs.dim,
            config,
            heads=config.cross_heads,
            qk_dim=qk_dim,
            value_dim=config.value_dim or qk_dim,
            widening=config.cross_widening,
            query_residual=config.query_residual,
        )
        self.layers = nn.ModuleList(SelfLayer(config) for _ in range(config.layers_per_block))
        self.decoder = CrossLayer(
            self.outputs.query_dim,
            config.latent_dim,
            config,
            heads=self.outputs.heads,
            qk_dim=self.outputs.qk_dim,
            value_dim=self.outputs.value_dim,
            query_residual=self.outputs.query_residual,
        )
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew. The whole policy stands here.

        latents, embeddings, learned positions and queries,      normal, deviation 0.02
        what fills rows up
        matrices                                                 normal, deviation 1/sqrt(inputs)
        convolution                                              PyTorch's
        biases                                                   0
        norms                                                    weight 1, bias 0

        Source: DeepMind's code, whose normals are truncated at two deviations.
        """
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | BatchNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                module.reset_parameters()
        if hasattr(self.outputs, "bias"):
            nn.init.zeros_(self.outputs.bias)

    def forward(
        self,
        inputs: Tensor | Mapping[str, Tensor],
        mask: Tensor | None = None,
        *,
        outputs: Tensor | Mapping[str, Tensor | None] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """What the model predicts of a batch: `decode(encode(inputs, mask), outputs)`.

        Args:
            inputs: ids (z, m); images (z, channels, H, W); two frames (z, 2, channels, H, W) or the patches around their pixels; or
                a dictionary of audio (z, samples, 1), image (z, frames, channels, H, W) and label (z, labels).
            mask: bool (z, m), True = may be read, over the input's rows: ids, pixels in order, or audio, image and label patches.
                Latents that may read nothing read zero.
            outputs: which output queries; all if not given. Indices (k,), or (z, k), others for each item; of text also a mask
                (z, up to all), True = wanted; of video a dictionary of such by kind, None for all of a kind, kinds that are not
                named left away.

        Returns:
            Logits (z, k, vocabulary), or (number of True, vocabulary) for a mask; logits (z, classes); flow (z, H, W, 2), or
            (z, k, 2) of some pixels; or a dictionary of audio (z, samples), image (z, T, H, W, channels) or (z, k, channels), and
            label logits (z, labels). A subset equals the same rows of a full decode.

        Raises:
            ValueError: inputs, a mask or outputs of a wrong shape or dtype, indices out of range.
            TypeError: a mask that is not bool, outputs that are no tensor.

        Cost: m reads of n latents, blocks x layers_per_block layers of n latents, k reads of n latents. Without gradients the
            decoder holds `BLOCK_QUERIES` queries at a time; with them its memory grows with k, so train on a subset.
        """
        rows = self._rows_of(inputs)
        return self._decode(self._encode(rows, mask), outputs, rows)

    def encode(self, inputs: Tensor | Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """The latents (z, n, d) after the last layer; Args and Raises as in `forward`."""
        return self._encode(self._rows_of(inputs), mask)

    def decode(
        self,
        latents: Tensor,
        outputs: Tensor | Mapping[str, Tensor | None] | None = None,
        *,
        inputs: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """What output queries read of latents.

        Args:
            latents: what `encode` returned, (z, n, d).
            outputs: which output queries, as in `forward`.
            inputs: the frames, for optical flow alone, whose output queries are made of them.

        Returns:
            As `forward`.

        Raises:
            ValueError: as `forward`; also inputs that are missing, or that nothing is made of.
        """
        needs = isinstance(self.config.outputs, FlowOutput)
        if needs != (inputs is not None):
            raise ValueError(
                "output queries of optical flow are made of the frames; pass decode(latents, inputs=frames)"
                if needs
                else "output queries of this model are not made of its inputs, which would be ignored; call decode(latents)"
            )
        if not isinstance(latents, Tensor) or latents.dim() != 3 or latents.shape[-1] != self.config.latent_dim:
            given = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents must be (batch, latents, {self.config.latent_dim}), got {given}")
        self._check_dtype("latents", latents)
        return self._decode(latents, outputs, None if inputs is None else self._rows_of(inputs))

    def _rows_of(self, inputs: Any) -> Rows:
        """The rows of an input; one of numbers is refused in another dtype than the weights'."""
        if isinstance(inputs, Tensor) and not isinstance(self.config.inputs, TextInput):
            self._check_dtype("inputs", inputs)
        made: Rows = self.inputs(inputs)  # here what has the wrong shape, or is no tensor, is refused
        if isinstance(inputs, Mapping):
            for kind, given in inputs.items():
                self._check_dtype(f'inputs["{kind}"]', given)
        return made

    def _check_dtype(self, name: str, given: Tensor) -> None:
        wanted = self.latents.dtype
        if given.dtype != wanted and not (given.is_floating_point() and torch.is_autocast_enabled(given.device.type)):
            raise ValueError(
                f"{name} are {given.dtype} but the model's weights are {wanted}; convert one, or run under torch.autocast"
            )

    def _encode(self, rows: Rows, mask: Tensor | None) -> Tensor:
        prepared = self.encoder.read(rows, mask, self.config.num_latents)
        latents = self.encoder(self.latents, self.encoder.ask_learned(self.latents, prepared.plan.scores), prepared)
        for _ in range(self.config.blocks):
            for layer in self.layers:
                latents = layer(latents)
        return latents

    def _decode(self, latents: Tensor, outputs: Any, rows: Rows | None) -> Tensor | dict[str, Tensor]:
        if isinstance(outputs, Tensor):
            outputs = outputs.to(latents.device)
        elif isinstance(outputs, dict):
            outputs = {kind: some.to(latents.device) if isinstance(some, Tensor) else some for kind, some in outputs.items()}
        questions: list[Question] = self.outputs.ask(outputs, rows, latents.shape[0])
        context = self.decoder.context_norm(latents)
        answers = {question.name: self._answer(question, context) for question in questions}
        return self.outputs.answer(answers, outputs)

    def _answer(self, question: Question, context: Tensor) -> Tensor:
        """What the queries of a question read of normalised latents (z, n, d): in blocks, where no gradient will be asked for."""
        decoder, count = self.decoder, question.count
        # An exported graph has no blocks: their number would depend on the batch, and tie the graph to batches up to some size.
        is_whole = torch.is_grad_enabled() or torch.compiler.is_exporting()
        block = max(1, count if is_whole else BLOCK_QUERIES // max(1, context.shape[0]))
        prepared = decoder.attention.prepare(
            context,
            query_length=min(block, count),
            uses=max(1, -(-count // block)),
            shares_queries=question.learned is not None,
        )
        rows_of = self._learned_rows if question.learned is not None else self._made_rows
        if count <= block:
            return self._read(question, rows_of(question, slice(0, count), prepared), prepared)
        answer = None
        for start in range(0, count, block):
            some = slice(start, min(start + block, count))
            part = self._read(question, rows_of(question, some, prepared), prepared)
            if answer is None:
                answer = part.new_empty(part.shape[0], count, part.shape[2])
            answer[:, some] = part
        assert answer is not None
        return answer

    def _read(self, question: Question, asks: tuple[Tensor, Tensor | PreparedQueries], prepared: PreparedContext) -> Tensor:
        return self.outputs.finish(question.name, self.decoder(*asks, prepared), self.inputs)

    def _learned_rows(self, question: Question, some: slice, prepared: PreparedContext) -> tuple[Tensor, Tensor | PreparedQueries]:
        """Learned queries and what they ask; projected once, or as many as are wanted where gradients flow."""
        queries, where = question.learned, question.where
        assert queries is not None
        if where is not None:
            where = where[..., some]
        elif some.stop - some.start < question.length:
            where = torch.arange(some.start, some.stop, device=queries.device)
        if where is None:
            return queries, self.decoder.ask_learned(queries, prepared.plan.scores)
        if torch.is_grad_enabled():
            return queries[where], self.decoder.query_norm(queries[where])
        raw = queries[where] if self.decoder.query_residual else queries
        return raw, self.decoder.ask_learned(queries, prepared.plan.scores).select(where)

    def _made_rows(self, question: Question, some: slice, prepared: PreparedContext) -> tuple[Tensor, Tensor]:
        """Queries that are made of positions or inputs, and what they ask."""
        device = prepared.keys.device
        where = torch.arange(some.start, some.stop, device=device) if question.where is None else question.where[..., some]
        make: Callable[[Tensor], Tensor] = question.make
        rows = make(where)
        return rows, self.decoder.query_norm(rows)
