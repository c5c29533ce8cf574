"""Run every kernel, forward and backward, on small shapes: something for a memory checker to watch.

    compute-sanitizer --tool memcheck python -m tests.kernels.every_kernel

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own and what lies outside is seen.
Where there is no GPU, TRITON_INTERPRET=1 runs those in Triton.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from lfs_cli.kernels import product as product_kernels
from lfs_cli.kernels.embedding import look_up
from lfs_cli.kernels.flash_attention import flash_attention
from lfs_cli.kernels.linear_cross_entropy import HOPPER_VOCABULARIES, linear_cross_entropy
from lfs_cli.kernels.product import gated_layer
from lfs_cli.kernels.rms_norm import add_rms_norm, rms_norm
from lfs_cli.kernels.rope import qk_norm_rope
from lfs_cli.kernels.rotary_attention import project_and_attend, rotary_attention
from lfs_cli.kernels.swiglu import swiglu
from lfs_cli.model.rope import RotaryEmbedding
from lfs_cli.optimizers import AdamW, Muon, clip_scale

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float16  # Triton's interpreter multiplies no bfloat16


def drawn(*shape: int) -> Tensor:
    """Return normally distributed numbers."""
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def differentiate(name: str, function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Run ``function`` and its gradients, and say so."""
    inputs = tuple(x.requires_grad_() for x in inputs)
    found = function(*inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    torch.autograd.grad(sum(x.float().square().sum() for x in outputs), inputs)
    if ON_GPU:
        torch.cuda.synchronize()
    print(name, flush=True)


def step(optimizer: type[AdamW] | type[Muon], *shapes: tuple[int, ...]) -> None:
    """Move float32 weights of these shapes, twice, and say so."""
    weights = [x.float().requires_grad_() for x in all_drawn(shapes)]
    moves = optimizer(weights)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        moves.step(scale=clip_scale(weights, 0.5)[1])
    if ON_GPU:
        torch.cuda.synchronize()
    print(f"{optimizer.__name__} {shapes}", flush=True)


def main() -> None:
    """Run them all."""
    torch.manual_seed(0)
    for D, T, G, causal in product((64, 128), (300, 512), (2, 1), (True, False)) if ON_GPU else ():
        how = {"causal": causal, "implementation": "hopper"}
        sizes = (1, T, 2, D), (1, T, G, D), (1, T, G, D)
        differentiate(f"hopper {sizes} {causal=}", partial(flash_attention, **how), *all_drawn(sizes))
    for shape in (
        ((16, 500, 12, 64), (1, 4096, 1, 64)) if ON_GPU else ()
    ):  # more tiles than programs; tiles of long sequences
        sizes = (shape,) * 3
        differentiate(f"hopper {sizes}", partial(flash_attention, implementation="hopper"), *all_drawn(sizes))
    documents = torch.tensor([0, 100, 300], device=DEVICE)
    for D, how in product((32, 64, 128), ({}, {"window": 70, "softcap": 3.0, "documents": documents})):
        sizes = (1, 300, 2, D), (1, 300, 1, D), (1, 300, 1, D)
        how = {**how, "implementation": "triton"}
        differentiate(f"triton {sizes}", partial(flash_attention, **how), *all_drawn(sizes))
    rope = RotaryEmbedding(1e4, 64, 300)
    cos, sin = rope.cos.to(DEVICE), rope.sin.to(DEVICE)
    heads = [drawn(2, 300, 4, 64), drawn(2, 300, 2, 64)]
    differentiate("rotation", lambda q, k: qk_norm_rope(q, k, cos, sin), *heads)
    differentiate("QK-norm, rotation", lambda q, k, *w: qk_norm_rope(q, k, cos, sin, *w), *heads, drawn(64), drawn(64))
    for weights in ([], [drawn(64), drawn(64)]):
        attend = lambda qkv, *w: rotary_attention(qkv, cos, sin, *w, heads=4, kv_heads=2)  # noqa: E731  shorter so
        differentiate(f"turned attention, {len(weights)} weights", attend, drawn(2, 300, 8 * 64), *weights)
    added = lambda qkv, added: rotary_attention(qkv, cos, sin, heads=4, kv_heads=2, added_BTGD=added)  # noqa: E731
    differentiate("turned attention, added to values", added, drawn(2, 300, 8 * 64), drawn(2, 300, 2, 64))
    # On a Hopper GPU, gradients are turned where they are rounded
    for D, T, G in product((64, 128), (300, 512), (2, 1)):
        long = RotaryEmbedding(1e4, D, T)
        turn = long.cos.to(DEVICE), long.sin.to(DEVICE)
        attend = lambda qkv, turn=turn, G=G: rotary_attention(qkv, *turn, heads=2, kv_heads=G)  # noqa: E731  shorter so
        differentiate(f"turned attention, {D=} {T=} {G=}", attend, drawn(1, T, (2 + 2 * G) * D))
    for T in (200, 256):  # on a Hopper GPU, by the kernels for short sequences; more heads than fit at once
        short = RotaryEmbedding(1e4, 32, T)
        turn = short.cos.to(DEVICE), short.sin.to(DEVICE)
        attend = lambda qkv, turn=turn: rotary_attention(qkv, *turn, heads=3, kv_heads=3)  # noqa: E731  shorter so
        differentiate(f"turned attention, T = {T}", attend, drawn(100 if ON_GPU else 1, T, 9 * 32))
    differentiate("SwiGLU", swiglu, drawn(300, 2 * 136))
    rows = product_kernels.ROWS if ON_GPU else 10  # from where on Hopper GPUs have them
    for C, F in ((72, 136), (64, 512)):
        differentiate(f"gated layer, {C=} {F=}", gated_layer, drawn(rows + 3, C), *all_drawn(((F, C), (F, C), (C, F))))
    whole = lambda x, *weights: project_and_attend(x, weights, None, cos, sin, heads=2)  # noqa: E731  shorter so
    x = drawn(rows // 300 + 1, 300, 72)
    differentiate("turned product, attention", whole, x, *all_drawn(((128, 72), (64, 72), (64, 72))))
    differentiate("RMSNorm", rms_norm, drawn(300, 100), drawn(100))
    tokens = torch.arange(700, device=DEVICE) ** 2 % 40 // 3  # runs within chunks and over many
    look = lambda *tables: tuple(look_up(tokens, tables, [DTYPE] * 2))  # noqa: E731  shorter so
    differentiate("embedding", look, drawn(40, 100).float(), drawn(40, 300).float())
    differentiate("sum, RMSNorm", add_rms_norm, drawn(300, 100), drawn(300, 100), drawn(100))
    for V in (1_000, HOPPER_VOCABULARIES[True].start + 1):
        targets = torch.arange(300, device=DEVICE) * 7 % V
        differentiate(
            f"cross-entropy, V = {V}",
            partial(linear_cross_entropy, targets=targets, softcap=15.0, z_loss=1e-4),
            drawn(300, 64),
            drawn(V, 64),
        )
    for shapes in (((5_000,), (3,)), ((80, 64), (64, 80), (64, 64)), ((65, 67), (67, 65), (2, 1, 9), (5,))):
        step(AdamW, *shapes)
        step(Muon, *shapes)


def all_drawn(shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """Return a tensor for each shape."""
    return [drawn(*shape) for shape in shapes]


if __name__ == "__main__":
    main()
