"""Asking a run: by arguments and by standard input, for a person and for a program."""

import hashlib
import io
import json
import sys

import pytest

from cli.conftest import type_in
from crossattention.cli import predict
from crossattention.cli.main import main


class Stdin:
    """Standard input of some bytes, in chunks."""

    def __init__(self, *chunks, is_terminal=False):
        self.buffer = self
        self.chunks = list(chunks)
        self.before_each_read = lambda: None
        self.is_terminal = is_terminal

    def read1(self, size):
        self.before_each_read()
        return self.chunks.pop(0) if self.chunks else b""

    def isatty(self):
        return self.is_terminal


@pytest.fixture
def feed(monkeypatch):
    def to_stdin(*chunks, **how):
        monkeypatch.setattr(sys, "stdin", Stdin(*chunks, **how))
        return sys.stdin

    return to_stdin


def test_an_answer_is_a_line_of_text_prediction_and_score(trained):
    code, stdout, _ = type_in("predict", trained.run, "abc", "gfe")
    rows = [line.split("\t") for line in stdout.splitlines()]
    assert code == 0
    assert [row[:2] for row in rows] == [["abc", "C B A"], ["gfe", "E F G"]]
    assert all(float(score) <= 0 for _, _, score in rows)


def test_the_weights_are_named_on_stderr(trained):
    _, _, stderr = type_in("predict", trained.run, "abc")
    digest = hashlib.sha256((trained.run / "best" / "model.safetensors").read_bytes()).hexdigest()
    assert stderr == f"loaded {trained.run / 'best'} (seq2seq, step 200, sha256 {digest[:12]})\n"


def test_several_answers_come_best_first(trained):
    _, stdout, _ = type_in("predict", trained.run, "abc", "--best", 3)
    rows = [line.split("\t") for line in stdout.splitlines()]
    scores = [float(row[2]) for row in rows]
    assert [row[0] for row in rows] == ["abc"] * 3
    assert rows[0][1] == "C B A"
    assert len({row[1] for row in rows}) == 3
    assert scores == sorted(scores, reverse=True)


def test_beams_follow_best_unless_given(trained):
    assert type_in("predict", trained.run, "abc", "--best", 6)[0] == 0
    code, stdout, stderr = type_in("predict", trained.run, "abc", "--best", 3, "--beams", 2)
    assert (code, stdout) == (2, "")
    assert "expected 1 to 2 hypotheses, the number of beams, got 3; raise beams as well" in stderr


def test_json_holds_all_that_is_known_of_an_answer(trained):
    _, stdout, _ = type_in("predict", trained.run, "abc", "bcd", "--json", "--best", 2)
    first, second = map(json.loads, stdout.splitlines())
    assert (first["input"], second["input"]) == ("abc", "bcd")
    assert first["predictions"][0]["text"] == "C B A"
    assert set(first["predictions"][0]) == {"text", "score", "log_probability", "is_finished", "ipa"}
    assert len(first["predictions"]) == 2


def test_json_with_a_map_holds_its_weights(trained):
    _, stdout, _ = type_in("predict", trained.run, "abc", "--json", "--map")
    alignment = json.loads(stdout)["alignment"]
    assert alignment["columns"] == ["a", "b", "c"]
    assert alignment["rows"] == ["C", "B", "A"]
    assert [sum(row) for row in alignment["weights"]] == pytest.approx([1, 1, 1], abs=1e-3)


def test_a_map_is_drawn_below_each_text(trained):
    _, stdout, _ = type_in("predict", trained.run, "abc", "--map")
    lines = stdout.splitlines()
    assert lines[0].startswith("abc\tC B A\t")
    assert lines[1] == "  a b c"
    assert [line[0] for line in lines[2:5]] == ["C", "B", "A"]
    assert lines[5].startswith("0 ░▒▓█ ")


def test_g2p_answers_carry_ipa_and_capitals_are_letters(g2p_run):
    _, stdout, stderr = type_in("predict", g2p_run, "Cat", "cat")
    upper, lower = (line.split("\t") for line in stdout.splitlines())
    assert "g2p, step 1,234" in stderr
    assert (upper[0], lower[0]) == ("Cat", "cat")
    assert upper[1:] == lower[1:]
    assert len(upper) == 4


def test_a_terminal_gets_straight_columns_and_no_tabs(trained, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["predict", str(trained.run), "abc", "gg"]) == 0
    first, second = sys.stdout.getvalue().splitlines()
    assert first.startswith("abc  C B A")
    assert second.startswith("gg   ")
    assert len(first) == len(second)  # the scores end flush
    assert "\t" not in first


def test_standard_input_is_answered_line_by_line(trained, feed):
    feed(b"abc\nbcd\r\n", b"cde")
    code, stdout, _ = type_in("predict", trained.run)
    assert code == 0
    assert [line.split("\t")[1] for line in stdout.splitlines()] == ["C B A", "D C B", "E D C"]


def test_a_line_is_answered_before_the_next_one_comes(trained, feed, monkeypatch):
    class Watched(io.StringIO):
        flushed = ""

        def flush(self):
            self.flushed = self.getvalue()

    stdout = Watched()
    monkeypatch.setattr(sys, "stdout", stdout)
    answered = []
    feed(b"abc\n", b"bcd\n").before_each_read = lambda: answered.append(stdout.flushed.count("\n"))
    assert main(["predict", str(trained.run)]) == 0
    assert answered == [0, 1, 2]


def test_answers_do_not_depend_on_how_lines_are_batched(trained, feed):
    words = ["abc", "bcdef", "g", "fed", "aabbcc"] * 15
    feed("\n".join(words).encode())
    together = type_in("predict", trained.run)[1]
    feed(*(f"{word}\n".encode() for word in words))
    alone = type_in("predict", trained.run)[1]
    assert [line.split("\t")[:2] for line in together.splitlines()] == [line.split("\t")[:2] for line in alone.splitlines()]


def test_an_unknown_symbol_is_named_with_those_that_are_known(trained):
    code, stdout, stderr = type_in("predict", trained.run, "abc", "ab!c")
    assert code == 2
    assert stdout.startswith("abc\tC B A")  # what came before it is answered
    assert "the symbol '!' at position 3 of 'ab!c' was never seen in training; known symbols: a b c d e f g" in stderr
    assert "--skip-bad" not in stderr


BAD_LINES = b"abc\na!\n\nd\xff\nbcd\n"


def test_a_bad_line_is_named_and_ends_the_answers(trained, feed):
    feed(BAD_LINES)
    code, stdout, stderr = type_in("predict", trained.run)
    assert code == 2
    assert [line.split("\t")[0] for line in stdout.splitlines()] == ["abc"]
    assert "line 2 of standard input: the symbol '!' at position 2 of 'a!'" in stderr
    assert stderr.endswith("; --skip-bad leaves such lines out\n")


def test_bad_lines_can_be_left_out_and_are_all_named(trained, feed):
    feed(BAD_LINES)
    code, stdout, stderr = type_in("predict", trained.run, "--skip-bad")
    assert code == 0
    assert [line.split("\t")[0] for line in stdout.splitlines()] == ["abc", "bcd"]
    left_out = [line for line in stderr.splitlines() if line.startswith("left out: ")]
    assert [line.split(":")[1] for line in left_out] == [f" line {number} of standard input" for number in (2, 3, 4)]
    assert "expected UTF-8, got the byte 0xff as number 2" in left_out[2]


def test_a_person_is_told_what_to_type(trained, feed):
    feed(b"abc\n", is_terminal=True)
    assert "one text a line; Ctrl-D ends\n" in type_in("predict", trained.run)[2]


def test_progress_on_the_terminal_leaves_the_answers_in_their_file(trained, feed, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stdout, stderr = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    feed(*[b"abc\n"] * 5)
    assert main(["predict", str(trained.run)]) == 0
    assert len(stdout.getvalue().splitlines()) == 5
    assert "answered: " in stderr.getvalue()
    assert "C B A" not in stderr.getvalue()


def test_texts_that_look_like_flags_come_after_two_dashes(trained):
    code, _, stderr = type_in("predict", trained.run, "--", "--best")
    assert code == 2
    assert "the symbol '-' at position 1 of '--best'" in stderr


def test_control_characters_of_an_answer_never_reach_the_terminal():
    found = type("Found", (), {"text": "a\tb\x1b[2J", "ipa": None, "score": -1.0})
    assert predict._rows("x\ny", [found]) == [["x\\ny", "a\\tb\\x1b[2J", "-1.000"]]


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    code, stdout, stderr = type_in("predict", tmp_path, "abc")
    assert (code, stdout) == (2, "")
    assert f"{tmp_path} is no run: expected config.json, model.safetensors, task.json" in stderr
    assert "found notes.txt" in stderr


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert f"expected the folder of a run at {tmp_path / 'x'}, found nothing" in type_in("predict", tmp_path / "x", "a")[2]
