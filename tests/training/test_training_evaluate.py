"""Evaluation: every token counts the same, and the model is left as it was."""

import math

import numpy as np
import pytest
import torch

from lfs_cli.config import ModelConfig
from lfs_cli.corpus.shards import Tokens
from lfs_cli.model import Transformer, cross_entropy
from lfs_cli.training.evaluate import evaluate, unigram_entropy


def test_the_loss_is_the_mean_over_tokens_not_over_batches() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=300, context_length=8, width=16, layers=1, heads=2))
    tokens = torch.randint(300, (5, 9))
    whole = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).item()
    batches = [(part[:, :-1], part[:, 1:]) for part in (tokens[:4], tokens[4:])]

    def loss(tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        assert not model.training
        return cross_entropy(model(tokens_BT), targets_BT)

    found = evaluate(model, loss, batches, torch.device("cpu"), step=3, bytes_per_token=4.0)
    assert found.loss == pytest.approx(whole, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(whole), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(whole / math.log(2) / 4)
    assert (found.tokens, found.step) == (40, 3)
    assert model.training


def test_the_unigram_entropy_of_equal_shares_is_the_log_of_their_number() -> None:
    assert unigram_entropy(Tokens.of(np.array([7, 8, 9, 10] * 5, dtype=np.uint16))) == pytest.approx(math.log(4))
    assert unigram_entropy(Tokens.of(np.array([7] * 5, dtype=np.uint16))) == pytest.approx(0)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100, None])
def test_batches_may_be_read_in_parts(rows: int | None) -> None:
    seen = []

    def loss(tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        seen.append(len(tokens_BT))
        return tokens_BT.float().mean()

    batches = [(torch.arange(20.0).view(5, 4), torch.zeros(5, 4)), (torch.full((2, 4), 7.0), torch.zeros(2, 4))]
    found = evaluate(torch.nn.Identity(), loss, batches, torch.device("cpu"), step=1, bytes_per_token=None, rows=rows)
    assert found.loss == pytest.approx((5 * 9.5 + 2 * 7) / 7)
    assert found.tokens == 28
    assert max(seen) == min(rows or 5, 5)
