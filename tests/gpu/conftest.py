"""Here `backend` is one of those for GPUs, on a GPU; the rest of the suite runs them through the operators' tests."""

import pytest
import torch
from helpers import FOR_GPUS

from aml_kernels import _backend


@pytest.fixture(scope="module", params=FOR_GPUS)
def backend(request, conditions):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if reason := _backend.missing(request.param, "cuda"):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def room():
    """Skip unless the GPU has this many free GiB."""

    def need(gib: float) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            pytest.skip(f"needs {gib:.0f} GiB of GPU memory, {free:.1f} are free")

    yield need
    torch.cuda.empty_cache()
