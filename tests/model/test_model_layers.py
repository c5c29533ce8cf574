"""Linear, Embedding, softmax, the norms, SiLU and the feed-forward layers, each against its formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfs_cli.kernels.operation import compute_dtype
from lfs_cli.model import (
    ATTENTION,
    FEED_FORWARDS,
    NORMS,
    Embedding,
    Linear,
    ReLU2,
    RMSNorm,
    SiLU,
    SwiGLU,
    feed_forward,
    next_token_loss,
    silu,
    softmax,
)
from lfs_cli.model import layers as layers_module

leading = st.lists(st.integers(1, 4), max_size=3).map(tuple)
few = settings(max_examples=15, deadline=None)


def weights_of(module: torch.nn.Module) -> list[Tensor]:
    return [weight.detach() for weight in module.parameters()]


@few
@given(leading=leading, inputs=st.integers(1, 9), outputs=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_one_product_of_stacked_matrices_is_each_of_theirs(leading, inputs, outputs) -> None:
    x = torch.randn(*leading, inputs, dtype=torch.float64, requires_grad=True)
    several = [Linear(inputs, count).double() for count in outputs]
    wanted = [x, *(layer.weight for layer in several)]
    found = []
    for stacks in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers_module, "pays_to_stack", lambda _x, stacks=stacks: stacks)
            results = layers_module.multiply_together(x, several)
        assert [y.shape for y in results] == [(*leading, count) for count in outputs]
        is_one = len({y.untyped_storage().data_ptr() for y in results}) == 1
        assert is_one == (stacks or len(several) == 1)
        loss = sum((y * torch.arange(1.0, y.shape[-1] + 1)).sin().sum() for y in results)
        found.append([*results, *torch.autograd.grad(loss, wanted)])
    for separate, together in zip(*found, strict=True):
        torch.testing.assert_close(together, separate)


def test_gates_and_factors_by_one_product_are_the_same_layer(monkeypatch) -> None:
    layer, x = SwiGLU(12, 20), torch.randn(3, 5, 12, requires_grad=True)
    found = []
    for stacks in (False, True):
        monkeypatch.setattr(feed_forward, "pays_to_stack", lambda _x, stacks=stacks: stacks)
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])])
    for separate, together in zip(*found, strict=True):
        torch.testing.assert_close(together, separate)


def test_matrices_are_stacked_in_the_type_of_the_products(monkeypatch) -> None:
    monkeypatch.setattr(layers_module, "pays_to_stack", lambda _x: True)
    several, x = [Linear(8, 3), Linear(8, 5)], torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        results = layers_module.multiply_together(x, several)
        separate = [layer(x) for layer in several]
    assert {y.dtype for y in results} == {torch.bfloat16}
    for ours, theirs in zip(results, separate, strict=True):
        torch.testing.assert_close(ours, theirs)
    sum(y.sum() for y in results).backward()
    assert {layer.weight.grad.dtype for layer in several} == {torch.float32}


@few
@given(leading=leading, outputs=st.lists(st.integers(1, 9), min_size=1, max_size=3), is_cast=st.booleans())
def test_gradients_of_matrices_are_not_rounded_to_the_type_of_the_products(leading, outputs, is_cast) -> None:
    several = [Linear(7, count) for count in outputs]
    x = torch.randn(*leading, 7, requires_grad=True)
    dy = torch.randn(*leading, sum(outputs)).bfloat16()
    matrix = torch.cat([layer.weight for layer in several]).detach().bfloat16()
    several[0].cast = matrix if is_cast else None
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(layers_module, "pays_to_stack", lambda _: True)
        y = several[0](x) if len(several) == 1 else layers_module.stacked(x, several)
    dx, *dweights = torch.autograd.grad(y, [x, *(layer.weight for layer in several)], dy)

    rounded = x.detach().bfloat16()
    torch.testing.assert_close(y, rounded @ matrix.T)
    torch.testing.assert_close(dx, (dy @ matrix).float())
    right = dy.double().reshape(-1, sum(outputs)).T @ rounded.double().reshape(-1, 7)
    assert {dweight.dtype for dweight in dweights} == {torch.float32}
    torch.testing.assert_close(torch.cat(dweights).double(), right, rtol=1e-5, atol=1e-5)  # bfloat16 is off by 4e-3


@few
@given(leading=leading, inputs=st.integers(1, 9), outputs=st.integers(1, 9))
def test_linear_is_a_product_with_the_transposed_weight(leading, inputs, outputs) -> None:
    layer = Linear(inputs, outputs)
    x = torch.randn(*leading, inputs)

    assert layer.weight.shape == (outputs, inputs)
    torch.testing.assert_close(layer(x), torch.einsum("...i,oi->...o", x, layer.weight))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3)], ids=str)
def test_embedding_looks_up_rows_and_sums_their_gradients(shape) -> None:
    table = Embedding(7, 4)
    tokens = torch.randint(7, shape)
    dy = torch.randn(*shape, 4)

    y = table(tokens)
    (gradient,) = torch.autograd.grad(y, table.weight, dy)

    assert torch.equal(y, table.weight[tokens])
    expected = torch.nn.functional.one_hot(tokens.reshape(-1), 7).float().T @ dy.reshape(-1, 4)
    torch.testing.assert_close(gradient, expected)


def test_linear_starts_as_a_truncated_normal_of_its_fans() -> None:
    torch.manual_seed(0)
    weight = Linear(300, 700).weight.detach()
    sigma = math.sqrt(2 / 1000)

    assert weight.abs().max() <= 3 * sigma
    assert weight.abs().max() > 2.9 * sigma
    assert weight.mean().abs() < 0.01 * sigma
    assert weight.std() == pytest.approx(0.9866 * sigma, rel=0.01)  # the limits take 1.3 % of the deviation


def test_embedding_starts_as_a_truncated_normal_of_unit_size() -> None:
    torch.manual_seed(0)
    weight = Embedding(1000, 200).weight.detach()

    assert 2.9 < weight.abs().max() <= 3
    assert weight.std() == pytest.approx(0.9866, rel=0.01)


def test_softmax_of_known_numbers() -> None:
    shares = softmax(torch.tensor([0.0, math.log(2), math.log(5), -math.inf]))

    torch.testing.assert_close(shares, torch.tensor([1 / 8, 2 / 8, 5 / 8, 0]))


def test_softmax_of_huge_scores_does_not_overflow() -> None:
    torch.testing.assert_close(softmax(torch.tensor([1000.0, 1001.0])), softmax(torch.tensor([0.0, 1.0])))


@few
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), data=st.data())
def test_softmax_and_its_gradients_match_the_definition(shape, data) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    torch.testing.assert_close(softmax(x, dim), x.exp() / x.exp().sum(dim, keepdim=True))
    assert torch.autograd.gradcheck(lambda x: softmax(x, dim), x)


def test_rms_norm_of_known_numbers() -> None:
    norm = RMSNorm(2, epsilon=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 10.0]))

    root = math.sqrt((3**2 + 4**2) / 2 + 0.5)
    torch.testing.assert_close(norm(torch.tensor([3.0, -4.0])), torch.tensor([3 / root, -40 / root]))


def test_rms_norm_starts_with_weights_of_one_and_cs336s_epsilon() -> None:
    norm = RMSNorm(3)

    assert torch.equal(norm.weight, torch.ones(3))
    assert norm.epsilon == 1e-5


def test_rms_norm_computes_in_float32_and_answers_in_the_type_of_its_input() -> None:
    x = torch.full((4,), 300.0, dtype=torch.float16)  # 300^2 is beyond float16

    y = RMSNorm(4)(x)

    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones(4, dtype=torch.float16))


@few
@given(leading=leading, width=st.integers(1, 9))
def test_rms_norm_matches_its_formula_in_float64(leading, width) -> None:
    norm = RMSNorm(width).double()
    x = torch.randn(*leading, width, dtype=torch.float64)

    torch.testing.assert_close(norm(x), x / (x**2).mean(-1, keepdim=True).add(1e-5).sqrt() * norm.weight)


@pytest.mark.parametrize("name", NORMS.names())
def test_every_norm_keeps_shape_and_type_and_lets_gradients_through(name) -> None:
    norm = NORMS.create(name, 8, 1e-5)
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)

    y = norm(x)
    y.sum().backward()

    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own, in 2.13
@pytest.mark.parametrize("function", [silu, softmax], ids=["silu", "softmax"])
def test_a_compiler_finds_the_same_gradients(function) -> None:
    """In torch 2.11 it found none, where what a function returns was changed in place."""
    x, dy = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    plain, ours = (torch.autograd.grad(by(x), x, dy)[0] for by in (function, compiled))
    assert plain.any()
    torch.testing.assert_close(ours, plain)


def test_silu_is_x_times_sigmoid_with_its_gradient() -> None:
    x = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)

    torch.testing.assert_close(silu(x), x / (1 + (-x).exp()))
    assert torch.autograd.gradcheck(silu, x)


def test_swiglu_is_its_formula() -> None:
    layer = SwiGLU(3, 5)
    gate, up, down = weights_of(layer)
    x = torch.randn(2, 4, 3)

    assert [name for name, _ in layer.named_parameters()] == ["gate.weight", "up.weight", "down.weight"]
    torch.testing.assert_close(layer(x), (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)


def test_the_plain_feed_forwards_are_their_formulas() -> None:
    x = torch.randn(2, 4, 3)
    soft, squared = SiLU(3, 5), ReLU2(3, 5)

    up, down = weights_of(soft)
    torch.testing.assert_close(soft(x), torch.nn.functional.silu(x @ up.T) @ down.T)
    up, down = weights_of(squared)
    torch.testing.assert_close(squared(x), (x @ up.T).clamp(min=0) ** 2 @ down.T)


@pytest.mark.parametrize("name", FEED_FORWARDS.names())
def test_every_feed_forward_treats_each_position_alone(name) -> None:
    layer = FEED_FORWARDS.create(name, 4, 6)
    x = torch.randn(2, 5, 4)

    alone = torch.stack([layer(x[:, position]) for position in range(5)], 1)

    torch.testing.assert_close(layer(x), alone)


@pytest.mark.parametrize(
    "function",
    [
        silu,
        lambda x: next_token_loss(x, x[:4], torch.arange(5) % 4),
        lambda x: ATTENTION.get("standard")(*[x.view(1, 5, 2, 3)] * 3),
    ],
    ids=["silu", "loss", "standard attention"],
)
def test_what_is_differentiable_once_is_not_wrong_twice(function) -> None:
    x = torch.randn(5, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.square().sum().backward()


def test_products_under_autocast_are_taken_in_its_type_but_for_float64() -> None:
    numbers = [torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.float64)]
    assert [compute_dtype(x) for x in numbers] == [torch.float32, torch.float16, torch.float64]
    with torch.autocast("cpu", torch.bfloat16):
        found = [compute_dtype(x) for x in numbers]
        assert found == [(x.unsqueeze(0) @ x.unsqueeze(1)).dtype for x in numbers]  # as torch has it
    assert found == [torch.bfloat16, torch.bfloat16, torch.float64]
