"""Feed-forward layers read as memories: on which texts each key fires, what each value promotes, and how often the two agree.

    out = activation(x W1 + b1) W2 + b2 = sum over keys j of coefficient_j value_j + b2

A row of W1 is a key, the row of W2 for it its value. Texts go by once, in any number: of each key only its k strongest are kept.
Any model will do whose feed-forward layers have a second matrix as a module of its own: what that module gets are the coefficients.

Source: Geva et al. 2021, arXiv:2012.14913 (triggers, values as distributions, agreement); Geva et al. 2022, arXiv:2203.14680
(values as promoters of symbols).
Legend: z texts of a batch, n positions, s keys of a layer, k what is kept of each, d width of the output, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")

BLOCK_SCORES = 1 << 22
"""Most scores of values for symbols that are held at once, unless those of one value are more."""

PAIRS = (
    ("up_proj", "down_proj"),  # ours, Llama
    ("linear1", "linear2"),  # torch.nn
    ("fc1", "fc2"),  # timm, BART and its kin
    ("wi", "wo"),  # T5
    ("wi_0", "wo"),  # T5 with a gate
    ("c_fc", "c_proj"),  # GPT-2
    ("intermediate.dense", "output.dense"),  # BERT and its kin
    ("dense1", "dense2"),  # Perceiver of transformers
)
"""Names that the two matrices of a feed-forward layer have in known models."""


@dataclass(frozen=True, eq=False)
class Triggers:
    """The texts on which each key of a layer fires most, each text once, at its strongest position; the strongest first.

    Args:
        coefficients: (s, k), -inf where fewer than k texts went by.
        texts: (s, k), the text's number, counted from 0 over all batches; -1 where there is none. Equal ones by lowest number.
        positions: (s, k), where in the text; the first of equal ones.
        next_ids: (s, k), the symbol that `run` named for that position.
    """

    coefficients: Tensor
    texts: Tensor
    positions: Tensor
    next_ids: Tensor


@dataclass(frozen=True, eq=False)
class Promoted:
    """The symbols that each value makes most likely.

    Args:
        ids: (s, k), the most likely first.
        scores: (s, k), the value's logits less their mean over the vocabulary.
        probabilities: (s, k), softmax of the value's logits over the vocabulary.
    """

    ids: Tensor
    scores: Tensor
    probabilities: Tensor


@dataclass(frozen=True, eq=False)
class FeedForwardMemory:
    """What one feed-forward layer remembers.

    Args:
        name: the layer's, as in `model.named_modules()`.
        size: number of keys, s.
        triggers: of each key.
        promoted: of each value.
        num_triggered: how many keys fired (a coefficient above 0) on any text.
        agreement: share of these whose value's first symbol is the one that follows their strongest trigger; nan if none fired.
    """

    name: str
    size: int
    triggers: Triggers
    promoted: Promoted
    num_triggered: int
    agreement: float


def feed_forward_memories(
    model: nn.Module,
    batches: Iterable[Batch],
    run: Callable[[Batch], Tensor],
    *,
    output: Tensor | Callable[[Tensor], Tensor],
    k: int = 10,
    symbols: int = 10,
    layers: Collection[str] | None = None,
) -> dict[str, FeedForwardMemory]:
    """Read a model's feed-forward layers as memories while texts go by.

    trigger of key j  = the text and position with the largest coefficient activation(x W1 + b1)_j
    value j in words  = softmax(value_j E^T)
    agreement         = share of keys that fire whose value's first symbol follows their strongest trigger

    Args:
        model: any model; it is run in evaluation mode and without gradients, and left as it was.
        batches: any iterable, read once.
        run: runs the model once on a batch and returns integers (z, n): the symbol that follows each position, -1 at positions that
            do not count, as padding.
        output: the output embedding E (V, d), or a function of rows (any number, d) that gives their logits (any number, V), as a
            head is. A norm in front of it is left out unless the function has it.
        k: texts that are kept of each key.
        symbols: symbols that are kept of each value.
        layers: names of the feed-forward layers to look at; default all that `feed_forward_layers` finds.

    Returns:
        What each layer remembers, by its name.

    Raises:
        ValueError: no such layer in the model, a name that is none, an output of another width, k or symbols below 1, a batch in
            which a layer did not run once or on other positions than `run` returned, no batch.
        TypeError: `run` gave no integers.

    Cost: the model's forward passes; for each layer and key the maximum over positions, and a sort of k + z numbers. Memory: 28
        bytes for each of s k in float32, whatever the number of texts, and the coefficients of one batch. Values: s d V
        multiply-adds, in blocks.
    Source: Geva et al. 2021, arXiv:2012.14913, sections 3 and 4. There a trigger is a prefix: the text up to its position.

    Example:
        >>> from crossattention.models.transformer import Transformer, TransformerConfig
        >>> model = Transformer(TransformerConfig(30, 30, dim=16, heads=2, feed_forward_dim=32))
        >>> def run(batch):
        ...     source, target = batch
        ...     model(source, target[:, :-1])
        ...     return target[:, 1:]
        >>> batches = [(torch.randint(3, 30, (4, 7)), torch.randint(3, 30, (4, 6))) for _ in range(3)]
        >>> last = "decoder.layers.5.feed_forward"
        >>> found = feed_forward_memories(model, batches, run, output=model.target_embedding.weight, layers=[last])
        >>> found[last].triggers.texts.shape
        torch.Size([32, 10])
    """
    for name, count in (("k", k), ("symbols", symbols)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
    known = feed_forward_layers(model)
    if not known:
        pairs = ", ".join(f"{first} and {second}" for first, second in PAIRS)
        raise ValueError(f"{type(model).__name__} has no feed-forward layer with two matrices named {pairs}, or in a Sequential")
    unknown = [name for name in layers or () if name not in known]
    if unknown or isinstance(layers, str):
        given = layers if isinstance(layers, str) else unknown[0]
        raise ValueError(f"layers must be a list of names among {', '.join(known)}; got {given!r}")
    wanted = {name: known[name] for name in (known if layers is None else layers)}
    triggers = _stream(model, batches, run, wanted, k)
    found = {}
    for name, module in wanted.items():
        promoted = promoted_symbols(value_rows(module), output, symbols)
        has_fired = triggers[name].coefficients[:, 0] > 0
        agrees = (promoted.ids[:, 0] == triggers[name].next_ids[:, 0])[has_fired]
        share = agrees.double().mean().item()
        found[name] = FeedForwardMemory(name, len(has_fired), triggers[name], promoted, int(has_fired.sum()), share)
    return found


def feed_forward_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The feed-forward layers in a model: their names, and the module of the second matrix, whose rows for each key are the values.

    Known are pairs of `torch.nn.Linear` (or of GPT-2's `Conv1D`) with names of `PAIRS`, where the second takes as much as the first
    gives, and `torch.nn.Sequential` of a Linear, an activation, and another Linear, with dropouts or without.
    """
    found: dict[str, nn.Module] = {}
    taken: set[int] = set()
    for name, module in model.named_modules():
        second = _second_matrix(module)
        if second is not None and id(second) not in taken:
            taken.add(id(second))
            found[name or type(module).__name__] = second
    return found


def value_rows(second: nn.Module) -> Tensor:
    """The values (s, d) of a layer, by the module of its second matrix."""
    weight = second.weight.detach()
    return weight.T if isinstance(second, nn.Linear) else weight


@torch.no_grad()
def promoted_symbols(values: Tensor, output: Tensor | Callable[[Tensor], Tensor], k: int) -> Promoted:
    """The symbols that each value makes most likely, in blocks of values.

    Args:
        values: rows (s, d), as `value_rows` gives.
        output: the output embedding (V, d), or a function from rows to logits.
        k: symbols that are kept; all V where there are fewer.

    Raises:
        ValueError: an output of another width.
    """
    if isinstance(output, Tensor):
        if output.dim() != 2 or output.shape[1] != values.shape[1]:
            raise ValueError(
                f"the output embedding must be (V, {values.shape[1]}), as wide as the values, got {tuple(output.shape)}; choose "
                "layers that write into it, or pass a function from values to logits"
            )
        table = output.detach()
        output = lambda rows: rows @ table.T  # noqa: E731
    ids, scores, probabilities, start, step = [], [], [], 0, 1
    while start < len(values):
        logits = output(values[start : start + step])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best = wide.topk(min(k, wide.shape[1]))
        ids.append(best.indices)
        scores.append(best.values - wide.mean(1, keepdim=True))
        probabilities.append((best.values - wide.logsumexp(1, keepdim=True)).exp())
        start += len(logits)
        step = max(1, BLOCK_SCORES // wide.shape[1])  # the first value alone tells how many symbols there are
    return Promoted(torch.cat(ids).cpu(), torch.cat(scores).cpu(), torch.cat(probabilities).cpu())


# ------------------------------------------------------------------------------------------------------------ streaming


class _Strongest:
    """The k strongest texts of each key so far."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.kept: Triggers | None = None

    def update(self, coefficients: Tensor, next_ids: Tensor, first: int) -> None:
        """Take in coefficients (z, n, s) of texts numbered from `first`; positions count where next_ids (z, n) is not negative."""
        z, n, s = coefficients.shape
        if self.kept is None:
            empty = torch.full((s, self.k), -1, device="cpu")
            self.kept = Triggers(torch.full((s, self.k), -torch.inf, dtype=coefficients.dtype, device="cpu"), empty, empty, empty)
        if z == 0 or n == 0:
            return
        is_left_out = (next_ids < 0).to(coefficients.device)
        strengths, places = (found.cpu() for found in coefficients.masked_fill(is_left_out.unsqueeze(-1), -torch.inf).max(1))
        followers = next_ids.gather(1, places)
        is_text = (next_ids >= 0).any(1)
        numbers = torch.where(is_text, torch.arange(first, first + z, device="cpu"), -1).expand(s, z)
        new = Triggers(strengths.T, numbers, places.T.masked_fill(~is_text, -1), followers.T.masked_fill(~is_text, -1))
        # Stable, and what was kept comes first: of equal ones the text with the lowest number stays.
        order = (
            torch.cat((self.kept.coefficients, new.coefficients), 1).sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        )
        fields = ((getattr(self.kept, name), getattr(new, name)) for name in Triggers.__dataclass_fields__)
        self.kept = Triggers(*(torch.cat(pair, 1).gather(1, order) for pair in fields))


@torch.no_grad()
def _stream(
    model: nn.Module, batches: Iterable[Batch], run: Callable[[Batch], Tensor], wanted: dict[str, nn.Module], k: int
) -> dict[str, Triggers]:
    strongest = {name: _Strongest(k) for name in wanted}
    first = 0
    with _evaluating(model):
        for batch in batches:
            with coefficients_of(wanted) as seen:
                next_ids = run(batch)
            _check_next_ids(next_ids)
            next_ids = next_ids.detach().cpu().long()
            for name, calls in seen.items():
                strongest[name].update(_of_one_call(name, calls, next_ids), next_ids, first)
            first += len(next_ids)
    unseen = [name for name, kept in strongest.items() if kept.kept is None]
    if unseen:
        raise ValueError(f"no text went by, so {unseen[0]} has no triggers; batches must give at least one batch")
    return {name: kept.kept for name, kept in strongest.items() if kept.kept is not None}


@contextmanager
def coefficients_of(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Within it, the coefficients (..., s) of every call of some layers, as `feed_forward_layers` names them."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def listener(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, given: seen[name].append(given[0].detach())

    hooks = [module.register_forward_pre_hook(listener(name)) for name, module in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _of_one_call(name: str, calls: list[Tensor], next_ids: Tensor) -> Tensor:
    """The coefficients of one call, in float32 at least, if they are of the positions that `run` named."""
    if len(calls) != 1:
        raise ValueError(f"{name} ran {len(calls)} times in one batch; run must run the model once, and choose layers that it runs")
    found = calls[0]
    if found.shape[:-1].numel() != next_ids.numel() or (found.dim() > 2 and found.shape[0] != next_ids.shape[0]):
        raise ValueError(
            f"{name} has coefficients of {tuple(found.shape[:-1])} positions, but run returned symbols for "
            f"{tuple(next_ids.shape)}; choose layers of the text whose symbols these are"
        )
    wide = torch.promote_types(found.dtype, torch.float32)
    return found.to(wide).reshape(*next_ids.shape, found.shape[-1])


def _check_next_ids(next_ids: object) -> None:
    if not isinstance(next_ids, Tensor) or next_ids.is_floating_point() or next_ids.dtype == torch.bool or next_ids.dim() != 2:
        given = f"{next_ids.dtype} of shape {tuple(next_ids.shape)}" if isinstance(next_ids, Tensor) else type(next_ids).__name__
        raise TypeError(f"run must return integers (texts, positions): the symbol after each position, -1 for none; got {given}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; each module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---------------------------------------------------------------------------------------------------------- the two matrices


def _second_matrix(module: nn.Module) -> nn.Module | None:
    """The second matrix of a feed-forward layer; None if the module is none."""
    if isinstance(module, nn.Sequential):
        rest = [piece for piece in module if not isinstance(piece, nn.Dropout | nn.Identity)]
        if len(rest) == 3 and not _is_matrix(rest[1]) and _fit(rest[0], rest[2]):
            return rest[2]
        return None
    for names in PAIRS:
        first, second = (_submodule(module, name) for name in names)
        if first is not None and second is not None and _fit(first, second):
            return second
    return None


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _fit(first: nn.Module, second: nn.Module) -> bool:
    """Whether both are matrices, and the second takes what the first gives."""
    if not (_is_matrix(first) and _is_matrix(second)):
        return False
    gives = first.weight.shape[0] if isinstance(first, nn.Linear) else first.weight.shape[1]
    return gives == value_rows(second).shape[0]
