"""What a person sees while a model trains, drawn from made-up events."""

import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from crossattention.cli.screen import LiveScreen, PlainLines, screen_for
from crossattention.training.events import Evaluated, Finished, Interrupted, Saved, Started, Step

SAMPLE = {
    "source": "[red]odd",
    "predicted": "AA D",
    "reference": "AA D",
    "ipa": "\u0251d",
    "reference_ipa": "\u0251d",
    "rows": ["AA", "D"],
    "columns": ["o", "d", "d"],
    "weights": [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]],
}
LATER = {**SAMPLE, "predicted": "AA D Z", "rows": ["AA", "D", "Z"], "weights": [*SAMPLE["weights"], [0.0, 0.0, 1.0]]}
EVENTS = [
    Started(None, 12345, "cpu", None),
    Step(10, None, 3.5, 900.0, 1e-4, 1.0, 2.0, None),
    Evaluated(10, {"per": 0.9}, SAMPLE, True),
    Saved(10, Path("r/checkpoints/step-000010"), True),
    Step(20, 40, 2.5, 1000.0, 1e-3, 1.0, 4.0, 4.0),
    Evaluated(40, {"per": 0.8}, LATER, True),
    Finished(40, {"per": 0.8}, 40, 8.0),
]


def console(*, width=80, height=30, **settings):
    return Console(file=io.StringIO(), width=width, height=height, highlight=False, **settings)


def drawn(screen, events):
    with screen:
        for event in events:
            screen.draw(event)
    return screen.console.file.getvalue()


def as_seen(output, *, height=200):
    """The lines of a terminal after this output: what cursor movements and erasures leave."""
    rows, row, column = [[] for _ in range(height)], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", output):
        if part == "\n":
            row, column = row + 1, 0
        elif part == "\r":
            column = 0
        elif re.fullmatch(r"\x1b\[\d*A", part):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            rows[row] = []
        elif not part.startswith("\x1b"):
            rows[row] += " " * (column + 1 - len(rows[row]))
            rows[row][column] = part
            column += 1
    return "\n".join("".join(cells).rstrip() for cells in rows).rstrip()


@pytest.fixture(autouse=True)
def not_in_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)


def test_a_terminal_gets_the_live_screen():
    assert isinstance(screen_for(console(force_terminal=True)), LiveScreen)


def test_a_pipe_a_dumb_terminal_and_ci_get_plain_lines(monkeypatch):
    assert isinstance(screen_for(console()), PlainLines)
    assert isinstance(screen_for(console(force_terminal=True, _environ={"TERM": "dumb"})), PlainLines)
    monkeypatch.setenv("CI", "true")
    assert isinstance(screen_for(console(force_terminal=True)), PlainLines)


def test_plain_lines_tell_the_whole_run_without_control_characters():
    output = drawn(PlainLines(console()), EVENTS)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", output)
    assert output.split("\n")[:6] == [
        "12,345 parameters on cpu",
        "step 10: per 90.0 %  (best so far)",
        "  reads   [red]odd",
        "  writes  AA D      /\u0251d/",
        "  data    AA D      /\u0251d/",
        "step 40: per 80.0 %  (best so far)",
    ]


def test_plain_lines_show_the_last_map_once_at_the_end():
    output = drawn(PlainLines(console()), EVENTS)
    assert output.endswith("   o d d\nAA ██\nD    ▒▒▒▒\nZ      ██\n0 ░▒▓█ 1.00\n")
    assert output.count("   o d d") == 1


def test_plain_lines_come_at_most_every_ten_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("crossattention.cli.screen.time.monotonic", lambda: now[0])
    screen = PlainLines(console())
    for step in range(1, 26):
        screen.draw(Step(step, 25, 1.0, 10.0, 1e-3, 1.0, float(step), 1.0))
        now[0] += 1.0
    shown = re.findall(r"^step (\d+)/25  loss", screen.console.file.getvalue(), re.MULTILINE)
    assert shown == ["1", "11", "21"]


def test_long_plain_lines_are_not_broken():
    sample = {**SAMPLE, "source": "x" * 300}
    output = drawn(PlainLines(console(width=80)), [Evaluated(1, {"per": 1.0}, sample, True)])
    assert "x" * 300 in output


def test_the_live_screen_redraws_one_map_in_place_below_the_evaluations():
    seen = as_seen(drawn(LiveScreen(console(force_terminal=True, color_system=None)), EVENTS))
    assert seen.split("\n")[:3] == [
        "12,345 parameters on cpu",
        "step 10: per 90.0 %  (best so far)",
        "step 40: per 80.0 %  (best so far)",
    ]
    assert seen.count("reads   [red]odd") == 1
    assert "writes  AA D Z" in seen
    assert "   o d d\nAA ██\nD    ▒▒▒▒\nZ      ██\n0 ░▒▓█ 1.00" in seen


def test_the_live_screen_shows_progress_loss_speed_and_time_left():
    screen = LiveScreen(console(force_terminal=True, color_system=None))
    with screen:
        for event in EVENTS[:5]:
            screen.draw(event)
        screen.live.refresh()
        during = as_seen(screen.console.file.getvalue())
    assert re.search(r"^step 20/40 ━+╸ +loss 2.500  1,000 tokens/s  0:04 left$", during, re.MULTILINE)
    assert "tokens/s" not in as_seen(screen.console.file.getvalue())  # it is gone when the training is


def test_the_live_screen_colours_maps_only_where_256_colours_are():
    assert "48;5;" in drawn(LiveScreen(console(force_terminal=True, color_system="256")), EVENTS)
    assert "48;5;" not in drawn(LiveScreen(console(force_terminal=True, color_system="standard")), EVENTS)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 16), (24, 14)])
def test_the_live_screen_never_outgrows_the_terminal(width, height):
    long = {**SAMPLE, "rows": ["R"] * 60, "columns": ["c"] * 200, "weights": [[1.0] * 200] * 60, "source": "y" * 500}
    screen = LiveScreen(console(width=width, height=height, force_terminal=True, color_system=None))
    with screen:
        screen.draw(EVENTS[1])
        screen.draw(Evaluated(10, {"per": 0.9}, long, True))
        drawn_lines = screen.console.render_lines(screen.live.get_renderable(), pad=False)
    assert len(drawn_lines) < height
    assert max(sum(segment.cell_length for segment in line) for line in drawn_lines) <= width


def test_a_model_that_writes_nothing_yet_has_no_map():
    empty = {**SAMPLE, "predicted": "", "rows": [], "weights": []}
    for screen in (PlainLines(console()), LiveScreen(console(force_terminal=True, color_system=None))):
        output = drawn(screen, [EVENTS[0], Evaluated(1, {"per": 1.0}, empty, True), EVENTS[-1]])
        assert "(nothing yet)" in output
        assert "0 rows" not in output


def test_an_evaluation_without_an_example_keeps_the_one_before():
    screen = LiveScreen(console(force_terminal=True, color_system=None))
    seen = as_seen(drawn(screen, [EVENTS[2], Evaluated(20, {"per": 0.7}, None, False)]))
    assert "reads   [red]odd" in seen


def test_a_process_without_events_draws_nothing():
    assert "starting" not in drawn(LiveScreen(console(force_terminal=True)), [])


def test_warnings_meant_for_a_file_stay_out_of_the_terminal(capsys):
    screen = LiveScreen(console(force_terminal=True))
    with screen:
        screen.draw(EVENTS[0])
        print("a warning", file=sys.stderr)
    assert "a warning" not in screen.console.file.getvalue()
    assert capsys.readouterr().err == "a warning\n"


def test_the_terminal_is_whole_again_after_a_fault():
    screen = LiveScreen(console(force_terminal=True))
    with pytest.raises(KeyboardInterrupt), screen:
        screen.draw(EVENTS[2])
        raise KeyboardInterrupt
    output = screen.console.file.getvalue()
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # the cursor is shown again
    assert not screen.live.is_started


def test_every_kind_of_event_can_be_drawn():
    for screen in (PlainLines(console()), LiveScreen(console(force_terminal=True))):
        drawn(screen, [*EVENTS, Interrupted(5, Path("r"), "SIGINT")])
