"""Text to numbers and back: characters, words (or phonemes), and byte-level BPE.

What lives here: tokenizers as values with a JSON form, and the four ids that all of them share.
What does not: where the text comes from (`pairs`), padding (`batches`), lower-casing or any other change of the text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3
"""The ids before every vocabulary: padding, begin and end of a sequence, and a word never seen in training."""

FIRST_ID = 4
"""The first id that stands for text."""

REPLACEMENT = "\ufffd"
"""How UNKNOWN is written where ids become words: Unicode's replacement character."""

TokenizerKind = Literal["characters", "words", "bpe"]

_LISTED_SYMBOLS = 80


class UnknownSymbol(ValueError):  # noqa: N818  an "error" beside the "unknown" says nothing
    """A symbol that no training text had stands in a text to encode.

    Its own class, because a caller with many texts must tell the one that cannot be read from a fault of its own.
    """


class Tokenizer(Protocol):
    """What turns text into ids and back.

    `kind` names the class in JSON, `size` counts all ids with the four special ones. `encode` adds no BEGIN or END;
    `decode` leaves PAD, BEGIN and END out; UNKNOWN is U+FFFD (encoded as UNKNOWN again) where it stands for some text,
    else left out too. `tokens` gives the text of each id, for the rows and columns of an attention map.
    """

    kind: TokenizerKind

    @property
    def size(self) -> int:
        """The number of ids, the four special ones included."""
        ...

    @property
    def has_unknown(self) -> bool:
        """Whether UNKNOWN stands for some text: for words that training never saw."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BEGIN and END."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        ...

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The text of each id."""
        ...

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description, which `tokenizer_from_json` reads."""
        ...


class _Table:
    """Symbols and their ids, both ways: what characters and words share."""

    def __init__(self, symbols: Sequence[str], *, is_open: bool = False) -> None:
        self.symbols = tuple(symbols)
        self.is_open = is_open
        self.ids = {symbol: FIRST_ID + index for index, symbol in enumerate(self.symbols)}
        if len(self.ids) != len(self.symbols):
            twice = sorted(symbol for symbol, count in Counter(self.symbols).items() if count > 1)
            raise ValueError(f"expected symbols that all differ, got {twice[:5]} more than once; remove the repeats")

    @property
    def size(self) -> int:
        return FIRST_ID + len(self.symbols)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The symbol of each id that stands for text."""
        found, size = [], self.size
        for number in ids:
            if not 0 <= number < size:
                raise ValueError(f"expected ids from 0 to {size - 1}, got {number}; it is of another vocabulary")
            if number >= FIRST_ID:
                found.append(self.symbols[number - FIRST_ID])
            elif number == UNKNOWN and self.is_open:
                found.append(REPLACEMENT)
        return found

    def known(self) -> str:
        """The known symbols as a sentence's end."""
        listed = " ".join(repr(symbol)[1:-1] if symbol != " " else "' '" for symbol in self.symbols[:_LISTED_SYMBOLS])
        rest = len(self.symbols) - _LISTED_SYMBOLS
        return listed + (f" and {rest} more" if rest > 0 else "")


class CharacterTokenizer:
    """One id a character (a Unicode code point).

    Args:
        symbols: the characters, in the order of their ids from 4.

    Example:
        >>> letters = CharacterTokenizer("abc")
        >>> letters.encode("cab")
        [6, 4, 5]
        >>> letters.decode([1, 6, 4, 5, 2])
        'cab'
    """

    kind: TokenizerKind = "characters"

    def __init__(self, symbols: Sequence[str]) -> None:
        self._table = _Table(symbols)
        longer = [symbol for symbol in self._table.symbols if len(symbol) != 1]
        if longer:
            raise ValueError(f"expected single characters, got {longer[:5]}; use WordTokenizer for longer symbols")

    @property
    def symbols(self) -> tuple[str, ...]:
        """The characters, in the order of their ids."""
        return self._table.symbols

    @property
    def has_unknown(self) -> bool:
        """False: every text that can be encoded is known."""
        return False

    @property
    def size(self) -> int:
        """The number of ids, the four special ones included."""
        return self._table.size

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            UnknownSymbol: a character was never seen in training; it, its position and the known ones are named.
        """
        ids = self._table.ids
        try:
            return [ids[character] for character in text]
        except KeyError:
            position, character = next((i, c) for i, c in enumerate(text) if c not in ids)
            raise UnknownSymbol(
                f"the symbol {character!r} at position {position + 1} of {text!r} was never seen in training; "
                f"known symbols: {self._table.known()}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; PAD, BEGIN and END are left out."""
        return "".join(self.tokens(ids))

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The character of each id that stands for text."""
        return self._table.tokens(ids)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description, which `tokenizer_from_json` reads."""
        return {"kind": self.kind, "symbols": "".join(self.symbols)}


class WordTokenizer:
    """One id a word, words standing between spaces (any Unicode white space); phonemes are such words.

    Args:
        words: the words, in the order of their ids from 4.
        strict: a word never seen in training is an error, not UNKNOWN. For closed sets, such as phonemes.

    Example:
        >>> phonemes = WordTokenizer(["AE", "K", "T"], strict=True)
        >>> phonemes.encode("K AE T")
        [5, 4, 6]
        >>> phonemes.decode([5, 4, 6, 2])
        'K AE T'
    """

    kind: TokenizerKind = "words"

    def __init__(self, words: Sequence[str], *, strict: bool = False) -> None:
        self._table = _Table(words, is_open=not strict)
        self.strict = strict
        broken = [word for word in self._table.symbols if word.split() != [word]]
        if broken:
            raise ValueError(f"expected words without spaces, got {broken[:5]}")

    @property
    def symbols(self) -> tuple[str, ...]:
        """The words, in the order of their ids."""
        return self._table.symbols

    @property
    def has_unknown(self) -> bool:
        """Whether UNKNOWN stands for some text: not where the words are `strict`."""
        return not self.strict

    @property
    def size(self) -> int:
        """The number of ids, the four special ones included."""
        return self._table.size

    def encode(self, text: str) -> list[int]:
        """The ids of a text; a word never seen is UNKNOWN.

        Raises:
            UnknownSymbol: `strict`, and a word was never seen in training; it, its position and the known ones are
                named.
        """
        words = text.split()
        ids = self._table.ids
        if self.strict:
            for position, word in enumerate(words):
                if word not in ids:
                    raise UnknownSymbol(
                        f"the symbol {word!r}, word {position + 1} of {text!r}, was never seen in training; "
                        f"known symbols: {self._table.known()}"
                    )
        return [ids.get(word, UNKNOWN) for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, one space between words; PAD, BEGIN and END are left out."""
        return " ".join(self.tokens(ids))

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The word of each id that stands for text."""
        return self._table.tokens(ids)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description, which `tokenizer_from_json` reads."""
        return {"kind": self.kind, "symbols": list(self.symbols), "strict": self.strict}


class BPETokenizer:
    """Byte-pair encoding over bytes, by the library `tokenizers`: any text can be encoded, and comes back unchanged.

    Args:
        definition: the library's own JSON (as an object). It knows nothing of our four special ids: they lie before
            its own, so no text, not even "<end>", can ever stand for one of them.

    Source: Sennrich et al. 2016, arXiv:1508.07909; over bytes: Radford et al. 2019 (GPT-2).
    """

    kind: TokenizerKind = "bpe"

    def __init__(self, definition: Mapping[str, Any]) -> None:
        self._definition = dict(definition)
        self._inner = _tokenizers().Tokenizer.from_str(json.dumps(self._definition))

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> BPETokenizer:
        """Learn the merges of some texts.

        Args:
            texts: what to learn from.
            size: the number of ids, the four special ones included; at least 260, since every byte has one.

        Raises:
            ValueError: `size` is below 260.
            ModuleNotFoundError: without `pip install 'crossattention[data]'`.
        """
        if size < FIRST_ID + 256:
            raise ValueError(f"expected a BPE vocabulary of at least {FIRST_ID + 256} ids (256 bytes + 4), got {size}")
        library = _tokenizers()
        inner = library.Tokenizer(library.models.BPE())
        inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=size - FIRST_ID,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(json.loads(inner.to_str()))

    @property
    def has_unknown(self) -> bool:
        """False: every text that can be encoded is known."""
        return False

    @property
    def size(self) -> int:
        """The number of ids, the four special ones included; less than asked for where the texts had fewer merges."""
        return FIRST_ID + self._inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return [FIRST_ID + number for number in self._inner.encode(text).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; PAD, BEGIN and END are left out, bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(self._inner_ids(ids))

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The text of each id that stands for text; a part of a character is U+FFFD."""
        return [self._inner.decode([number]) for number in self._inner_ids(ids)]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description, which `tokenizer_from_json` reads."""
        return {"kind": self.kind, "definition": self._definition}

    def _inner_ids(self, ids: Iterable[int]) -> list[int]:
        ids = list(ids)
        wrong = [number for number in ids if not 0 <= number < self.size]
        if wrong:
            raise ValueError(f"expected ids from 0 to {self.size - 1}, got {wrong[0]}; it is of another vocabulary")
        return [number - FIRST_ID for number in ids if number >= FIRST_ID]


def build_tokenizer(kind: TokenizerKind, texts: Iterable[str], *, size: int | None = None, strict: bool = False) -> Tokenizer:
    """Make the tokenizer of some training texts.

    Args:
        kind: "characters" (all of them, sorted), "words" (between spaces, the most frequent first) or "bpe".
        texts: the training part's texts of one side; nothing held out, or unseen symbols would count as seen.
        size: the number of ids, the four special ones included: needed for "bpe", the limit for "words" (None: all),
            not for "characters".
        strict: for "words": a word never seen is an error when encoding, not UNKNOWN.

    Returns:
        The tokenizer; the same texts in any order give the same one.

    Raises:
        ValueError: an unknown kind; `size` or `strict` with a kind that has no use for it; "bpe" without `size`.
        ModuleNotFoundError: "bpe" without `pip install 'crossattention[data]'`.

    Example:
        >>> build_tokenizer("words", ["a rose is a rose"]).symbols
        ('a', 'rose', 'is')
    """
    if strict and kind != "words":
        raise ValueError(f"expected strict=True with kind 'words' only, got kind {kind!r}")
    if kind == "characters":
        if size is not None:
            raise ValueError(f"a character vocabulary has the size of its alphabet; leave size={size} out")
        return CharacterTokenizer(sorted({character for text in texts for character in text}))
    if kind == "words":
        if size is not None and size <= FIRST_ID:
            raise ValueError(f"expected a vocabulary of more than the {FIRST_ID} special ids, got size={size}")
        counts = Counter(word for text in texts for word in text.split())
        by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
        return WordTokenizer(by_frequency[: None if size is None else size - FIRST_ID], strict=strict)
    if kind == "bpe":
        if size is None:
            raise ValueError("expected a size for the kind 'bpe', such as size=8000, got none")
        return BPETokenizer.train(texts, size)
    raise ValueError(f"expected a tokenizer kind among 'characters', 'words', 'bpe', got {kind!r}")


def tokenizer_from_json(description: Mapping[str, Any]) -> Tokenizer:
    """Make the tokenizer that a `to_json` described.

    Raises:
        ValueError: the description lacks a part or names no known kind.

    Example:
        >>> tokenizer_from_json(CharacterTokenizer("ab").to_json()).encode("ba")
        [5, 4]
    """
    kind = description.get("kind")
    try:
        if kind == "characters":
            return CharacterTokenizer(description["symbols"])
        if kind == "words":
            return WordTokenizer(description["symbols"], strict=description["strict"])
        if kind == "bpe":
            return BPETokenizer(description["definition"])
    except KeyError as error:
        raise ValueError(f"expected the key {error} in a {kind!r} tokenizer, got {sorted(description)}") from None
    raise ValueError(f"expected a tokenizer kind among 'characters', 'words', 'bpe', got {kind!r}")


def _tokenizers() -> Any:
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401  reached as attributes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "BPE needs the library tokenizers; install it with: pip install 'crossattention[data]'"
        ) from error
    return tokenizers
