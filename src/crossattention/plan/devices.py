"""What devices do well: the constants behind the cost model, and the built-in ones of the processors that were measured.

Which constants are in use, and the files that hold others, are `speeds`' matter. `python benchmarks/calibrate.py` measures a
machine's own.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import NamedTuple


@dataclass(frozen=True)
class Speeds:
    """What a device does well, in one dtype, in plain numbers; rates are of all `threads` together.

    A product of (rows, inner) and (inner, columns) runs at its rate / ((1 + r / rows) (1 + c / columns) (1 + i / inner)): skinny
    products are slower. `quick` is the library that large float32 products go to on a CPU (oneDNN, where it beats MKL).

    Args:
        is_measured: whether the constants were measured on such a device; where not, another plan than the textbook's is only
            chosen when it is estimated to be at least 1.5 times faster.
        threads: threads that the rates were measured with; arithmetic is taken to grow with their number.
        matmul_flops: floating-point operations a second in large matrix products.
        matmul_rows: rows at which such a product reaches half its rate.
        matmul_columns: the same for columns.
        matmul_inner: the same for the inner length.
        batched_flops: floating-point operations a second in many products that one call takes.
        batched_rows: rows of each at which they reach half that rate.
        batched_columns: the same for columns.
        batched_inner: the same for the inner length.
        quick_from: FLOPs of one product from which on the quick library is called; inf where there is none.
        quick_flops: floating-point operations a second of the quick library.
        quick_rows: rows at which it reaches half its rate.
        quick_columns: the same for columns.
        quick_inner: the same for the inner length.
        quick_step: seconds to start it.
        bytes: bytes a second to and from memory.
        cache: bytes that stay in caches from one step to the next.
        cache_bytes: bytes a second to and from caches.
        new_bytes: bytes a second that the system hands out as new memory.
        new_from: bytes from which on a result is new memory each time.
        fused_flops: floating-point operations a second inside the fused attention kernel.
        fused_rows: query rows of one of its blocks at which it reaches half its rate.
        fused_width: head width at which it reaches half its rate.
        fused_columns: context length at which it reaches half its rate.
        fused_exponentials: exponentials a second inside it.
        fused_block: seconds that one thread spends on one of its blocks besides.
        fused_backward: its arithmetic in the backward pass, over that of the forward for the same FLOPs.
        softmax: exponentials a second in a softmax over long rows.
        softmax_columns: row length at which it reaches half its rate.
        online_softmax: cost of a softmax in parts over one of whole rows.
        step_seconds: seconds to start one operation.
        block_seconds: seconds to start one block of the blocked kernel.
        fused_widest: head width up to which a GPU's quickest fused kernel runs.
        fused_wide: how much slower the one beyond is.
        few_queries_from: heads of all items together from which on a few queries of each are quicker written out than read by the
            fused kernel (`attention/fused.py` says how few); inf where that was not measured.
    """

    is_measured: bool
    threads: int
    matmul_flops: float
    matmul_rows: float
    matmul_columns: float
    matmul_inner: float
    batched_flops: float
    batched_rows: float
    batched_columns: float
    batched_inner: float
    quick_from: float
    quick_flops: float
    quick_rows: float
    quick_columns: float
    quick_inner: float
    quick_step: float
    bytes: float
    cache: float
    cache_bytes: float
    new_bytes: float
    new_from: float
    fused_flops: float
    fused_rows: float
    fused_width: float
    fused_columns: float
    fused_exponentials: float
    fused_block: float
    fused_backward: float
    softmax: float
    softmax_columns: float
    online_softmax: float
    step_seconds: float
    block_seconds: float
    fused_widest: float = math.inf
    fused_wide: float = 1.0
    few_queries_from: float = math.inf

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "is_measured":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise ValueError(f"speeds: {field.name} must be a number, got {value!r}")
            if value < 0 or (value == 0 and field.name in _DIVISORS):
                raise ValueError(f"speeds: {field.name} must be above zero, got {value!r}")

    def __hash__(self) -> int:
        return id(self)


_DIVISORS = frozenset(
    "threads matmul_flops batched_flops quick_flops bytes cache_bytes new_bytes fused_flops fused_exponentials softmax".split()
)

# Fitted by benchmarks/calibrate.py on two cores of an AMD EPYC of the fourth generation (Zen 4: AVX-512 and bfloat16 instructions
# over a data path of 256 bits), torch 2.14, 2026-11-25.
_ZEN4 = Speeds(
    is_measured=True,
    threads=2,
    matmul_flops=3.25e11,
    matmul_rows=3.14,
    matmul_columns=4.0,
    matmul_inner=16.0,
    batched_flops=1.2e11,
    batched_rows=6.84,
    batched_columns=18.6,
    batched_inner=25.6,
    quick_from=1.6e7,
    quick_flops=2.33e11,
    quick_rows=2.44,
    quick_columns=33.6,
    quick_inner=66.1,
    quick_step=1.06e-4,
    bytes=2.7e10,
    cache=5.82e6,
    cache_bytes=1.19e11,
    new_bytes=4.75e9,
    new_from=3.2e7,
    fused_flops=1.69e11,
    fused_rows=1.89,
    fused_width=3.0,
    fused_columns=29.4,
    fused_exponentials=2.82e9,
    fused_block=7.29e-7,
    fused_backward=1.0,
    softmax=5.41e9,
    softmax_columns=7.77,
    online_softmax=2.0,
    step_seconds=2.21e-5,
    block_seconds=1.88e-4,
)

# The fifth generation (Zen 5: 512 bits). Measured there, 2026-11-23: what oneDNN and the fused kernel's exponentials reach; torch's
# other products are MKL's, which were as fast as on the fourth. The rest is the fourth's, and nothing has been fitted there since.
_ZEN5 = replace(_ZEN4, quick_flops=4.2e11, fused_exponentials=3.17e9)

_ZEN4_BF16 = replace(
    _ZEN4,
    matmul_flops=4.48e11,
    matmul_rows=2.25,
    matmul_columns=4.2,
    matmul_inner=86.1,
    batched_flops=2.15e11,
    batched_rows=28.0,
    batched_columns=15.1,
    batched_inner=54.1,
    quick_from=math.inf,
    bytes=2.56e10,
    cache=2.49e6,
    cache_bytes=3.87e10,
    new_bytes=5.94e9,
    fused_flops=1.82e11,
    fused_rows=6.47,
    fused_width=3.8,
    fused_columns=22.6,
    fused_exponentials=2.28e9,
    fused_block=2.42e-6,
    softmax=6.37e9,
    softmax_columns=8.36,
    step_seconds=3.07e-5,
    block_seconds=2.16e-4,
)

_ZEN5_BF16 = replace(_ZEN4_BF16, matmul_flops=9.65e11, fused_flops=2.35e11)

# Fitted by benchmarks/calibrate.py on two cores of an Intel Xeon with AMX (fourth or fifth generation), torch 2.14, 2026-11-26.
# MKL is as fast as oneDNN there, so that no product is taken from it; in bfloat16 products are up to eight times as fast.
_AMX = replace(
    _ZEN4,
    matmul_flops=2.17e11,
    matmul_rows=2.76,
    matmul_columns=4.04,
    matmul_inner=19.2,
    batched_flops=2.85e11,
    batched_rows=9.14,
    batched_columns=47.0,
    batched_inner=85.8,
    quick_from=math.inf,
    bytes=3.29e10,
    cache=5.37e6,
    cache_bytes=1.46e11,
    new_bytes=4.8e9,
    fused_flops=1.97e11,
    fused_rows=2.03,
    fused_width=2.77,
    fused_columns=31.2,
    fused_exponentials=4.23e9,
    fused_block=4.37e-7,
    softmax=5.43e9,
    softmax_columns=7.79,
    step_seconds=3.21e-5,
    block_seconds=2.85e-4,
    few_queries_from=192,
)

_AMX_BF16 = replace(
    _ZEN4_BF16,
    matmul_flops=1.04e12,
    matmul_rows=2.18,
    matmul_columns=4.22,
    matmul_inner=164.0,
    batched_flops=2.43e11,
    batched_rows=40.2,
    batched_columns=12.9,
    batched_inner=67.4,
    bytes=3.29e10,
    cache=2.5e6,
    cache_bytes=3.02e10,
    fused_flops=3.81e11,
    fused_rows=5.88,
    fused_columns=41.6,
    fused_exponentials=2.07e9,
    fused_block=1.89e-6,
    softmax=6.91e9,
    softmax_columns=8.38,
    step_seconds=5.01e-5,
    block_seconds=4.31e-4,
)

# Measured on one NVIDIA H200, torch 2.11, 2026-11-26: what kernels reach, by sizes; products fitted by benchmarks/calibrate.py.
# `threads` are its multiprocessors, so that a rate is that of all of them.
_H200 = replace(
    _ZEN4,
    threads=132,
    matmul_flops=4.9e13,
    matmul_rows=24.0,
    matmul_columns=24.0,
    matmul_inner=16.0,
    batched_flops=4.9e13,
    batched_rows=24.0,
    batched_columns=24.0,
    batched_inner=16.0,
    quick_from=math.inf,
    bytes=4e12,
    cache=3e7,
    cache_bytes=6e12,
    new_bytes=1e15,
    fused_flops=4.57e13,
    fused_rows=1.0,
    fused_width=27.0,
    fused_columns=1.0,
    fused_exponentials=1e15,
    fused_block=3.07e-5,
    fused_backward=1.3,
    softmax=1e12,
    step_seconds=1.4e-5,
    block_seconds=1.2e-4,
)
_H200_BF16 = replace(
    _H200,
    matmul_flops=6.8e14,
    batched_flops=6.5e14,
    fused_flops=6.9e14,
    fused_width=30.0,
    fused_block=2.8e-6,
    fused_widest=256.0,
    fused_wide=4.5,
)


def _without_quick(speeds: Speeds) -> Speeds:
    """A processor on which torch's own products are as quick as oneDNN's; nobody measured one."""
    if speeds.quick_from == math.inf:
        return replace(speeds, is_measured=False)
    return replace(
        speeds,
        is_measured=False,
        matmul_flops=speeds.quick_flops,
        batched_flops=speeds.quick_flops,
        quick_from=math.inf,
        fused_flops=max(speeds.fused_flops, 0.9 * speeds.quick_flops),
    )


class Processor(NamedTuple):
    """What the system says of a processor: its maker, the maker's number of its generation (0 if unknown), its instruction sets."""

    vendor: str
    family: int
    flags: frozenset[str]

    @property
    def kind(self) -> str:
        """Which of the measured processors is nearest."""
        if not {"avx512f", "avx512_bf16"} <= self.flags:
            return "avx2"
        if "Intel" in self.vendor and "amx_bf16" in self.flags:
            return "amx"
        return "zen4" if "AMD" in self.vendor and self.family <= 25 else "zen5"


@lru_cache(maxsize=1)
def processor() -> Processor:
    """This machine's processor; without a maker and instruction sets where the system does not say."""
    try:
        with open("/proc/cpuinfo") as lines:
            pairs = [line.split(":", 1) for line in lines if ":" in line]
            told = {name.strip(): value.strip() for name, value in pairs}
    except OSError:
        told = {}
    family = told.get("cpu family", "")
    return Processor(
        told.get("vendor_id") or platform.processor(),
        int(family) if family.isdigit() else 0,
        frozenset(told.get("flags", "").split()),
    )


def built_in(device: str, dtype: str) -> Speeds:
    """The built-in constants for a device type and dtype; of a device that nobody measured, those of the nearest one."""
    if device == "cpu":
        here = processor()
        measured = _CPU[here.kind][dtype]
        return measured if "AMD" in here.vendor or here.kind == "amx" else _without_quick(measured)
    if device == "cuda":
        return _CUDA[dtype]
    if device == "meta":
        return replace(_ZEN4, is_measured=False, quick_from=math.inf)
    return replace(_CUDA[dtype], is_measured=False)


# Zen 5 held to AVX2 (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS): where oneDNN begins to win, what it
# reaches, softmax, and in bfloat16 products and the fused kernel were measured; the rest is as on Zen 4.
_AVX2 = replace(_ZEN4, quick_from=1e8, quick_flops=2.2e11, softmax=2.6e9)
_AVX2_BF16 = replace(_ZEN4_BF16, matmul_flops=4.7e10, batched_flops=4.7e10, fused_flops=4e10, softmax=2.6e9)


def _by_dtype(float32: Speeds, bfloat16: Speeds) -> dict[str, Speeds]:
    """All dtypes of a processor. Nobody measured doubles, at half the rate of floats, or float16."""
    products = min(float32.matmul_flops, float32.quick_flops) / 2
    many, fused = float32.batched_flops / 2, float32.fused_flops / 2
    slow = partial(replace, is_measured=False, matmul_flops=products, batched_flops=many, fused_flops=fused)
    doubles, float16 = slow(float32, quick_from=math.inf, few_queries_from=math.inf), slow(bfloat16)
    return {"float32": float32, "float64": doubles, "bfloat16": bfloat16, "float16": float16}


_CPU = {
    "zen4": _by_dtype(_ZEN4, _ZEN4_BF16),
    "zen5": _by_dtype(_ZEN5, _ZEN5_BF16),
    "amx": _by_dtype(_AMX, _AMX_BF16),
    "avx2": _by_dtype(_AVX2, _AVX2_BF16),
}
_CUDA = _by_dtype(_H200, _H200_BF16)
