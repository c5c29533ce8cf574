"""Products with something behind them: the operations against float64, and layers with them against layers without."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fused_cases import HAS_KERNELS
from torch import Tensor, nn

from lfs_cli.config import ModelConfig
from lfs_cli.kernels import product, rope, self_check
from lfs_cli.kernels.operation import as_on_gpu
from lfs_cli.kernels.rotary_attention import project_and_attend, rotary_attention
from lfs_cli.kernels.swiglu import reference_activation, swiglu_gradient
from lfs_cli.model import Transformer, feed_forward
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


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers take these operations; where there is no Hopper GPU, they do what they do elsewhere."""
    for module in (product, feed_forward):
        monkeypatch.setattr(module, "pays", lambda *_: True)


def on_a_gpu() -> Any:
    """Take the paths of a GPU where there is none."""
    return nullcontext() if ON_GPU else as_on_gpu(is_compiled=False)


@pytest.mark.skipif(not HAS_KERNELS, reason="there are no kernels")
@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize("rows", [5, 0])
@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (0,), (1, 2), (3,)], ids=str)
def test_a_layer_as_one_operation_is_the_layer(wanted: tuple[int, ...], rows: int) -> None:
    with on_a_gpu():
        torch.manual_seed(0)
        layer = SwiGLU(16, 24).to(DEVICE, NARROW)
        x = draw(2, rows, 16).requires_grad_()
        tensors = [[x, *layer.parameters()][i] for i in wanted]
        for i, each in enumerate([x, *layer.parameters()]):
            each.requires_grad_(i in wanted)
        found, calls = [], []
        for layer.is_joined in (True, False):
            y = layer(x)
            with _Counting(torch.ops.lfs.gated_product_backward.default, calls):
                found.append([y, *torch.autograd.grad(y.float().square().sum(), tensors)])
    assert len(calls) == (wanted != (3,))
    for mine, other in zip(*found, strict=True):
        assert mine.shape == other.shape
        assert not rows or distance(mine, other) < NEAR[NARROW]


class Twice(feed_forward.Linear):
    """A layer of a plugin."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.skipif(not HAS_KERNELS, reason="there are no kernels")
@pytest.mark.usefixtures("pays")
def test_layers_that_are_not_what_they_seem_are_called() -> None:
    calls, x = [], draw(2, 5, 16)
    plain, hooked, other, sequence = (SwiGLU(16, 24).to(DEVICE, NARROW) for _ in range(4))
    hooked.down.register_forward_hook(lambda *_: calls.append("hook"))
    other.down = Twice(24, 16).to(DEVICE, NARROW)
    sequence.down = nn.Sequential(sequence.down, nn.Dropout(0.0))
    with on_a_gpu(), _Counting(torch.ops.lfs.gated_product.default, joined := []):
        for layer in (hooked, other, sequence):
            layer(x)
        assert (calls, joined) == (["hook"], [])
        plain(x)
        assert len(joined) == 1


@pytest.mark.skipif(not HAS_KERNELS, reason="there are no kernels")
@pytest.mark.usefixtures("pays")
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own, in 2.13
def test_torch_compile_takes_a_layer_whole() -> None:
    torch._dynamo.reset()
    layer, x = SwiGLU(16, 24).to(DEVICE, NARROW), draw(2, 5, 16).requires_grad_()
    with on_a_gpu():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        found = [torch.autograd.grad(f(x).float().square().sum(), [x, *layer.parameters()]) for f in (layer, compiled)]
    assert all(distance(mine, other) < NEAR[NARROW] for mine, other in zip(*found, strict=True))


@pytest.mark.skipif(not HAS_KERNELS, reason="there are no kernels")
@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, 2),  # selective checkpointing keeps what they make, so they are not called again
        ({"kv_heads": 1}, 2),
        ({"window": 5}, 2),
        ({"checkpointing": "selective"}, 2),
        ({"qk_norm": True}, 0),
        ({"value_embeddings": 1}, 0),  # in both
        ({"heads": 4}, 0),
    ],
    ids=str,
)
@pytest.mark.usefixtures("pays")
def test_a_model_whose_products_turn_learns_the_same(
    changes: dict[str, Any], layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"vocab_size": 96, "context_length": 16, "width": 128, "layers": 2, "heads": 2, "attention": "flash"}
    tokens = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found, calls = [], []
    for is_turned in (True, False):
        monkeypatch.setattr(product, "pays", lambda *_, answer=is_turned: answer)
        with on_a_gpu(), _Counting(torch.ops.lfs.turned_product.default, calls):
            torch.manual_seed(0)
            model = Transformer(ModelConfig(**shape | changes)).to(DEVICE)
            run_pass(model, tokens, NARROW)
            found.append([weight.grad for weight in model.parameters()])
        assert len(calls) == layers
    for mine, other in zip(*found, strict=True):
        assert distance(mine, other) < 5 * NEAR[NARROW]


def test_what_does_not_fit_together_is_refused() -> None:
    x, gate, down = draw(2, 8, 16), draw(24, 16), draw(16, 24)
    for wrong in ((x, gate, gate[:8], down), (x, gate, gate, gate), (x[..., :8], gate, gate, down)):
        with pytest.raises(ValueError, match="expected x"):
            product.gated_layer(*wrong)
    turn, weights = draw_turn(8, 8), (draw(32, 16), draw(16, 16), draw(16, 16))
    for weights_given, turn_given, heads in (
        (weights, draw_turn(16, 8), 4),
        (weights, turn, 3),
        ((weights[0], weights[1], weights[1][:8]), turn, 4),
        ((weights[0], draw(24, 16), draw(24, 16)), turn, 4),
    ):
        with pytest.raises(ValueError, match="expected x"):
            project_and_attend(x, weights_given, None, *turn_given, heads=heads)


@pytest.mark.gpu
def test_on_a_hopper_gpu_layers_match_float64() -> None:
    """Whole, from inputs and gradients that lie anywhere."""
    R, C, F, T = 8192, 256, 384, 1024
    if product.unavailable_reason(DEVICE, NARROW, C, F):
        pytest.skip("there is no Hopper GPU")
    flat = draw(R * C + 4)
    x = flat[4:].view(R, C).requires_grad_()
    weights = [draw(*shape, scale=0.06).T.contiguous().T.requires_grad_() for shape in ((F, C), (F, C), (C, F))]
    y = product.gated_layer(x, *weights)
    dy = draw(C, R).T
    wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
    right = reference_activation("swiglu", wide[0] @ torch.cat(wide[1:3]).T) @ wide[3].T
    ours = torch.autograd.grad(y, (x, *weights), dy)
    exact = torch.autograd.grad(right, wide, dy.double())
    for mine, true in zip((y, *ours), (right, *exact), strict=True):
        assert distance(mine, true) < 2 * NEAR[NARROW]
    turn, heads = draw_turn(T, 64), [draw(256, C, scale=0.06), draw(128, C, scale=0.06), draw(128, C, scale=0.06)]
    tensors = [x.detach().view(-1, T, C).requires_grad_(), *(t.requires_grad_() for t in heads)]

    def apart(x: Tensor, *heads: Tensor) -> Tensor:
        return rotary_attention(x @ torch.cat(heads).T, *turn, heads=4, kv_heads=2)

    found = []
    for function in (lambda x, *heads: project_and_attend(x, heads, None, *turn, heads=4), apart):
        o = function(*tensors)
        found.append([o, *torch.autograd.grad(o.float().square().sum(), tensors)])
    for mine, other in zip(*found, strict=True):
        assert distance(mine, other) < 2 * NEAR[NARROW]


@pytest.mark.gpu
def test_self_checks_leave_random_numbers_alone() -> None:
    if product.unavailable_reason(DEVICE, NARROW, 768, 2048):
        pytest.skip("there is no Hopper GPU")
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    for errors, case in (
        (product._gated_errors, (256,)),
        (product._gated_backward_errors, (256,)),
        (product._turned_errors, (384, 64)),
    ):
        first, again = (errors(DEVICE, NARROW, *case) for _ in range(2))
        assert first == again
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


class _Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes calls of one operation."""

    def __init__(self, operation: Any, calls: list[Any]) -> None:
        super().__init__()
        self.operation, self.calls = operation, calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.operation:
            self.calls.append(func)
        return func(*args, **(kwargs or {}))
