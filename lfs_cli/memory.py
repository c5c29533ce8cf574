"""How much memory this process holds and has held, as the system tells it. Needs nothing but the standard library."""

import ctypes
import re
import sys
from pathlib import Path


def resident_bytes() -> int | None:
    """Return the memory that this process holds now; None where the system does not tell."""
    return _kilobytes(r"VmRSS:\s+(\d+) kB")


def peak_bytes() -> int | None:
    """Return the most memory that this process held since it began, or since `forget_peak` where that works."""
    peak = _kilobytes(r"VmHWM:\s+(\d+) kB")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def forget_peak() -> bool:
    """Begin a new peak at what is held now, and return whether the system allows it, as Linux mostly does."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def release_free_memory() -> None:
    """Give freed blocks back to the system, so that using them again is seen as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _kilobytes(pattern: str) -> int | None:
    try:
        found = re.search(pattern, Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
