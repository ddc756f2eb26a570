"""Memory of a build does not grow with the corpus: eight times as much text, in one file and in many, takes hardly more."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("faiss", reason="the database needs faiss-cpu: pip install 'crossattention[retro]'")

if not Path("/proc/self/status").exists():
    pytest.skip("the peak of a process is read from /proc, which this system does not have", allow_module_level=True)

VOCABULARY = ["".join(random.Random(number).choices("abcdefgh", k=1 + number % 7)) for number in range(2000)]
ALLOWED = 40e6  # what eight times the text may add: buffers that were not yet filled


def peaks_of(folder: Path, path: Path) -> dict[str, int]:
    paths = [str(Path(sys.modules["crossattention"].__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(Path(__file__).parent / "measured_build.py"), str(folder), str(path), "0", "1000000"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def words(random_: random.Random, count: int) -> str:
    """Of a fixed vocabulary: training a tokenizer holds each distinct word of its sample, as any such training does."""
    return " ".join(random_.choices(VOCABULARY, k=count)) + "\n"


@pytest.mark.parametrize("in_one_file", [True, False])
def test_eight_times_the_text_takes_hardly_more_memory(in_one_file, tmp_path):
    random_ = random.Random(0)
    peaks = []
    for times in (1, 8):
        folder = tmp_path / f"corpus{times}"
        folder.mkdir()
        for number in range(100 * times):
            with (folder / ("all.txt" if in_one_file else f"{number}.txt")).open("a") as file:
                file.write(words(random_, 2000))
        peaks.append(peaks_of(folder, tmp_path / f"db{times}"))
    small, large = peaks
    assert large["chunks"] > 7 * small["chunks"] > 7 * 3000
    for step in ("list", "tokenizer", "tokens", "counts", "embeddings"):
        assert large[step] - small[step] < ALLOWED, (step, small, large)
