"""SwiGLU, SiLU and squared ReLU against float64: PyTorch's steps, and the kernels in Triton's interpreter."""

import pytest
import torch
from fused_cases import DTYPES, HAS_KERNELS, assert_near, differentiate, randn

from lfs_cli.kernels.swiglu import reference_activation, relu2, silu, swiglu, unavailable

KINDS = {"swiglu": swiglu, "silu": silu, "relu2": relu2}
SHAPES = [(1, 2), (3, 14), (2, 5, 64), (3, 2502), (0, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_match_float64(shape, kind, dtype, device, poisoned) -> None:
    x = 3 * randn(*shape, dtype=dtype, device=device)

    ours = differentiate(KINDS[kind], [x])

    assert {x.dtype for x in ours} == {dtype}
    assert_near(ours, differentiate(lambda x: reference_activation(kind, x), [x.double()]))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # NumPy's, in the interpreter: 1 / inf is right
@pytest.mark.parametrize("kind", KINDS)
def test_huge_inputs_do_not_overflow(kind, device) -> None:
    x = torch.tensor([[-1e4, 1e4, 1.0, 1.0]], device=device)
    for ours, right in zip(
        differentiate(KINDS[kind], [x]),
        differentiate(lambda x: reference_activation(kind, x), [x.double()]),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), right)


def test_columns_are_as_good_as_rows(device) -> None:
    x = randn(10, 7, dtype=torch.float32, device=device)
    assert all(map(torch.equal, differentiate(swiglu, [x.T]), differentiate(swiglu, [x.T.contiguous()])))


def test_as_many_gates_as_factors() -> None:
    with pytest.raises(ValueError, match="got 5 channels"):
        swiglu(torch.ones(2, 5))
    assert unavailable(torch.ones(2, dtype=torch.float64))


@pytest.mark.skipif(not HAS_KERNELS, reason="the operations")
@pytest.mark.parametrize("kind", KINDS)
def test_the_operations_keep_the_rules_of_torch(kind, device) -> None:
    x = randn(5, 8, dtype=torch.float32, device=device)
    dy = randn(5, 4 if kind == "swiglu" else 8, dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.lfs.activation.default, (kind, x))
    torch.library.opcheck(torch.ops.lfs.activation_backward.default, (kind, dy, x))
