"""What a number was measured on: hardware, versions and date, and how much memory there is and is used."""

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lfs_cli
from lfs_cli.memory import forget_peak, peak_bytes, release_free_memory, resident_bytes

PACKAGES = ("torch", "triton", "numpy", "numba", "tiktoken", "tokenizers", "gigatoken", "fastokens", "rustbpe")


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat a measurement on ``device``, as plain values."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware_name(device),
        "device": device.type,
        "device_bytes": _device_bytes(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "cores": cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"lfs": lfs_cli.__version__, "python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def machine_name(device: torch.device) -> str:
    """Return a name for the file of this machine's records, such as ``nvidia-h100-80gb-hbm3``."""
    name = hardware_name(device)
    if device.type != "cuda":
        name += f" {cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def hardware_name(device: torch.device) -> str:
    """Return the model name of the GPU or processor behind ``device``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@cache
def cpu_name() -> str:
    """Return the model name of the processor."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found:
        return found[1].strip()
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return how many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes can still be allocated for ``device``, or None when the system does not tell."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    available = _number_in("/proc/meminfo", r"MemAvailable:\s+(\d+) kB")
    if available is None:
        total = _memory_bytes()
        return None if total is None else total // 2  # a guess that leaves the system its half
    return min([available * 1024, *_left_in_control_group()])


class PeakMemory:
    """Measures the most memory held at once since `start`, beyond what was held then.

    On CUDA it counts tensors (torch's allocator), on Linux without CUDA the growth of the process' resident memory,
    whose high-water mark the kernel lets a process reset. Elsewhere the answer is None rather than a guess.

    Args:
        device: Where the measured code keeps its tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None

    @property
    def method(self) -> str | None:
        """What is counted, in words for a reader."""
        if self.device.type == "cuda":
            return "tensors allocated by torch"
        return "growth of resident memory" if self.device.type == "cpu" and resident_bytes() is not None else None

    def start(self) -> None:
        """Take what is held now as zero."""
        if self.device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            release_free_memory()
            self._before = resident_bytes()
        self.reset()

    def reset(self) -> None:
        """Forget peaks so far; zero stays where `start` put it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._before is not None and not forget_peak():
            self._before = None

    def peak_bytes(self) -> int | None:
        """Return the peak since `start` or the last `reset`, or None when this system cannot tell."""
        if self._before is None:
            return None
        if self.device.type == "cuda":
            return max(0, torch.cuda.max_memory_allocated(self.device) - self._before)
        highest = peak_bytes()
        return None if highest is None else max(0, highest - self._before)


def _number_in(path: str, pattern: str) -> int | None:
    try:
        found = re.search(pattern, Path(path).read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) if found else None


def _left_in_control_group() -> list[int]:
    """Return the memory that the limits of a container leave, if it has any."""
    files = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ]
    pairs = [(_number_in(limit, r"(\d+)"), _number_in(used, r"(\d+)")) for limit, used in files]
    return [max(0, limit - used) for limit, used in pairs if limit is not None and used is not None]


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _device_bytes(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str | None:
    """Return the commit of the checkout that lfs runs from, or None when it is installed otherwise."""
    root = Path(lfs_cli.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
