"""Triton's interpreter, made to run with the NumPy of today and to check itself on little."""

import os
from importlib import import_module

import pytest


@pytest.fixture(autouse=True)
def _interpreter_reads_one_element_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton 3.6's interpreter run with NumPy 2.4, where `int(array)` takes 0-dimensional arrays only.

    Later versions of Triton squeeze the array themselves. This can go when the project needs Triton 3.9.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch_and_squeeze(tensor, *scope) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_squeeze)


@pytest.fixture
def forgets_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be checked anew in this test, and no other test see what is found."""
    for name in ("_verdicts", "_under_way"):
        monkeypatch.setattr(import_module("lfs_cli.kernels.self_check"), name, {})


@pytest.fixture(autouse=True)
def _self_checks_are_small_where_kernels_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(import_module("lfs_cli.kernels.flash_attention"), "CHECKED_LENGTH", 16)
