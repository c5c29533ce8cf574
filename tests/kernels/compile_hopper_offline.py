"""Compile the Hopper kernels for a GPU that is not there, and print what can be read off the result, as JSON lines."""

import contextlib
import io
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from lfs_cli.kernels import hopper_attention as hopper
from lfs_cli.kernels import (
    hopper_backward,
    hopper_forward,
    hopper_short,
    hopper_swiglu,
    hopper_turned,
    product,
    short_attention,
)

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
TYPES = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}


def described(dtype: str, *block: int) -> str:
    """The type of a descriptor, as a launch would find it."""
    if len(block) == 1:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    else:
        layout = gl.NVMMASharedLayout.get_default_for(list(block), TYPES[dtype])
    return f"tensordesc<{dtype}{list(block)},{layout!r}>"


def forward(D: int, tile: hopper.ForwardTile, dtype: str = "bf16", group: int = 1, *, causal: bool) -> dict[str, Any]:
    registers = hopper.REGISTERS[tile.warpgroups]
    types = dict.fromkeys(("q_desc", "o_desc"), described(dtype, 1, 64, 1, D))
    types |= dict.fromkeys(("k_desc", "v_desc"), described(dtype, 1, tile.block_s, 1, D))
    types |= {"L_ptr": "*fp32", "order_ptr": "*i32", "scale": "fp32"}
    constants = {
        "GROUP": group,
        "WARPGROUPS": tile.warpgroups,
        "BLOCK_S": tile.block_s,
        "D": D,
        "STAGES": tile.stages,
        "CAUSAL": causal,
        "REGISTERS": registers.computing,
        "LOADER_REGISTERS": registers.loading,
    }
    return report(f"forward {D} {tile} {causal=}", hopper_forward.forward, types, constants, registers.all)


def backward(
    D: int,
    dtype: str = "bf16",
    group: int = 1,
    *,
    causal: bool,
    turns: bool = False,
    tile: hopper.BackwardTile | None = None,
) -> dict[str, Any]:
    tile, registers = tile or hopper.BACKWARD[D], hopper.REGISTERS[2]
    rows = ("q_desc", "v_desc", "do_desc", "dk_desc", "dv_desc")
    types = dict.fromkeys(rows, described(dtype, 1, 64, 1, D)) | {"k_desc": described(dtype, 1, 128, 1, D)}
    types |= dict.fromkeys(("L_desc", "delta_desc"), described("fp32", 64))
    types |= {"dq_desc": described("fp32", 1, 64, D // 2 * tile.at_once), "order_ptr": "*i32"}
    types |= {"scale": "fp32", "scale_log2": "fp32"}
    angles = dict.fromkeys(("cos_ptr", "sin_ptr"))
    types |= dict.fromkeys(angles, "*fp32") if turns else {}
    constants = {} if turns else angles
    constants |= {
        "GROUP": group,
        "D": D,
        "STAGES": tile.stages,
        "PAIRS": hopper.pairs_layout(D) if turns else None,
        "DS_LAYOUT": gl.NVMMASharedLayout.get_default_for([128, 64], TYPES[dtype]),
        "CAUSAL": causal,
        "IN_REGISTERS": tile.in_registers,
        "AT_ONCE": tile.at_once,
        "REGISTERS": registers.computing,
        "LOADER_REGISTERS": registers.loading,
    }
    return report(f"backward {D} {tile} {causal=} {turns=}", hopper_backward.backward, types, constants, registers.all)


def short_forward(T: int, dtype: str = "bf16") -> dict[str, Any]:
    return short_report("forward", T, dtype, {"PAIRS": short_attention.layouts()["PAIRS"]})


def short_backward(T: int, dtype: str = "bf16") -> dict[str, Any]:
    return short_report("backward", T, dtype, short_attention.layouts())


def short_report(step: str, T: int, dtype: str, layouts: dict[str, Any]) -> dict[str, Any]:
    """Much is unrolled, so spilled accesses of the whole kernel are counted."""
    kernel, D = getattr(hopper_short, step), short_attention.HEAD_DIM
    types = {name: described(dtype, 1, 64, 1, D) for name in kernel.arg_names if name.endswith("_desc")}
    types |= dict.fromkeys(("L_ptr", "cos_ptr", "sin_ptr"), "*fp32") | dict.fromkeys(("o_ptr", "do_ptr"), f"*{dtype}")
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    types |= {"scale": "fp32", "scale_log2": "fp32"}
    constants = {"D": D, "BLOCKS": short_attention.blocks_of(T), **layouts}
    compiled, said, sass = build(kernel, types, constants, num_warps=4, maxnreg=short_attention.REGISTERS)
    return about(f"short {step} {T}", compiled, said, sass) | {
        "spilled": spilled(sass.splitlines()),
        "registers": int(re.findall(r"Used (\d+) registers", said)[-1]),
    }


def product_of(name: str, kernel: Any, types: dict[str, str], **constants: int) -> dict[str, Any]:
    """One of the products with something behind them."""
    types |= {"x_desc": described("bf16", 64, 64), "do_desc": described("bf16", 64, 64)}
    types = {n: kind for n, kind in types.items() if n in kernel.arg_names}
    all_constants = {
        "STAGES": product.STAGES,
        "SUMS": gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16),
        "REGISTERS": product.MULTIPLIER,
        "FINISHER_REGISTERS": product.FINISHER,
        "LOADER_REGISTERS": product.LOADER,
        **constants,
    }
    compiled, said, sass = build(kernel, types, all_constants, num_warps=4, maxnreg=product.BEFORE)
    return about(f"product {name}", compiled, said, sass) | {"spilled": spilled(sass.splitlines())}


def gated(F: int) -> dict[str, Any]:
    types = dict.fromkeys(("gates_desc", "ups_desc"), described("bf16", 128, 64))
    types |= dict.fromkeys(("gate_desc", "up_desc"), described("bf16", 64, 128)) | {"y_ptr": "*bf16"}
    return product_of(f"gated {F}", hopper_swiglu.forward, types, COLUMNS=F)


def gated_backward(F: int) -> dict[str, Any]:
    types = dict.fromkeys(("down_desc", "next_down_desc"), described("bf16", 64, 128))
    types |= dict.fromkeys(("x_ptr", "dx_ptr"), "*bf16")
    return product_of(f"gated backward {F}", hopper_swiglu.backward, types, COLUMNS=F)


def turned(N: int, D: int) -> dict[str, Any]:
    types = dict.fromkeys(("w_desc", "next_w_desc"), described("bf16", 128, 64))
    types |= {"y_ptr": "*bf16"} | dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
    return product_of(f"turned {N} {D}", hopper_turned.forward, types, COLUMNS=N, D=D)


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any
) -> tuple[triton.compiler.CompiledKernel, str, str]:
    """The kernel, what ptxas said of it, and the machine code. Arguments without a type are whole numbers."""
    names = kernel.arg_names
    source = GluonASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): x for n, x in constants.items()},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]]
            for n in names
            if n not in constants and (n.endswith("_ptr") or n == "stride")
        },
    )
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True, **options}
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return compiled, log.getvalue(), sass


def report(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], registers: int) -> dict[str, Any]:
    compiled, said, sass = build(kernel, types, constants, num_warps=4, maxnreg=registers)
    return about(name, compiled, said, sass) | {"spilled_in_loops": spilled_in_loops(sass)}


def about(name: str, compiled: triton.compiler.CompiledKernel, said: str, sass: str) -> dict[str, Any]:
    """What is asked of every kernel."""
    return {
        "kernel": name,
        "warnings": sorted(set(re.findall(r"C75\d\d", said))),
        "shared": compiled.metadata.shared,
        "exponentials_while_multiplying": exponentials_while_multiplying(sass),
        **{n: len(re.findall(rf"\b{n}", sass)) for n in ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG")},
    }


def spilled_in_loops(sass: str) -> int:
    """Count loads and stores of spilled registers in the innermost loops that multiply.

    A loop ends in a jump with a condition. One without leads back from a wait that is tried again, past the end.
    """
    lines = sass.splitlines()
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if line.strip().endswith(":")}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"@!?U?P\d+ +BRA.*`\((\S+)\)", line)
        if jump and labels.get(jump[1], i) < i and any("HGMMA" in inside for inside in lines[labels[jump[1]] : i]):
            loops.append((labels[jump[1]], i))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    assert innermost
    return sum(spilled(lines[start:stop]) for start, stop in innermost)


def spilled(lines: list[str]) -> int:
    """Count loads and stores of spilled registers."""
    return sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in lines)


def exponentials_while_multiplying(sass: str) -> list[int]:
    """Count exponentials between each wait that leaves one product under way, and the next wait."""
    counts, current = [], None
    for line in sass.splitlines():
        if wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", line):
            if current is not None:
                counts.append(current)
            current = 0 if wait[1] == "1" else None
        elif "MUFU.EX2" in line and current is not None:
            current += 1
    return counts


def be_verbose() -> None:
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # what comes out of the cache has no log


def main() -> None:
    be_verbose()
    for row in (
        forward(64, hopper.forward_tile(1024, 64, causal=True), causal=True),
        forward(64, hopper.forward_tile(16_384, 64, causal=True), causal=True),
        forward(128, hopper.forward_tile(16_384, 128, causal=True), causal=True),
        forward(64, hopper.forward_tile(16_384, 64, causal=False), "fp16", 4, causal=False),
        backward(64, causal=True),
        backward(128, causal=True),
        backward(64, "fp16", 4, causal=False),
        backward(64, causal=True, turns=True),
        backward(128, causal=True, turns=True),
        *(short(T) for T in (128, 256) for short in (short_forward, short_backward)),
        *(kernel(F) for F in (1344, 2048) for kernel in (gated, gated_backward)),
        *(turned(N, D) for N, D in ((2304, 64), (3072, 128))),
    ):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
