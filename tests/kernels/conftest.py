"""Without a GPU, kernels run in Triton's interpreter, which has to be asked for before Triton is imported."""

import os
import sys
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported without TRITON_INTERPRET=1: set it at the top of tests/conftest.py"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _interpreter_reads_one_element_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton 3.6's interpreter run with NumPy 2.4, where `int(array)` takes 0-dimensional arrays only.

    Later versions of Triton squeeze the array themselves. This can go when the project needs Triton 3.9.
    """
    if not find_spec("triton") or torch.cuda.is_available() or np.lib.NumpyVersion(np.__version__) < "2.4.0":
        return
    interpreter = import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch_and_squeeze(tensor, *scope) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_squeeze)
