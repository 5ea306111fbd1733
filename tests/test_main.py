"""`python -m aml_kernels`: what it says about builds and devices, here and where they are pretended."""

import subprocess
import sys

import pytest
import torch

import aml_kernels
from aml_kernels import __main__ as report
from aml_kernels import _backend


@pytest.mark.parametrize(("built", "capability", "runs"), (
    (("8.0", "9.0"), (8, 0), True), (("8.0", "9.0"), (8, 6), True), (("8.6",), (8, 0), False),
    (("8.0", "9.0"), (10, 0), False), (("8.0", "9.0+PTX"), (12, 0), True), (("9.0+PTX",), (8, 9), False),
    ((), (9, 0), False), (("8.0", "9.0", "10.0+PTX"), (7, 5), False), (("10.0+PTX",), (10, 3), True),
    (("9.0a",), (9, 0), True), (("8.0", "9.0a+PTX"), (10, 0), False), (("10.0a",), (10, 3), False),
    (("9.0a+PTX",), (9, 0), True), (("10.0f",), (10, 3), True), (("12.1f",), (12, 0), False),
    (("10.0f+PTX",), (12, 0), False), (("9.0a", "9.0+PTX"), (12, 0), True),
))
def test_where_kernels_run(built, capability, runs):
    assert report.runs_on(built, capability) == runs


def has_gpu(monkeypatch, name="NVIDIA Something", capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


def test_a_gpu_that_the_kernels_were_not_built_for(monkeypatch):
    monkeypatch.setattr(report, "architectures", lambda: ("9.0",))
    has_gpu(monkeypatch)
    assert report.gpus() == [("GPU 0", "NVIDIA Something, capability 9.0")]
    has_gpu(monkeypatch, capability=(8, 0))
    (_, text), = report.gpus()
    assert "TORCH_CUDA_ARCH_LIST" in text


def test_what_runs_on_a_gpu_and_why_the_rest_does_not(monkeypatch):
    monkeypatch.setattr(_backend, "FORCED", None)
    monkeypatch.setattr(_backend, "TRITON_MISSING", None)
    monkeypatch.setattr(_backend, "CUDA_MISSING", "it was built without CUDA")
    rows = report.devices([("GPU 0", "NVIDIA Something")])
    assert rows[0] == ("GPU 0", "NVIDIA Something")
    here = rows.index(("CUDA tensors", "run on 'triton'"))
    assert rows[here + 1:] == [("", "not on 'cuda': it was built without CUDA")]
    monkeypatch.setattr(_backend, "CUDA_MISSING", None)
    assert ("CUDA tensors", "run on 'cuda'") in report.devices([("GPU 0", "NVIDIA Something")])
    assert ("CUDA tensors", "would run on 'cuda'") in report.devices([])


def test_a_forced_back_end_is_named(monkeypatch):
    monkeypatch.setattr(_backend, "FORCED", "reference")
    assert ("CPU tensors", "run on 'reference' (AML_KERNELS_BACKEND=reference)") in report.devices([])


def test_what_was_built_is_listed(monkeypatch):
    monkeypatch.setattr(report, "architectures", lambda: ("8.0", "9.0+PTX"))
    rows = dict(report.installed())
    if _backend.EXTENSION_MISSING is None:
        assert rows["CUDA kernels"] == "for 8.0, 9.0+PTX" and rows["CPU kernels"].startswith("for ")
    else:
        assert "pip install" in rows["extension"]
    assert "masked_loss" in rows["operators"] and torch.__version__ in rows["Python, PyTorch"]


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_the_check_passes(backend):
    if reason := _backend.missing(backend, "cpu"):
        pytest.skip(reason)
    assert report.self_check(backend, "cpu") is None


@pytest.mark.parametrize("wrong", ("similarity", "loss", "gradient", "kept pixels"))
def test_the_check_finds_what_is_wrong(monkeypatch, wrong):
    right = aml_kernels.aml_loss

    def broken(logits, *arguments, **options):
        loss, stats = right(logits, *arguments, **options)
        if wrong == "similarity":
            stats = stats._replace(similarity=stats.similarity * 1.001)
        if wrong == "kept pixels":
            stats = stats._replace(kept=stats.kept + 1)
        if wrong == "gradient":
            loss = loss + 0 * logits.sum() + (logits - logits.detach()).sum() * 1e-4
        return (loss * 1.001 if wrong == "loss" else loss), stats

    monkeypatch.setattr(aml_kernels, "aml_loss", broken)
    assert report.self_check("reference", "cpu").startswith(wrong)


def test_a_failing_check_is_reported_and_fails(monkeypatch, capsys):
    def dies(*arguments, **options):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(aml_kernels, "aml_loss", dies)
    assert report.main() == 1
    assert "FAILED: RuntimeError: no kernel image is available" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen([sys.executable, "-m", "aml_kernels"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141
