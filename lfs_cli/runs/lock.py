"""One training at a time in a run folder, by a lock of the operating system that dies with its holder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lfs_cli.errors import CheckpointError, remedy
from lfs_cli.files import lock_of, locked, read_name

TRAINING = "training"
"""Name in a run folder that stands for the right to write there."""


@contextmanager
def only_trainer(run: Path) -> Iterator[None]:
    """Hold the folder ``run`` while the block runs.

    Raises:
        CheckpointError: When another process holds it, or its disk refuses.
    """

    def refuse() -> None:
        holder = read_name(lock_of(run / TRAINING))
        raise CheckpointError(
            f"{run} is being trained by another process{f' ({holder})' if holder.isdecimal() else ''}",
            hint="wait for it or stop it first; a process that died leaves no lock behind",
        )

    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run / TRAINING, on_wait=refuse))
        except OSError as error:
            raise CheckpointError(
                f"cannot write {run}: {error.strerror}", hint=remedy(error) or "check the disk"
            ) from None
        yield
