"""Which back end runs a call: by device, by what was built and installed, by what was asked for."""

import pytest
import torch

from aml_kernels import _backend, aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """A machine with everything; `machine(name=None or why not)` changes that."""
    def set_up(extension=None, cuda=None, triton=None, interpreted=False, forced=None):
        names = ("EXTENSION_MISSING", "CUDA_MISSING", "TRITON_MISSING", "INTERPRETED", "FORCED")
        for name, value in zip(names, (extension, cuda, triton, interpreted, forced), strict=True):
            monkeypatch.setattr(_backend, name, value)

    set_up()
    return set_up


def test_the_fastest_is_chosen(machine):
    assert (_backend.choose(None, CPU), _backend.choose(None, CUDA)) == ("cpu", "cuda")
    machine(cuda="built without CUDA")
    assert (_backend.choose(None, CPU), _backend.choose(None, CUDA)) == ("cpu", "triton")
    machine(extension="not built", cuda="not built")
    assert (_backend.choose(None, CPU), _backend.choose(None, CUDA)) == ("reference", "triton")
    machine(extension="not built", cuda="not built", triton="not installed")
    assert (_backend.choose(None, CPU), _backend.choose(None, CUDA)) == ("reference", "reference")
    machine(interpreted=True)  # does not make the interpreter the fastest
    assert _backend.choose(None, CPU) == "cpu"
    assert _backend.choose(None, torch.device("meta")) == "reference"


def test_what_is_asked_for_is_chosen(machine):
    for name in _backend.BACKENDS:
        if name != "cpu":
            assert _backend.choose(name, CUDA) == name
    machine(forced="reference")
    assert _backend.choose(None, CUDA) == "reference"
    assert _backend.choose("triton", CUDA) == "triton"  # the argument counts for more than the environment
    machine(interpreted=True)
    assert _backend.choose("triton", CPU) == "triton"


@pytest.mark.parametrize(
    ("backend", "device", "absent", "words"),
    (
        ("cpu", CUDA, {}, ("CPU tensors", "not cuda")),
        ("cuda", CPU, {}, ("CUDA tensors", "not cpu")),
        ("triton", CPU, {}, ("TRITON_INTERPRET=1",)),
        ("triton", torch.device("meta"), {"interpreted": True}, ("not meta",)),
        ("cpu", CPU, {"extension": "the extension is gone"}, ("the extension is gone",)),
        ("cuda", CUDA, {"cuda": "built without CUDA"}, ("built without CUDA",)),
        ("triton", CUDA, {"triton": "triton is not installed; `pip install triton`"}, ("pip install triton",)),
    ),
)
def test_what_is_missing_says_why(machine, backend, device, absent, words):
    machine(**absent)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' was asked for and cannot run: ") as caught:
        _backend.choose(backend, device)
    machine(**absent, forced=backend)
    with pytest.raises(RuntimeError) as by_environment:
        _backend.choose(None, device)
    assert str(by_environment.value) == str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_name_says_where_it_came_from(machine):
    with pytest.raises(ValueError, match="^backend: expected one of 'reference', 'cpu', 'triton', 'cuda' or None, got"):
        _backend.choose("gpu", CUDA)
    machine(forced="gpu")
    with pytest.raises(ValueError, match="^AML_KERNELS_BACKEND: expected one of .* got 'gpu'"):
        _backend.choose(None, CUDA)


def test_fp64_runs_where_it_can(machine):
    wide, narrow = torch.zeros(1, dtype=torch.float64), torch.zeros(1)
    assert _backend.choose(None, CUDA, a=narrow, b=None) == "cuda"
    assert _backend.choose(None, CUDA, a=narrow, b=wide) == "reference"
    assert _backend.choose(None, CPU, a=wide) == "cpu"
    for name in ("triton", "cuda"):
        with pytest.raises(TypeError, match=rf"^logits: expected no fp64 .*'{name}'.* pass logits.float\(\)"):
            _backend.choose(name, CUDA, target=narrow, logits=wide)


def test_every_argument_is_looked_at_for_fp64(machine):
    """That may be fp64 without being converted: thresholds and quantiles are."""
    machine(interpreted=True)
    z, y, s = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), torch.rand(1, 2, 2)
    v, u, x = torch.rand(1, 3, 2, 2), torch.rand(1, 2, 3), torch.rand(1, 3, 2, 2)
    calls = {
        "logits": lambda: masked_loss(z.double(), y, backend="triton"),
        "target": lambda: masked_loss(z, y.double(), backend="triton"),
        "similarity": lambda: masked_loss(z, y, s.double(), quantile=0.5, backend="triton"),
        "values": lambda: sample_quantile(s.double(), 0.5, backend="triton"),
        "visual": lambda: pixel_text_similarity(v.double(), u, backend="triton"),
        "text": lambda: aml_loss(z, y, v, u.double(), backend="triton"),
        "image": lambda: filter_regions(x.double(), s, quantile=0.5, seed=0, backend="triton"),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name}: expected no fp64"):
            call()
