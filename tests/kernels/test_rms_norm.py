"""RMSNorm, alone and of a sum, against float64: PyTorch's steps, and the kernels in Triton's interpreter."""

import pytest
import torch
from fused_cases import DTYPES, HAS_KERNELS, assert_near, differentiate, randn, stand_in

from lfs_cli.kernels import rms_norm as module
from lfs_cli.kernels.rms_norm import add_rms_norm, reference_rms_norm, rms_norm

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (150, 33), (4, 3000), (0, 8)]


def reference_add(x, residual, weight):
    h = x + residual
    return reference_rms_norm(h, weight, dtype=x.dtype), h


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_and_its_gradients_match_float64(shape, dtype, device, poisoned) -> None:
    inputs = randn(*shape, dtype=dtype, device=device), randn(shape[-1], dtype=torch.float32, device=device, seed=2)

    ours = differentiate(rms_norm, inputs)

    assert [x.dtype for x in ours] == [dtype, dtype, torch.float32]
    assert_near(ours, differentiate(reference_rms_norm, [x.double() for x in inputs]), 2 + shape[-1] ** 0.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_of_a_sum_and_its_gradients_match_float64(shape, device, poisoned) -> None:
    x, residual = (randn(*shape, dtype=torch.float32, device=device, seed=seed) for seed in (0, 1))
    weight = randn(shape[-1], dtype=torch.float32, device=device, seed=2)

    ours = differentiate(add_rms_norm, (x, residual, weight))

    exact = differentiate(reference_add, (x.double(), residual.double(), weight.double()))
    assert_near(ours, exact, 4 + shape[-1] ** 0.5)


def test_a_narrow_result_joins_a_wide_stream(device) -> None:
    x, residual = randn(9, 33, dtype=torch.float16, device=device), randn(9, 33, dtype=torch.float32, device=device)
    weight = torch.ones(33, device=device)

    y, h, dx, dresidual, _ = differentiate(add_rms_norm, (x, residual, weight))

    assert (y.dtype, h.dtype, dx.dtype, dresidual.dtype) == (x.dtype, residual.dtype, x.dtype, residual.dtype)
    assert torch.equal(h, x.float() + residual)
    assert add_rms_norm(x, residual, weight, dtype=torch.float32)[0].dtype == torch.float32


def test_either_result_may_go_unused(device) -> None:
    x, residual = (randn(9, 33, dtype=torch.float32, device=device, seed=seed) for seed in (0, 1))
    weight = torch.ones(33, device=device)

    only_sum = differentiate(lambda *inputs: add_rms_norm(*inputs, weight)[1], (x, residual))
    only_norm = differentiate(lambda *inputs: add_rms_norm(*inputs, weight)[0], (x, residual))

    assert torch.equal(only_sum[1], only_sum[2])
    exact = differentiate(lambda *inputs: reference_add(*inputs, weight.double())[0], (x.double(), residual.double()))
    assert_near(only_norm, exact, 8)


def test_epsilon_counts_where_a_row_is_small(device) -> None:
    x, weight = torch.full((1, 4), 1e-3, device=device), torch.ones(4, device=device)
    torch.testing.assert_close(rms_norm(x, weight, 3e-6), torch.full_like(x, 0.5))


@pytest.mark.filterwarnings("ignore:divide by zero")  # NumPy's, in the interpreter: 1 / 0 is what it is about
@pytest.mark.filterwarnings("ignore:invalid value")
def test_without_an_epsilon_rows_that_do_not_exist_add_nothing(device) -> None:
    inputs = randn(9, 33, dtype=torch.float32, device=device), randn(33, dtype=torch.float32, device=device)
    ours = differentiate(lambda x, weight: rms_norm(x, weight, 0.0), inputs)
    exact = differentiate(lambda x, weight: reference_rms_norm(x, weight, 0.0), [x.double() for x in inputs])
    assert_near(ours, exact, 8)


def test_rows_that_do_not_lie_side_by_side(device) -> None:
    x, weight = randn(7, 9, dtype=torch.float32, device=device), torch.ones(7, device=device)
    torch.testing.assert_close(rms_norm(x.T, weight), rms_norm(x.T.contiguous(), weight))


def test_equal_runs_are_equal_to_the_bit(device) -> None:
    inputs = randn(150, 33, dtype=torch.float32, device=device), randn(33, dtype=torch.float32, device=device)
    assert all(map(torch.equal, differentiate(rms_norm, inputs), differentiate(rms_norm, inputs)))


@pytest.mark.skipif(not HAS_KERNELS, reason="the operations")
def test_the_operations_keep_the_rules_of_torch(device) -> None:
    x, weight = randn(9, 33, dtype=torch.float32, device=device), torch.ones(33, device=device)
    for residual in (None, x.clone()):
        torch.library.opcheck(torch.ops.lfs.rms_norm.default, (x, residual, weight, 1e-5, torch.float32))
        torch.library.opcheck(torch.ops.lfs.rms_norm_backward.default, (x, residual, x, weight, 1e-5))


def test_what_cannot_work_is_refused_and_what_has_no_kernel_says_so() -> None:
    with pytest.raises(ValueError, match="expected x"):
        rms_norm(torch.ones(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match="of one shape"):
        add_rms_norm(torch.ones(2, 3), torch.ones(3), torch.ones(3))
    assert module.unavailable(torch.ones(1, dtype=torch.float64), torch.ones(1))
    assert (module.unavailable(torch.ones(1, 9000), torch.ones(9000)) or "").startswith("it ")


def damaged(definition, **where):
    """The definition, but with another weight where its arguments of these places are None, as ``where`` says."""

    def run(*inputs):
        is_hit = all((inputs[int(place[1:])] is None) == is_none for place, is_none in where.items())
        weight = 2 if definition is module._reference_forward else 3
        return definition(*(1.02 * x if is_hit and n == weight else x for n, x in enumerate(inputs)))

    return run


FORWARD, BACKWARD = module._reference_forward, module._reference_backward
BROKEN = {
    "a wrong norm": (rms_norm, "forward", damaged(FORWARD, _1=True)),
    "a wrong norm of a sum": (add_rms_norm, "forward", damaged(FORWARD, _1=False)),
    "a wrong gradient": (rms_norm, "backward", damaged(BACKWARD, _1=True)),
    "a wrong gradient of a sum": (add_rms_norm, "backward", damaged(BACKWARD, _1=False)),
    "a lost gradient": (add_rms_norm, "backward", lambda dy, dh, *how: BACKWARD(dy, None, *how)),
    "not a number": (rms_norm, "forward", lambda x, r, w, *how: FORWARD(x, r, w / 0, *how)),
    "no kernel": (rms_norm, "backward", lambda *inputs: [][0]),
}


@pytest.mark.parametrize("shape", [(9, 33), (33,)], ids=str)
@pytest.mark.parametrize("fault", BROKEN)
def test_kernels_that_fail_their_check_are_passed_over_with_a_warning(
    fault: str, shape: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, step, broken = BROKEN[fault]
    stand_in(module, monkeypatch, forward=FORWARD)
    monkeypatch.setattr(module, f"_launch_{step}", broken)
    count = 1 if function is rms_norm else 2
    inputs = [randn(*shape, dtype=torch.float32, device=device, seed=seed) for seed in range(count)]
    inputs.append(randn(33, dtype=torch.float32, device=device, seed=2))

    with pytest.warns(RuntimeWarning, match=f"the RMSNorm {step} kernel fails its self-check on {device}.* not used"):
        ours = differentiate(function, inputs)

    definition = reference_rms_norm if function is rms_norm else reference_add
    assert_near(ours, differentiate(definition, [x.double() for x in inputs]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_that_are_right_are_used_without_a_word(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = stand_in(module, monkeypatch, forward=FORWARD)
    differentiate(rms_norm, [randn(9, 33, dtype=dtype, device=device), torch.ones(33, device=device)])
    assert launched == ["forward"] * 2 + ["backward"] * 2  # the check, then the call
