"""The check of a kernel before it is first used: what it finds, that it is kept, when it waits, and in threads."""

import threading
from collections.abc import Callable

import pytest
import torch

from lfs_cli.kernels import self_check
from lfs_cli.kernels.operation import as_on_gpu, on_gpu
from lfs_cli.kernels.self_check import (
    Check,
    Listed,
    begin_checks,
    cancel_checks,
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
    again = []
    with pytest.warns(RuntimeWarning, match="the wrong kernel fails its self-check on cpu and is not used: it is off"):
        assert ask("wrong", lambda: again.append(1) or "it is off") == "it is off"
    assert again == [1]  # a fault is looked at once more, by who asks
    assert ask("right", not_again) is None
    begin_checks({(name,): Check(name, CPU, not_again) for name in ("right", "wrong")})
    assert not self_check._under_way
    assert [ask(name, not_again) for name in ("right", "wrong")] == [None, "it is off"]
    assert known_fault(("wrong",)) == "it is off"


@pytest.mark.usefixtures("forgets_checks")
def test_what_goes_wrong_in_a_thread_alone_is_not_held_against_a_kernel() -> None:
    begin_checks({("busy",): Check("busy", CPU, lambda: "RuntimeError: cannot fork")})
    assert ask("busy", lambda: None) is None  # and warns of nothing, which would be an error


@pytest.mark.usefixtures("forgets_checks")
def test_checks_that_have_not_begun_can_be_given_up() -> None:
    goes_on = threading.Event()
    many = {(n,): Check(str(n), CPU, lambda: goes_on.wait(30) and None) for n in range(3 * self_check.MOST_THREADS)}
    begin_checks(many)
    cancel_checks()
    cancelled = [case for case, begun in self_check._under_way.items() if begun.cancelled()]
    goes_on.set()
    assert len(cancelled) >= 2 * self_check.MOST_THREADS
    assert find_fault(cancelled[0], Check("given up", CPU, lambda: None)) is None


@pytest.mark.usefixtures("forgets_checks")
def test_a_thread_assumes_nothing_that_who_begins_assumes() -> None:
    with as_on_gpu(is_compiled=False):
        assert on_gpu(torch.ones(1))
        begin_checks({("here",): Check("here", CPU, lambda: "it is a GPU" if on_gpu(torch.ones(1)) else None)})
        assert ask("here", not_again) is None


@pytest.mark.usefixtures("forgets_checks")
def test_while_a_graph_is_recorded_what_a_thread_found_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    begin_checks({("right",): Check("right", CPU, lambda: None), ("wrong",): Check("wrong", CPU, lambda: "it is off")})
    monkeypatch.setattr(self_check, "_is_capturing", lambda _: True)
    assert ask("right", not_again) is None
    assert ask("wrong", not_again) is None
    monkeypatch.setattr(self_check, "_is_capturing", lambda _: False)
    assert ask("right", not_again) is None
    with pytest.warns(RuntimeWarning, match="the wrong kernel"):
        assert ask("wrong", lambda: "it is off") == "it is off"


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
        with listed_checks() as inner, pytest.raises(Listed):
            ask("inner", not_again)
        with pytest.raises(Listed):
            ask("outer", not_again)
    assert list(inner) == [("inner",)]
    assert not is_known(("made-up", CPU, 5))
    assert is_known(("elsewhere",))
    check = found.pop(("made-up", CPU, 5))
    assert list(found) == [("outer",)]
    assert check.run() == "it is off by 1, and rounding explains 0.5"
    with pytest.warns(RuntimeWarning, match="the made-up kernel"):
        assert not is_trusted("made-up", lambda *_: [1.0], CPU, 5, allowed=0.5)
