"""The picture of an alignment: every claim is about the text or the file a reader gets."""

import re
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len

from crossattention.views.alignment import HEAT, alignment_blocks, save_alignment, visible

ROWS = ["P", "OW1", "t͡ʃ"]
COLUMNS = ["p", "o", "k", "e"]
WEIGHTS = [[0.8, 0.2, 0.0, 0.0], [0.0, 0.4, 0.4, 0.2], [0.0, 0.0, 0.2, 0.8]]


def wide(num_rows: int, num_columns: int) -> tuple[list[str], list[str], list[list[float]]]:
    rows = [f"R{index}" for index in range(num_rows)]
    columns = [f"{index % 10}" for index in range(num_columns)]
    return rows, columns, [[1.0] * num_columns for _ in range(num_rows)]


def test_each_shade_stands_for_its_quarter_of_the_largest_weight():
    picture = alignment_blocks(["a"], list("vwxyz"), [[0.0, 0.1, 0.2, 0.3, 0.4]])
    assert picture.split("\n") == ["  v w x y z", "a   ░░▒▒▓▓██", "0 ░▒▓█ 0.40"]


def test_blocks_stand_under_their_labels_when_labels_are_words():
    picture = alignment_blocks(["der", "Hund"], ["the", "dog"], [[1.0, 0.0], [0.0, 1.0]]).split("\n")
    assert picture[:3] == ["     the dog", "der  ████", "Hund     ████"]


def test_labels_of_any_display_width_are_aligned():
    rows = ["ˈɝ", "t͡ʃ", "日本", "e\u0301"]
    lines = alignment_blocks(rows, ["x"], [[1.0]] * 4).split("\n")[1:5]
    assert {cell_len(line[: line.index("█")]) for line in lines} == {5}


def test_labels_are_never_markup_and_never_move_the_cursor():
    picture = alignment_blocks(["[red]x", "\x1b[31my"], ["\n", "\u202e"], [[1.0, 0.0], [0.0, 1.0]])
    assert "[red]x" in picture
    assert "\\x1b[31my" in picture
    assert "\\n" in picture
    assert "\\u202e" in picture
    assert "\x1b" not in picture
    assert len(picture.split("\n")) == 4


def test_a_space_and_a_lone_accent_can_be_seen():
    assert visible(" ") == "␣"
    assert visible("\u0301") == "◌\u0301"


def test_colours_leave_the_characters_as_they_are():
    coloured = alignment_blocks(ROWS, COLUMNS, WEIGHTS, has_colour=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert f"\x1b[38;5;{HEAT[-1]};48;5;{HEAT[-1]}m██" in coloured
    without_scale = [line.rstrip() for line in plain.split("\n")[:-1]]
    assert without_scale == alignment_blocks(ROWS, COLUMNS, WEIGHTS).split("\n")[:-1]


def test_every_coloured_line_ends_without_colour():
    for line in alignment_blocks(ROWS, COLUMNS, WEIGHTS, has_colour=True).split("\n")[1:4]:
        assert line.endswith("\x1b[0m")


def test_ascii_is_kept_for_outputs_without_block_characters():
    alignment_blocks(["a"], ["b", "c"], [[0.5, 1.0]], is_ascii=True).encode("ascii")


@pytest.mark.parametrize("width", [24, 33, 80])
def test_the_width_is_never_exceeded_and_what_is_missing_is_said(width):
    rows, columns, weights = wide(3, 120)
    lines = alignment_blocks(rows, columns, weights, max_width=width).split("\n")
    assert max(map(cell_len, lines)) <= width
    shown = lines[1].count("█") // 2
    assert lines[-1] == f"first {shown} of 120 columns"
    assert shown == (width - 3) // 2


def test_the_height_is_never_exceeded_and_what_is_missing_is_said():
    rows, columns, weights = wide(50, 3)
    lines = alignment_blocks(rows, columns, weights, max_height=10).split("\n")
    assert len(lines) == 10
    assert lines[-1] == "first 7 of 50 rows"


def test_what_fits_exactly_is_not_clipped():
    rows, columns, weights = wide(8, 4)
    lines = alignment_blocks(rows, columns, weights, max_width=24, max_height=10).split("\n")
    assert len(lines) == 10
    assert lines[-1] == "0 ░▒▓█ 1.00"


def test_a_label_longer_than_the_terminal_still_leaves_room_for_blocks():
    lines = alignment_blocks(["x" * 300], ["y" * 300], [[1.0]], max_width=40).split("\n")
    assert max(map(cell_len, lines)) <= 40
    assert "…" in lines[0]
    assert "█" in lines[1]


def test_a_map_of_zeros_is_blank_and_an_empty_one_says_so():
    assert alignment_blocks(["a"], ["b"], [[0.0]]).split("\n") == ["  b", "a", "0 ░▒▓█ 0.00"]
    assert alignment_blocks([], ["b"], []) == "(nothing to draw: 0 rows, 1 columns)"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0]], "2 row labels need 2 rows of weights, got 1"),
        ([[1.0], [1.0, 2.0]], "1 column labels need 1 weights a row, row 1 has 2"),
        ([[1.0], [float("nan")]], r"finite and not negative, row 1 \('b'\) has nan"),
        ([[-0.5], [1.0]], r"finite and not negative, row 0 \('a'\) has -0.5"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        alignment_blocks(["a", "b"], ["c"], weights)


@pytest.mark.parametrize(("room", "message"), [({"max_width": 23}, "max_width=23"), ({"max_height": 3}, "max_height=3")])
def test_too_little_room_is_an_error(room, message):
    with pytest.raises(ValueError, match=message):
        alignment_blocks(ROWS, COLUMNS, WEIGHTS, **room)


def test_png_and_svg_are_written_the_same_each_time(tmp_path):
    for name in ("a.png", "a.svg"):
        first = save_alignment(tmp_path / name, ROWS, COLUMNS, WEIGHTS).read_bytes()
        assert first == save_alignment(tmp_path / name, ROWS, COLUMNS, WEIGHTS).read_bytes()
        assert len(first) > 1000


def test_an_svg_takes_markup_as_text(tmp_path):
    path = save_alignment(tmp_path / "a.svg", ["a", "<script>"], ["&", "\x07"], [[1.0, 0.0], [0.0, 1.0]], title="<b>")
    text = path.read_text()
    ElementTree.fromstring(text)
    assert "<script" not in text
    assert "<b>" not in text


def test_a_dollar_starts_no_formula(tmp_path):
    broken = r"$\frac$"  # as a formula, an error
    for rows, columns, title in ((["a"], [broken], None), ([broken], ["b"], None), (["a"], ["b"], broken)):
        save_alignment(tmp_path / "a.svg", rows, columns, [[1.0]], title=title)


def test_a_picture_of_another_kind_or_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or a \.svg file, not 'a\.pdf'"):
        save_alignment(tmp_path / "a.pdf", ROWS, COLUMNS, WEIGHTS)
    with pytest.raises(ValueError, match="got 0 rows and 1 columns"):
        save_alignment(tmp_path / "a.png", [], ["x"], [])
