"""What holds on any machine: kernels import, say why they cannot run, and compile for GPUs that are not there."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from lfs_cli.kernels import tiled_attention
from lfs_cli.kernels.flash_attention import choose, flash_attention, unavailable_reason
print(unavailable_reason("cuda", torch.bfloat16, 64))
x = torch.zeros(1, 2, 1, 16)
name, why = choose(x, x, x)
print(name, why.endswith('not triton: Triton is not installed'))
try:
    flash_attention(x, x, x, implementation="triton")
except ValueError as error:
    print(error)
print(flash_attention(x, x, x).shape)
print(tiled_attention.tiled_attention(x, x, x).shape)
"""


def python(*arguments: str, interpret: bool = False) -> str:
    """Run a fresh Python, in which Triton compiles or interprets, and return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="run directly")
@pytest.mark.skipif(torch.cuda.is_available() or not find_spec("triton"), reason="needs Triton and no GPU")
def test_kernels_match_their_reference_in_the_interpreter() -> None:
    tests = [str(Path(__file__).with_name(name)) for name in ("test_triton_attention.py", "test_flash_attention.py")]
    only_triton = ("-k", "triton", "-m", "not slow")  # the rest of the second file runs in this process
    said = python("-m", "pytest", "-q", *only_triton, "-p", "no:cacheprovider", *tests, interpret=True)
    assert " passed" in said


def test_everything_imports_without_triton() -> None:
    assert python("-c", WITHOUT_TRITON).splitlines() == [
        "Triton is not installed",
        "reference True",
        "flash_attention cannot run here: Triton is not installed",
        "torch.Size([1, 2, 1, 16])",
        "torch.Size([1, 2, 1, 16])",
    ]


@pytest.mark.skipif(torch.cuda.is_available() or not find_spec("triton"), reason="needs Triton and no GPU")
def test_the_reason_without_a_gpu() -> None:
    script = (
        "import torch; from lfs_cli.kernels.flash_attention import unavailable_reason as why\n"
        "for device in ('cpu', 'cuda', 'mps'): print(why(device, torch.float32, 64))"
    )
    assert python("-c", script).splitlines() == [
        "it needs a CUDA GPU, and this is cpu",
        "no NVIDIA GPU was found",
        "it needs a CUDA GPU, and this is mps",
    ]


def compiled(capability: int, dtype: str, variants: str, *head_dims: int) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    script = str(Path(__file__).with_name("compile_offline.py"))
    lines = python(script, str(capability), dtype, variants, *map(str, head_dims)).splitlines()
    return [json.loads(line) for line in lines]


def faults(reports: list[dict[str, Any]], shared: int, spilled: int = 0) -> list[dict[str, Any]]:
    return [r for r in reports if r["spilled"] > spilled or r["serialized"] or r["shared"] > shared]


@pytest.mark.parametrize(("capability", "shared"), [(80, 99 * 1024), (90, 227 * 1024)])
def test_training_kernels_compile_without_spills(capability: int, shared: int) -> None:
    reports = compiled(capability, "bf16", "training,everything", 64)
    assert len(reports) == 3 * 2
    assert not faults(reports, shared)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("capability", "shared"), [(80, 99 * 1024), (90, 227 * 1024)])
def test_every_tile_of_the_table_compiles_without_spills(capability: int, shared: int, dtype: str) -> None:
    variants = "ragged,everything"  # the rest are parts of the last; training asks for 16-bit types
    if dtype == "bf16":
        variants += ",training,not causal,documents"
    reports = compiled(capability, dtype, variants, 32, 64, 128, 256)
    assert len(reports) == 4 * 3 * len(variants.split(","))
    allowed = {(80, "bf16"): 0, (80, "fp32"): 24, (90, "bf16"): 72, (90, "fp32"): 40}  # 90: as fast tiles were measured
    if version("triton").startswith("3.6."):  # by which they were measured, and which spills more in dk and dv of 128
        allowed[90, "bf16"] = 640
    assert not faults(reports, shared, spilled=allowed[capability, dtype])
