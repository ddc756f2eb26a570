"""The feed-forward layers of a decoder read as memories: which keys fire, what their values promote, and on which texts.

    out = activation(x W1 + b1) W2 + b2 = sum over keys j of coefficient_j value_j + b2

A row of W1 is a key, what W2 gives for it is its value. A value's score for a symbol is its product with the symbol's row of
the output embedding, less the mean over the vocabulary.

Source: Geva et al. 2021, arXiv:2012.14913 (keys and the texts they fire on); Geva et al. 2022, arXiv:2203.14680 (values as
promoters of symbols). Both read layers without a norm behind the sum; here a last norm may stand between value and embedding,
and is left out.
Legend: n target length, s keys of a layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossattention.data.vocabulary import BEGIN, END, FIRST_ID, PAD, UNKNOWN
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
    tokens, seen = _coefficients(translator, text, predicted)
    if not tokens:
        raise ValueError(
            f"nothing was written for {text!r}, so no key fired; give an answer to look at (--answer), or train longer"
        )
    tops = [layer.topk(min(amount.keys, layer.shape[1]), dim=1) for layer in seen]
    wanted = [top.indices.unique() for top in tops]
    inputs = _strongest_inputs(translator, examples, wanted, amount.inputs, on_progress)
    layers = []
    for index, (layer, top, keys) in enumerate(zip(seen, tops, wanted, strict=True)):
        promoted = _promoted(translator, index, keys, amount.symbols)
        known = {int(key): MemoryKey(promoted[at], inputs[index][at]) for at, key in enumerate(keys)}
        firing = (layer > 0).sum(1)
        values = top.values.clamp(min=0)
        name = f"decoder.layers.{index}.feed_forward"
        layers.append(MemoryLayer(name, layer.shape[1], top.indices.numpy(), values.numpy(), firing.numpy(), known))
    return FeedForwardView(f"{text} → {predicted}", TextSide(tuple(tokens)), tuple(layers), (note,) if note else ())


def _coefficients(translator: Translator, text: str, predicted: str) -> tuple[list[str], list[Tensor]]:
    """The target's tokens, and for each decoder layer the coefficients of all keys while each is written, (n, s)."""
    seen: list[Tensor] = []
    layers = [layer.feed_forward.down_proj for layer in translator.model.decoder.layers]
    hooks = [layer.register_forward_pre_hook(lambda module, given: seen.append(given[0][0])) for layer in layers]
    try:
        tokens = translator.read_along(text, predicted)
    finally:
        for hook in hooks:
            hook.remove()
    return tokens, [found[: len(tokens)].float().cpu() for found in seen]


def _promoted(translator: Translator, layer: int, keys: Tensor, count: int) -> list[tuple[tuple[str, float], ...]]:
    """For each key the symbols that its value promotes most, with their scores."""
    model = translator.model
    values = model.decoder.layers[layer].feed_forward.down_proj.weight.detach().float().cpu().T[keys]
    table = model.target_embedding.weight if model.out_proj is None else model.out_proj.weight
    scores = values @ table.detach().float().cpu().T
    scores = scores - scores.mean(1, keepdim=True)
    best = scores.topk(min(count, scores.shape[1]), dim=1)
    return [
        tuple((_symbol(translator, symbol), score) for symbol, score in zip(symbols, row, strict=True))
        for symbols, row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _symbol(translator: Translator, symbol: int) -> str:
    return SPECIAL[symbol] if symbol < FIRST_ID else "".join(translator.target.tokens([symbol]))


def _strongest_inputs(
    translator: Translator, examples: Pairs, wanted: Sequence[Tensor], count: int, on_progress: OnProgress | None
) -> list[list[tuple[KeyInput, ...]]]:
    """For each layer and wanted key the examples on which it fires most, each example once, the strongest first."""
    texts: list[list[str]] = []
    peaks: list[list[Tensor]] = [[] for _ in wanted]
    places: list[list[Tensor]] = [[] for _ in wanted]
    for number, (source, target) in enumerate(examples):
        tokens, seen = _coefficients(translator, source, target)
        texts.append(tokens)
        for layer, keys in enumerate(wanted):
            peak = seen[layer][:, keys].max(0)
            peaks[layer].append(peak.values)
            places[layer].append(peak.indices)
        if on_progress is not None:
            on_progress(number + 1, len(examples))
    if not texts:
        return [[()] * len(keys) for keys in wanted]
    found = []
    for layer, keys in enumerate(wanted):
        strength, place = torch.stack(peaks[layer]), torch.stack(places[layer])
        best = strength.topk(min(count, len(texts)), dim=0)
        found.append(
            [_inputs(best.values[:, key], best.indices[:, key], place[:, key], texts, examples) for key in range(len(keys))]
        )
    return found


def _inputs(strengths: Tensor, chosen: Tensor, places: Tensor, texts: list[list[str]], examples: Pairs) -> tuple[KeyInput, ...]:
    """Of the chosen examples those on which the key fires at all."""
    return tuple(
        KeyInput(tuple(texts[index]), int(places[index]), strength, examples[index][0])
        for strength, index in zip(strengths.tolist(), chosen.tolist(), strict=True)
        if strength > 0
    )
