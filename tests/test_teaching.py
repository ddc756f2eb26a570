"""What teaches cross-attention keeps its form: docs/cross_attention.md with its drawings, and examples/tour.ipynb.

That the page's code runs is tested with all other pages, in test_documentation.py.
"""

import json
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from crossattention.models.pretrained import bundled

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cross_attention.md"
DRAWINGS = ROOT / "docs" / "images" / "cross_attention"
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
SVG = "{http://www.w3.org/2000/svg}"


def ideas() -> dict[str, str]:
    """The sections that each teach one idea, by their headings."""
    _, *sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = dict(section.split("\n", 1) for section in sections)
    return {heading: text for heading, text in found.items() if heading != "Further"}


@pytest.mark.parametrize("heading", ideas())
def test_an_idea_has_one_drawing_and_five_lines(heading: str) -> None:
    text = ideas()[heading]
    [(description, image)] = re.findall(r"^!\[(.+)\]\((.+)\)$", text, flags=re.MULTILINE)
    assert description and (PAGE.parent / image).parent == DRAWINGS and (PAGE.parent / image).is_file()
    [code] = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) == 5 and "assert " in code


def test_the_page_is_read_in_a_quarter_of_an_hour() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.split()) <= 2_000
    assert max(map(len, text.splitlines())) <= 150
    assert len(ideas()) == 11


def test_the_drawings_are_what_the_script_draws(tmp_path: Path) -> None:
    script = runpy.run_path(str(DRAWINGS / "draw.py"))
    script["main"](tmp_path)
    drawn = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    assert drawn == {file.name: file.read_text(encoding="utf-8") for file in DRAWINGS.glob("*.svg")}
    assert set(drawn) == {name for text in ideas().values() for name in re.findall(r"[a-z_]+\.svg", text)}


@pytest.mark.parametrize("drawing", sorted(DRAWINGS.glob("*.svg")), ids=lambda file: file.stem)
def test_a_drawing_is_small_titled_text(drawing: Path) -> None:
    assert drawing.stat().st_size < 12_000
    root = ElementTree.parse(drawing).getroot()
    width, height = root.attrib["width"], root.attrib["height"]
    assert root.attrib["viewBox"] == f"0 0 {width} {height}" and width == "700"
    assert [child.tag for child in root][:4] == [f"{SVG}title", f"{SVG}desc", f"{SVG}style", f"{SVG}rect"]
    assert root[0].text and root[1].text
    assert {element.tag.removeprefix(SVG) for element in root[4:]} <= {"rect", "text", "line", "path", "polygon"}
    assert all(element.text for element in root.iter(f"{SVG}text"))


def test_the_drawn_highlight_has_the_numbers_of_the_page() -> None:
    scores = [[0.0, 3, 0, 0, 0], [0, 0, 2, 2, 0]]
    assert f"torch.tensor([{scores}])" in ideas()["The weights of A highlight in B"]
    masses = torch.tensor(scores).softmax(-1).sum(0).tolist()
    texts = [element.text for element in ElementTree.parse(DRAWINGS / "highlight.svg").getroot().iter(f"{SVG}text")]
    assert [text for text in texts if text in {f"{mass:.2f}" for mass in masses}] == [f"{mass:.2f}" for mass in masses]


def test_the_notebook_was_run_from_top_to_bottom() -> None:
    assert NOTEBOOK.stat().st_size < 30_000
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output["output_type"], output.get("name")) for cell in cells for output in cell["outputs"]}
    assert kinds == {("stream", "stdout"), ("display_data", None)}


def test_the_notebook_runs_on_the_weights_inside_the_package() -> None:
    code = "".join(line for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] for line in cell["source"])
    [name] = re.findall(r"load_run\(\"(.+)\"\)", code)
    assert name in bundled() and "crossattention.training" not in code


def words_of(cell: dict) -> list[str]:
    """What a cell printed, without numbers and shades: the last digit of these may depend on the processor."""
    printed = "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")
    return re.findall(r"[^\W\d_]+", printed)


def run_notebook(notebook: dict, folder: Path) -> None:
    from nbclient import NotebookClient

    patience = {"timeout": 600, "startup_timeout": 300}  # seconds a cell, and until the kernel answers, on a busy machine
    NotebookClient(notebook, **patience, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbformat

    stored, run = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    run_notebook(run, tmp_path)
    assert list(tmp_path.iterdir()) == []
    pairs = [pair for pair in zip(stored.cells, run.cells, strict=True) if pair[0].cell_type == "code"]
    for before, after in pairs[:-1]:  # the last cell shows plans, which are of the machine
        assert words_of(after) == words_of(before)
    assert sum(len(words_of(after)) for _, after in pairs) > 100


@pytest.mark.slow
def test_a_wrong_cell_fails(tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError
    from nbformat.v4 import new_code_cell, new_notebook

    with pytest.raises(CellExecutionError, match="assert 1 == 2"):
        run_notebook(
            new_notebook(cells=[new_code_cell("x = 1"), new_code_cell("assert x == 2 or 1 == 2, 'assert 1 == 2'")]), tmp_path
        )
