"""How many of the true neighbours does the approximate index find, how fast, and in how many bytes?

    python benchmarks/retrieval.py [--vectors 1000000] [--dim 256] [--clusters 10000] [--spread 0.5] [--queries 1000]
                                   [--probes 16 64] [--candidates 256] [--threads 1] [--folder DIR] [--json FILE]
    python benchmarks/retrieval.py --database DB [...]

Vectors are drawn around centres: a standard normal point for each cluster, and normal noise of `--spread` around it; queries are
further points of the same clusters. With `--database` they are that database's embeddings, and the queries some of them, their own
document's chunks (and its group's) left out. The index is the database's own (`IvfConfig.of` of these sizes, then `tuned`), in
files of its own, on embeddings as a database stores them: float16, memory-mapped. Recall@10 is the share of the ten nearest (by
looking at every vector) that are found. Queries go in one call, after a hundred to warm up; seconds are by the clock and by the
processor. Peak memory is the process's resident size, with what is mapped of files and the vectors that are being made;
`--threads` sets FAISS's threads.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import machine, print_machine, versions

from crossattention.retrieval.database import Database, exclusion_of
from crossattention.retrieval.search import Exclusion, IvfConfig, IvfIndex, Search, add_to_index, train_index, tuned

K = 10
BLOCK = 1 << 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=10_000)
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--probes", type=int, nargs="*", default=[], help="measured beside the tuned number")
    parser.add_argument("--candidates", type=int, nargs="+", default=[])
    parser.add_argument("--database", type=Path, default=None)
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
    if given.database is None:
        vectors, queries = clustered(given, folder / "vectors.f2")
        what, exclusion = f"in {given.clusters:,} clusters, noise {given.spread}", None

        def own(rows: np.ndarray) -> Exclusion:
            return Exclusion(lambda numbers, found: found == rows[numbers][:, None])
    else:
        database = Database.open(given.database, verify=False)
        vectors, documents, groups = database.embeddings, database.documents, database.document_groups
        rows = np.sort(np.random.default_rng(0).choice(len(vectors), given.queries, replace=False))
        queries, what = np.asarray(vectors[rows], np.float32), "of a database"

        def own(rows: np.ndarray) -> Exclusion:
            return exclusion_of(documents, groups, group=np.asarray(groups[documents[rows]]))

        exclusion = own(rows)
    count, dim = vectors.shape
    config = IvfConfig.of(count, dim)
    print(f"{count:,} vectors of width {dim} {what}; {config}", flush=True)
    trained, shard = folder / "trained.faiss", folder / "index.faiss"
    results: dict[str, object] = {"sizes": {name: str(value) for name, value in vars(given).items()}}
    results["train"], _ = timed("training the index", lambda: train_index(vectors, config, trained))
    results["add"], _ = timed("adding", lambda: add_to_index(trained, vectors, 0, count, shard, lambda row: None))
    codes = shard.stat().st_size / count
    # A chunk's row in each array of a database (retrieval/building.py): 64 tokens of 2 bytes, length, bytes, document; neighbours.
    results["bytes"] = {"index": codes, "embedding": 2 * dim, "tokens": 64 * 2 + 2 + 4 + 4, "table": K * (4 + 4 + 2)}
    told = ", ".join(f"{size:,.1f} {what}" for what, size in results["bytes"].items())
    print(f"bytes a chunk: {told}; {sum(results['bytes'].values()):,.1f} in all", flush=True)

    index = IvfIndex([shard], config)
    results["tune"], (config, _) = timed("measuring how far to look", lambda: tuned(index, vectors, own))
    print(f"    {config}")
    results["config"] = vars(config)
    results["exact"], (_, truth) = timed(
        "exact search", lambda: Search(vectors).nearest(queries, K, exclusion=exclusion), count=given.queries
    )
    pairs = [(config.probes, config.candidates)]
    pairs += [(probes, candidates) for probes in given.probes for candidates in given.candidates or [config.candidates]]
    found = []
    for probes, candidates in pairs:
        search = Search(vectors, IvfIndex.of_parts(index, replace(config, probes=probes, candidates=candidates)))
        search.nearest(queries[:100], K)
        what = f"{probes} probes, {candidates} candidates"
        seconds, (_, distances) = timed(
            what, lambda search=search: search.nearest(queries, K, exclusion=exclusion), count=given.queries
        )
        recall = float((distances <= truth[:, -1:] * (1 + 1e-6) + 1e-6).mean())
        print(f"    recall@{K} {recall:.4f}", flush=True)
        found.append({"probes": probes, "candidates": candidates, "recall": recall, **seconds})
    results["approximate"] = found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"peak resident memory {peak:,.0f} MB, the mapped embeddings' {2 * dim * count / 1e6:,.0f} MB among it")
    return {**results, "peak_megabytes": peak}


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
