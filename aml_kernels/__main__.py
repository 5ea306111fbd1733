"""`python -m aml_kernels`: what was built, what would run, and a check that it computes the right thing."""

import platform
import sys

import torch

import aml_kernels
from aml_kernels import _backend


def describe() -> list[tuple[str, str]]:
    """Pairs of a subject and what there is to say about it."""
    rows = [
        ("aml_kernels", f"{aml_kernels.__version__} in {aml_kernels.__path__[0]}"),
        ("Python, PyTorch", f"{platform.python_version()}, {torch.__version__}"),
        ("processor", f"{platform.machine()}, {torch.get_num_threads()} threads"),
    ]
    if _backend.EXTENSION_MISSING is None:
        from aml_kernels import _C  # type: ignore[attr-defined]

        rows.append(("extension", f"CPU kernels for {_C.instruction_set()}"))
    else:
        rows.append(("extension", f"missing: {_backend.EXTENSION_MISSING}"))
    rows.append(("operators", ", ".join(n for n in aml_kernels.__all__ if n.islower())))
    for backend in _backend.BACKENDS:
        reason = _backend.missing(backend, "cpu")
        rows.append((f"back end {backend!r}", "runs CPU tensors" if reason is None else f"cannot run: {reason}"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rows.append(("GPUs", ", ".join(torch.cuda.get_device_name(i) for i in range(gpus)) or "none"))
    forced = f" (forced by AML_KERNELS_BACKEND={_backend.FORCED})" if _backend.FORCED else ""
    for device in ["cpu", *(["cuda"] if gpus else [])]:
        try:
            chosen = _backend.choose(None, torch.device(device))
        except (RuntimeError, ValueError) as error:
            chosen = f"nothing: {error}"
        rows.append((f"{device} tensors run", chosen + forced))
    return rows


def self_check() -> str | None:
    """Compare loss and gradient of the automatic back end with the definition; None if they agree."""
    torch.manual_seed(0)
    logits, target = torch.randn(2, 28, 28, requires_grad=True), torch.rand(2, 56, 56) > 0.7
    visual, text = torch.randn(2, 32, 7, 7), torch.randn(2, 5, 32)
    results = []
    for backend in (None, "reference"):
        loss, stats = aml_kernels.aml_loss(
            logits, target, visual, text, quantile=0.25, return_stats=True, backend=backend,
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        results.append((loss.detach(), gradient, stats.kept))
    for name, ours, expected in zip(("loss", "gradient", "kept pixels"), *results, strict=True):
        if not torch.allclose(ours.double(), expected.double(), rtol=1e-5, atol=1e-7):
            return f"{name}: got {ours.flatten()[:4].tolist()}, expected {expected.flatten()[:4].tolist()}"
    return None


def main() -> int:
    rows = describe()
    width = max(len(subject) for subject, _ in rows)
    for subject, text in rows:
        print(f"{subject:<{width}}  {text}")
    try:
        problem = self_check()
    except (RuntimeError, ValueError) as error:
        problem = str(error)
    print(f"{'self-check':<{width}}  {'passed' if problem is None else 'FAILED: ' + problem}")
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
