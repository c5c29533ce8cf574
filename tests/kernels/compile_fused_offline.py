"""Compile the fused kernels for a GPU that is not there, and print what ptxas says of each, as JSON lines.

    python compile_fused_offline.py 90 bf16

compiles for compute capability 9.0 and bfloat16, at the shapes of GPT-2 and of a wider model.

Runs in a process of its own: in that of the tests, Triton interprets.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lfs_cli.kernels import adamw, clip, embedding, linear_cross_entropy, muon, rms_norm, rope, swiglu

TYPES = {  # of what is not in the type of the model
    "targets_ptr": "*i64",
    "counts_ptr": "*i1",
    "losses_ptr": "*fp32",
    "r_ptr": "*fp32",
    "weight_ptr": "*fp32",
    "q_weight_ptr": "*fp32",
    "k_weight_ptr": "*fp32",
    "dweights_ptr": "*fp32",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "weights_ptr": "*i64",
    "gradients_ptr": "*i64",
    "means_ptr": "*i64",
    "squares_ptr": "*i64",
    "masters_ptr": "*i64",
    "sizes_ptr": "*i64",
    "tensor_of_ptr": "*i32",
    "block_of_ptr": "*i64",
    "running_ptr": "*i64",
    "tokens_ptr": "*i64",
    "sorted_ptr": "*i32",
    "order_ptr": "*i64",
    "dw_ptr": "*fp32",
    "parts_ptr": "*fp32",
    "length_ptr": "*fp32",
    "factor_ptr": "*fp32",
    "sums_ptr": "*fp32",
}
NUMBERS = {"softcap", "z_loss", "epsilon", "lr", "mean_gain", "beta2", "square_gain", "eps", "keep"}
NUMBERS |= {"mean_correction", "square_correction", "momentum", "wide_rate", "tall_rate", "limit"}
WHOLE = {"stride", "N", "C", "short", "long", "numbers"}
"""Whole numbers that are multiples of 16."""


def cases(dtype: str) -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """Names, kernels, constants and warps."""
    for softcap in ({"softcap": None}, {}):
        constants = {"BLOCK_V": linear_cross_entropy.BLOCK_V, "WRITES_GRADIENT": True, **softcap}
        name = "loss and gradient" + ("" if softcap else " with a soft cap")
        yield name, linear_cross_entropy._loss_and_gradient, constants, linear_cross_entropy.WARPS
    for C in (512, 768, 2048, 5120):
        for pointers in ({}, {"residual_ptr": None, "h_ptr": None}):
            block_r, block_c, warps = rms_norm._blocks(C, numbers=16)
            constants = {"C": C, "BLOCK_R": block_r, "BLOCK_C": block_c, **pointers}
            yield f"rms norm C={C}", rms_norm._forward, constants, warps
        block_r, block_c, warps = rms_norm._blocks(C, numbers=32)
        stages = rms_norm._stages(block_r * block_c, 4 if dtype == "fp32" else 2)
        constants = {"C": C, "BLOCK_R": block_r, "BLOCK_C": block_c, "STAGES": stages}
        yield f"rms norm backward C={C}", rms_norm._backward, constants, warps
    for D in (64, 128):
        for weights in ({}, {"q_weight_ptr": None, "k_weight_ptr": None}):
            constants = {"H": 12, "G": 4, "D": D, "BLOCK_T": rope._block_t(D), **weights}
            yield f"rope D={D} {len(weights)}", rope._forward, constants, 4
            unused = {"q_ptr": None, "k_ptr": None, "dweights_ptr": None} if weights else {}
            yield f"rope backward D={D} {len(weights)}", rope._backward, {**constants, **unused}, 4
    for kind, F in product(("swiglu", "silu", "relu2"), (1344, 2048)):
        constants = {"F": F, "KIND": kind, "INPUTS": 2 if kind == "swiglu" else 1, "BLOCK": swiglu.BLOCK}
        yield f"{kind} F={F}", swiglu._forward, constants, 4
        yield f"{kind} backward F={F}", swiglu._backward, constants, 4
    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    for masters in ({}, {"masters_ptr": None}):
        constants = {"WEIGHT": types[dtype], "GRADIENT": types[dtype], "BLOCK": adamw.BLOCK, "ALIGNED": True, **masters}
        yield f"adamw {len(masters)}", adamw._step, constants, 8
    constants = {"ALIGNED": True, "TILE": muon.TILE}
    for pointers in ({}, {"scale_ptr": None}):
        yield f"muon before {len(pointers)}", muon._prepare, {"NESTEROV": True, **constants, **pointers}, 8
    yield "muon norm", muon._normalize, {"SUMS": muon.SUMS, "BLOCK": muon.BLOCK}, 8
    yield "muon after", muon._apply, constants, 8
    yield "clip", clip._sum_squares, {"ALIGNED": True, "BLOCK": clip.BLOCK}, 8
    yield "clip bound", clip._bound, {"PARTS": clip.PARTS}, 8
    constants = {"CHUNK": embedding.CHUNK, "BLOCK_C": embedding.MOST_CHANNELS}
    yield "embedding", embedding._look_up, {"BLOCK_N": embedding.CHUNK, "BLOCK_C": embedding.MOST_CHANNELS}, 4
    yield "embedding runs", embedding._sum_runs, constants, 4
    yield "embedding joined", embedding._join_runs, {**constants, "JOINED": embedding.JOINED}, 4


def source(kernel: Any, pointer: str, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types that a launch would find."""
    divisible = [["tt.divisibility", 16]]
    signature, values, hints = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name], hints[i,] = TYPES.get(name, pointer), divisible
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32")
            hints.update({(i, j): divisible for j in range(2)})
        else:
            signature[name] = "fp32" if name in NUMBERS else "i32"
            if name in WHOLE:
                hints[i,] = divisible
    return ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)


def main() -> None:
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # what comes out of the cache has no log
    capability, dtype = int(sys.argv[1]), sys.argv[2]
    for name, kernel, constants, warps in cases(dtype):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                source(kernel, f"*{dtype}", constants),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": warps, "enable_fp_fusion": True},
            )
        said, ptx = log.getvalue(), compiled.asm["ptx"]
        report = {
            "kernel": name,
            "registers": int(re.findall(r"Used (\d+) registers", said)[-1]),
            "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
            "serialized": [],
            "shared": compiled.metadata.shared,
            "wide_loads": len(re.findall(r"ld\.global\.(?:[\w.:]*\.)?v[48]\.b32|ld\.global[\w.:]*\.v4", ptx)),
            "atomics": len(re.findall(r"\b(?:atom|red)\.global", ptx)),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
