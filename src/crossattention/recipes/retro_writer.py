"""A trained RETRO and its database: texts in, continuations out, and what each of their tokens read.

What lives here: looking neighbours up for texts of a user, continuing, the composed view. What does not: training and scores
(`retro`).

Legend: n tokens of a text, c of a chunk, k neighbours, r = 2 c their tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossattention.maps import attention_map
from crossattention.models.retro import Retro
from crossattention.retrieval import Chunks, Database
from crossattention.views.content import AttentionLayer, AttentionView, TextSide

_MOST_TOKENS = 64
_SHOWN_CHUNKS = 4
_NOTE = (
    "A row is a token of the text, a column a token of a neighbour. The last token of a chunk is the first that reads the chunk's "
    "neighbours, and the last but one of the next chunk is the last; each reads those of one chunk alone. The first token of a "
    "neighbour is marked with the chunk that it was found for, its place among that chunk's neighbours, and its document."
)


@dataclass(frozen=True)
class Continuation:
    """What a model writes after a text.

    Args:
        text: the continuation alone.
        score: natural logarithm of its probability, over the number of its tokens.
        neighbours: of each whole chunk, of the text and of the continuation, the documents of its neighbours.
    """

    text: str
    score: float
    neighbours: tuple[tuple[str, ...], ...]


class Writer:
    """A model with the database that it reads.

    Args:
        model: a `Retro`.
        database: its database.
        documents: numbers of the documents that may be read.
        k: neighbours of each chunk.
    """

    def __init__(self, model: Retro, database: Database, documents: np.ndarray, k: int) -> None:
        self.model, self.database, self.k = model, database, k
        self._excluded = np.ones(database.num_documents, bool)
        self._excluded[documents] = False

    @property
    def reads(self) -> bool:
        """Whether the model reads neighbours at all."""
        return bool(self.model.config.cross_layers)

    def retrieve(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbours (z, k, r) of chunks (z, c), and which of their tokens are real."""
        neighbours, mask = self.database.neighbour_tokens(self._found(tokens))
        return torch.from_numpy(neighbours).to(tokens.device), torch.from_numpy(mask).to(tokens.device)

    def _found(self, tokens: Tensor) -> np.ndarray:
        """(z, k) numbers of the chunks nearest to chunks (z, c)."""
        rows = tokens.cpu().numpy()
        chunks = Chunks(rows, np.full(len(rows), rows.shape[1]), np.zeros(len(rows), np.int64))
        return self.database.search(self.database.embed(chunks), self.k, exclude=self._excluded)[0]

    def predict(self, texts: Iterable[str], *, num_hypotheses: int = 1, batch_size: int = 32) -> Iterator[list[Continuation]]:
        """Continue texts as they come.

        Raises:
            ValueError: at once: a number out of range; while iterating, after all texts before it: as `ids_of`.
        """
        if num_hypotheses < 1 or batch_size < 1:
            given = f"num_hypotheses={num_hypotheses}, batch_size={batch_size}"
            raise ValueError(f"expected num_hypotheses and batch_size of at least 1, got {given}")
        return (self.continue_texts([text], num_hypotheses=num_hypotheses)[0] for text in texts)

    def continue_texts(
        self, texts: Sequence[str], *, num_hypotheses: int = 1, new_tokens: int = _MOST_TOKENS
    ) -> list[list[Continuation]]:
        """Continue each text: greedily first; further answers are drawn of the nucleus of 0.9, always the same ones.

        Raises:
            ValueError: as `ids_of`.
        """
        return [self._continue(self.ids_of(text), num_hypotheses, new_tokens) for text in texts]

    def ids_of(self, text: str) -> Tensor:
        """The tokens (1, n) of a text.

        Raises:
            ValueError: a text without tokens, or one that is not Unicode.
        """
        try:
            ids = self.database.tokenizer.encode(text, add_special_tokens=False).ids
        except UnicodeEncodeError as fault:
            raise ValueError(f"expected a text that UTF-8 can write, got {text[:40]!r}: {fault.reason}") from None
        if not ids:
            raise ValueError("expected a text to continue, got an empty one")
        return torch.tensor([ids])

    def _continue(self, ids: Tensor, count: int, new_tokens: int) -> list[Continuation]:
        retrieve = self.retrieve if self.reads else None
        ids = ids.to(next(self.model.parameters()).device)
        written = [self.model.greedy(ids, retrieve, new_tokens=new_tokens)]
        if count > 1:
            generator = torch.Generator(ids.device).manual_seed(0)
            more = ids.expand(count - 1, -1)
            drawn = self.model.sample(more, retrieve, new_tokens=new_tokens, top_p=0.9, generator=generator)
            written += list(drawn.split(1))
        return [self._answer(text, ids.shape[1]) for text in written]

    @torch.no_grad()
    def _answer(self, ids: Tensor, begin: int) -> Continuation:
        found, given = self._neighbours_of(ids[:, :-1])
        logits = self.model(ids[:, :-1], *given).float().log_softmax(-1)
        gained = logits[0].gather(-1, ids[0, 1:, None])[begin - 1 :, 0]
        documents = tuple(tuple(self._document(chunk) for chunk in row if chunk >= 0) for row in found.tolist())
        return Continuation(self._decoded(ids[0, begin:]), float(gained.mean()), documents)

    def _neighbours_of(self, ids: Tensor) -> tuple[np.ndarray, tuple[Tensor, ...]]:
        """The numbers (chunks, k) of the neighbours of one text's whole chunks, and what the model is given of them."""
        c = self.database.chunk_length
        chunks = ids.shape[1] // c
        if not self.reads or not chunks:
            return np.full((0, self.k), -1), ()
        rows = ids[0, : chunks * c].view(chunks, c)
        found = np.concatenate([self._found(row[None]) for row in rows])  # one by one, as while the text is written
        tokens, mask = (torch.from_numpy(part).unsqueeze(0).to(ids.device) for part in self.database.neighbour_tokens(found))
        return found, (tokens, mask)

    @torch.no_grad()
    def view(self, text: str, answer: str | None = None) -> AttentionView:
        """Which neighbour, and which of its tokens, each token of a text and its continuation reads.

        Raises:
            ValueError: a model that reads none, or a text that has no whole chunk.
        """
        if not self.reads:
            raise ValueError("this run is a plain language model, which reads no neighbours; train one with --neighbours 2")
        given = self.ids_of(text)
        if answer is None:
            device = next(self.model.parameters()).device
            ids = self.model.greedy(given.to(device), self.retrieve, new_tokens=_MOST_TOKENS)
        else:
            ids = self.ids_of(text + answer)
        c = self.database.chunk_length
        if ids.shape[1] < c:
            raise ValueError(
                f"the text and its continuation have {ids.shape[1]} tokens, and neighbours are read from the {c}th on; give a "
                "longer text"
            )
        found, (neighbours, mask) = self._neighbours_of(ids)
        captured = self._readings(ids, neighbours, mask)
        shown = range(max(0, len(found) - _SHOWN_CHUNKS), len(found))
        found, neighbours, mask = found[shown.start :], neighbours[:, shown.start :], mask[:, shown.start :]
        first, (k, r) = shown.start * c + c - 1, neighbours.shape[2:]
        columns = np.flatnonzero(mask.cpu().numpy().reshape(-1))
        layers = []
        for name, weights in captured:  # (chunks, h, rows, k r), of each chunk's own neighbours
            heads, rows = weights.shape[1:3]
            whole = np.zeros((heads, len(shown) * rows, len(shown) * k * r), np.float32)
            for place, u in enumerate(shown):
                whole[:, place * rows : (place + 1) * rows, place * k * r : (place + 1) * k * r] = weights[u]
            whole = whole[:, : ids.shape[1] - first, columns]
            layers.append(AttentionLayer.of_weights(name, "cross-attention to neighbours", whole))
        labels = self._labels(found, neighbours.cpu().numpy()[0], shown.start)
        rows_text = tuple(self._decoded(token[None]) for token in ids[0, first:])
        title = f"retro: what {self._decoded(ids[0, -8:])!r} and the tokens before it read"
        return AttentionView(title, TextSide(rows_text), TextSide(tuple(labels[at] for at in columns)), tuple(layers), (_NOTE,))

    def _readings(self, ids: Tensor, neighbours: Tensor, mask: Tensor) -> list[tuple[str, np.ndarray]]:
        """The weights of each cross-attention of the decoder, while it runs as it always does."""
        seen: list[tuple[str, np.ndarray]] = []
        handles = []
        for number, layer in enumerate(self.model.layers):
            if layer.cross_attention is None:
                continue
            name = f"layers.{number}.cross_attention"

            def look(module: Any, args: Any, options: Any, name: str = name) -> None:
                seen.append((name, attention_map(module, *args, **options).float().cpu().numpy()))

            handles.append(layer.cross_attention.attention.register_forward_pre_hook(look, with_kwargs=True))
        try:
            self.model(ids, neighbours, mask)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _labels(self, found: np.ndarray, neighbours: np.ndarray, start: int) -> list[str]:
        """A label for each token of all neighbours, the first of each with where it is from."""
        labels = []
        for u, row in enumerate(found.tolist()):
            for place, chunk in enumerate(row):
                tokens = [self._decoded(torch.tensor([token])) for token in neighbours[u, place].tolist()]
                if chunk >= 0:
                    tokens[0] = f"[chunk {start + u + 1}, neighbour {place + 1}: {self._document(chunk)}] {tokens[0]}"
                labels += tokens
        return labels

    def _document(self, chunk: int) -> str:
        return self.database.document_name(int(self.database.documents[chunk]))

    def _decoded(self, ids: Tensor) -> str:
        text: str = self.database.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text
