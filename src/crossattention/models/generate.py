"""Generation: greedy, sampling and beam search, for any model that encodes, prepares and steps.

The source is encoded once and prepared once for each layer. All beams or samples of a source read the same prepared context, as
queries (z, r, 1, d): neither the source nor its projections are copied for them, and beams that die or multiply move only the
self-attention caches. Sources that are done leave the batch, so the others stop paying for them.

Scores are normalised by length as in the paper: log-probability / ((5 + length) / 6)^alpha, the end symbol counted.
Padding and the begin symbol are never generated. Both can be had as in Hugging Face's `generate` (`BeamRules`, `never`), which then
gives the same symbols.

Legend: z batch, r beams or samples of one source, k hypotheses kept, t symbols so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

PAPER_LENGTH_PENALTY = 0.6
"""Alpha in the 2017 paper, which used it with 4 beams."""


class Symbols(Protocol):
    """The symbols that generation must know of a model's config; a model whose config says None for one cannot generate."""

    @property
    def pad_id(self) -> int | None: ...  # noqa: D102
    @property
    def begin_id(self) -> int | None: ...  # noqa: D102
    @property
    def end_id(self) -> int | None: ...  # noqa: D102


class Cache(Protocol):
    """What a model remembers of the symbols so far, in one layer: row z' r + r' is of target r' of source z'."""

    def select(self, rows: Tensor) -> Any:
        """The cache of some rows, in the given order; rows may be left out or come several times."""


class Prepared(Protocol):
    """What one layer reads of the sources, a row each."""

    def select(self, rows: Tensor) -> Any:
        """The same for some sources only."""


class Decodable(Protocol):
    """A model that can generate. `Transformer` is one; `prepare` may ignore its hints.

    Once for each batch: encode (z, m) -> states (z, ...), prepare -> what each layer reads. Then, again and again, step: the newest
    symbols (z, r) and the caches of the last step (None at first) -> logits (z, r, V) and the caches with these symbols in them.
    """

    @property
    def config(self) -> Symbols: ...  # noqa: D102
    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Tensor: ...  # noqa: D102
    def prepare(  # noqa: D102
        self, states: Tensor, source_mask: Tensor | None = None, *, uses: int, query_length: int, repeats: int
    ) -> Sequence[Prepared]: ...
    def step(  # noqa: D102
        self, ids: Tensor, prepared: Sequence[Any], caches: Sequence[Any] | None = None
    ) -> tuple[Tensor, Sequence[Cache]]: ...


@dataclass(frozen=True)
class Hypothesis:
    """One generated sequence.

    Args:
        ids: its symbols, without begin and end.
        score: log-probability normalised by length; the higher the better.
        log_probability: natural logarithm of the model's probability of the symbols, and of the end if it is finished.
        is_finished: whether the model ended it; otherwise the length limit did.
        rows: of each symbol, the end included, the row z' r + r' of the step that gave it, in that step's batch.
    """

    ids: tuple[int, ...]
    score: float
    log_probability: float
    is_finished: bool
    rows: tuple[int, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class BeamRules:
    """Where beam searches differ: what a score is divided by, when a source is done, what the length limit cuts.

    Args:
        divisor: "wu": ((5 + length) / 6)^alpha; "length": length^alpha.
        stop: a source is done "proven": when `beams` hypotheses have finished, or when no live beam can be among those asked for
            any more, whatever follows; "full": when `beams` have finished, or as in "estimated"; "estimated": when `beams` have
            finished and the best live beam, as if it ended now, is worse than the worst of them; "longest": the same as if it
            ended at the length limit, where alpha favours length.
        cut: sequences that the length limit cuts stand "last", after all finished ones, or compete by "score" with them.

    Raises:
        ValueError: an unknown choice.

    Example:
        >>> BeamRules.huggingface()  # as `generate` with early_stopping=False; its length_penalty is 1.0 unless told otherwise
        BeamRules(divisor='length', stop='estimated', cut='score')
    """

    divisor: Literal["wu", "length"] = "wu"
    stop: Literal["proven", "full", "estimated", "longest"] = "proven"
    cut: Literal["last", "score"] = "last"

    def __post_init__(self) -> None:
        for name, choices in (
            ("divisor", ("wu", "length")),
            ("stop", ("proven", "full", "estimated", "longest")),
            ("cut", ("last", "score")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @classmethod
    def huggingface(cls, early_stopping: bool | str = False) -> BeamRules:
        """The rules of `transformers`' `generate`.

        Its symbols come out with `beam_search(..., length_penalty=1.0, rules=BeamRules.huggingface(), never=())`, as it generates
        padding and the begin symbol too.

        Args:
            early_stopping: as there: False, True or "never".

        Raises:
            ValueError: another value.
        """
        stops: dict[bool | str, Literal["full", "estimated", "longest"]]
        stops = {False: "estimated", True: "full", "never": "longest"}
        if not isinstance(early_stopping, bool | str) or early_stopping not in stops:
            raise ValueError(f'early_stopping must be False, True or "never", got {early_stopping!r}')
        return cls("length", stops[early_stopping], "score")


@torch.no_grad()
def greedy(
    model: Decodable,
    source_ids: Tensor,
    source_mask: Tensor | None = None,
    *,
    max_length: int,
    length_penalty: float = PAPER_LENGTH_PENALTY,
    never: Collection[int] | None = None,
) -> list[Hypothesis]:
    """Take the most probable symbol at every step.

    Args:
        model: a model in evaluation mode.
        source_ids: what the model encodes, z sources.
        source_mask: bool, True = real.
        max_length: most symbols to generate, the end included.
        length_penalty: alpha of the score; it does not change the symbols.
        never: symbols that are never generated; default padding and the begin symbol.

    Returns:
        One hypothesis a source.

    Raises:
        ValueError: a model in training mode or without begin, end or padding symbol, `max_length` below 1.

    Cost: one encoding, and at most `max_length` steps of the decoder.
    """
    rows = _watched(
        model, lambda: _roll_out(model, source_ids, source_mask, 1, max_length, length_penalty, lambda logp: logp.argmax(-1), never)
    )
    return [row[0] for row in rows]


@torch.no_grad()
def sample(
    model: Decodable,
    source_ids: Tensor,
    source_mask: Tensor | None = None,
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_length: int,
    length_penalty: float = PAPER_LENGTH_PENALTY,
    generator: torch.Generator | None = None,
    never: Collection[int] | None = None,
) -> list[list[Hypothesis]]:
    """Draw each symbol from the model's distribution.

    Args:
        model: a model in evaluation mode.
        source_ids: what the model encodes, z sources.
        source_mask: bool, True = real.
        num_samples: samples of each source, r; they share the prepared source.
        temperature: divides the logits; below 1 sharper, above 1 flatter.
        top_k: draw from the k most probable symbols only.
        top_p: draw from the fewest symbols whose probability reaches p only (after `temperature` and `top_k`).
        max_length: most symbols to generate, the end included.
        length_penalty: alpha of the score; it does not change the symbols.
        generator: source of randomness, on the device of the logits.
        never: symbols that are never generated; default padding and the begin symbol.

    Returns:
        For each source its samples in the order drawn. Their probabilities are the model's own, whatever was drawn from.

    Raises:
        ValueError: a model in training mode or without begin, end or padding symbol; `num_samples`, `max_length` or `top_k` below
            1; a temperature not above 0; `top_p` outside (0, 1].

    Cost: one encoding, and at most `max_length` steps of the decoder with r targets a source.
    Source: nucleus: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    _check_at_least_one("num_samples", num_samples)
    draw = draw_from(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _watched(model, lambda: _roll_out(model, source_ids, source_mask, num_samples, max_length, length_penalty, draw, never))


def draw_from(
    *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, generator: torch.Generator | None = None
) -> Callable[[Tensor], Tensor]:
    """What draws a symbol (z, r) of logits or log-probabilities (z, r, V); Args and Raises as in `sample`."""
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}; greedy() is the limit at 0")
    if top_k is not None:
        _check_at_least_one("top_k", top_k)
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")

    def draw(log_probs: Tensor) -> Tensor:
        kept = _keep_nucleus(_keep_best(log_probs / temperature, top_k), top_p)
        drawn = torch.multinomial(kept.softmax(-1).flatten(0, 1), 1, generator=generator)
        return drawn.view(log_probs.shape[:2])

    return draw


@torch.no_grad()
def beam_search(
    model: Decodable,
    source_ids: Tensor,
    source_mask: Tensor | None = None,
    *,
    beams: int = 4,
    length_penalty: float = PAPER_LENGTH_PENALTY,
    max_length: int,
    num_hypotheses: int = 1,
    rules: BeamRules = BeamRules(),
    never: Collection[int] | None = None,
) -> list[list[Hypothesis]]:
    """Search for the sequences of highest score, keeping the `beams` best unfinished ones at every step.

    An extension by the end symbol finishes if it is among the `beams` best extensions; the `beams` best others live on. A source is
    done when `beams` hypotheses have finished, or when no live beam can beat the worst of the `num_hypotheses` best any more: its
    log-probability can only fall, so its score stays below what it would be at the most favourable length. The second rule never
    changes the result. One beam is greedy search. `rules` gives other libraries' searches.

    Args:
        model: a model in evaluation mode.
        source_ids: what the model encodes, z sources.
        source_mask: bool, True = real.
        beams: live sequences of each source, r; they share the prepared source.
        length_penalty: alpha; 0 compares log-probabilities, higher favours longer sequences.
        max_length: most symbols to generate, the end included.
        num_hypotheses: how many to return of each source, k; at most `beams`.
        rules: what a score is divided by, when a source is done, what the limit cuts; `BeamRules.huggingface()` is `generate`'s.
        never: symbols that are never generated; default padding and the begin symbol.

    Returns:
        For each source its hypotheses, finished ones before those cut by the length limit, each by score; fewer than asked for
        only if the vocabulary and the limit allow no more.

    Raises:
        ValueError: a model in training mode or without begin, end or padding symbol; `beams`, `max_length` or `num_hypotheses`
            below 1; more hypotheses than beams.

    Cost: one encoding, and at most `max_length` steps of the decoder with r targets a source.
    Source: Vaswani et al. 2017, section 6.1; the penalty: Wu et al. 2016, arXiv:1609.08144, eq. 14.
    """
    _check_at_least_one("beams", beams)
    _check_at_least_one("num_hypotheses", num_hypotheses)
    if num_hypotheses > beams:
        raise ValueError(f"num_hypotheses must be at most beams, got {num_hypotheses} of {beams} beams; search with more beams")
    wanted = Wanted(beams, num_hypotheses, LengthPenalty(length_penalty, max_length, rules), never)
    return _watched(model, lambda: _search(model, source_ids, source_mask, wanted))


# ---------------------------------------------------------------------------------------------- the two ways to grow


def _watched(model: Decodable, generate: Callable[[], list[list[Hypothesis]]]) -> list[list[Hypothesis]]:
    """Generate, and tell the model's `generation_watchers` (`record_attention` sets one) where it begins and what it gives."""
    watchers = tuple(getattr(model, "generation_watchers", ()))
    for watcher in watchers:
        watcher.begin()
    found: list[list[Hypothesis]] | None = None
    try:
        found = generate()
    finally:
        for watcher in watchers:
            watcher.end_with(found)
    return found


@dataclass(frozen=True)
class Wanted:
    """What a beam search is asked for."""

    beams: int
    num_hypotheses: int
    penalty: LengthPenalty
    never: Collection[int] | None

    @property
    def num_kept(self) -> int:
        """How many finished hypotheses to keep: what is asked for, or as many as there are beams where these end the search."""
        return self.num_hypotheses if self.penalty.rules.stop == "proven" else self.beams

    def is_done(self, live: _Targets, kept: _Targets, num_finished: Tensor) -> Tensor:
        """Whether a source (z,) is done."""
        is_full = num_finished >= self.beams
        cannot_win = ~_can_still_win(live, kept, self.num_kept, self.penalty)
        return is_full | cannot_win if self.penalty.rules.stop in ("proven", "full") else cannot_win


def _search(model: Decodable, source_ids: Tensor, source_mask: Tensor | None, wanted: Wanted) -> list[list[Hypothesis]]:
    """Grow `beams` targets of each source until none can win any more."""
    beams, penalty = wanted.beams, wanted.penalty
    prepared = _prepare(model, source_ids, source_mask, beams, penalty.max_length)
    config = model.config
    live = _Targets.begin(source_ids, 1, config)
    kept = live.pick(torch.zeros_like(live.lengths[:, :0]))  # none yet
    num_finished = torch.zeros_like(live.sources)
    is_done = torch.zeros_like(live.sources, dtype=torch.bool)
    dropped: list[_Targets] = []
    caches: Sequence[Cache] | None = None
    for length in range(1, penalty.max_length + 1):
        logits, caches = model.step(live.newest, prepared, caches)
        grown, live, parents = _grow(live, _log_probabilities(logits, config, wanted.never), beams, config.end_id)
        ended = grown.where(grown.is_finished & ~is_done.unsqueeze(-1))
        num_finished = num_finished + ended.exists.sum(-1)
        if length == penalty.max_length:
            kept = _with_cut(kept, ended, grown.where(~is_done), live, wanted, config.pad_id)
            break
        kept = kept.join(ended, config.pad_id).best(wanted.num_kept, penalty)
        is_done = is_done | wanted.is_done(live, kept, num_finished)
        rows = torch.arange(len(is_done), device=is_done.device)
        if (going := _rows_to_go_on(is_done)) is not None:
            dropped.append(kept.select(is_done.nonzero()[:, 0]))
            rows, live, kept = going, live.select(going), kept.select(going)
            num_finished, is_done = num_finished[going], is_done[going]
            prepared = [context.select(going) for context in prepared]
            if not len(going):
                break
        survivors = (rows.unsqueeze(-1) * logits.shape[1] + parents[rows]).flatten()
        caches = [cache.select(survivors) for cache in caches]
    found = _hypotheses([*dropped, kept], source_ids.shape[0], penalty)
    return [hypotheses[: wanted.num_hypotheses] for hypotheses in found]


def _with_cut(kept: _Targets, ended: _Targets, grown: _Targets, live: _Targets, wanted: Wanted, pad_id: int) -> _Targets:
    """What is kept at the length limit, where no target lives on: those cut stand last, or compete with the others."""
    if wanted.penalty.rules.cut == "score":
        return kept.join(grown, pad_id).best(wanted.num_kept, wanted.penalty)
    finished = kept.join(ended, pad_id).best(wanted.num_kept, wanted.penalty)
    return finished.join(live, pad_id).first(wanted.num_kept)


def _roll_out(
    model: Decodable,
    source_ids: Tensor,
    source_mask: Tensor | None,
    repeats: int,
    max_length: int,
    length_penalty: float,
    choose: Callable[[Tensor], Tensor],
    never: Collection[int] | None,
) -> list[list[Hypothesis]]:
    """Extend r targets of each source by what `choose` takes of log-probabilities (z, r, V), each until it ends."""
    prepared = _prepare(model, source_ids, source_mask, repeats, max_length)
    config = model.config
    targets = _Targets.begin(source_ids, repeats, config)
    dropped: list[_Targets] = []
    caches: Sequence[Cache] | None = None
    for _ in range(max_length):
        logits, caches = model.step(targets.newest, prepared, caches)
        log_probs = _log_probabilities(logits, config, never)
        targets = targets.extend(choose(log_probs), log_probs, config)
        is_done = targets.is_finished.all(-1)
        if (going := _rows_to_go_on(is_done)) is not None:
            dropped.append(targets.select(is_done.nonzero()[:, 0]))
            targets = targets.select(going)
            prepared = [context.select(going) for context in prepared]
            if not len(going):
                break
            rows = going.unsqueeze(-1) * repeats + torch.arange(repeats, device=going.device)
            caches = [cache.select(rows.flatten()) for cache in caches]
    return _hypotheses([*dropped, targets], source_ids.shape[0], LengthPenalty(length_penalty, max_length))


def _grow(live: _Targets, log_probs: Tensor, beams: int, end_id: int) -> tuple[_Targets, _Targets, Tensor]:
    """The `beams` best extensions of live beams; the best that live on; and the beam (z, r) that each of the latter extends."""
    total = (live.log_probs.unsqueeze(-1) + log_probs).flatten(1)
    # Each beam ends at most once, so among twice as many candidates there are enough that live on.
    best, index = total.topk(min(2 * beams, total.shape[1]))
    parents, symbols = index // log_probs.shape[-1], index % log_probs.shape[-1]
    is_end = symbols == end_id
    candidates = live.pick(parents)
    rows = torch.cat((candidates.rows, live.numbers.gather(1, parents).unsqueeze(-1)), -1)
    ids = torch.cat((candidates.ids, symbols.unsqueeze(-1)), -1)
    candidates = _Targets(live.sources, ids, best, candidates.lengths + 1, is_end, rows)
    in_beam = torch.arange(best.shape[1], device=best.device) < beams
    going = best.masked_fill(is_end, -torch.inf).topk(min(beams, best.shape[1])).indices
    return candidates.where(in_beam.expand_as(is_end)), candidates.where(~is_end).pick(going), parents.gather(1, going)


def _can_still_win(live: _Targets, kept: _Targets, wanted: int, penalty: LengthPenalty) -> Tensor:
    """Whether some extension of a live beam may yet be among the kept (z,)."""
    if kept.lengths.shape[1] < wanted:
        return live.exists.any(-1)
    return penalty.bound(live).amax(-1) > penalty.score(kept).amin(-1)


def _rows_to_go_on(is_done: Tensor) -> Tensor | None:
    """The rows that are not done, if it pays to go on with them alone: dropping rows copies what is kept of the others."""
    going = (~is_done).nonzero()[:, 0]
    return going if 8 * len(going) <= 7 * len(is_done) else None


# -------------------------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True)
class LengthPenalty:
    """Scores out of log-probabilities: log-probability / ((5 + length) / 6)^alpha, or / length^alpha, up to a length."""

    alpha: float
    max_length: int
    rules: BeamRules = BeamRules()

    def score(self, targets: _Targets) -> Tensor:
        """Scores (z, c); -inf where there is no target."""
        return targets.log_probs / self._divisor(targets.lengths, targets.log_probs.dtype)

    def bound(self, targets: _Targets) -> Tensor:
        """What no extension of the targets exceeds (z, c): no further symbol costs anything, the length is the best for it.

        With the rules "full" and "estimated" the length is what it is, with "longest" the limit where alpha favours length: not a
        bound, but what those rules compare.
        """
        lengths, dtype = targets.lengths, targets.log_probs.dtype
        last = torch.full_like(lengths, self.max_length)
        if self.rules.stop == "proven":
            return targets.log_probs / torch.maximum(self._divisor(lengths + 1, dtype), self._divisor(last, dtype))
        return targets.log_probs / self._divisor(last if self.rules.stop == "longest" and self.alpha > 0.0 else lengths, dtype)

    def _divisor(self, lengths: Tensor, dtype: torch.dtype) -> Tensor:
        lengths = lengths.to(dtype)
        return (lengths if self.rules.divisor == "length" else (5.0 + lengths) / 6.0) ** self.alpha


@dataclass(frozen=True)
class _Targets:
    """c targets of each of z sources, all with as many columns; the unused ones hold padding.

    Args:
        sources: which source each row is of, (z,).
        ids: (z, c, 1 + t), beginning with the begin symbol.
        log_probs: (z, c); -inf where there is no target.
        lengths: symbols generated, the end included, (z, c).
        is_finished: bool (z, c).
        rows: of each symbol generated the row of its step, (z, c, t); -1 where there is no symbol.
    """

    sources: Tensor
    ids: Tensor
    log_probs: Tensor
    lengths: Tensor
    is_finished: Tensor
    rows: Tensor

    @classmethod
    def begin(cls, source_ids: Tensor, repeats: int, config: Symbols) -> _Targets:
        z, device = source_ids.shape[0], source_ids.device
        ids = torch.full((z, repeats, 1), config.begin_id, device=device)
        lengths = torch.zeros(z, repeats, dtype=torch.long, device=device)
        log_probs = torch.zeros(z, repeats, device=device)
        is_finished = torch.zeros_like(lengths, dtype=torch.bool)
        return cls(torch.arange(z, device=device), ids, log_probs, lengths, is_finished, lengths.new_empty(z, repeats, 0))

    @property
    def numbers(self) -> Tensor:
        """The row of each in a step of all of them, (z, c)."""
        return torch.arange(self.lengths.numel(), device=self.lengths.device).view_as(self.lengths)

    @property
    def newest(self) -> Tensor:
        return self.ids[..., -1]

    @property
    def exists(self) -> Tensor:
        return self.log_probs > -torch.inf

    def extend(self, chosen: Tensor, log_probs: Tensor, config: Symbols) -> _Targets:
        """One symbol (z, c) more, of log-probabilities (z, c, V); what is finished gets padding and stays as it is."""
        chosen = chosen.where(~self.is_finished, config.pad_id)
        gained = log_probs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).masked_fill(self.is_finished, 0.0)
        return _Targets(
            self.sources,
            torch.cat((self.ids, chosen.unsqueeze(-1)), -1),
            self.log_probs + gained,
            self.lengths + ~self.is_finished,
            self.is_finished | (chosen == config.end_id),
            torch.cat((self.rows, self.numbers.where(~self.is_finished, -1).unsqueeze(-1)), -1),
        )

    def select(self, rows: Tensor) -> _Targets:
        """Some of the rows."""
        return _Targets(*(getattr(self, field.name)[rows] for field in fields(self)))

    def pick(self, columns: Tensor) -> _Targets:
        """Some columns (z, c') of each row."""
        ids, rows = (t.gather(1, columns.unsqueeze(-1).expand(-1, -1, t.shape[-1])) for t in (self.ids, self.rows))
        picked = (tensor.gather(1, columns) for tensor in (self.log_probs, self.lengths, self.is_finished))
        return _Targets(self.sources, ids, *picked, rows)

    def where(self, condition: Tensor) -> _Targets:
        """Only the targets for which a condition (z, c) or (z,) holds; the others exist no more."""
        condition = condition.unsqueeze(-1) if condition.dim() == 1 else condition
        log_probs = self.log_probs.masked_fill(~condition, -torch.inf)
        return _Targets(self.sources, self.ids, log_probs, self.lengths, self.is_finished, self.rows)

    def join(self, others: _Targets, pad_id: int) -> _Targets:
        """These and the others, of the same sources; the others' ids are not shorter."""
        ids = F.pad(self.ids, (0, others.ids.shape[-1] - self.ids.shape[-1]), value=pad_id)
        rows = F.pad(self.rows, (0, others.rows.shape[-1] - self.rows.shape[-1]), value=-1)
        pairs = ((ids, others.ids), *((getattr(self, n), getattr(others, n)) for n in ("log_probs", "lengths", "is_finished")))
        return _Targets(self.sources, *(torch.cat(pair, 1) for pair in pairs), torch.cat((rows, others.rows), 1))

    def best(self, count: int, penalty: LengthPenalty) -> _Targets:
        """The `count` of highest score, best first."""
        scores = penalty.score(self)
        return self.pick(scores.topk(min(count, scores.shape[1])).indices)

    def first(self, count: int) -> _Targets:
        """The `count` first of those that exist, in their order."""
        order = self.exists.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        return self.pick(order[:, :count])


def _hypotheses(parts: Iterable[_Targets], num_sources: int, penalty: LengthPenalty) -> list[list[Hypothesis]]:
    """The targets that exist, as plain values, source by source."""
    found: list[list[Hypothesis]] = [[] for _ in range(num_sources)]
    for targets in parts:
        columns = (targets.ids, targets.lengths, targets.is_finished, targets.log_probs, penalty.score(targets), targets.rows)
        for source, *row in zip(*(tensor.tolist() for tensor in (targets.sources, *columns)), strict=True):
            for ids, length, is_finished, log_probability, score, steps in zip(*row, strict=True):
                if log_probability > -float("inf"):
                    symbols = ids[1 : 1 + length - is_finished]
                    found[source].append(Hypothesis(tuple(symbols), score, log_probability, is_finished, tuple(steps[:length])))
    return found


def _prepare(model: Decodable, source_ids: Tensor, source_mask: Tensor | None, repeats: int, max_length: int) -> Sequence[Prepared]:
    """Encode the sources and prepare them for at most `max_length` reads by `repeats` targets each, a symbol at a time."""
    _check_at_least_one("max_length", max_length)
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode, so dropout would change what it generates; call model.eval() first")
    if missing := [name for name in ("pad_id", "begin_id", "end_id") if getattr(model.config, name) is None]:
        raise ValueError(
            f"the model's config has no {' and no '.join(missing)}, so it cannot generate; build it with these symbols"
        )
    states = model.encode(source_ids, source_mask)
    return model.prepare(states, source_mask, uses=max_length, query_length=1, repeats=repeats)


def _log_probabilities(logits: Tensor, config: Symbols, never: Collection[int] | None) -> Tensor:
    """Log-probabilities (z, r, V), in float32 at least; -inf for what is never generated, if not said padding and begin."""
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    if never is None:
        never = {config.pad_id, config.begin_id} - {config.end_id}
    if never:
        log_probs[..., sorted(never)] = -torch.inf
    return log_probs


def _keep_best(logits: Tensor, count: int | None) -> Tensor:
    """The logits (z, r, V) with all but the `count` highest at -inf."""
    if count is None or count >= logits.shape[-1]:
        return logits
    best, index = logits.topk(count)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, best)


def _keep_nucleus(logits: Tensor, share: float | None) -> Tensor:
    """The logits (z, r, V) with all at -inf but the fewest highest ones whose probability reaches `share`."""
    if share is None:
        return logits
    best, index = logits.sort(-1, descending=True)
    probs = best.softmax(-1)
    best = best.masked_fill(probs.cumsum(-1) - probs >= share, -torch.inf)
    return best.scatter(-1, index, best)


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
