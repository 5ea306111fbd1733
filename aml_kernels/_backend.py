"""Which code runs a call: the fastest back end for the tensors' device, unless one is asked for."""

import importlib
import importlib.util
import os

import torch
from torch import Tensor

try:
    _C = importlib.import_module(f"{__package__}._C")  # registers the C++ kernels of the operators

    EXTENSION_MISSING = None
    CUDA_MISSING = None if getattr(_C, "cuda_architectures", tuple)() else (
        "the extension aml_kernels._C was built without CUDA; `pip install .` builds it in where nvcc is at hand, and "
        "AML_KERNELS_CUDA=1 makes it fail, saying why, where not"
    )
except ModuleNotFoundError:
    EXTENSION_MISSING = CUDA_MISSING = (
        "the extension aml_kernels._C was not built; `pip install .` builds it where a C++ compiler is at hand, and "
        "AML_KERNELS_EXTENSION=1 makes it fail, saying why, where not"
    )
except ImportError as error:
    EXTENSION_MISSING = CUDA_MISSING = (
        f"the extension aml_kernels._C could not be loaded ({error}); install it again with this PyTorch: `pip install "
        "--no-build-isolation .`"
    )


INSTRUCTION_SETS = ("x86-64-v4", "x86-64-v3", "base")
_asked = os.environ.get("AML_KERNELS_ISA")  # read by the extension when it is loaded, which cannot raise an error then
if _asked and EXTENSION_MISSING is None and _C.instruction_set() != _asked:
    raise ValueError(
        f"AML_KERNELS_ISA: expected one of {', '.join(map(repr, INSTRUCTION_SETS))} that this processor has, got "
        f"{_asked!r}"
    )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


#: Looked for only: the first call that runs it imports it.
TRITON_MISSING = None if _installed("triton") else "triton is not installed; `pip install triton`"
#: Triton's own switch, read by it when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

BACKENDS = ("reference", "cpu", "triton", "cuda")
WITHOUT_FP64 = ("triton", "cuda")
#: Read once at import; empty means automatic.
FORCED = os.environ.get("AML_KERNELS_BACKEND") or None


def missing(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run tensors of `device_type`; None if it can."""
    if backend == "cpu":
        return f"it runs CPU tensors, not {device_type}" if device_type != "cpu" else EXTENSION_MISSING
    if backend == "cuda":
        return f"it runs CUDA tensors, not {device_type}" if device_type != "cuda" else CUDA_MISSING
    if backend == "triton" and device_type != "cuda":
        if device_type != "cpu":
            return f"it runs CUDA tensors, not {device_type}"
        if not INTERPRETED:
            return "it runs CPU tensors in Triton's interpreter only: set TRITON_INTERPRET=1 before Python starts"
    return TRITON_MISSING if backend == "triton" else None


def default(device_type: str) -> str:
    """The fastest back end for tensors of `device_type`."""
    if device_type == "cuda":
        return "cuda" if CUDA_MISSING is None else "triton" if TRITON_MISSING is None else "reference"
    return "cpu" if device_type == "cpu" and EXTENSION_MISSING is None else "reference"


def choose(backend: str | None, device: torch.device, **tensors: Tensor | None) -> str:
    """The back end for tensors on `device`: `backend`, else `AML_KERNELS_BACKEND`, else the fastest there is.

    tensors: the arguments that may be fp64, which only `reference` and `cpu` take.
    """
    asked = backend or FORCED
    if asked is None:
        chosen = default(device.type)
    else:
        chosen = asked
        if chosen not in BACKENDS:
            source = "AML_KERNELS_BACKEND" if backend is None else "backend"
            raise ValueError(f"{source}: expected one of {', '.join(map(repr, BACKENDS))} or None, got {chosen!r}")
        reason = missing(chosen, device.type)
        if reason is not None:
            raise RuntimeError(f"backend {chosen!r} was asked for and cannot run: {reason}")
    if chosen in WITHOUT_FP64:
        for name, tensor in tensors.items():
            if tensor is None or tensor.dtype != torch.float64:
                continue
            if asked is None:
                return "reference"
            raise TypeError(
                f"{name}: expected no fp64 with backend {chosen!r}, which computes in fp32, got float64; pass "
                f"{name}.float(), or backend='reference'"
            )
    return chosen
