"""The loss without logits against the definition in float64: PyTorch's steps, and the kernel in Triton's interpreter.

`test_kernels_without_a_gpu.py` starts the second run, in a process of its own.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lfs_cli.kernels import linear_cross_entropy as module
from lfs_cli.kernels.linear_cross_entropy import linear_cross_entropy, reference_linear_cross_entropy
from lfs_cli.model import next_token_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_KERNEL = INTERPRETED or torch.cuda.is_available()
SHAPES = [  # R, V, C
    (1, 1, 1),
    (5, 2, 3),
    (17, 63, 8),
    (40, 64, 16),
    (131, 97, 5),  # two chunks of the kernel, blocks that the vocabulary crosses
]
OPTIONS = [
    {},
    {"softcap": 1.5},
    {"z_loss": 0.3},
    {"ignored": 1},
    {"softcap": 2.0, "z_loss": 0.1, "ignored": 0},
]
DTYPES = [torch.float32, torch.float16]
if not INTERPRETED:  # which truncates where a GPU rounds
    DTYPES.append(torch.bfloat16)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of as few rows as there can be, and blocks that a vocabulary of 97 crosses."""
    for device in module.CHUNK_BYTES:
        monkeypatch.setitem(module.CHUNK_BYTES, device, 1)
    monkeypatch.setattr(module, "BLOCK_V", 16)


def draw(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    R, V, C = shape
    generator = torch.Generator().manual_seed(R)
    hidden, weight = (torch.randn(n, C, generator=generator).to(device, dtype) for n in (R, V))
    return hidden, weight, torch.randint(V, (R,), generator=generator).to(device)


def run(function: Callable, hidden: Tensor, weight: Tensor, targets: Tensor, **how: Any) -> list[Tensor]:
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(*leaves, targets, **how)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.7))]


CASES = [(shape, {}) for shape in SHAPES] + [(SHAPES[2], how) for how in OPTIONS]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "how"), CASES, ids=str)
def test_loss_and_gradients_match_float64(shape, how, dtype, device, poisoned) -> None:
    hidden, weight, targets = draw(shape, dtype, device)

    ours = run(linear_cross_entropy, hidden, weight, targets, **how)
    exact = run(reference_linear_cross_entropy, hidden.double(), weight.double(), targets, **how)

    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    for mine, right in zip(ours, exact, strict=True):
        allowed = torch.finfo(dtype).eps * (12 * right.abs().max() + 1)  # a is rounded to the type, and may be 10
        assert (mine.double() - right).abs().max() <= allowed


@pytest.mark.skipif(not HAS_KERNEL, reason="the kernel")
@pytest.mark.parametrize("how", [{"z_loss": 1e-4}, {"z_loss": 0.3}, {"softcap": 2.0, "z_loss": 0.1}], ids=str)
def test_the_kernels_z_loss_is_that_of_the_steps_in_torch(how, device, poisoned, monkeypatch) -> None:
    drawn = draw((131, 97, 5), torch.float32, device)

    fused = run(next_token_loss, *drawn, **how)
    monkeypatch.setattr(module, "_is_usable", lambda *_: False)
    plain = run(next_token_loss, *drawn, **how)

    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_torch_agrees_with_the_reference() -> None:
    hidden, weight, targets = draw((40, 64, 16), torch.float64, "cpu")
    targets[3:9] = -100

    theirs = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)

    torch.testing.assert_close(reference_linear_cross_entropy(hidden, weight, targets), theirs)


@pytest.mark.parametrize("how", OPTIONS, ids=str)
def test_what_lies_behind_the_vocabulary_is_not_computed_with(how, device, monkeypatch) -> None:
    """Memory that nothing has written may hold any bits: here signaling NaN, at which the interpreter stops."""
    real = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        tensor = real(*args, **kwargs)
        if tensor.dtype == torch.float32:
            tensor.view(torch.int32).fill_(0x7FA00000)
        return tensor

    drawn = draw((17, 63, 8), torch.float32, device)
    exact = run(reference_linear_cross_entropy, *(x.double() for x in drawn[:2]), drawn[2], **how)
    monkeypatch.setattr(torch, "empty", filled)
    for mine, right in zip(run(linear_cross_entropy, *drawn, **how), exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


def test_equal_runs_are_equal_to_the_bit_and_chunks_change_next_to_nothing(device, monkeypatch) -> None:
    drawn = draw((131, 40, 8), torch.float32, device)
    first, second = run(linear_cross_entropy, *drawn), run(linear_cross_entropy, *drawn)
    monkeypatch.setitem(module.CHUNK_BYTES, device, 2**20)
    whole = run(linear_cross_entropy, *drawn)

    for once, again, at_once in zip(first, second, whole, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(once, at_once, rtol=1e-6, atol=1e-7)


def test_where_no_row_counts_there_is_no_loss_and_no_gradient(device) -> None:
    hidden, weight, _ = draw((5, 7, 3), torch.float32, device)
    loss, dh, dweight = run(linear_cross_entropy, hidden, weight, torch.full((5,), -100, device=device))

    assert loss == 0
    assert not dh.any()
    assert not dweight.any()


def test_rows_that_do_not_count_change_nothing(device) -> None:
    hidden, weight, targets = draw((40, 30, 8), torch.float32, device)
    padded = torch.cat((hidden, 100 * torch.ones(9, 8, device=device)))
    padded_targets = torch.cat((targets, torch.full((9,), -100, device=device)))

    loss, dh, dweight = run(linear_cross_entropy, padded, weight, padded_targets)
    expected = run(linear_cross_entropy, hidden, weight, targets)

    for mine, right in zip((loss, dh[:40], dweight), expected, strict=True):
        torch.testing.assert_close(mine, right)
    assert not dh[40:].any()


@pytest.mark.skipif(INTERPRETED, reason="too many rows")
def test_small_gradients_survive_float16(device) -> None:
    hidden, weight, targets = draw((2000, 64, 16), torch.float16, device)

    dweight = run(linear_cross_entropy, hidden, weight, targets)[2]
    exact = run(reference_linear_cross_entropy, hidden.double(), weight.double(), targets)[2]

    assert (dweight - exact).norm() < 2e-3 * exact.norm()  # da / n would have lost half its digits


class _Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        self.numbers = max(self.numbers, *(x.numel() for x in tensors), 0) if tensors else self.numbers
        return result


@pytest.mark.skipif(INTERPRETED, reason="the interpreter copies what a kernel gets")
def test_the_logits_are_never_whole(device) -> None:
    drawn = draw((1000, 256, 4), torch.float32, device)

    with _Largest() as largest:
        run(linear_cross_entropy, *drawn, softcap=3.0)

    assert largest.numbers <= 128 * 256  # of 1000 x 256


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own, in 2.13
@pytest.mark.parametrize("how", [{}, {"softcap": 2.0, "z_loss": 0.1}], ids=str)
def test_compiled_it_is_one_operation_with_the_same_bits(how, device) -> None:
    drawn = draw((40, 30, 8), torch.float32, device)

    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)

    for mine, right in zip(run(compiled, *drawn, **how), run(linear_cross_entropy, *drawn, **how), strict=True):
        assert torch.equal(mine, right)


def test_the_operation_keeps_the_rules_of_torch(device) -> None:
    hidden, weight, targets = draw((40, 30, 8), torch.float32, device)
    for dtype, wanted in (
        (torch.float32, (True, True)),
        (torch.bfloat16, (True, False)),
        (torch.float32, (False,) * 2),
    ):
        if not (INTERPRETED and dtype == torch.bfloat16):
            arguments = (hidden, weight, targets, dtype, None, 0.0, -100, *wanted)
            torch.library.opcheck(torch.ops.lfs.linear_cross_entropy.default, arguments)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates to bfloat16")
def test_under_autocast_the_weights_gradient_is_summed_and_returned_in_float32(device) -> None:
    hidden, weight, targets = draw((64, 97, 16), torch.float32, device)

    with torch.autocast(device, torch.bfloat16):
        loss, dh, dweight = run(linear_cross_entropy, hidden, weight, targets)
    exact = run(reference_linear_cross_entropy, hidden.double(), weight.double(), targets)

    assert loss.dtype == dh.dtype == dweight.dtype == torch.float32
    for mine, right in zip((loss, dh, dweight), exact, strict=True):
        assert (mine - right).norm() < 1e-2 * right.norm()


@pytest.mark.skipif(not HAS_KERNEL, reason="the kernel")
def test_an_unknown_target_makes_the_kernels_loss_not_a_number(device) -> None:
    hidden, weight, targets = draw((5, 7, 3), torch.float32, device)
    targets[2] = 7
    assert linear_cross_entropy(hidden, weight, targets).isnan()


@pytest.mark.skipif(HAS_KERNEL, reason="PyTorch's steps")
def test_an_unknown_target_raises_elsewhere() -> None:
    hidden, weight, targets = draw((5, 7, 3), torch.float32, "cpu")
    targets[2] = 7
    with pytest.raises((IndexError, RuntimeError), match="index"):
        linear_cross_entropy(hidden, weight, targets)


def test_the_kernel_runs_where_it_can() -> None:
    reason = module.unavailable_reason("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    assert (reason is None) == HAS_KERNEL
    assert module.unavailable_reason("cuda", torch.float64) in ("it has no float64", "Triton is not installed")


def _right(*tensors: Any, launch: Callable[..., None]) -> Tensor:
    return module._by_torch(*tensors)


def _wrong(*tensors: Any, launch: Callable[..., None]) -> Tensor:
    loss = module._by_torch(*tensors)
    tensors[-1].mul_(1.1)  # the gradient of the head
    return loss


def _broken(*_: Any, launch: Callable[..., None]) -> Tensor:
    raise RuntimeError("PassManager::run failed\nmore")


@pytest.mark.usefixtures("forgets_checks")
@pytest.mark.parametrize(
    ("kernel", "problem"),
    [(_right, None), (_wrong, "it is off by .*, 0.1,"), (_broken, "RuntimeError: PassManager::run failed")],
    ids=["right", "wrong", "broken"],
)
def test_a_kernel_that_fails_its_self_check_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor], problem: str | None
) -> None:
    monkeypatch.setattr(module, "unavailable_reason", lambda *_: None)
    monkeypatch.setattr(module, "_by_kernel", kernel)
    tensors = draw((17, 63, 8), torch.float32, "cpu")
    expected = run(reference_linear_cross_entropy, *(x.double() if x.is_floating_point() else x for x in tensors))
    said = f"the cross-entropy kernel fails its self-check on cpu and is not used: {problem}"
    with nullcontext() if problem is None else pytest.warns(RuntimeWarning, match=said):
        found = run(linear_cross_entropy, *tensors)
    assert module._is_usable(torch.device("cpu"), torch.float32) == (problem is None)  # and warns no more
    for exact, ours in zip(expected, found, strict=True):
        assert torch.allclose(ours.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_VC": torch.ones(7, 4)}, "expected hidden"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "expected hidden"),
        ({"softcap": 0.0}, "softcap must be above 0, got 0.0"),
        ({"z_loss": -1.0}, "z_loss must not be negative, got -1.0"),
    ],
)
def test_what_cannot_work_is_refused(change, message) -> None:
    good = {"hidden": torch.ones(5, 3), "weight_VC": torch.ones(7, 3), "targets": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**good, **change})
