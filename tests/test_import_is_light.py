"""`import crossattention` and its public names bring torch and safetensors, and nothing heavier: seen in a fresh interpreter.

The names are imported when first used, so `from crossattention import *` is what shows all that a user's import can bring.
"""

import json
import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    """Names in sys.modules once a fresh interpreter has run `statement`."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def outside(modules: set[str]) -> set[str]:
    """Top-level names that are not Python's own."""
    return {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)


@pytest.fixture(scope="module")
def torch_alone() -> set[str]:
    return modules_after("import torch, safetensors, safetensors.torch")


@pytest.fixture(scope="module")
def ours() -> set[str]:
    return modules_after("from crossattention import *; from crossattention import interop, layers, models")


def test_import_brings_nothing_from_outside_but_what_torch_and_safetensors_bring(ours: set[str], torch_alone: set[str]) -> None:
    assert outside(ours) - outside(torch_alone) == {"crossattention"}
    assert "torch" in outside(ours)


@pytest.mark.slow
def test_public_names_come_when_they_are_used_and_help_need_not_wait_for_torch() -> None:
    assert "torch" not in modules_after("import crossattention, crossattention.cli.main")
    assert "torch" in modules_after("import crossattention; crossattention.models.Transformer")


def test_import_does_not_start_the_compiler(ours: set[str], torch_alone: set[str]) -> None:
    compilers = {"torch._dynamo", "torch._inductor", "torch.onnx"}
    assert ours & compilers - torch_alone == set()


@pytest.mark.slow
def test_a_heavy_import_would_be_seen(torch_alone: set[str]) -> None:
    assert "rich" in outside(modules_after("import torch, safetensors, safetensors.torch, rich")) - outside(torch_alone)
