"""Compiles what `lfs bench attention --tune` is about to try, many choices at a time, in processes of their own.

Such a search waits for compilers most of its time, and each keeps one core busy. Triton puts what it has compiled on
disk and finds it there from any process: so workers run each choice once, on one sequence of the shape, and the search
then meets kernels that are there already. A kernel is compiled for its constants, the alignment of its tensors, and
which of its numbers are 1 or multiples of 16; how many sequences there are is none of these.

What workers compute is dropped; what fails in one of them fails again in the search, which tells why. When one dies,
those that it takes along are replaced, `MOST_CRASHES` times, and the search compiles itself what was not done. But what
is at work when nothing has ended for `PATIENCE` seconds, be it a compiler or a kernel whose warps wait for each other
for good, must not be met by the search, which would not end either: it is told of that. When the time is out workers
are killed: compilers beside a kernel that is timed would slow it down.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache

import torch

from lfs_cli.benchmarks.attention_accuracy import Inputs
from lfs_cli.benchmarks.attention_shapes import Shape
from lfs_cli.benchmarks.attention_tuning import Ahead, Choice, Tunable, kernels_of, nothing_ahead
from lfs_cli.benchmarks.machine import cores

MOST_WORKERS = 12
"""Each holds some 0.5 GB of the GPU, and of a step of the search there are at most nine choices to compile."""

PATIENCE = 60.0
"""Seconds, from the last choice that was done, after which those at work are given up. The first of them also starts
workers, which takes some 15."""

MOST_CRASHES = 2
"""Deaths of a worker after which the search goes on without them."""

Work = Callable[[Shape, torch.device, str, Choice], None]


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[Ahead]:
    """Yield what compiles ahead for ``device``, which is nothing where no kernel is compiled."""
    if device.type != "cuda":
        yield nothing_ahead
        return
    compilers = Compilers(device, max(1, min(cores() // 2, MOST_WORKERS)))
    try:
        yield compilers
    finally:
        compilers.close()


class Compilers:
    """Worker processes, started when there is something to compile.

    Args:
        device: Where kernels run.
        workers: Processes at most.
        work: What a worker does for a choice. It must be found by its name in a module, as all that is sent there.
    """

    def __init__(self, device: torch.device, workers: int, work: "Work | None" = None) -> None:
        self.device, self.workers, self.work = device, workers, work or run_once
        self.crashes = 0
        self._pool: ProcessPoolExecutor | None = None

    def __call__(
        self, shape: Shape, kernel: str, choices: Sequence[Choice], seconds: float, told: Callable[[int], None]
    ) -> list[Choice]:
        """Return when all ``choices`` are compiled, when ``seconds`` are over, or when some seem to take for ever.

        Args:
            shape: The problem.
            kernel: Name of the kernel.
            choices: What to compile it with, the most important first.
            seconds: How long this may take.
            told: Called with how many are done.

        Returns:
            Those that did not end, which had better not be run.
        """
        endless: list[Choice] = []
        if seconds <= 0 or self.crashes >= MOST_CRASHES:
            return endless
        told(0)
        end, left = time.monotonic() + seconds, list(choices)
        try:
            while left and time.monotonic() < end:
                futures = self._submit([(shape, self.device, kernel, choice) for choice in left])
                waiting = dict(zip(futures, left, strict=True))
                while done := self._some_of(waiting, end):
                    for future in done:
                        future.result()
                        del waiting[future]
                        told(len(choices) - len(endless) - len(waiting))
                left = list(waiting.values())
                if left:  # each worker is at one, in their order
                    self.close()
                    endless += left[: self.workers]
                    left = left[self.workers :]
        except BrokenProcessPool:
            self.crashes += 1
            self.close()
        except OSError:  # no more processes, or no memory for them: the search compiles by itself
            self.crashes = MOST_CRASHES
            self.close()
        return endless

    def _some_of(self, waiting: Collection["Future[None]"], end: float) -> "set[Future[None]]":
        """Return those that are done, waiting for one; none when there are none, or it takes too long."""
        patience = max(0.0, min(PATIENCE, end - time.monotonic(), threading.TIMEOUT_MAX))
        return wait(waiting, timeout=patience, return_when=FIRST_COMPLETED).done if waiting else set()

    def _submit(self, calls: Sequence[tuple[Shape, torch.device, str, Choice]]) -> "list[Future[None]]":
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin
            )
        # Workers are born with Ctrl-C blocked, which is for us to answer; one that comes now reaches us afterwards
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return [self._pool.submit(self.work, *call) for call in calls]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """Kill the workers, whatever they are at."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        for process in list((pool._processes or {}).values()):  # Python 3.14 has kill_workers
            process.kill()
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Prepare a worker: errors are the search's to tell, and nobody is left behind when the search is killed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_once(shape: Shape, device: torch.device, kernel: str, choice: Choice) -> None:
    """Run a kernel once, in a worker, so that Triton compiles it. Errors of compilers cannot all be sent: none is."""
    with suppress(Exception):
        _tunables(replace(shape, batch=1), device)[kernel].run(choice)
        torch.cuda.synchronize(device)  # the GPU is idle when this is reported to be done


@lru_cache(maxsize=1)
def _tunables(shape: Shape, device: torch.device) -> dict[str, Tunable]:
    inputs = Inputs(
        *(
            torch.ones((shape.batch, shape.seq, heads, shape.head_dim), dtype=shape.dtype, device=device)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        )
    )
    return {tunable.kernel: tunable for tunable in kernels_of(shape, inputs)}
