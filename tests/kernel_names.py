"""The kernels that the sources define, for tests that ask whether all of them ran, or were compiled."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def of_cuda() -> set[str]:
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    return _some(set(re.findall(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", sources)))


def of_triton() -> set[tuple[str, str]]:
    """(module, kernel); no two kernels have one name, by which a profiler tells them apart."""
    sources = (ROOT / "aml_kernels" / "triton").glob("*.py")
    found = [
        (path.stem, name) for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    ]
    names = [name for _, name in found]
    assert len(set(names)) == len(names), sorted(names)
    return _some(set(found))


def _some(kernels: set) -> set:
    assert len(kernels) > 5, f"found in the sources: {kernels}"
    return kernels
