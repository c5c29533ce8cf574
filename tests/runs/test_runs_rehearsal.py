"""A pass beside torch.compile: when there is one, that it meets what the first step will, and leaves no trace."""

from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from tiny_run import tiny

from lfs_cli.runs import rehearsal
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.rehearsal import rehearse, rehearsed, twin
from lfs_cli.runs.setup import Setup, loss_as_written, set_up


@pytest.fixture
def setup(data: DataFolder, tmp_path: Path) -> Setup:
    return set_up(tiny(), tmp_path, data, Observer())


def test_a_sequence_goes_through_the_model_and_back_and_nothing_stays(setup: Setup) -> None:
    met: list[str] = []

    def watch(_module: torch.nn.Module, _inputs: object, y: torch.Tensor) -> None:
        met.append(f"forward {tuple(y.shape)}")
        y.register_hook(lambda _: met.append("back"))

    setup.model.norm.register_forward_hook(watch)
    weight = setup.model.blocks[0].feed_forward.down.weight
    before, drawn = weight.detach().clone(), torch.get_rng_state()
    model = twin(setup.model)

    rehearse(model, loss_as_written(model, setup.device, setup.dtype), setup.device)

    assert met == ["forward (1, 16, 16)", "back"]
    assert all(weight.grad is None for weight in (*setup.model.parameters(), *model.parameters()))
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_twin_has_the_weights_and_tables_in_the_same_memory_and_none_of_them_itself(setup: Setup) -> None:
    model, other = setup.model, twin(setup.model)
    for tensors in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers):
        mine, its = dict(tensors(model)), dict(tensors(other))
        assert mine.keys() == its.keys()
        assert all(mine[name].data_ptr() == its[name].data_ptr() for name in mine)
    assert not {*map(id, model.parameters())} & {*map(id, other.parameters())}
    assert all(weight.requires_grad for weight in other.parameters())
    assert not {*map(id, model.modules())} & {*map(id, other.modules())}


def test_what_goes_wrong_is_left_to_the_first_step(setup: Setup) -> None:
    setup.model.embedding.weight.data = torch.zeros(1, 1)
    with pytest.raises(IndexError):
        setup.plain_loss(*setup.batch(0))
    rehearse(setup.model, setup.plain_loss, setup.device)


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
    changes: dict[str, Any], device: str, rows: int, is_expected: bool, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, ended = Event(), Event(), Event()

    def wait(*_: Any) -> None:
        begun.set()
        assert goes_on.wait(10)
        ended.set()

    monkeypatch.setattr(rehearsal, "rehearse", wait)
    with rehearsed(tiny(**changes), replace(setup, device=torch.device(device)), rows):
        assert begun.wait(10 if is_expected else 0.05) == is_expected
        goes_on.set()
    assert ended.is_set() == is_expected
