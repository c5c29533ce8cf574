"""A run that casts its weights once a step ends as one that casts them in every pass; and what it begins ahead."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny_run import Train, folder_of, tiny

from lfs_cli.errors import ConfigError
from lfs_cli.model import Transformer
from lfs_cli.optimizers import Optimizer
from lfs_cli.runs import train
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


@pytest.mark.parametrize("plugins", [[], ["json"]], ids=["alone", "with a plugin"])
def test_optimizers_keep_copies_up_where_no_plugin_may_move_weights(
    plugins: list[str], train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = Casts.__init__

    def watched(casts: Casts, model: Transformer, dtype: torch.dtype, optimizers: Sequence[Optimizer] = ()) -> None:
        made.append(len(optimizers))
        real(casts, model, dtype, optimizers)

    monkeypatch.setattr(Casts, "__init__", watched)
    train_tiny(tiny(plugins=plugins))
    assert made == ([0] if plugins else [1])


def test_a_run_gives_up_checks_that_have_not_begun_however_it_ends(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(train, "cancel_checks", lambda: ended.append("given up"))
    train_tiny(tiny())
    with pytest.raises(ConfigError):
        train_tiny(tiny(sample_prompt="a long one " * 100))
    assert ended == ["given up"] * 2
