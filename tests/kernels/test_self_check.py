"""The check of a kernel before it is first used: what it finds, that it is kept, when it waits, and in threads."""

import threading
from collections.abc import Callable

import pytest
import torch

from lfs_cli.kernels import self_check
from lfs_cli.kernels.self_check import (
    Check,
    Listed,
    begin_checks,
    find_fault,
    is_known,
    is_trusted,
    known_fault,
    listed_checks,
    relative_errors,
)

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
    assert not self_check._verdicts
    assert is_trusted("made-up", lambda _: [0.0], CPU, allowed=1.0)


def test_errors_are_relative_to_what_is_right_and_none_where_nothing_is() -> None:
    ours = [torch.tensor([3.0, 4.5]), torch.ones(0), torch.tensor(float("nan"))]
    right = [torch.tensor([3.0, 4.0]).double(), torch.ones(0).double(), torch.tensor(1.0).double()]
    off, unknown = relative_errors(ours, right)
    assert off == pytest.approx(0.1)
    assert unknown != unknown


def ask(name: str, run: Callable[[], str | None]) -> str | None:
    return find_fault((name,), Check(name, CPU, run))


def not_again() -> str | None:
    raise AssertionError("checked twice")


@pytest.mark.usefixtures("forgets_checks")
def test_checks_that_are_begun_are_made_at_once_and_awaited_by_who_asks() -> None:
    both = threading.Barrier(2, timeout=30)

    def check(fault: str | None) -> Callable[[], str | None]:
        return lambda: (both.wait(), fault)[1]  # neither ends before the other has begun

    begin_checks({(name,): Check(name, CPU, check(fault)) for name, fault in (("right", None), ("wrong", "it is off"))})
    assert is_known(("right",))
    assert known_fault(("wrong",)) is None  # as nobody has asked
    with pytest.warns(RuntimeWarning, match="the wrong kernel fails its self-check on cpu and is not used: it is off"):
        assert ask("wrong", not_again) == "it is off"
    assert ask("right", not_again) is None
    begin_checks({(name,): Check(name, CPU, not_again) for name in ("right", "wrong")})
    assert [ask(name, not_again) for name in ("right", "wrong")] == [None, "it is off"]
    assert known_fault(("wrong",)) == "it is off"


@pytest.mark.usefixtures("forgets_checks")
def test_a_check_that_a_thread_could_not_make_is_made_by_who_asks() -> None:
    def fail() -> str | None:
        raise torch.OutOfMemoryError("40 GiB")

    begin_checks({("one",): Check("one", CPU, fail), ("two",): Check("two", CPU, fail)})
    assert ask("one", lambda: None) is None
    with pytest.raises(torch.OutOfMemoryError):
        ask("two", fail)


@pytest.mark.usefixtures("forgets_checks")
def test_while_checks_are_listed_none_is_made_and_calls_end_there() -> None:
    with listed_checks() as found:
        with pytest.raises(Listed):
            is_trusted("made-up", lambda *_: [1.0], CPU, 5, allowed=0.5)
        other = threading.Thread(target=ask, args=("elsewhere", lambda: None))
        other.start()
        other.join()
    assert not is_known(("made-up", CPU, 5))
    assert is_known(("elsewhere",))
    (check,) = found.values()
    assert check.run() == "it is off by 1, and rounding explains 0.5"
    with pytest.warns(RuntimeWarning, match="the made-up kernel"):
        assert not is_trusted("made-up", lambda *_: [1.0], CPU, 5, allowed=0.5)
