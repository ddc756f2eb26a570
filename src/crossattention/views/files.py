"""Where a view is written: a path that is checked before the work, a file that is whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def checked_path(path: str | Path, endings: tuple[str, ...]) -> Path:
    """The path, if a file with one of these endings can be written there.

    Raises:
        ValueError: another ending.
        IsADirectoryError, FileNotFoundError: `path` is a folder, or its folder is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"expected a file to write, but {path} is a folder; name a file in it, as {path / ('view' + endings[0])}"
        )
    if path.suffix.lower() not in endings:
        raise ValueError(f"expected a file that ends in {' or '.join(endings)}, got {path.name!r}; name the file so")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} for {path.name} does not exist; make it first")
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it first, then in its place."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # as any new file, not private as mkstemp makes it
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
