"""The Triton kernels compiled for GPUs that are not there: machine code per architecture, and how many programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_names
import machine_code
import pytest
from test_gpu_run import driver

from aml_kernels import _backend

HERE = Path(__file__).resolve().parent
MISSING = _backend.TRITON_MISSING or (None if machine_code.tool("cuobjdump") else "needs cuobjdump")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

#: (kernel, architecture) by Triton release: spills of 8 bytes, stored once and loaded once outside of the loops.
SPILLS = {"3.6": {("quantile_kernel", "sm_100")}}


@pytest.fixture(scope="module")
def report():
    """What ahead_of_time.py says, without the interpreter and so in another process. Triton keeps what it compiled."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    environment.setdefault("TRITON_CACHE_DIR", str(HERE.parent / ".cache" / "triton"))
    run = subprocess.run(
        [sys.executable, str(HERE / "ahead_of_time.py"), "--representative", "--json"], capture_output=True, text=True,
        env=environment, cwd=HERE.parent,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_nothing_is_wrong_with_the_machine_code(report):
    """See ahead_of_time.faults for what that means."""
    import triton

    known = SPILLS.get(triton.__version__.rpartition(".")[0], set())
    for row in report["rows"]:
        if row.get("spilled") == 8 and (row["kernel"], row["target"]) in known:
            row["faults"] = [fault for fault in row["faults"] if "spilled" not in fault and "local" not in fault]
    faults = [f"{row['call']}, {row['kernel']}, {row['target']}: {row['faults']}" for row in report["rows"]]
    assert not [fault for fault, row in zip(faults, report["rows"], strict=True) if row["faults"]]


def test_every_kernel_is_compiled_for_every_architecture(report):
    for target in machine_code.ARCHITECTURES:
        compiled = {(row["module"], row["kernel"]) for row in report["rows"] if row["target"] == target}
        assert compiled == kernel_names.of_triton(), target


def test_a_sanitizer_sees_every_kernel_in_few_programs(report):
    """In as many as the limits of `make gpu` leave the time to compile."""
    assert set(report["sanitized"]) == {name for _, name in kernel_names.of_triton()}
    assert sum(report["sanitized"].values()) <= driver.PROGRAMS, report["sanitized"]


def test_the_fused_loss_is_compiled_for_amd(report):
    assert len([row for row in report["rows"] if row["target"] == "gfx942"]) == 4


def test_faults_are_found(report):
    """Kernels made to have them."""
    found = {row["kernel"]: row["faults"] for row in report["planted"]}
    words = {
        "doubles_kernel": "fp64", "spilling_kernel": "spilled", "narrow_kernel": "128-bit", "rounding_kernel": "TF32",
    }
    assert set(found) == set(words)
    for kernel, word in words.items():
        assert word in " ".join(found[kernel]), f"{kernel}: {found[kernel]}"


def test_no_program_is_compiled_for_a_batch(report):
    """Calls that differ by batch size, by numbers, or by sizes without a common factor, run the same programs."""
    assert len(report["alike"]) > 3
    for name, differing in report["alike"].items():
        assert not differing, f"{name}: compiled again: {differing}"
