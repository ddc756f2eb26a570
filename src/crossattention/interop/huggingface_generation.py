"""What is kept of a source while `transformers` generates from it: its projections, once, for all beams and samples that read it.

Its `generate` writes the encoder's states out for each beam, projects all of them, and reorders what it projected at each step,
though beams of one source read the same. The states that a step gets are the same object as at the step before, so what was made of
them is found by it. Nothing outlives the call of `generate`.

Legend: z sources, r rows (beams, samples) that read each, m context length.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.attention.prepared import fingerprint, watch
from crossattention.interop.replacement import Own, Replaceable, is_watched

STATES = ("encoder_hidden_states", "cross_attention_states")
"""Arguments of `generate` that are states of a source themselves."""
CACHES = ("cache", "past_key_values")
"""What a cache is called, by versions of transformers."""


@dataclass
class Source:
    """States that rows of a batch read: (z r, m, b), of which each r in turn are the same.

    Args:
        session: the call of `generate` that they belong to.
        states: what modules are called with.
        rows: r.
        single: (z, m, b), one of each r.
    """

    session: Session
    states: Tensor
    rows: int
    single: Tensor


@dataclass
class _Kept:
    """Something made of a source and of weights, and what both looked like then."""

    prints: tuple[Any, ...]
    value: Any
    copy: Tensor | None


@dataclass(eq=False)
class Session:
    """One call of `generate`.

    Args:
        steps: how many tokens it was asked for, as far as that is known.
    """

    steps: int
    sources: dict[int, Source] = field(default_factory=dict)
    kept: dict[tuple[int, int], _Kept] = field(default_factory=dict)
    fillers: dict[int, Callable[[Any], None]] = field(default_factory=dict)
    decided: dict[tuple[int, int], bool] = field(default_factory=dict)

    def add(self, states: Tensor, rows: int, single: Tensor | None = None) -> None:
        """States that modules will be called with; the object is held, so that no other takes its place."""
        if states.dim() == 3 and states.shape[0] % rows == 0:
            self.sources[id(states)] = Source(self, states, rows, states[::rows] if single is None else single)

    def source(self, states: Tensor) -> Source | None:
        """What is known of states that a module is called with."""
        return self.sources.get(id(states))

    def begin(self) -> None:
        """Other sources come: those of the next seconds of a sound."""
        self.sources.clear()
        self.kept.clear()
        self.fillers.clear()
        self.decided.clear()

    def decide(self, owner: object, source: Source, ask: Callable[[], bool]) -> bool:
        """What was answered for a module and a source the first time: steps of one generation all go the same way."""
        key = id(owner), id(source.states)
        if key not in self.decided:
            self.decided[key] = ask()
        return self.decided[key]

    def fill_cache_of(self, out: Any) -> None:
        """Write what was kept into the cache among what `generate` gives, if there is one, as the modules would have."""
        cache = next((found for name in CACHES if (found := getattr(out, name, None)) is not None), None)
        if cache is not None:
            for fill in self.fillers.values():
                fill(cache)

    def keep(self, owner: object, source: Source, weights: Iterable[Tensor], make: Callable[[], Any], would_be_cached: bool) -> Any:
        """What `make` makes of a source with these weights: kept, or made anew where either changed.

        An edit in place of states of inference mode leaves no trace, so they are compared with a copy, unless there is a cache that
        would not see the edit either.
        """
        states = source.states
        compares = states.is_inference() and not would_be_cached
        device = states.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        tensors = (states, *weights)
        for tensor in tensors:
            watch(tensor)
        prints = (cast, *(fingerprint(tensor) for tensor in tensors))
        key = (id(owner), id(states))
        kept = self.kept.get(key)
        if kept is None or kept.prints != prints or (kept.copy is not None and not torch.equal(kept.copy, states)):
            kept = self.kept[key] = _Kept(prints, make(), states.clone() if compares else None)
        return kept.value


class Generations:
    """The calls of `generate` of one model that run, each in its thread."""

    def __init__(self) -> None:
        self._threads = threading.local()

    @property
    def now(self) -> Session | None:
        """The innermost that runs in this thread."""
        running = getattr(self._threads, "running", None)
        return running[-1] if running else None

    def replaceables(self, model: nn.Module) -> Iterable[Replaceable]:
        """The methods of a model and of its parts that generate."""
        for module in model.modules():
            if not any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__):
                continue
            if callable(getattr(module, "_expand_inputs_for_generation", None)):
                yield Replaceable(module, self._run_generate, method="generate", checks_outputs=False)
                yield Replaceable(module, self._run_expand, method="_expand_inputs_for_generation", checks_outputs=False)
            if callable(getattr(module, "_postprocess_outputs", None)):  # Whisper takes its caches apart before it is done
                yield Replaceable(module, self._run_postprocess, method="_postprocess_outputs", checks_outputs=False)
            projection = getattr(module, "enc_to_dec_proj", None)
            if type(projection) is nn.Linear:
                yield Replaceable(projection, _Projecting(self, projection).run, notes=(_PROJECTED_ONCE,))

    def _run_generate(self, own: Own, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_watched() or any(kwargs.get(name) is not None for name in CACHES):
            return own(*args, **kwargs)  # a recording follows rows; a cache that is handed in is for its owner to read
        running = self._threads.__dict__.setdefault("running", [])
        session = Session(_steps(kwargs))
        running.append(session)
        try:
            out = own(*args, **kwargs)
            with torch.no_grad():  # as in `generate`, whose cache holds no graph
                session.fill_cache_of(out)
            return out
        finally:
            running.pop()

    def _run_postprocess(self, own: Own, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = self.now
        if session is not None:
            with torch.no_grad():
                session.fill_cache_of(kwargs.get("seek_outputs", args[0] if args else None))
        return own(*args, **kwargs)

    def _run_expand(self, own: Own, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids, model_kwargs = own(*args, **kwargs)
        session = self.now
        rows = kwargs.get("expand_size", args[0] if args else 1)
        if session is not None:
            session.begin()
            found = [model_kwargs.get(name) for name in STATES]
            if (outputs := model_kwargs.get("encoder_outputs")) is not None:
                found.append(outputs[0])
            for states in found:
                if isinstance(states, Tensor):
                    session.add(states, rows)
        return ids, model_kwargs


class _Projecting:
    """`EncoderDecoderModel`'s projection of the encoder's states to the decoder's width: run once for each source."""

    def __init__(self, generations: Generations, projection: nn.Linear) -> None:
        self._generations, self._projection = generations, projection

    def run(self, own: Own, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = self._generations.now
        states = args[0] if args else kwargs.get("input")
        source = None if session is None or not isinstance(states, Tensor) else session.source(states)
        if session is None or source is None or is_watched() or torch.is_grad_enabled():
            return own(*args, **kwargs)

        def make() -> Tensor:
            single = own(source.single)
            out = single if source.rows == 1 else single.repeat_interleave(source.rows, 0)
            session.add(out, source.rows, single)
            return out

        return session.keep(self, source, self._projection.parameters(), make, False)


_PROJECTED_ONCE = "while generating, states are projected once for each source"


def _steps(kwargs: dict[str, Any]) -> int:
    """How often a source will be read, as far as the arguments of `generate` say."""
    asked = [kwargs.get(name) for name in ("max_new_tokens", "max_length")]
    asked += [getattr(kwargs.get("generation_config"), name, None) for name in ("max_new_tokens", "max_length")]
    return max(1, next((steps for steps in asked if isinstance(steps, int)), 64))
