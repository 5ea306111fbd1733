"""`python -m aml_kernels`: what was built, what would run on which device, and a check of all that can run here."""

import importlib.metadata
import os
import platform
import signal
import sys
from collections.abc import Sequence

import torch

import aml_kernels
from aml_kernels import _backend

Row = tuple[str, str]  # a subject and what there is to say about it

MADE_FOR = {"cpu": ("cpu", "triton"), "cuda": ("triton", "cuda")}


def main() -> int:
    """Print the report; exit code 1 if a check failed, 141 (SIGPIPE) if the reader left, as after `| head`."""
    try:
        return report()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def report() -> int:
    found = gpus()
    for subject, text in [*installed(), *devices(found)]:
        print(f"{subject:<20}  {text}", flush=True)
    failed = 0
    for backend, device in [(b, d) for d in (("cpu", "cuda") if found else ("cpu",)) for b in _backend.BACKENDS]:
        if _backend.missing(backend, device) is None:
            problem = self_check(backend, device)
            failed += problem is not None
            said = "passed" if problem is None else f"FAILED: {problem}"
            print(f"{'self-check':<20}  {backend} on {device.upper()} tensors: {said}", flush=True)
    return int(failed > 0)


def installed() -> list[Row]:
    rows = [
        ("aml_kernels", f"{aml_kernels.__version__} in {aml_kernels.__path__[0]}"),
        ("operators", ", ".join(name for name in aml_kernels.__all__ if name.islower())),
        ("Python, PyTorch", f"{platform.python_version()}, {torch.__version__}"),
        ("processor", f"{platform.machine()}, {torch.get_num_threads()} threads"),
    ]
    if _backend.EXTENSION_MISSING is not None:
        rows.append(("extension", f"missing: {_backend.EXTENSION_MISSING}"))
    else:
        rows.append(("CPU kernels", f"for {_backend._C.instruction_set()}"))
        built = architectures()
        rows.append(("CUDA kernels", f"for {', '.join(built)}" if built else f"none: {_backend.CUDA_MISSING}"))
    rows.append(("Triton", _backend.TRITON_MISSING or importlib.metadata.version("triton")))
    return rows


def devices(gpus: Sequence[Row]) -> list[Row]:
    """The GPUs; for each kind of tensor what runs it, and why other back ends would not."""
    rows = list(gpus) or [("GPU", "none that PyTorch sees")]
    for device in MADE_FOR:
        kind = f"{device.upper()} tensors"
        try:
            chosen = _backend.choose(None, torch.device(device))
        except (RuntimeError, ValueError) as error:
            rows.append((kind, f"nothing runs: {error}"))
        else:
            forced = f" (AML_KERNELS_BACKEND={_backend.FORCED})" if _backend.FORCED else ""
            rows.append((kind, f"run on {chosen!r}{forced}" if device == "cpu" or gpus else f"would run on {chosen!r}"))
        for backend in MADE_FOR[device]:
            if (reason := _backend.missing(backend, device)) is not None:
                rows.append(("", f"not on {backend!r}: {reason}"))
    return rows


def gpus() -> list[Row]:
    """Name and capability of each GPU, and whether the CUDA kernels that were built run on it."""
    rows = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(index)
        text = f"{torch.cuda.get_device_name(index)}, capability {capability[0]}.{capability[1]}"
        if architectures() and not runs_on(architectures(), capability):
            text += "; the CUDA kernels were built for others: set TORCH_CUDA_ARCH_LIST and install again"
        rows.append((f"GPU {index}", text))
    return rows


def architectures() -> tuple[str, ...]:
    """What the CUDA kernels were built for, as in TORCH_CUDA_ARCH_LIST."""
    return getattr(_backend._C, "cuda_architectures", tuple)() if _backend.EXTENSION_MISSING is None else ()


def runs_on(built: Sequence[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on later minor versions of its major version, and PTX on every later GPU.

    With "a" (9.0a) both run on that very capability only; with "f" (10.0f) PTX stays within the major version too.
    """
    for name in built:
        version, _, ptx = name.partition("+")
        major, minor = map(int, version.rstrip("af").split("."))
        later = (major, minor) <= capability and (major == capability[0] or (ptx and not version.endswith("f")))
        if capability == (major, minor) or (later and not version.endswith("a")):
            return True
    return False


def self_check(backend: str, device: str) -> str | None:
    """Compare map, loss, gradient and kept pixels with the definition on the CPU: None, or how they differ.

    What follows from a map is compared for the same map: one rounded otherwise may keep another pixel.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 28, 28, generator=generator)
    target = torch.rand(2, 56, 56, generator=generator) > 0.7
    visual, text = (torch.randn(shape, generator=generator) for shape in ((2, 32, 7, 7), (2, 5, 32)))
    options: dict = {"quantile": 0.25, "return_stats": True}

    def run(function, leaf, *others, backend):
        leaf = leaf.detach().requires_grad_()
        loss, stats = function(leaf, *others, **options, backend=backend)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0], stats

    try:
        given = [x.to(device) for x in (logits, target, visual, text)]
        loss, gradient, stats = run(aml_kernels.aml_loss, *given, backend=backend)
        found = [x.cpu().double() for x in (stats.similarity, loss, gradient, stats.kept)]
    except Exception as error:  # whatever it is, it belongs into the report
        return f"{type(error).__name__}: {error}"
    similarity = aml_kernels.pixel_text_similarity(visual, text, backend="reference")
    loss, gradient, stats = run(
        aml_kernels.masked_loss, logits, target, found[0].float(), backend="reference",
    )
    expected = [x.double() for x in (similarity, loss, gradient, stats.kept)]
    for what, a, b in zip(("similarity", "loss", "gradient", "kept pixels"), found, expected, strict=True):
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item()):
            return f"{what}: got {a.flatten()[:4].tolist()}, expected {b.flatten()[:4].tolist()}"
    return None


if __name__ == "__main__":
    sys.exit(main())
