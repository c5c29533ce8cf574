"""Muon by its kernels: as by PyTorch's operations, on matrices of any shape, whatever happens in between."""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from fused_cases import DTYPES, HAS_KERNELS, assert_near, randn, waiting_refused
from torch import Tensor, nn

from lfs_cli.kernels import muon as module
from lfs_cli.kernels.muon import TILE, MuonTensors, is_usable, unavailable
from lfs_cli.kernels.self_check import LARGEST_ERROR
from lfs_cli.optimizers import clip_scale
from lfs_cli.optimizers.muon import Muon, _iteration_type

WIDE, TALL = (TILE + 1, 2 * TILE + 3), (2 * TILE + 3, TILE + 1)  # which share a stack, and cross tiles both ways
SHAPES = [TALL, (32, 48), (7, 7), WIDE, (48, 32), (5,), (2, 48, 32), (3, 2, 6, 4), (1, 9), (9, 1), TALL, (80, 80)]
OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.3}

pytestmark = pytest.mark.usefixtures("forgets_checks")
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="needs a GPU or Triton's interpreter")


class Plain(Muon):
    """Has no kernels, being another class."""


@pytest.fixture
def launches(device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of weights that each step of the kernels has moved; the self-checks have taken place before."""
    moved, launch = [], MuonTensors._launch
    where = torch.zeros(1, device=device)
    for nesterov in (False, True):
        for scaled in (False, True):
            is_usable(where.device, _iteration_type(where), is_nesterov=nesterov, is_scaled=scaled)

    def counted(self, *arguments) -> None:
        moved.append(len(self.weights))
        launch(self, *arguments)

    monkeypatch.setattr(MuonTensors, "_launch", counted)
    return moved


def drawn_weights(device: str, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, dtype=torch.float32, device=device, seed=i)) for i, shape in enumerate(shapes)]


def give_gradients(step: int, *lists: list[nn.Parameter], without: tuple[int, ...] = ()) -> None:
    for weights in lists:
        for i, weight in enumerate(weights):
            gradient = 3 * randn(*weight.shape, dtype=torch.float32, device=weight.device, seed=100 * step + i)
            weight.grad = None if i in without else gradient


Pair = tuple[list[nn.Parameter], Muon, list[nn.Parameter], Muon]


def pair(device: str, shapes: Sequence[tuple[int, ...]] = SHAPES, **options) -> Pair:
    ours, right = drawn_weights(device, shapes), drawn_weights(device, shapes)
    options = OPTIONS | options
    return ours, Muon(ours, **options), right, Plain(right, **options)


def step_both(case: Pair, step: int, *, clip: float | None = 1.0, without: tuple[int, ...] = ()) -> None:
    ours, optimizer, right, other = case
    give_gradients(step, ours, right, without=without)
    for weights, each in ((ours, optimizer), (right, other)):
        each.step(scale=None if clip is None else clip_scale(weights, clip)[1])


def assert_equal_but_for_rounding(case: Pair) -> None:
    """Iterations triple what was rounded differently: in bfloat16, small matrices are 2 to 4 % of a step apart."""
    ours, optimizer, right, other = case
    for start, weight, exact in zip(drawn_weights("cpu", [x.shape for x in ours]), ours, right, strict=True):
        allowed = 0.08 if weight.is_cuda else 1e-4
        moved = (exact - start.to(exact.device)).norm()
        assert (weight - exact).norm() <= allowed * moved
        mine, theirs = optimizer.state.get(weight, {}), other.state.get(exact, {})
        assert mine.keys() == theirs.keys()
        if mine:
            assert mine["step"] == theirs["step"]
            assert_near([mine["running"]], [theirs["running"]], 16)


@needs_kernels
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_kernels_move_all_weights_as_the_operations_do(nesterov, clip, device, launches, poisoned) -> None:
    case = pair(device, nesterov=nesterov)
    for step in range(4):
        step_both(case, step, clip=clip)

    assert launches == [len(SHAPES)] * 4
    assert_equal_but_for_rounding(case)


@needs_kernels
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(3 * 20, 24), (3 * 40, 24), (3 * 4, 3)], {"parts": 3}),
        ([(20, 24), (24, 20)], {"momentum_warmup": 3, "scale": "match_rms_adamw"}),
        ([(20, 24), (24, 20)], {"weight_decay": 0.0, "momentum": 0.0, "iterations": 0}),
        ([WIDE], {}),
        ([TALL], {}),
        ([(64, 64), (64, 64)], {}),
    ],
    ids=str,
)
def test_settings_mean_what_they_mean_to_the_operations(shapes, options, device, launches, poisoned) -> None:
    case = pair(device, shapes, **options)
    for step in range(3):
        step_both(case, step)

    assert launches == [len(shapes)] * 3
    assert_equal_but_for_rounding(case)


def a_step(
    weights: Sequence[Tensor], running: Sequence[Tensor], gradients: Sequence[Tensor], **options
) -> tuple[list[Tensor], list[Tensor]]:
    """One step without iterations; returns what they would have been given, and the weights."""
    given = []
    tensors = MuonTensors(weights, running, stack_type=options.pop("stack_type", torch.float32))
    keep = lambda x: given.append(x.clone()) or x  # noqa: E731  shorter so
    tensors.step(gradients, keep, lambda rows, columns: 10.0 * rows + columns, lr=0.1, weight_decay=0.5, **options)
    return given, list(weights)


@needs_kernels
@pytest.mark.parametrize("stack_type", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_what_surrounds_the_iterations_is_exact_to_rounding(scale, stack_type, device) -> None:
    drawn = [[randn(*shape, dtype=torch.float32, device=device, seed=s) for shape in SHAPES] for s in (1, 2, 3)]
    on_device = None if scale is None else torch.tensor(scale, device=device)

    given, weights = a_step(*[[x.clone() for x in each] for each in drawn], scale=on_device, stack_type=stack_type)
    exact, right = a_step(*[[x.double() for x in each] for each in drawn], scale=on_device)

    for ours, theirs in ((given, exact), (weights, right)):
        for mine, wanted in zip(ours, theirs, strict=True):
            assert mine.shape == wanted.shape
            assert (mine.double() - wanted).norm() <= LARGEST_ERROR[stack_type] * wanted.norm()


@needs_kernels
def test_matrices_of_a_shape_and_tall_ones_of_the_transposed_share_a_stack(device) -> None:
    shapes = [(48, 32), (32, 48), (2, 32, 48), (32, 32)]
    drawn = [[randn(*shape, dtype=torch.float32, device=device, seed=s) for shape in shapes] for s in (1, 2, 3)]
    given, _ = a_step(*drawn)
    assert [x.shape for x in given] == [(4, 32, 48), (1, 32, 32)]


@needs_kernels
def test_nothing_beside_the_matrices_is_written(device) -> None:
    """Numbers of tensors are parts of a larger memory, whose rest holds what no kernel writes."""
    lists, memories = [], []
    for seed in range(3):
        lists.append([])
        for shape in SHAPES:
            size = torch.Size(shape).numel()
            memories.append((torch.full((size + 2 * 4096,), 7.0, device=device), size))
            lists[-1].append(memories[-1][0][4096 : 4096 + size].view(shape))
            lists[-1][-1].copy_(randn(*shape, dtype=torch.float32, device=device, seed=seed))
    weights, running, gradients = lists
    before = [gradient.clone() for gradient in gradients]

    a_step(weights, running, gradients)

    assert all(map(torch.equal, gradients, before))
    for memory, size in memories:
        assert (memory[:4096] == 7).all()
        assert (memory[4096 + size :] == 7).all()


@needs_kernels
def test_equal_steps_are_equal_to_the_bit(device, launches) -> None:
    first, second = pair(device), pair(device)
    for step in range(2):
        for case in (first, second):
            step_both(case, step)
    assert launches
    assert all(map(torch.equal, first[0], second[0]))


@needs_kernels
def test_gradients_are_scaled_as_they_are_read(device, launches) -> None:
    ours, optimizer, *_ = pair(device)
    give_gradients(0, ours)
    before = [weight.grad.clone() for weight in ours]
    optimizer.step(scale=clip_scale(ours, 1.0)[1])
    assert launches
    assert all(torch.equal(weight.grad, gradient) for weight, gradient in zip(ours, before, strict=True))


@needs_kernels
def test_weights_may_lack_a_gradient_at_times(device, launches) -> None:
    case = pair(device, [(8, 6), (6, 8), (5, 5), (8, 6)])
    for step, without in enumerate([(), (1,), (1, 3), (), (0,), ()]):
        step_both(case, step, without=without)

    assert launches[:4] == [4, 3, 2, 2]  # those that missed steps go by themselves
    assert_equal_but_for_rounding(case)


@needs_kernels
def test_a_state_that_was_loaded_and_weights_that_were_moved_are_followed(device, launches) -> None:
    case = pair(device, [(8, 6), (6, 8), (5, 5)])
    ours, optimizer, _, other = case
    saved, old = [], []
    for step in range(8):
        if step == 2:
            saved = [copy.deepcopy(each.state_dict()) for each in (optimizer, other)]
        if step == 4:
            optimizer.load_state_dict(saved[0])
            other.load_state_dict(saved[1])
        if step == 6:
            old = [(weight.data, weight.data.clone()) for weight in ours]
            for weight in ours:  # as `module.to()` does it
                weight.data = weight.data.clone()
        step_both(case, step)

    assert len(launches) == 8
    assert all(torch.equal(tensor, before) for tensor, before in old)
    assert_equal_but_for_rounding(case)


@needs_kernels
def test_a_copy_of_an_optimizer_moves_its_own_weights(device, launches) -> None:
    ours, optimizer, right, other = pair(device, [(8, 6), (6, 8)])
    step_both((ours, optimizer, right, other), 0)
    before = [weight.detach().clone() for weight in ours]
    twin, twins = copy.deepcopy((optimizer, ours))
    case = twins, twin, right, other
    step_both(case, 1)

    assert len(launches) == 2
    assert all(torch.equal(weight, kept) for weight, kept in zip(ours, before, strict=True))
    assert_equal_but_for_rounding(case)


@needs_kernels
@pytest.mark.parametrize("why", ["float64", "float16", "columns", "a rule of its own"])
def test_where_the_kernels_cannot_run_the_operations_do(why, device, launches) -> None:
    start = randn(6, 4, dtype=torch.float32, device=device)
    start = {"float64": start.double(), "float16": start.half(), "columns": start.T}.get(why, start)
    kind = Plain if why == "a rule of its own" else Muon
    weight, right = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    for rule, moved in ((kind, weight), (Plain, right)):
        moved.grad = randn(*start.shape, dtype=torch.float32, device=device, seed=1).to(start.dtype)
        rule([moved]).step(scale=torch.tensor(0.5, device=device))

    assert not launches
    assert torch.equal(weight, right)
    assert not torch.equal(weight, start)


def test_no_tensors_and_empty_ones_are_no_trouble(device) -> None:
    MuonTensors([], []).step([], lambda x: x, lambda rows, columns: 1.0, lr=1.0)
    empty = [torch.ones(shape, device=device) for shape in ((0,), (0, 3), (2, 0))]
    MuonTensors(empty, empty).step(empty, lambda x: x, lambda rows, columns: 1.0, lr=1.0)


def test_what_cannot_work_is_refused() -> None:
    w = torch.ones(3)
    with pytest.raises(ValueError, match="running and weights differ"):
        MuonTensors([w], [])
    with pytest.raises(ValueError, match="gradients and weights differ"):
        MuonTensors([w], [w.clone()]).step([], lambda x: x, lambda rows, columns: 1.0, lr=1.0)


@pytest.mark.parametrize(
    ("weights", "gradients", "reason"),
    [
        ([torch.ones(3).half()], [torch.ones(3).half()], "float32"),
        ([torch.ones(2, 3).T], [torch.ones(3, 2)], "contiguous"),
        ([torch.ones(3), torch.ones(3, device="meta")], [torch.ones(3)] * 2, "several devices"),
    ],
)
def test_what_has_no_kernel_says_so(weights, gradients, reason) -> None:
    assert reason in (unavailable(MuonTensors(weights, weights), gradients) or "")


@pytest.mark.parametrize("why", ["columns", "float16"])
def test_what_has_no_kernel_moves_all_the_same(why, device) -> None:
    w, m, g = (randn(6, 4, dtype=torch.float32, device=device, seed=seed) for seed in range(3))
    odd = w.T.contiguous().T if why == "columns" else w.half()
    a_step([odd], [m.clone()], [g])
    _, (right,) = a_step([w.double()], [m.double()], [g.double()])
    assert_near([odd], [right], 8)


@needs_kernels
def test_a_matrix_of_zeros_has_no_direction(device) -> None:
    w = randn(6, 4, dtype=torch.float32, device=device)
    zeros = torch.zeros_like(w)
    (given,), (moved,) = a_step([w.clone()], [zeros.clone()], [zeros])
    assert not given.any()
    assert_near([moved], [0.95 * w], 2)


@needs_kernels
def test_gradients_count_too() -> None:
    w = torch.ones(3, device="cuda" if torch.cuda.is_available() else "cpu")
    assert "float32" in (unavailable(MuonTensors([w], [w]), [w.half()]) or "")
    assert "several devices" in (unavailable(MuonTensors([w], [w]), [w.to("meta")]) or "")


def raise_what_a_compiler_may(_: MuonTensors) -> None:
    raise RuntimeError("no such instruction\nand much more")


FAULTS: dict[str, Callable[[MuonTensors], object]] = {
    "wrong weights": lambda tensors: tensors.weights[0].mul_(1.02),
    "wrong running gradients": lambda tensors: tensors.running[-1].mul_(1 + 1e-4),
    "not a number": lambda tensors: tensors.weights[-1].fill_(float("nan")),
    "does not compile": raise_what_a_compiler_may,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kernels_that_fail_their_check_are_passed_over_with_a_warning(fault, device, monkeypatch) -> None:
    def broken(self, *arguments) -> None:
        module._reference_step(self, *arguments)
        FAULTS[fault](self)

    monkeypatch.setattr(module, "unavailable_reason", lambda *_: None)
    monkeypatch.setattr(MuonTensors, "_launch", broken)
    case = pair(device, [(8, 6), (6, 8)])
    with pytest.warns(RuntimeWarning, match="the Muon kernel fails its self-check on .* and is not used") as caught:
        step_both(case, 0)
    step_both(case, 1)  # without another warning, which would be an error

    assert ("no such instruction" in str(caught[0].message)) == (fault == "does not compile")
    assert all(map(torch.equal, case[0], case[2]))


def test_kernels_that_are_right_are_trusted_without_a_word(device, monkeypatch) -> None:
    if not HAS_KERNELS:
        monkeypatch.setattr(module, "unavailable_reason", lambda _, dtype: "none" if dtype == torch.float64 else None)
        monkeypatch.setattr(MuonTensors, "_launch", module._reference_step)
    where = torch.zeros(1, device=device).device
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check = partial(is_usable, where)
        assert all(
            check(dtype, is_nesterov=nesterov, is_scaled=scaled)
            for dtype in DTYPES
            for nesterov in (True, False)
            for scaled in (True, False)
        )
        assert not is_usable(torch.device("meta"), torch.float64, is_nesterov=True, is_scaled=True)


@needs_kernels
def test_addresses_are_sent_again_only_when_they_change(device, monkeypatch) -> None:
    sent, send = [], module.on_device
    monkeypatch.setattr(module, "on_device", lambda addresses, where: sent.append(addresses) or send(addresses, where))
    w, m, first, second = (torch.ones(2, 3, device=device) for _ in range(4))
    tensors = MuonTensors([w], [m], stack_type=_iteration_type(w))

    for gradient in (first, first, second, first):
        tensors.step([gradient], lambda x: x, lambda rows, columns: 1.0, lr=0.1)

    assert sent == [[x.data_ptr()] for x in (w, m, first, second, first)]


@pytest.mark.gpu
def test_twenty_clipped_steps_on_a_gpu_are_those_of_the_operations() -> None:
    case = pair("cuda", [(768, 768), (768, 768), (3072, 768), (768, 3072), (2304, 768), (7, 11), (5,)])
    for step in range(20):
        step_both(case, step, clip=5.0)
    assert case[1]._fused
    assert_equal_but_for_rounding(case)


@pytest.mark.gpu
def test_no_step_of_the_kernels_waits_for_the_gpu() -> None:
    """Also not when addresses change, which may arrive only after many more steps are asked for."""
    case = ours, optimizer, right, other = pair("cuda")
    step_both(case, 0)  # compiles and checks itself
    give_gradients(1, ours)
    gradients = [[weight.grad * (1 + step) for weight in ours] for step in range(20)]

    def steps(weights: list[nn.Parameter], optimizer: Muon) -> None:
        for each in gradients:
            for weight, gradient in zip(weights, each, strict=True):
                weight.grad = gradient
            optimizer.step(scale=scale)

    scale = torch.tensor(0.5, device="cuda")
    with waiting_refused():
        steps(ours, optimizer)
    steps(right, other)  # multiplies the gradients where they lie

    assert_equal_but_for_rounding(case)
