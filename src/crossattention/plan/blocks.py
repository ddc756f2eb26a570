"""How the blocked kernel cuts its work: what the executor runs and what the cost model counts, said once."""

from __future__ import annotations

BLOCK_SCORES = 1 << 20
"""Scores of one block: 4 MB in float32, which stay in a shared cache; smaller blocks were measured slower (dev/LOG.md)."""
LONGEST_ROW = 8192
"""A longer context is read in parts of `PART` positions."""
PART = 2048
"""Positions of one part of a long context."""
PART_ROWS = 512
"""Rows that read one part together."""
NARROW_ROW = 15
"""Softmax over rows of this length or less is done across rows: torch's is some ten times slower along rows that do not fill one
vector of 16 numbers, and no slower from there on (dev/LOG.md)."""


def block_shape(together: int, length: int, context_length: int, *, shares_queries: bool) -> tuple[int, int]:
    """Heads and queries of one block of whole rows.

    Args:
        together: heads that may stand in one block: those that read the same keys, or all where they share their queries.
        length: queries, n.
        context_length: m.
        shares_queries: whether one product gives the scores of several heads.
    """
    heads = max(1, min(together, BLOCK_SCORES // (min(length, 64) * context_length)))
    queries = max(1, min(length, BLOCK_SCORES // (heads * context_length)))
    if not shares_queries and queries < length:
        return 1, max(1, min(length, BLOCK_SCORES // context_length))
    return heads, queries
