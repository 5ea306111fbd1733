"""What the operators' tests share: back ends and their devices, and memory that nobody wrote to holds NaN."""

import os
import zlib

import pytest
import torch
from hypothesis import settings

os.environ["AML_KERNELS_POISON_SCRATCH"] = "1"  # read by the extension when it is loaded: scratch starts as NaN
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is imported

import thinning  # noqa: E402
from helpers import FOR_GPUS, INTERPRETED, device_of, missing  # noqa: E402

from aml_kernels import _backend  # noqa: E402

settings.register_profile("repository", deadline=None, derandomize=True)
settings.load_profile("repository")


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


@pytest.fixture(scope="module", params=_backend.BACKENDS)
def backend(request, conditions):
    """Each back end in turn; one that cannot run here is skipped, saying why."""
    if request.param == "triton" and INTERPRETED:
        name = request.getfixturevalue("interpreted")
        import interpreter

        with interpreter.larger_tiles():
            yield name
        return
    if reason := missing(request.param):
        pytest.skip(reason)
    yield request.param


@pytest.fixture(scope="module")
def interpreted(conditions):
    """The Triton back end in its interpreter, for what a GPU cannot show or is not asked to."""
    if reason := _backend.missing("triton", "cpu"):
        pytest.skip(reason)
    import interpreter

    interpreter.quicken()
    return "triton"


def parameters_of(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def skipped(item) -> str | None:
    """Why a test is not for its back end."""
    parameters = parameters_of(item)
    backend = parameters.get("backend")
    if backend in FOR_GPUS and (torch.float64 in parameters.values() or item.get_closest_marker("fp64")):
        return f"{backend} takes no fp64"
    if backend == "triton" and INTERPRETED and item.get_closest_marker("large"):
        return "takes too long in Triton's interpreter"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    if INTERPRETED:
        left_out = thinning.left_out([item for item in items if not skipped(item)])
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    yield
    # Neighbours need the same programs of Triton, and workers that run them at the same time would each compile these.
    # So they are parted, and with them what takes longest. All workers need the same order.
    if hasattr(config, "workerinput") and not INTERPRETED:
        items.sort(key=lambda item: zlib.crc32(item.nodeid.encode()) * (parameters_of(item).get("backend") in FOR_GPUS))


@pytest.fixture(autouse=True)
def device(request):
    """New tensors are on the device of the test's back end. Cases that this back end is not made for are skipped."""
    backend = parameters_of(request.node).get("backend", "cpu")
    if reason := skipped(request.node):
        pytest.skip(reason)
    if device_of(backend) == "cpu":
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def cpu(conditions):
    """The C++ back end, for what plain PyTorch does not promise (same bits, little memory, one derivative)."""
    if reason := missing("cpu"):
        pytest.skip(reason)
    return "cpu"


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """For inputs so small that waking a second thread takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for runs of seconds: rendered scenes in data/, a text encoder in encoder/. See tests/tiny.py."""
    import tiny  # needs what `aml` needs, and the operators' tests do not

    folder = tmp_path_factory.mktemp("place")
    tiny.write_data(folder / "data")
    tiny.write_text_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def words(request, place):
    """Makes words for `aml.config.load`: of a run into a folder, with SETTINGS of the test's module."""
    import tiny

    def make(out, *more: str) -> list[str]:
        return tiny.settings(place / "data", place / "encoder", out, *request.module.SETTINGS, *more)

    return make


@pytest.fixture(scope="module")
def straight(place, words):
    """The uninterrupted run that others are compared with."""
    from aml.config import load
    from aml.training import train

    return train(load(None, words(place / "straight")))
