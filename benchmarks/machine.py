"""What a benchmark ran on: printed above every table and stored in every JSON file."""

import os
import platform
from datetime import UTC, datetime

import torch


def machine() -> dict[str, object]:
    """Processor, threads and versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_machine() -> None:
    print(", ".join(f"{name} {value}" for name, value in machine().items() if value is not None))
