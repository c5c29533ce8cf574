"""Self-checks: a kernel is compared with its definition on a small case before it is used, and not used if it is wrong.

Better a slow run than wrong numbers: compilers, drivers and GPUs differ, and no test runs on all of them. A check is
made once a process for each kernel, device and case, when it is first needed; what it compiles is what the call needs.

Compiling is nearly all that a check takes: Triton's compiler, ptxas, and gcc for what launches the kernel. They work
outside of Python's lock, so `begin_checks` makes many checks at once, in threads; who needs one before its end waits
for it. `listed_checks` finds out which a run will need. On a GPU each thread that multiplies matrices meanwhile has
PyTorch reserve memory for it, 32 MB on Hopper GPUs, which later threads take over.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of a kernel that computes in float32 and rounds once, relative to the size of the result: some roundings of the type
that it writes, or sums in another order."""

MOST_THREADS = 8
"""That check at once. A model asks for a dozen checks, and the longest takes as long as four of the others."""

Case = tuple[Any, ...]
"""What tells one kernel from another: its name, the device, and what is compiled in."""


class Check(NamedTuple):
    """A self-check.

    Args:
        kernel: Its name, for the warning.
        device: Where.
        run: Says what is wrong, or None.
    """

    kernel: str
    device: torch.device
    run: Callable[[], str | None]


class Listed(Exception):  # noqa: N818  it tells of no error
    """Ends a call in `listed_checks`: what follows would launch a kernel."""


_verdicts: dict[Case, str | None] = {}
"""What checks found: what is wrong, or None."""

_under_way: dict[Case, Future[str | None]] = {}
"""Checks that threads make."""

_here = threading.local()
"""`list`: where checks of this thread are put instead of being made, if anywhere."""


def is_trusted(
    kernel: str, errors_of: Callable[..., Sequence[float]], device: torch.device, *case: Any, allowed: float
) -> bool:
    """Return whether a kernel does on a small case what its definition does; it is asked once, and warns if not.

    For use inside an operation, which runs on real numbers, whatever traced it.

    Args:
        kernel: Its name, for the warning.
        errors_of: Called with ``device`` and ``case``; as in `fault_of`.
        device: Where.
        case: What else makes it another kernel, such as the type of its numbers.
        allowed: As in `fault_of`.
    """
    check = Check(kernel, device, lambda: fault_of(partial(errors_of, device, *case), allowed))
    return find_fault((kernel, device, *case), check) is None


def find_fault(case: Case, check: Check) -> str | None:
    """Return what is wrong with a kernel, or None. It is asked once for each case, and warns if something is.

    While a CUDA graph is recorded, no number can be looked at: then a kernel is trusted that no thread has checked, and
    the check waits for a later call.

    Raises:
        Listed: In `listed_checks`.
        torch.OutOfMemoryError: Which says nothing about the kernel.
    """
    wanted = getattr(_here, "list", None)
    if wanted is not None:
        wanted[case] = check
        raise Listed
    if case not in _verdicts:
        begun = _under_way.pop(case, None)
        fault = None if begun is None else _found_by(begun)
        if begun is None or fault is not None:
            if _is_capturing(check.device):
                return None
            fault = check.run()
        _verdicts[case] = fault
        if fault is not None:
            warnings.warn(
                f"the {check.kernel} kernel fails its self-check on {check.device} and is not used: {fault}",
                RuntimeWarning,
                stacklevel=3,
            )
    return _verdicts[case]


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_known(case: Case) -> bool:
    """Return whether a check was made or begun."""
    return case in _verdicts or case in _under_way


def known_fault(case: Case) -> str | None:
    """Return what `find_fault` has found; None too where it has not been asked."""
    return _verdicts.get(case)


@contextmanager
def listed_checks() -> Iterator[dict[Case, Check]]:
    """Within the block, in this thread, put checks into a dictionary instead of making them.

    A call that asks for one ends there, with `Listed`: what it would do with the answer needs numbers.
    """
    before, found = getattr(_here, "list", None), {}
    _here.list = found
    try:
        yield found
    finally:
        _here.list = before


def begin_checks(checks: Mapping[Case, Check]) -> None:
    """Begin to make checks in threads, save those that were made or begun before.

    What a thread finds wrong is checked once more by who asks. A check must not ask for another one: all threads could
    wait then.
    """
    wanted = {case: check for case, check in checks.items() if not is_known(case)}
    if not wanted:
        return
    executor = ThreadPoolExecutor(min(MOST_THREADS, max(2, os.cpu_count() or 1)), thread_name_prefix="self-check")
    for case, check in wanted.items():
        _under_way[case] = executor.submit(_run_on_its_device, check)
    executor.shutdown(wait=False)


def cancel_checks() -> None:
    """Give up what no thread has begun yet: the process would not end before."""
    for begun in _under_way.values():
        begun.cancel()


def _run_on_its_device(check: Check) -> str | None:
    if check.device.type != "cuda":
        return check.run()
    with torch.cuda.device(check.device):
        return check.run()


def _found_by(begun: Future[str | None]) -> str | None:
    """Return what a thread finds wrong. It is believed when it finds nothing, as there may be less memory meanwhile."""
    try:
        return begun.result()
    except (Exception, CancelledError) as error:
        return str(error)


def fault_of(errors_of: Callable[[], Sequence[float]], allowed: float) -> str | None:
    """Say what is wrong with a kernel that runs on a small case, or None when nothing is.

    Args:
        errors_of: Runs it and returns how far each result is from the definition's, in any unit.
        allowed: The largest error that rounding explains, in that unit.

    Raises:
        torch.OutOfMemoryError: Which says nothing about the kernel.
    """
    try:
        errors = errors_of()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler may raise anything
        return f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}"
    if all(error <= allowed for error in errors):  # not max: it may pass over what is not a number
        return None
    return f"it is off by {', '.join(f'{error:.2g}' for error in errors)}, and rounding explains {allowed:.2g}"


def relative_errors(ours: Iterable[Tensor], right: Iterable[Tensor]) -> list[float]:
    """Return how far each result is from the right one, relative to that one's size. Empty ones have no error."""
    pairs = zip(ours, right, strict=True)
    return [float((x.double() - y).norm() / y.norm()) for x, y in pairs if y.numel()]
