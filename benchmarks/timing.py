"""How benchmarks measure: calls taken in turn in one process, medians with quartiles, and the peak memory of one call.

Calls that are compared run in the same rounds, each round in another order, so that what else the machine does meets all of them
alike. On a CUDA device times are taken between events on its stream, and the memory is the allocator's.
"""

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, count

import torch

SHORTEST_SECONDS = 2e-3
"""A shorter call is repeated within its turn until the turn lasts this long: a clock and a cold cache would show in it."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the rounds, their quartiles, and how many rounds there were."""

    median: float
    low_quartile: float
    high_quartile: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """What these rounds say; one round is all its quartiles."""
        quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return cls(quartiles[1], quartiles[0], quartiles[2], len(seconds))


def seconds_of(
    call: Callable[[], object], *, times: int = 1, device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> float:
    """Mean seconds of `times` calls in a row, by a clock; on CUDA until the device has finished them, by its own."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times
    begun = clock()
    for _ in range(times):
        call()
    return (clock() - begun) / times


def interleaved(
    calls: dict[str, Callable[[], object]],
    *,
    budget: float,
    rounds: int = 5,
    warmup: int = 2,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time calls in turn.

    Args:
        calls: what to time, by name.
        budget: seconds after which no further round is begun.
        rounds: rounds that are timed even where the budget is spent.
        warmup: rounds before, at least one; they also say how often a short call is repeated within its turn.
        device: "cpu" or "cuda".
        clock: what tells seconds on a CPU; `time.process_time` leaves out what else the machine does, on one thread.

    Returns:
        The timing of each call.
    """
    if warmup < 1:
        raise ValueError(f"warmup must be at least 1, got {warmup}")
    names, rng = list(calls), random.Random(0)
    times = dict.fromkeys(names, 1)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + budget
    for round_ in count():
        if not names or (round_ >= warmup + rounds and time.perf_counter() > end):
            break
        # In a fixed or rotated order each call would always follow the same one, and meet what it left in the caches.
        rng.shuffle(names)
        for name in names:
            taken = seconds_of(calls[name], times=times[name], device=device, clock=clock)
            if round_ < warmup:
                times[name] = max(1, math.ceil(SHORTEST_SECONDS / max(taken, 1e-9)))
            else:
                seconds[name].append(taken)
    return {name: Timing.of(taken) for name, taken in seconds.items()}


def peak_megabytes(call: Callable[[], object], device: str = "cpu") -> float | None:
    """Most memory, in 10^6 bytes, that one call adds to what is held before it; None where the system does not tell.

    On the CPU it is the growth of the peak resident size, with freed memory given back to the system first; pages that the
    process already held for something else are not seen, so call it after a warm-up, and read small figures as such.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the peak back to the present size
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None
    call()
    return max(0, _status_bytes("VmHWM") - before) / 1e6


def tensor_megabytes(call: Callable[[], object], device: str = "cpu") -> float:
    """Most memory, in 10^6 bytes, that tensors made by one call hold at once, as torch's allocator counts it.

    The same for every run, where the resident size also shows what the libraries keep for themselves and what the system has not
    taken back. On a GPU the two are one.
    """
    if device == "cuda":
        return peak_megabytes(call, device) or 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()  # no public list has memory in the order of time
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0)) / 1e6


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
