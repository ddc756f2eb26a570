"""What a plan costs: floating-point operations and bytes of each step, and seconds from what the device does well.

The model is deliberately small: a step takes the longer of its arithmetic and its memory traffic, plus a fixed launch. It has to
rank plans, not to predict clocks. `docs/planning.md` derives the formulas; `Speeds` holds the measured constants of a device.

Legend: z batch, n queries (all repeats of one context together), m context length, a/b/o widths of A, B, output, h heads,
g key-value heads, k/v head widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crossattention.plan.plans import Plan
from crossattention.plan.sizes import Sizes


@dataclass(frozen=True)
class Speeds:
    """What a device does well, in plain numbers.

    Args:
        matmul_flops: floating-point operations a second in large matrix products.
        fused_flops: the same inside the fused attention kernel.
        bytes: bytes a second to and from memory.
        softmax: exponentials a second in a softmax whose weights are held in memory.
        step_seconds: fixed cost of starting one step.
    """

    matmul_flops: float
    fused_flops: float
    bytes: float
    softmax: float
    step_seconds: float


# Two cores of a current server processor: float32 fitted to the times of every plan on 81 shapes (dev/LOG.md, 2026-11-23), the
# other dtypes scaled from it; and, unmeasured, one current data-centre GPU.
SPEEDS: dict[tuple[str, str], Speeds] = {
    ("cpu", "float64"): Speeds(1e11, 1.1e11, 2.1e10, 2.2e8, 5e-6),
    ("cpu", "float32"): Speeds(2.0e11, 2.2e11, 2.1e10, 4.4e8, 5e-6),
    ("cpu", "bfloat16"): Speeds(6e11, 3e11, 2.1e10, 3e8, 5e-6),
    ("cpu", "float16"): Speeds(1e11, 1e11, 2.1e10, 3e8, 5e-6),
    ("cuda", "float64"): Speeds(3e13, 1e12, 3e12, 3e11, 8e-6),
    ("cuda", "float32"): Speeds(4e13, 3e13, 3e12, 3e11, 8e-6),
    ("cuda", "bfloat16"): Speeds(5e14, 3e14, 3e12, 3e11, 8e-6),
    ("cuda", "float16"): Speeds(5e14, 3e14, 3e12, 3e11, 8e-6),
}


def speeds_of(device: str, dtype: str) -> Speeds:
    """The constants of a device type; an unknown device is planned for like a CPU."""
    return SPEEDS.get((device, dtype)) or SPEEDS["cpu", dtype]


@dataclass(frozen=True)
class Work:
    """One step of a plan: its name, FLOPs, elements moved, exponentials, and whether the fused kernel runs it."""

    name: str
    flops: int
    elements: int
    exponentials: int = 0
    is_fused: bool = False

    def seconds(self, speeds: Speeds, element_bytes: int) -> float:
        """Time of this step: arithmetic or memory, whichever is longer, and the launch."""
        rate = speeds.fused_flops if self.is_fused else speeds.matmul_flops
        softmax = 0.0 if self.is_fused else self.exponentials / speeds.softmax
        return max(self.flops / rate, self.elements * element_bytes / speeds.bytes) + softmax + speeds.step_seconds


@dataclass(frozen=True)
class Cost:
    """Estimated cost of one `prepare` and of one `attend` by a plan.

    Args:
        prepare_flops: floating-point operations of `prepare`.
        attend_flops: floating-point operations of one `attend`.
        prepare_seconds: estimated seconds of `prepare`.
        attend_seconds: estimated seconds of one `attend`.
        prepared_bytes: memory that the prepared context holds, B itself included where the plan keeps B.
        moved_bytes: bytes moved by one `prepare` and one `attend`.
        uses: reads of one prepared context that `seconds` counts.
    """

    prepare_flops: int
    attend_flops: int
    prepare_seconds: float
    attend_seconds: float
    prepared_bytes: int
    moved_bytes: int
    uses: int

    @property
    def flops(self) -> int:
        """Operations of one `prepare` and all its uses."""
        return self.prepare_flops + self.uses * self.attend_flops

    @property
    def seconds(self) -> float:
        """Seconds of one `prepare` and all its uses."""
        return self.prepare_seconds + self.uses * self.attend_seconds


def matmul(name: str, rows: int, inner: int, columns: int, batches: int = 1, right_batches: int | None = None) -> Work:
    """A (batched) matrix product: 2 FLOPs a multiply-add; each operand and the result moved once."""
    right = batches if right_batches is None else right_batches
    moved = batches * rows * (inner + columns) + right * inner * columns
    return Work(name, 2 * batches * rows * inner * columns, moved)


def prepare_steps(plan: Plan, sizes: Sizes) -> Iterator[Work]:
    """The steps that turn B into what the plan's two meeting spaces want of it."""
    z, m, a, b, o = sizes.batch, sizes.context_length, sizes.query_dim, sizes.context_dim, sizes.out_dim
    h, g, k, v = sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.value_head_dim
    if plan.scores != "context":
        yield matmul("B Wk", z * m, b, g * k)
    if plan.scores == "query":
        yield matmul("(B Wk) Wq^T", z * m, k, a, batches=h)
    if plan.values != "context":
        yield matmul("B Wv", z * m, b, g * v)
    if plan.values == "output":
        yield matmul("(B Wv) Wo", z * m, v, o, batches=h)
    key_width, value_width = meeting_widths(plan, sizes)
    if plan.kernel == "fused" and key_width != value_width:
        key_groups, value_groups = meeting_groups(plan, sizes)
        groups = key_groups if key_width < value_width else value_groups
        yield Work("pad to one width", 0, z * groups * m * (key_width + value_width))


def attend_steps(plan: Plan, sizes: Sizes) -> Iterator[Work]:
    """The steps of one `attend` on the prepared context."""
    z, n, m = sizes.batch, sizes.repeats * sizes.query_length, sizes.context_length
    a, b, o = sizes.query_dim, sizes.context_dim, sizes.out_dim
    h, k, v = sizes.heads, sizes.head_dim, sizes.value_head_dim
    projected = (1 if sizes.shares_queries else z) * n
    if plan.scores != "query":
        yield matmul("A Wq", projected, a, h * k)
    if plan.scores == "context":
        yield matmul("(A Wq) Wk^T", projected, k, b, batches=h)
    yield from _kernel_steps(plan, sizes)
    if plan.values == "context":
        yield matmul("(P B) Wv", z * n, b, v, batches=h)
    if plan.values != "output":
        yield matmul("out_proj", z * n, h * v, o)
    elif plan.kernel == "fused":
        yield Work("sum over heads", z * h * n * o, z * (h + 1) * n * o)
    del m


def _kernel_steps(plan: Plan, sizes: Sizes) -> Iterator[Work]:
    z, n, m, h = sizes.batch, sizes.repeats * sizes.query_length, sizes.context_length, sizes.heads
    key_width, value_width = meeting_widths(plan, sizes)
    key_groups, value_groups = meeting_groups(plan, sizes)
    weights = z * h * n * m
    if plan.kernel == "fused":
        width = max(key_width, value_width)
        moved = z * (2 * h * n + m * (key_groups + value_groups)) * width
        yield Work("fused attention", 4 * weights * width, moved, is_fused=True)
        return
    query_heads = 1 if plan.scores == "query" else h
    yield Work("scores", 2 * weights * key_width, z * (query_heads * n + key_groups * m) * key_width + weights)
    yield Work("softmax", 4 * weights, 2 * weights, exponentials=weights)
    out_heads = 1 if plan.values == "output" else h
    yield Work("P times values", 2 * weights * value_width, z * (out_heads * n + value_groups * m) * value_width + weights)


def meeting_widths(plan: Plan, sizes: Sizes) -> tuple[int, int]:
    """Widths in which keys and values of the plan meet the queries and the weights."""
    key_width = {"head": sizes.head_dim, "context": sizes.context_dim, "query": sizes.query_dim}[plan.scores]
    value_width = {"head": sizes.value_head_dim, "context": sizes.context_dim, "output": sizes.out_dim}[plan.values]
    return key_width, value_width


def meeting_groups(plan: Plan, sizes: Sizes) -> tuple[int, int]:
    """How many heads the plan's keys and values have: B itself is one head that all query heads read."""
    key_groups = {"head": sizes.kv_heads, "context": 1, "query": sizes.heads}[plan.scores]
    value_groups = {"head": sizes.kv_heads, "context": 1, "output": sizes.heads}[plan.values]
    return key_groups, value_groups


def cost_of(plan: Plan, sizes: Sizes) -> Cost:
    """Cost of a plan on a piece of work, by its FLOPs and bytes.

    Args:
        plan: the plan.
        sizes: the work.

    Returns:
        FLOPs, bytes and estimated seconds of one `prepare` and one `attend`.

    Example:
        >>> class_token = Sizes(8, 1, 401, 384, 384, 6, 6, 64, 64, 384)
        >>> textbook, absorbed = (cost_of(Plan(s, s), class_token) for s in ("head", "context"))
        >>> absorbed.flops < textbook.flops / 10
        True
    """
    speeds, element = speeds_of(sizes.device, sizes.dtype), sizes.element_bytes
    prepare, attend = list(prepare_steps(plan, sizes)), list(attend_steps(plan, sizes))
    key_width, value_width = meeting_widths(plan, sizes)
    key_groups, value_groups = meeting_groups(plan, sizes)
    if plan.kernel == "fused":
        key_width = value_width = max(key_width, value_width)
    held = key_groups * key_width
    if not plan.scores == plan.values == "context":
        held += value_groups * value_width
    return Cost(
        prepare_flops=sum(step.flops for step in prepare),
        attend_flops=sum(step.flops for step in attend),
        prepare_seconds=sum(step.seconds(speeds, element) for step in prepare),
        attend_seconds=sum(step.seconds(speeds, element) for step in attend),
        prepared_bytes=sizes.batch * sizes.context_length * held * element,
        moved_bytes=sum(step.elements for step in (*prepare, *attend)) * element,
        uses=sizes.uses,
    )
