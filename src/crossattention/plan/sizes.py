"""The sizes of one piece of attention work: all that the planner knows. Plain integers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Sizes:
    """Lengths, widths and heads of attention of A over B, and how often this B is read.

    Args:
        batch: number of contexts, z.
        query_length: length of A, n.
        context_length: length of B, m.
        query_dim: width of A, a.
        context_dim: width of B, b.
        heads: number of query heads, h.
        kv_heads: number of key-value heads, g; divides `heads`.
        head_dim: width of scores in a head, k.
        value_head_dim: width of values in a head, v.
        out_dim: width of the output, o.
        repeats: query sequences (beams, samples) that read each context, r.
        uses: how many times `attend` will read what `prepare` made once.
        dtype: name of the dtype that the work runs in.
        device: type of the device, as torch names it.
        shares_queries: whether one sequence of learned queries serves the whole batch.
        trains: whether a backward pass follows.
        threads: threads of a CPU that share the work.

    Raises:
        ValueError: a negative size, no heads, or `kv_heads` that does not divide `heads`.
    """

    batch: int
    query_length: int
    context_length: int
    query_dim: int
    context_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    out_dim: int
    repeats: int = 1
    uses: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    shares_queries: bool = False
    trains: bool = False
    threads: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            lowest = 0 if field.name in ("batch", "query_length", "context_length", "repeats") else 1
            if type(value) is int and value < lowest:
                raise ValueError(f"{field.name} must be at least {lowest}, got {value}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads={self.kv_heads} for heads={self.heads}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")

    @property
    def element_bytes(self) -> int:
        """Bytes of one number."""
        return DTYPE_BYTES[self.dtype]

    @property
    def score_dtype(self) -> str:
        """Name of the dtype that scores are taken in: float32 for half precision."""
        return "float32" if self.dtype in ("bfloat16", "float16") else self.dtype
