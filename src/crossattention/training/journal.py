"""A run's metrics on the disk: JSON lines always, TensorBoard where it is installed."""

import json
import math
import os
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
        self._file = open(path, "a", encoding="utf-8")
        self._writer = _open_tensorboard(tensorboard, resumed_step)

    def write(self, event: str, step: int, values: Mapping[str, Any], *, charts: Mapping[str, float] | None = None):
        """Append one line, and one point to each chart ("group/name" -> value)."""
        line = {"event": event, "step": step, **finite(values)}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in (charts or {}).items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Everything so far is on the disk afterwards."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """End the journal; also after an error."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _open_tensorboard(folder: Path | None, resumed_step: int | None):
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra: the JSON lines hold the same numbers
        return None
    purge_step = None if resumed_step is None else resumed_step + 1
    return SummaryWriter(str(folder), purge_step=purge_step)


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to `step`; a last line that a kill cut in two goes too."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
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
