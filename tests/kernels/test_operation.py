"""What is assumed of the device: by each thread for itself, and seen by torch.compile."""

import threading

import torch
from torch import Tensor

from lfs_cli.kernels.operation import as_it_is, as_on_gpu, as_written, on_gpu, under_same_assumptions

X = torch.ones(1)


def test_a_compiler_sees_an_assumption_change() -> None:
    @torch.compile(backend="eager")
    def asked(x: Tensor) -> Tensor:
        return x + 1 if on_gpu(x) else x

    found = [asked(X).item()]
    with as_on_gpu(is_compiled=False):
        found.append(asked(X).item())
        with as_written():
            found.append(asked(X).item())
    assert [*found, asked(X).item()] == [1, 2, 1, 1]


def test_assumptions_end_with_their_block_and_are_those_of_a_thread() -> None:
    found: list[bool] = []

    def ask() -> None:
        found.append(on_gpu(X))

    with as_on_gpu(is_compiled=False):
        ask()
        for target in (ask, under_same_assumptions(ask)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        with as_it_is():
            ask()
        ask()
    ask()
    assert found == [True, False, True, False, True, False]
    assert under_same_assumptions(ask) is ask
