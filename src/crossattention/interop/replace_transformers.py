"""The cross-attention of Hugging Face's `transformers`, run by a plan with the module's own weights: its classes live only here.

A module is known by its class: those of one family have the same forward pass, under other names. A subclass of somebody else, or a
class that is not in the table, is left as it is. What `generate` keeps of a source is in `huggingface_generation`.

Legend: z batch, r rows (beams, samples) that read one source, n queries, m context length, h heads, g key-value heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.attention.cross_attention import PROJECTIONS, CrossAttention
from crossattention.attention.execute import split_heads
from crossattention.attention.parts import QueryKeyNorm
from crossattention.attention.prepared import UNCHECKED, PreparedContext
from crossattention.attention.products import is_watched as has_hooks
from crossattention.attention.products import project
from crossattention.interop.borrowing import Borrowing, plain_weights
from crossattention.interop.huggingface import attention_modules, bound_arguments, can_cross
from crossattention.interop.huggingface_families import (
    DETR,
    MLLAMA,
    PERCEIVER,
    QFORMER,
    T5,
    Family,
    Given,
    family_of,
    heads_of,
    known_modules,
    reads_itself,
)
from crossattention.interop.huggingface_generation import CACHES, Generations, Source
from crossattention.interop.huggingface_masks import Masks, weights_are_collected
from crossattention.interop.reader import Reader
from crossattention.interop.replacement import LeftAlone, Own, Replaceable, is_checking, is_watched, note_live
from crossattention.plan import TEXTBOOK

KERNELS = (None, "eager", "sdpa", "crossattention")
"""Values of `attn_implementation` whose masks are understood here; others make masks that only their own kernels read."""


STEP_SECONDS = 2e-4
"""What a step by a plan is to gain over the fused kernel of the module itself, whose step calls less Python."""

OWN_FORWARD = (
    "modules of transformers run their own forward where attention weights are asked for or recorded, where a hook on the module "
    "may read those that eager attention gives, while they train with "
    'attention dropout, with caches of a fixed size, and where attn_implementation is "sdpa" and no plan is estimated to be '
    "clearly quicker than that"
)


# --------------------------------------------------------------------------------------------------------- what is found


def find(model: nn.Module) -> Iterator[Replaceable | LeftAlone]:
    """Each cross-attention of a model's `transformers` modules that a plan can run, and those that none can, with the reason."""
    generations, masks = Generations(), Masks()
    names = {id(module): name for name, module in model.named_modules()}
    found = False
    for module in dict.fromkeys((*attention_modules(model), *known_modules(model))):
        if not can_cross(module) or reads_itself(module, names[id(module)]):
            continue
        family = family_of(module)
        why = _obstacle(module, family)
        if why is not None:
            yield LeftAlone(module, why)
            continue
        assert family is not None
        reader = ModuleReader(module, family, generations, masks)
        yield Replaceable(module, reader.run, (reader,), notes=(OWN_FORWARD,))
        found = True
    if found:
        yield from generations.replaceables(model)


def _obstacle(module: nn.Module, family: Family | None) -> str | None:
    """Why a module cannot be run by a plan; None where it can."""
    kind = type(module)
    if family is None:
        return f"{kind.__module__}.{kind.__name__} is no class whose forward pass is known here"
    if getattr(module, "is_causal", False) or getattr(module, "has_relative_attention_bias", False):
        return "it masks or weighs the context by positions"
    projections = {name: getattr(module, name, None) for name in family.projections if name}
    if not all(
        isinstance(module, nn.Module) and isinstance(getattr(module, "in_features", None), int) for module in projections.values()
    ):
        return f"its projections {', '.join(projections)} are not all linear layers"
    why = plain_weights(**projections)
    if why is not None:
        return why
    h, g, k, v = heads_of(module, family)
    widths = [projections[name].out_features for name in family.projections[:3]]
    if widths != [h * k, g * k, g * v]:
        return f"its projections give widths {widths}, its heads take {[h * k, g * k, g * v]}"
    return None


class _HeldNorms(QueryKeyNorm):
    """A module's own norms of queries and keys within heads."""

    def __init__(self, queries: nn.Module, keys: nn.Module) -> None:
        super().__init__()
        self.queries, self.keys = queries, keys

    def normalise_queries(self, queries: Tensor) -> Tensor:
        normalised: Tensor = self.queries(queries)
        return normalised

    def normalise_keys(self, keys: Tensor) -> Tensor:
        normalised: Tensor = self.keys(keys)
        return normalised


# ----------------------------------------------------------------------------------------------------------- how it runs


class ModuleReader:
    """Runs the cross-attention of one module by a plan, with the module's own projections, looked up at each call.

    Args:
        module: the module.
        family: what its class calls things.
        generations: the calls of `generate` that run.
        masks: what turns masks.
    """

    def __init__(self, module: nn.Module, family: Family, generations: Generations, masks: Masks) -> None:
        self._module, self._family, self._generations, self._masks = module, family, generations, masks
        self._reader = self._make_reader()
        self._ran: Counter[tuple[str, str]] = Counter()

    def describe(self) -> list[str]:
        """Sizes, and the plans that ran."""
        lines = self._reader.describe()
        if self._ran:
            ran = ", ".join(f"{plan} ({how}) x {calls}" for (plan, how), calls in self._ran.items())
            lines[0] = lines[0].replace("; none has run yet", "") + f"; in generation and with caches {ran}"
        return lines

    def forget(self) -> None:
        """Drop what was kept; what is kept of a source while something is generated goes with that."""
        self._reader.forget()
        self._masks.forget()

    def run(self, own: Own, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward pass."""
        given = bound_arguments(type(self._module), args, kwargs)
        out = None if self._passes(given) else self._read(given)
        return own(*args, **kwargs) if out is None else self._family.gives(out, given)

    def _passes(self, given: Given) -> bool:
        """Whether nothing is gained over the module's own forward, as far as few questions tell: steps are short."""
        if not self._own_is_as_quick(given):
            return False
        family, b = self._family, given.get(self._family.context)
        if family.cache == "encoder-decoder" and (cross := _growing_cross_cache(cache := _cache_of(given))) is not None:
            # The textbook's keys and values are in the cache, or will be: what is kept of a source are others, or fewer.
            is_filled = bool(cache.is_updated.get(self._module.layer_idx)) and len(cross.layers) > self._module.layer_idx
            is_left = is_filled or (isinstance(b, Tensor) and not self._gains_by_keeping(b))
            self._reader.left_calls += is_left
            return is_left
        a = given.get("hidden_states")
        return isinstance(a, Tensor) and isinstance(b, Tensor) and self._reader.passes(a.shape, b, b.shape)

    def _own_is_as_quick(self, given: Given) -> bool:
        """Whether the module's own forward runs the textbook's plan as this library would, and gives zero in rows without a key."""
        mask = given.get(self._family.mask)
        config = getattr(self._module, "config", None)
        return (
            self._family.has_kernels
            and self._family is not T5  # it hands its kernel a bias of zeros
            and getattr(config, "_attn_implementation", None) == "sdpa"
            and (mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool))
        )

    def _gains_by_keeping(self, b: Tensor) -> bool:
        """Whether states are of a source that several rows read, or that a plan reads otherwise than the textbook's."""
        source = self._source(b)
        if source is None or source.rows > 1:
            return source is not None
        return source.session.decide(self, source, lambda: self._gains_in_steps(source))

    def _gains_in_steps(self, source: Source) -> bool:
        """Whether a step of a single row is estimated to gain more by a plan than what calls it takes."""
        if self._reader.is_small(source.single):
            return False
        layer = self._layer()
        choice = layer.plan_for((len(source.single), 1, layer.query_dim), source.single.shape, uses=source.session.steps)
        textbook, chosen = choice.candidate(TEXTBOOK).cost, choice.candidate(choice.plan).cost
        return textbook.seconds - chosen.seconds > STEP_SECONDS * source.session.steps

    def _make_reader(self) -> Reader:
        """What reads with the module's projections."""
        module, family = self._module, self._family
        h, g, k, v = heads_of(module, family)
        names = {ours: theirs for ours, theirs in zip(PROJECTIONS, family.projections, strict=True) if theirs}
        none = {} if "out_proj" in names else {"out_proj": nn.Identity()}
        held = {ours: module._modules[theirs] for ours, theirs in names.items()}
        out_dim = getattr(held.get("out_proj"), "out_features", h * v)
        borrowing = Borrowing(
            query_dim=held["q_proj"].in_features,
            context_dim=held["k_proj"].in_features,
            heads=h,
            head_dim=k,
            out_dim=out_dim,
            value_head_dim=v,
            kv_heads=g,
            scale=float(getattr(module, "scaling", k**-0.5)),
            projections=lambda: {**none, **{ours: module._modules[theirs] for ours, theirs in names.items()}},
            qk_norm=None if family.norms is None else _HeldNorms(*(module._modules[name] for name in family.norms)),
        )
        return Reader(module, borrowing, own_is_fused=False, keeps=family not in (PERCEIVER, DETR))

    def _layer(self) -> CrossAttention:
        """The layer over the projections that the module has now."""
        return self._reader.borrowing.layers()[0]

    def _read(self, given: Given) -> Tensor | None:
        """The output (z, n, o), or None for what the module's own forward has to run."""
        family = self._family
        a, b, cache = given.get("hidden_states"), given.get(family.context), _cache_of(given)
        if not isinstance(a, Tensor) or a.dim() != 3 or a.numel() == 0 or self._is_for_own(given, a):
            return None
        layer = self._layer()
        if b is None:
            return self._read_cached_images(layer, given, a, cache) if family.cache == "plain" else None
        if not isinstance(b, Tensor) or b.dim() != 3 or b.dtype != a.dtype or b.device != a.device or b.numel() == 0:
            return None
        if a.shape[2] != layer.query_dim or b.shape[2] != layer.context_dim:
            return None
        if family is MLLAMA and b.shape[0] % a.shape[0] == 0:
            b = b.reshape(a.shape[0], -1, b.shape[2])  # the tiles of an item's images, one after the other
        if a.shape[0] != b.shape[0]:
            is_shared = family is QFORMER and a.shape[0] == 1
            return self._read_once(given, a[0], b) if is_shared else None
        if family is PERCEIVER:
            return self._read_normed(given, a, b)
        if family is DETR:
            return self._read_placed(given, a, b)
        if cache is None or family.cache == "":
            source = self._source(b)
            return self._read_once(given, a, b) if source is None else self._read_kept(layer, given, a, source)
        if family.cache == "plain":
            return self._read_images(layer, given, a, b, cache)
        return self._read_by_cache(layer, given, a, b, cache)

    def _is_for_own(self, given: Given, a: Tensor) -> bool:
        """Whether a call asks for what only the module's own forward does."""
        module = self._module
        return bool(
            is_watched()
            or given.get("output_attentions")
            or given.get("position_bias") is not None
            or given.get("is_causal")
            or _drops(module, getattr(module, self._family.dropout, 0.0))
            or getattr(getattr(module, "config", None), "_attn_implementation", None) not in KERNELS
            or type(a) not in (Tensor, nn.Parameter)
            or weights_are_collected()
            or (module._forward_hooks and self._gives_weights())
            or not self._weights_fit(a)
        )

    def _gives_weights(self) -> bool:
        """Whether the module's own forward gives its weights with its output, though nobody asks for them."""
        config = getattr(self._module, "config", None)
        return self._family.has_kernels and getattr(config, "_attn_implementation", None) in (None, "eager")

    def _weights_fit(self, a: Tensor) -> bool:
        """Whether the query projection takes such queries: plain weights of their dtype and device, or under autocast."""
        weight = getattr(self._module._modules.get(self._family.projections[0]), "weight", None)
        if type(weight) not in (Tensor, nn.Parameter) or weight.device != a.device:
            return False
        return weight.dtype == a.dtype or torch.is_autocast_enabled(a.device.type)

    # -------------------------------------------------------------------------------------------- ways of reading

    def _read_once(self, given: Given, a: Tensor, b: Tensor, values_from: Tensor | None = None) -> Tensor | None:
        """Of a context that arrives with the queries, (z, n, a) or learned ones (n, a)."""
        masks = self._masks_of(given, b.shape[1], a.shape[-2])
        if masks is None:
            return None
        is_quick = self._own_is_as_quick(given)
        read = self._reader.read(
            a, b, values_from, context_mask=masks[0], attn_mask=masks[1], must=not is_quick, own_is_fused=is_quick
        )
        if read is not None and is_checking():
            note_live(read.live_rows())
        return None if read is None else read.out

    def _read_normed(self, given: Given, a: Tensor, b: Tensor) -> Tensor | None:
        """Perceiver: latents, the same for the whole batch at first, read normed inputs."""
        norms = self._module._modules
        if a.shape[0] > 1 and a.stride(0) == 0:
            a = a[0]
        return self._read_once(given, norms["layernorm1"](a), norms["layernorm2"](b))

    def _read_placed(self, given: Given, a: Tensor, b: Tensor) -> Tensor | None:
        """DETR: keys know where they stand, values do not."""
        of_queries, of_keys = given.get("position_embeddings"), given.get("encoder_position_embeddings")
        a = a if of_queries is None else a + of_queries
        return self._read_once(given, a, b) if of_keys is None else self._read_once(given, a, b + of_keys, b)

    def _source(self, b: Tensor) -> Source | None:
        """What the call of `generate` that runs knows of these states; None where a gradient is asked for, or nothing runs."""
        session = self._generations.now
        return None if session is None or torch.is_grad_enabled() else session.source(b)

    def _read_kept(self, layer: CrossAttention, given: Given, a: Tensor, source: Source) -> Tensor | None:
        """Of a source that was made once for this call of `generate`, all its rows together."""
        session, rows = source.session, source.rows

        def make() -> PreparedContext:
            plan = layer._plan_of(source.single, 1, rows, session.steps)
            return layer._prepare(source.single, None, None, plan, stamped=False, uses=session.steps)

        prepared = session.keep(self, source, self._reader.borrowing.weights(), make, _cache_of(given) is not None)
        session.fillers.setdefault(id(self), partial(self._fill, source))
        if rows == 1:
            return self._attend(layer, given, a, prepared, how="kept")
        together = a.reshape(source.single.shape[0], rows * a.shape[1], a.shape[2])
        out = self._attend(layer, given, together, prepared, rows, "kept")
        return None if out is None else out.reshape(*a.shape[:2], -1)

    def _fill(self, source: Source, cache: Any) -> None:
        """Write what was kept of a source into the cache that `generate` gives back, as the module itself would have."""
        index = self._module.layer_idx
        cross = _growing_cross_cache(cache)
        if cross is not None and not cache.is_updated.get(index):
            keys, values = (made.repeat_interleave(source.rows, 0) for made in _projected(self._layer(), source.single))
            cross.update(keys, values, index)
            cache.is_updated[index] = True

    def _read_by_cache(self, layer: CrossAttention, given: Given, a: Tensor, b: Tensor, cache: Any) -> Tensor | None:
        """By the cache of an encoder-decoder, which holds keys and values from the first call on."""
        cross, index = _growing_cross_cache(cache), self._module.layer_idx
        if cross is None:
            return None
        if not cache.is_updated.get(index):
            source = self._source(b)
            if source is not None:
                return self._read_kept(layer, given, a, source)
            if self._masks_of(given, b.shape[1], a.shape[1]) is None:
                return None
            held = cross.update(*_projected(layer, b), index)
            cache.is_updated[index] = True
        else:
            held = cross.layers[index].keys, cross.layers[index].values
        return self._attend(layer, given, a, _prepared(*held))

    def _read_images(self, layer: CrossAttention, given: Given, a: Tensor, b: Tensor, cache: Any) -> Tensor | None:
        """Mllama: images beside those of a cache, which holds the layer's keys and values among those of self-attention."""
        index = self._module.layer_idx
        if not _grows(cache) or self._masks_of(given, b.shape[1] + cache.get_seq_length(index), a.shape[1]) is None:
            return None
        return self._attend(layer, given, a, _prepared(*cache.update(*_projected(layer, b), index)))

    def _read_cached_images(self, layer: CrossAttention, given: Given, a: Tensor, cache: Any) -> Tensor | None:
        """Images of a cache alone."""
        if not _grows(cache):
            return None
        held = cache.layers[self._module.layer_idx]
        return self._attend(layer, given, a, _prepared(held.keys, held.values))

    def _attend(
        self, layer: CrossAttention, given: Given, a: Tensor, prepared: PreparedContext, rows: int = 1, how: str = "cached"
    ) -> Tensor | None:
        """Let queries (z, r n, a) read."""
        length = a.shape[1] // rows
        masks = self._masks_of(given, prepared.context_length, length, rows)
        if masks is None:
            return None
        context_mask, pairs = masks
        if context_mask is not None:
            prepared = replace(prepared, mask=context_mask)
        if is_checking():
            note_live(_live_rows(context_mask, pairs, a.shape[0], rows, length))
        self._ran[str(prepared.plan), how] += 1
        return layer._attend(a, prepared, pairs, None)

    def _masks_of(
        self, given: Given, context_length: int, length: int, rows: int = 1
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """The call's context mask and pair mask; None where it cannot be told what they mean."""
        mask = given.get(self._family.mask)
        if mask is None:
            # Asked for no mask, the fused kernel of a module that does not say otherwise is causal.
            is_causal = self._family is MLLAMA and length > 1 and self._module.config._attn_implementation != "eager"
            return None if is_causal else (None, None)
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != context_length:
            return None
        return self._masks.read(mask, rows, length)


# --------------------------------------------------------------------------------------------------------------- details


def _projected(layer: CrossAttention, b: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (z, g, m, k) and values (z, g, m, v) as caches of transformers hold them."""
    keys = split_heads(project(layer.k_proj, b), layer.kv_heads).transpose(1, 2)
    if layer.qk_norm is not None:
        keys = layer.qk_norm.normalise_keys(keys)
    return keys, split_heads(project(layer.v_proj, b), layer.kv_heads).transpose(1, 2)


def _prepared(keys: Tensor, values: Tensor) -> PreparedContext:
    return PreparedContext(keys, values, None, None, None, TEXTBOOK, UNCHECKED)


def _cache_of(given: Given) -> Any:
    return next((found for name in CACHES if (found := given.get(name)) is not None), None)


def _growing_cross_cache(cache: Any) -> Any:
    """The part of an encoder-decoder cache that holds keys and values of the source, if it is one that grows; else None."""
    cross = getattr(cache, "cross_attention_cache", None)
    return cross if cross is not None and _grows(cross) else None


def _grows(cache: Any) -> bool:
    """Whether a cache holds what it was given and no more: not of a fixed size, offloaded or quantised."""
    return type(cache).__name__ == "DynamicCache" and not getattr(cache, "offloading", False)


def _drops(owner: nn.Module, dropout: Any) -> bool:
    """Whether weights are dropped, or a hook looks at them there; some owners call their dropout, which may train by itself."""
    if not isinstance(dropout, nn.Module):
        return owner.training and float(dropout) > 0.0
    return has_hooks(dropout) or ((owner.training or dropout.training) and float(getattr(dropout, "p", 0.0)) > 0.0)


def _live_rows(context_mask: Tensor | None, pairs: Tensor | None, batch: int, rows: int, length: int) -> Tensor | None:
    """Bool (z r, n or 1, 1): rows in which all heads have something to attend; None if nothing is masked."""
    if context_mask is not None:
        live = context_mask.any(-1)[:, None, None]
    elif pairs is not None:
        live = (pairs if pairs.dtype == torch.bool else pairs > -torch.inf).any(-1, keepdim=True).all(1)
    else:
        return None
    live = live.expand(batch, -1, -1)
    return live.repeat_interleave(rows, 0) if live.shape[1] == 1 else live.reshape(batch * rows, length, 1)
