"""Compiles, on a machine without a GPU, the kernels that calls of the Triton launchers would run on one.

`python ahead_of_time.py sm_90 gfx942 ...` prints one JSON object per kernel, call and target. TRITON_INTERPRET must not
be set: see test_triton_compile.py. The tensors of the calls have no memory ("meta"), so that they may be of any size.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from aml_kernels.triton.aml_loss import aml_loss
from aml_kernels.triton.masked_loss import masked_loss, masked_loss_backward
from aml_kernels.triton.quantile import sample_quantile
from aml_kernels.triton.region_filter import filter_regions
from aml_kernels.triton.similarity import pixel_text_similarity, pixel_text_similarity_backward

F32, BF16, F16, U8, BOOL = torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool
TYPES = {F32: "*fp32", BF16: "*bf16", F16: "*fp16", U8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def loss(
    logits=(480, 480), target=(480, 480), map_size=(15, 15), dtype=BF16, kind=U8, map_dtype=F32, valid=False,
    quantile=0.3, threshold=None, protect=True, batch=4, reduction=0,
):
    """A call of masked_loss and its backward."""
    z, y = meta(batch, *logits, dtype=dtype), meta(batch, *target, dtype=kind)
    similarity = meta(batch, *map_size, dtype=map_dtype) if map_size else None
    masks = (meta(batch, *target, dtype=BOOL), meta(batch, *map_size, dtype=BOOL)) if valid else (None, None)
    options = (protect, 1.0, 1.0, 0.9, 1.1, 1e-5, reduction)

    def call():
        result, sums, _ = masked_loss(
            z, y, similarity, *masks, None, threshold, quantile if map_size else None, True, *options,
        )
        masked_loss_backward(result, z, y, similarity, masks[0], sums, *options)

    return call


def similarity(size=(512, 16, 16), words=20, dtype=BF16, text_dtype=None, last=False, softmax=False, batch=4):
    """A call of pixel_text_similarity and its backward; `last`: the channels of a pixel lie next to each other."""
    visual = meta(batch, *size[1:], size[0], dtype=dtype).movedim(-1, 1) if last else meta(batch, *size, dtype=dtype)
    text, mask = meta(batch, words, size[0], dtype=text_dtype or dtype), meta(batch, words, dtype=BOOL)

    def call():
        result = pixel_text_similarity(visual, text, mask, True, 2.0, softmax)
        pixel_text_similarity_backward(result, visual, text, mask, True, 2.0, softmax)

    return call


def quantile(length, dtype=F32, valid=False, per_sample=False, interpolation=0, rank_in_fp64=True, batch=4):
    values, mask = meta(batch, length, dtype=dtype), meta(batch, length, dtype=BOOL) if valid else None
    q = meta(batch) if per_sample else None
    return lambda: sample_quantile(values, 0.3, q, mask, interpolation, rank_in_fp64)


def regions(dtype=F32, block_size=32, protect=True, batch=4, size=480):
    image, guard = meta(batch, 3, size, size, dtype=dtype), meta(batch, size, size, dtype=BOOL) if protect else None
    map_ = meta(batch, 15, 15)
    return lambda: filter_regions(image, map_, guard, None, None, 0.3, True, 0.25, block_size, [0.0, 1.0, 2.0], 5)


def fused():
    """A call of aml_loss as trained with, and its backward."""
    z, y = meta(4, 120, 120, dtype=BF16), meta(4, 480, 480, dtype=U8)
    visual, text = meta(4, 512, 30, 30, dtype=BF16), meta(4, 20, 512, dtype=BF16)
    options = (False, 1.0, 1.0, 1.0, 1.0, 1e-5, 0)

    def call():
        result, sums, _, map_ = aml_loss(
            z, y, visual, text, None, None, None, True, 1.0, False, None, None, 0.25, True, *options,
        )
        masked_loss_backward(result, z, y, map_, None, sums, *options)

    return call


CALLS: dict[str, Callable[[], object]] = {
    "loss bf16 uint8": loss(),
    "loss fp32 fp32 valid": loss(dtype=F32, kind=F32, valid=True),
    "loss fp16 bool none": loss(dtype=F16, kind=BOOL, map_size=None, reduction=2),
    "loss fp32 bf16 direct map": loss(dtype=F32, kind=BF16, map_size=(480, 480), map_dtype=BF16, protect=False),
    "loss quarter bf16 uint8": loss(logits=(120, 120)),
    "loss quarter fp32 fp32 valid": loss(logits=(120, 120), dtype=F32, kind=F32, valid=True, map_dtype=F16),
    "loss quarter fp16 bool threshold": loss(logits=(120, 120), dtype=F16, kind=BOOL, quantile=None, threshold=0.5),
    "loss odd": loss(logits=(119, 117), target=(479, 477), valid=True, reduction=1),
    "loss huge": loss(logits=(50_000, 50_000), target=(50_000, 50_000), batch=1),
    "loss huge resized": loss(logits=(50_000, 50_000), target=(60_000, 60_000), batch=1),
    "similarity bf16": similarity(),
    "similarity fp16 last softmax": similarity(dtype=F16, last=True, softmax=True),
    "similarity fp32": similarity(dtype=F32),
    "similarity mixed": similarity(dtype=BF16, text_dtype=F32, softmax=True),
    "similarity odd": similarity(size=(300, 15, 15), words=77),
    "quantile short": quantile(196, valid=True, per_sample=True),
    "quantile short bf16": quantile(3600, dtype=BF16, interpolation=4, rank_in_fp64=False),
    "quantile long": quantile(1_000_000, interpolation=3),
    "quantile long fp16": quantile(3_000_000_000, dtype=F16, valid=True, batch=1),
    "regions fp32": regions(),
    "regions uint8 small blocks": regions(dtype=U8, block_size=1, protect=False),
    "regions bf16 large blocks": regions(dtype=BF16, block_size=200),
    "aml_loss": fused(),
}


def launches(call: Callable[[], object]) -> list[tuple[JITFunction, dict, dict]]:
    """The kernels that `call` would launch on a GPU, each with its arguments and options."""
    found = []

    def record(kernel, *args, grid, warmup, **kwargs):
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        found.append((kernel, kernel.signature.bind(*args, **named).arguments, options))

    original, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = original
    return found


def source(kernel: JITFunction, arguments: dict) -> ASTSource:
    """What Triton compiles for these arguments: types, numbers that are 1, and what is divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        name, value, specialized = parameter.name, arguments[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialized):
            signature[name], constants[name] = "constexpr", value
            continue
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[name], aligned = TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and specialized
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[kernel.arg_names.index(name),] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def tool(name: str, *arguments: str, cubin: bytes) -> str:
    """What one of the CUDA tools that come with Triton says about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
        return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def describe(kernel) -> dict:
    """Registers, memory in place of registers, and how often each instruction occurs."""
    cubin = kernel.asm["cubin"]
    usage = dict(re.findall(r"(\w+):(\d+)", tool("cuobjdump", "-res-usage", cubin=cubin)))
    code = tool("nvdisasm", "-c", cubin=cubin)
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z0-9_.]+)", code, re.M))
    fp64 = sorted(set(re.findall(r"\b[\w.]+\.f64\b", kernel.asm["ptx"])))
    return {
        "registers": int(usage["REG"]), "stack": int(usage["STACK"]), "local": int(usage["LOCAL"]), "fp64": fp64,
        "instructions": instructions,
    }


def main(targets: list[str]) -> None:
    for name, call in CALLS.items():
        for kernel, arguments, options in launches(call):
            for target in targets:
                compiled = triton.compile(source(kernel, arguments), target=TARGETS[target], options=options)
                row = {"call": name, "kernel": kernel.__name__, "target": target, "warps": options["num_warps"]}
                print(json.dumps(row | (describe(compiled) if "cubin" in compiled.asm else {})), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
