"""What every registered optimizer must do, torch as the judge of ours, and a new one in ten lines."""

import copy
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lfs_cli.config import OptimizerGroup
from lfs_cli.errors import ConfigError
from lfs_cli.optimizers import OPTIMIZERS, SGD, Adafactor, AdamW, Lion, Optimizer, adamw, build_optimizers, lion

SIGNUM = """
from lfs_cli.optimizers import OPTIMIZERS, Optimizer

@OPTIMIZERS.register("{name}")
class Signum(Optimizer):
    def __init__(self, params, *, lr=1e-4, momentum=0.9, weight_decay=0.0):
        super().__init__(params, {{"lr": lr, "momentum": momentum, "weight_decay": weight_decay}})

    def start(self, weight):
        return {{"mean": weight.new_zeros(weight.shape)}}

    def update(self, weight, gradient, state, group):
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(state["mean"].lerp_(gradient, 1 - group["momentum"]).sign(), alpha=group["lr"])
"""


class Bowl(nn.Module):
    """A quadratic with one valley: the loss is 0 where the weights are 1."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.vector = nn.Parameter(torch.randn(3, generator=generator))

    def forward(self) -> Tensor:
        steep = torch.arange(1.0, 4.0)
        return (steep * (self.matrix - 1) ** 2).sum() + (steep * (self.vector - 1) ** 2).sum()


def descend(bowl: Bowl, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = bowl()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def build(name: str, bowl: nn.Module, lr: float = 0.01, **options) -> torch.optim.Optimizer:
    return OPTIMIZERS.create(name, bowl.parameters(), lr=lr, **options)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_lowers_a_quadratic(name) -> None:
    shares = []
    for lr in (0.01, 0.1):  # what a rate means differs: Muon's is the size of a whole matrix' step
        bowl = Bowl()
        losses = descend(bowl, build(name, bowl, lr), 100)
        shares.append(losses[-1] / losses[0])

    assert min(shares) < 0.5


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_is_deterministic(name) -> None:
    first, second = (descend(bowl, build(name, bowl), 20) for bowl in (Bowl(), Bowl()))

    assert first == second


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_goes_on_after_saving_and_loading(name) -> None:
    bowl = Bowl()
    optimizer = build(name, bowl)
    descend(bowl, optimizer, 5)
    again, saved = copy.deepcopy(bowl), copy.deepcopy(optimizer.state_dict())
    restored = OPTIMIZERS.create(name, again.parameters(), lr=99.0)

    restored.load_state_dict(saved)

    assert restored.param_groups[0]["lr"] == 0.01
    assert all(entry["step"] == 5 and type(entry["step"]) is int for entry in restored.state_dict()["state"].values())
    assert descend(again, restored, 5) == descend(bowl, optimizer, 5)


def test_a_setting_that_a_saved_state_lacks_has_its_default() -> None:
    bowl = Bowl()
    optimizer = build("muon", bowl, momentum=0.5)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["scale"]

    optimizer.load_state_dict(saved)

    assert optimizer.param_groups[0]["scale"] == "original"
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert len(descend(bowl, optimizer, 2)) == 2


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_leaves_weights_without_gradient_alone(name) -> None:
    bowl = Bowl()
    before = bowl.vector.detach().clone()
    optimizer = build(name, bowl)
    ((bowl.matrix - 1) ** 2).sum().backward()

    optimizer.step()

    assert torch.equal(bowl.vector, before)
    assert bowl.vector not in optimizer.state


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_does_not_touch_the_gradients_or_record_its_steps(name) -> None:
    bowl = Bowl()
    optimizer = build(name, bowl)
    bowl().backward()
    before = bowl.matrix.grad.clone()

    optimizer.step()
    optimizer.step()

    assert torch.equal(bowl.matrix.grad, before)
    assert bowl.matrix.is_leaf


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_calls_a_closure_and_returns_its_loss(name) -> None:
    bowl = Bowl()
    optimizer = build(name, bowl)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bowl()
        loss.backward()
        return loss

    first = optimizer.step(closure)

    assert first.item() == pytest.approx(Bowl()().item())
    assert bowl().item() < first.item()


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_follows_a_rate_that_changes(name) -> None:
    bowl = Bowl()
    optimizer = build(name, bowl)
    before = bowl.matrix.detach().clone()

    optimizer.param_groups[0]["lr"] = 0.0
    descend(bowl, optimizer, 3)

    assert torch.equal(bowl.matrix, before)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_refuses_negative_settings(name) -> None:
    with pytest.raises(ValueError, match="`lr` must not be negative"):
        OPTIMIZERS.create(name, Bowl().parameters(), lr=-1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
        {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, "weight_decay": 2.0},
        {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-3, "weight_decay": 0.0},
    ],
    ids=str,
)
def test_adamw_equals_torchs(settings) -> None:
    ours, theirs = Bowl().double(), Bowl().double()

    mine = descend(ours, AdamW(ours.parameters(), **settings), 200)
    right = descend(theirs, torch.optim.AdamW(theirs.parameters(), **settings), 200)

    assert mine == pytest.approx(right, rel=1e-12)
    torch.testing.assert_close(ours.matrix, theirs.matrix, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.01},
        {"lr": 0.01, "weight_decay": 0.3},
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.3},
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
    ],
    ids=str,
)
def test_sgd_equals_torchs(settings) -> None:
    ours, theirs = Bowl().double(), Bowl().double()

    mine = descend(ours, SGD(ours.parameters(), **settings), 50)
    right = descend(theirs, torch.optim.SGD(theirs.parameters(), **settings), 50)

    assert mine == pytest.approx(right, rel=1e-12)
    torch.testing.assert_close(ours.matrix, theirs.matrix, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_lion_equals_its_algorithm(weight_decay) -> None:
    ours = Bowl().double()
    optimizer = Lion(ours.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=weight_decay)
    weights = [weight.detach().clone() for weight in ours.parameters()]
    means = [torch.zeros_like(weight) for weight in weights]
    for _ in range(200):
        bowl = Bowl().double()
        bowl.load_state_dict(dict(zip(("matrix", "vector"), weights, strict=True)))
        gradients = torch.autograd.grad(bowl(), list(bowl.parameters()))
        for index, g in enumerate(gradients):
            c = 0.8 * means[index] + 0.2 * g
            weights[index] = weights[index] - 0.01 * (torch.sign(c) + weight_decay * weights[index])
            means[index] = 0.95 * means[index] + 0.05 * g
        descend(ours, optimizer, 1)

    for mine, right in zip(ours.parameters(), weights, strict=True):
        torch.testing.assert_close(mine.detach(), right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"clip": 1.5, "weight_decay": 0.2}], ids=str)
def test_adafactor_equals_torchs(settings) -> None:
    ours, theirs = Bowl().double(), Bowl().double()
    torchs = {"d": settings.get("clip", 1.0), "weight_decay": settings.get("weight_decay", 0.0), "foreach": False}

    mine = descend(ours, Adafactor(ours.parameters(), lr=0.02, relative=True, **settings), 200)
    right = descend(theirs, torch.optim.Adafactor(theirs.parameters(), lr=0.02, **torchs), 200)

    assert mine[-1] < 0.1 * mine[0]
    assert mine == pytest.approx(right, rel=1e-9)
    torch.testing.assert_close(ours.matrix, theirs.matrix, rtol=1e-9, atol=1e-9)


def test_adafactor_equals_its_algorithm() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(20, 5, 3, generator=generator, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    optimizer = Adafactor([weight], lr=0.1, momentum=0.7, clip=0.5)
    expected, running = torch.zeros(5, 3, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    rows, columns = torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t, g in enumerate(gradients, 1):
        b = 1 - t**-0.8
        rows, columns = b * rows + (1 - b) * (g**2).sum(1), b * columns + (1 - b) * (g**2).sum(0)
        u = g / torch.sqrt(torch.outer(rows, columns) / rows.sum())
        running = 0.7 * running + 0.3 * u / max(1.0, (u**2).mean() ** 0.5 / 0.5)
        expected = expected - 0.1 * running
        weight.grad = g
        optimizer.step()

    torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-10)
    kept = sum(value.numel() for value in optimizer.state[weight].values() if isinstance(value, Tensor))
    assert kept == 5 + 3 + 15  # rows, columns and the momentum


def test_adafactor_takes_a_stack_of_matrices_one_by_one() -> None:
    generator = torch.Generator().manual_seed(3)
    stack = nn.Parameter(torch.zeros(2, 5, 3))
    apart = [nn.Parameter(torch.zeros(5, 3)) for _ in range(2)]
    one, many = (
        Adafactor(weights, lr=0.1, clip=1e9) for weights in ([stack], apart)
    )  # clipping is by the whole weight
    for _ in range(5):
        stack.grad = torch.randn(2, 5, 3, generator=generator) * torch.tensor([1.0, 50.0]).view(2, 1, 1)
        for weight, gradient in zip(apart, stack.grad, strict=True):
            weight.grad = gradient
        one.step()
        many.step()

    torch.testing.assert_close(stack.detach(), torch.stack([weight.detach() for weight in apart]))


OPTIONS = [(name, {}) for name in OPTIMIZERS.names()] + [
    ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("adamw", {"betas": (0.5, 0.7), "eps": 1e-3}),
    ("lion", {"weight_decay": 0.5}),
    ("muon", {"scale": "match_rms_adamw", "nesterov": False}),
    ("adafactor", {"momentum": 0.5, "relative": True}),
]
EXACT = {"adamw", "sgd", "lion", "adafactor"}
"""To the bit on a CPU; stacked matrix products add in another order."""


class Shapes(nn.Module):
    """Weights of several shapes, some of them alike, whose gradients come and go."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        shapes = [(6, 4), (4, 6), (6, 4), (4,), (4,), (3, 2, 4), ()]
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)

    def give_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for index, weight in enumerate(self.weights):
            gradient = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            weight.grad = None if (step + index) % 5 == 0 else gradient


@pytest.fixture
def on_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let optimizers work on lists of weights on a CPU too, where they take one after the other."""
    for module in (adamw, lion):
        monkeypatch.setattr(module, "on_gpu", lambda _: True)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_cpu_takes_one_weight_after_the_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, moved = Shapes(), []
    optimizer = OPTIMIZERS.create(name, shapes.parameters())
    plain = optimizer.update
    monkeypatch.setattr(optimizer, "update", lambda *given: (moved.append(given[0]), plain(*given)))
    shapes.give_gradients(1)
    optimizer.step()
    assert len(moved) == sum(weight.grad is not None for weight in shapes.weights)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_many_weights_at_once_move_as_each_alone(name, options, on_lists) -> None:
    together, alone = Shapes(), Shapes()
    one, other = (OPTIMIZERS.create(name, shapes.parameters(), lr=0.05, **options) for shapes in (together, alone))
    plain = OPTIMIZERS.create(name, alone.parameters(), **options)
    other.update_many = partial(Optimizer.update_many, plain)
    for step in range(200):
        for shapes, optimizer in ((together, one), (alone, other)):
            shapes.give_gradients(step)
            optimizer.step()

    tolerance = 0.0 if name in EXACT else 1e-4
    for mine, right in zip(together.weights, alone.weights, strict=True):
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_no_step_waits_for_the_device(name, options, on_lists) -> None:
    shapes = Shapes().to("meta")  # numbers of such tensors cannot be asked for: that would raise
    optimizer = OPTIMIZERS.create(name, shapes.parameters(), **options)
    for _ in range(2):
        for weight in shapes.weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()

    assert optimizer.state[shapes.weights[0]]["step"] == 2


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_weights_in_bfloat16_have_a_state_in_float32_that_survives_saving(name, options) -> None:
    narrow, wide = Shapes().to(torch.bfloat16), Shapes().to(torch.bfloat16).float()
    ours, theirs = (OPTIMIZERS.create(name, shapes.parameters(), lr=0.05, **options) for shapes in (narrow, wide))
    for step in range(1, 4):
        narrow.give_gradients(step)
        for weight, exact in zip(narrow.weights, wide.weights, strict=True):
            exact.data.copy_(weight.data)
            exact.grad = None if weight.grad is None else weight.grad.float()
        ours.step()
        theirs.step()
        restored = OPTIMIZERS.create(name, narrow.parameters())
        restored.load_state_dict(copy.deepcopy(ours.state_dict()))
        ours = restored

    assert all(weight.dtype == torch.bfloat16 for weight in narrow.weights)
    for weight, exact in zip(narrow.weights, wide.weights, strict=True):
        assert torch.equal(weight, exact.to(torch.bfloat16))
        for key, value in ours.state[weight].items():
            assert key == "step" or (value.dtype == torch.float32 and torch.equal(value, theirs.state[exact][key]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_a_scale_is_applied_exactly_once(name, options, dtype) -> None:
    ours, right = Shapes().to(dtype), Shapes().to(dtype)
    one, other = (OPTIMIZERS.create(name, shapes.parameters(), lr=0.05, **options) for shapes in (ours, right))
    for step in range(1, 5):
        scale = torch.tensor(0.1 * step)  # a constant one would not show in rules that forget how long gradients are
        for shapes in (ours, right):
            shapes.give_gradients(step)
        for weight in right.weights:
            if weight.grad is not None:
                weight.grad.mul_(scale)
        one.step(scale=scale)
        other.step()

    for mine, exact in zip(ours.weights, right.weights, strict=True):
        assert torch.equal(mine, exact)
        for key, value in one.state[mine].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[exact][key]))


def test_a_scale_counts_for_the_gradients_that_a_closure_leaves() -> None:
    weight = nn.Parameter(torch.zeros(2))

    def closure() -> float:
        weight.grad = torch.tensor([4.0, 8.0])
        return 1.5

    assert SGD([weight], lr=1.0).step(closure, scale=torch.tensor(0.25)) == 1.5
    assert weight.tolist() == [-1, -2]


def test_the_first_step_of_adamw_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.tensor([-0.3])

    AdamW([weight], lr=0.1, weight_decay=0.5).step()

    # decay first: 2 (1 - 0.1 x 0.5) = 1.9; then the first step is lr against the gradient's sign, whatever its size
    assert weight.item() == pytest.approx(1.9 + 0.1)


def test_sgd_without_momentum_keeps_no_memory() -> None:
    bowl = Bowl()
    optimizer = SGD(bowl.parameters(), lr=0.01)
    descend(bowl, optimizer, 1)

    assert optimizer.state[bowl.matrix] == {"step": 1}


def test_settings_that_cannot_work_are_refused() -> None:
    weights = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match="`betas` must be two numbers"):
        AdamW(weights, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="needs `momentum` above 0"):
        SGD(weights, nesterov=True)


@pytest.fixture
def signum(tmp_path, monkeypatch):
    """A plugin module with an optimizer that lfs does not have; the table is put back afterwards."""
    OPTIMIZERS.names()
    monkeypatch.setattr(OPTIMIZERS, "_entries", dict(OPTIMIZERS._entries))
    (tmp_path / "signum_of_the_user.py").write_text(SIGNUM.format(name="my_signum"))
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("signum_of_the_user").Signum
    sys.modules.pop("signum_of_the_user")


def test_a_new_optimizer_is_ten_lines_in_one_file(signum) -> None:
    assert len(SIGNUM[SIGNUM.index("    def __init__") :].strip().splitlines()) <= 10
    bowl = Bowl()

    (optimizer,) = build_optimizers(bowl, [OptimizerGroup(name="my_signum", lr=0.01, options={"momentum": 0.9})])
    losses = descend(bowl, optimizer, 300)

    assert isinstance(optimizer, signum)
    assert losses[-1] < 0.05 * losses[0]
    with pytest.raises(ConfigError, match="has no option `betas`"):
        build_optimizers(bowl, [OptimizerGroup(name="my_signum", options={"betas": [0.9]})])
