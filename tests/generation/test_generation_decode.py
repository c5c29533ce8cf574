from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfs_cli.config import ModelConfig, SamplingConfig
from lfs_cli.errors import CheckpointError
from lfs_cli.generation.decode import generate_tokens, window_start
from lfs_cli.model import Transformer

TINY: dict[str, Any] = {
    "vocab_size": 37,
    "context_length": 24,
    "width": 32,
    "layers": 2,
    "heads": 4,
    "feed_forward_width": 48,
}
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped": {"kv_heads": 2},
    "one key/value head": {"kv_heads": 1, "qk_norm": True},
    "no positions": {"positions": "none"},
    "post-norm": {"norm_position": "post"},
    "no norm": {"norm": "none", "feed_forward": "silu"},
    "tied": {"tied_head": True, "feed_forward": "relu2"},
    "reference": {"attention": "reference"},
}
GREEDY = SamplingConfig(temperature=0)
WILD = SamplingConfig(temperature=1.5, top_p=1.0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [4]]


def make_model(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{**TINY, **changes})).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model()


def texts(model: Transformer, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """What is written after each prompt."""
    written: list[list[int]] = [[] for _ in prompts]
    for step in generate_tokens(model, prompts, **options):
        for row, token in zip(written, step, strict=True):
            if token is not None:
                row.append(token)
    return written


@torch.no_grad()
def argmax_continuation(model: Transformer, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The definition: the whole text goes through the model for every token."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_decoding_takes_the_argmax_of_the_whole_text(shape: str) -> None:
    model = make_model(**SHAPES[shape])

    for prompt in PROMPTS:
        assert texts(model, [prompt], max_tokens=12, sampling=GREEDY) == [argmax_continuation(model, prompt, 12)]


@pytest.mark.parametrize("sampling", [GREEDY, WILD], ids=["greedy", "wild"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_and_uncached_decoding_write_the_same_tokens(shape: str, sampling: SamplingConfig) -> None:
    model = make_model(**SHAPES[shape])

    cached, uncached = (
        texts(model, PROMPTS, max_tokens=60, sampling=sampling, seed=3, cache=cache) for cache in (True, False)
    )  # 60 tokens: the window of 24 moves several times

    assert cached == uncached
    assert [len(row) for row in cached] == [60] * len(PROMPTS)


@given(
    lengths=st.lists(st.integers(1, TINY["context_length"]), min_size=1, max_size=4),
    max_tokens=st.integers(1, 40),
    seed=st.integers(0, 99),
    cache=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_a_batch_writes_what_its_prompts_write_alone(
    lengths: list[int], max_tokens: int, seed: int, cache: bool, model: Transformer
) -> None:
    prompts = [[(7 * row + column) % 37 for column in range(length)] for row, length in enumerate(lengths)]
    options = {"max_tokens": max_tokens, "sampling": WILD, "seed": seed, "stop_id": 0}

    together = texts(model, prompts, cache=cache, **options)

    for place in range(len(prompts)):  # the same place in the batch, so the same random stream
        alone = texts(model, [prompts[place]] * (place + 1), **options)
        assert together[place] == alone[place]


def test_a_seed_repeats_and_another_differs(model: Transformer) -> None:
    first, again, other = (texts(model, PROMPTS, max_tokens=20, sampling=WILD, seed=seed) for seed in (1, 1, 2))

    assert first == again
    assert first != other


def test_equal_prompts_in_a_batch_have_random_streams_of_their_own(model: Transformer) -> None:
    _, second, _, fourth = texts(model, PROMPTS, max_tokens=20, sampling=WILD)

    assert second != fourth


def test_a_text_ends_with_the_stop_token_and_the_others_go_on(model: Transformer) -> None:
    endless = texts(model, PROMPTS, max_tokens=20, sampling=WILD)
    stop_id = endless[0][4]

    stopped = texts(model, PROMPTS, max_tokens=20, sampling=WILD, stop_id=stop_id)

    for row, whole in zip(stopped, endless, strict=True):
        expected = whole[: whole.index(stop_id) + 1] if stop_id in whole else whole
        assert row == expected


def test_tokens_beyond_the_vocabulary_are_never_written(model: Transformer) -> None:
    rows = texts(model, PROMPTS, max_tokens=50, sampling=WILD, vocab_size=12)

    assert max(map(max, rows)) == 11


def test_a_long_prompt_is_read_while_a_short_one_is_continued(model: Transformer) -> None:
    steps = list(generate_tokens(model, [[1], [1, 2, 3]], max_tokens=3, sampling=GREEDY))

    assert [[token is not None for token in step] for step in steps] == [
        [True, False],
        [True, False],
        [True, True],
        [False, True],
        [False, True],
    ]


@given(context_length=st.integers(2, 40), length=st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_the_window_fits_moves_forward_and_keeps_half_a_context(context_length: int, length: int) -> None:
    start = window_start(length, context_length)

    assert length - context_length <= start < length
    assert start == 0 or length - start > context_length - max(1, context_length // 2)
    assert start <= window_start(length + 1, context_length)


def test_the_window_of_the_docstring() -> None:
    starts = [window_start(length, 8) for length in range(1, 21)]

    assert starts == [0] * 8 + [4] * 4 + [8] * 4 + [12] * 4


def test_beyond_the_context_the_model_sees_the_window_alone(model: Transformer) -> None:
    prompt = list(range(24))
    (written,) = texts(model, [prompt], max_tokens=30, sampling=GREEDY)

    whole = prompt + written
    for length in range(24, 54):
        window = torch.tensor([whole[window_start(length, 24) : length]])
        assert whole[length] == int(model(window)[0, -1].argmax())


@pytest.mark.parametrize("prompt", [[], list(range(25))], ids=["empty", "too long"])
def test_prompts_that_do_not_fit_are_refused(model: Transformer, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"prompts of 1 to 24 tokens, got \[3, {len(prompt)}\]"):
        next(generate_tokens(model, [[1, 2, 3], prompt], max_tokens=1))


def test_no_prompts_write_nothing(model: Transformer) -> None:
    assert list(generate_tokens(model, [], max_tokens=5)) == []


def test_a_model_whose_logits_are_not_numbers_is_named() -> None:
    model = make_model()
    torch.nn.init.constant_(model.head_weight, float("nan"))

    with pytest.raises(CheckpointError, match="logits are not numbers in float32"):
        next(generate_tokens(model, [[1]], max_tokens=1))


def test_a_consumer_between_two_tokens_may_train(model: Transformer) -> None:
    steps = generate_tokens(model, [[1]], max_tokens=2)
    next(steps)

    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    model(torch.tensor([[1, 2]])).sum().backward()
    model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_compute_in_other_types_on_request(model: Transformer, dtype: torch.dtype) -> None:
    cached, uncached = (
        texts(model, PROMPTS, max_tokens=5, sampling=GREEDY, dtype=dtype, cache=cache) for cache in (True, False)
    )

    assert [len(row) for row in cached] == [len(row) for row in uncached] == [5] * len(PROMPTS)


def test_small_steps_take_one_thread_and_give_the_others_back(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args: seen.append(torch.get_num_threads()) or real(*args))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in generate_tokens(model, [[1]], max_tokens=2):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

    assert seen == [1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_writes_what_the_cpu_writes(shape: str) -> None:
    model = make_model(**{"attention": "standard", **SHAPES[shape]})
    expected = texts(model, PROMPTS, max_tokens=60, sampling=WILD, seed=3)

    assert texts(model.cuda(), PROMPTS, max_tokens=60, sampling=WILD, seed=3) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [True, False])
def test_a_gpu_decodes_in_bfloat16(cache: bool) -> None:
    model = make_model(width=256).cuda().bfloat16()  # 64 channels a head, which the flash kernel takes

    rows = texts(model, PROMPTS, max_tokens=60, sampling=GREEDY, cache=cache)

    assert [len(row) for row in rows] == [60] * len(PROMPTS)
