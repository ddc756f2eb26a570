"""What a plan costs: floating-point operations and bytes of each step, and seconds from what the device does well.

A step takes its arithmetic, its traffic to cache and memory, its exponentials and its launches; `Speeds` holds the device's
constants, `docs/planning.md` derives the formulas. The model has to rank plans, not to predict clocks.

Legend: z batch, n queries (all repeats of one context together), m context length, a/b/o widths of A, B, output, h heads,
g key-value heads, k/v head widths, c/w widths in which scores and values meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple

from crossattention.plan import blocks
from crossattention.plan.devices import Speeds
from crossattention.plan.plans import Plan
from crossattention.plan.sizes import DTYPE_BYTES, Sizes
from crossattention.plan.speeds import speeds_of


class Step(NamedTuple):
    """One step of a plan: name, FLOPs, elements moved to and from memory, estimated seconds, and those of them that start it."""

    name: str
    flops: int
    elements: int
    seconds: float
    starting: float


@dataclass(frozen=True)
class Cost:
    """Estimated cost of one `prepare` and of one `attend` by a plan; of a training step, with its backward pass.

    Args:
        prepare_flops: floating-point operations of `prepare`, forward.
        attend_flops: floating-point operations of one `attend`, forward.
        prepare_seconds: estimated seconds of `prepare`, with its backward pass where `sizes.trains`.
        attend_seconds: estimated seconds of one `attend`, likewise.
        prepared_bytes: memory that the prepared context holds, B itself included where the plan keeps B.
        moved_bytes: bytes moved by one `prepare` and one `attend`.
        uses: reads of one prepared context that `seconds` counts.
        peak_bytes: an estimate of the most memory that is held at once beside weights, A and B.
    """

    prepare_flops: int
    attend_flops: int
    prepare_seconds: float
    attend_seconds: float
    prepared_bytes: int
    moved_bytes: int
    uses: int
    peak_bytes: int

    @property
    def flops(self) -> int:
        """Operations of one `prepare` and all its uses."""
        return self.prepare_flops + self.uses * self.attend_flops

    @property
    def seconds(self) -> float:
        """Seconds of one `prepare` and all its uses."""
        return self.prepare_seconds + self.uses * self.attend_seconds


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


class CostModel:
    """The cost of every plan of one piece of work; steps that plans share are counted once.

    Args:
        sizes: the work.
        speeds: constants of the device; default those in use for its device and dtype (`speeds_of`).
        score_speeds: the same for the dtype that scores are taken in; default those in use for that.
    """

    def __init__(self, sizes: Sizes, speeds: Speeds | None = None, score_speeds: Speeds | None = None) -> None:
        self.sizes = sizes
        self.speeds = speeds_of(sizes.device, sizes.dtype) if speeds is None else speeds
        self.is_gpu = sizes.device not in ("cpu", "meta")
        self.threads = self.speeds.threads if self.is_gpu else min(sizes.threads, 4 * self.speeds.threads)
        self.z, self.n, self.m = sizes.batch, sizes.repeats * sizes.query_length, sizes.context_length
        self.query_items = 1 if sizes.shares_queries else sizes.batch
        self._element = sizes.element_bytes
        # Scores are float32 numbers, so outside of the fused kernel half precision is multiplied as float32 there; on a GPU the
        # units for half precision sum in float32 themselves, and only a product of what is already float32 is slow.
        self._score_speeds, self._score_element = self.speeds, self._element
        self._float_speeds: Speeds | None = None
        if sizes.score_dtype != sizes.dtype:
            of_scores = speeds_of(sizes.device, sizes.score_dtype) if score_speeds is None else score_speeds
            self._score_element = DTYPE_BYTES[sizes.score_dtype]
            if self.is_gpu:
                self._float_speeds = of_scores
            else:
                self._score_speeds = of_scores

    def cost(self, plan: Plan) -> Cost:
        """The cost of one plan."""
        sizes = self.sizes
        prepare = [*self._keys[plan.scores], *self._values[plan.values], *self._padding(plan)]
        attend = [*self._queries[plan.scores], *self._kernel(plan), *self._finish[plan.values]]
        key_width, value_width = meeting_widths(plan, sizes)
        key_groups, value_groups = meeting_groups(plan, sizes)
        if plan.kernel == "fused":
            key_width = value_width = max(key_width, value_width)
        held = key_groups * key_width
        if not plan.scores == plan.values == "context":
            held += value_groups * value_width
        prepared = self.z * self.m * held * self._element
        return Cost(
            prepare_flops=sum(step.flops for step in prepare),
            attend_flops=sum(step.flops for step in attend),
            prepare_seconds=self._together(prepare),
            attend_seconds=self._together(attend),
            prepared_bytes=prepared,
            moved_bytes=sum(step.elements for step in (*prepare, *attend)) * self._element,
            uses=sizes.uses,
            peak_bytes=self._peak_bytes(plan, prepared),
        )

    # ------------------------------------------------------------------------------------------------- one step's time

    def _together(self, steps: list[Step]) -> float:
        """Seconds of steps: one after the other on a CPU; a GPU works on some while the host starts the next."""
        seconds = sum(step.seconds for step in steps)
        if not self.is_gpu:
            return seconds
        starting = sum(step.starting for step in steps)
        return max(seconds - starting, starting)

    def _product_seconds(self, rows: int, inner: int, columns: int, batches: int = 1, speeds: Speeds | None = None) -> float:
        """Seconds of the arithmetic of (batched) products (rows, inner) times (inner, columns)."""
        speeds = speeds or self.speeds
        flops = 2.0 * rows * inner * columns
        scale = batches * flops * speeds.threads / self.threads
        if flops >= speeds.quick_from:
            shape = (1 + speeds.quick_rows / rows) * (1 + speeds.quick_columns / columns) * (1 + speeds.quick_inner / inner)
            return scale * shape / speeds.quick_flops + batches * speeds.quick_step
        if not flops:
            return 0.0
        if batches > 1:
            shape = (1 + speeds.batched_rows / rows) * (1 + speeds.batched_columns / columns) * (1 + speeds.batched_inner / inner)
            return scale * shape / speeds.batched_flops
        shape = (1 + speeds.matmul_rows / rows) * (1 + speeds.matmul_columns / columns) * (1 + speeds.matmul_inner / inner)
        return scale * shape / speeds.matmul_flops

    def _traffic_seconds(self, elements: float, written: float = 0.0, element: int | None = None) -> float:
        """Seconds to move elements: from caches while they fit, from memory beyond; large new memory is handed out slowly."""
        size = elements * (element or self._element)
        speeds = self.speeds
        seconds = min(size, speeds.cache) / speeds.cache_bytes + max(0.0, size - speeds.cache) / speeds.bytes
        new = written * (element or self._element)
        return seconds + (new / speeds.new_bytes if new > speeds.new_from else 0.0)

    def _product(
        self,
        name: str,
        rows: int,
        inner: int,
        columns: int,
        batches: int = 1,
        *,
        operations: int = 1,
        is_score: bool = False,
        is_second: bool = False,
    ) -> Step:
        """A (batched) product: 2 FLOPs a multiply-add, operands and result moved once; in training two more for the backward.

        `is_second`: its left side is another product's result, which half precision keeps in float32.
        """
        speeds, element = (self._score_speeds, self._score_element) if is_score else (self.speeds, self._element)
        if is_second and self._float_speeds is not None:
            speeds = self._float_speeds
        left_size, right_size = batches * rows * inner, batches * inner * columns
        result = batches * rows * columns
        elements = left_size + right_size + result
        arithmetic, traffic = (
            self._product_seconds(rows, inner, columns, batches, speeds),
            self._traffic_seconds(elements, result, element),
        )
        seconds = max(arithmetic, traffic) if self.is_gpu else arithmetic + traffic  # a GPU does both at once
        if element > self._element and not self.is_gpu:  # written out in float32 first
            seconds += self._traffic_seconds(1.5 * (left_size + right_size), 0.0, element) + 2 * self.speeds.step_seconds
        starting = operations * self.speeds.step_seconds
        seconds += starting
        if self.sizes.trains:
            starting *= 5
            seconds += self._product_seconds(rows, columns, inner, batches, speeds)
            seconds += self._product_seconds(columns, rows, inner, batches, speeds)
            seconds += (
                self._traffic_seconds(2 * elements, left_size + right_size, element) + 4 * operations * self.speeds.step_seconds
            )
        return Step(name, 2 * batches * rows * inner * columns, elements, seconds, starting)

    def _move(self, name: str, elements: int, flops: int = 0, *, operations: int = 1) -> Step:
        """A pass over memory."""
        times, starting = 2 if self.sizes.trains else 1, operations * self.speeds.step_seconds
        return Step(name, flops, elements, times * (self._traffic_seconds(elements, elements / 2) + starting), times * starting)

    def _softmax_seconds(self, weights: float, columns: int, *, is_block: bool) -> float:
        speeds = self.speeds
        if is_block or columns <= blocks.NARROW_ROW:
            return (
                weights / speeds.softmax * (1 + (speeds.softmax_columns / max(1, columns) if columns > blocks.NARROW_ROW else 0.3))
            )
        return weights / speeds.softmax * (1 + speeds.softmax_columns / columns)

    # --------------------------------------------------------------------------------------------------- what is made of B

    @cached_property
    def _keys(self) -> dict[str, list[Step]]:
        s, rows = self.sizes, self.z * self.m
        made = self._product("B Wk", rows, s.context_dim, s.kv_heads * s.head_dim)
        absorbed = self._product("(B Wk) Wq^T", rows, s.head_dim, s.query_dim, s.heads, is_second=True)
        spread = [self._move("keys by item", 2 * rows * s.heads * s.query_dim)] if self.z > 1 else []
        return {"head": [made], "context": [], "query": [made, absorbed, *spread, *self._more_launches(30)]}

    @cached_property
    def _values(self) -> dict[str, list[Step]]:
        s, rows = self.sizes, self.z * self.m
        made = self._product("B Wv", rows, s.context_dim, s.kv_heads * s.value_head_dim)
        absorbed = self._product("(B Wv) Wo", rows, s.value_head_dim, s.out_dim, s.heads, is_second=True)
        spread = [self._move("values by item", 2 * rows * s.heads * s.out_dim)] if self.z > 1 else []
        return {"head": [made], "context": [], "output": [made, absorbed, *spread, *self._more_launches(12)]}

    def _more_launches(self, count: int) -> list[Step]:
        """What small operations take on a GPU, where each is a launch; on a CPU they are lost in what they stand beside."""
        seconds = count * self.speeds.step_seconds
        return [Step("launches", 0, 0, seconds, seconds)] if self.is_gpu else []

    def _padding(self, plan: Plan) -> list[Step]:
        key_width, value_width = meeting_widths(plan, self.sizes)
        if plan.kernel != "fused" or key_width == value_width:
            return []
        key_groups, value_groups = meeting_groups(plan, self.sizes)
        groups = key_groups if key_width < value_width else value_groups
        return [self._move("pad to one width", self.z * groups * self.m * (key_width + value_width))]

    # --------------------------------------------------------------------------------------------------- what is made of A

    @cached_property
    def _queries(self) -> dict[str, list[Step]]:
        s, rows = self.sizes, self.query_items * self.n
        made = self._product("A Wq", rows, s.query_dim, s.heads * s.head_dim)
        share = s.heads // s.kv_heads
        absorbed = self._product("(A Wq) Wk^T", share * rows, s.head_dim, s.context_dim, s.kv_heads, operations=2)
        return {"head": [made], "context": [made, absorbed], "query": []}

    @cached_property
    def _finish(self) -> dict[str, list[Step]]:
        s, rows = self.sizes, self.z * self.n
        share = s.heads // s.kv_heads
        out = self._product("out_proj", rows, s.heads * s.value_head_dim, s.out_dim)
        absorbed = self._product("(P B) Wv", share * rows, s.context_dim, s.value_head_dim, s.kv_heads, operations=3)
        return {"head": [out], "context": [absorbed, out], "output": []}

    # ---------------------------------------------------------------------------------------------------- where they meet

    def _kernel(self, plan: Plan) -> list[Step]:
        if self.z * self.n * self.m == 0:
            return []
        if plan.kernel == "fused":
            return self._fused(plan)
        return self._explicit(plan) if plan.kernel == "explicit" else self._blocked(plan)

    def _fused(self, plan: Plan) -> list[Step]:
        """Torch's kernel: parallel over batch, groups and blocks of queries; a block is half empty where there are few queries."""
        s, speeds, z, n, m = self.sizes, self.speeds, self.z, self.n, self.m
        key_width, value_width = meeting_widths(plan, s)
        key_groups, value_groups = meeting_groups(plan, s)
        width, groups = max(key_width, value_width), max(key_groups, value_groups)
        if self._is_written_out(width):
            return [*self._explicit(plan), self._move("weights once more", 2 * z * s.heads * n * m)]
        rows = s.heads // groups * n
        weights = z * s.heads * n * m
        query_heads = 1 if plan.scores == "query" else s.heads
        elements = z * ((query_heads + s.heads) * n + m * (key_groups + value_groups)) * width
        seconds = self._fused_on_gpu(rows, width, groups) if self.is_gpu else self._fused_on_cpu(rows, width, groups)
        seconds += self._traffic_seconds(elements, z * s.heads * n * width) + (
            2 * self._traffic_seconds(elements) if s.trains else 0
        )
        starting = 4 * speeds.step_seconds
        steps = [Step("fused attention", 4 * weights * width, elements, seconds + starting, starting)]
        if share_copies(plan, s):
            steps.append(self._move("repeat for every head", 2 * z * s.heads * m * width))
        if plan.values == "output":
            steps.append(self._move("sum over heads", z * (s.heads + 1) * n * s.out_dim, z * s.heads * n * s.out_dim))
        return steps

    def _fused_on_cpu(self, rows: int, width: int, groups: int) -> float:
        s, speeds, z, m = self.sizes, self.speeds, self.z, self.m
        block = 256 if rows >= 768 else 64 if rows >= 192 else 32
        tasks = z * groups * ceil(rows / block)
        waves = ceil(tasks / self.threads)
        block = min(block, rows)
        one = speeds.threads / speeds.fused_flops
        columns = m + speeds.fused_columns
        arithmetic = 4.0 * block * columns * width * one * (1 + speeds.fused_rows / block) * (1 + speeds.fused_width / width)
        exponentials = block * columns * speeds.threads / speeds.fused_exponentials + ceil(m / 512) * speeds.fused_block
        seconds = waves * (arithmetic + exponentials)
        if s.trains:
            backward_tasks = ceil(z * groups / self.threads)
            seconds += 2.5 * rows / block * backward_tasks * (arithmetic * speeds.fused_backward + exponentials)
        return seconds

    def _is_written_out(self, width: int) -> bool:
        """Whether torch has no fused kernel on this GPU for heads so wide, as their rows are not aligned, and writes scores out."""
        return self.is_gpu and width % (16 // self._element) != 0 and width > min(self.speeds.fused_widest, 256)

    def _fused_on_gpu(self, rows: int, width: int, groups: int) -> float:
        """Blocks of 64 queries, full or not, go through the whole context: few of them leave most of a GPU idle.

        One block takes the time that its key blocks wait for each other; all together, that of their arithmetic. Wide heads are
        another, slower kernel's. One query of half precision is read in parts of the context, by the whole GPU. The backward pass
        was not measured, and is counted as if it filled the GPU.
        """
        s, speeds, m = self.sizes, self.speeds, self.m
        slower = speeds.fused_wide if width > speeds.fused_widest else 1.0
        one = slower * 4.0 * 64 * m * width * (1 + speeds.fused_width / width) * speeds.threads / speeds.fused_flops
        tasks = self.z * groups * ceil(rows / 64)
        waits = slower * m / 512 * speeds.fused_block + 0.6 * one
        if rows == 1 and self._element == 2 and slower == 1.0 and tasks < self.threads:
            waits *= tasks / self.threads
        seconds = max(waits, one * tasks / self.threads)
        if s.trains:
            seconds += 2.5 * speeds.fused_backward * one * tasks / self.threads
        return seconds

    def _explicit(self, plan: Plan) -> list[Step]:
        """All weights at once: two batched products and a softmax between them."""
        s, z, n, m, h = self.sizes, self.z, self.n, self.m, self.sizes.heads
        key_width, value_width = meeting_widths(plan, s)
        key_groups, value_groups = meeting_groups(plan, s)
        weights = z * h * n * m
        is_narrow = m <= blocks.NARROW_ROW  # then scores are laid across, keys times queries
        if plan.scores == "query":
            rows, columns, products = n, h * m, z
        else:
            rows, columns, products = h // key_groups * n, m, z * key_groups
            is_narrow = is_narrow and key_groups in (1, h)
        if is_narrow:
            rows, columns = columns, rows
        scores = self._product("scores", rows, key_width, columns, products, operations=3, is_score=True)
        softmax = self._softmax_seconds(weights, m, is_block=False) + self._traffic_seconds(
            2 * weights, weights, self._score_element
        )
        starting, times = self.speeds.step_seconds, 2.5 if s.trains else 1.0
        steps = [scores, Step("softmax", 4 * weights, 2 * weights, times * (softmax + starting), times * starting)]
        if not plan.scores == plan.values == "context":
            steps += self._more_launches(6)
        if plan.values == "output":
            if plan.scores == "context" or (plan.scores == "head" and not is_narrow):
                steps.append(self._move("weights by query", 2 * weights))
            steps.append(self._product("P times values", n, h * m, value_width, z, operations=2, is_second=True))
            return steps
        if plan.scores == "query" and not is_narrow:
            steps.append(self._move("weights by head", 2 * weights))
        steps.append(self._product("P times values", h // value_groups * n, m, value_width, z * value_groups, operations=2))
        if plan.values == "head":
            steps.append(self._move("heads together", 2 * z * n * h * value_width))
        return steps

    def _blocked(self, plan: Plan) -> list[Step]:
        """Blocks of scores in the cache: each costs two products, a softmax, and the calls that Python makes for it."""
        s, speeds, z, n, m, h = self.sizes, self.speeds, self.z, self.n, self.m, self.sizes.heads
        key_width, value_width = meeting_widths(plan, s)
        key_groups, value_groups = meeting_groups(plan, s)
        shares = plan.scores == "query" and h > 1
        together = h if shares else h // key_groups
        in_parts = m > blocks.LONGEST_ROW and not shares and plan.values != "output"
        if in_parts:
            heads, length = max(1, min(together, blocks.PART_ROWS // n)), min(n, blocks.PART_ROWS)
            columns, parts = blocks.PART, m / blocks.PART
        else:
            heads, length = blocks.block_shape(together, n, m, shares_queries=shares)
            columns, parts = m, 1.0
        count = z * (h // together) * ceil(together / heads) * ceil(n / length) * parts
        value_products = max(1, ceil(heads * value_groups / h)) if plan.values != "output" else 1
        rows = heads * length
        size = heads * length * columns
        if shares:
            across = (heads * columns, key_width, length) if columns <= blocks.NARROW_ROW else (length, key_width, heads * columns)
            product = self._product_seconds(*across, speeds=self._score_speeds)
        else:
            product = self._product_seconds(rows, key_width, columns, speeds=self._score_speeds)
        if plan.values == "output":
            read = self._product_seconds(length, heads * columns, value_width)
        else:
            read = value_products * self._product_seconds(rows // value_products, columns, value_width)
        softmax = self._softmax_seconds(size, columns, is_block=True) * (speeds.online_softmax if in_parts else 1.0)
        written = n * value_width * (1 if plan.values == "output" else h)
        elements = z * (n * key_width * (1 if plan.scores == "query" else h) + written)
        elements += z * m * (key_groups * key_width + value_groups * value_width)
        passes = 1 if in_parts else ceil(n / length)
        traffic = self._traffic_seconds(elements * (1 if passes == 1 else 1.5), z * written)
        written_out = 0 if self._score_element == self._element else z * m * key_groups * key_width
        block_traffic = count * 3 * size * self._score_element / speeds.cache_bytes + self._traffic_seconds(
            1.5 * written_out, 0.0, 4
        )
        per_block = speeds.block_seconds + (value_products - 1) * speeds.block_seconds / 3
        seconds = count * (product + softmax + read + per_block) + traffic + block_traffic + z * speeds.block_seconds
        if s.trains:
            seconds += count * (2.2 * product + 2 * read + 2 * softmax + 3 * per_block) + 2.5 * traffic + 2 * block_traffic
        weights = z * h * n * m
        starting = 6 * speeds.step_seconds
        return [Step("attention in blocks", 2 * weights * (key_width + value_width + 2), elements, seconds + starting, starting)]

    def _peak_bytes(self, plan: Plan, prepared: int) -> int:
        """What B becomes, what A becomes, and what the kernel holds at once."""
        s, z, n, m, h = self.sizes, self.z, self.n, self.m, self.sizes.heads
        key_width, value_width = meeting_widths(plan, s)
        kernel = plan.kernel
        if kernel == "fused":
            key_width = value_width = max(key_width, value_width)
            kernel = "explicit" if self._is_written_out(key_width) else kernel
        made = prepared if not plan.scores == plan.values == "context" else 0
        queries = 0 if plan.scores == "query" else z * n * h * key_width
        read = z * n * (s.out_dim if plan.values == "output" and kernel != "fused" else h * value_width)
        if kernel == "fused":
            return made + (queries + read) * self._element
        weights = z * h * n * m if kernel == "explicit" else min(z * h * n * m, blocks.BLOCK_SCORES)
        weight_bytes, read_bytes = weights * self._score_element, read * self._element
        # Scores and their softmax are held together, then the softmax and what it reads.
        at_once = max(2 * weight_bytes, weight_bytes + read_bytes) if kernel == "explicit" else 2 * weight_bytes + read_bytes
        return made + queries * self._element + at_once


def share_copies(plan: Plan, sizes: Sizes) -> bool:
    """Whether the fused kernel needs keys or values repeated, because the two chains meet in unlike numbers of heads above one."""
    key_groups, value_groups = meeting_groups(plan, sizes)
    return key_groups != value_groups and min(key_groups, value_groups) > 1


def cost_of(plan: Plan, sizes: Sizes, speeds: Speeds | None = None) -> Cost:
    """Cost of a plan on a piece of work, by its FLOPs and bytes.

    Args:
        plan: the plan.
        sizes: the work.
        speeds: constants of the device; default those in use for it.

    Returns:
        FLOPs, bytes and estimated seconds of one `prepare` and one `attend`.

    Example:
        >>> class_token = Sizes(8, 1, 401, 384, 384, 6, 6, 64, 64, 384)
        >>> textbook, absorbed = (cost_of(Plan(s, s), class_token) for s in ("head", "context"))
        >>> absorbed.flops < textbook.flops / 10
        True
    """
    return CostModel(sizes, speeds).cost(plan)
