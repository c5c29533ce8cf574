"""Compile the Flash Attention kernels for a GPU that is not there, and print what ptxas says of each, as JSON lines.

    python compile_offline.py 90 bf16 64 128        compute capability 9.0, bfloat16, head dimensions 64 and 128

Runs in a process of its own: in that of the tests, Triton interprets.
"""

import contextlib
import io
import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import lfs_cli.kernels.flash_attention as flash

KERNELS = {"forward": flash._forward, "dq": flash._backward_dq, "dkdv": flash._backward_dkdv}
VARIANTS = [  # as in training; and all that can differ from it at once
    {"CAUSAL": True, "RAGGED": False, "GROUP": 1},
    {"CAUSAL": True, "RAGGED": True, "GROUP": 4},
    {"CAUSAL": False, "RAGGED": True, "GROUP": 1},
]


def source(kernel: Any, pointer: str, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types that a launch would find: rows at multiples of 16, float32 for L and delta."""
    divisible = [["tt.divisibility", 16]]
    signature, values, hints = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in ("L_ptr", "delta_ptr") else pointer
            hints[i,] = divisible
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32")
            hints.update({(i, j): divisible for j in range(3)})
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
            if name != "scale" and not constants["RAGGED"]:
                hints[i,] = divisible
    return ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)


def report(capability: int, dtype: str, name: str, head_dim: int, variant: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel with its tile of the table."""
    tile = flash.TILES[name, 4 if dtype == "fp32" else 2, max(32, flash._padded(head_dim))][capability // 10 == 9]
    constants = {
        "H": 8,
        "D": head_dim,
        "BLOCK_D": flash._padded(head_dim),
        "BLOCK_T": tile.block_t,
        "BLOCK_S": tile.block_s,
        **variant,
    }
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source(KERNELS[name], f"*{dtype}", constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True},
        )
    said = log.getvalue()
    return {
        "kernel": f"{name} D={head_dim} {variant}",
        "registers": int(re.findall(r"Used (\d+) registers", said)[-1]),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        "serialized": sorted(set(re.findall(r"C75\d\d", said))),
        "shared": compiled.metadata.shared,
    }


def main() -> None:
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # what comes out of the cache has no log
    capability, dtype, *head_dims = sys.argv[1:]
    variants = VARIANTS if len(head_dims) > 1 else VARIANTS[:1]
    for head_dim in head_dims:
        for name in KERNELS:
            for variant in variants:
                print(json.dumps(report(int(capability), dtype, name, int(head_dim), variant)), flush=True)


if __name__ == "__main__":
    main()
