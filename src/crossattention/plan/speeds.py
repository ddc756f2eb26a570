"""What devices do well: the constants behind the cost model, measured where they could be, and which of them are in use.

`speeds_of` says which constants a device and dtype are planned with: those that were passed to `use_speeds`, else those of a file
that the configuration names, else the built-in ones for this kind of processor. `python benchmarks/calibrate.py` measures a
machine's own.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

CONFIG_VARIABLE = "CROSSATTENTION_CONFIG"
"""Environment variable that names another configuration file than ~/.config/crossattention/config.toml."""
FORMAT = "crossattention speeds 1"


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
        batched_rows: the same for many small products in one call.
        matmul_columns: the same for columns.
        matmul_inner: the same for the inner length.
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
        fused_exponentials: exponentials a second inside it.
        fused_block: seconds that one thread spends on one of its blocks besides.
        fused_backward: its arithmetic in the backward pass, over that of the forward for the same FLOPs.
        softmax: exponentials a second in a softmax over long rows.
        softmax_columns: row length at which it reaches half its rate.
        online_softmax: cost of a softmax in parts over one of whole rows.
        step_seconds: seconds to start one operation.
        block_seconds: seconds to start one block of the blocked kernel.
    """

    is_measured: bool
    threads: int
    matmul_flops: float
    matmul_rows: float
    batched_rows: float
    matmul_columns: float
    matmul_inner: float
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
    fused_exponentials: float
    fused_block: float
    fused_backward: float
    softmax: float
    softmax_columns: float
    online_softmax: float
    step_seconds: float
    block_seconds: float

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


_DIVISORS = frozenset("threads matmul_flops quick_flops bytes cache_bytes new_bytes fused_flops fused_exponentials softmax".split())

# Fitted by benchmarks/calibrate.py on two cores of an AMD EPYC (AVX-512 and bfloat16 instructions), torch 2.15, 2026-11-23.
_AVX512 = Speeds(
    is_measured=True,
    threads=2,
    matmul_flops=1.54e11,
    matmul_rows=3.65,
    batched_rows=7.2,
    matmul_columns=3.8,
    matmul_inner=10.6,
    quick_from=1.6e07,
    quick_flops=4.08e11,
    quick_rows=2.51,
    quick_columns=4,
    quick_inner=64.6,
    quick_step=4.8e-05,
    bytes=2.11e10,
    cache=3e06,
    cache_bytes=5.99e10,
    new_bytes=9.56e09,
    new_from=3.2e07,
    fused_flops=2.14e11,
    fused_rows=6.69,
    fused_width=3.5,
    fused_exponentials=3.17e09,
    fused_block=2.71e-06,
    fused_backward=1,
    softmax=5.22e09,
    softmax_columns=7.77,
    online_softmax=2,
    step_seconds=1.37e-05,
    block_seconds=5.64e-05,
)

_AVX512_BF16 = Speeds(
    is_measured=True,
    threads=2,
    matmul_flops=9.65e11,
    matmul_rows=2.57,
    batched_rows=144,
    matmul_columns=4.2,
    matmul_inner=77.3,
    quick_from=math.inf,
    quick_flops=4.2e11,
    quick_rows=4,
    quick_columns=4,
    quick_inner=40,
    quick_step=2e-05,
    bytes=1.53e10,
    cache=2.35e06,
    cache_bytes=3.22e10,
    new_bytes=8.24e09,
    new_from=3.2e07,
    fused_flops=2.35e11,
    fused_rows=6.09,
    fused_width=4.12,
    fused_exponentials=1.46e09,
    fused_block=4.4e-06,
    fused_backward=1,
    softmax=5.72e09,
    softmax_columns=8.36,
    online_softmax=2,
    step_seconds=1.98e-05,
    block_seconds=0.000105,
)

# One current data-centre GPU, from its data sheet; nothing here was measured.
_GPU = replace(
    _AVX512,
    is_measured=False,
    threads=1,
    matmul_flops=6e14,
    matmul_rows=64.0,
    batched_rows=64.0,
    matmul_columns=64.0,
    matmul_inner=64.0,
    quick_from=math.inf,
    bytes=3.5e12,
    cache=3e7,
    cache_bytes=1e13,
    new_bytes=1e15,
    fused_flops=4e14,
    fused_rows=32.0,
    fused_width=32.0,
    fused_exponentials=2e12,
    fused_block=0.0,
    fused_backward=1.3,
    softmax=4e11,
    step_seconds=5e-6,
    block_seconds=3e-5,
)


def _without_quick(speeds: Speeds) -> Speeds:
    """A processor on which torch's own products are as quick as oneDNN's; nobody measured one."""
    return replace(
        speeds,
        is_measured=False,
        matmul_flops=speeds.quick_flops,
        quick_from=math.inf,
        fused_flops=max(speeds.fused_flops, 0.9 * speeds.quick_flops),
    )


@lru_cache(maxsize=1)
def processor() -> tuple[str, frozenset[str]]:
    """Vendor and instruction sets of this machine's processor, as the system names them; empty where it does not say."""
    try:
        with open("/proc/cpuinfo") as lines:
            pairs = [line.split(":", 1) for line in lines if ":" in line]
            told = {name.strip(): value.strip() for name, value in pairs}
    except OSError:
        told = {}
    vendor = told.get("vendor_id") or platform.processor()
    return vendor, frozenset(told.get("flags", "").split())


def built_in(device: str, dtype: str) -> Speeds:
    """The built-in constants for a device type and dtype; of a device that nobody measured, those of the nearest one."""
    if device == "cpu":
        vendor, flags = processor()
        measured = _CPU["avx512" if {"avx512f", "avx512_bf16"} <= flags else "avx2"]
        return measured[dtype] if "AMD" in vendor else _without_quick(measured[dtype])
    if device == "cuda":
        return _CUDA[dtype]
    return replace(_AVX512, is_measured=False, quick_from=math.inf)


# The same machine held to AVX2 (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS): products, the fused kernel and
# softmax measured, the rest as above.
_AVX2 = replace(_AVX512, quick_from=1e8, quick_flops=2.2e11, softmax=2.6e9, fused_flops=1.9e11)
_AVX2_BF16 = replace(_AVX512_BF16, matmul_flops=4.7e10, fused_flops=4e10, softmax=2.6e9)


def _by_dtype(float32: Speeds, bfloat16: Speeds) -> dict[str, Speeds]:
    """All dtypes of a processor: doubles at half the rate of floats; float16, which has no instructions of its own, unmeasured."""
    doubles = replace(float32, quick_from=math.inf, matmul_flops=float32.matmul_flops / 2, fused_flops=float32.fused_flops / 2)
    float16 = replace(bfloat16, is_measured=False, matmul_flops=float32.matmul_flops / 2, fused_flops=float32.fused_flops / 2)
    return {"float32": float32, "float64": doubles, "bfloat16": bfloat16, "float16": float16}


_CPU = {"avx512": _by_dtype(_AVX512, _AVX512_BF16), "avx2": _by_dtype(_AVX2, _AVX2_BF16)}
_CUDA: dict[str, Speeds] = {}
for _dtype, _rate in (("float32", 0.08), ("float64", 0.08), ("bfloat16", 1.0), ("float16", 1.0)):
    _CUDA[_dtype] = replace(_GPU, matmul_flops=_GPU.matmul_flops * _rate, fused_flops=_GPU.fused_flops * _rate)

_in_use: dict[tuple[str, str], Speeds] = {}
_reads_config = True


def speeds_of(device: str, dtype: str) -> Speeds:
    """The constants that a device type and dtype are planned with.

    Raises:
        ValueError: the configuration file, or the file of speeds that it names, cannot be read; it says which and why.
    """
    found = _in_use.get((device, dtype))
    if found is None:
        if _reads_config:
            _read_config()
        found = _in_use.setdefault((device, dtype), built_in(device, dtype))
    return found


def use_speeds(speeds: str | os.PathLike[str] | Mapping[tuple[str, str], Speeds] | None) -> None:
    """Plan with other constants from now on, in this process.

    Args:
        speeds: a file that `python benchmarks/calibrate.py` wrote; or `Speeds` by (device type, dtype), as ("cpu", "float32");
            or None for the built-in ones. Devices and dtypes that are not named keep the built-in ones.

    Raises:
        ValueError: the file is not one of speeds, or a constant in it is missing, unknown or out of range.
        OSError: the file cannot be read.

    Example:
        >>> from dataclasses import replace
        >>> slow_memory = replace(speeds_of("cpu", "float32"), bytes=5e9)
        >>> use_speeds({("cpu", "float32"): slow_memory})
        >>> speeds_of("cpu", "float32").bytes
        5000000000.0
        >>> use_speeds(None)
    """
    global _reads_config
    table = {} if speeds is None else dict(speeds) if isinstance(speeds, Mapping) else read_speeds(speeds)
    for key, value in table.items():
        if not isinstance(value, Speeds) or not (isinstance(key, tuple) and len(key) == 2):
            raise ValueError(
                f'speeds must be Speeds by (device, dtype), as ("cpu", "float32"); got {key!r}: {type(value).__name__}'
            )
    _reads_config = False
    _in_use.clear()
    _in_use.update(table)


def read_speeds(path: str | os.PathLike[str]) -> dict[tuple[str, str], Speeds]:
    """The constants in a file that `benchmarks/calibrate.py` wrote.

    Raises:
        ValueError: the file is not one of speeds, or a constant in it is missing, unknown or out of range.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file of speeds ({error}); write one with python benchmarks/calibrate.py") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} must have format {FORMAT!r}, got {found!r}; write one with python benchmarks/calibrate.py")
    return {_device_and_dtype(path, key): _speeds_from(path, key, values) for key, values in data["speeds"].items()}


def write_speeds(path: str | os.PathLike[str], speeds: Mapping[tuple[str, str], Speeds], machine: Mapping[str, object]) -> None:
    """Write constants, and the machine that they were measured on, to a file that `use_speeds` takes."""
    table = {" ".join(key): {k: "inf" if v == math.inf else v for k, v in asdict(value).items()} for key, value in speeds.items()}
    text = json.dumps({"format": FORMAT, "machine": dict(machine), "speeds": table}, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _device_and_dtype(path: str | os.PathLike[str], key: str) -> tuple[str, str]:
    device, _, dtype = key.partition(" ")
    if not device or not dtype:
        raise ValueError(f'{path}: speeds are named by device and dtype, as "cpu float32", got {key!r}')
    return device, dtype


def _speeds_from(path: str | os.PathLike[str], key: str, values: dict[str, object]) -> Speeds:
    known = {field.name for field in fields(Speeds)}
    if set(values) != known:
        missing, unknown = sorted(known - set(values)), sorted(set(values) - known)
        raise ValueError(
            f"{path}, {key}: constants missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
    try:
        return Speeds(**{name: math.inf if value == "inf" else value for name, value in values.items()})  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{path}, {key}: {error}") from error


def config_path() -> Path:
    """The configuration file: what CROSSATTENTION_CONFIG names, else config.toml in the user's configuration folder."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(folder) / "crossattention" / "config.toml"


def _read_config() -> None:
    """Use the speeds that the configuration names, `speeds = "file.json"`; a relative path starts at the configuration's folder."""
    global _reads_config
    path = config_path()
    if not path.is_file():
        if os.environ.get(CONFIG_VARIABLE):
            raise ValueError(f"{CONFIG_VARIABLE} names {path}, which is no file")
        _reads_config = False
        return
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    unknown = sorted(set(config) - {"speeds"})
    if unknown:
        raise ValueError(f"{path}: unknown setting {', '.join(unknown)}; known: speeds")
    named = config.get("speeds")
    if named is not None and not isinstance(named, str):
        raise ValueError(f"{path}: speeds must be the path of a file, got {named!r}")
    if named is not None:
        try:
            table = read_speeds(path.parent / named)
        except OSError as error:
            raise ValueError(f"{path} names speeds that cannot be read: {error}") from error
        _in_use.update(table)
    _reads_config = False
