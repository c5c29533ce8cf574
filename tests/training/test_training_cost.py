"""Costs known before a run equal what a run finds."""

import itertools

import pytest
import torch

from lfs_cli.config import ModelConfig, TrainConfig, load_config
from lfs_cli.model import Transformer
from lfs_cli.training.cost import estimate, flops_per_token, parameter_count, process_peak_bytes

OPTIONS = {
    "feed_forward": ["swiglu", "silu", "relu2"],
    "norm": ["rms_norm", "none"],
    "qk_norm": [False, True],
    "tied_head": [False, True],
    "kv_heads": [1, 4],
}


@pytest.mark.parametrize("values", list(itertools.product(*OPTIONS.values())), ids=str)
def test_the_parameter_formula_equals_the_model(values: tuple) -> None:
    config = ModelConfig(vocab_size=300, width=32, heads=4, layers=2, **dict(zip(OPTIONS, values, strict=True)))
    with torch.device("meta"):
        assert parameter_count(config) == Transformer(config).parameter_count()


def test_known_models_have_their_known_size() -> None:
    assert parameter_count(load_config(TrainConfig, "config.json").model) == 22_696_448
    gpt2 = load_config(TrainConfig, "gpt2_small.json").model
    assert flops_per_token(gpt2) == 6 * parameter_count(gpt2) + 6 * 12 * 1024 * 768


def test_the_input_embedding_costs_no_flops() -> None:
    small, large = (ModelConfig(vocab_size=size, width=32, heads=4) for size in (300, 600))
    assert flops_per_token(large) - flops_per_token(small) == 6 * 300 * 32


def test_an_estimate_counts_weights_gradients_and_optimizer_state() -> None:
    config = load_config(TrainConfig, "quickstart.json")
    cost = estimate(config, torch.device("cpu"), torch.float32)
    assert cost.weight_bytes == 16 * cost.parameters
    assert cost.total_tokens == config.steps * config.batch_size * config.model.context_length
    assert cost.seconds > 0
    split = config.model_copy(update={"microbatch": config.batch_size // 2})
    halved = estimate(split, torch.device("cpu"), torch.float32)
    assert halved.activation_bytes < cost.activation_bytes


def test_the_peak_of_this_process_is_plausible() -> None:
    assert 10**7 < process_peak_bytes() < 10**12
