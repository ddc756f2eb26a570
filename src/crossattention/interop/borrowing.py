"""Our layer over the weights of somebody else's module: nothing is copied, so nothing goes stale, and gradients reach the owner.

A projection that is a module of its own is used as it is, hooks included. Weights that lie packed in one matrix are taken as views,
anew at each call: between two calls they may have been moved, cast, trained or replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from crossattention.attention import CrossAttention, QueryKeyNorm
from crossattention.attention.products import is_plain_linear, is_watched

Weights = Mapping[str, tuple[Tensor, Tensor | None]]
"""Weight and bias by the name of our projection."""


@dataclass(frozen=True)
class Borrowing:
    """What our layer needs to know of a module, to compute with its weights.

    Args:
        query_dim: width of the queries, a.
        context_dim: width of what keys are made of, b.
        heads: h.
        head_dim: k.
        out_dim: width of the output, o; default `query_dim`.
        value_context_dim: width of what values are made of, where it is another one; default `context_dim`.
        value_head_dim: v; default `head_dim`.
        kv_heads: g; default `heads`. Query head i reads key-value head i // (h / g).
        scale: factor of the scores; default head_dim ** -0.5.
        projections: gives the modules that are used as they are, by the name of our projection: "q_proj", "k_proj", "v_proj",
            "out_proj"; asked at each call, as adapters and quantisation put others in their places.
        lend: gives weight and bias of the other projections; called at each call, in the mode that the call runs in.
        sources: gives the parameters that `lend` gives views of: what is kept of a context is stale after they changed.
        forget_lent: drops what `lend` keeps.
        qk_norm: what stands between projections and scores.
    """

    query_dim: int
    context_dim: int
    heads: int
    head_dim: int
    out_dim: int | None = None
    value_context_dim: int | None = None
    value_head_dim: int | None = None
    kv_heads: int | None = None
    scale: float | None = None
    projections: Callable[[], Mapping[str, nn.Module]] = dict
    lend: Callable[[], Weights] | None = None
    sources: Callable[[], Sequence[Tensor | None]] | None = None
    forget_lent: Callable[[], None] | None = None
    qk_norm: QueryKeyNorm | None = None

    def __post_init__(self) -> None:
        self.__dict__["_local"] = threading.local()

    def layers(self) -> tuple[CrossAttention, CrossAttention]:
        """The layer for keys and the one for values, the same unless their contexts differ in width, with the weights of now.

        A thread has layers of its own: another one may run without gradients while this one builds a graph.
        """
        local = self.__dict__["_local"]
        layers: tuple[CrossAttention, CrossAttention] | None = getattr(local, "layers", None)
        if layers is None:
            first = self._build(self.context_dim)
            same = self.value_context_dim is None or self.value_context_dim == self.context_dim
            layers = local.layers = (first, first if same else self._build(self.value_context_dim or 0, first))
        modules = layers[0]._modules
        for name, module in self.projections().items():
            if modules[name] is not module:
                for layer in layers:
                    layer._modules[name] = module
        if self.lend is not None:
            for name, (weight, bias) in self.lend().items():
                held = modules[name]._parameters  # type: ignore[union-attr]
                held["weight"], held["bias"] = weight, bias  # type: ignore[assignment]
        return layers

    def forget(self) -> None:
        """Drop the layers of all threads, and the weights that were lent to them: they may be those from before a loading."""
        self.__dict__["_local"] = threading.local()
        if self.forget_lent is not None:
            self.forget_lent()

    def weights(self) -> list[Tensor]:
        """Every parameter that the layer computes with, the owner's own objects."""
        found = [] if self.sources is None else [weight for weight in self.sources() if weight is not None]
        for module in self.projections().values():
            if type(module) is nn.Linear:
                found += [weight for weight in module._parameters.values() if weight is not None]
            else:
                found += module.parameters()
        if self.qk_norm is not None:
            found += self.qk_norm.parameters()
        return found

    def _build(self, context_dim: int, shares: CrossAttention | None = None) -> CrossAttention:
        """A layer on no device, which takes no memory and draws no numbers, with the module's projections in it."""
        layer = CrossAttention(
            self.query_dim,
            context_dim,
            heads=self.heads,
            head_dim=self.head_dim,
            value_head_dim=self.value_head_dim,
            out_dim=self.out_dim,
            kv_heads=self.kv_heads,
            scale=self.scale,
            device="meta",
        ).eval()
        if self.qk_norm is not None:
            layer.qk_norm = self.qk_norm
        given = self.projections() if shares is None else shares._modules
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            if name in given:
                layer._modules[name] = given[name]
        return layer

    def repeats_itself(self, *projections: nn.Module | None) -> bool:
        """Whether projections, and the norms after them, give the same again for the same weights: no hooks, no adapters."""
        norms = () if self.qk_norm is None else self.qk_norm.modules()
        return all(p is not None and is_plain_linear(p) for p in projections) and not any(is_watched(norm) for norm in norms)


def plain_weights(**projections: nn.Module | None) -> str | None:
    """Why the weights of these projections cannot be computed with, as quantised ones; None if they can."""
    for name, module in projections.items():
        for path, weight in () if module is None else module.named_parameters():
            why = plain_weight(f"{name}.{path}", weight)
            if why is not None:
                return why
    return None


def plain_weight(name: str, weight: Tensor | None) -> str | None:
    """Why a weight cannot be computed with; None if it can."""
    if weight is None:
        return None
    if type(weight) not in (Tensor, nn.Parameter):
        return f"{name} is a {type(weight).__name__}, of which only its own library knows how it multiplies"
    if not weight.is_floating_point():
        return f"{name} is {weight.dtype}, quantised, of which only its own module knows how it multiplies"
    return None


class Norms(QueryKeyNorm):
    """The owner's norms of each head's queries and keys, used as they are.

    Args:
        of_queries: takes (z, h, n, k); `nn.Identity` for none.
        of_keys: takes (z, g, m, k).
    """

    def __init__(self, of_queries: nn.Module | None, of_keys: nn.Module | None) -> None:
        super().__init__()
        self.of_queries = nn.Identity() if of_queries is None else of_queries
        self.of_keys = nn.Identity() if of_keys is None else of_keys

    def normalise_queries(self, queries: Tensor) -> Tensor:
        """Queries (z, h, n, k), normalised."""
        normalised: Tensor = self.of_queries(queries)
        return normalised

    def normalise_keys(self, keys: Tensor) -> Tensor:
        """Keys (z, g, m, k), normalised."""
        normalised: Tensor = self.of_keys(keys)
        return normalised
