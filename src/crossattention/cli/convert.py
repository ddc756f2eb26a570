"""`crossattention convert SRC DST`: a model of another library becomes one of ours, or the way back, or an ONNX file."""

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
    """Write a model as a folder of another library, or as an ONNX file, whole or not at all.

    Every tensor is used, or ignored with a reason. An ONNX file is run in onnxruntime, where that is installed, and compared.

    Args:
        source: a folder, a file of weights (.safetensors, .bin, .pt, .pth), a training run, weights inside this package, or a
            hub id.
        target: the folder to write; or a file that ends in .onnx.
        to: whose folder it becomes; crossattention for a source of another library.
        dtype: what the weights are stored in; as they are in the source where it is not given.
        revision: branch, tag or commit on the Hub.
        graph: of an ONNX file: what of the model it holds, "forward", or of models that generate "encode", "prepare" or "step".
        overwrite: replace a model folder, or an ONNX file, of that name.
        names: print which name became which.
        json: print one JSON object in the place of the text.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    to: Annotated[Literal["crossattention", "huggingface", "timm", "torch"] | None, tyro.conf.arg(metavar="LIBRARY")] = None
    dtype: Annotated[Literal["float32", "float64", "bfloat16", "float16"] | None, tyro.conf.arg(metavar="DTYPE")] = None
    revision: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    graph: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    overwrite: bool = False
    names: bool = False
    json: bool = False


def run(arguments: Sequence[str], *, prog: str) -> int:
    """Convert, and say what became of what."""
    given = tyro.cli(ConvertArguments, args=arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))

    if given.target.suffix == ".onnx":
        return write_onnx(given)
    if given.graph is not None:
        raise ValueError(f"--graph is of an ONNX file, but {given.target} does not end in .onnx")

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


def write_onnx(given: ConvertArguments) -> int:
    """Write one graph of a model as an ONNX file, and say what it takes and gives."""
    if given.to is not None or given.names:
        raise ValueError(
            f"{given.target} is an ONNX file, which {'--to' if given.to else '--names'} has nothing to say of; leave it out"
        )

    import torch

    from crossattention.cli.weights import waiting
    from crossattention.interop.onnx import export_onnx
    from crossattention.models.pretrained import load

    dtype = None if given.dtype is None else getattr(torch, given.dtype)
    with waiting(f"tracing {given.source}"):
        model = load(given.source, revision=given.revision, dtype=dtype)
        done = export_onnx(model, given.target, graph=given.graph or "forward", overwrite=given.overwrite)
    print(json.dumps({"source": given.source, **done.to_json()}) if given.json else f"read     {given.source}\n{done}")
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
