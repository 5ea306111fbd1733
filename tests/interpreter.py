"""Triton's interpreter, quickened: it spends most of its time on preparing operations, not on computing."""

import contextlib
import dataclasses
import functools
import importlib
import random

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def quicken() -> None:
    """The same results in a third of the time.

    Each call of a function within a kernel replaces the functions of triton.language once more: once is enough. The
    type of an array is looked up in a table that is built each time. Each whole-number operation is repeated in 64
    bits to find overflow, which `overflow_is_an_error` is for. And a scan takes its elements one by one, where a GPU
    combines them in pairs.
    """
    interpreter._patch_lang = _Patches(interpreter._patch_lang)
    interpreter._get_np_dtype = _NumpyTypes(interpreter._get_np_dtype)
    interpreter.ScanOps.generic_scan = _scan_in_pairs
    _check_overflow(False)


def _scan_in_pairs(self, input):
    """All elements with those 1 before them, then 2 before, 4 before, as the lanes of a warp do it."""
    data, distance = [np.moveaxis(x.handle.data, self.axis, 0).copy() for x in input], 1
    while distance < len(data[0]):
        pairs = zip([np.roll(x, distance, 0) for x in data] + data, input * 2, strict=True)
        combined = self.combine_fn.fn(*(self.to_tensor(x, like.dtype) for x, like in pairs))
        for x, new in zip(data, combined if isinstance(combined, tuple) else (combined,), strict=True):
            x[distance:] = new.handle.data[distance:]
        distance *= 2
    return [self.to_tensor(np.moveaxis(x, 0, self.axis), like.dtype) for x, like in zip(data, input, strict=True)]


#: Of the launchers' configurations: the interpreter's time goes by operations, not by their size.
LARGER = {
    "features": {"PIXELS": 256, "CHANNELS": 512, "CHANNELS_FP32": 512}, "similarity": {"PIXELS": 256},
    "similarity_backward": {"PIXELS": 256, "CHANNELS": 256, "STEP": 256},
    "masked_loss": {"ROWS": 128},
    "masked_loss_backward": {"ROWS": 128},
    "region_filter": {"TILE_ROWS": 64, "WEAK_TILE_ROWS": 64},
}


@contextlib.contextmanager
def larger_tiles():
    """For the common tests. The tests of Triton's own run what a GPU runs, with several tiles to a program."""
    # All are imported before one is changed: a module that is imported later would take over the changed sizes.
    modules = {importlib.import_module(f"aml_kernels.triton.{name}"): sizes for name, sizes in LARGER.items()}
    before = {module: {size: getattr(module, size) for size in sizes} for module, sizes in modules.items()}
    for module, sizes in modules.items():
        vars(module).update(sizes)
    yield
    for module, sizes in before.items():
        vars(module).update(sizes)


@contextlib.contextmanager
def overflow_is_an_error():
    _check_overflow(True)
    yield
    _check_overflow(False)


def _check_overflow(check: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=check)


@contextlib.contextmanager
def programs_in_any_order(seed: int):
    """The programs of each launch run in a random order instead of that of their numbers."""
    builder = interpreter.interpreter_builder
    original, order = builder.set_grid_dim, []

    def set_grid_dim(*size):
        original(*size)
        order[:] = random.Random(seed).sample(range(size[0]), size[0])

    def set_grid_idx(x, y, z):
        type(builder).set_grid_idx(builder, order[x], y, z)

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    yield
    del builder.set_grid_dim, builder.set_grid_idx


class _Patches:
    """`_patch_lang` for the functions of a module that is not patched yet; until the kernel ends."""

    def __init__(self, patch) -> None:
        self.patch, self.patched = patch, set()

    def __call__(self, function):
        if id(function.__globals__) in self.patched:
            return contextlib.nullcontext()  # nothing to restore: never asked for within a kernel
        scope = self.patch(function)
        if not self.patched:
            restore = scope.restore
            scope.restore = lambda: (self.patched.clear(), restore())
        self.patched.add(id(function.__globals__))
        return scope


class _NumpyTypes:
    def __init__(self, original) -> None:
        self.of_scalar = functools.lru_cache(None)(original)

    def __call__(self, dtype):
        dtype = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return np.dtype(np.uint64) if isinstance(dtype, tl.pointer_type) else self.of_scalar(dtype)
