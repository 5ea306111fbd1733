"""The CUDA operators for tensors on the CPU: their .cu, compiled with the emulator and run in a process of its own."""

import contextlib
import ctypes
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import builds
import pytest
import torch
from torch import Tensor

from aml_kernels import _backend, _library

WORKER = Path(__file__).with_name("worker.py")
SCALAR_TYPES = {  # of PyTorch; see operator.h
    torch.uint8: 0, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6, torch.float64: 7,
    torch.bool: 11, torch.bfloat16: 15,
}
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0:history_size=1",
}


class Failed(Exception):
    """A kernel did what it must not: the emulator or a sanitizer says so."""


class Worker:
    """A process that runs one library. It starts at the first call, and again after a sanitizer ended it."""

    def __init__(self, library: Path, mode: str) -> None:
        self._library, self._mode, self._process = library, mode, None

    def call(self, operator: str, *request) -> dict:
        if self._process is None:
            self._start()
        try:
            pickle.dump((operator, *request), self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            self._errors.seek(0)
            report = self._errors.read()
            self.close()
            raise Failed(f"{operator}: the process ended with {code}\n{report[:6000]}") from None

    def _start(self) -> None:
        environment = os.environ | SANITIZERS
        if libraries := builds.preloaded(self._mode):
            environment["LD_PRELOAD"] = " ".join(libraries)
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(WORKER), str(self._library)], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors,
        )

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._errors.close()
            self._process = None


class Emulated:
    """The operators, by name: `emulated("sample_quantile", values, ...)` takes what the operator's schema says.

    Each call runs another schedule: the seed counts up. Raises Failed where the emulator or a sanitizer finds fault.
    """

    def __init__(self, mode: str, *sources, resident_blocks: int = 4) -> None:
        """sources: as for builds.start, where they are not the package's own."""
        self.mode, self.resident_blocks, self.seed = mode, resident_blocks, 0
        self.last: dict = {}  #: of the last call: operator, launches, counts of bytes, whose each buffer is (by place)
        self.launched: set[str] = set()  #: the kernels that any call launched
        self._worker = Worker(builds.library(mode, *sources), mode)

    def __call__(self, operator: str, *arguments):
        schema = getattr(torch.ops.aml_kernels, operator).default._schema
        return self.call(operator, *map(converted, arguments, (str(a.type) for a in schema.arguments)))

    def call(self, operator: str, *arguments):
        """The same with arguments of exactly the types that the operator takes."""
        buffers: dict[int, bytes] = {}
        packed = [pack(value, buffers) if isinstance(value, Tensor) else value for value in arguments]
        reply = self._worker.call(operator, packed, list(buffers.values()), self.seed, self.resident_blocks)
        owners = {value[0]: place for place, value in reversed(list(enumerate(packed))) if isinstance(value, tuple)}
        schedule, self.seed, self.last = self.seed, self.seed + 1, reply | {"operator": operator, "owners": owners}
        self.launched.update(reply["launches"])
        if reply["error"]:
            raise Failed(f"{operator}, schedule {schedule}: {reply['error']}")
        if reply["changed"]:
            raise Failed(f"{operator}, schedule {schedule}: wrote to inputs {reply['changed']}")
        results = [unpack(*result) for result in reply["results"]]
        return results[0] if len(results) == 1 else tuple(results)

    def close(self) -> None:
        self._worker.close()


def converted(value, kind: str):
    """A Python argument as the dispatcher would pass it on; kind: the schema's type."""
    kind = kind.removeprefix("Optional[").removesuffix("]")
    if value is None or isinstance(value, Tensor):
        return value
    if kind.startswith("List"):
        return [float(x) for x in value]
    return {"bool": bool, "int": int, "float": float}[kind](value)


def pack(tensor: Tensor, buffers: dict[int, bytes]) -> tuple:
    """A tensor as worker.py takes it; its memory goes into `buffers`, by address."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in buffers:
        buffers[storage.data_ptr()] = bytes((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()))
    return (
        list(buffers).index(storage.data_ptr()), tensor.storage_offset() * tensor.element_size(),
        SCALAR_TYPES[tensor.dtype], list(tensor.shape), list(tensor.stride()),
    )


def unpack(kind: int, shape: list[int], data: bytes) -> Tensor:
    dtype = next(dtype for dtype, number in SCALAR_TYPES.items() if number == kind)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def operators() -> dict[str, _library.Operator]:
    """Every operator of the package, by name."""
    modules = [module for name, module in sys.modules.items() if name.startswith("aml_kernels.")]
    found = {x for module in modules for x in vars(module).values() if isinstance(x, _library.Operator)}
    return {operator.default.name().partition("::")[2]: operator for operator in found}


@contextlib.contextmanager
def in_place_of_triton(emulated: Emulated):
    """Calls with backend="triton" run `emulated`: so the tests of the public functions run it, derivatives and all."""

    def launcher(name: str):
        return lambda: lambda *arguments: emulated(name, *arguments)

    before = {operator: operator._load for operator in operators().values()}
    state = _backend.INTERPRETED, _backend.TRITON_MISSING
    for name, operator in operators().items():
        operator._load = launcher(name)
    _backend.INTERPRETED, _backend.TRITON_MISSING = True, None
    yield "triton"
    for operator, load in before.items():
        operator._load = load
    _backend.INTERPRETED, _backend.TRITON_MISSING = state


@contextlib.contextmanager
def as_back_end(mode: str):
    """The name under which the public functions run the emulated kernels; skips the test where they cannot be built."""
    if reason := builds.missing(mode):
        pytest.skip(reason)
    emulated = Emulated(mode)
    with in_place_of_triton(emulated) as name:
        yield name
    emulated.close()
