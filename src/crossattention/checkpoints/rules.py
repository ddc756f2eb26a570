"""Which tensor of another library is which of ours: rules as data, read in both directions, strictly.

What lives here: the rules and the two functions that follow them. What does not: the names of any library (one file a family
beside this one) and files (`files`). Nothing here knows a model: a family's `rules(config)` says which tensor is which, and a
model's `state_dict()`, also of a model on the meta device, says which tensors and shapes there must be.

A pattern is a name with wildcards: `*` stands for one part between dots (a layer's number, a modality), `**` for any number of
parts; the n-th wildcard of one side is the n-th of the other. `{weight,bias}` in every pattern of a rule writes two rules.

    Rules(
        rename("encoder.layer.*.output.dense.{weight,bias}", "layers.*.out_proj.{weight,bias}"),
        fused("blocks.*.qkv.{weight,bias}", ("blocks.*.q.{weight,bias}", "blocks.*.k.{weight,bias}", "blocks.*.v.{weight,bias}")),
        ignored=[Ignored("embeddings.position_ids", "0, 1, 2, ...: computed where it is used")],
        tied=[("lm_head.weight", "shared.weight")],
    )
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Several tensors in, several out. It must also work on meta tensors: shapes are checked before a byte is read.
Turn = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Rule:
    """Some tensors of theirs are some of ours, and how to turn the ones into the others.

    Args:
        theirs: patterns of their names.
        ours: patterns of our names, with as many wildcards each.
        to_ours: their tensors, in the order of `theirs` -> ours, in the order of `ours`; for meta tensors too.
        to_theirs: the inverse.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Turn = lambda *tensors: tensors
    to_theirs: Turn = lambda *tensors: tensors

    def __post_init__(self) -> None:
        counts = {len(_WILDCARD.findall(pattern)) for pattern in (*self.theirs, *self.ours)}
        if len(counts) != 1 or not self.theirs or not self.ours:
            raise ValueError(
                f"every pattern of a rule must have the same number of wildcards, got {', '.join((*self.theirs, *self.ours))}"
            )


@dataclass(frozen=True)
class Ignored:
    """A tensor of theirs that has no counterpart here, and why that loses nothing.

    Args:
        theirs: pattern of the name. A file may have it or not.
        reason: one sentence, shown to the user.
        value: makes the tensor that it must be for the reason to hold; a file that holds another one is refused. None: any.
        is_written: write `value()` when converting to theirs, because their library asks for it.
        tolerance: how far from `value()` the tensor may be, relatively and absolutely; more where its dtype is coarser.
    """

    theirs: str
    reason: str
    value: Callable[[], Tensor] | None = None
    is_written: bool = False
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError(f"{self.theirs} is ignored without a reason; write one")
        if self.is_written and (self.value is None or _WILDCARD.search(self.theirs)):
            raise ValueError(f"{self.theirs} is to be written, so it needs one name and a value")


@dataclass(frozen=True)
class Filled:
    """A tensor of ours that theirs does not have, because it is always the same there.

    Args:
        ours: pattern of the name.
        reason: one sentence, shown to the user.
        value: a meta tensor of the right shape and dtype -> the tensor. On the way to theirs ours must equal it.
    """

    ours: str
    reason: str
    value: Callable[[Tensor], Tensor] = lambda like: torch.zeros(like.shape, dtype=like.dtype)

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError(f"{self.ours} is filled in without a reason; write one")


@dataclass(frozen=True)
class Absent:
    """A tensor of theirs that a rule names and a file may lack, and what it then is.

    Args:
        theirs: pattern of the name.
        reason: one sentence, shown to the user.
        value: a meta tensor of the right shape and dtype -> the tensor.
    """

    theirs: str
    reason: str
    value: Callable[[Tensor], Tensor] = lambda like: torch.zeros(like.shape, dtype=like.dtype)

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError(f"{self.theirs} may be absent without a reason; write one")


def rename(
    theirs: str,
    ours: str,
    to_ours: Callable[[Tensor], Tensor] | None = None,
    to_theirs: Callable[[Tensor], Tensor] | None = None,
) -> list[Rule]:
    """One tensor of theirs is one of ours; with two functions where its form differs (transposed, permuted, reshaped).

    Example:
        >>> [rule.ours for rule in rename("h.*.ln.{weight,bias}", "layers.*.norm.{weight,bias}")]
        [('layers.*.norm.weight',), ('layers.*.norm.bias',)]
    """
    if (to_ours is None) != (to_theirs is None):
        raise ValueError(f"{theirs} needs both to_ours and to_theirs, or neither")
    if to_ours is None or to_theirs is None:
        return _expanded((theirs,), (ours,))
    there, back = to_ours, to_theirs
    return _expanded((theirs,), (ours,), lambda tensor: (there(tensor),), lambda tensor: (back(tensor),))


def fused(theirs: str, ours: Sequence[str], *, dim: int = 0, sizes: Sequence[int] | None = None) -> list[Rule]:
    """One tensor of theirs is several of ours, one after the other along `dim`.

    Args:
        theirs: pattern of the fused name.
        ours: patterns of its pieces, in order.
        dim: the dimension along which they are joined.
        sizes: length of each piece along it; default equal pieces.
    """

    def split(tensor: Tensor) -> Sequence[Tensor]:
        return tensor.split(list(sizes), dim) if sizes is not None else tensor.tensor_split(len(ours), dim)

    return _expanded((theirs,), tuple(ours), split, lambda *tensors: (torch.cat(tensors, dim),))


def joined(theirs: Sequence[str], ours: str, *, dim: int = 0, sizes: Sequence[int] | None = None) -> list[Rule]:
    """Several tensors of theirs are one of ours, one after the other along `dim`: the inverse of `fused`."""
    return [Rule(rule.ours, rule.theirs, rule.to_theirs, rule.to_ours) for rule in fused(ours, theirs, dim=dim, sizes=sizes)]


def under(theirs: str, ours: str, *rules: Iterable[Rule]) -> list[Rule]:
    """The same rules with a prefix before every name of either side, as of the layers within a stack.

    Example:
        >>> [(r.theirs, r.ours) for r in under("encoder.layer.*.", "layers.*.", rename("fc1.weight", "up_proj.weight"))]
        [(('encoder.layer.*.fc1.weight',), ('layers.*.up_proj.weight',))]
    """
    return [
        Rule(tuple(theirs + name for name in rule.theirs), tuple(ours + name for name in rule.ours), rule.to_ours, rule.to_theirs)
        for group in rules
        for rule in group
    ]


@dataclass(frozen=True, init=False)
class Rules:
    """All that is to be known of a family's names, for one config.

    Args:
        groups: what `rename`, `fused`, `joined` and `under` return. Every tensor of ours is in exactly one.
        ignored: tensors of theirs without a counterpart.
        filled: tensors of ours without a counterpart.
        absent: tensors of theirs that a rule names and a file may lack.
        tied: (name, first): in theirs `name` is the same tensor as `first`, which a rule names. A file may have either or both;
            where it has both, they must be equal. Both are written.
        tied_ours: (name, first): the same on our side.
        old_names: (old pattern, new pattern) of names that earlier versions of their library wrote (gamma, beta).
        prefixes: prefixes of their names that a file may lack throughout, because it holds the model without its head ("bert.").
        wrappers: prefixes that a file may have before all its names, because the model was wrapped when it was saved.
    """

    groups: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = ()
    filled: tuple[Filled, ...] = ()
    absent: tuple[Absent, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    tied_ours: tuple[tuple[str, str], ...] = ()
    old_names: tuple[tuple[str, str], ...] = ()
    prefixes: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ("module.", "_orig_mod.")

    def __init__(
        self,
        *groups: Iterable[Rule],
        ignored: Iterable[Ignored] = (),
        filled: Iterable[Filled] = (),
        absent: Iterable[Absent] = (),
        tied: Iterable[tuple[str, str]] = (),
        tied_ours: Iterable[tuple[str, str]] = (),
        old_names: Iterable[tuple[str, str]] = (),
        prefixes: Iterable[str] = (),
        wrappers: Iterable[str] = ("module.", "_orig_mod."),
    ) -> None:
        values = {
            "groups": tuple(rule for group in groups for rule in group),
            "ignored": tuple(ignored),
            "filled": tuple(filled),
            "absent": tuple(absent),
            "tied": tuple(tied),
            "tied_ours": tuple(tied_ours),
            "old_names": tuple(old_names),
            "prefixes": tuple(prefixes),
            "wrappers": tuple(wrappers),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Step:
    """One use of a rule: actual names on both sides."""

    rule: Rule
    theirs: tuple[str, ...]
    ours: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """What of a file goes where, found from names and shapes alone (`fit`); `tensors()` reads and turns them.

    Attributes:
        steps: their names -> our names.
        ignored: name in the file -> why it is not used.
        filled: our name -> why the file has none.
        tied: name in the file -> the other name in the file of what must be the same tensor.
        absent: their name that the file lacks -> the rule that says what it then is.
    """

    source: str | Path
    file: Mapping[str, Tensor]
    names: Mapping[str, str]  # their name in the rules -> name in the file
    wanted: Mapping[str, Tensor]
    rules: Rules
    steps: tuple[Step, ...]
    ignored: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    absent: dict[str, Absent] = field(default_factory=dict)
    absent_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Our names and tensors, each made when it is asked for; what must have a certain value is checked first.

        Raises:
            ValueError: tied tensors that differ, an ignored tensor that is not what the reason says; all are listed.
        """
        faults = [
            f"tied: {name} differs from {first}, which must be the same tensor"
            for name, first in self.tied.items()
            if not _same(self.file[name], self.file[first])
        ]
        for name in self.ignored:
            rule = next(rule for rule in self.rules.ignored if _matches(rule.theirs, _key(self.names, name)) is not None)
            if rule.value is not None and not _close(self.file[name], rule.value(), rule.tolerance):
                faults.append(f"in use: {name} would be ignored ({rule.reason}), but it holds other values than that")
        if faults:
            raise _misfit(self.source, faults)
        made: dict[str, Tensor] = {}
        firsts = {first for _, first in self.rules.tied_ours}
        for step in self.steps:
            for name, tensor in zip(step.ours, step.rule.to_ours(*map(self._read, step.theirs)), strict=True):
                if name in firsts:
                    made[name] = tensor
                yield name, tensor
        for name in self.filled:
            rule = next(rule for rule in self.rules.filled if _matches(rule.ours, name) is not None)
            yield name, rule.value(self._like(tuple(self.wanted[name].shape)))
        for name, first in self.rules.tied_ours:
            if name in self.wanted:
                yield name, made[first]

    def _read(self, name: str) -> Tensor:
        if name in self.absent:
            return self.absent[name].value(self._like(self.absent_shapes[name]))
        return self.file[self.names[name]]

    def _like(self, shape: tuple[int, ...]) -> Tensor:
        """A meta tensor of the dtype that the file's first tensor has."""
        dtypes = (_dtype(self.file, self.names[name]) for step in self.steps for name in step.theirs if name in self.names)
        return torch.empty(shape, dtype=next(dtypes, torch.float32), device="meta")


def fit(tensors: Mapping[str, Tensor], rules: Rules, wanted: Mapping[str, Tensor], *, source: str | Path = "the file") -> Fit:
    """Compare a file's names and shapes with a model's, without reading a tensor.

    Args:
        tensors: their names -> tensors; or a mapping with `shapes` and `dtypes` that reads a tensor when it is asked for.
        rules: the family's, for this config.
        wanted: `state_dict()` of our model; it may lie on the meta device.
        source: what to call the file in an error.

    Raises:
        ValueError: one message with every missing, unexpected and misshapen name; or rules that do not cover the model.
    """
    names = _names_in_rules(tensors, rules)
    steps = _steps(rules, wanted)
    expected = _their_shapes(steps, wanted)
    tied, ignored = {}, {}
    faults = []
    for name, first in rules.tied:
        if name in names and first in names:
            tied[names[name]] = names[first]
        elif name in names and first in expected:
            names[first] = names[name]
    firsts = {name: first for name, first in rules.tied if first in expected}
    known = {**expected, **{name: expected[first] for name, first in firsts.items()}}
    absent: dict[str, Absent] = {}
    for name in sorted(expected.keys() - names.keys(), key=list(expected).index):
        excuse = next((rule for rule in rules.absent if _matches(rule.theirs, name) is not None), None)
        if excuse is None:
            faults.append(f"missing: {name} {expected[name]}")
        else:
            absent[name] = excuse
    for name, in_file in names.items():
        if name in known:
            continue
        rule = next((rule for rule in rules.ignored if _matches(rule.theirs, name) is not None), None)
        if rule is None:
            faults.append(f"unexpected: {in_file} {_shape(tensors, in_file)}")
        else:
            ignored[in_file] = rule.reason
    for name, asked in known.items():
        if name not in names:
            continue
        if _shape(tensors, names[name]) != asked:
            faults.append(f"misshapen: {names[name]} is {_shape(tensors, names[name])}, the model's is {asked}")
        elif not _dtype(tensors, names[name]).is_floating_point:
            faults.append(f"no floating-point numbers: {names[name]} is {_dtype(tensors, names[name])}")
    if faults:
        raise _misfit(source, faults)
    filled = {name: rule.reason for name in wanted for rule in rules.filled if _matches(rule.ours, name) is not None}
    shapes = {name: expected[name] for name in absent}
    return Fit(source, tensors, names, wanted, rules, tuple(steps), ignored, filled, tied, absent, shapes)


def to_ours(
    tensors: Mapping[str, Tensor], rules: Rules, wanted: Mapping[str, Tensor], *, source: str | Path = "the file"
) -> dict[str, Tensor]:
    """Our names and tensors of theirs: every name used, or ignored with a written reason.

    Args:
        tensors: their names -> tensors.
        rules: the family's, for this config.
        wanted: `state_dict()` of our model; it may lie on the meta device. Only names and shapes are looked at.
        source: what to call the file in an error.

    Returns:
        What `load_state_dict(strict=True)` of our model takes. Tensors may share memory with the given ones.

    Raises:
        ValueError: one message with every missing, unexpected and misshapen name; tied tensors that differ; an ignored tensor
            that is in use.

    Example:
        >>> rules = Rules(fused("qkv.weight", ("q.weight", "k.weight", "v.weight")))
        >>> wanted = {f"{name}.weight": torch.empty(2, 5, device="meta") for name in "qkv"}
        >>> {name: tuple(tensor.shape) for name, tensor in to_ours({"qkv.weight": torch.ones(6, 5)}, rules, wanted).items()}
        {'q.weight': (2, 5), 'k.weight': (2, 5), 'v.weight': (2, 5)}
    """
    return dict(fit(tensors, rules, wanted, source=source).tensors())


def to_theirs(tensors: Mapping[str, Tensor], rules: Rules, *, source: str | Path = "the model") -> dict[str, Tensor]:
    """Their names and tensors of ours, the inverse of `to_ours`.

    Args:
        tensors: our model's `state_dict()`, all of it.
        rules: the family's, for this config.
        source: what to call the model in an error.

    Returns:
        What `load_state_dict(strict=True)` of their model takes, tied names included.

    Raises:
        ValueError: a tensor of ours that no rule names, one that a rule names and is missing, or one that theirs cannot hold
            (`Filled`) or has only once (`tied_ours`).
    """
    steps = _steps(rules, tensors)
    faults = [
        f"in use: {name} has no counterpart there ({rule.reason}), but it holds other values than that"
        for rule in rules.filled
        for name, tensor in tensors.items()
        if _matches(rule.ours, name) is not None
        and not tensor.is_meta
        and not _close(tensor, rule.value(torch.empty_like(tensor, device="meta")))
    ]
    faults += [
        f"tied: {name} differs from {first}, there they are the same tensor"
        for name, first in rules.tied_ours
        if name in tensors and not tensors[name].is_meta and not _same(tensors[name], tensors[first])
    ]
    if faults:
        raise ValueError(f"{source} cannot be written under their names:\n  " + "\n  ".join(faults))
    made: dict[str, Tensor] = {}
    for step in steps:
        made.update(zip(step.theirs, step.rule.to_theirs(*(tensors[name] for name in step.ours)), strict=True))
    like = next(iter(tensors.values()), torch.empty(0))
    for rule in rules.ignored:
        if rule.is_written and rule.value is not None:
            value = rule.value()
            made[rule.theirs] = value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    made.update({name: made[first] for name, first in rules.tied if first in made})
    return made


# ------------------------------------------------------------------------------------------------------------ names

_WILDCARD = re.compile(r"\*\*|\*")
_BRACES = re.compile(r"\{([^{}]*)\}")
_COMPILED: dict[str, re.Pattern[str]] = {}


def _matches(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the wildcards stand for in a name; None where the pattern does not match it."""
    if pattern not in _COMPILED:
        parts = re.split(r"(\*\*|\*)", pattern)
        _COMPILED[pattern] = re.compile("".join({"*": "([^.]+)", "**": "(.+)"}.get(part, re.escape(part)) for part in parts))
    found = _COMPILED[pattern].fullmatch(name)
    return None if found is None else found.groups()


def _filled_in(pattern: str, captures: Sequence[str]) -> str:
    rest = iter(captures)
    return _WILDCARD.sub(lambda _: next(rest), pattern)


def _expanded(theirs: tuple[str, ...], ours: tuple[str, ...], *turns: Turn) -> list[Rule]:
    """One rule for each of the alternatives in braces."""
    found = [_BRACES.search(pattern) for pattern in (*theirs, *ours)]
    if not any(found):
        return [Rule(theirs, ours, *turns)]
    choices = [match.group(1).split(",") if match else [] for match in found]
    if len({len(some) for some in choices}) != 1:
        raise ValueError(f"every pattern must have the same number of alternatives in braces, got {', '.join((*theirs, *ours))}")
    made = []
    for some in zip(*choices, strict=True):
        names = [_BRACES.sub(lambda _, one=one: one, p, count=1) for p, one in zip((*theirs, *ours), some, strict=True)]
        made += _expanded(tuple(names[: len(theirs)]), tuple(names[len(theirs) :]), *turns)
    return made


def _names_in_rules(tensors: Mapping[str, Any], rules: Rules) -> dict[str, str]:
    """Name in the rules -> name in the file: wrappers taken away, old names made new, absent prefixes put before."""
    bare = {name: name for name in tensors}
    while wrapper := next((w for w in rules.wrappers if bare and all(name.startswith(w) for name in bare.values())), None):
        bare = {in_file: name.removeprefix(wrapper) for in_file, name in bare.items()}
    prefixes = [prefix for prefix in rules.prefixes if not any(name.startswith(prefix) for name in bare.values())]
    patterns = [pattern for rule in rules.groups for pattern in rule.theirs]
    patterns += [rule.theirs for rule in rules.ignored] + [name for name, _ in rules.tied]
    names: dict[str, str] = {}
    for in_file, name in bare.items():
        for old, new in rules.old_names:
            captures = _matches(old, name)
            name = name if captures is None else _filled_in(new, captures)
        if prefixes and not any(_matches(pattern, name) is not None for pattern in patterns):
            name = next((p + name for p in prefixes if any(_matches(x, p + name) is not None for x in patterns)), name)
        if name in names:
            raise ValueError(f"the names {names[name]} and {in_file} both mean {name}; a file must have one of them")
        names[name] = in_file
    return names


def _key(names: Mapping[str, str], in_file: str) -> str:
    return next(name for name, other in names.items() if other == in_file)


def _steps(rules: Rules, ours: Mapping[str, Tensor]) -> list[Step]:
    """The rules for exactly these names of ours, each covered once."""
    aliases = dict(rules.tied_ours)
    found: dict[tuple[int, tuple[str, ...]], None] = {}
    faults = []
    for name in ours:
        if name in aliases or any(_matches(rule.ours, name) is not None for rule in rules.filled):
            continue
        uses = {
            (number, captures)
            for number, rule in enumerate(rules.groups)
            for pattern in rule.ours
            if (captures := _matches(pattern, name)) is not None
        }
        if len(uses) != 1:
            faults.append(f"{name} of ours is in {len(uses)} rules instead of one")
        found.update(dict.fromkeys(uses))
    for number, rule in enumerate(rules.groups):
        if not _WILDCARD.search(rule.ours[0]) and (number, ()) not in found:
            faults.append(f"the model has no {' and no '.join(rule.ours)}, which a rule names")
    steps = [
        Step(
            rules.groups[number],
            tuple(_filled_in(pattern, captures) for pattern in rules.groups[number].theirs),
            tuple(_filled_in(pattern, captures) for pattern in rules.groups[number].ours),
        )
        for number, captures in found
    ]
    faults += [f"the model has no {name}, which a rule names" for step in steps for name in step.ours if name not in ours]
    if faults:
        raise ValueError("the rules do not fit our model:\n  " + "\n  ".join(dict.fromkeys(faults)))
    return steps


def _their_shapes(steps: Iterable[Step], wanted: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The names and shapes that their file must have: ours turned, on the meta device."""
    shapes: dict[str, tuple[int, ...]] = {}
    for step in steps:
        made = step.rule.to_theirs(*(torch.empty(wanted[name].shape, device="meta") for name in step.ours))
        shapes.update({name: tuple(tensor.shape) for name, tensor in zip(step.theirs, made, strict=True)})
    return shapes


# ---------------------------------------------------------------------------------------------------------- tensors


def _shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    shapes = getattr(tensors, "shapes", None)
    return tuple(tensors[name].shape if shapes is None else shapes[name])


def _dtype(tensors: Mapping[str, Any], name: str) -> torch.dtype:
    dtypes = getattr(tensors, "dtypes", None)
    return tensors[name].dtype if dtypes is None else dtypes[name]


def _same(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


def _close(given: Tensor, value: Tensor, tolerance: float = 1e-6) -> bool:
    """Whether a tensor has the values it must have, as far as its dtype can hold them."""
    if given.shape != value.shape:
        return False
    if not given.is_floating_point():
        return bool((given.cpu() == value).all())
    room = max(tolerance, 8 * torch.finfo(given.dtype).eps)
    return torch.allclose(given.cpu().double(), value.double(), rtol=room, atol=room)


def _misfit(source: str | Path, faults: Sequence[str]) -> ValueError:
    return ValueError(f"the weights in {source} do not fit the model:\n  " + "\n  ".join(faults))
