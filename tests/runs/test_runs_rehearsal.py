"""A pass beside torch.compile: when there is one, that it meets what the first step will, and leaves no trace."""

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import tiny

from lfs_cli.runs import rehearsal
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.rehearsal import rehearse, rehearsed
from lfs_cli.runs.setup import Setup, set_up


@pytest.fixture
def setup(data: DataFolder, tmp_path: Path) -> Setup:
    return set_up(tiny(), tmp_path, data, Observer())


def test_a_sequence_goes_through_the_model_and_back_and_nothing_stays(setup: Setup) -> None:
    met: list[str] = []
    weight = setup.model.blocks[0].feed_forward.down.weight
    setup.model.norm.register_forward_hook(lambda _module, _inputs, y: met.append(f"forward {tuple(y.shape)}"))
    weight.register_hook(lambda gradient: met.append("back"))
    before, drawn = weight.detach().clone(), torch.get_rng_state()

    rehearse(setup)

    assert met == ["forward (1, 16, 16)", "back"]
    assert all(weight.grad is None for weight in setup.model.parameters())
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_what_goes_wrong_is_left_to_the_first_step(setup: Setup) -> None:
    setup.model.embedding.weight.data = torch.zeros(1, 1)
    with pytest.raises(IndexError):
        setup.plain_loss(*setup.batch(0))
    rehearse(setup)


ON_GPU = {"compile": True}


@pytest.mark.parametrize(
    ("changes", "device", "rows", "is_expected"),
    [
        (ON_GPU, "cuda", 4, True),
        (ON_GPU | {"compile": "blocks"}, "cuda", 32, True),
        (ON_GPU, "cuda", 3, False),
        (ON_GPU, "cpu", 32, False),
        ({"compile": False}, "cuda", 32, False),
        (ON_GPU | {"plugins": ["own"]}, "cuda", 32, False),
    ],
)
def test_it_goes_on_beside_the_block_where_it_pays(
    changes: dict[str, Any], device: str, rows: int, is_expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, ended = Event(), Event(), Event()

    def wait(_: Any) -> None:
        begun.set()
        assert goes_on.wait(10)
        ended.set()

    monkeypatch.setattr(rehearsal, "rehearse", wait)
    with rehearsed(tiny(**changes), SimpleNamespace(device=torch.device(device)), rows):
        assert begun.wait(10 if is_expected else 0.05) == is_expected
        goes_on.set()
    assert ended.is_set() == is_expected
