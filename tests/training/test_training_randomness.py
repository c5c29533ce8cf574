"""Random states come back, through a checkpoint's JSON and tensors too, and looking at a model draws nothing."""

import random

import numpy as np
import torch

from lfs_cli.training.randomness import random_states, restore_random_states, seed_everything, undisturbed

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [torch.rand(()).item(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal()]


def test_all_generators_go_on_where_they_were() -> None:
    seed_everything(3)
    draw()  # leaves half a pair of normal numbers in two of them
    states = random_states(CPU)
    expected = [draw(), draw()]
    seed_everything(4)
    assert draw() not in expected
    restore_random_states(states, CPU)
    assert [draw(), draw()] == expected


def test_a_seed_is_a_start() -> None:
    seed_everything(2**63 - 1)
    first = draw()
    seed_everything(2**63 - 1)
    assert draw() == first


def test_an_undisturbed_block_leaves_no_trace_also_when_it_fails() -> None:
    seed_everything(5)
    expected = draw()
    seed_everything(5)
    try:
        with undisturbed(CPU):
            draw()
            raise KeyError
    except KeyError:
        pass
    assert draw() == expected
