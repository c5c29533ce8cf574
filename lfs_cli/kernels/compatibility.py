"""Triton where it is installed, and a stand-in where it is not, so that every kernel file imports everywhere.

Triton ships for Linux only. The stand-in gives a kernel file just enough to be read: `jit` returns its function
untouched, `tl.constexpr` is a plain number. Nothing of it can be launched, and `AVAILABLE` says so.

Triton decides once, when a kernel is decorated, whether it is compiled for a GPU or interpreted on the CPU: from the
environment variable `TRITON_INTERPRET` at that moment. `INTERPRETED` is that decision.
"""

from types import SimpleNamespace
from typing import Any

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:
    AVAILABLE = False
    INTERPRETED = False
    triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda named: named))
    tl = SimpleNamespace(constexpr=float)
else:
    AVAILABLE = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)
