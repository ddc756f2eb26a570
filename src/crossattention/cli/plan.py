"""`crossattention plan`: every evaluation order of one cross-attention, with its cost and why it is (not) chosen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from crossattention.plan import Speeds


@dataclass(frozen=True)
class PlanArguments:
    """Show what the planner makes of these sizes: every evaluation order, its cost, and the choice.

    Args:
        queries: shape of A: z,n,a (batch, length, width); z,r,n,a for r beams on one context; n,a for learned queries.
        context: shape of B: z,m,b (batch, length, width).
        heads: attention heads.
        head_dim: width of scores in a head; the queries' width / heads where it is not given.
        value_head_dim: width of values in a head; head_dim where it is not given.
        kv_heads: key-value heads; as many as heads where it is not given.
        out_dim: width of the output; the queries' where it is not given.
        uses: how many times one prepared context is read.
        dtype: what the work is computed in.
        train: plan for a training step: forward and backward.
        speeds: a file that benchmarks/calibrate.py wrote; plan with its constants in the place of those in use.
        json: print one JSON object in the place of the table.
    """

    queries: Annotated[str, tyro.conf.arg(metavar="Z,N,A")]
    context: Annotated[str, tyro.conf.arg(metavar="Z,M,B")]
    heads: int
    head_dim: int | None = None
    value_head_dim: int | None = None
    kv_heads: int | None = None
    out_dim: int | None = None
    uses: int = 1
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    train: bool = False
    speeds: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    json: bool = False


def run(arguments: Sequence[str], *, prog: str) -> int:
    """Print the table, or the JSON, of `layer.plan_for`."""
    given = tyro.cli(PlanArguments, args=arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    queries = _shape("queries", given.queries, lengths=(2, 3, 4))
    context = _shape("context", given.context, lengths=(3,))

    import torch

    from crossattention import CrossAttention

    layer = CrossAttention(
        queries[-1],
        context[-1],
        heads=given.heads,
        head_dim=given.head_dim,
        value_head_dim=given.value_head_dim,
        kv_heads=given.kv_heads,
        out_dim=given.out_dim,
    )
    speeds = None if given.speeds is None else _speeds(given.speeds, given.dtype)
    dtype = getattr(torch, given.dtype)
    choice = layer.plan_for(queries, context, uses=given.uses, dtype=dtype, trains=given.train, speeds=speeds)
    print(json.dumps(choice.as_dict()) if given.json else choice)
    return 0


def _speeds(path: Path, dtype: str) -> dict[tuple[str, str], Speeds]:
    """The file's constants, which must hold those of a CPU and this dtype: sizes that are typed in are planned for the CPU."""
    from crossattention.plan import read_speeds

    table = read_speeds(path)
    if ("cpu", dtype) not in table:
        held = ", ".join(" ".join(key) for key in table) or "none"
        raise ValueError(
            f"--speeds {path} has no speeds for cpu {dtype}; it has: {held}; measure them with benchmarks/calibrate.py"
        )
    return table


def _shape(name: str, text: str, *, lengths: tuple[int, ...]) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--{name} takes whole numbers with commas between them, as 8,1,384; got {text!r}") from error
    if len(shape) not in lengths:
        wanted = " or ".join(map(str, lengths))
        raise ValueError(f"--{name} takes {wanted} numbers, got {len(shape)}: {text!r}")
    return shape
