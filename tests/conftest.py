"""What the operators' tests share: which back ends run here, and memory that nobody wrote to holds NaN."""

import os

os.environ["AML_KERNELS_POISON_SCRATCH"] = "1"  # read by the extension when it is loaded: scratch starts as NaN

import pytest
import torch
from hypothesis import settings

from aml_kernels import _backend

settings.register_profile("repository", deadline=None, derandomize=True)
settings.load_profile("repository")

CPU_MISSING = _backend.missing("cpu", "cpu")


@pytest.fixture(scope="module")
def conditions():
    """Every `empty` of PyTorch, in Python or in C++, is filled with NaN (integers: the largest; bool: true).

    One thread, as the inputs are small; test_determinism shows that more give the same bits.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="module", params=("reference", "cpu"))
def backend(request, conditions):
    """Each back end in turn; one that cannot run here is skipped, saying why."""
    if request.param == "cpu" and CPU_MISSING:
        pytest.skip(CPU_MISSING)
    return request.param


@pytest.fixture(scope="module")
def cpu(conditions):
    """The C++ back end, for what plain PyTorch does not promise (same bits, little memory, one derivative)."""
    if CPU_MISSING:
        pytest.skip(CPU_MISSING)
    return "cpu"


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
