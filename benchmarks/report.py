"""The table that `attention.py` prints of its results, and what stands under it."""

from crossattention.plan import TEXTBOOK

AUTO = "auto"
"""Name of the planner's choice among the contenders."""

NOT_SLOWER = 0.95
"""Share of the best peer's speed from which on a row counts as not slower."""

COLUMNS = {
    "work (queries x context, widths, heads)": 42,
    "plan chosen": 27,
    "ms": 9,
    "best peer, ms": 38,
    "times as fast": 15,
    "of best plan": 14,
    "MB, ours / peer / textbook": 26,
}


def cells(result: dict[str, object]) -> list[str]:
    """One row of the table."""
    ours, peer = (result["contenders"][name] for name in (AUTO, result["best_peer"]))
    textbook = result["contenders"].get(str(TEXTBOOK))
    sizes = ["-" if c is None else f"{c['megabytes']:,.1f}" for c in (ours, peer, textbook)]
    return [
        result["work"],
        result["chosen"],
        f"{ours['milliseconds']:,.2f}",
        f"{result['best_peer']}, {peer['milliseconds']:,.2f}",
        f"{result['times_as_fast']:.2f}",
        "-" if result["of_best_plan"] is None else f"{result['of_best_plan']:.2f}",
        " / ".join(sizes),
    ]


def print_line(texts: list[str], markdown: bool) -> None:
    padded = [text.ljust(width) for text, width in zip(texts, COLUMNS.values(), strict=True)]
    print("| " + " | ".join(texts) + " |" if markdown else "".join(padded).rstrip(), flush=True)


def print_header(dtype: str, mode: str, device: str, markdown: bool) -> None:
    print(f"\n{dtype}, {mode}, {device}\n")
    print_line(list(COLUMNS), markdown)
    if markdown:
        print("|" + "---|" * len(COLUMNS))


def print_summary(results: list[dict[str, object]]) -> None:
    """What is usually written, what was left out of which rows, and how many rows are not slower."""
    print()
    for result in results:
        if result["common_way"] is not None:
            print(f"{result['work']}: {result['times_as_fast_as_common_way']:.2f} times as fast as {result['common_way']}")
    for (why, rows), names in _left_out(results).items():
        print(f"left out, {', '.join(names)}: {why} [{'; '.join(rows) if len(rows) < len(results) else 'every row'}]")
    slower = [f"{result['work']} ({result['times_as_fast']:.2f})" for result in results if result["times_as_fast"] < NOT_SLOWER]
    kept = len(results) - len(slower)
    others = f"; slower: {', '.join(slower)}" if slower else ""
    print(f"not slower (at least {NOT_SLOWER} of the best peer's speed): {kept} of {len(results)} rows{others}")


def _left_out(results: list[dict[str, object]]) -> dict[tuple[str, tuple[str, ...]], list[str]]:
    """The names of what was left out, by the reason and the rows that it was left out of."""
    rows: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, why in (result["left_out"] | result["failed"]).items():
            rows.setdefault((name, why), []).append(result["work"])
    names: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (name, why), works in rows.items():
        names.setdefault((why, tuple(works)), []).append(name)
    return names
