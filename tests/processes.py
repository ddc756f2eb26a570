"""Several processes for one test: started together, a file as their meeting place, ended together, never waited for without end.

A program that is started so calls `join()` first. It finds its place in the environment, as under `torchrun`, but meets the others
at a file: no port that another test may have taken.
"""

import datetime
import faulthandler
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 240
"""Seconds that a collective waits for another process before it fails; a busy machine may stop one for minutes."""


def join() -> tuple[int, int]:
    """Join the process group; rank and number of processes. Where the group hangs, the stacks are printed.

    TEST_DEVICE and TEST_BACKEND name another device than the CPU, for all tensors, and another backend than gloo.
    """
    import torch
    import torch.distributed as dist

    faulthandler.dump_traceback_later(3 * PATIENCE, exit=True)
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["MEETING_FILE"], world)
    backend, device = os.environ.get("TEST_BACKEND", "gloo"), os.environ.get("TEST_DEVICE", "cpu")
    if device != "cpu":
        torch.set_default_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=PATIENCE))
    return rank, world


def environment(**more: str) -> dict[str, str]:
    """Of a child: one thread, this source, the tests' helpers, gloo on the loopback, and no launcher's variables."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    return {**ours, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", **more}


@contextmanager
def started(
    program: Path, world: int, arguments: Sequence[str] = (), **more: str
) -> Iterator[tuple[list[subprocess.Popen[bytes]], list[Path]]]:
    """`world` processes of a program, and the files that they write to; all are ended at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / f"{rank}.txt" for rank in range(world)]
        children: list[subprocess.Popen[bytes]] = []
        try:
            for rank, place in enumerate(places):
                where = {"RANK": str(rank), "WORLD_SIZE": str(world), "MEETING_FILE": str(Path(folder) / "meeting")}
                # accelerate asks for these, but the group that `join` has made is there already.
                where |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
                with place.open("w") as file:
                    command = [sys.executable, str(program), *arguments]
                    children.append(
                        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment(**where, **more))
                    )
            yield children, places
        finally:
            for child in children:
                child.kill()
                child.wait()


def run_processes(
    program: Path, world: int, arguments: Sequence[str] = (), *, timeout: float = 4 * PATIENCE, **more: str
) -> list[str]:
    """What each of `world` processes of a program prints; all end when one fails, and an AssertionError tells what each said.

    `more` are further variables of their environment.
    """
    with started(program, world, arguments, **more) as (children, places):
        fault = _wait(children, timeout)
        said = [place.read_text(errors="replace") for place in places]
        told = "\n".join(f"-- process {rank}, {child.returncode}:\n{said[rank][-8000:]}" for rank, child in enumerate(children))
    assert fault is None, f"{fault}\n{told}"
    return said


def _wait(children: Sequence[subprocess.Popen[bytes]], timeout: float) -> str | None:
    """Wait until all have ended, one has failed or time is over; what went wrong."""
    end = time.monotonic() + timeout
    while any(child.poll() is None for child in children):
        if any(child.poll() for child in children):
            time.sleep(2)  # the others may say why they failed too
            break
        if time.monotonic() > end:
            return f"the processes were not done after {timeout} s"
        time.sleep(0.05)
    return "a process failed" if any(child.poll() for child in children) else None
