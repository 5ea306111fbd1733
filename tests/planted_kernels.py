"""Triton kernels with the faults that ahead_of_time.py looks for."""

import torch
import triton
import triton.language as tl


@triton.jit
def doubles_kernel(x, out):
    i = tl.arange(0, 128)
    tl.store(out + i, (tl.load(x + i).to(tl.float64) * 1.1).to(tl.float32))


@triton.jit
def spilling_kernel(x, out):
    """32 sums to a thread of a warp that has 32 registers."""
    i = tl.arange(0, 32)
    x = tl.load(x + i[:, None] * 32 + i[None, :])
    tl.store(out + i[:, None] * 32 + i[None, :], tl.dot(x, tl.trans(x), input_precision="ieee"))


@triton.jit
def narrow_kernel(x, out):
    i = tl.arange(0, 1024)
    tl.store(out + i, tl.load(x + i * 3))


@triton.jit
def rounding_kernel(x, out):
    i = tl.arange(0, 64)
    x = tl.load(x + i[:, None] * 64 + i[None, :])
    tl.store(out + i[:, None] * 64 + i[None, :], tl.dot(x, x, input_precision="tf32"))


def call() -> None:
    x = torch.empty(1 << 20, device="meta")
    doubles_kernel[(1,)](x, x, num_warps=4)
    spilling_kernel[(1,)](x, x, num_warps=1, maxnreg=32)
    narrow_kernel[(1,)](x, x, num_warps=4)
    rounding_kernel[(1,)](x, x, num_warps=4)
