"""Compile the Flash Attention kernels for a GPU that is not there, and print what ptxas says of each, as JSON lines.

    python compile_offline.py 90 bf16 training,ragged 64 128

compiles for compute capability 9.0 and bfloat16 two of `VARIANTS`, or `all`, at head dimensions 64 and 128.

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

import lfs_cli.kernels.triton_attention as kernels

KERNELS = {"forward": kernels._forward, "dq": kernels._backward_dq, "dkdv": kernels._backward_dkdv}
NOTHING_MORE = {"window": None, "softcap": None, "starts_ptr": None, "ends_ptr": None}
ALL_ELSE = {"CAUSAL": True, "RAGGED": True, "GROUP": 4}
VARIANTS: dict[str, dict[str, Any]] = {  # what is a constant; what is not named here is passed
    "training": {"CAUSAL": True, "RAGGED": False, "GROUP": 1, **NOTHING_MORE},
    "ragged": {**ALL_ELSE, **NOTHING_MORE},
    "not causal": {"CAUSAL": False, "RAGGED": True, "GROUP": 1, **NOTHING_MORE},
    "window": {**ALL_ELSE, "softcap": None, "starts_ptr": None, "ends_ptr": None},
    "softcap": {**ALL_ELSE, "window": None, "starts_ptr": None, "ends_ptr": None},
    "documents": {**ALL_ELSE, "window": None, "softcap": None},
    "everything": ALL_ELSE,
}
TYPES = {
    "L_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "starts_ptr": "*i32",
    "ends_ptr": "*i32",
    "scale": "fp32",
    "softcap": "fp32",
}


def source(kernel: Any, pointer: str, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types that a launch would find: rows at multiples of 16, float32 for L and delta."""
    divisible = [["tt.divisibility", 16]]
    signature, values, hints = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = TYPES.get(name, pointer)
            hints[i,] = divisible
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32")
            hints.update({(i, j): divisible for j in range(3)})
        else:
            signature[name] = TYPES.get(name, "i32")
            if name in ("T", "S") and not constants["RAGGED"]:
                hints[i,] = divisible
    return ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)


def report(capability: int, dtype: str, name: str, head_dim: int, variant: str) -> dict[str, Any]:
    """Compile one kernel with its tile of the table."""
    has_more = not {"softcap", "starts_ptr"} <= set(VARIANTS[variant])
    element_size, is_hopper = 4 if dtype == "fp32" else 2, capability // 10 == 9
    tile = kernels.tile_for(name, element_size, head_dim, is_hopper=is_hopper, has_more=has_more)
    constants = {
        "H": 8,
        "D": head_dim,
        "BLOCK_D": kernels._padded(head_dim),
        "BLOCK_T": tile.block_t,
        "BLOCK_S": tile.block_s,
        **VARIANTS[variant],
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
    capability, dtype, variants, *head_dims = sys.argv[1:]
    for head_dim in head_dims:
        for name in KERNELS:
            for variant in variants.split(",") if variants != "all" else VARIANTS:
                print(json.dumps(report(int(capability), dtype, name, int(head_dim), variant)), flush=True)


if __name__ == "__main__":
    main()
