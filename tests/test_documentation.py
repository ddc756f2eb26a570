"""What the documentation shows, runs: each Python block of README.md and docs/*.md, and every docstring example.

The blocks of one page run in order and share their names, as a reader would type them, in an empty folder.
A block fenced as anything but `python` (console, text, json) is not run.
"""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
FENCE = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
DOCTEST_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def python_blocks(page: str) -> list[str]:
    """The code of each python block, moved down so that a traceback names the page's own lines."""
    return ["\n" * page[: match.start("code")].count("\n") + match["code"] for match in FENCE.finditer(page)]


def run_blocks(page: str, name: str) -> dict[str, object]:
    names: dict[str, object] = {"__name__": "__main__"}
    for code in python_blocks(page):
        if ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, names, name, name, 0)
            failures: list[str] = []
            doctest.DocTestRunner(optionflags=DOCTEST_OPTIONS).run(test, out=failures.append, clear_globs=False)
            names.update(test.globs)
            assert not failures, "".join(failures)
        else:
            exec(compile(code, name, "exec", dont_inherit=True), names)
    return names


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(page.read_text(encoding="utf-8"), str(page))


MODULES = [
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted(SOURCE.rglob("*.py"))
    if ">>>" in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_the_docstring_examples_of_a_module_run(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module), optionflags=DOCTEST_OPTIONS)
    assert result.attempted > 0, f"{module} has '>>>' that doctest does not find: in a comment, or in a private place?"
    assert result.failed == 0, capsys.readouterr().out


def test_the_readme_names_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . && crossattention train g2p" in lines
    assert "pip install -e '.[test]' && pytest" in lines


def tree_paths(page: str) -> list[str]:
    """The paths that an annotated tree names: two spaces of indentation a level, the name first."""
    (tree,) = re.findall(r"^```text\n(src/crossattention/\n.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    open_folders: list[str] = []
    paths = []
    for line in tree.splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        open_folders[level:] = [line.split()[0]]
        paths.append("".join(open_folders))
    return paths


def test_the_readme_s_tree_is_the_tree() -> None:
    paths = tree_paths((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    rooms = {f"src/crossattention/{init.parent.name}/" for init in (SOURCE / "crossattention").glob("*/__init__.py")}
    assert {path for path in paths if path.count("/") == 3 and path.endswith("/")} == rooms


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```python\nassert 1 == 2\n```\n", AssertionError),
        ("text\n\n```python\n>>> 1 + 1\n3\n```\n", AssertionError),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
    ],
)
def test_a_wrong_block_fails(page: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run_blocks(page, "page")


def test_blocks_share_their_names_and_other_fences_do_not_run() -> None:
    names = run_blocks("```python\nx = 1\n```\n```console\nrm x\n```\n```python\n>>> x + 1\n2\n>>> y = 5\n```\n", "page")
    assert (names["x"], names["y"]) == (1, 5)
