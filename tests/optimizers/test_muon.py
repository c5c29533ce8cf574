"""Muon against its definition, the orthogonal matrix nearest to the momentum, and against torch's."""

import pytest
import torch

from lfs_cli.optimizers import muon
from lfs_cli.optimizers.muon import Muon, by_squares, iterated, orthogonal


@pytest.mark.parametrize("shape", [(8, 8), (16, 5), (5, 16), (1, 7), (3, 6, 4), (2, 2, 4, 6)], ids=str)
def test_singular_vectors_stay_and_singular_values_become_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    in_its_basis = U.mT @ orthogonal(matrix) @ Vh.mT
    values = in_its_basis.diagonal(dim1=-2, dim2=-1)
    assert (in_its_basis - values.diag_embed()).abs().max() < 1e-5
    assert ((values > 0.6) & (values < 1.3)).all()


def test_the_size_of_a_gradient_does_not_matter() -> None:
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonal(1e3 * matrix), orthogonal(matrix))


def test_two_steps_follow_the_rule() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
    expected, running = weight.detach().clone(), torch.zeros(6, 4, dtype=torch.float64)
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        weight.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        running = 0.9 * running + weight.grad
        expected = expected * (1 - 0.05) - 0.1 * (6 / 4) ** 0.5 * orthogonal(weight.grad + 0.9 * running)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("shape", [(2, 5, 9), (3, 6, 6), (1, 1, 4)], ids=str)
def test_completing_the_square_changes_nothing_but_rounding(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    x /= x.norm(dim=(-2, -1), keepdim=True)
    kept = x.clone()
    exact = iterated(x, 5)
    torch.testing.assert_close(by_squares(x, 5), exact, rtol=1e-11, atol=1e-12)
    assert torch.equal(x, kept)
    narrow = by_squares(x.bfloat16(), 5).double()
    assert (narrow - exact).norm() < 0.05 * exact.norm()  # what the iterations leave is six times as much


def test_the_step_points_where_the_orthogonal_factor_of_the_svd_points() -> None:
    matrix = torch.eye(6) + 0.2 * torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    U, _, Vh = torch.linalg.svd(matrix)
    aligned = (orthogonal(matrix) * (U @ Vh)).sum() / orthogonal(matrix).norm() / 6**0.5
    assert aligned > 0.97


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_200_steps_equal_torchs(scale: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_iteration_type", lambda matrices: torch.bfloat16)  # as on a GPU, and as torch does
    generator = torch.Generator().manual_seed(4)
    start = [torch.randn(shape, generator=generator) for shape in [(12, 8), (8, 12), (12, 8)]]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    options = {"lr": 0.01, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    mine, judge = Muon(ours, scale=scale, **options), torch.optim.Muon(theirs, adjust_lr_fn=scale, **options)
    for _ in range(200):
        for weight, other in zip(ours, theirs, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            other.grad = weight.grad.clone()
        mine.step()
        judge.step()
    for weight, other, first in zip(ours, theirs, start, strict=True):
        moved = (other - first).norm()
        assert (weight - other).norm() < 0.01 * moved  # the iterations' rounding to bfloat16, which differs in places


def test_parts_and_stacks_are_made_orthogonal_one_by_one() -> None:
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    apart = [torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(2)]
    fused, stacked = torch.nn.Parameter(torch.zeros(6, 4)), torch.nn.Parameter(torch.zeros(2, 3, 4))
    fused.grad, stacked.grad = gradient, gradient.view(2, 3, 4)
    for weight, half in zip(apart, gradient.chunk(2), strict=True):
        weight.grad = half
    for optimizer in (Muon([fused], parts=2), Muon([stacked]), Muon(apart)):
        optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.cat([weight.detach() for weight in apart]))
    torch.testing.assert_close(stacked.detach().view(6, 4), fused.detach())


def test_the_second_scale_moves_entries_as_far_as_adamw_does() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 32))
    weight.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(6))
    Muon([weight], lr=1.0, scale="match_rms_adamw").step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def test_the_momentum_rises_to_its_value_and_stays_there() -> None:
    group = {"momentum": 0.95, "momentum_warmup": 10}
    assert [muon._momentum(step, group) for step in (5, 10, 1000)] == pytest.approx([0.90, 0.95, 0.95])
    assert muon._momentum(1, {"momentum": 0.5, "momentum_warmup": 10}) == 0.5
    assert muon._momentum(1, {"momentum": 0.95, "momentum_warmup": 0}) == 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "none"}, "`scale` must be `original` or `match_rms_adamw`, and is `none`"),
        ({"parts": 4}, "6 rows cannot be cut into 4 `parts`"),
        ({"parts": 0}, "6 rows cannot be cut into 0 `parts`"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([torch.nn.Parameter(torch.zeros(6, 4))], **options)
