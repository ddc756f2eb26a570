"""Cases of `models.py`: Perceiver IO against that of transformers.

Optical flow and video at full size take minutes a call and up to 7 GB; they are asked for by name (`--only "optical flow"`), with
`--budget 0 --rounds 1`. The peak of a whole process that runs one side of a case:

    python benchmarks/models_perceiver.py "optical flow" ours
    python benchmarks/models_perceiver.py "optical flow" theirs
"""

import itertools
import resource
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.checkpoints import perceiver_huggingface as family
from crossattention.checkpoints.rules import to_theirs
from crossattention.models import perceiver
from crossattention.models.perceiver import PerceiverIO, PerceiverIOConfig
from models import BATCHES, DTYPES, MODES, NOT_SLOWER, Call, Case, forward_of, step_of

PRESETS = {
    "language, 2,048 outputs": (perceiver.language, 1.1),
    "language, 300 outputs": (perceiver.language, 1.25),
    "ImageNet-learned": (perceiver.imagenet_learned, NOT_SLOWER),
    "ImageNet-Fourier": (perceiver.imagenet_fourier, 1.35),
    "ImageNet-conv": (perceiver.imagenet_conv, NOT_SLOWER),
    "optical flow": (perceiver.optical_flow, 1.0),
    "video, 1,921 + 6,272 outputs": (perceiver.multimodal, NOT_SLOWER),
}
FULL_SIZE = ("optical flow", "video, 1,921 + 6,272 outputs")
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


def cases() -> Iterator[Case]:
    """Every preset, mode, dtype and batch; what is large, forward and one item in float32 alone."""
    for (name, (preset, asked)), mode, dtype, batch in itertools.product(PRESETS.items(), MODES, DTYPES, BATCHES):
        if name in FULL_SIZE and (mode != "forward" or batch > 1 or dtype != "float32"):
            continue
        reached = asked if mode == "forward" else NOT_SLOWER
        build = partial(build_pair, name, preset, mode, dtype, batch)
        yield Case(f"Perceiver {name}", mode, dtype, batch, build, TOLERANCES[dtype], reached, ("transformers",))


def build_pair(name: str, preset: partial, mode: str, dtype: str, batch: int) -> tuple[Call, Call]:
    """Our model and theirs with its weights, on the same input."""
    torch.manual_seed(0)
    ours = PerceiverIO(preset()).to(DTYPES[dtype]).train(mode != "forward")
    theirs = theirs_of(ours).to(DTYPES[dtype]).train(mode != "forward")
    inputs = inputs_of(ours.config, batch, DTYPES[dtype])
    mine, yours = call_of(name, ours, inputs), call_of(name, theirs, inputs)
    if mode == "forward":
        return forward_of(mine), forward_of(yours)
    with torch.no_grad():
        shape = mine().shape
    labels = torch.randint(shape[-1], shape[:-1])
    return tuple(
        step_of(model, lambda call=call: F.cross_entropy(call().float().flatten(0, -2), labels.flatten()))
        for model, call in ((ours, mine), (theirs, yours))
    )


def theirs_of(ours: PerceiverIO) -> nn.Module:
    """Their model of our weights; without dropout, which ours has not by default."""
    import transformers

    config = transformers.PerceiverConfig(**family.config_to_theirs(ours.config))
    theirs = getattr(transformers, family.architecture_of(ours.config))(config)
    theirs.load_state_dict(to_theirs(ours.state_dict(), family.rules(ours.config)))
    return theirs


def inputs_of(config: PerceiverIOConfig, batch: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """A random batch of the size that the model was published for."""
    inputs = config.inputs
    if inputs.kind == "text":
        return torch.randint(inputs.vocab_size, (batch, inputs.max_length))
    if inputs.kind == "image":
        return torch.randn(batch, 3, *inputs.size, dtype=dtype)
    if inputs.kind == "flow":
        return torch.randn(batch, 2, inputs.channels * inputs.patch**2, *inputs.size, dtype=dtype)
    return {
        "audio": torch.randn(batch, inputs.audio_samples, 1, dtype=dtype),
        "image": torch.randn(batch, inputs.frames, 3, *inputs.size, dtype=dtype),
        "label": torch.zeros(batch, inputs.num_labels, dtype=dtype),
    }


def call_of(name: str, model: nn.Module, inputs: Tensor | dict[str, Tensor]) -> Call:
    """One call of either model: ours is asked for what is wanted, theirs gives what it can and the rest is cut off."""
    is_ours = isinstance(model, PerceiverIO)
    if name.startswith("video"):
        places = {"audio": torch.arange(1920), "image": torch.arange(6272) * 128, "label": None}
        if is_ours:
            return lambda: tuple(model(inputs, outputs=places).values())
        return lambda: tuple(model(inputs=inputs, subsampled_output_points=places).logits.values())
    if "300" in name:
        some = torch.randperm(2048, generator=torch.Generator().manual_seed(1))[:300]
        return partial(model, inputs, outputs=some) if is_ours else lambda: model(inputs=inputs).logits[:, some]
    return partial(model, inputs) if is_ours else lambda: model(inputs=inputs).logits


def main() -> None:
    """The resident size of a process that has run one side of a case once."""
    name, side = sys.argv[1:]
    torch.manual_seed(0)
    config = PRESETS[name][0]()
    if side == "ours":
        model = PerceiverIO(config).eval()
    else:
        import transformers

        theirs = transformers.PerceiverConfig(**family.config_to_theirs(config))
        model = getattr(transformers, family.architecture_of(config))(theirs).eval()
    call = forward_of(call_of(name, model, inputs_of(config, 1, torch.float32)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    begun, computed = time.perf_counter(), time.process_time()
    call()
    seconds, computed = time.perf_counter() - begun, time.process_time() - computed
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"Perceiver {name}, {side}: {seconds:.1f} s ({computed:.1f} s computed), resident {peak:.2f} GB, {before:.2f} GB before")


if __name__ == "__main__":
    main()
