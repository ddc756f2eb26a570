"""Refusing numbers and switches of the wrong kind, in one wording, for layers and the configs of models."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_above_zero(value: Any) -> bool:
    """Whether a value is a finite number above 0, and no truth value."""
    return is_number(value) and value > 0.0


def check_probability(name: str, value: Any) -> None:
    """Refuse what is no probability of dropping something: it must be below 1, or nothing would be left.

    Raises:
        TypeError: no number.
        ValueError: outside [0, 1).
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number in [0, 1), got {type(value).__name__} {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_above_zero(name: str, value: Any) -> None:
    """Refuse what is no finite number above 0.

    Raises:
        TypeError: no number.
        ValueError: 0, below, infinite or nan.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number above 0, got {type(value).__name__} {value!r}")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be above 0, got {value}")


def check_bool(name: str, value: Any) -> None:
    """Refuse what is neither True nor False: "no" would count as True.

    Raises:
        TypeError: neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")


def check_switches(config: Any) -> None:
    """Check the fields of a config that are no sizes: truth values, probabilities of dropping, what a norm adds.

    Raises:
        TypeError: a value of another kind.
        ValueError: a number out of range.
    """
    for field in fields(config):
        if field.type == "bool":
            check_bool(field.name, getattr(config, field.name))
        elif field.type == "float" and "dropout" in field.name:
            check_probability(field.name, getattr(config, field.name))
        elif field.name == "norm_eps":
            check_above_zero(field.name, getattr(config, field.name))


def look_up(name: str, ids: Tensor, table: nn.Embedding | Tensor) -> Tensor:
    """Rows of a table, for symbols or places that it has.

    Raises:
        ValueError: an index that the table has no row for, where the device says so at once, as the CPU does.
    """
    try:
        rows: Tensor = table(ids) if isinstance(table, nn.Embedding) else F.embedding(ids, table)
    except IndexError:
        count = table.num_embeddings if isinstance(table, nn.Embedding) else len(table)
        raise ValueError(f"{name} must be from 0 to {count - 1}, got {int(ids.min())} to {int(ids.max())}") from None
    return rows
