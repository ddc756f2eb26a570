"""The feed-forward layers of a decoder as `views` show them: which keys fire, what their values promote, and on which texts.

What lives here: a translator's texts and symbols. What does not: reading a model as memories (`maps.feed_forward`), which says how.
A last norm between value and embedding is left out. Legend: n target length, s keys of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossattention.data.vocabulary import BEGIN, END, FIRST_ID, PAD, UNKNOWN
from crossattention.maps.feed_forward import (
    FeedForwardMemory,
    Promoted,
    Triggers,
    coefficients_of,
    feed_forward_layers,
    feed_forward_memories,
    promoted_symbols,
    value_rows,
)
from crossattention.recipes.translator import OnProgress, Translator
from crossattention.views.content import FeedForwardView, KeyInput, MemoryKey, MemoryLayer, TextSide

SPECIAL = {PAD: "[padding]", BEGIN: "[begin]", END: "[end]", UNKNOWN: "[unknown]"}

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Amount:
    """How much is shown.

    Args:
        keys: the strongest keys of a token.
        symbols: symbols that a value promotes.
        inputs: texts on which a key fires.
    """

    keys: int = 8
    symbols: int = 6
    inputs: int = 4


def feed_forward_view(
    translator: Translator,
    text: str,
    predicted: str,
    examples: Pairs,
    *,
    amount: Amount | None = None,
    note: str = "",
    on_progress: OnProgress | None = None,
) -> FeedForwardView:
    """What every feed-forward layer of the decoder remembers at each step of a prediction.

    Args:
        translator: the model and its vocabularies.
        text: what the model read.
        predicted: a text of the target side, such as `Translator.predict` gave.
        examples: (source, target) pairs in which the texts are looked for on which a key fires; none leaves these out.
        amount: how much is shown.
        note: what the examples are, for the page's foot.
        on_progress: called now and then with the number of examples that were read, and that of all.

    Raises:
        ValueError: an empty text or prediction.
        UnknownSymbol: a symbol that was never seen in training.

    Cost: one forward pass an example.
    """
    amount = amount or Amount()
    decoder = {f"decoder.{name}": module for name, module in feed_forward_layers(translator.model.decoder).items()}
    tokens, seen = _coefficients(translator, decoder, text, predicted)
    if not tokens:
        raise ValueError(
            f"nothing was written for {text!r}, so no key fired; give an answer to look at (--answer), or train longer"
        )
    memories = _memories(translator, list(decoder), examples, amount, on_progress)
    layers = []
    for name, second in decoder.items():
        coefficients = seen[name]
        top = coefficients.topk(min(amount.keys, coefficients.shape[1]), dim=1)
        memory = memories.get(name)
        promoted = promoted_symbols(value_rows(second), _output(translator), amount.symbols) if memory is None else memory.promoted
        known = {}
        for key in top.indices.unique().tolist():
            inputs = () if memory is None else _inputs(translator, memory.triggers, key, examples)
            known[key] = MemoryKey(_promoted(translator, promoted, key), inputs)
        layers.append(
            MemoryLayer(
                name,
                coefficients.shape[1],
                top.indices.numpy(),
                top.values.clamp(min=0).numpy(),
                (coefficients > 0).sum(1).numpy(),
                known,
                agreement=None if memory is None or math.isnan(memory.agreement) else memory.agreement,
                num_triggered=None if memory is None else memory.num_triggered,
            )
        )
    return FeedForwardView(f"{text} → {predicted}", TextSide(tuple(tokens)), tuple(layers), (note,) if note else ())


def _coefficients(
    translator: Translator, layers: dict[str, nn.Module], text: str, predicted: str
) -> tuple[list[str], dict[str, Tensor]]:
    """The target's tokens, and for each layer the coefficients of all keys while each is written, (n, s)."""
    with coefficients_of(layers) as seen:
        tokens = translator.read_along(text, predicted)
    return tokens, {name: calls[0][0, : len(tokens)].float().cpu() for name, calls in seen.items()}


def _memories(
    translator: Translator, layers: list[str], examples: Pairs, amount: Amount, on_progress: OnProgress | None
) -> dict[str, FeedForwardMemory]:
    """What the layers remember of the examples; nothing where there are none."""

    def one_by_one() -> Iterator[tuple[str, str]]:
        for number, pair in enumerate(examples):
            yield pair
            if on_progress is not None:
                on_progress(number + 1, len(examples))

    def run(pair: tuple[str, str]) -> Tensor:
        translator.read_along(*pair)
        return torch.tensor([[*translator.target.encode(pair[1]), -1]])  # the step that ends the text writes no token

    if not examples:
        return {}
    sizes = {"k": amount.inputs, "symbols": amount.symbols}
    return feed_forward_memories(translator.model, one_by_one(), run, output=_output(translator), layers=layers, **sizes)


def _output(translator: Translator) -> Tensor:
    """The output embedding (V, d)."""
    model = translator.model
    return (model.target_embedding.weight if model.out_proj is None else model.out_proj.weight).detach()


def _promoted(translator: Translator, promoted: Promoted, key: int) -> tuple[tuple[str, float], ...]:
    """The symbols that a key's value promotes most, with their scores."""
    pairs = zip(promoted.ids[key].tolist(), promoted.scores[key].tolist(), strict=True)
    return tuple((_symbol(translator, symbol), score) for symbol, score in pairs)


def _symbol(translator: Translator, symbol: int) -> str:
    return SPECIAL[symbol] if symbol < FIRST_ID else "".join(translator.target.tokens([symbol]))


def _inputs(translator: Translator, triggers: Triggers, key: int, examples: Pairs) -> tuple[KeyInput, ...]:
    """The examples on which a key fires most, if it fires at all."""
    rows = (triggers.texts[key].tolist(), triggers.positions[key].tolist(), triggers.coefficients[key].tolist())
    found = []
    for number, place, strength in zip(*rows, strict=True):
        if strength > 0:
            source, target = examples[number]
            tokens = translator.target.tokens(translator.target.encode(target))
            found.append(KeyInput(tuple(tokens), place, strength, source))
    return tuple(found)
