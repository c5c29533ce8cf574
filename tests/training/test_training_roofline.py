"""Estimates for GPUs that are not here: near what was measured on one that was, and in line with what bounds them."""

from dataclasses import replace

import pytest
import torch

from lfs_cli.config import ModelConfig, TrainConfig, load_config
from lfs_cli.errors import ConfigError
from lfs_cli.model.device import as_on_gpu
from lfs_cli.training import memory, roofline
from lfs_cli.training.cost import parameter_count
from lfs_cli.training.gpus import GPUS, gpu_called, known_gpu
from lfs_cli.training.roofline import step_seconds
from lfs_cli.training.trace import fake_model, no_tokens, run_pass

H100 = gpu_called("H100")
NANOGPT = {"vocab_size": 50_304, "context_length": 1024, "width": 768, "layers": 12, "heads": 12, "tied_head": True}
NANOGPT |= {"feed_forward": "silu", "positions": "none"}


def seconds(config: TrainConfig, gpu=H100, *, is_compiled: bool = True) -> float:
    return step_seconds(config, gpu, torch.bfloat16, is_compiled=is_compiled)


@pytest.mark.parametrize(("batch", "measured"), [(16, 0.0363), (64, 0.1343)])
def test_a_step_that_the_gpu_bounds_is_near_one_that_was_measured(batch: int, measured: float) -> None:
    # nanoGPT's own, whose attention is slower
    assert seconds(TrainConfig(model=ModelConfig(**NANOGPT), batch_size=batch)) == pytest.approx(measured, rel=0.12)


MEASURED = [
    ("gpt2_small.json", {"batch_size": 32}, 0.0527),
    ("config.json", {}, 0.0081),
    ("config.json", {"cuda_graphs": False}, 0.0122),
    ("speedrun.json", {}, 0.0366),
]


@pytest.mark.parametrize(("name", "changes", "measured"), MEASURED, ids=str)
def test_steps_are_near_those_that_were_measured_on_an_h200(name: str, changes: dict, measured: float) -> None:
    config = load_config(TrainConfig, name, options=changes)
    assert seconds(config, gpu_called("H200")) == pytest.approx(measured, rel=0.15)


ATTENTION = [  # T, D, and the TFLOP/s of forward and backward on that H200
    (1024, 64, 318),
    (2048, 64, 392),
    (16_384, 64, 541),
    (2048, 128, 489),
    (8192, 128, 621),
    (16_384, 128, 646),
]


@pytest.mark.parametrize(("T", "D", "measured"), ATTENTION)
def test_attention_runs_as_fast_as_was_measured_on_an_h200(T: int, D: int, measured: float) -> None:
    assert roofline.attention_share(T, D, by_hopper=True) * 989 == pytest.approx(measured, rel=0.05)
    assert roofline.attention_share(T, D, by_hopper=False) <= 0.4


def test_long_sequences_are_foreseen_faster_where_the_kernels_for_hopper_gpus_can_run() -> None:
    model = NANOGPT | {"context_length": 16_384}
    plain, windowed = (
        seconds(TrainConfig(model=ModelConfig(**model, **more), batch_size=2), gpu_called("H200"))
        for more in ({}, {"window": 16_383})
    )
    assert plain < 0.8 * windowed


def test_a_step_takes_at_least_as_long_as_its_launches() -> None:
    config = load_config(TrainConfig, "quickstart.json", options={"cuda_graphs": False})
    assert seconds(config) == seconds(config.model_copy(update={"batch_size": 1}))
    assert seconds(config) > 100 * roofline.LAUNCH_SECONDS


def test_fusing_saves_time_and_passes_cost_as_much_each() -> None:
    config = TrainConfig(model=ModelConfig(**NANOGPT), batch_size=32)
    assert seconds(config) < seconds(config, is_compiled=False)
    update = max(roofline._update_times(config, H100))
    split = config.model_copy(update={"batch_size": 64, "microbatch": 32})
    assert seconds(split) - update == pytest.approx(2 * (seconds(config) - update))


def test_adamw_is_one_kernel_that_touches_each_number_once() -> None:
    """Clipping reads gradients; the step reads weights, gradients and two means, and writes all but the gradients."""
    config = TrainConfig(model=ModelConfig(**(NANOGPT | {"layers": 1})))
    busy, launching = roofline._update_times(config, H100)
    moved = (4 + 16 + 12) * parameter_count(config.model)
    assert busy == pytest.approx(moved / (roofline.BANDWIDTH_SHARE * H100.bandwidth), rel=0.05)
    assert launching < 20 * roofline.LAUNCH_SECONDS


def test_each_bound_moves_the_time() -> None:
    config = TrainConfig(model=ModelConfig(**NANOGPT), batch_size=64)
    slower = [replace(H100, flops=H100.flops / 2), replace(H100, bandwidth=H100.bandwidth / 2)]
    extra = [seconds(config, gpu) - seconds(config) for gpu in slower]
    assert all(each > 0.1 * seconds(config) for each in extra)
    assert sum(extra) == pytest.approx(seconds(config), rel=0.1)  # half of both is half of all


def test_layers_that_are_not_traced_add_what_traced_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(model=ModelConfig(**(NANOGPT | {"layers": 5})), batch_size=8)
    along = seconds(config)
    monkeypatch.setattr(memory, "TRACED_LAYERS", 5)
    assert along == pytest.approx(seconds(config), rel=0.01)


def test_products_are_counted_as_the_formula_of_their_flops_says() -> None:
    """With all products at the same share of the peak, their time is that of 6 FLOPs a weight and token."""
    config = ModelConfig(vocab_size=2048, context_length=512, width=2048, layers=2, heads=16, attention="flash")
    kernels = []
    with fake_model(config) as model:
        tokens_BT = no_tokens(model, 4)
        kernels = roofline._kernels_of(lambda: run_pass(model, tokens_BT, torch.bfloat16), H100, is_fused=False)
        weights = sum(block_weight.numel() for name, block_weight in model.named_parameters() if "norm" not in name)
    weights -= 2048 * 2048  # the embedding is looked up
    share = roofline.PRODUCT_SHARE * 2048 / (2048 + roofline.HALF_SPEED)
    products = 6 * weights * 4 * 512 / (share * H100.flops)
    attention = 2 * (4 + 10) * 4 * 16 * 512 * 256 * 128 / (roofline.ATTENTION_SHARE * H100.flops)
    logits = 12 * 4 * 512 * 2048 / (roofline.BANDWIDTH_SHARE * H100.bandwidth)
    assert sum(kernel.seconds for kernel in kernels) == pytest.approx(products + attention + logits, rel=1e-6)


def test_short_sequences_on_a_hopper_gpu_have_the_same_flops_and_fewer_kernels() -> None:
    config = load_config(TrainConfig, "config.json").model

    def kernels_of(*, is_hopper: bool) -> list:
        how = {"is_compiled": False, "is_hopper": is_hopper}
        with as_on_gpu(**how), fake_model(config.model_copy(update={"attention": "flash"})) as model:
            tokens_BT = no_tokens(model, 4)
            return roofline._kernels_of(lambda: run_pass(model, tokens_BT, torch.bfloat16), H100, is_fused=False)

    short, separate = (kernels_of(is_hopper=is_hopper) for is_hopper in (True, False))
    assert sum(kernel.seconds for kernel in short) == pytest.approx(sum(kernel.seconds for kernel in separate))
    assert len(separate) - len(short) == config.layers  # one for each rotation; backward turned dq and dk already
    assert sum(kernel.busy(H100) for kernel in short) < sum(kernel.busy(H100) for kernel in separate)


def test_a_window_saves_attention() -> None:
    long = NANOGPT | {"context_length": 8192, "layers": 2}
    whole, part = (
        seconds(TrainConfig(model=ModelConfig(**long, window=window), batch_size=4)) for window in (None, 512)
    )
    assert part < 0.9 * whole


NAMES = [
    ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("NVIDIA A100-SXM4-80GB", "A100"),
    ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ("NVIDIA L4", "L4"),
    ("NVIDIA L40S", "L40S"),
    ("h200", "H200"),
    *((gpu.name, gpu.name) for gpu in GPUS),
]


@pytest.mark.parametrize(("name", "found"), NAMES)
def test_gpus_are_known_by_the_names_that_cuda_and_people_give_them(name: str, found: str) -> None:
    assert gpu_called(name).name == found


def test_what_is_not_known_is_no_gpu() -> None:
    assert known_gpu("NVIDIA H20") is None
    with pytest.raises(ConfigError, match="unknown GPU `A10`") as caught:
        gpu_called("A10")
    assert caught.value.hint == "did you mean `A10G`?"
