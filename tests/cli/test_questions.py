"""Where texts to answer come from, and when."""

import io

import pytest

from crossattention.cli import questions
from crossattention.cli.questions import Question, lines_as_they_come, questions_from_arguments, questions_from_stdin


class Chunks:
    """A stream that gives its chunks one by one, as a slow writer does."""

    def __init__(self, *chunks):
        self.chunks = list(chunks)
        self.num_reads = 0

    def read1(self, size):
        self.num_reads += 1
        return self.chunks.pop(0) if self.chunks else b""


def test_lines_are_whole_however_the_bytes_come():
    found = lines_as_they_come(Chunks(b"ca", b"t\ndo", b"g\r\n\n", b"caf\xc3", b"\xa9"))
    assert [line for lines in found for line in lines] == [b"cat", b"dog", b"", "caf\u00e9".encode()]


def test_a_line_is_given_before_the_next_is_read():
    stream = Chunks(b"cat\n", b"dog\n")
    assert next(lines_as_they_come(stream)) == [b"cat"]
    assert stream.num_reads == 1


def test_no_input_gives_no_lines():
    assert list(lines_as_they_come(io.BytesIO(b""))) == []


def test_a_line_without_an_end_stays_bounded_and_is_refused(monkeypatch):
    monkeypatch.setattr(questions, "LONGEST_LINE_BYTES", 10)
    [line, after, last] = [line for lines in lines_as_they_come(Chunks(*[b"x" * 8] * 100, b"\nok\n", b"end")) for line in lines]
    assert len(line) < 30
    with pytest.raises(ValueError, match="expected at most 10 bytes in a line, got more"):
        Question(line).given()
    assert (after, last) == (b"ok", b"end")


def test_questions_of_standard_input_name_their_line(monkeypatch):
    monkeypatch.setattr(questions, "BATCH_SIZE", 32)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\n" * 40)))
    batches = list(questions_from_stdin())
    assert [len(batch) for batch in batches] == [32, 8]
    assert batches[1][0] == Question(b"a", "line 33 of standard input: ")


def test_arguments_come_in_batches_and_need_no_place(monkeypatch):
    monkeypatch.setattr(questions, "BATCH_SIZE", 32)
    batches = list(questions_from_arguments([str(number) for number in range(40)]))
    assert [len(batch) for batch in batches] == [32, 8]
    assert batches[1][7] == Question(("39",), "")


def test_bytes_that_are_no_utf8_are_named():
    with pytest.raises(ValueError, match="expected UTF-8, got the byte 0xff as number 3"):
        Question(b"ab\xff").given()
