"""AdamW of all tensors at once against torch's own: PyTorch's steps, and the kernel in Triton's interpreter."""

import pytest
import torch
from fused_cases import DTYPES, HAS_KERNELS, assert_near, randn
from torch import Tensor

from lfs_cli.kernels import adamw as module
from lfs_cli.kernels.adamw import AdamWTensors, unavailable

SHAPES = [(3,), (1,), (50, 3), (0,), (5000,)]  # the last crosses a block
SETTINGS = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}


def tensors(dtype: torch.dtype, device: str, *, master: bool = False) -> AdamWTensors:
    weights = [randn(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(SHAPES)]
    zeros = [[torch.zeros(shape, device=device) for shape in SHAPES] for _ in range(2)]
    return AdamWTensors(weights, *zeros, masters=[x.float() for x in weights] if master else None)


def gradients(step: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [randn(*shape, dtype=dtype, device=device, seed=100 * step + i) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("gradient_type", DTYPES, ids=str)
def test_three_steps_match_torch_in_float64(gradient_type, scale, device) -> None:
    ours = tensors(torch.float32, device)
    exact = [x.double().requires_grad_() for x in ours.weights]
    theirs = torch.optim.AdamW(exact, **SETTINGS)
    on_device = None if scale is None else torch.tensor(scale, device=device)

    for step in (1, 2, 3):
        drawn = gradients(step, gradient_type, device)
        ours.step(drawn, step, scale=on_device, **SETTINGS)
        for weight, gradient in zip(exact, drawn, strict=True):
            weight.grad = gradient.double() * (scale or 1)
        theirs.step()

    assert_near(ours.weights, [x.detach() for x in exact], 8)
    assert_near(ours.means, [theirs.state[x]["exp_avg"] for x in exact], 8)
    assert_near(ours.squares, [theirs.state[x]["exp_avg_sq"] for x in exact], 8)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
def test_with_a_master_small_steps_add_up(dtype, device) -> None:
    with_master, without = tensors(dtype, device, master=True), tensors(dtype, device)
    wide = tensors(torch.float32, device)
    for wide_weight, weight in zip(wide.weights, with_master.weights, strict=True):
        wide_weight.copy_(weight)

    for step in range(1, 21):
        for case in (with_master, without, wide):
            case.step(gradients(1, torch.float32, device), step, lr=1e-5, weight_decay=0)

    for master, narrow, stuck, right in zip(
        with_master.masters, with_master.weights, without.weights, wide.weights, strict=True
    ):
        assert torch.equal(master, right)
        assert torch.equal(narrow, right.to(dtype))
        assert right.numel() < 100 or not torch.equal(stuck, narrow)


def test_the_last_gradients_count_even_at_new_addresses(device) -> None:
    ours, again = tensors(torch.float32, device), tensors(torch.float32, device)
    for step in (1, 2):
        drawn = gradients(step, torch.float32, device)
        ours.step(drawn, step, **SETTINGS)
        again.step([x.clone() for x in drawn], step, **SETTINGS)
    assert all(map(torch.equal, ours.weights, again.weights))


def test_other_tensors_at_the_same_addresses_are_not_taken_for_its_own() -> None:
    w, m, v = (torch.ones(4) for _ in range(3))
    case = AdamWTensors([w], [m], [v])
    assert case.holds([w], [m], [v])
    assert not case.holds([w], [m[:2]], [v])
    assert not case.holds([w, w], [m, m], [v, v])


def test_no_tensors_are_no_trouble() -> None:
    AdamWTensors([], [], []).step([], 1, lr=1.0)


def test_what_cannot_work_is_refused() -> None:
    w = torch.ones(3)
    with pytest.raises(ValueError, match="means and weights differ"):
        AdamWTensors([w], [], [w])
    case = AdamWTensors([w], [w.clone()], [w.clone()])
    with pytest.raises(ValueError, match="gradients and weights differ"):
        case.step([], 1, lr=1.0)
    with pytest.raises(ValueError, match="count from 1, got 0"):
        case.step([w], 0, lr=1.0)


@pytest.mark.parametrize(
    ("weights", "state", "reason"),
    [
        ([torch.ones(3)], [torch.ones(3, dtype=torch.bfloat16)], "its state in float32"),
        ([torch.ones(2, 3).T], [torch.ones(3, 2)], "contiguous"),
        ([torch.ones(3), torch.ones(3).half()], [torch.ones(3)] * 2, "weights are of several types"),
        ([torch.ones(3)], [torch.ones(3, device="meta")], "several devices"),
    ],
)
def test_what_has_no_kernel_says_so(weights, state, reason) -> None:
    assert reason in (unavailable(AdamWTensors(weights, state, state), weights) or "")


def test_the_kernel_runs_where_it_can(device, monkeypatch) -> None:
    monkeypatch.setattr(module, "_reference_step", lambda *_: None)
    ours, before = tensors(torch.float32, device), tensors(torch.float32, device)
    ours.step(gradients(1, torch.float32, device), 1, **SETTINGS)
    assert torch.equal(ours.weights[0], before.weights[0]) != HAS_KERNELS
