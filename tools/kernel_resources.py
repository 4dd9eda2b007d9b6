"""Compile every Triton kernel for an H100 or H200 (sm_90) without a GPU, and say what the assembler made of it.

    python tools/kernel_resources.py          one JSON object per kernel and shape: registers, spills, tensor cores
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpt4lib.kernels import decode_triton, experts_triton

LAUNCH = ("num_warps", "num_stages")
POINTER = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


def resources(kernel, signature: dict[str, str], constants: dict, size: dict) -> dict:
    """Registers, spilled bytes, shared memory and tensor-core instructions of one specialisation."""
    options = {k: size[k] for k in LAUNCH if k in size}
    constants = {**constants, **{k: v for k, v in size.items() if k not in LAUNCH}}
    names = kernel.arg_names
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in signature.items() if kind != "fp32" and n != "tokens"}
    source = ASTSource(fn=kernel, signature={n: signature.get(n, "constexpr") for n in names}, attrs=aligned,
                       constexprs={(names.index(n),): v for n, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    assembler = next(pathlib.Path(triton.__file__).parent.rglob("ptxas"))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "kernel.ptx")
        file.write_text(ptx)
        said = subprocess.run([assembler, "-arch=sm_90a", "-v", file, "-o", file.with_suffix(".cubin")],
                              capture_output=True, text=True, check=True).stderr
    return {"registers": int(re.search(r"Used (\d+) registers", said)[1]),
            "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
            "shared_bytes": compiled.metadata.shared, "wgmma": "wgmma" in ptx, "mma": "mma.sync" in ptx,
            "async_copy": "cp.async" in ptx}


def experts(dtype: str, n_slots: int, n_experts: int, d: int, f: int, few: bool, first: bool, activation: str,
            save: bool = False) -> dict:
    """One product of the layer: d channels in, f out (n_out for the second)."""
    itemsize = 4 if dtype == "fp32" else 2
    size = experts_triton.few_blocks(f, itemsize) if few else experts_triton.blocks(n_slots, n_experts, f, itemsize, save)
    signature = dict(a=POINTER[dtype], w=POINTER[dtype], out=POINTER[dtype], z=POINTER[dtype], chosen="*i64", tokens="i32",
                     n="i32", f="i32", d="i32")
    absent = dict.fromkeys(("order", "tile_expert", "tile_start", "ends")) if few else {}
    signature |= {} if few else dict(order="*i64", tile_expert="*i32", tile_start="*i32", ends="*i32")
    constants = dict(TOP_K=2, TOP_K_PAD=2, FEW=few, FIRST=first, ACTIVATION=activation, SAVE=save,
                     BLOCKS=triton.cdiv(f, size["COLS"]), F32=False, **absent)
    return resources(experts_triton.expert_gemm, signature, constants, size)


def decode(dtype: str, group: int, queries: int, width: int) -> dict:
    """The splitting kernel of decoding."""
    strides = ("q_batch", "q_head", "q_query", "k_page", "k_row", "k_head", "v_page", "v_row", "v_head", "table_batch")
    signature = dict(q=POINTER[dtype], k=POINTER[dtype], v=POINTER[dtype], table="*i32", lengths="*i32", parts="*fp32",
                     lse="*fp32", scale="fp32", window="i32", page_size="i32", splits="i32", **dict.fromkeys(strides, "i32"))
    size = {**decode_triton.blocks(group, queries, width), **decode_triton.LAUNCH}
    return resources(decode_triton.split, signature, dict(GROUP=group, QUERIES=queries, WIDTH=width, CHUNK=512, F32=False), size)


def merge(group: int, width: int) -> dict:
    """The kernel that joins a query's chunks."""
    size = {**decode_triton.blocks(group, 1, width), **decode_triton.LAUNCH}
    del size["KEYS"]
    return resources(decode_triton.merge, dict(parts="*fp32", lse="*fp32", lengths="*i32", out="*bf16", splits="i32"),
                     dict(GROUP=group, QUERIES=1, WIDTH=width, HEADS=1, CHUNK=512), size)


def main() -> int:
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, so there is nothing to compile; unset it", file=sys.stderr)
        return 2
    mixtral, gpt4 = dict(n_experts=8, d=4096, f=14336), dict(n_experts=16, d=10752, f=10752)
    rows = [(f"experts {name} {dtype} {what}", experts(dtype, n_slots=slots, few=few, first=first, activation=act if first else "", **shape))
            for name, shape, act in (("mixtral", mixtral, "swiglu"), ("gpt-4", gpt4, "gelu"))
            for dtype in ("bf16", "fp16")
            for what, slots, few, first in (("8192 tokens, up", 16384, False, True), ("8192 tokens, down", 16384, False, False),
                                            ("256 tokens, up", 512, False, True), ("few tokens, up", 4, True, True),
                                            ("few tokens, down", 4, True, False))]
    rows += [("experts mixtral fp32 8192 tokens, up", experts("fp32", 16384, few=False, first=True, activation="swiglu", **mixtral))]
    rows += [(f"experts {name} bf16 8192 tokens, up, training", experts("bf16", 16384, few=False, first=True, activation=act, save=True, **shape))
             for name, shape, act in (("mixtral", mixtral, "swiglu"), ("gpt-4", gpt4, "gelu"))]
    rows += [(f"decode {dtype} group {group}, {queries} queries, width {width}", decode(dtype, group, queries, width))
             for dtype, group, queries, width in (("bf16", 8, 1, 128), ("bf16", 16, 1, 128), ("bf16", 84, 1, 128), ("fp16", 8, 1, 128),
                                                  ("bf16", 8, 5, 128), ("bf16", 8, 1, 64), ("bf16", 8, 1, 256), ("bf16", 48, 4, 256),
                                                  ("bf16", 4, 1, 96), ("fp32", 8, 1, 128))]
    rows += [("merge bf16 group 8, width 128", merge(8, 128))]
    for name, row in rows:
        print(json.dumps({"kernel": name, **row}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
