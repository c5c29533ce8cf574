"""Muon against its definition: the step is the orthogonal matrix nearest to the momentum, as far as it goes."""

import pytest
import torch

from lfs_cli.optimizers.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(8, 8), (16, 5), (5, 16), (1, 7)], ids=str)
def test_singular_vectors_stay_and_singular_values_become_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    in_its_basis = U.T @ orthogonal(matrix) @ Vh.T
    values = in_its_basis.diagonal()
    assert (in_its_basis - values.diag()).abs().max() < 1e-5
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
