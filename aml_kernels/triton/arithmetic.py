"""Arithmetic that all kernels share. They are launched with enable_fp_fusion=False: what is fused is asked for."""

import triton
import triton.language as tl

from .._backend import INTERPRETED as _INTERPRETED

#: Triton's interpreter truncates to bf16, multiplies bf16 as if it were integers, and does not fuse: there it is done
#: by hand, and nothing of it is compiled for a GPU.
INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def widen(x):
    """To fp32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """From fp32 to `dtype`, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def multiply_add(a, b, c):
    """a b + c, rounded once."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)
