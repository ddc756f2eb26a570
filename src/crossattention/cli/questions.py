"""The texts that `predict` answers: where they come from, in batches that never make one wait for more input."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import BinaryIO

BATCH_SIZE = 4096
"""Texts that are answered together where so many are there: they are computed in the order of their lengths."""

CHUNK_BYTES = 1 << 16
LONGEST_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Question:
    """One text to answer.

    Args:
        content: the text, or its bytes as they came.
        place: where it stands, for messages; "" for an argument, which names itself.
    """

    content: str | bytes
    place: str = ""

    def text(self) -> str:
        """The text.

        Raises:
            ValueError: the bytes are not UTF-8, or too many.
        """
        if isinstance(self.content, str):
            return self.content
        if len(self.content) > LONGEST_LINE_BYTES:
            raise ValueError(f"expected at most {LONGEST_LINE_BYTES:,} bytes in a line, got more")
        try:
            return self.content.decode()
        except UnicodeDecodeError as fault:
            byte = self.content[fault.start]
            raise ValueError(f"expected UTF-8, got the byte 0x{byte:02x} as number {fault.start + 1}") from fault


def questions_from_arguments(texts: Sequence[str]) -> Iterator[list[Question]]:
    """The arguments, in batches."""
    for begin in range(0, len(texts), BATCH_SIZE):
        yield [Question(text) for text in texts[begin : begin + BATCH_SIZE]]


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
