"""Cross-entropy: the definition in float64, torch as the judge, and the chunked loss against both."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lfs_cli.kernels import linear_cross_entropy as chunked
from lfs_cli.model import cross_entropy, next_token_loss


def test_even_odds_cost_the_logarithm_of_their_number() -> None:
    assert cross_entropy(torch.zeros(3, 7), torch.tensor([0, 3, 6])).item() == pytest.approx(math.log(7))


def test_a_known_case() -> None:
    logits = torch.tensor([[math.log(1), math.log(3)], [math.log(6), math.log(2)]])

    assert cross_entropy(logits, torch.tensor([1, 1])).item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1000.0, 0.0], [0.0, -1000.0]])

    assert cross_entropy(logits, torch.tensor([0, 1])).item() == pytest.approx(500)
    hidden, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1000.0], [0.0]])
    assert next_token_loss(hidden, weight, torch.tensor([0, 0])).item() == pytest.approx(500)


@settings(max_examples=20, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), max_size=3), V=st.integers(1, 9), dtype=st.sampled_from(["float32", "bfloat16"])
)
def test_cross_entropy_matches_torch_for_any_leading_dimensions(leading, V, dtype) -> None:
    logits = torch.randn(*leading, V).to(getattr(torch, dtype)).requires_grad_()
    targets = torch.randint(V, leading)

    ours = cross_entropy(logits, targets)
    theirs = torch.nn.functional.cross_entropy(logits.float().reshape(-1, V), targets.reshape(-1))

    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


@settings(max_examples=20, deadline=None)
@given(
    leading=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    V=st.integers(1, 40),
    C=st.integers(1, 6),
    scale=st.sampled_from([1.0, -0.5]),
)
def test_the_chunked_loss_and_its_gradients_match_float64(leading, V, C, scale) -> None:
    hidden, weight = torch.randn(*leading, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    targets = torch.randint(V, leading)

    ours = scale * next_token_loss(hidden, weight, targets)
    exact = scale * cross_entropy(hidden.double() @ weight.double().T, targets)

    torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=1e-6)
    for mine, right in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, exact)), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_chunks_do_not_change_the_result(rows, dtype, monkeypatch) -> None:
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 1)  # the least: 16 rows at a time
    hidden, weight = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (rows, 30))
    targets = torch.randint(30, (rows,))

    ours = next_token_loss(hidden, weight, targets)
    exact = cross_entropy(hidden.double() @ weight.double().T, targets)

    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)
    for mine, right in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, exact)), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), right.double(), atol=tolerance, rtol=tolerance)


def test_a_weight_that_is_also_the_embedding_gets_both_gradients() -> None:
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.randint(9, (2, 2, 5))

    (ours,) = torch.autograd.grad(next_token_loss(weight[tokens].tanh(), weight, targets), weight)
    (exact,) = torch.autograd.grad(cross_entropy(weight[tokens].tanh() @ weight.T, targets), weight)

    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "none"])
def test_only_wanted_gradients_are_computed(wanted) -> None:
    hidden = torch.randn(5, 4, requires_grad=wanted == "hidden")
    weight = torch.randn(9, 4, requires_grad=wanted == "weight")

    value = next_token_loss(hidden, weight, torch.zeros(5, dtype=torch.int64))

    assert value.requires_grad == (wanted != "none")
    if wanted != "none":
        value.backward()
    assert (hidden.grad is not None, weight.grad is not None) == (wanted == "hidden", wanted == "weight")


def test_under_autocast_products_are_bfloat16_and_sums_float32() -> None:
    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(70, 16, requires_grad=True)
    targets = torch.randint(70, (50,))

    with torch.autocast("cpu", torch.bfloat16):
        ours = next_token_loss(hidden, weight, targets)
    rounded = cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).double(), targets)

    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), rounded, atol=1e-6, rtol=1e-6)
    for mine, right in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, rounded)), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, right, atol=1e-3, rtol=2e-2)


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises((IndexError, RuntimeError), match="index"):
        next_token_loss(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 4]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_no_gradient_is_computed_where_none_is_wanted(mode) -> None:
    hidden, head, targets = torch.randn(40, 8), torch.nn.Parameter(torch.randn(30, 8)), torch.randint(30, (40,))

    with mode(), FlopCounterMode(display=False) as count:
        found = next_token_loss(hidden, head, targets)

    assert count.get_total_flops() == 2 * 40 * 8 * 30  # the logits and nothing more
    assert torch.equal(found, next_token_loss(hidden, head, targets))


def test_the_soft_cap_is_its_formula_with_its_gradients() -> None:
    generator = torch.Generator().manual_seed(7)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 11))
    targets = torch.randint(11, (9,), generator=generator)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]

    ours = next_token_loss(*inputs, targets, softcap=1.5)
    plain = cross_entropy(1.5 * torch.tanh(hidden @ weight.T / 1.5), targets)

    torch.testing.assert_close(ours, plain)
    for mine, right in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_z_loss_is_its_formula_with_its_gradients(softcap) -> None:
    generator = torch.Generator().manual_seed(7)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 11))
    targets = torch.randint(11, (9,), generator=generator)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]

    ours = next_token_loss(*inputs, targets, softcap=softcap, z_loss=0.3)
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = cross_entropy(logits, targets) + 0.3 * logits.exp().sum(-1).log().square().mean()

    torch.testing.assert_close(ours, plain)
    for mine, right in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(mine, right)
