"""What a benchmark ran on: printed above every table and stored in every JSON file."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch


def machine() -> dict[str, object]:
    """Processor, memory, threads and versions."""
    has_gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": _meminfo_gb("MemTotal"),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if has_gpu else None,
        "cuda": torch.version.cuda if has_gpu else None,
        "cudnn": torch.backends.cudnn.version() if has_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of installed packages; None for one that is not installed."""
    return {package: _version(package) for package in packages}


def free_gb(device: str = "cpu") -> float | None:
    """Memory that a benchmark may still take, in 10^9 bytes; None where the system does not tell."""
    return torch.cuda.mem_get_info()[0] / 1e9 if device == "cuda" else _meminfo_gb("MemAvailable")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _meminfo_gb(field: str) -> float | None:
    try:
        with open("/proc/meminfo") as lines:
            return next(round(int(line.split()[1]) * 1024 / 1e9, 1) for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return None


def print_machine() -> None:
    print(", ".join(f"{name} {value}" for name, value in machine().items() if value is not None))
