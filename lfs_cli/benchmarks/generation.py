"""How fast a model reads prompts and writes tokens, with and without a cache of keys and values.

    prefill   from the prompts to the first token of each       tokens/s counts prompt tokens
    decode    all tokens after the first                        tokens/s counts written tokens, of all prompts together

Decoding without a cache reads everything again for every token: the baseline, and the same tokens.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lfs_cli.benchmarks.measure import BENCHMARKS, Bench, Candidate, Row
from lfs_cli.benchmarks.model import SIZES
from lfs_cli.config import BenchConfig, GenerationBench, ModelConfig, SamplingConfig
from lfs_cli.errors import ConfigError
from lfs_cli.generation.decode import generate_tokens
from lfs_cli.model import Transformer, load_model

UNCACHED = "decode, no cache"
"""Name of the baseline."""


@BENCHMARKS.register("generation")
def bench_generation(settings: BenchConfig, bench: Bench) -> list[Row]:
    """Time prefill and decoding at every batch size."""
    asked = settings.generation
    model = _model(asked, settings.seed, bench).eval()
    longest = model.config.context_length
    if asked.prompt_tokens + asked.max_tokens > longest:
        raise ConfigError(
            f"{asked.prompt_tokens} + {asked.max_tokens} tokens are more than the model's context of {longest}",
            hint=f"set `generation.max_tokens` to at most {max(1, longest - asked.prompt_tokens)}"
            if asked.prompt_tokens < longest
            else f"set `generation.prompt_tokens` to at most {longest // 2}",
        )
    rows: list[Row] = []
    for batch in asked.batch:
        rows += _bench_batch(model, batch, asked, settings.seed, bench)
    return rows


def _model(asked: GenerationBench, seed: int, bench: Bench) -> Transformer:
    if bench.checkpoint is not None:
        return load_model(bench.checkpoint, bench.device, bench.dtype)
    size = "small" if bench.device.type == "cuda" else "tiny"
    context_length = max(256, asked.prompt_tokens + asked.max_tokens)
    torch.manual_seed(seed)
    with bench.device:
        return Transformer(ModelConfig(context_length=context_length, **SIZES[size])).to(bench.dtype)


def _bench_batch(model: Transformer, batch: int, asked: GenerationBench, seed: int, bench: Bench) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(model.config.vocab_size, (batch, asked.prompt_tokens), generator=generator).tolist()

    def write(max_tokens: int, *, cache: bool) -> Iterator[Any]:
        greedy = SamplingConfig(temperature=0.0)
        return generate_tokens(model, prompts, max_tokens=max_tokens, sampling=greedy, dtype=bench.dtype, cache=cache)

    started: list[Iterator[Any]] = []

    def after_first(*, cache: bool) -> Callable[[], None]:
        def prepare() -> None:
            started[:] = [write(asked.max_tokens, cache=cache)]
            next(started[0])

        return prepare

    def finish() -> None:
        for _ in started.pop():
            pass

    candidates = [Candidate("prefill", lambda: next(write(1, cache=True)))]
    if asked.max_tokens > 1:
        candidates += [
            Candidate("decode", finish, prepare=after_first(cache=True)),
            Candidate(UNCACHED, finish, prepare=after_first(cache=False)),
        ]
    results = bench.measure(f"generation, {batch} prompts", candidates)
    rows = []
    for name, result in results.items():
        tokens = batch * (asked.prompt_tokens if name == "prefill" else asked.max_tokens - 1)
        seconds = result.timing.median if result.timing else None
        baseline = (None, "") if name == "prefill" else (results[UNCACHED], UNCACHED)
        rows.append(
            {
                "model": bench.checkpoint.parent.parent.name if bench.checkpoint else "random weights",
                "params_M": model.parameter_count() / 1e6,
                "dtype": str(bench.dtype).removeprefix("torch."),
                "batch": batch,
                "prompt_tokens": asked.prompt_tokens,
                "max_tokens": asked.max_tokens,
                "part": name,
                "tokens_per_second": tokens / seconds if seconds else None,
                **result.row(*baseline),
            }
        )
    return rows
