"""The C++ kernels are compiled for several instruction sets; on a new processor only the newest would be tested."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aml_kernels import _backend

HERE = Path(__file__).resolve().parent
ORDER = ["base", "x86-64-v3", "x86-64-v4"]


@pytest.mark.skipif(_backend.EXTENSION_MISSING is not None, reason=str(_backend.EXTENSION_MISSING))
@pytest.mark.parametrize("name", ORDER[:2])
def test_an_older_instruction_set_passes_the_same_tests(name):
    newest = subprocess.run(
        [sys.executable, "-c", "from aml_kernels import _C; print(_C.instruction_set())"],
        capture_output=True, text=True, cwd=HERE.parent,
        env={k: v for k, v in os.environ.items() if k != "AML_KERNELS_ISA"}, check=True,
    ).stdout.strip()
    if ORDER.index(newest) <= ORDER.index(name):
        pytest.skip(f"this processor runs {newest}: the other tests ran that, or it cannot run {name}")
    check = "from aml_kernels import _C; import sys; sys.exit(_C.instruction_set() != sys.argv[1])"
    environment = os.environ | {"AML_KERNELS_ISA": name}
    assert subprocess.run([sys.executable, "-c", check, name], cwd=HERE.parent, env=environment).returncode == 0
    files = [str(HERE / f"test_{operator}.py") for operator in ("similarity", "quantile", "masked_loss", "resize")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "cpu and not million", *files],
        capture_output=True, text=True, cwd=HERE.parent, env=environment,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-2000:]


@pytest.mark.skipif(_backend.EXTENSION_MISSING is not None, reason=str(_backend.EXTENSION_MISSING))
def test_an_unknown_instruction_set_is_refused():
    run = subprocess.run(
        [sys.executable, "-c", "import aml_kernels"], capture_output=True, text=True, cwd=HERE.parent,
        env=os.environ | {"AML_KERNELS_ISA": "avx2"},
    )
    assert run.returncode == 1
    assert "AML_KERNELS_ISA: expected one of 'x86-64-v4'" in run.stderr and "'avx2'" in run.stderr
