"""Importing: whatever is missing, and which back end runs then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# An interpreter in which the extension and triton cannot be imported.
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "aml_kernels._C" or name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""
CALL = "import torch; print(aml_kernels.sample_quantile(torch.arange(5.)[None], 0.5).item())\n"


def python(script, forced=None, module=None):
    environment = {name: value for name, value in os.environ.items() if name != "AML_KERNELS_BACKEND"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"AML_KERNELS_BACKEND": forced} if forced else {}
    arguments = ["-c", script] if module is None else ["-m", module]
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )


def test_without_extension_and_triton():
    run = python(WITHOUT + """
import aml_kernels
from aml_kernels import _backend
assert "triton" not in sys.modules
assert "was not built" in _backend.missing("cpu", "cpu") and "pip install" in _backend.missing("cpu", "cpu")
""" + CALL + """
try:
    aml_kernels.sample_quantile(torch.ones(1, 5), 0.5, backend="cpu")
except RuntimeError as error:
    print(error)
""")
    assert run.returncode == 0, run.stderr
    value, message = run.stdout.splitlines()
    assert value == "2.0" and "'cpu'" in message and "aml_kernels._C" in message


def test_forced_reference():
    run = python("import aml_kernels\nfrom aml_kernels import _backend\n" + CALL + """
print(_backend.choose(None, torch.device("cpu")))
assert not torch.cuda.is_initialized()
""", forced="reference")
    assert run.returncode == 0 and run.stdout.split() == ["2.0", "reference"], run.stderr


def test_a_forced_back_end_that_is_missing_says_why():
    run = python(WITHOUT + "import aml_kernels; print('imported')\n" + CALL, forced="cpu")
    assert run.returncode == 1 and run.stdout.strip() == "imported"
    assert "RuntimeError" in run.stderr and "'cpu'" in run.stderr and "was not built" in run.stderr


def test_an_unknown_forced_back_end_names_the_variable():
    run = python("import aml_kernels\n" + CALL, forced="gpu")
    assert run.returncode == 1
    for word in ("AML_KERNELS_BACKEND", "'gpu'", "'reference'", "'cpu'"):
        assert word in run.stderr.splitlines()[-1], f"{word} is not in: {run.stderr.splitlines()[-1]}"


def test_an_unknown_back_end():
    import torch

    from aml_kernels import sample_quantile

    for name in ("gpu", "CPU", 3):
        with pytest.raises((TypeError, ValueError), match="backend: expected one of 'reference', 'cpu'.* got"):
            sample_quantile(torch.ones(1, 3), 0.5, backend=name)


def test_modules_and_functions_share_names():
    run = python("""
import importlib, inspect
for name in ("masked_loss", "aml_loss"):
    importlib.import_module(f"aml_kernels.{name}")
import aml_kernels
import aml_kernels.masked_loss
import aml_kernels.reference.masked_loss
for name in aml_kernels.__all__:
    assert callable(getattr(aml_kernels, name)), name
assert inspect.isfunction(aml_kernels.masked_loss) and inspect.isfunction(aml_kernels.aml_loss)
from aml_kernels.masked_loss import MaskedLossStats, masked_loss
assert masked_loss is aml_kernels.masked_loss
import torch
print(aml_kernels.masked_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), dice_weight=0.0).item())
""")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("0.693147")


def test_python_m_tells_what_runs():
    run = python(None, module="aml_kernels")
    assert run.returncode == 0, run.stderr
    for word in ("reference", "cpu", "masked_loss", "sample_quantile"):
        assert word in run.stdout, f"{word!r} is not in: {run.stdout}"


def test_python_m_helps_without_the_extension():
    run = python(WITHOUT + "import runpy; runpy.run_module('aml_kernels', run_name='__main__', alter_sys=True)")
    assert "pip install" in run.stdout + run.stderr and "Traceback" not in run.stderr


def test_a_built_extension_loads():
    """Otherwise most of these tests would be skipped without a word."""
    from aml_kernels import _backend

    if not list(Path(_backend.__file__).parent.glob("_C*.so")):
        pytest.skip("the extension was not built")
    assert _backend.EXTENSION_MISSING is None
