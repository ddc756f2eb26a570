"""The architecture as a table that cannot lie: which room may import which, read from the source with `ast`.

Imports within functions and under TYPE_CHECKING count like any other. The single exception is `ONE_DOOR`.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "crossattention"

ROOMS: dict[str, set[str]] = {
    "plan": set(),
    "retrieval": set(),
    "views": set(),
    "attention": {"plan"},
    "layers": {"attention"},
    "maps": {"attention"},
    "models": {"layers", "attention"},
    "checkpoints": {"models"},
    "interop": {"attention", "maps", "views", "plan"},
    "data": {"retrieval"},
    "training": {"models", "checkpoints"},
    "recipes": {"training", "data", "retrieval", "models", "checkpoints", "maps", "views"},
}
ROOMS["cli"] = {*ROOMS, "package"}  # "package" is crossattention/__init__.py: for users, so no room takes from it
ROOMS["package"] = {*ROOMS}

# Users expect Model.from_pretrained, so this one file may call the other way, inside its functions.
ONE_DOOR = ("models/pretrained.py", "checkpoints")

# What a file may import from outside at its head; all else is imported by the function that needs it, in plan nothing.
AT_THE_HEAD = {room: {"torch", "numpy", "safetensors"} for room in ROOMS} | {"plan": set()}
AT_THE_HEAD["cli"] |= {"rich", "tyro"}


def imports(source: str, path: str) -> Iterator[tuple[int, str, bool]]:
    """Line, absolute name and "at the head?" of each import in crossattention/`path`, dynamic ones included."""
    tree = ast.parse(source, path)
    later = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    later += [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    not_at_head = {id(inner) for node in later for inner in ast.walk(node)}
    folder = ["crossattention", *path.split("/")[:-1]]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            # `from crossattention import models` names a room; `from crossattention import load`, the package.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "crossattention" else [module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        yield from ((node.lineno, name, id(node) not in not_at_head) for name in names)


def violations(source: str, path: str) -> list[str]:
    """A sentence for each forbidden import in `source`, the text of crossattention/`path`."""
    room = path.split("/")[0] if "/" in path else "package"
    found = []
    for line, name, at_head in imports(source, path):
        top, inner = name.split(".")[0], [*name.split(".")[1:], ""][0]
        if top == "crossattention":
            target = inner if inner in ROOMS else "package"
            is_door = (path, target) == ONE_DOOR and not at_head
            if target not in ROOMS[room] | {room} and not is_door:
                found.append(f"{path}:{line}: {room} may not import {target} ({name})")
        elif top not in sys.stdlib_module_names | AT_THE_HEAD[room] and (at_head or room == "plan"):
            found.append(f"{path}:{line}: {room} may not import {top} at the head of a file")
    return found


FILES = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_every_import_follows_the_table(path: str) -> None:
    assert violations((PACKAGE / path).read_text(encoding="utf-8"), path) == []


def test_every_folder_of_the_package_is_a_room_of_the_table() -> None:
    folders = {file.parent.name for file in PACKAGE.glob("*/*.py")}
    assert folders <= set(ROOMS), f"add {folders - set(ROOMS)} to the table, or move the files"


def test_the_table_has_no_ring() -> None:
    settled: set[str] = set()
    while fresh := {room for room, needs in ROOMS.items() if room not in settled and needs - {"package"} <= settled}:
        settled |= fresh
    assert settled == set(ROOMS)


def test_the_table_in_contributing_is_this_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", text, flags=re.MULTILINE))
    assert rows.pop("cli") == "everything"
    written = {room: set(re.findall(r"`(\w+)`", needs)) for room, needs in rows.items()}
    assert written == {room: needs for room, needs in ROOMS.items() if room not in {"cli", "package"}}


@pytest.mark.parametrize(
    ("path", "source", "claim"),
    [
        ("plan/choose.py", "import torch", "plan may not import torch"),
        ("plan/choose.py", "def f():\n    import torch", "plan may not import torch"),
        ("plan/choose.py", "from crossattention.attention import masks", "plan may not import attention"),
        ("attention/execute.py", "import crossattention.maps.compute", "attention may not import maps"),
        ("attention/execute.py", "def f():\n    from ..maps import compute", "attention may not import maps"),
        ("attention/execute.py", "from .. import maps", "attention may not import maps"),
        ("attention/execute.py", "from crossattention import maps", "attention may not import maps"),
        ("layers/blocks.py", "from crossattention import CrossAttention", "layers may not import package"),
        ("layers/blocks.py", "import crossattention", "layers may not import package"),
        ("layers/blocks.py", "if TYPE_CHECKING:\n    from ..models import bert", "layers may not import models"),
        ("data/pairs.py", "__import__('crossattention.models')", "data may not import models"),
        ("data/pairs.py", "importlib.import_module('crossattention.cli.main')", "data may not import cli"),
        ("data/pairs.py", "import datasets", "data may not import datasets at the head"),
        ("data/pairs.py", "try:\n    import pyarrow\nexcept ImportError:\n    pass", "may not import pyarrow"),
        ("models/pretrained.py", "from crossattention.checkpoints import files", "models may not import checkpoints"),
        ("models/bert.py", "def f():\n    from ..checkpoints import files", "models may not import checkpoints"),
        ("training/loop.py", "from accelerate import Accelerator", "training may not import accelerate at the head"),
        ("training/loop.py", "def f():\n    from crossattention.data import batches", "training may not import data"),
    ],
)
def test_a_forbidden_import_is_named(path: str, source: str, claim: str) -> None:
    assert [claim in found for found in violations(source, path)] == [True]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/pretrained.py", "def f():\n    from crossattention.checkpoints import files"),
        ("training/loop.py", "def f():\n    from accelerate import Accelerator"),
        ("data/pairs.py", "if TYPE_CHECKING:\n    import datasets"),
        ("attention/execute.py", "import torch\nfrom torch import nn\nfrom . import masks\nfrom ..plan import sizes"),
        (
            "cli/main.py",
            "import rich\nimport tyro\nfrom crossattention import load\nfrom crossattention.recipes import g2p",
        ),
        ("__init__.py", "from crossattention.attention.cross_attention import CrossAttention"),
    ],
)
def test_an_allowed_import_is_not_named(path: str, source: str) -> None:
    assert violations(source, path) == []
