"""The fused kernels without a GPU: right in the interpreter, and compiled without spills for other machines' GPUs."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_kernels_without_a_gpu import faults, python

TESTS = ("test_linear_cross_entropy", "test_rms_norm", "test_rope_kernel", "test_swiglu", "test_adamw_kernel")
TESTS += ("test_adamw_optimizer", "test_muon_kernel", "test_rotary_attention", "test_embedding_kernel")
TESTS += ("test_foreseen_checks", "test_clip_kernel", "test_kept_casts", "test_product")


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="run directly")
@pytest.mark.skipif(torch.cuda.is_available() or not find_spec("triton"), reason="needs Triton and no GPU")
def test_fused_kernels_match_float64_in_the_interpreter() -> None:
    tests = [str(Path(__file__).with_name(f"{name}.py")) for name in TESTS]
    said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests, interpret=True)
    assert " passed" in said


OTHERS = [pytest.param(capability, dtype, marks=pytest.mark.slow) for capability, dtype in ((80, "bf16"), (90, "fp32"))]


@pytest.mark.parametrize(("capability", "dtype"), [(90, "bf16"), *OTHERS])
def test_fused_kernels_compile_without_spills_and_read_sixteen_bytes_at_once(capability: int, dtype: str) -> None:
    pytest.importorskip("triton")
    script = str(Path(__file__).with_name("compile_fused_offline.py"))
    reports = [json.loads(line) for line in python(script, str(capability), dtype).splitlines()]
    assert len(reports) == 45
    assert not faults(reports, shared=56 * 1024, spilled=24 if dtype == "fp32" else 0)
    assert not [report for report in reports if report["atomics"] or not report["wide_loads"]]
