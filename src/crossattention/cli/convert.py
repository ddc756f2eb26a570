"""`crossattention convert SRC DST`: a model of another library becomes one of ours, or the way back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from crossattention.checkpoints.convert import Conversion


@dataclass(frozen=True)
class ConvertArguments:
    """Write a model as a folder of another library, whole or not at all; every tensor is used, or ignored with a reason.

    Args:
        source: a folder, a file of weights (.safetensors, .bin, .pt, .pth), a training run, weights inside this package, or a
            hub id.
        target: the folder to write.
        to: whose folder it becomes; crossattention for a source of another library.
        dtype: what the weights are stored in; as they are in the source where it is not given.
        revision: branch, tag or commit on the Hub.
        overwrite: replace a model folder of that name.
        names: print which name became which.
        json: print one JSON object in the place of the text.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    to: Annotated[Literal["crossattention", "huggingface", "timm", "torch"] | None, tyro.conf.arg(metavar="LIBRARY")] = None
    dtype: Annotated[Literal["float32", "float64", "bfloat16", "float16"] | None, tyro.conf.arg(metavar="DTYPE")] = None
    revision: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    overwrite: bool = False
    names: bool = False
    json: bool = False


def run(arguments: Sequence[str], *, prog: str) -> int:
    """Convert, and say what became of what."""
    given = tyro.cli(ConvertArguments, args=arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))

    import torch

    from crossattention.checkpoints.convert import convert
    from crossattention.cli.weights import measuring

    with measuring(f"converting {given.source}") as show:
        done = convert(
            given.source,
            given.target,
            to=given.to,
            revision=given.revision,
            dtype=None if given.dtype is None else getattr(torch, given.dtype),
            overwrite=given.overwrite,
            on_progress=show,
        )
    if given.json:
        print(json.dumps(done.to_json()))
    else:
        print("\n".join(account(done, has_names=given.names)))
    return 0


def account(done: "Conversion", *, has_names: bool) -> list[str]:
    """The lines that are printed of a conversion."""
    count = sum(len(source) for source, _ in done.names)
    other = sum(len(target) for _, target in done.names)
    lines = [
        f"read     {done.source} ({done.source_format})",
        f"wrote    {done.target} ({done.target_format}; {done.family}; {done.model})",
        f"names    {count} tensors became {other}" + ("" if has_names else "; --names shows which became which"),
    ]
    if has_names:
        lines += [f"         {', '.join(source)} -> {', '.join(target)}" for source, target in done.names]
    lines += [f"ignored  {name}: {reason}" for name, reason in done.ignored.items()]
    lines += [f"filled   {name}: {reason}" for name, reason in done.filled.items()]
    lines += [f"tied     {name} is {first}" for name, first in done.tied.items()]
    dtypes = ", ".join(f"{dtype} ({number})" for dtype, number in done.dtypes.items())
    return [
        *lines,
        f"dtypes   {dtypes}",
        f"size     {done.parameters:,} numbers, {done.num_bytes:,} bytes, sha256 {done.sha256}",
    ]
