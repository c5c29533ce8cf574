"""Products with something behind them: the operations against float64, and layers with them against layers without."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fused_cases import HAS_KERNELS, INTERPRETED
from torch import Tensor

from lfs_cli.config import ModelConfig
from lfs_cli.kernels import product, rope, self_check
from lfs_cli.kernels.operation import as_on_gpu
from lfs_cli.kernels.swiglu import reference_activation, swiglu_gradient
from lfs_cli.model import Transformer
from lfs_cli.model import attention as attention_module
from lfs_cli.model.feed_forward import SwiGLU
from lfs_cli.training.trace import run_pass

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
NARROW = torch.bfloat16 if ON_GPU else torch.float16  # Triton's interpreter multiplies no bfloat16
NEAR = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = NARROW) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator, device=DEVICE)).to(dtype)


def draw_turn(T: int, D: int) -> tuple[Tensor, Tensor]:
    angles = 6.3 * torch.rand(T, D // 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return angles.cos(), angles.sin()


def distance(ours: Tensor, right: Tensor) -> float:
    ours, right = ours.detach().double(), right.detach().double()
    return float((ours - right).norm() / right.norm())


def exact_turned(x: Tensor, matrix: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    a = (x.double() @ matrix.double().T).view(-1, len(cos), len(matrix) // (2 * cos.shape[1]), 2 * cos.shape[1])
    q, _ = rope.reference_qk_norm_rope(a[:, :, :heads], a[:, :, :0], cos.double(), sin.double())
    return torch.cat((q, a[:, :, heads:]), 2).flatten(2).flatten(0, 1)


def compare(R: int, C: int, F: int, dtype: torch.dtype) -> None:
    """All three operations with float64."""
    x, do, gate_up = draw(R, C, dtype=dtype), draw(R + 1, C, dtype=dtype)[1:], draw(R, 2 * F, dtype=dtype)
    matrix, down = (draw(*shape, scale=C**-0.5, dtype=dtype) for shape in ((2 * F, C), (C, F)))
    right = x.double() @ matrix.double().T
    for mine, true in zip(
        product.gated_product(x, matrix), (right, reference_activation("swiglu", right)), strict=True
    ):
        assert mine.dtype == dtype
        assert distance(mine, true) < NEAR[dtype]
    ours = product.gated_product_backward(do, down, gate_up)
    assert distance(ours, swiglu_gradient(do.double() @ down.double(), gate_up.double())) < NEAR[dtype]
    T, D = R // 2, 8
    turn = *draw_turn(T, D), F // D
    assert distance(product.turned_product(x, matrix, *turn), exact_turned(x, matrix, *turn)) < NEAR[dtype]


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize(("R", "C", "F"), [(10, 16, 24), (2, 5, 8)])
def test_operations_match_float64(R: int, C: int, F: int, dtype: torch.dtype) -> None:
    compare(R, C, F, dtype)


HOPPER_SIZES = [(4096, 512, 1344), (4098, 768, 2048), (5000, 72, 136), (16_384, 2048, 264), (4200, 4096, 520)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize(("R", "C", "F"), HOPPER_SIZES)
def test_on_a_hopper_gpu_operations_match_float64(R: int, C: int, F: int, dtype: torch.dtype) -> None:
    if product.unavailable_reason(DEVICE, dtype, C, F):
        pytest.skip("there is no Hopper GPU")
    self_check._verdicts.clear()
    compare(R, C, F, dtype)
    kernels = {case[0] for case in self_check._verdicts}
    gated = {"gated product"} if C <= product.LARGEST_GATED else {"swiglu"}
    assert kernels == {"gated product backward", "turned product"} | gated
    assert set(self_check._verdicts.values()) == {None}


@pytest.mark.gpu
def test_on_a_hopper_gpu_equal_calls_are_equal_to_the_bit() -> None:
    if product.unavailable_reason(DEVICE, NARROW, 768, 2048):
        pytest.skip("there is no Hopper GPU")
    x, matrix, down = draw(8192, 768), draw(4096, 768, scale=0.04), draw(768, 2048, scale=0.04)
    first = product.gated_product(x, matrix)
    gradient = product.gated_product_backward(x, down, first[0])
    for _ in range(50):
        again = product.gated_product(x, matrix)
        assert all(map(torch.equal, again, first))
        assert torch.equal(product.gated_product_backward(x, down, first[0]), gradient)


def test_operations_keep_the_rules_of_torch() -> None:
    x, matrix, down, gate_up = draw(10, 16), draw(48, 16), draw(16, 24), draw(10, 48)
    for name, arguments in {
        "gated_product": (x, matrix),
        "gated_product_backward": (x, down, gate_up),
        "turned_product": (x, matrix, *draw_turn(5, 8), 3),
        "weight_gradient": (x, gate_up),
    }.items():
        torch.library.opcheck(getattr(torch.ops.lfs, name).default, arguments)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ((torch.bfloat16, 64, 256), None),
        ((torch.float32, 64, 256), "the type is float32"),
        ((torch.bfloat16, 68, 256), "68, 256 channels are not all a multiple of 8"),
        ((torch.bfloat16, 64, 128), "a tile of them 128"),
    ],
)
def test_what_kernels_do_not_take(what: tuple, reason: str | None) -> None:
    with as_on_gpu(is_compiled=False, is_hopper=True):
        found = product.unavailable_reason(torch.device("cuda"), *what)
    assert found is None if reason is None else reason in (found or "")
    assert product.unavailable_reason(torch.device("cpu"), *what) == "it needs a CUDA GPU, and this is cpu"


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (0,), (1, 2), (3,)], ids=str)
def test_a_layer_as_one_operation_is_the_layer(wanted: tuple[int, ...]) -> None:
    with as_on_gpu(is_compiled=False) if INTERPRETED else nullcontext():
        torch.manual_seed(0)
        layer = SwiGLU(16, 24).to(DEVICE, NARROW)
        x = draw(2, 5, 16).requires_grad_()
        tensors = [[x, *layer.parameters()][i] for i in wanted]
        for i, each in enumerate([x, *layer.parameters()]):
            each.requires_grad_(i in wanted)
        found = []
        for layer.is_joined in (True, False):
            y = layer(x)
            found.append([y, *torch.autograd.grad(y.float().square().sum(), tensors)])
    for mine, other in zip(*found, strict=True):
        assert distance(mine, other) < NEAR[NARROW]


@pytest.fixture
def turns_in_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no Hopper GPU, take its path, in which the operation does what it does elsewhere."""
    monkeypatch.setattr(product, "ROWS", 1)
    monkeypatch.setattr(attention_module, "_no_product_reason", lambda *_: None)


@pytest.mark.skipif(not HAS_KERNELS, reason="there are no kernels")
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1}, {"window": 5}, {"checkpointing": "selective"}], ids=str)
@pytest.mark.usefixtures("turns_in_product")
def test_a_model_whose_products_turn_learns_the_same(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"vocab_size": 96, "context_length": 16, "width": 128, "layers": 2, "heads": 2, "attention": "flash"}
    tokens = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    calls, turned = [], torch.ops.lfs.turned_product.default
    found = []
    for is_turned in (True, False):
        if not is_turned:
            monkeypatch.setattr(attention_module, "_no_product_reason", lambda *_: "not now")
        with as_on_gpu(is_compiled=False) if INTERPRETED else nullcontext(), _Counting(turned, calls):
            torch.manual_seed(0)
            model = Transformer(ModelConfig(**shape | changes)).to(DEVICE)
            run_pass(model, tokens, NARROW)
            found.append([weight.grad for weight in model.parameters()])
        assert len(calls) == 2  # a layer each; selective checkpointing keeps what they make
    for mine, other in zip(*found, strict=True):
        assert distance(mine, other) < 5 * NEAR[NARROW]


class _Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes calls of one operation."""

    def __init__(self, operation: Any, calls: list[Any]) -> None:
        super().__init__()
        self.operation, self.calls = operation, calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.operation:
            self.calls.append(func)
        return func(*args, **(kwargs or {}))
