import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfs_cli.config import SamplingConfig
from lfs_cli.errors import ConfigError
from lfs_cli.generation.sample import NUCLEUS, SAMPLERS, build_sampler, draw

few = settings(max_examples=50, deadline=None)
everything = SamplingConfig(temperature=1.0, top_p=1.0)

STRENGTHS = {
    "greedy": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"k": 3},
    "top_p": {"p": 0.8},
    "min_p": {"share": 0.1},
}


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """(B, V) with many ties: half of them are whole numbers."""
    B, V = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 31, NUCLEUS + 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x_BV = torch.randn(B, V, generator=generator) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    return x_BV.round() if draw(st.booleans()) else x_BV


def kept(logits_BV: Tensor) -> Tensor:
    return logits_BV > -math.inf


def test_every_sampler_is_tested_here() -> None:
    assert SAMPLERS.names() == sorted(STRENGTHS)


@pytest.mark.parametrize("name", STRENGTHS)
@given(x_BV=logits())
@few
def test_probabilities_sum_to_one_and_keep_their_order(name: str, x_BV: Tensor) -> None:
    y_BV = SAMPLERS.get(name)(x_BV, **STRENGTHS[name])

    torch.testing.assert_close(y_BV.softmax(-1).sum(-1), torch.ones(len(x_BV)))
    assert y_BV.shape == x_BV.shape
    smallest_kept_B = x_BV.masked_fill(~kept(y_BV), math.inf).amin(-1)
    largest_dropped_B = x_BV.masked_fill(kept(y_BV), -math.inf).amax(-1)
    assert (largest_dropped_B <= smallest_kept_B).all()


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
@given(x_BV=logits())
@few
def test_filters_leave_the_kept_logits_alone_and_do_nothing_twice(name: str, x_BV: Tensor) -> None:
    y_BV = SAMPLERS.get(name)(x_BV, **STRENGTHS[name])

    assert torch.equal(y_BV[kept(y_BV)], x_BV[kept(y_BV)])
    if name != "top_p":  # what is left after top-p has new probabilities, of which fewer may be enough
        assert torch.equal(SAMPLERS.get(name)(y_BV, **STRENGTHS[name]), y_BV)


@given(x_BV=logits(), k=st.integers(1, 300))
@few
def test_top_k_keeps_exactly_k_and_of_equals_the_lowest_ids(x_BV: Tensor, k: int) -> None:
    order_BV = x_BV.sort(dim=-1, descending=True, stable=True).indices
    expected_BV = torch.zeros_like(x_BV, dtype=torch.bool).scatter(-1, order_BV[:, :k], True)

    assert torch.equal(kept(SAMPLERS.get("top_k")(x_BV, k=k)), expected_BV)


@given(x_BV=logits(), p=st.floats(0, 1))
@few
def test_top_p_keeps_the_fewest_tokens_that_reach_the_sum(x_BV: Tensor, p: float) -> None:
    kept_BV = kept(SAMPLERS.get("top_p")(x_BV, p=p))

    for keep, probabilities in zip(kept_BV, x_BV.double().softmax(-1), strict=True):
        assert keep.any()
        assert probabilities[keep].sum() >= p - 1e-5
        assert keep.sum() == 1 or probabilities[keep].sum() - probabilities[keep].min() < p + 1e-5


def test_top_p_of_a_known_distribution() -> None:
    x_BV = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()

    assert kept(SAMPLERS.get("top_p")(x_BV, p=0.65)).tolist() == [[False, True, False, True]]
    assert kept(SAMPLERS.get("top_p")(x_BV, p=0.75)).tolist() == [[False, True, True, True]]
    assert kept(SAMPLERS.get("top_p")(x_BV, p=0.0)).tolist() == [[False, True, False, False]]


@given(x_BV=logits(), share=st.floats(0, 1))
@few
def test_min_p_keeps_what_is_likely_enough(x_BV: Tensor, share: float) -> None:
    probability_BV = x_BV.double().softmax(-1)
    ratio_BV = probability_BV / probability_BV.amax(-1, keepdim=True)
    kept_BV = kept(SAMPLERS.get("min_p")(x_BV, share=share))

    assert (ratio_BV[kept_BV] >= share - 1e-5).all()
    assert (ratio_BV[~kept_BV] <= share + 1e-5).all()


@given(x_BV=logits(), number=st.floats(0, 1 - 2**-24, width=32))
@few
def test_a_temperature_of_zero_draws_the_argmax(x_BV: Tensor, number: float) -> None:
    sample = build_sampler(SamplingConfig(temperature=0, top_k=5, top_p=0.5, min_p=0.2))

    drawn_B = draw(sample(x_BV), torch.full((len(x_BV),), number))

    assert torch.equal(drawn_B, x_BV.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-45, 1e-20, 1e20, 1e300])
def test_extreme_temperatures_stay_numbers(temperature: float) -> None:
    x_BV = torch.tensor([[1.0, 3.0, 2.0, -5.0]])

    p_BV = build_sampler(SamplingConfig(temperature=temperature, top_p=1.0))(x_BV).softmax(-1)

    expected = [[0.0, 1.0, 0.0, 0.0]] if temperature < 1 else [[0.25] * 4]
    torch.testing.assert_close(p_BV, torch.tensor(expected))


@given(
    x_BV=logits(),
    number=st.floats(0, 1 - 2**-24, width=32),
    config=st.sampled_from(
        [
            everything,
            SamplingConfig(),
            SamplingConfig(temperature=1.5, top_k=4, top_p=0.9, min_p=0.05),
        ]
    ),
)
@few
def test_only_kept_tokens_are_drawn(x_BV: Tensor, number: float, config: SamplingConfig) -> None:
    y_BV = build_sampler(config)(x_BV)

    drawn_B = draw(y_BV, torch.full((len(x_BV),), number))

    assert kept(y_BV).gather(-1, drawn_B[:, None]).all()


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probability_V = torch.tensor([0.5, 0.0, 0.2, 0.3])
    uniform_B = torch.rand(20_000, generator=torch.Generator().manual_seed(0))

    drawn_B = draw(probability_V.log().expand(len(uniform_B), -1), uniform_B)

    share_V = torch.bincount(drawn_B, minlength=4) / len(uniform_B)
    torch.testing.assert_close(share_V, probability_V, atol=0.01, rtol=0)


def test_samplers_compose_in_the_order_of_the_file() -> None:
    x_BV = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    expected_BV = SAMPLERS.get("temperature")(x_BV, temperature=0.5)
    for name in ("top_k", "top_p", "min_p"):
        expected_BV = SAMPLERS.get(name)(expected_BV, **{**STRENGTHS, "top_k": {"k": 20}}[name])

    composed = build_sampler(SamplingConfig(temperature=0.5, top_k=20, top_p=0.8, min_p=0.1))

    assert torch.equal(composed(x_BV), expected_BV)


def test_a_config_may_name_further_samplers() -> None:
    x_BV = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))

    sample = build_sampler(everything.model_copy(update={"others": {"top_k": {"k": 2}}}))

    assert kept(sample(x_BV)).sum() == 2


@pytest.mark.parametrize(
    ("others", "message", "hint"),
    [
        ({"top_kk": {"k": 2}}, "unknown sampler `top_kk`", "did you mean `top_k`?"),
        ({"top_k": {"n": 2}}, "sampler `top_k` has no option `n`", "choose one of: k"),
    ],
)
def test_a_misspelled_sampler_is_named(others: dict, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_sampler(everything.model_copy(update={"others": others}))

    assert (str(caught.value), caught.value.hint) == (message, hint)
