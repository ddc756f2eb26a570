"""kill -9 in the middle of each step, and once more in the step after: the same command goes on to the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crossattention.retrieval import Database
from retrieval.corpus import write_corpus

pytestmark = pytest.mark.slow
pytest.importorskip("faiss", reason="the database needs faiss-cpu: pip install 'crossattention[retro]'")

STEPS = ("list", "tokenizer", "tokens", "counts", "embeddings", "index", "neighbours")


def run(corpus: Path, path: Path, step: str = "none", at: int = 1) -> int:
    here = Path(__file__).parent
    paths = [str(Path(sys.modules["crossattention"].__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(here / "killed_build.py"), str(corpus), str(path), step, str(at)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "words", sentences=20)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}


def test_a_kill_in_any_step_changes_nothing(corpus, tmp_path):
    assert run(corpus, tmp_path / "whole") == 0
    Database.open(tmp_path / "whole")
    expected = content(tmp_path / "whole")
    for step in STEPS:
        path = tmp_path / step
        assert run(corpus, path, step, 3 if step in ("tokens", "embeddings", "neighbours") else 2) == -signal.SIGKILL
        assert not (path / "database.json").exists()
        assert run(corpus, path) == 0, step
        assert content(path) == expected, step


def test_killed_again_and_again_it_still_ends(corpus, tmp_path):
    kills = [("list", 1), ("tokens", 2), ("tokens", 3), ("embeddings", 2), ("index", 2), ("neighbours", 2), ("neighbours", 4)]
    for step, at in kills:
        assert run(corpus, tmp_path / "db", step, at) == -signal.SIGKILL
    assert run(corpus, tmp_path / "db") == 0
    assert run(corpus, tmp_path / "whole") == 0
    assert content(tmp_path / "db") == content(tmp_path / "whole")


def test_a_kill_while_documents_are_added_leaves_the_database_as_it_was(corpus, tmp_path):
    copy = tmp_path / "words"
    copy.mkdir()
    for name in ("text0.txt", "text1.txt", "text2.txt"):
        (copy / name).write_bytes((corpus / name).read_bytes())
    assert run(copy, tmp_path / "db") == 0
    before = Database.open(tmp_path / "db").num_chunks
    for name in ("text3.txt", "text4.txt"):
        (copy / name).write_bytes((corpus / name).read_bytes())
    for step in ("tokens", "embeddings", "neighbours"):
        assert run(copy, tmp_path / "db", step, 2) == -signal.SIGKILL
        database = Database.open(tmp_path / "db")
        assert database.num_chunks == before and len(database.table.ids) == before
    assert run(copy, tmp_path / "db") == 0
    assert Database.open(tmp_path / "db").num_chunks > before
