"""A trained model of masked bytes: texts with marks in, filled texts with probabilities out, and what was read to fill them.

What lives here: marks, filling, the composed map. What does not: training and scores (`byte_text`).
Letters: m bytes of a text, q masked ones, n latents, h heads of the decoder.

`[MASK]` stands for one byte, `[MASK*5]` for five.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossattention.data.byte_windows import MASK, OFFSET, VOCAB_SIZE, decode, encode
from crossattention.maps import attention_map
from crossattention.recipes.translator import Alignment
from crossattention.views.content import AttentionLayer, AttentionView, TextSide

MARK = re.compile(rb"\[MASK(?:\*(\d{1,6}))?\]")
WORD = re.compile(r"\b\w{3,12}\b", re.ASCII)

_SHOWN_CHOICES = 5
_NOTE = (
    "A row is a masked byte, a column a byte of the text. Shown is what the latents read of the text in the first cross-attention, "
    "weighted by how much of each latent the masked byte's output query reads in the last one: each head of the decoder by itself, "
    "the heads of the encoder as their mean. Between the two the latents read each other, and what one latent hands to another is "
    "not in this picture."
)


@dataclass(frozen=True)
class Choice:
    r"""What a masked byte may be.

    Args:
        position: place among the bytes of the text, from 0.
        bytes: the most probable bytes as text, best first; bytes that are no characters by themselves as \x and two digits.
        probabilities: of these.
    """

    position: int
    bytes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Filling:
    r"""A text with its masked bytes filled in.

    Args:
        text: the whole text; bytes that are not UTF-8 as \x and two digits.
        score: natural logarithm of the probability of these bytes, each by itself given the visible ones.
        filled: the bytes that were filled in, one after the other.
        choices: what each masked byte may be.
    """

    text: str
    score: float
    filled: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Question:
    """A text with a hidden word.

    Args:
        marked: the text with its mark.
        text: the text as it was.
        hidden: the word.
    """

    marked: str
    text: str
    hidden: str


def hide_word(text: str) -> Question | None:
    """Hide the word in the middle of a text; None where it has none of 3 to 12 letters, or holds a mark itself.

    Example:
        >>> hide_word("one word stands here").marked
        'one word [MASK*6] here'
    """
    words = list(WORD.finditer(text))
    if not words or "[MASK" in text:
        return None
    word = words[len(words) // 2]
    hidden = word.group()
    return Question(f"{text[: word.start()]}[MASK*{len(hidden)}]{text[word.end() :]}", text, hidden)


@dataclass(frozen=True)
class ByteFiller:
    """A model and the marks of texts.

    Args:
        model: a `PerceiverIO` on bytes, on any device.
        max_length: the most bytes that it reads.
    """

    model: Any
    max_length: int

    def predict(self, texts: Iterable[str], *, num_hypotheses: int = 1, batch_size: int = 32) -> Iterator[list[Filling]]:
        """Fill texts in as they come.

        Raises:
            ValueError: at once: a number out of range; while iterating, after all texts before it: as `ids_of`.
        """
        if num_hypotheses < 1 or batch_size < 1:
            given = f"num_hypotheses={num_hypotheses}, batch_size={batch_size}"
            raise ValueError(f"expected num_hypotheses and batch_size of at least 1, got {given}")
        return self._predict_lazily(texts, num_hypotheses, batch_size)

    def _predict_lazily(self, texts: Iterable[str], num_hypotheses: int, batch_size: int) -> Iterator[list[Filling]]:
        batch: list[str] = []
        for text in texts:
            try:
                self.ids_of(text)
            except ValueError:
                yield from self.fill(batch, num_hypotheses=num_hypotheses)
                raise
            batch.append(text)
            if len(batch) == batch_size:
                yield from self.fill(batch, num_hypotheses=num_hypotheses)
                batch = []
        yield from self.fill(batch, num_hypotheses=num_hypotheses)

    def fill(self, texts: Sequence[str], *, num_hypotheses: int = 1) -> list[list[Filling]]:
        """The most probable fillings of each text, best first; fewer where there are no more. Raises as `ids_of`.

        Every masked byte is predicted by itself, so several of one word may not fit together.
        """
        ids = [self.ids_of(text) for text in texts]
        answers: list[list[Filling]] = [[]] * len(ids)
        for length in sorted({len(row) for row in ids}):
            rows = [index for index, row in enumerate(ids) if len(row) == length]
            for begin in range(0, len(rows), 32):
                some = rows[begin : begin + 32]
                for index, logs in zip(some, self._log_probabilities(np.stack([ids[row] for row in some])), strict=True):
                    answers[index] = _fillings(ids[index], logs, num_hypotheses)
        return answers

    def ids_of(self, text: str) -> np.ndarray:
        """The ids of a text, MASK where it is marked.

        Raises:
            ValueError: nothing is marked, a mark of no bytes, a text longer than the model reads, or one that is not Unicode.
        """
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as fault:
            raise ValueError(f"expected a text that UTF-8 can write, got {text[:40]!r}: {fault.reason}") from None
        pieces: list[np.ndarray] = []
        end = size = 0
        for mark in MARK.finditer(raw):
            count = int(mark.group(1) or 1)
            if count < 1:
                raise ValueError(f"expected a mark of at least one byte, got {mark.group().decode()} in {text[:60]!r}")
            size += mark.start() - end + count
            if size > self.max_length:
                break
            pieces += [encode(raw[end : mark.start()]), np.full(count, MASK, np.int64)]
            end = mark.end()
        else:
            size += len(raw) - end
        if size > self.max_length:
            raise ValueError(
                f"expected a text of at most {self.max_length} bytes, marks counted, got {size} or more: {text[:60]!r}"
            )
        if not pieces:
            raise ValueError(f"expected a mark such as [MASK] (one byte) or [MASK*5] (five) in the text, got {text[:60]!r}")
        return np.concatenate([*pieces, encode(raw[end:])])

    def align(self, text: str, predicted: str | None = None) -> Alignment:
        """The mean over the heads of `maps`, as a small map, which is the same for all answers: `predicted` is not looked at."""
        ids = self.ids_of(text)
        weights = self.maps(ids).mean(0)
        rounded = [[round(weight, 4) for weight in row] for row in weights.tolist()]
        return Alignment(self._row_names(ids), _names(ids), rounded)

    def view(self, text: str, answer: str | None = None) -> AttentionView:
        """What the masked bytes read of a text.

        Raises:
            ValueError: as `ids_of`; an answer, which this map does not depend on.
        """
        if answer is not None:
            raise ValueError("what masked bytes read does not depend on an answer, so --answer would be ignored; leave it out")
        ids = self.ids_of(text)
        layer = AttentionLayer.of_weights("latents read, then output queries", "cross-attention", self.maps(ids).cpu().numpy())
        title = f"What fills {text}"
        return AttentionView(title, TextSide(tuple(self._row_names(ids))), TextSide(tuple(_names(ids))), (layer,), notes=(_NOTE,))

    def maps(self, ids: np.ndarray) -> Tensor:
        """(h, q, m): what the latents read of each byte, weighted by what each masked byte's query reads of each latent.

        weights[h, q] = sum over latents n of decoder[h, q, n] * mean over heads of encoder[n],   so each row sums to 1
        """
        model = self.model
        given = self._tensor(ids[None])
        masked = self._tensor(np.flatnonzero(ids == MASK))
        with torch.no_grad():
            encoder, decoder = model.encoder, model.decoder
            rows = encoder.context_norm(model.inputs(given).joined())
            read = attention_map(encoder.attention, encoder.query_norm(model.latents)[None], rows)[0].mean(0)
            latents = decoder.context_norm(model.encode(given))
            asked = attention_map(decoder.attention, decoder.query_norm(model.outputs.queries[masked])[None], latents)[0]
            return asked @ read

    def _log_probabilities(self, ids: np.ndarray) -> list[np.ndarray]:
        """For each text (q, 256) log-probabilities of bytes: special ids are no answers."""
        given = self._tensor(ids)
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            logits = self.model(given, outputs=given == MASK)
            found = logits[:, OFFSET:VOCAB_SIZE].double().log_softmax(-1).cpu().numpy()
        self.model.train(was_training)
        return np.split(found, np.cumsum((ids == MASK).sum(1))[:-1])

    def _row_names(self, ids: np.ndarray) -> list[str]:
        """For each masked byte the one that is most probable there."""
        [logs] = self._log_probabilities(ids[None])
        return [_text(bytes([byte])) for byte in logs.argmax(-1).tolist()]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(next(self.model.parameters()).device)


def _fillings(ids: np.ndarray, logs: np.ndarray, count: int) -> list[Filling]:
    """The `count` most probable fillings: of sums over independent bytes the best ones need the best ones of fewer bytes only."""
    order = np.argsort(-logs, axis=-1, kind="stable")
    best: list[tuple[float, bytes]] = [(0.0, b"")]
    for row, ranked in zip(logs, order[:, :count], strict=True):
        longer = [(score + float(row[byte]), filled + bytes([byte])) for score, filled in best for byte in ranked.tolist()]
        best = sorted(longer, key=lambda one: -one[0])[:count]
    places = np.flatnonzero(ids == MASK)
    choices = tuple(
        Choice(
            int(place),
            tuple(_text(bytes([byte])) for byte in ranked[:_SHOWN_CHOICES].tolist()),
            tuple(round(float(np.exp(row[byte])), 6) for byte in ranked[:_SHOWN_CHOICES]),
        )
        for place, row, ranked in zip(places, logs, order, strict=True)
    )
    found = []
    for score, filled in best:
        whole = ids.copy()
        whole[places] = encode(filled)
        found.append(Filling(_text(decode(whole)), score, _text(filled), choices))
    return found


def _names(ids: np.ndarray) -> list[str]:
    """A name for each byte; a masked one is a shaded block."""
    return ["░" if byte == MASK else _text(bytes([byte - OFFSET])) for byte in ids.tolist()]


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")
