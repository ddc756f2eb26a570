"""Which constants of a device are in use, and the files that they are read from and written to.

`speeds_of` says which constants a device and dtype are planned with: those that were passed to `use_speeds`, else those of a file
that the configuration names, else the built-in ones for this kind of processor. `python benchmarks/calibrate.py` measures a
machine's own.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from crossattention.plan.devices import Speeds, built_in

CONFIG_VARIABLE = "CROSSATTENTION_CONFIG"
"""Environment variable that names another configuration file than ~/.config/crossattention/config.toml."""
FORMAT = "crossattention speeds 1"

_in_use: dict[tuple[str, str], Speeds] = {}
_reads_config = True
generation = 0
"""How many times the constants in use have changed: who keeps what follows from them asks whether it is the same."""


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
    global _reads_config, generation
    table = {} if speeds is None else dict(speeds) if isinstance(speeds, Mapping) else read_speeds(speeds)
    for key, value in table.items():
        if not isinstance(value, Speeds) or not (isinstance(key, tuple) and len(key) == 2):
            raise ValueError(
                f'speeds must be Speeds by (device, dtype), as ("cpu", "float32"); got {key!r}: {type(value).__name__}'
            )
    _reads_config = False
    _in_use.clear()
    _in_use.update(table)
    generation += 1  # last, so that nothing of before is kept under it


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
    missing = sorted(field.name for field in fields(Speeds) if field.default is MISSING and field.name not in values)
    unknown = sorted(set(values) - known)
    if missing or unknown:
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
    global _reads_config, generation
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
        generation += 1
    _reads_config = False
