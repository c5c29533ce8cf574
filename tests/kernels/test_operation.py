"""The check of a kernel before it is first used: what it finds, that it is kept, and when it has to wait."""

from collections.abc import Callable

import pytest
import torch

from lfs_cli.kernels import operation
from lfs_cli.kernels.operation import is_trusted, relative_errors

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def asks(forgets_checks: None) -> tuple[list[tuple], Callable[..., bool]]:
    """The cases that were checked so far, and what asks for a made-up kernel that is right for them below 6."""
    checked: list[tuple] = []

    def errors_of(device: torch.device, V: int) -> list[float]:
        checked.append((device, V))
        return [0.0, V / 10]

    def ask(device: torch.device, V: int) -> bool:
        return is_trusted("made-up", errors_of, device, V, allowed=0.5)

    return checked, ask


def test_a_kernel_is_checked_once_for_each_device_and_case(asks) -> None:
    checked, ask = asks
    assert ask(CPU, 5)
    with pytest.warns(RuntimeWarning) as caught:
        assert not ask(CPU, 6)
    assert [ask(CPU, 5), ask(CPU, 6)] == [True, False]  # without another warning, which would be an error
    assert ask(torch.device("meta"), 5)
    assert checked == [(CPU, 5), (CPU, 6), (torch.device("meta"), 5)]
    (warning,) = caught
    assert str(warning.message) == (
        "the made-up kernel fails its self-check on cpu and is not used: it is off by 0, 0.6, and rounding explains 0.5"
    )


def test_a_kernel_of_another_name_is_checked_by_itself(asks) -> None:
    _, ask = asks
    assert ask(CPU, 5)
    with pytest.warns(RuntimeWarning, match="the other kernel fails its self-check on cpu"):
        assert not is_trusted("other", lambda *_: [1.0], CPU, 5, allowed=0.5)
    assert ask(CPU, 5)


def test_a_kernel_is_trusted_while_a_graph_is_recorded_and_checked_afterwards(
    asks, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, ask = asks
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert all(ask(CUDA, 6) for _ in range(2))
    assert not checked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(RuntimeWarning, match="the made-up kernel fails its self-check on cuda:0"):
        assert not ask(CUDA, 6)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not ask(CUDA, 6)
    assert checked == [(CUDA, 6)]


def test_no_memory_for_a_check_is_not_a_fault_of_the_kernel(forgets_checks: None) -> None:
    def errors_of(*_: object) -> list[float]:
        raise torch.OutOfMemoryError("40 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        is_trusted("made-up", errors_of, CPU, allowed=1.0)
    assert not operation._verdicts
    assert is_trusted("made-up", lambda _: [0.0], CPU, allowed=1.0)


def test_errors_are_relative_to_what_is_right_and_none_where_nothing_is() -> None:
    ours = [torch.tensor([3.0, 4.5]), torch.ones(0), torch.tensor(float("nan"))]
    right = [torch.tensor([3.0, 4.0]).double(), torch.ones(0).double(), torch.tensor(1.0).double()]
    off, unknown = relative_errors(ours, right)
    assert off == pytest.approx(0.1)
    assert unknown != unknown
