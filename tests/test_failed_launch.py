"""A launch that the driver refuses is an error with the operator's name, the driver's reason and the shapes."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).with_name("emulation")))

import builds  # noqa: E402
from emulated import Emulated, Failed, in_place_of_triton  # noqa: E402

from aml_kernels import aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile  # noqa: E402

pytestmark = pytest.mark.skipif(builds.missing("plain") is not None, reason=str(builds.missing("plain")))

#: In a copy of the sources: no kernel is launched, nor even compiled.
REFUSED = """#include "emulator.h"
template <class... Arguments>
cudaError_t refused(const Arguments&...);
#define REFUSED(...) cudaError_t(sizeof(refused(__VA_ARGS__)) + 697)
#undef AML_LAUNCH
#undef AML_LAUNCH_COOPERATIVE
#define AML_LAUNCH REFUSED
#define AML_LAUNCH_COOPERATIVE REFUSED
#define cudaGetErrorString(code) (code == 701 ? "too many resources requested for launch" : "another error")
"""
LOGITS, TARGET = torch.zeros(2, 5, 6), torch.zeros(2, 7, 8, dtype=torch.bool)
VISUAL, TEXT = torch.zeros(2, 3, 4, 5), torch.zeros(2, 6, 3)
CALLS = {
    "masked_loss": (lambda b: masked_loss(LOGITS, TARGET, backend=b), "logits [2, 5, 6], target [2, 7, 8]"),
    "aml_loss": (
        lambda b: aml_loss(LOGITS, TARGET, VISUAL, TEXT, quantile=0.3, backend=b),
        "logits [2, 5, 6], target [2, 7, 8], visual [2, 3, 4, 5], text [2, 6, 3]",
    ),
    "pixel_text_similarity": (
        lambda b: pixel_text_similarity(VISUAL, TEXT, backend=b), "visual [2, 3, 4, 5], text [2, 6, 3]",
    ),
    "sample_quantile": (lambda b: sample_quantile(LOGITS, 0.5, backend=b), "values [2, 5, 6]"),
    "filter_regions": (
        lambda b: filter_regions(VISUAL, torch.zeros(2, 2, 2), threshold=0.0, seed=1, backend=b),
        "image [2, 3, 4, 5], similarity [2, 2, 2]",
    ),
}
WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0)  # bce_weight, dice_weight, negative_weight, positive_weight, smooth
#: Called by themselves: no forward comes to its end here. aml_loss has the derivative of masked_loss.
BACKWARD = {
    "masked_loss_backward": (
        (torch.ones(()), LOGITS, TARGET, None, None, torch.ones(2, 7), False, *WEIGHTS, 0),
        "logits [2, 5, 6], target [2, 7, 8]",
    ),
    "pixel_text_similarity_backward": (
        (torch.ones(2, 4, 5), VISUAL, TEXT, None, True, 1.0, False), "visual [2, 3, 4, 5], text [2, 6, 3]",
    ),
}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name in ("common", "cuda"):
        shutil.copytree(builds.ROOT / "csrc" / name, folder / "csrc" / name)
    header = folder / "csrc" / "cuda" / "device.cuh"
    source = header.read_text()
    assert source.count('#include "emulator.h"\n') == 1
    header.write_text(source.replace('#include "emulator.h"\n', REFUSED))
    emulated = Emulated("plain", folder)
    yield emulated
    emulated.close()


def check(failure, operator, shapes):
    expected = f'{operator}: the launch failed with "too many resources requested for launch", {shapes}'
    assert str(failure.value).endswith(expected)


@pytest.mark.parametrize("operator", CALLS)
def test_a_refused_launch_says_what_was_launched(emulated, operator):
    call, shapes = CALLS[operator]
    with in_place_of_triton(emulated) as backend, pytest.raises(Failed) as failure:
        call(backend)
    check(failure, operator, shapes)


@pytest.mark.parametrize("operator", BACKWARD)
def test_a_refused_launch_of_a_gradient(emulated, operator):
    arguments, shapes = BACKWARD[operator]
    with pytest.raises(Failed) as failure:
        emulated(operator, *arguments)
    check(failure, operator, shapes)


def test_every_operator_was_refused():
    sources = "".join(path.read_text() for path in (builds.ROOT / "csrc" / "cuda").glob("*.cu"))
    assert set(re.findall(r"library\.impl\(\"(\w+)\"", sources)) == CALLS.keys() | BACKWARD.keys()
