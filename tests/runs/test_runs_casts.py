"""A run that casts its weights once a step ends as one that casts them in every pass."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
from tiny_run import Train, folder_of, tiny

from lfs_cli.runs.verify import compare_runs
from lfs_cli.training.casts import Casts


def test_a_run_with_casts_once_a_step_ends_as_one_without(train_tiny: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations, samples and checkpoints in between read the weights themselves."""
    config, real, asked = tiny(dtype="bfloat16", microbatch=2), Casts.kept, []

    @contextmanager
    def watched(casts: Casts, passes: int) -> Iterator[None]:
        with real(casts, passes):
            asked.append((passes, casts._model.head_cast is not None))
            yield

    monkeypatch.setattr(Casts, "kept", watched)
    run = folder_of(train_tiny(config))
    monkeypatch.setattr(Casts, "kept", lambda casts, passes: nullcontext())
    other = folder_of(train_tiny(config))
    assert asked == [(2, True)] * 8
    assert not [row for row in compare_runs(run, other) if row["different"]]
