"""Run by test_fused.py in a process of its own: compiles the kernels as for a GPU that need not be there.

Triton's interpreter runs what its compiler would refuse. Prints a JSON object: {kernel: how many numbers of
4, 8 or 16 bytes its program reads from memory at most at once, 1 where it reads them one by one}.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flux_core.fused import kernels

HOPPER = GPUTarget("cuda", 90, 32)
FIXED = {
    "modulated_norm": {"BLOCK": 4096},
    "gated_residual": {"BLOCK": 4096, "NORM": True},
    "queries_keys_values": {"dim": 128, "HEADS": 8, "DIM": 128, "VALUES": True},
    "beside_gelu": {"BLOCK": 1024},
    "rows_in_fp8": {"largest": 448.0, "smallest": 1e-12, "BLOCK": 16384},
}
"""What is known when each kernel is compiled for FLUX.1."""
POINTERS = {"cos": "*fp32", "sin": "*fp32", "scales": "*fp32", "codes": "*fp8e4nv"}
NUMBERS = re.compile(r"heads|plain|\w*(length|width)|\w+_(batch|row)")


def widest_load(name: str) -> int:
    """Compile a kernel for bfloat16, with the strides that FLUX.1's tensors have; see above."""
    kernel = getattr(kernels, name)
    signature, alignment = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in FIXED[name]:
            signature[argument] = "constexpr"
        elif NUMBERS.fullmatch(argument):
            signature[argument] = "i32"
        else:
            signature[argument] = POINTERS.get(argument, "*bf16")
        if signature[argument] != "constexpr" and not argument.endswith("length"):
            alignment[(i,)] = [["tt.divisibility", 16]]
    fixed = {(kernel.arg_names.index(argument),): value for argument, value in FIXED[name].items()}
    ptx = triton.compile(
        ASTSource(kernel, signature, fixed, alignment), target=HOPPER, options={"num_warps": 4}
    ).asm["ptx"]
    return max(int(width or 1) for width in re.findall(r"ld\.global[^\s]*?(?:\.v(\d))?\.b32", ptx))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: widest_load(name) for name in FIXED}))
