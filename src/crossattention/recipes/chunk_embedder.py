"""A frozen BERT as the embedder of a chunk database: the mean of its states over the tokens, as RETRO's keys are made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossattention.models.bert import BertEncoder, mean_of_states
from crossattention.models.pretrained import find_source, load
from crossattention.retrieval import ChunkTexts
from crossattention.retrieval.tokenizer import load_tokenizer

_BATCH = 64


class BertEmbedder:
    """One vector a chunk: the mean of a frozen BERT's states over the tokens of the chunk's text, [CLS] and [SEP] among them.

    Rows are sorted by length and run in small batches; a text of more tokens than the model has positions is cut there.

    Args:
        name: what `crossattention.load` takes: a folder of any format that it reads, or an id.
        tokenizer: its tokenizer.json or vocab.txt; without it, the one in the model's folder.

    Raises:
        FileNotFoundError: no model, or no tokenizer in its folder.
        ValueError: a model that is no BERT encoder, or a tokenizer with more tokens than it has.
        ImportError: without the package tokenizers.

    Source: Borgeaud et al. 2022, arXiv:2112.04426v3, section 2.2: "averaged over time".
    """

    def __init__(self, name: str | Path, *, tokenizer: str | Path | None = None) -> None:
        model = load(name)
        if not isinstance(model, BertEncoder):
            raise ValueError(f"expected a BERT encoder at {name} to embed chunks with, found a {type(model).__name__}")
        self.model = model.eval().requires_grad_(False)
        place = find_source(name)
        # Where it is to be found again, by whom is not told; not part of what it is, which its hashes say.
        self.source = str(Path(name).resolve()) if Path(name).exists() else str(name)
        folder = place if place.is_dir() else place.parent
        self.tokenizer, self._tokenizer_sha256 = _bert_tokenizer(folder if tokenizer is None else Path(tokenizer), str(name))
        if self.tokenizer.get_vocab_size() > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer of {name} has {self.tokenizer.get_vocab_size():,} tokens, the model "
                f"{model.config.vocab_size:,}: give the "
                "tokenizer that it was trained with"
            )
        self.tokenizer.enable_truncation(model.config.max_length)
        self._weights_sha256 = _digest_of(model)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.model.config.dim

    @property
    def description(self) -> Mapping[str, Any]:
        """Hashes of its weights and of its tokenizer."""
        return {"kind": "bert", "dim": self.dim, "weights_sha256": self._weights_sha256, "tokenizer_sha256": self._tokenizer_sha256}

    @torch.no_grad()
    def __call__(self, chunks: ChunkTexts) -> np.ndarray:
        """(c, d) float32."""
        encodings = self.tokenizer.encode_batch(chunks.texts)
        order = sorted(range(len(encodings)), key=lambda number: len(encodings[number].ids))
        found = np.zeros((len(chunks), self.dim), np.float32)
        for begin in range(0, len(order), _BATCH):
            rows = order[begin : begin + _BATCH]
            ids = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(encodings[row].ids, dtype=torch.long) for row in rows], batch_first=True
            )
            if ids.shape[1] == 0:  # a tokenizer without special tokens, and texts without others
                continue
            lengths = torch.tensor([len(encodings[row].ids) for row in rows])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            found[rows] = mean_of_states(self.model(ids, mask), mask, normalised=False).float().numpy()
        return found


def _bert_tokenizer(place: Path, name: str) -> tuple[Any, str]:
    """The tokenizer of a file, or of a folder that holds one, and the SHA-256 of that file."""
    found = [place] if place.is_file() else [place / file for file in ("tokenizer.json", "vocab.txt") if (place / file).is_file()]
    if not found:
        raise FileNotFoundError(
            f"expected tokenizer.json or vocab.txt beside the weights of {name}, in {place}: give the file "
            "(--embedder-tokenizer FILE)"
        )
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if found[0].suffix != ".txt":
        tokenizer = load_tokenizer(found[0])
    else:
        from crossattention.retrieval.extras import need

        need("tokenizers", "chunk databases")
        from tokenizers.implementations import BertWordPieceTokenizer

        tokenizer = BertWordPieceTokenizer(str(found[0]), lowercase=True)
    return tokenizer, digest


def _digest_of(model: torch.nn.Module) -> str:
    """A SHA-256 of the weights as they are in memory: the same whatever format they were read from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
