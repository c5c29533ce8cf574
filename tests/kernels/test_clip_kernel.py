"""The length of many tensors and the factor that bounds it: against float64, and whatever tensors there are."""

import math

import pytest
import torch
from fused_cases import HAS_KERNELS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfs_cli.kernels import clip as module
from lfs_cli.kernels.clip import BLOCK, length_and_factor, reference_length_and_factor, unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
only_with_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="there are no kernels")


def drawn(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(DEVICE) for size in sizes]


def assert_right(gradients: list[Tensor], limit: float) -> None:
    found = length_and_factor(gradients, limit)
    squares = sum(float(x.double().square().sum()) for x in gradients)
    length = math.sqrt(squares)
    assert [x.dtype for x in found] == [torch.float32] * 2
    assert [x.shape for x in found] == [()] * 2
    assert found[0].item() == pytest.approx(length, rel=1e-5)
    assert found[1].item() == pytest.approx(limit / (length + 1e-6) if length > limit else 1.0, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 3, 100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7]), min_size=1, max_size=4),
    limit=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_they_are_those_of_float64(sizes: list[int], limit: float) -> None:
    assert_right(drawn(*sizes), limit)


def test_other_tensors_of_the_same_sizes_have_a_length_of_their_own() -> None:
    for seed in (1, 2, 1):
        assert_right(drawn(BLOCK + 1, 5, seed=seed), 1.0)
    assert_right([x * 3 for x in drawn(BLOCK + 1, 5)], 1.0)
    assert_right(drawn(BLOCK + 1), 1.0)


def test_tensors_may_begin_anywhere_and_have_no_numbers() -> None:
    """Where they begin makes a difference on a GPU alone."""
    (whole,) = drawn(3 * BLOCK)
    assert_right([whole[1 : BLOCK + 2], whole[:0], whole[BLOCK + 2 : 2 * BLOCK + 3]], 1.0)
    length, factor = length_and_factor([whole[:0]], 1.0)
    assert (length.item(), factor.item()) == (0, 1)


def test_what_is_not_a_number_is_told_and_bounded_by_nothing() -> None:
    for bad, length, factor in ((float("nan"), math.nan, 1.0), (float("inf"), math.inf, 0.0)):
        gradients = drawn(BLOCK + 1, 7)
        gradients[0][-1] = bad
        found = [x.item() for x in length_and_factor(gradients, 1.0)]
        assert str(found) == str([length, factor])


def test_without_a_limit_the_factor_is_one() -> None:
    assert length_and_factor(drawn(5), math.inf)[1].item() == 1


@only_with_kernels
def test_equal_runs_are_equal_to_the_bit_and_read_by_kernels() -> None:
    gradients = drawn(3 * BLOCK + 5, 17)
    assert unavailable(gradients) is None
    first = torch.stack(length_and_factor(gradients, 1.0))
    assert all(torch.equal(torch.stack(length_and_factor(gradients, 1.0)), first) for _ in range(5))


def test_torch_takes_what_the_kernels_do_not() -> None:
    wide = [x.double() for x in drawn(7, 9)]
    assert unavailable(wide) == "it needs contiguous tensors of float32"
    assert length_and_factor(wide, 0.5) == reference_length_and_factor(wide, 0.5)
    across = [torch.randn(4, 6, device=DEVICE).T]
    assert unavailable(across) == "it needs contiguous tensors of float32"
    assert_right(across, 1.0)
    assert unavailable([]) == "there are no tensors, or they are on several devices"


@only_with_kernels
@pytest.mark.usefixtures("forgets_checks")
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda *inputs: tuple(1.001 * x for x in launch(*inputs)))
    with pytest.warns(RuntimeWarning, match="the clipping kernel fails its self-check .* it is off by 0.001, 0.001"):
        assert_right(drawn(BLOCK + 5), 1.0)
    assert_right(drawn(BLOCK + 5), 1.0)
