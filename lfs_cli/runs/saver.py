"""Checkpoints of a run, written while training goes on: copied at once, brought to the disk by a thread."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lfs_cli.errors import CheckpointError, remedy
from lfs_cli.model import Transformer
from lfs_cli.optimizers import Optimizer
from lfs_cli.runs.folder import RunFolder
from lfs_cli.runs.progress import Progress
from lfs_cli.training.checkpoint import Snapshot, point_to, remove_checkpoint, take_snapshot, write_snapshot


class Saver:
    """Writes the checkpoints of one run, one at a time, and removes those that are not wanted any more.

    What goes wrong in the thread is raised by the next call of any method here. Leaving the block of `with` waits for
    the disk, unless an interruption is under way: a checkpoint that is not complete is never seen.

    Args:
        run: Where they go.
        model: The model.
        optimizers: The optimizers, in the order of the config.
        identity: JSON values that are the same in each checkpoint of the run.
        tokenizer: Content of the tokenizer's file.
        keep: Latest checkpoints to keep; the best one is kept besides.
        saved: Step of the checkpoint that the run goes on from, -1 for none.
    """

    def __init__(
        self,
        run: RunFolder,
        model: Transformer,
        optimizers: Sequence[Optimizer],
        *,
        identity: dict[str, Any],
        tokenizer: bytes,
        keep: int,
        saved: int = -1,
    ) -> None:
        self.saved = saved
        self._run, self._model, self._optimizers = run, model, optimizers
        self._identity, self._tokenizer, self._keep = identity, tokenizer, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            with suppress(CheckpointError):  # the first error is the one to show
                self.wait()

    def save(self, progress: Progress) -> None:
        """Copy the state after the last step and start to write it.

        Raises:
            CheckpointError: When this or an earlier checkpoint cannot be written.
        """
        self.wait()
        state = {"progress": progress.record(), **self._identity}
        snapshot = take_snapshot(self._model, self._optimizers, state)
        self.saved = progress.step
        # A daemon, so that a second signal need not wait for the disk.
        self._thread = threading.Thread(
            target=self._write,
            args=(snapshot, progress.step, progress.is_best()),
            name=_thread_name(self._run),
            daemon=True,
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what has gone wrong since the last call, a CheckpointError, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until the disk has what was saved last. Raises CheckpointError when it has not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write(self, snapshot: Snapshot, step: int, is_best: bool) -> None:
        folder = self._run.checkpoint(step)
        try:
            write_snapshot(folder, snapshot, self._tokenizer)
            point_to(self._run.latest_pointer, folder)
            if is_best:
                point_to(self._run.best_pointer, folder)
            for old in self._run.prunable(self._keep):
                remove_checkpoint(old)
        except OSError as error:
            self._error = CheckpointError(
                f"cannot write {self._run.checkpoints}: {error.strerror}",
                hint=f"{remedy(error) or 'check the disk'}; the checkpoints in it are whole",
            )
        except BaseException as error:  # raised again where it is seen: in the loop
            self._error = error


def finish_writing(run: RunFolder) -> None:
    """Wait for a checkpoint that an interrupted training of this process may still be writing, as in a notebook."""
    for thread in threading.enumerate():
        if thread.name == _thread_name(run):
            thread.join()


def _thread_name(run: RunFolder) -> str:
    return f"checkpoint of {run.path.resolve()}"
