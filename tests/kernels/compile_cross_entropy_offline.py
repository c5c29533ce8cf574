"""Compile the cross-entropy kernel for a Hopper GPU that is not there, and print what is in it, as JSON lines."""

import json
import re
from typing import Any

from compile_hopper_offline import be_verbose, build

from lfs_cli.kernels import hopper_cross_entropy as kernels
from lfs_cli.kernels.linear_cross_entropy import HOPPER_VOCABULARIES

TYPES = {"targets_ptr": "*i64", "counts_ptr": "*i1", "losses_ptr": "*fp32", "softcap": "fp32", "z_loss": "fp32"}


def report(V: int, dtype: str = "bf16", *, capped: bool = False, writes_gradient: bool = True) -> dict[str, Any]:
    tile = kernels.tile_of(V)
    constants = {
        "TILE": tile,
        "TILES": -(-V // tile),
        "WRITES_GRADIENT": writes_gradient,
        **({} if capped else {"softcap": None}),
    }
    types = TYPES | {"logits_ptr": f"*{dtype}"}
    compiled, said, sass = build(kernels._loss_and_gradient, types, constants, num_warps=kernels.WARPS)
    ptx = compiled.asm["ptx"]

    def widths(instruction: str) -> list[str]:
        return re.findall(rf"\b{instruction}(?:\.[\w:]+)*?(\.128)?\s", sass)

    return {
        "kernel": f"{V} {dtype} {capped=} {writes_gradient=}",
        "V": V,
        "tiles": constants["TILES"],
        "logits": tile // (32 * kernels.WARPS),
        "writes_gradient": writes_gradient,
        "capped": capped,
        "registers": int(re.findall(r"Used (\d+) registers", said)[-1]),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        "shared": compiled.metadata.shared,
        "copies": len(widths("LDGSTS")),
        "narrow_copies": widths("LDGSTS").count(""),
        "wide_stores": widths("STG").count(".128"),
        "narrow_stores": widths("STG").count(""),
        "wide_readings": len(re.findall(r"ld\.shared\.v4\.b32", ptx)),
        "exponentials": len(re.findall(r"\bex2\.", ptx)),
    }


def main() -> None:
    be_verbose()
    for row in (
        report(50_304),
        report(50_257, "fp16"),
        report(50_304, capped=True),
        report(50_304, writes_gradient=False),
        report(10_000),
        report(16_384, capped=True),
        report(HOPPER_VOCABULARIES[False].start + 1),
        report(HOPPER_VOCABULARIES[False].stop - 1),
        report(HOPPER_VOCABULARIES[True].stop - 1, "fp16", capped=True),
    ):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
