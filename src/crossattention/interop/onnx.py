"""ONNX: a layer or a model as a file that other runtimes read, checked in onnxruntime where that is installed.

What lives here: the way from a module to a checked file. Which graphs a model of ours has, its `graphs()` says (models.graphs).
Lengths stay dynamic, as the axes name them; a plan is the layer's own, or the textbook's (docs/planning.md); rows that may attend
nothing are zeroed in the graph, as other runtimes leave in them what they like.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.attention import CrossAttention, MemoryAttention, SelfAttention
from crossattention.attention.graphs import Axes, Graph, Values

OPSET = 20
"""Opset 23 has an attention of its own, which fails on masks that broadcast over queries (onnxruntime 1.23 to 1.32)."""

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2}
"""Largest difference that passes, relative to the largest number of an output, or to 1."""


@dataclass(frozen=True)
class OnnxExport:
    """The account of an export; `print` it.

    Attributes:
        path: the file; weights of over 2 GB lie beside it.
        opset: version of ONNX's operators.
        inputs: name -> length or name of each dimension.
        outputs: likewise.
        num_bytes: size of all that was written.
        runtime: onnxruntime's version where it ran the file, else None.
        checked: the lengths at which the file was run and compared with the module.
        difference: the largest difference, relative to the largest number of the output, or to 1; None where nothing was run.
        unchecked_because: why nothing was run; None where something was.
    """

    path: str
    opset: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    num_bytes: int
    runtime: str | None
    checked: tuple[Mapping[str, int], ...]
    difference: float | None
    unchecked_because: str | None

    def to_json(self) -> dict[str, Any]:
        """Every field, as JSON holds it."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"wrote    {self.path} (ONNX, opset {self.opset}, {self.num_bytes:,} bytes)"]
        for title, values in (("input", self.inputs), ("output", self.outputs)):
            lines += [f"{title:8} {name} ({', '.join(map(str, shape))})" for name, shape in values.items()]
        if self.runtime is None:
            return "\n".join([*lines, f"unchecked: {self.unchecked_because}"])
        sizes = "; ".join(", ".join(f"{name} {size}" for name, size in lengths.items()) or "as it is" for lengths in self.checked)
        return "\n".join([*lines, f"checked  in onnxruntime {self.runtime}, largest difference {self.difference:.1e} ({sizes})"])


def export_onnx(
    module: nn.Module,
    path: str | Path,
    inputs: Mapping[str, Values] | None = None,
    *,
    graph: str = "forward",
    axes: Mapping[str, Axes] | None = None,
    outputs: tuple[str, ...] | None = None,
    overwrite: bool = False,
    tolerance: float | None = None,
    opset: int = OPSET,
) -> OnnxExport:
    """Write a module as an ONNX file with dynamic lengths, run it in onnxruntime and compare.

    The file is run at the example's lengths, at lengths of one, at larger ones, and with the first item of every bool input all
    False, so that rows without a live key are compared too. It appears under its name once all that is passed.

    Args:
        module: a layer of this package, any module that holds some, or a model of `crossattention.models`; in evaluation.
        path: the file, as "layer.onnx".
        inputs: argument of its `forward` -> example, for all that the file shall take; a list or dictionary of tensors becomes
            several inputs, "name.0" or "name.key". A model of this package has its own, which are then not given.
        graph: of a model of this package: "forward", or another of `model.graphs()`, as "encode", "prepare", "step".
        axes: argument -> a name for each dimension whose length may vary, None for one that is fixed. Attention layers and models
            of this package have theirs.
        outputs: names of the outputs; default "output", "output.1", ..., or the graph's.
        overwrite: replace a file of that name.
        tolerance: largest difference that passes, relative to the largest number of the output, or to 1; default 1e-5 in float32,
            1e-10 in float64, 1e-2 in float16.
        opset: version of ONNX's operators.

    Returns:
        The account: inputs and outputs with their axes, the lengths that were run, the largest difference. Without onnxruntime, or
        in bfloat16, which its CPU kernels do not take, it says that nothing was compared.

    Raises:
        ModuleNotFoundError: without `pip install 'crossattention[onnx]'`.
        ValueError: a module in training, examples missing or given where the model has its own, an unknown graph or argument, axes
            missing or of another number of dimensions; what torch cannot trace; a length that came out fixed although it was named;
            an output that differs.
        FileExistsError: there is a file of that name, and `overwrite` is not set.

    Cost: seconds to a minute for tracing; the weights twice in memory.

    Example:
        >>> layer = CrossAttention(48, 32, heads=4).eval()
        >>> real = torch.ones(2, 7, dtype=torch.bool)
        >>> done = export_onnx(  # doctest: +SKIP
        ...     layer, "layer.onnx", {"a": torch.randn(2, 5, 48), "b": torch.randn(2, 7, 32), "context_mask": real}
        ... )
        >>> done.inputs["b"]  # doctest: +SKIP
        ('batch', 'context', 32)
    """
    path = Path(path)
    _check_installed()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; name another file, or pass overwrite=True")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
    chosen = _graph_of(module, graph, inputs, axes, outputs)
    _check_evaluates(chosen.module)
    chosen = _with_names_of_outputs(_with_telling_lengths(chosen))
    folder = Path(tempfile.mkdtemp(prefix=".onnx-", dir=path.parent))
    try:
        written = folder / path.name
        program = _traced(chosen, opset)
        program.save(str(written))
        taken, given = _dims(program.model.graph.inputs), _dims(program.model.graph.outputs)
        _check_dynamic(chosen, taken)
        runtime, checked, difference, why = _compared(chosen, written, tolerance)
        files = sorted(folder.iterdir(), key=lambda file: file == written)  # the weights beside it first
        num_bytes = sum(file.stat().st_size for file in files)
        for file in files:
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder)
    return OnnxExport(str(path), opset, taken, given, num_bytes, runtime, checked, difference, why)


# ------------------------------------------------------------------------------------------------------ what is exported


def _graph_of(
    module: nn.Module,
    name: str,
    inputs: Mapping[str, Values] | None,
    axes: Mapping[str, Axes] | None,
    outputs: tuple[str, ...] | None,
) -> Graph:
    """The graph of what was given, or the module's own.

    Raises:
        ValueError: as `export_onnx`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"export_onnx takes a torch.nn.Module, got {type(module).__name__}")
    if inputs is None:
        if axes is not None or not hasattr(module, "graphs"):
            first = next(iter(_parameters(module)), "x")
            raise ValueError(f"pass example inputs, as {{'{first}': tensor}}, got none for a {type(module).__name__}")
        known = module.graphs()
        if name not in known:
            raise ValueError(f'a {type(module).__name__} has the graphs {", ".join(known)}, got graph="{name}"')
        own = known[name]
        return own if outputs is None else Graph(own.module, own.inputs, own.axes, outputs)
    if name != "forward":
        raise ValueError(f'graph="{name}" has example inputs of its own; leave inputs out, or graph')
    arguments = _parameters(module)
    if unknown := [given for given in inputs if given not in arguments]:
        raise ValueError(f"{type(module).__name__} takes {', '.join(arguments)}, got {', '.join(unknown)}")
    ordered = {argument: inputs[argument] for argument in arguments if argument in inputs}
    for argument, value in ordered.items():
        if not all(isinstance(leaf, Tensor) for leaf in _leaves(value)) or not _leaves(value):
            raise ValueError(f"{argument} must be a tensor, or a list or dictionary of tensors, got {type(value).__name__}")
    named = _axes_of_layer(module, ordered) | dict(axes or {})
    if missing := [argument for argument in ordered if argument not in named]:
        raise ValueError(
            f"name the lengths that may vary, as axes={{'{missing[0]}': {_fixed(ordered[missing[0]])}}} with a name in the place "
            f"of None, got none for {', '.join(missing)}"
        )
    for argument, names in named.items():
        if argument not in ordered:
            raise ValueError(f"axes name {argument}, for which there is no example; the examples are {', '.join(ordered)}")
        for leaf in _leaves(ordered[argument]):
            if leaf.dim() != len(names):
                raise ValueError(f"axes of {argument} must name {leaf.dim()} dimensions, of {tuple(leaf.shape)}, got {names}")
    return Graph(module, ordered, {argument: tuple(named[argument]) for argument in ordered}, outputs or ())


def _axes_of_layer(module: nn.Module, inputs: Mapping[str, Values]) -> dict[str, Axes]:
    """The axes of our attention layers' arguments; a dimension of one in a mask of pairs is one that broadcasts."""
    if isinstance(module, CrossAttention):
        last: dict[str, tuple[str, ...]] = {
            "a": ("batch", "repeats", "queries"),
            "b": ("batch", "context"),
            "context_mask": ("batch", "context"),
            "query_positions": ("batch", "queries"),
            "context_positions": ("batch", "context"),
        }
        rows, columns = "queries", "context"
    elif isinstance(module, SelfAttention | MemoryAttention):
        last, rows, columns = {"x": ("batch", "length"), "mask": ("batch", "length")}, "length", "length"
    else:
        return {}
    found: dict[str, Axes] = {}
    for argument, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{argument} must be a dense tensor to be exported, got {type(value).__name__}")
        if argument == "attn_mask":
            leading = ("batch", None, rows, columns) if value.dim() <= 4 else ("batch", "repeats", None, rows, columns)
            names = leading[len(leading) - value.dim() :]
            found[argument] = tuple(None if size == 1 else name for size, name in zip(value.shape, names, strict=True))
        elif argument == "a":
            found[argument] = {2: ("queries", None), 3: ("batch", "queries", None)}.get(value.dim(), (*last["a"], None))
        else:
            names = last[argument]
            widths = (None,) * (argument in ("b", "x"))
            found[argument] = (*names[len(names) + len(widths) - value.dim() :], *widths)
    return found


def _with_names_of_outputs(graph: Graph) -> Graph:
    """The graph with a name for each tensor that it returns.

    Raises:
        ValueError: too few or too many names.
    """
    with torch.no_grad():
        count = len(_tensors(graph.module(**graph.inputs)))
    names = graph.outputs or ("output", *(f"output.{number}" for number in range(1, count)))
    if len(names) != count:
        raise ValueError(f"{type(graph.module).__name__} returns {count} tensors, got {len(names)} names of outputs: {names}")
    return Graph(graph.module, graph.inputs, graph.axes, tuple(names))


def _parameters(module: nn.Module) -> list[str]:
    """Names of what a module's `forward` takes."""
    return list(inspect.signature(module.forward).parameters)


def _check_evaluates(module: nn.Module) -> None:
    training = next((name or "the module" for name, child in module.named_modules() if child.training), None)
    if training is not None:
        raise ValueError(f"{training} is in training, and a file would drop out numbers for ever; call eval() on the whole first")


def _check_installed() -> None:
    for name in ("onnx", "onnxscript"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"an ONNX file needs {name}; install it with: pip install 'crossattention[onnx]'", name=name)


# --------------------------------------------------------------------------------------------------------------- tracing


def _traced(graph: Graph, opset: int) -> Any:
    """The ONNX program.

    Raises:
        ValueError: torch cannot trace it; the first line of its own message.
    """
    shapes = {
        argument: _each(value, lambda _, names=graph.axes[argument]: _named(names)) for argument, value in graph.inputs.items()
    }
    with _quiet(), torch.no_grad():
        try:
            return torch.onnx.export(
                graph.module,
                (),
                kwargs=dict(graph.inputs),
                dynamic_shapes=shapes,
                input_names=_names(graph.inputs),
                output_names=list(graph.outputs),
                dynamo=True,
                opset_version=opset,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(
                f"{type(graph.module).__name__} cannot be exported to ONNX: {_first_line(error.__cause__ or error)}"
            ) from error


def _named(names: Axes) -> dict[int, str]:
    return {axis: name for axis, name in enumerate(names) if name is not None}


def _first_line(error: BaseException) -> str:
    """What went wrong in one line, with its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own workings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _dims(values: Any) -> dict[str, tuple[int | str, ...]]:
    return {value.name: tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape) for value in values}


def _check_dynamic(graph: Graph, taken: Mapping[str, tuple[int | str, ...]]) -> None:
    """Refuse a file in which a length that was named came out as a number.

    Raises:
        ValueError: which one.
    """
    for argument, value in graph.inputs.items():
        for name in _names({argument: value}):
            if name not in taken:
                raise ValueError(f"{name} has no part in what the module computes, and the file would not take it; leave it out")
            for axis, wanted in enumerate(graph.axes[argument]):
                if wanted is not None and isinstance(taken[name][axis], int):
                    raise ValueError(
                        f'the length "{wanted}" of {name} came out fixed at {taken[name][axis]}: something in '
                        f"{type(graph.module).__name__} asks for it as a number; write None for it in axes"
                    )


# --------------------------------------------------------------------------------------------------------------- lengths


def _with_telling_lengths(graph: Graph) -> Graph:
    """The graph with examples that fix nothing: lengths of one, or of two axes that are alike, would be taken for constants."""
    lengths = _lengths(graph)
    used: set[int] = set()
    for name, size in lengths.items():
        while size < 2 or size in used:
            size += 1
        used.add(size)
        lengths[name] = size
    return _resized(graph, lengths)


def _lengths(graph: Graph) -> dict[str, int]:
    """Name of an axis -> its length in the examples.

    Raises:
        ValueError: one name for two lengths, an example with nothing in it.
    """
    found: dict[str, int] = {}
    for argument, value in graph.inputs.items():
        for leaf in _leaves(value):
            for name, size in zip(graph.axes[argument], leaf.shape, strict=True):
                if name is not None and found.setdefault(name, size) != size:
                    raise ValueError(f'the axis "{name}" is {found[name]} in one example and {size} in {argument}; use two names')
                if size == 0:
                    raise ValueError(f"the example of {argument} is empty, {tuple(leaf.shape)}; lengths must be at least 1")
    return found


def _resized(graph: Graph, lengths: Mapping[str, int]) -> Graph:
    """The graph with examples of other lengths: the first ones over and over."""

    def resize(tensor: Tensor, names: Axes) -> Tensor:
        for axis, name in enumerate(names):
            if name is not None and tensor.shape[axis] != lengths[name]:
                where = torch.arange(lengths[name], device=tensor.device) % tensor.shape[axis]
                tensor = tensor.index_select(axis, where)
        return tensor

    inputs = {
        argument: _each(value, lambda tensor, names=graph.axes[argument]: resize(tensor.detach(), names))
        for argument, value in graph.inputs.items()
    }
    return Graph(graph.module, inputs, graph.axes, graph.outputs)


def _variants(graph: Graph) -> Iterator[tuple[dict[str, int], Graph]]:
    """Examples of other lengths; the last with nothing to attend for the first item."""
    lengths = _lengths(graph)
    larger = {name: size + 3 + number for number, (name, size) in enumerate(lengths.items())}
    smaller = {name: max(1, size - 1) for name, size in lengths.items()}
    yield lengths, graph
    if lengths:
        for other in (dict.fromkeys(lengths, 1), larger, smaller):
            yield other, _resized(graph, other)
    if any(leaf.dtype == torch.bool for value in graph.inputs.values() for leaf in _leaves(value)):
        yield (
            lengths,
            Graph(
                graph.module,
                {name: _each(value, _with_empty_item) for name, value in graph.inputs.items()},
                graph.axes,
                graph.outputs,
            ),
        )


def _with_empty_item(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.bool or tensor.dim() == 0:
        return tensor
    tensor = tensor.clone()
    tensor[0] = False
    return tensor


# ------------------------------------------------------------------------------------------------------------- comparing


def _compared(
    graph: Graph, path: Path, tolerance: float | None
) -> tuple[str | None, tuple[Mapping[str, int], ...], float | None, str | None]:
    """Version of the runtime, lengths that were run, largest difference, and why nothing was run.

    Raises:
        ValueError: the file cannot be run, or gives something else.
    """
    leaves = [leaf for value in graph.inputs.values() for leaf in _leaves(value)]
    floating = [tensor.dtype for tensor in (*leaves, *graph.module.parameters()) if tensor.is_floating_point()]
    dtype = floating[0] if floating else torch.float32
    if find_spec("onnxruntime") is None:
        return None, (), None, "onnxruntime is not installed; pip install onnxruntime, and export again to compare"
    if dtype not in TOLERANCES:
        return None, (), None, f"onnxruntime's CPU kernels do not take {dtype}"
    import onnxruntime

    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"onnxruntime {onnxruntime.__version__} does not load the file: {_first_line(error)}") from error
    checked, largest = [], 0.0
    for lengths, variant in _variants(graph):
        try:
            with torch.no_grad():
                expected = _tensors(variant.module(**variant.inputs))
        except ValueError:
            continue  # lengths that the module itself refuses, as beyond its learned positions
        difference = _difference(session, variant, expected, lengths)
        if not difference <= limit:
            raise ValueError(
                f"the file gives something else than the module: a difference of {difference:.1e} at {lengths}, of {limit:.0e} "
                "that may be; if the module draws random numbers it cannot be exported, else pass tolerance=... to accept it"
            )
        checked.append(lengths)
        largest = max(largest, difference)
    return onnxruntime.__version__, tuple(checked), largest, None


def _difference(session: Any, graph: Graph, expected: list[Tensor], lengths: Mapping[str, int]) -> float:
    """The largest difference of any output, relative to the largest number in it, or to 1; infinite where NaN stands alone."""
    leaves = [leaf for value in graph.inputs.values() for leaf in _leaves(value)]
    fed = {name: leaf.detach().cpu().numpy() for name, leaf in zip(_names(graph.inputs), leaves, strict=True)}
    try:
        found = session.run(None, fed)
    except Exception as error:
        raise ValueError(f"onnxruntime cannot run the file at {dict(lengths)}: {_first_line(error)}") from error
    worst = 0.0
    for one, wanted in zip(found, expected, strict=True):
        got, wanted = torch.from_numpy(one).double(), wanted.detach().cpu().double()
        if got.shape != wanted.shape:
            raise ValueError(f"the file gives {tuple(got.shape)} where the module gives {tuple(wanted.shape)}, at {dict(lengths)}")
        if wanted.numel() == 0:
            continue
        if not torch.equal(got.isnan(), wanted.isnan()):
            return float("inf")
        off = (got - wanted).nan_to_num().abs().max() / wanted.nan_to_num().abs().max().clamp(min=1.0)
        worst = max(worst, float(off))
    return worst


# ----------------------------------------------------------------------------------------------- several tensors as one


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def _each(value: Any, change: Any) -> Any:
    """What a function makes of each tensor of an argument, held as they were."""
    if isinstance(value, Mapping):
        return {key: change(one) for key, one in value.items()}
    return [change(one) for one in value] if isinstance(value, list | tuple) else change(value)


def _names(inputs: Mapping[str, Values]) -> list[str]:
    """Names of the file's inputs."""
    names: list[str] = []
    for argument, value in inputs.items():
        if isinstance(value, Mapping):
            names += [f"{argument}.{key}" for key in value]
        elif isinstance(value, list | tuple):
            names += [f"{argument}.{number}" for number in range(len(value))]
        else:
            names.append(argument)
    return names


def _fixed(value: Values) -> tuple[None, ...]:
    return (None,) * _leaves(value)[0].dim()


def _tensors(made: Any) -> list[Tensor]:
    """The tensors of what a module returned, in order."""
    if isinstance(made, Tensor):
        return [made]
    parts = made.values() if isinstance(made, Mapping) else made
    return [tensor for part in parts for tensor in _tensors(part)]
