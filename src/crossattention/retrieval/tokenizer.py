"""The tokenizer of a database: byte-level BPE trained on its documents, or a file that was given; always one `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossattention.retrieval.extras import need

PAD = "<pad>"
END = "<end>"
_PADS = (PAD, "[PAD]", "<|padding|>")


def train_tokenizer(texts: Iterator[str], *, vocab_size: int) -> bytes:
    """Train a byte-level BPE: any text becomes tokens, and these become the same text.

    Args:
        texts: the text, in pieces.
        vocab_size: how many tokens; at least 258: all bytes, `<pad>` (0) and `<end>` (1), which no text becomes.

    Returns:
        The content of its `tokenizer.json`.

    Raises:
        ValueError: `vocab_size` below 258.
        ImportError: without the package tokenizers.

    Source: Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019, section 2.2.
    """
    need("tokenizers", "chunk databases")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise ValueError(f"expected a vocabulary of at least 258 tokens (every byte, and two special ones), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str().encode("utf-8")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a file, for text alone: nothing added, cut or filled up, and special tokens in a text are text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no tokenizer file.
        ImportError: without the package tokenizers.
    """
    need("tokenizers", "chunk databases")
    from tokenizers import Tokenizer

    content = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{path} is no tokenizer file (tokenizer.json of the package tokenizers): {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def pad_id_of(tokenizer: Any) -> int:
    """The id of the padding; 0 where the tokenizer has none, as masks alone say what is real."""
    found = (tokenizer.token_to_id(pad) for pad in _PADS)
    return next((number for number in found if number is not None), 0)
