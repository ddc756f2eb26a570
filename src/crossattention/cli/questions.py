"""The questions that `predict` answers: where they come from, in batches that never make one wait for more input."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from crossattention.recipes.recipe import Input

BATCH_SIZE = 4096
"""Texts that are answered together where so many are there: they are computed in the order of their lengths."""

CHUNK_BYTES = 1 << 16
LONGEST_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Question:
    r"""One question to answer.

    Args:
        content: its words, or a line of them as it came, tabs between them.
        place: where it stands, for messages; "" for arguments, which name themselves.
    """

    content: tuple[str, ...] | bytes
    place: str = ""

    def given(self, names: Sequence[str] = ("TEXT",)) -> "Input":
        """The question as a run is asked it: one text, or as many as there are names.

        Raises:
            ValueError: the bytes are not UTF-8, or too many; not as many words as there are names.
        """
        if len(names) == 1:
            return self._text()
        words = self.content if isinstance(self.content, tuple) else tuple(self._text().split("\t"))
        if len(words) != len(names):
            raise ValueError(f"expected {' and '.join(names)} with a tab between, got {len(words)} words: {words!r}")
        return words

    def _text(self) -> str:
        if isinstance(self.content, tuple):
            return self.content[0]
        if len(self.content) > LONGEST_LINE_BYTES:
            raise ValueError(f"expected at most {LONGEST_LINE_BYTES:,} bytes in a line, got more")
        try:
            return self.content.decode()
        except UnicodeDecodeError as fault:
            byte = self.content[fault.start]
            raise ValueError(f"expected UTF-8, got the byte 0x{byte:02x} as number {fault.start + 1}") from fault


def questions_from_arguments(words: Sequence[str], names: Sequence[str] = ("TEXT",)) -> Iterator[list[Question]]:
    """The arguments, in batches; a question is as many of them as there are names.

    Raises:
        ValueError: words are left over.
    """
    size = len(names)
    if len(words) % size:
        raise ValueError(f"a question is {size} words, {' '.join(names)}; got {len(words)} words: {' '.join(words)}")
    questions = [Question(tuple(words[begin : begin + size])) for begin in range(0, len(words), size)]
    for begin in range(0, len(questions), BATCH_SIZE):
        yield questions[begin : begin + BATCH_SIZE]


def questions_from_stdin() -> Iterator[list[Question]]:
    """The lines of standard input, each batch as soon as any line is there.

    What is typed or trickles in is answered line by line; what comes as a flood, in full batches.
    """
    numbers = count(1)
    for lines in lines_as_they_come(sys.stdin.buffer):
        for begin in range(0, len(lines), BATCH_SIZE):
            batch = lines[begin : begin + BATCH_SIZE]
            yield [Question(line, f"line {next(numbers)} of standard input: ") for line in batch]


def lines_as_they_come(stream: BinaryIO) -> Iterator[list[bytes]]:
    """All whole lines that one read of the stream gives, then those of the next; without their line ends.

    A line longer than may be read is cut just beyond the limit, for its reader to refuse: memory stays bounded.
    """
    begun = b""
    while chunk := stream.read1(CHUNK_BYTES):
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = begun + lines[0]
            begun = rest
            yield [line.removesuffix(b"\r") for line in lines]
        elif len(begun) <= LONGEST_LINE_BYTES:
            begun += rest
    if begun:
        yield [begun.removesuffix(b"\r")]
