"""A run's metrics on the disk: JSON lines always, TensorBoard where it is installed."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossattention.checkpoints.files import new_file


class Journal:
    """Appends what happened to `metrics.jsonl`, and the numbers in it to TensorBoard.

    Each line is an object with "event", "step" and the event's own fields; nan and infinity are written as null.
    Resumed, the journal first forgets everything after the step that the run goes on from (it will happen again).

    Args:
        path: the file.
        tensorboard: TensorBoard's folder, or None for none.
        resumed_step: the step that the run goes on from; None in a new run.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, tensorboard: Path | None, *, resumed_step: int | None = None):
        if resumed_step is not None and path.exists():
            _truncate(path, resumed_step)
        self._file = _Appended(path)
        self._charts = _open_charts(tensorboard, resumed_step)

    def write(self, event: str, step: int, values: Mapping[str, Any], *, charts: Mapping[str, float] | None = None) -> None:
        """Append one line, and one point to each chart ("group/name" -> value)."""
        line = {"event": event, "step": step, **finite(values)}
        self._file.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))
        if self._charts is not None:
            self._charts.write(step, charts or {})

    def flush(self) -> None:
        """Everything so far is on the disk afterwards."""
        self._file.flush()
        if self._charts is not None:
            self._charts.file.flush()

    def close(self) -> None:
        """End the journal; also after an error."""
        self._file.close()
        if self._charts is not None:
            self._charts.file.close()


class _Appended:
    """A file that grows, without a buffer: what could not be written is an error at once, not again at closing."""

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)

    def write(self, data: bytes) -> None:
        while data:  # a disk that becomes full takes a part first, and raises at the rest
            data = data[self._file.write(data) :]

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Charts:
    """TensorBoard's event file, in its own record format.

    Its usual writer does this in a thread, whose errors (a full disk, a removed folder) come late and hide others.
    """

    def __init__(self, folder: Path, resumed_step: int | None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        begun = time.time()
        self.file = _Appended(folder / f"events.out.tfevents.{begun:.6f}.{os.getpid()}")
        self._records, self._event = RecordWriter(self.file), Event
        self._records.write(Event(wall_time=begun, file_version="brain.Event:2").SerializeToString())
        if resumed_step is not None:  # TensorBoard then forgets the points from this step on
            session = SessionLog(status=SessionLog.START)
            event = Event(wall_time=begun, step=resumed_step + 1, session_log=session)
            self._records.write(event.SerializeToString())

    def write(self, step: int, charts: Mapping[str, float]) -> None:
        for name, value in charts.items():
            event = self._event(wall_time=time.time(), step=step)
            event.summary.value.add(tag=name, simple_value=value)
            self._records.write(event.SerializeToString())


def _open_charts(folder: Path | None, resumed_step: int | None) -> _Charts | None:
    if folder is None:
        return None
    try:
        return _Charts(folder, resumed_step)
    except ImportError:  # an extra: the JSON lines hold the same numbers
        return None


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to `step`; a last line that a kill cut in two goes too."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and entry.get("step", 0) <= step:
            kept.append(line + "\n")
    with new_file(path) as beside:
        beside.write_text("".join(kept), encoding="utf-8")


def finite(value: Any) -> Any:
    """The same plain data with nan and infinity as None: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
