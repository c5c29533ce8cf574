"""SwiGLU, SiLU and squared ReLU against float64: PyTorch's steps, and the kernels in Triton's interpreter."""

import pytest
import torch
from fused_cases import DTYPES, HAS_KERNELS, assert_near, differentiate, randn, stand_in

from lfs_cli.kernels import swiglu as module
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


BROKEN = {
    "a wrong result": ("_launch_forward", lambda kind, x: 1.001 * reference_activation(kind, x)),
    "not a number": ("_launch_forward", lambda kind, x: reference_activation(kind, x) * float("nan")),
    "a wrong gradient": ("_launch_backward", lambda kind, dy, x: module._reference_backward(kind, dy, x.abs())),
    "no kernel": ("_launch_backward", lambda kind, dy, x: [][0]),
}


@pytest.mark.parametrize("is_compiled", [False, True], ids=["as written", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", BROKEN)
def test_kernels_that_fail_their_check_are_passed_over_with_a_warning(
    fault: str, kind: str, is_compiled: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(module, monkeypatch, forward=reference_activation)
    monkeypatch.setattr(module, *BROKEN[fault])
    torch._dynamo.reset()
    function = torch.compile(KINDS[kind], backend="aot_eager") if is_compiled else KINDS[kind]
    x = randn(3, 14, dtype=torch.float32, device=device)

    with pytest.warns(RuntimeWarning, match=f"the {kind} kernel fails its self-check on {device}.* and is not used"):
        ours = differentiate(function, [x])

    assert_near(ours, differentiate(lambda x: reference_activation(kind, x), [x.double()]))
    differentiate(function, [x])  # without another warning, which would be an error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_that_are_right_are_used_without_a_word(
    kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = stand_in(module, monkeypatch, forward=reference_activation)
    differentiate(KINDS[kind], [randn(3, 14, dtype=dtype, device=device)])
    assert launched == ["forward", "backward"] * 2  # the check, then the call
