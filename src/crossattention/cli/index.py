"""`crossattention index FOLDER... --out DB`: a chunk database of text, made, gone on with, or added to."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from crossattention.retrieval import Built, Database

Whole = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class IndexArguments:
    """Make a chunk database of text files, JSONL and Parquet: tokens in chunks, embeddings, an index, a table of neighbours.

    Each step goes on where it was stopped, also by a kill: give the same command again. Given further documents, a database that is
    there grows by them. Files and documents that cannot be read are left out and named.

    Args:
        folders: folders and files of text; files ending in .jsonl, .ndjson and .parquet hold many documents.
        out: folder of the database.
        tokenizer: a tokenizer.json; without it a byte-level BPE is trained on the text.
        vocab_size: tokens of the BPE that is trained; 16384 where it is not given.
        embedder: a BERT to embed chunks with, by folder or id; without it, hashed n-grams weighted by TF-IDF.
        embedder_tokenizer: its tokenizer.json or vocab.txt, where its folder holds none.
        chunk_length: tokens of a chunk; 64 where it is not given.
        neighbours: neighbours of each chunk in the table; 10 where it is not given, 0 for none.
        same: pattern on document names: documents in which its groups find the same do not find each other; 'models/([^/]+)/'.
        text_field: field or column that holds the text; "text" where it is not given.
        pattern: what a file's name must match, as in a shell; '*.py'.
        exact_below: chunks up to which searches look at every embedding; 200,000 where it is not given.
        strict: end with an error where a file or document cannot be read.
        begin_again: drop what a stopped command has made so far; a finished database stays as it was before that command.
        json: print one JSON object in the place of the text.
    """

    folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...")]
    out: Annotated[Path, tyro.conf.arg(metavar="DB")]
    tokenizer: File = None
    vocab_size: Whole = None
    embedder: Text = None
    embedder_tokenizer: File = None
    chunk_length: Whole = None
    neighbours: Whole = None
    same: Text = None
    text_field: Text = None
    pattern: Text = None
    exact_below: Whole = None
    strict: bool = False
    begin_again: bool = False
    json: bool = False


def run(arguments: Sequence[str], *, prog: str) -> int:
    """Build, and say what was done."""
    given = tyro.cli(IndexArguments, args=arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))

    from crossattention.cli.steps import showing_steps
    from crossattention.retrieval import Settings, build

    names = ("chunk_length", "vocab_size", "text_field", "pattern", "same", "neighbours", "exact_below", "strict")
    settings = Settings(**{name: getattr(given, name) for name in names})
    embedder = embedder_of(given.embedder, given.embedder_tokenizer)
    with showing_steps() as show:
        done = build(
            given.out,
            given.folders,
            settings=settings,
            tokenizer=given.tokenizer,
            embedder=embedder,
            begin_again=given.begin_again,
            on_progress=show,
        )
    for line in done.problems.named:
        print(f"left out: {line}", file=sys.stderr)
    if given.json:
        print(json.dumps({**facts_of(done.database), **_changes(done)}, ensure_ascii=False))
    else:
        print("\n".join(account(done)))
    return 0


def embedder_of(name: str | None, tokenizer: Path | None) -> Any:
    """The embedder that a flag names; None for the default one."""
    if name is None:
        if tokenizer is not None:
            raise ValueError("--embedder-tokenizer belongs to --embedder PATH, which is not given")
        return None
    from crossattention.recipes.chunk_embedder import BertEmbedder

    return BertEmbedder(name, tokenizer=tokenizer)


def facts_of(database: "Database") -> dict[str, Any]:
    """What a database is, for JSON."""
    return {
        "database": str(database.path),
        "documents": database.num_documents,
        "chunks": database.num_chunks,
        "chunk_length": database.chunk_length,
        "vocab_size": database.vocab_size,
        "tokenizer_sha256": database.tokenizer_sha256,
        "embedder": database.embedder_description,
        "embedder_sha256": database.embedder_sha256,
        "index": database.index_kind,
        "neighbours": database.table_width,
        "bytes": sum(file.stat().st_size for file in database.path.iterdir() if file.is_file()),
    }


def account(done: "Built") -> list[str]:
    """The lines that are printed of a build."""
    facts = facts_of(done.database)
    size = facts["bytes"]
    lines = [
        f"database   {facts['database']}" + ("" if done.resumed is None else f" (gone on with at: {done.resumed})"),
        f"documents  {facts['documents']:,} (added: {done.added_documents:,})",
        f"chunks     {facts['chunks']:,} of {facts['chunk_length']} tokens (added: {done.added_chunks:,})",
        f"tokenizer  {facts['vocab_size']:,} tokens, sha256 {facts['tokenizer_sha256'][:12]}",
        f"embedder   {facts['embedder'].get('kind')}, width {facts['embedder'].get('dim')}, sha256 {facts['embedder_sha256'][:12]}",
        f"index      {facts['index']}; {facts['neighbours']} neighbours a chunk in the table",
        f"size       {size:,} bytes, {size / max(1, facts['chunks']):,.0f} a chunk",
    ]
    counts = done.problems.counts
    if counts:
        lines.append(f"left out   {', '.join(f'{count:,} {reason}' for reason, count in sorted(counts.items()))}")
    return [*lines, *_copies(done.database)]


def _copies(database: "Database") -> list[str]:
    """How many chunks have a neighbour that is a copy, nearly or wholly."""
    if not database.table_width:
        return []
    first = database.table.runs[:, 0]
    shares = [f"{100 * float((first >= least).mean()):.1f} % {what}" for least, what in _run_marks(database.chunk_length)]
    return [f"copies     of the chunks, with the nearest neighbour and its continuation in common: {', '.join(shares)}"]


def _run_marks(length: int) -> list[tuple[int, str]]:
    return [(length // 2, f"a run of {length // 2} tokens or more"), (length, "all tokens")]


def _changes(done: "Built") -> dict[str, Any]:
    return {
        "added_documents": done.added_documents,
        "added_chunks": done.added_chunks,
        "resumed": done.resumed,
        "left_out": done.problems.to_json(),
    }
