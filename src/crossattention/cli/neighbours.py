"""`crossattention neighbours DB TEXT`: the chunks of a database that are nearest to a text, with what follows them."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from crossattention.cli.index import File, Text, Whole, embedder_of
from crossattention.views.alignment import escaped

if TYPE_CHECKING:
    from crossattention.retrieval import Database


@dataclass(frozen=True)
class NeighboursArguments:
    """Show the chunks nearest to a text: distance, longest run in common, document, text and continuation.

    A text of more than one chunk (64 tokens) is answered chunk by chunk.

    Args:
        database: folder of the database.
        text: what to look for; standard input is read where there is none.
        best: neighbours of each chunk.
        longest_run: pass over neighbours that have more tokens in a row in common with the text than this.
        exclude: pattern on document names: matching documents are not found.
        embedder: the BERT that the database was made with, by folder or id.
        embedder_tokenizer: its tokenizer.json or vocab.txt, where its folder holds none.
        probes: parts of an approximate index to look into.
        skip_checksums: read headers and sizes only, and not the whole database, before the search.
        json: print one JSON object.
    """

    database: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DB")]
    text: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT]")] = None
    best: int = 3
    longest_run: Whole = None
    exclude: Text = None
    embedder: Text = None
    embedder_tokenizer: File = None
    probes: Whole = None
    skip_checksums: bool = False
    json: bool = False


def run(arguments: Sequence[str], *, prog: str) -> int:
    """Search, and print what was found."""
    given = tyro.cli(NeighboursArguments, args=arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))

    from crossattention.retrieval import Database

    if given.best < 1:
        raise ValueError(f"expected at least 1 neighbour, got --best {given.best}")
    embedder = embedder_of(given.embedder, given.embedder_tokenizer)
    database = Database.open(given.database, verify=not given.skip_checksums, embedder=embedder)
    print(
        f"loaded {database.path} ({database.num_chunks:,} chunks, {database.index_kind}, tokenizer "
        f"{database.tokenizer_sha256[:12]}, "
        f"embedder {database.embedder_sha256[:12]})",
        file=sys.stderr,
    )
    text = sys.stdin.read() if given.text is None else given.text
    found = search(
        database, text, given.best, longest_run=given.longest_run, exclude=_excluded(database, given.exclude), probes=given.probes
    )
    if given.json:
        print(json.dumps({"database": str(database.path), "chunks": found}, ensure_ascii=False))
    else:
        print("\n".join(line for chunk in found for line in lines_of(chunk)))
    return 0


def search(database: "Database", text: str, best: int, **options: Any) -> list[dict[str, Any]]:
    """For each chunk of a text: its text, how much of it stands in what was found, and the neighbours.

    Raises:
        ValueError: a text without tokens.
    """
    chunks = database.cut(text)
    if not len(chunks):
        raise ValueError("expected a text to find neighbours of, got one without tokens")
    found = database.retrieve(chunks, best, **options)
    rows = []
    for row in range(len(chunks)):
        tokens = chunks.tokens[row, : chunks.lengths[row]].tolist()
        neighbours = [
            _neighbour(database, int(chunk), float(distance), int(run))
            for chunk, distance, run in zip(found.ids[row], found.distances[row], found.runs[row], strict=True)
            if chunk >= 0
        ]
        overlap = max((near["longest_run"] for near in neighbours), default=0) / database.chunk_length
        own = database.tokenizer.decode(tokens, skip_special_tokens=False)
        rows.append({"text": own, "tokens": len(tokens), "overlap": overlap, "neighbours": neighbours})
    return rows


def lines_of(chunk: dict[str, Any]) -> list[str]:
    """One chunk and its neighbours as lines; text of documents is escaped."""
    lines = [f"chunk of {chunk['tokens']} tokens: {_shortened(chunk['text'])}"]
    for rank, near in enumerate(chunk["neighbours"], start=1):
        lines.append(
            f"{rank}. distance {near['distance']:.4f}, {near['longest_run']} tokens in a row in common, "
            f"{escaped(near['document'])}, chunk {near['chunk']:,}"
        )
        lines += [f"   | {escaped(line)}" for line in near["text"].split("\n")]
        lines += [f"   > {escaped(line)}" for line in near["continuation"].split("\n") if near["continuation"]]
    if not chunk["neighbours"]:
        lines.append("no neighbours: all documents are excluded, or have too long a run in common")
    return [*lines, ""]


def _neighbour(database: "Database", chunk: int, distance: float, run: int) -> dict[str, Any]:
    document = int(database.documents[chunk])
    has_next = chunk + 1 in database.document_chunks(document)
    return {
        "chunk": chunk,
        "distance": distance,
        "longest_run": run,
        "document": database.document_name(document),
        "text": database.text(chunk),
        "continuation": database.text(chunk + 1) if has_next else "",
    }


def _excluded(database: "Database", pattern: str | None) -> Any:
    if pattern is None:
        return None
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"expected --exclude as a pattern on document names, got {pattern!r}: {error}") from error
    return database.documents_where(lambda name: rule.search(name) is not None)


def _shortened(text: str, most: int = 100) -> str:
    return escaped(text if len(text) <= most else f"{text[: most - 3]}...").replace("\n", " ")
