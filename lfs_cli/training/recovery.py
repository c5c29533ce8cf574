"""When memory runs out: the same work again, on fewer sequences at a time.

A step is forward and backward in some passes, then one update. Passes can be made smaller, and their sum stays what it
was but for rounding; so where one of them finds no memory, all that the attempt has changed is undone, and the batch
goes through in more of them. What comes out is to the bit what it would have been with the smaller passes from the
start. With one sequence a pass nothing is left to try, and the error is the caller's.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from lfs_cli.model.device import is_out_of_memory, release_memory

Result = TypeVar("Result")


def smaller_microbatch(rows: int, batch_size: int) -> int:
    """Return the largest number of sequences that is at most half of ``rows`` and divides ``batch_size``.

    >>> [smaller_microbatch(rows, 12) for rows in (12, 6, 3, 2)]
    [6, 3, 1, 1]
    """
    return max(n for n in range(1, max(2, rows // 2 + 1)) if batch_size % n == 0)


def with_less_at_once(
    attempt: Callable[[int], Result],
    rows: int,
    batch_size: int,
    device: torch.device,
    *,
    undo: Callable[[], None],
    on_less: Callable[[int], None],
) -> Result:
    """Return ``attempt(rows)``, with fewer rows for as long as memory runs out and there are fewer.

    Args:
        attempt: The work, on so many sequences at a time.
        rows: To begin with.
        batch_size: What the rows must divide.
        device: Whose memory it is.
        undo: Brings back everything that a failed attempt has changed, also half of one.
        on_less: Is told each smaller number, before it is tried.

    Raises:
        Exception: What ``attempt`` raises, if it is no lack of memory or there are no fewer rows.
    """
    while rows > 1:
        try:
            return attempt(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        undo()  # after the handler, whose traceback still held the tensors
        release_memory(device)
        rows = smaller_microbatch(rows, batch_size)
        on_less(rows)
    return attempt(rows)
