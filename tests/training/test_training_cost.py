"""Costs known before a run equal what a run finds."""

import itertools

import pytest
import torch

from lfs_cli.config import ModelConfig, TrainConfig, load_config
from lfs_cli.model import Transformer
from lfs_cli.training.cost import flops_per_token, parameter_count, process_peak_bytes

OPTIONS = {
    "feed_forward": ["swiglu", "silu", "relu2"],
    "norm": ["rms_norm", "none"],
    "qk_norm": [False, True],
    "tied_head": [False, True],
    "kv_heads": [1, 4],
}
MORE = {
    "embedding_norm": [False, True],
    "embedding_skip": [False, True],
    "value_embeddings": [0, 1],
    "kv_heads": [1, 4],
    "norm": ["rms_norm", "none"],
}


@pytest.mark.parametrize("options", [OPTIONS, MORE], ids=["parts", "recipes"])
def test_the_parameter_formula_equals_the_model(options: dict) -> None:
    for values in itertools.product(*options.values()):
        config = ModelConfig(vocab_size=300, width=32, heads=4, layers=2, **dict(zip(options, values, strict=True)))
        with torch.device("meta"):
            assert parameter_count(config) == Transformer(config).parameter_count(), values


def test_a_window_saves_the_flops_of_what_it_hides() -> None:
    shape = {"vocab_size": 300, "width": 32, "heads": 4, "layers": 4, "context_length": 64}
    full = flops_per_token(ModelConfig(**shape))

    for pattern, short in (("S", 4), ("SSSL", 3), ("L", 0)):
        saved = full - flops_per_token(ModelConfig(**shape, window=16, window_pattern=pattern))
        seen_fully, seen = (sum(min(t + 0.5, window) for t in range(64)) / 64 for window in (64, 16))
        assert saved == pytest.approx(short * 12 * 32 * (seen_fully - seen), rel=0.01)


def test_tables_of_value_embeddings_cost_no_flops_but_their_mixing() -> None:
    shape = {"vocab_size": 300, "width": 32, "heads": 4, "layers": 4}
    more = flops_per_token(ModelConfig(**shape, value_embeddings=2)) - flops_per_token(ModelConfig(**shape))
    assert more == 6 * 4 * 2  # the two weights of each of four layers


def test_known_models_have_their_known_size() -> None:
    assert parameter_count(load_config(TrainConfig, "config.json").model) == 22_696_448
    gpt2 = load_config(TrainConfig, "gpt2_small.json").model
    assert flops_per_token(gpt2) == 6 * parameter_count(gpt2) + 6 * 12 * 1024 * 768


def test_the_input_embedding_costs_no_flops() -> None:
    small, large = (ModelConfig(vocab_size=size, width=32, heads=4) for size in (300, 600))
    assert flops_per_token(large) - flops_per_token(small) == 6 * 300 * 32


def test_the_peak_of_this_process_is_plausible() -> None:
    assert 10**7 < process_peak_bytes() < 10**12
