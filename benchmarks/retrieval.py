"""How many of the true neighbours does the approximate index find among clustered vectors, how fast, and in how many bytes?

    python benchmarks/retrieval.py [--vectors 1000000] [--dim 256] [--clusters 10000] [--spread 0.5] [--queries 1000] [--probes 16
    32 64]
                                   [--threads 1] [--folder DIR] [--json FILE]

Vectors are drawn around centres: a standard normal point for each cluster, and normal noise of `--spread` around it; queries are
further points of the same clusters. The index is the database's own (`IvfConfig.of` of these sizes), in files of its own, on
embeddings as a database stores them: float16, memory-mapped. Recall@10 is the share of the ten nearest (by looking at every
vector) that are found. Queries go in one call of 1,000, once to warm up; seconds are by the clock and by the processor. Peak
memory is the process's resident size, with what is mapped of files and the vectors that are being made; `--threads` sets FAISS's
threads.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import machine, print_machine, versions

from crossattention.retrieval.search import IvfConfig, IvfIndex, Search, add_to_index, train_index

K = 10
BLOCK = 1 << 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=10_000)
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--probes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--candidates", type=int, nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()

    import faiss

    faiss.omp_set_num_threads(given.threads)
    print_machine()
    print(versions("faiss-cpu", "numpy"))
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        results = measure(given, Path(folder))
    if given.json:
        given.json.write_text(
            json.dumps({"machine": machine(), "versions": versions("faiss-cpu", "numpy"), **results}, indent=1) + "\n"
        )


def measure(given: argparse.Namespace, folder: Path) -> dict[str, object]:
    vectors, queries = clustered(given, folder / "vectors.f2")
    config = IvfConfig.of(given.vectors, given.dim)
    print(
        f"{given.vectors:,} vectors of width {given.dim} in {given.clusters:,} clusters, noise {given.spread}; {config}", flush=True
    )
    trained, shard = folder / "trained.faiss", folder / "index.faiss"
    rows: dict[str, object] = {"sizes": {name: str(value) for name, value in vars(given).items()}, "config": vars(config)}
    rows["train"], _ = timed("training the index", lambda: train_index(vectors, config, trained))
    rows["add"], _ = timed("adding", lambda: add_to_index(trained, vectors, 0, given.vectors, shard, lambda row: None))
    codes = shard.stat().st_size / given.vectors
    # A chunk's row in each array of a database (retrieval/building.py): 64 tokens of 2 bytes, length, bytes, document; neighbours.
    rows["bytes"] = {"index": codes, "embedding": 2 * given.dim, "tokens": 64 * 2 + 2 + 4 + 4, "table": K * (4 + 4 + 2)}
    told = ", ".join(f"{size:,.1f} {what}" for what, size in rows["bytes"].items())
    print(f"bytes a chunk: {told}; {sum(rows['bytes'].values()):,.1f} in all", flush=True)

    rows["exact"], (_, truth) = timed("exact search", lambda: Search(vectors).nearest(queries, K), count=given.queries)
    found = []
    for probes in given.probes:
        for candidates in given.candidates or [config.candidates]:
            changed = IvfConfig(config.lists, config.code_bytes, probes, candidates, config.shard_rows)
            search = Search(vectors, IvfIndex([shard], changed))
            search.nearest(queries, K)
            what = f"{probes} probes, {candidates} candidates"
            seconds, (_, distances) = timed(what, lambda search=search: search.nearest(queries, K), count=given.queries)
            recall = float((distances <= truth[:, -1:] * (1 + 1e-6)).mean())
            print(f"    recall@{K} {recall:.4f}", flush=True)
            found.append({"probes": probes, "candidates": candidates, "recall": recall, **seconds})
    rows["approximate"] = found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"peak resident memory {peak:,.0f} MB, the mapped embeddings' {2 * given.dim * given.vectors / 1e6:,.0f} MB among it")
    return {**rows, "peak_megabytes": peak}


def clustered(given: argparse.Namespace, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around centres, written some at a time and mapped, and queries around the same centres."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((given.clusters, given.dim), np.float32)

    def draw(count: int) -> np.ndarray:
        where = random.integers(0, given.clusters, count)
        return centres[where] + given.spread * random.standard_normal((count, given.dim), np.float32)

    with path.open("wb") as file:
        for begin in range(0, given.vectors, BLOCK):
            draw(min(BLOCK, given.vectors - begin)).astype(np.float16).tofile(file)
    return np.memmap(path, np.float16, mode="r", shape=(given.vectors, given.dim)), draw(given.queries)


def timed(what: str, call: Callable[[], object], count: int | None = None) -> tuple[dict[str, float], object]:
    clock, processor = time.perf_counter(), time.process_time()
    result = call()
    taken = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    rate = (
        "" if count is None else f"; queries a second: {count / taken['seconds']:,.0f}, {count / taken['processor_seconds']:,.0f}"
    )
    print(f"{what}: {taken['seconds']:.2f} s by the clock, {taken['processor_seconds']:.2f} s of the processor{rate}", flush=True)
    return taken, result


if __name__ == "__main__":
    main()
