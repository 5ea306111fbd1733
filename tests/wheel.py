"""`make test-wheel TORCH=VERSION`: one wheel serves this PyTorch and another version of it.

Builds the wheel against the PyTorch of this environment, runs its self-check here, installs it beside PyTorch VERSION
into an environment of its own, kept in build/, and runs the operators' tests there on the installed package.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = str(ROOT / "aml_kernels")
OPERATORS = ("similarity", "quantile", "masked_loss", "masking", "aml_loss", "region_filter")
CHECK = """
import sys, torch, aml_kernels
from aml_kernels import _backend
assert _backend.EXTENSION_MISSING is None, _backend.EXTENSION_MISSING
assert not aml_kernels.__file__.startswith(sys.argv[1]), f"{aml_kernels.__file__} is the source"
print(f"{aml_kernels.__file__} with PyTorch {torch.__version__}", flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("torch", help="version of the other PyTorch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wheel = build(scratch / "wheel")
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)

        here = scratch / "here"
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(here), str(wheel))
        for arguments in (("-c", CHECK, SOURCE), ("-m", "aml_kernels")):
            run(sys.executable, *arguments, cwd=scratch, path=here)

        other = environment(options.torch)
        run(other, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel))
        run(other, "-c", CHECK, SOURCE, cwd=scratch)
        tests = [str(ROOT / f"tests/test_{name}.py") for name in OPERATORS]
        run(other, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu", *tests, cwd=scratch)


def build(folder: Path) -> Path:
    """A wheel for every CPython from 3.10, with the extension in it; for one kind of GPU, where nvcc is at hand."""
    command = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), ".")
    gpus = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0")
    run(sys.executable, *command, cwd=ROOT, AML_KERNELS_EXTENSION="1", TORCH_CUDA_ARCH_LIST=gpus)
    wheel, = folder.iterdir()
    assert "-cp310-abi3-" in wheel.name, f"expected an abi3 wheel for CPython 3.10, got {wheel.name}"
    binaries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert binaries == ["aml_kernels/_C.abi3.so"], f"expected one extension in the wheel, got {binaries}"
    return wheel


def environment(version: str) -> str:
    """The Python of an environment with this PyTorch and what the tests need."""
    folder = ROOT / "build" / f"torch-{version}"
    python = str(folder / "bin/python")
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        run(python, "-m", "pip", "install", "--quiet", f"torch=={version}", "hypothesis", "pytest", "pytest-timeout")
        (folder / "complete").touch()
    return python


def run(*command: str, cwd: Path | None = None, path: Path | None = None, **variables: str) -> None:
    """In an environment where nothing leads to the source but `path`."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = {"PYTHONPATH": str(path)} if path else {}
    subprocess.run(command, cwd=cwd, env=inherited | found | variables, check=True)


if __name__ == "__main__":
    main()
