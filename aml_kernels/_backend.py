"""Which code runs a call: the embedded C++ of the extension where it was built, else plain PyTorch."""

import os

import torch

try:
    # Registers the C++ kernels of the operators; compiled, so that there is no source to take types from.
    from . import _C  # type: ignore[attr-defined]  # noqa: F401

    EXTENSION_MISSING = None
except ImportError as error:
    EXTENSION_MISSING = (
        f"the extension aml_kernels._C could not be loaded ({error}); it is built by `pip install .` where a C++ "
        "compiler is at hand"
    )

BACKENDS = ("reference", "cpu")
#: Read once at import; empty means automatic.
FORCED = os.environ.get("AML_KERNELS_BACKEND") or None


def missing(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run tensors of `device_type`; None if it can."""
    if backend == "cpu":
        return f"it runs CPU tensors, not {device_type}" if device_type != "cpu" else EXTENSION_MISSING
    return None


def _choose(backend: str | None, device_type: str) -> str:
    if backend is None:
        return "cpu" if missing("cpu", device_type) is None else "reference"
    if backend not in BACKENDS:
        source = "AML_KERNELS_BACKEND" if backend == FORCED else "backend"
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    reason = missing(backend, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} was asked for and cannot run: {reason}")
    return backend


def choose(backend: str | None, device: torch.device) -> str:
    """The back end for tensors on `device`: `backend`, else `AML_KERNELS_BACKEND`, else the fastest there is."""
    return _choose(backend or FORCED, device.type)
