"""A trained model with its two vocabularies: texts in, predicted texts with scores and alignments out.

What lives here: everything between strings and the Transformer's ids once a model exists. What does not: training
(`pair_task`), scores (`scores`), files (`run`).
Letters: z batch, n target length, m source length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.data.vocabulary import BEGIN, PAD, UNKNOWN, Tokenizer, UnknownSymbol
from crossattention.maps import attention_map
from crossattention.models.generate import Hypothesis, beam_search, greedy
from crossattention.training.together import ALONE, Together

_TOGETHER = 512
"""Texts that are computed at once, at most: enough that Python's share of a step is small (dev/LOG.md)."""

_ENOUGH = 192
"""From so many texts of one length on, longer ones wait for the next batch: nothing is padded then, and no mask is needed."""

_SYMBOLS_TOGETHER = 1 << 15
"""Symbols of the sources that are computed at once, at most, unless one source alone has more: long texts must fit the memory."""

OnProgress = Callable[[int, int], None]
"""Is told now and then how much is done, and how much there is."""


@dataclass(frozen=True)
class Prediction:
    """One predicted text.

    Args:
        text: what was predicted.
        score: by which several are ranked: the log-probability, normalised for length; comparable between the
            predictions of one text only.
        log_probability: natural logarithm of the model's probability of exactly this text.
        is_finished: the model ended it; where not, it was cut at the length limit.
        ipa: the same in the International Phonetic Alphabet, where the text is phonemes.
    """

    text: str
    score: float
    log_probability: float
    is_finished: bool
    ipa: str | None = None


@dataclass(frozen=True)
class Alignment:
    """What each predicted token read of the source.

    Args:
        rows: the predicted tokens.
        columns: the source's tokens.
        weights: rows x columns, each row summing to 1.
    """

    rows: list[str]
    columns: list[str]
    weights: list[list[float]]


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """The cross-attention of every decoder layer over one text.

    Args:
        rows: the predicted tokens, n of them.
        columns: the source's tokens, m of them.
        weights: (layers, heads, n, m).
    """

    rows: list[str]
    columns: list[str]
    weights: Tensor


@dataclass(frozen=True)
class Translator:
    """A model and what turns its ids into text.

    Args:
        model: a `Transformer`, on any device.
        source: the tokenizer of what it reads.
        target: the tokenizer of what it writes.
        max_length: the most tokens of a prediction.
    """

    model: Any
    source: Tokenizer
    target: Tokenizer
    max_length: int

    def predict(
        self, texts: Iterable[str], *, beams: int = 4, num_hypotheses: int = 1, batch_size: int = 32
    ) -> Iterator[list[Prediction]]:
        """Predict texts one batch after another, as they come.

        Args:
            texts: any iterable, also an endless one; `batch_size` texts are taken before the first is answered.
            beams: width of the beam search; 1 is greedy.
            num_hypotheses: the most predictions a text, all different, best first; at most `beams`.
            batch_size: texts that are taken together, and computed in the order of their lengths, at most 512 at once; 1 answers
                each before the next is taken.

        Returns:
            An iterator with one list of predictions a text, in their order.

        Raises:
            ValueError: beams, num_hypotheses or batch_size out of range; while iterating: an empty text.
            UnknownSymbol: while iterating, after the predictions of all texts before it: a text has a symbol that was
                never seen in training.
        """
        if beams < 1 or batch_size < 1:
            raise ValueError(f"expected beams and batch_size of at least 1, got beams={beams}, batch_size={batch_size}")
        if not 1 <= num_hypotheses <= beams:
            raise ValueError(f"expected 1 to {beams} hypotheses, the number of beams, got {num_hypotheses}; raise beams as well")
        return self._predict_lazily(texts, beams, num_hypotheses, batch_size)

    def predict_all(
        self,
        texts: Sequence[str],
        *,
        beams: int = 1,
        batch_size: int = 256,
        on_progress: OnProgress | None = None,
        together: Together = ALONE,
    ) -> list[Prediction]:
        """The best prediction of each text, computed in the order of their lengths and given in their own.

        Several processes share the batches (`together`), and each gets all predictions.
        `on_progress` is called after each batch with the number of texts that are done, and that of all.
        A text with a symbol never seen in training is answered by an empty, unfinished prediction: a test set is
        scored whole.
        """
        encoded = [self._encoded_or_none(text) for text in texts]
        readable = [index for index, ids in enumerate(encoded) if ids is not None]
        answers = [Prediction("", float("-inf"), float("-inf"), is_finished=False)] * len(texts)
        sources = [encoded[index] for index in readable]
        num_done = 0

        def answer(rows: list[int]) -> list[Prediction]:
            nonlocal num_done
            found = self._search([sources[row] for row in rows], beams, 1)  # type: ignore[misc]
            num_done += len(rows)
            if on_progress is not None:
                on_progress(num_done, len(readable))
            return [self._prediction(hypotheses[0]) for hypotheses in found]

        batches = list(_rows_by_length(sources, batch_size))  # type: ignore[arg-type]
        with _evaluating(self.model):
            for rows, predictions in zip(batches, together.map(answer, batches), strict=True):
                for row, prediction in zip(rows, predictions, strict=True):
                    answers[readable[row]] = prediction
        return answers

    def align(self, text: str, predicted: str) -> Alignment:
        """What each token of a prediction read of the text: the mean over the heads and layers of cross-attention.

        Args:
            text: what the model read.
            predicted: a text of the target side, such as `predict` gave.

        Returns:
            One row a token of `predicted`, one column a token of `text`.

        Raises:
            UnknownSymbol: a symbol that was never seen in training.
        """
        maps = self.layer_maps(text, predicted)
        weights = maps.weights.mean(dim=(0, 1))
        rounded = [[round(weight, 4) for weight in row] for row in weights.tolist()]
        return Alignment(maps.rows, maps.columns, rounded)

    def layer_maps(self, text: str, predicted: str) -> LayerMaps:
        """What each token of a prediction read of the text, in every layer and head; Args and Raises as in `align`.

        Row i is of the step that wrote token i; the last step, which ends the prediction, has no row.
        """
        source_ids = self._encode(text)
        target_ids = self.target.encode(predicted)
        maps = self._cross_attention_maps(source_ids, [BEGIN, *target_ids])
        weights = maps[:, :, : len(target_ids)]
        return LayerMaps(self.target.tokens(target_ids), self.source.tokens(source_ids), weights)

    def read_along(self, text: str, predicted: str) -> list[str]:
        """Run the model over a text and a prediction of it, for hooks to look on; the prediction's tokens, n of them.

        The decoder runs over n + 1 steps: step i writes token i, the last one the end. Args and Raises as in `align`.
        """
        source_ids, target_ids = self._encode(text), self.target.encode(predicted)
        with _evaluating(self.model):
            self.model(self._padded([source_ids])[0], self._tensor([[BEGIN, *target_ids]]))
        return self.target.tokens(target_ids)

    def _cross_attention_maps(self, source_ids: list[int], decoder_ids: list[int]) -> Tensor:
        """The weights of every layer's cross-attention, (layers, heads, n + 1, m)."""
        seen: list[tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]] = []
        layers = [layer.cross_attention for layer in self.model.decoder.layers]
        hooks = [layer.register_forward_pre_hook(lambda *call: seen.append(call), with_kwargs=True) for layer in layers]
        try:
            with _evaluating(self.model):
                self.model(self._padded([source_ids])[0], self._tensor([decoder_ids]))
                return torch.stack([attention_map(layer, *args, **kwargs)[0] for layer, args, kwargs in seen])
        finally:
            for hook in hooks:
                hook.remove()

    def _predict_lazily(self, texts: Iterable[str], beams: int, num_hypotheses: int, batch_size: int) -> Iterator[list[Prediction]]:
        for batch, fault in self._encoded_batches(texts, batch_size):
            if batch:
                answers: list[list[Hypothesis]] = [[]] * len(batch)
                with _evaluating(self.model):
                    # All that were found, where several are wanted, since some may be the same text.
                    for rows, found in self._by_length(batch, beams, 1 if num_hypotheses == 1 else beams, _TOGETHER):
                        for row, hypotheses in zip(rows, found, strict=True):
                            answers[row] = hypotheses
                for hypotheses in answers:
                    yield self._different(hypotheses)[:num_hypotheses]
            if fault is not None:
                raise fault

    def _encoded_batches(self, texts: Iterable[str], batch_size: int) -> Iterator[tuple[list[list[int]], ValueError | None]]:
        """Encoded texts in batches; a fault comes with the texts before it, so that those are answered first."""
        batch: list[list[int]] = []
        for text in texts:
            try:
                batch.append(self._encode(text))
            except ValueError as fault:
                yield batch, fault
                return
            if len(batch) == batch_size:
                yield batch, None
                batch = []
        yield batch, None

    def _encode(self, text: str) -> list[int]:
        ids = self.source.encode(text)
        if not len(ids):
            raise ValueError(f"expected a text to read, got an empty one: {text!r}")
        return ids

    def _encoded_or_none(self, text: str) -> list[int] | None:
        try:
            return self._encode(text)
        except UnknownSymbol:
            return None

    def _by_length(
        self, sources: list[list[int]], beams: int, num_hypotheses: int, together: int
    ) -> Iterator[tuple[list[int], list[list[Hypothesis]]]]:
        """Places of some sources, and what was found for these: short ones first, so little is padded and most end together."""
        for rows in _rows_by_length(sources, together):
            yield rows, self._search([sources[row] for row in rows], beams, num_hypotheses)

    def _search(self, sources: list[list[int]], beams: int, num_hypotheses: int) -> list[list[Hypothesis]]:
        source_ids, source_mask = self._padded(sources)
        if beams == 1:
            return [[found] for found in greedy(self.model, source_ids, source_mask, max_length=self.max_length)]
        return beam_search(
            self.model,
            source_ids,
            source_mask,
            beams=beams,
            max_length=self.max_length,
            num_hypotheses=num_hypotheses,
        )

    def _padded(self, sources: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        """Encoded sources as one tensor, and the mask of it if any is filled up: attention without a mask is cheaper."""
        lengths = [len(source) for source in sources]
        width = max(lengths)
        mask = self._tensor([[1] * length + [0] * (width - length) for length in lengths]).bool() if min(lengths) < width else None
        return self._tensor([[*ids, *[PAD] * (width - len(ids))] for ids in sources]), mask

    def _different(self, hypotheses: list[Hypothesis]) -> list[Prediction]:
        """Predictions that differ as texts and hold no UNKNOWN that stands for nothing; at least the best."""
        by_text: dict[str, Prediction] = {}
        for hypothesis in hypotheses:
            if self.target.has_unknown or UNKNOWN not in hypothesis.ids:
                prediction = self._prediction(hypothesis)
                by_text.setdefault(prediction.text, prediction)
        return list(by_text.values()) or [self._prediction(hypotheses[0])]

    def _prediction(self, found: Hypothesis) -> Prediction:
        return Prediction(self.target.decode(found.ids), found.score, found.log_probability, found.is_finished)

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=next(self.model.parameters()).device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _rows_by_length(sources: Sequence[Sequence[int]], together: int) -> Iterator[list[int]]:
    """Places of sources that are answered at once, the short ones first."""
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    begin = 0
    while begin < len(order):
        end = begin + _count_together([len(sources[row]) for row in order[begin : begin + together]])
        yield order[begin:end]
        begin = end


def _count_together(lengths: Sequence[int]) -> int:
    """How many of the first sources, given their rising lengths, are computed at once; at least one."""
    for count in range(1, len(lengths)):
        is_longer = lengths[count] > lengths[count - 1]
        if (is_longer and count >= _ENOUGH) or (count + 1) * lengths[count] > _SYMBOLS_TOGETHER:
            return count
    return len(lengths)
