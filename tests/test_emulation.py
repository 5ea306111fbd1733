"""The CUDA operators pass the tests of the other back ends, run on the CPU: their source, one fibre per CUDA thread."""

import inspect
import sys
from pathlib import Path

import pytest
import test_aml_loss
import test_bad_input
import test_masked_loss
import test_masking
import test_quantile
import test_region_filter
import test_similarity
import torch

sys.path.insert(0, str(Path(__file__).with_name("emulation")))

from emulated import as_back_end  # noqa: E402

for module in (test_quantile, test_similarity, test_masked_loss, test_masking, test_aml_loss, test_region_filter):
    for name, function in list(vars(module).items()):
        if name.startswith("test_") and "backend" in inspect.signature(function).parameters:
            globals()[f"test_{module.__name__.removeprefix('test_')}_{name.removeprefix('test_')}"] = function
test_a_kept_target_outside_its_range = test_bad_input.test_a_kept_target_outside_its_range


@pytest.fixture(scope="module", params=[pytest.param("triton", id="cuda")])
def backend(conditions):
    """The name under which the operators are called, see as_back_end."""
    with as_back_end("plain") as name:
        yield name


@pytest.fixture(autouse=True)
def device(request):
    """In place of conftest's: tensors stay on the CPU, on a machine with a GPU too."""
    if request.node.get_closest_marker("fp64") or torch.float64 in request.node.callspec.params.values():
        pytest.skip("takes no fp64")
    if request.node.get_closest_marker("large"):
        pytest.skip("takes too long under emulation")
