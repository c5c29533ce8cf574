"""AdamW by its kernel: as by PyTorch's operations, whatever happens to weights, gradients and state in between."""

import copy
import warnings

import pytest
import torch
from fused_cases import DTYPES, HAS_KERNELS, assert_near, randn, waiting_refused
from torch import nn

from lfs_cli.kernels import adamw as module
from lfs_cli.kernels.adamw import AdamWTensors, is_usable
from lfs_cli.optimizers import AdamW, Optimizer, clip_gradients, clip_scale

SHAPES = [(50, 3), (1,), (3,), (2100,), (0,)]
SETTINGS = {"lr": 0.03, "betas": (0.8, 0.999), "eps": 1e-6, "weight_decay": 0.2}

pytestmark = pytest.mark.usefixtures("forgets_checks")
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="needs a GPU or Triton's interpreter")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of weights that each launch of the kernel has moved; the self-check has taken place before."""
    moved, launch = [], AdamWTensors._launch
    for scaled in (False, True):
        is_usable(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), *DTYPES[:1] * 2, is_scaled=scaled)

    def counted(self, *arguments) -> None:
        moved.append(len(self.weights))
        launch(self, *arguments)

    monkeypatch.setattr(AdamWTensors, "_launch", counted)
    return moved


def drawn_weights(device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, dtype=dtype, device=device, seed=i)) for i, shape in enumerate(SHAPES)]


def give_gradients(step: int, *lists: list[nn.Parameter], without: tuple[int, ...] = ()) -> None:
    for weights in lists:
        for i, weight in enumerate(weights):
            gradient = 3 * randn(*weight.shape, dtype=weight.dtype, device=weight.device, seed=100 * step + i)
            weight.grad = None if i in without else gradient


class Plain(AdamW):
    """Has no kernel, being another class."""


def pair(device: str) -> tuple[list[nn.Parameter], AdamW, list[nn.Parameter], AdamW]:
    ours, right = drawn_weights(device), drawn_weights(device)
    return ours, AdamW(ours, **SETTINGS), right, Plain(right, **SETTINGS)


def clipped_step(weights: list[nn.Parameter], optimizer: AdamW, clip: float = 1.0) -> None:
    optimizer.step(scale=clip_scale(weights, clip)[1])


def assert_equal_but_for_rounding(ours, optimizer, right, other) -> None:
    assert_near([x.detach() for x in ours], [x.detach() for x in right], 16)
    for weight, exact in zip(ours, right, strict=True):
        mine, theirs = optimizer.state.get(weight, {}), other.state.get(exact, {})
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if name == "step":
                assert type(value) is int
                assert value == theirs[name]
            elif value.numel():
                torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6 * float(theirs[name].abs().max()))


@needs_kernels
@pytest.mark.parametrize("clip", [1.0, 1e9, float("inf")])
def test_the_kernel_moves_all_weights_at_once_and_as_the_operations_do(clip, device, launches) -> None:
    ours, optimizer, right, other = pair(device)
    for step in range(5):
        give_gradients(step, ours, right)
        clipped_step(ours, optimizer, clip)
        clipped_step(right, other, clip)

    assert launches == [len(SHAPES)] * 5
    assert_equal_but_for_rounding(ours, optimizer, right, other)


@needs_kernels
def test_the_kernel_scales_gradients_as_it_reads_them(device, launches) -> None:
    ours, optimizer, right, other = pair(device)
    give_gradients(0, ours, right)
    before = [weight.grad.clone() for weight in ours]

    clipped_step(ours, optimizer)
    clip_gradients(right, 1.0)
    other.step()

    assert launches
    assert all(torch.equal(weight.grad, gradient) for weight, gradient in zip(ours, before, strict=True))
    assert_equal_but_for_rounding(ours, optimizer, right, other)


@needs_kernels
def test_weights_may_lack_a_gradient_at_times(device, launches) -> None:
    ours, optimizer, right, other = pair(device)
    for step, without in enumerate([(), (1,), (1, 3), (), (0,), ()]):
        give_gradients(step, ours, right, without=without)
        clipped_step(ours, optimizer)
        clipped_step(right, other)

    assert launches[:4] == [5, 4, 3, 3]  # those that missed steps go by themselves
    assert_equal_but_for_rounding(ours, optimizer, right, other)


@needs_kernels
def test_a_state_that_was_loaded_is_the_one_that_moves(device, launches) -> None:
    ours, optimizer, right, other = pair(device)
    saved = []
    for step in range(6):
        if step == 2:
            saved = [copy.deepcopy(each.state_dict()) for each in (optimizer, other)]
        if step == 4:
            optimizer.load_state_dict(saved[0])
            other.load_state_dict(saved[1])
        give_gradients(step, ours, right)
        clipped_step(ours, optimizer)
        clipped_step(right, other)

    assert len(launches) == 6
    assert optimizer.state[ours[0]]["step"] == 4
    assert_equal_but_for_rounding(ours, optimizer, right, other)


@needs_kernels
def test_loading_gives_the_memory_of_the_old_state_free(device, launches) -> None:
    ours, optimizer, *_ = pair(device)
    give_gradients(0, ours)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())

    optimizer.load_state_dict(saved)

    assert launches
    assert not optimizer._fused


@needs_kernels
@pytest.mark.parametrize("what", ["weights", "state"])
def test_tensors_that_were_replaced_or_moved_are_left_alone(what, device, launches) -> None:
    ours, optimizer, right, other = pair(device)
    old = []
    for step in range(4):
        if step == 2:
            for weight in ours:
                if what == "weights":  # as `module.to()` does it
                    old.append((weight.data, weight.data.clone()))
                    weight.data = weight.data.clone()
                else:
                    state = optimizer.state[weight]
                    old += [(state[name], state[name].clone()) for name in ("mean", "square")]
                    state.update({name: state[name].clone() for name in ("mean", "square")})
        give_gradients(step, ours, right)
        clipped_step(ours, optimizer)
        clipped_step(right, other)

    assert len(launches) == 4
    assert all(torch.equal(tensor, before) for tensor, before in old)
    assert_equal_but_for_rounding(ours, optimizer, right, other)


@needs_kernels
def test_a_copy_of_an_optimizer_moves_its_own_weights(device, launches) -> None:
    ours, optimizer, right, other = pair(device)
    give_gradients(0, ours, right)
    clipped_step(ours, optimizer)
    clipped_step(right, other)
    before = [weight.detach().clone() for weight in ours]

    twin, twins = copy.deepcopy((optimizer, ours))
    give_gradients(1, twins, right)
    clipped_step(twins, twin)
    clipped_step(right, other)

    assert len(launches) == 2
    assert all(torch.equal(weight, kept) for weight, kept in zip(ours, before, strict=True))
    assert_equal_but_for_rounding(twins, twin, right, other)


@needs_kernels
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
def test_narrow_weights_are_moved_as_they_are(dtype, device) -> None:
    ours, right = (drawn_weights(device, dtype) for _ in range(2))
    optimizer, other = AdamW(ours, **SETTINGS), Plain(right, **SETTINGS)
    for step in range(3):
        give_gradients(step, ours, right)
        clipped_step(ours, optimizer)
        clipped_step(right, other)

    assert optimizer._fused
    assert {state["mean"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert_near([x.detach() for x in ours], [x.detach() for x in right], 4)


@needs_kernels
@pytest.mark.parametrize("why", ["float64", "columns", "an operation of its own"])
def test_where_the_kernel_cannot_run_the_operations_do(why, device, launches) -> None:
    weight = nn.Parameter(randn(4, 3, dtype=torch.float32, device=device))
    if why == "float64":
        weight = nn.Parameter(weight.data.double())
    elif why == "columns":
        weight = nn.Parameter(weight.data.T)
    optimizer = (Plain if why == "an operation of its own" else AdamW)([weight], lr=0.1, weight_decay=0)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)

    optimizer.step(scale=torch.tensor(0.5, device=device))

    assert not launches
    torch.testing.assert_close(weight.detach(), before - 0.1, rtol=1e-5, atol=1e-5)


def test_addresses_are_sent_again_only_when_they_change(device, monkeypatch) -> None:
    sent, send = [], module.on_device
    monkeypatch.setattr(module, "on_device", lambda addresses, where: sent.append(addresses) or send(addresses, where))
    made, make = [], module.block_tables
    monkeypatch.setattr(module, "block_tables", lambda sizes, *how: made.append(sizes) or make(sizes, *how))
    monkeypatch.setattr(module, "unavailable", lambda *_: None)
    if not HAS_KERNELS:
        monkeypatch.setattr(module, "_step", {(1,): lambda *_, **__: None})
        monkeypatch.setattr(module, "tl", pytest.importorskip("triton").language)
    w, first, second = (torch.ones(3, device=device) for _ in range(3))
    tensors = AdamWTensors([w], [torch.zeros_like(w)], [torch.zeros_like(w)])

    for step, gradient in enumerate((first, first, second, first), 1):
        tensors.step([gradient], step, lr=0.1)

    assert sent[-3:] == [[x.data_ptr()] for x in (first, second, first)]
    assert len(sent) == 3 + 3  # with the addresses of weights and state
    assert made == [[3]]


def raise_what_a_compiler_may(_: AdamWTensors) -> None:
    raise RuntimeError("no such instruction\nand much more")


FAULTS = {
    "wrong weights": lambda tensors: tensors.weights[0].add_(1e-4),
    "wrong means": lambda tensors: tensors.means[0].mul_(1 + 1e-4),
    "wrong squares": lambda tensors: tensors.squares[0].mul_(1 + 1e-4),
    "not a number": lambda tensors: tensors.weights[-1].fill_(float("nan")),
    "does not compile": raise_what_a_compiler_may,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_fails_its_check_is_passed_over_with_a_warning(fault, device, monkeypatch) -> None:
    def broken(self, gradients, scale, numbers) -> None:
        module._reference_step(self, gradients, scale, *numbers)
        FAULTS[fault](self)

    monkeypatch.setattr(module, "unavailable_reason", lambda *_: None)
    monkeypatch.setattr(AdamWTensors, "_launch", broken)
    ours, optimizer, right, other = pair(device)
    give_gradients(0, ours, right)
    with pytest.warns(RuntimeWarning, match="the AdamW kernel fails its self-check on .* and is not used") as caught:
        clipped_step(ours, optimizer)
    clipped_step(right, other)
    give_gradients(1, ours, right)
    clipped_step(ours, optimizer)  # without another warning, which would be an error
    clipped_step(right, other)

    assert ("no such instruction" in str(caught[0].message)) == (fault == "does not compile")
    assert all(map(torch.equal, ours, right))


def test_a_kernel_that_is_right_is_trusted_without_a_word(device, monkeypatch) -> None:
    if not HAS_KERNELS:
        monkeypatch.setattr(module, "unavailable_reason", lambda _, dtype: "none" if dtype == torch.float64 else None)
        monkeypatch.setattr(
            AdamWTensors, "_launch", lambda self, g, s, numbers: module._reference_step(self, g, s, *numbers)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(
            is_usable(torch.device(device), weight, gradient, is_scaled=is_scaled)
            for weight in DTYPES
            for gradient in DTYPES
            for is_scaled in (False, True)
        )
        assert not is_usable(torch.device("meta"), torch.float64, torch.float64, is_scaled=False)


@pytest.mark.gpu
def test_twenty_clipped_steps_on_a_gpu_are_those_of_torch_in_float64() -> None:
    ours = drawn_weights("cuda")
    exact = [nn.Parameter(weight.detach().double()) for weight in ours]
    optimizer, theirs = AdamW(ours, **SETTINGS), torch.optim.AdamW(exact, **SETTINGS)
    for step in range(20):
        give_gradients(step, ours)
        for weight, judge in zip(ours, exact, strict=True):
            judge.grad = weight.grad.double()
        clipped_step(ours, optimizer, clip=5.0)
        torch.nn.utils.clip_grad_norm_(exact, 5.0)
        theirs.step()

    assert optimizer._fused
    assert_near([x.detach() for x in ours], [x.detach() for x in exact], 64)


@pytest.mark.gpu
def test_no_step_of_the_kernel_waits_for_the_gpu() -> None:
    """Also not when addresses change, which may arrive only after many more steps are asked for."""
    ours, optimizer, right, other = pair("cuda")
    gradients = [[randn(*shape, dtype=torch.float32, device="cuda", seed=i) for i, shape in enumerate(SHAPES)]] * 2
    gradients = [[x.clone() * (1 + step) for x in gradients[step % 2]] for step in range(50)]

    def steps(weights: list[nn.Parameter], optimizer: Optimizer) -> None:
        for each in gradients:
            for weight, gradient in zip(weights, each, strict=True):
                weight.grad = gradient
            optimizer.step()

    steps(right, other)
    give_gradients(0, ours)
    twin = AdamW([nn.Parameter(x.detach().clone()) for x in ours], **SETTINGS)
    for weight in twin.param_groups[0]["params"]:
        weight.grad = torch.zeros_like(weight)
    twin.step()  # compiles and checks itself
    with waiting_refused():
        steps(ours, optimizer)

    assert_near([x.detach() for x in ours], [x.detach() for x in right], 128)
