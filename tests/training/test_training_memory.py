"""Memory predicted on tensors without numbers is what PyTorch's allocator sees when the step is run."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lfs_cli.config import ModelConfig, TrainConfig, load_config
from lfs_cli.model import Transformer
from lfs_cli.optimizers import build_optimizers
from lfs_cli.runs.setup import training_loss
from lfs_cli.training.casts import Casts
from lfs_cli.training.memory import largest_microbatch, predict_memory
from lfs_cli.training.trace import peak_bytes

CPU = torch.device("cpu")
SMALL = {"vocab_size": 300, "context_length": 64, "width": 64, "heads": 4, "attention": "standard"}
CASES = [
    ({"layers": 2}, {"batch_size": 8}, torch.float32),
    ({"layers": 5}, {"batch_size": 8}, torch.float32),  # beyond what is traced
    ({"layers": 5, "checkpointing": "full"}, {"batch_size": 8}, torch.float32),
    ({"layers": 5, "checkpointing": "selective"}, {"batch_size": 8}, torch.float32),
    ({"layers": 4, "feed_forward": "relu2", "qk_norm": True, "kv_heads": 2}, {"batch_size": 8}, torch.float32),
    ({"layers": 4, "norm_position": "post", "tied_head": True}, {"batch_size": 8, "microbatch": 2}, torch.float32),
    ({"layers": 4}, {"batch_size": 8}, torch.bfloat16),
    # Copies of the weights for all passes, which a pass with checkpointing would not keep
    ({"layers": 5, "width": 256}, {"batch_size": 8, "microbatch": 2}, torch.bfloat16),
    ({"layers": 5, "width": 256, "checkpointing": "selective"}, {"batch_size": 4, "microbatch": 2}, torch.bfloat16),
    ({"layers": 5, "width": 256, "checkpointing": "full"}, {"batch_size": 4, "microbatch": 1}, torch.bfloat16),
]


def allocated(config: TrainConfig, dtype: torch.dtype) -> int:
    """The most bytes that PyTorch's allocator gave out at once in a step, as its profiler saw them."""
    model = Transformer(config.model)
    loss = training_loss(model, config, CPU, dtype)
    tokens = torch.zeros(config.passes_size, config.model.context_length, dtype=torch.int64)

    passes = config.batch_size // config.passes_size

    def step() -> None:
        with Casts(model, dtype).kept(passes):
            for _ in range(passes):
                loss(tokens, tokens).backward()

    step()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("model", "run", "dtype"), CASES, ids=str)
def test_the_prediction_is_within_a_tenth(model, run, dtype) -> None:
    config = TrainConfig(model=ModelConfig(**{**SMALL, **model}), **run)
    assert predict_memory(config, "cpu", dtype).step == pytest.approx(allocated(config, dtype), rel=0.1)


COMPILED = [
    ({"layers": 5, "qk_norm": True}, {"batch_size": 8, "compile": True}, torch.float32),
    ({"layers": 5, "qk_norm": True}, {"batch_size": 8, "compile": "blocks"}, torch.bfloat16),
    # All gradients of a pass at once, beside those of the passes before
    (
        {"layers": 2, "width": 256, "context_length": 8},
        {"batch_size": 2, "microbatch": 1, "compile": True},
        torch.float32,
    ),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # a compiler has its own
@pytest.mark.parametrize(("model", "run", "dtype"), COMPILED, ids=str)
def test_the_prediction_of_a_compiled_step_is_within_a_tenth(model, run, dtype) -> None:
    torch._dynamo.reset()
    config = TrainConfig(model=ModelConfig(**{**SMALL, **model}), **run)
    off = 0.1 if torch.__version__ >= "2.13" else 0.13  # older compilers save less
    assert predict_memory(config, "cpu", dtype).step == pytest.approx(allocated(config, dtype), rel=off)


def test_nothing_is_compiled_on_a_cpu_unless_it_is_asked_for() -> None:
    found = [
        predict_memory(TrainConfig(model=ModelConfig(**SMALL), compile=how), "cpu", torch.float32)
        for how in ("auto", False, True)
    ]
    assert found[0] == found[1]
    assert found[2].step < 0.95 * found[1].step


def test_weights_and_state_are_counted_beside_the_step() -> None:
    config = TrainConfig(model=ModelConfig(**SMALL), batch_size=2)
    found = predict_memory(config, "cpu", torch.float32)
    count = Transformer(config.model).parameter_count()
    assert (found.weights, found.state) == (4 * count, 8 * count)
    assert found.peak == found.weights + found.state + found.step


STATES = [("adamw", {}), ("lion", {}), ("muon", {}), ("adafactor", {}), ("adafactor", {"momentum": 0.9})]
STATES += [("sgd", {}), ("sgd", {"momentum": 0.9})]


@pytest.mark.parametrize(("name", "options"), STATES, ids=str)
def test_what_optimizers_remember_is_what_they_do_remember(name: str, options: dict) -> None:
    groups = ({"match": "*norm*", "name": "adamw"}, {"match": "*", "name": name, "options": options})
    config = TrainConfig(model=ModelConfig(**SMALL, layers=2), optimizer=groups, batch_size=2)
    model = Transformer(config.model)
    optimizers = build_optimizers(model, config.optimizer)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    for optimizer in optimizers:
        optimizer.step()
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    found = sum(x.nbytes for state in states for x in state.values() if isinstance(x, torch.Tensor))
    assert predict_memory(config, "cpu", torch.float32).state == found


def test_an_update_may_need_more_than_the_passes() -> None:
    few = {"vocab_size": 300, "context_length": 2, "width": 256, "heads": 4, "attention": "standard"}
    config = TrainConfig(model=ModelConfig(**few, layers=1), batch_size=1)
    found = predict_memory(config, "cuda", torch.float32)
    assert found.step == pytest.approx(2 * found.weights, rel=0.02)  # gradients, and the roots of AdamW on lists
    largest = 4 * max(weight.numel() for weight in Transformer(config.model).parameters())
    found = predict_memory(config, "cpu", torch.float32)
    assert found.step == pytest.approx(found.weights + largest, rel=0.02)  # there, of one weight after the other


def test_copies_of_the_weights_are_there_during_the_update() -> None:
    few = ModelConfig(vocab_size=300, context_length=2, width=256, heads=4, layers=1, attention="standard")
    alone, many = (
        predict_memory(TrainConfig(model=few, batch_size=2, microbatch=rows), "cuda", torch.bfloat16) for rows in (2, 1)
    )
    copies = 2 * sum(weight.numel() for name, weight in Transformer(few).named_parameters() if "norm" not in name)
    assert many.step >= alone.step + copies - 2 * 300 * 256  # the embedding is looked up, not multiplied


def test_less_is_kept_the_more_is_computed_again() -> None:
    found = [
        predict_memory(TrainConfig(model=ModelConfig(**SMALL, checkpointing=kind)), "cuda", torch.bfloat16).step
        for kind in ("none", "selective", "full")
    ]
    assert found == sorted(found, reverse=True)
    assert found[2] < found[0] / 2


def test_flash_attention_of_a_gpu_that_is_not_here_keeps_no_scores() -> None:
    sizes = {"vocab_size": 300, "width": 64, "heads": 4, "context_length": 1024}
    flash, standard = (
        predict_memory(TrainConfig(model=ModelConfig(**sizes, attention=name), batch_size=1), "cuda", torch.bfloat16)
        for name in ("auto", "standard")
    )
    assert standard.step - flash.step > 4 * 4 * 1024**2 * 2  # four layers of four heads of bfloat16 scores


MEASURED = [
    ("gpt2_small.json", {"batch_size": 32}, 10.74),
    ("speedrun.json", {}, 8.98),
    ("config.json", {}, 2.59),
]
"""Gigabytes of a step beside weights and state, compiled, on one H200, 2026-11-29 and 30."""


@pytest.mark.parametrize(("name", "changes", "measured"), MEASURED, ids=str)
def test_a_step_on_a_gpu_holds_what_was_measured_on_one(name: str, changes: dict, measured: float) -> None:
    config = load_config(TrainConfig, name, options=changes)
    found = predict_memory(config, "cuda", torch.bfloat16, is_hopper=True)
    assert found.step / 1e9 == pytest.approx(measured, rel=0.1)


def test_a_hopper_gpu_is_foreseen_to_keep_less_where_it_has_a_kernel_that_does() -> None:
    config = load_config(TrainConfig, "config.json")
    hopper, other = (predict_memory(config, "cuda", torch.bfloat16, is_hopper=known) for known in (True, False))
    turned = 4 * 2 * config.batch_tokens * config.model.width * 2  # in four layers, queries and keys of two bytes
    assert other.step - hopper.step == pytest.approx(turned, rel=0.15)
    assert (other.weights, other.state) == (hopper.weights, hopper.state)


def test_the_largest_microbatch_fits_and_the_next_does_not() -> None:
    config = TrainConfig(model=ModelConfig(**SMALL, layers=1), batch_size=6)
    peaks = {
        n: predict_memory(config.model_copy(update={"microbatch": n}), "cpu", torch.float32).peak for n in (1, 2, 3, 6)
    }
    assert largest_microbatch(config, "cpu", torch.float32, peaks[6]) == 6
    assert largest_microbatch(config, "cpu", torch.float32, peaks[3]) == 3
    assert largest_microbatch(config, "cpu", torch.float32, peaks[1] - 1) is None
    huge = config.model_copy(update={"batch_size": 6 * 2**40})  # nobody waits until its divisors are counted one by one
    assert largest_microbatch(huge, "cpu", torch.float32, peaks[3]) == 3


def test_the_whole_batch_is_tried_first_as_several_passes_hold_copies_too() -> None:
    sizes = {"vocab_size": 300, "context_length": 4, "width": 256, "heads": 4, "layers": 2, "attention": "standard"}
    config = TrainConfig(model=ModelConfig(**sizes), batch_size=8)
    peaks = [
        predict_memory(config.model_copy(update={"microbatch": n}), "cpu", torch.bfloat16).peak for n in (1, 2, 4, 8)
    ]
    assert peaks[3] < min(peaks[:3])
    assert largest_microbatch(config, "cpu", torch.bfloat16, peaks[3]) == 8


def test_a_tensor_counts_from_its_making_to_its_end() -> None:
    def work() -> None:
        first = torch.ones(1000)
        second = first.view(10, 100) + 1
        del first
        third = second * 2
        third.add_(1)

    assert peak_bytes(work) == 2 * 4000
