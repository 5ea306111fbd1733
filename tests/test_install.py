"""What setup.py decides to build and says about it. Nothing is compiled here; `make test-wheel` and CI do that."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
READ = ("AML_KERNELS_CUDA", "AML_KERNELS_EXTENSION", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
needs_cuda_in_torch = pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch was built without CUDA")


def setup(*arguments, root=ROOT, torch_is="", **variables):
    """Run setup.py, by default with a command that builds nothing, as if no GPU were here.

    torch_is: statements that change PyTorch before.
    """
    environment = {name: value for name, value in os.environ.items() if name not in READ}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} | {name: str(value) for name, value in variables.items()}
    start = f"import runpy, torch; {torch_is}; runpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, *(("-c", start) if torch_is else ("setup.py",)), *(arguments or ("--version",))]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)


def refused(run, *words):
    assert run.returncode != 0 and "Traceback" not in run.stderr, run.stderr
    for word in words:
        assert word in run.stderr, f"{word!r} is not in: {run.stderr}"


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit that can tell its version, and what else has to be there; no compiler."""

    def make(release):
        for name in ("include/cuda_runtime.h", "include/cooperative_groups.h", "include/cuda_bf16.h",
                     "lib64/libcudart_static.a", "bin/nvcc"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        says = f"echo 'Cuda compilation tools, release {release}, V{release}.1'; echo '#$ TOP={tmp_path}' >&2"
        (tmp_path / "bin/nvcc").write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / "bin/nvcc").chmod(0o755)
        return tmp_path

    return make


@pytest.mark.parametrize("name", ("AML_KERNELS_CUDA", "AML_KERNELS_EXTENSION"))
def test_other_values_are_refused(name):
    refused(setup(**{name: "yes"}), f"{name}: expected 0, 1 or nothing, got 'yes'")


def test_setuptools_of_an_older_environment_are_refused():
    """Without build isolation these are there: what `python -m venv` brings along for Python 3.11, for example."""
    old = setup(torch_is="import setuptools; setuptools.__version__ = '65.5.0'")
    refused(old, "setuptools: expected 77 or newer, got 65.5.0: pip install 'setuptools>=77'")


def test_cuda_kernels_without_the_extension_are_refused():
    refused(setup(AML_KERNELS_CUDA="1", AML_KERNELS_EXTENSION="0"), "AML_KERNELS_EXTENSION=0", "AML_KERNELS_CUDA=1")


def test_a_forced_build_without_nvcc_says_what_to_install(tmp_path):
    run = setup(AML_KERNELS_CUDA="1", CUDA_HOME=tmp_path)
    refused(run, "AML_KERNELS_CUDA=1: the CUDA kernels cannot be built")
    if torch.version.cuda is None:
        assert "install one for CUDA" in run.stderr
    else:
        refused(run, "nvcc was not found", str(tmp_path), 'pip install "cuda-toolkit[nvcc,cccl]', "CUDA_HOME")


def test_without_nvcc_it_says_so_and_goes_on(tmp_path):
    run = setup(CUDA_HOME=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "building without CUDA kernels" in run.stderr and "install" in run.stderr


@pytest.mark.parametrize("variables", ({"AML_KERNELS_CUDA": "0"}, {"AML_KERNELS_EXTENSION": "0"}), ids=str)
def test_who_wants_no_cuda_kernels_hears_nothing_of_them(variables, tmp_path):
    run = setup(**variables, CUDA_HOME=tmp_path)
    assert run.returncode == 0 and "CUDA kernels" not in run.stderr, run.stderr


@needs_cuda_in_torch
def test_a_toolkit_of_another_major_version_does_not_fit(toolkit):
    run = setup(AML_KERNELS_CUDA="1", CUDA_HOME=toolkit("9.2"))
    refused(run, "is of CUDA 9.2", f"needs CUDA {torch.version.cuda.partition('.')[0]}", "pip install")


@needs_cuda_in_torch
@pytest.mark.parametrize(("variables", "built"), (
    ({}, "8.0, 9.0, 10.0+PTX"), ({"TORCH_CUDA_ARCH_LIST": ""}, "8.0, 9.0, 10.0+PTX"),
    ({"TORCH_CUDA_ARCH_LIST": "9.0"}, "9.0"),
    ({"TORCH_CUDA_ARCH_LIST": "8.6;9.0+PTX"}, "8.6, 9.0+PTX"),
    ({"TORCH_CUDA_ARCH_LIST": "10.0a 9.0a+PTX 9.0"}, "9.0, 9.0a+PTX, 10.0a"),
), ids=str)
def test_architectures(variables, built, toolkit):
    run = setup(CUDA_HOME=toolkit(torch.version.cuda), **variables)
    assert run.returncode == 0 and f"building CUDA kernels for {built} with" in run.stderr, run.stderr


@pytest.mark.parametrize(("release", "built"), (("12.6", "8.0, 9.0+PTX"), ("12.8", "8.0, 9.0, 10.0+PTX")))
def test_an_older_nvcc_is_not_asked_for_what_it_does_not_know(release, built, toolkit):
    run = setup(torch_is=f"torch.version.cuda = {release!r}", CUDA_HOME=toolkit(release))
    assert run.returncode == 0 and f"building CUDA kernels for {built} with" in run.stderr, run.stderr


OLD_GPU = (
    "torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 2; "
    "torch.cuda.get_device_capability = lambda i=0: ((9, 0), (7, 5))[i]"
)


@needs_cuda_in_torch
def test_a_host_with_an_older_gpu_gets_the_rest(toolkit):
    run = setup(torch_is=OLD_GPU, CUDA_HOME=toolkit(torch.version.cuda))
    assert run.returncode == 0, run.stderr
    assert "building without CUDA kernels: a GPU of this host has compute capability 7.5" in run.stderr
    run = setup(torch_is=OLD_GPU, CUDA_HOME=toolkit(torch.version.cuda), AML_KERNELS_CUDA="1")
    refused(run, "AML_KERNELS_CUDA=1: the CUDA kernels cannot be built", "7.5", "TORCH_CUDA_ARCH_LIST=8.0")
    run = setup(torch_is=OLD_GPU, CUDA_HOME=toolkit(torch.version.cuda), TORCH_CUDA_ARCH_LIST="8.0")
    assert run.returncode == 0 and "building CUDA kernels for 8.0 with" in run.stderr, run.stderr


@needs_cuda_in_torch
def test_gpus_that_the_kernels_are_not_written_for_are_refused(toolkit):
    run = setup(CUDA_HOME=toolkit(torch.version.cuda), TORCH_CUDA_ARCH_LIST="7.5;9.0")
    refused(run, "TORCH_CUDA_ARCH_LIST: expected 8.0 or newer", "AML_KERNELS_CUDA=0")


@needs_cuda_in_torch
def test_gpus_that_pytorch_does_not_know_are_refused(toolkit):
    run = setup(CUDA_HOME=toolkit(torch.version.cuda), TORCH_CUDA_ARCH_LIST="9.0;6.6")
    refused(run, "TORCH_CUDA_ARCH_LIST: ", "(6.6)", "expected such as 9.0, ")


@needs_cuda_in_torch
def test_the_gpus_of_a_host_without_one_are_refused(toolkit):
    run = setup(CUDA_HOME=toolkit(torch.version.cuda), TORCH_CUDA_ARCH_LIST="native")
    refused(run, "TORCH_CUDA_ARCH_LIST: 'native' is what this host has", "expected such as 9.0")


@pytest.fixture
def compiler(tmp_path):
    """It writes empty files."""
    path = tmp_path / "c++"
    path.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("options", ((), ("--inplace",)), ids=("for a wheel", "in place"))
def test_what_cannot_be_built_is_not_left_from_before(options, compiler, tmp_path):
    """The package would run what was made of other sources, and a wheel would hold it."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT / "csrc", root / "csrc")
    (root / "aml_kernels").mkdir()
    shutil.copy(ROOT / "setup.py", root)
    run = setup("build_ext", *options, root=root, AML_KERNELS_CUDA="0", CXX=compiler)
    assert run.returncode == 0, run.stderr
    places = [root / "aml_kernels"] if options else [*root.glob("build/lib*/aml_kernels")]
    assert [len([*place.glob("*.so")]) for place in places] == [1]
    run = setup("build_ext", *options, root=root, AML_KERNELS_CUDA="0", CXX=tmp_path / "nowhere/c++")
    assert run.returncode == 0 and "the extension could not be built" in run.stderr, run.stderr
    assert not [*places[0].glob("*.so")]


@needs_cuda_in_torch
def test_what_nvcc_cannot_compile_is_left_out(toolkit, compiler, tmp_path):
    """Without AML_KERNELS_CUDA=1 the C++ part is built then."""
    home = toolkit(f"{torch.version.cuda}")
    folders = "--build-temp", tmp_path / "objects", "--build-lib", tmp_path / "built"
    variables = {"CUDA_HOME": home, "CXX": compiler, "TORCH_CUDA_ARCH_LIST": "9.0"}
    run = setup("-q", "build_ext", *folders, **variables)
    assert run.returncode == 0, run.stderr
    assert "the CUDA kernels could not be built" in run.stderr and "AML_KERNELS_CUDA=1" in run.stderr
    built, = (tmp_path / "built").rglob("*.so")
    assert built.name.startswith("_C.")
    objects = {path.name for path in (tmp_path / "objects").rglob("*.o")}
    assert "library.o" in objects
    refused_build = setup("-q", "build_ext", *folders, **variables, AML_KERNELS_CUDA="1")
    assert refused_build.returncode != 0


@needs_cuda_in_torch
def test_a_path_may_hold_spaces_and_commas(tmp_path):
    root = tmp_path / "a folder, with spaces"
    for name, text in {"library.cpp": "int a;", "cuda/kernel.cu": "__global__ void kernel() {}"}.items():
        (root / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "csrc" / name).write_text(text)
    shutil.copy(ROOT / "setup.py", root)
    run = setup("build_ext", root=root, TORCH_CUDA_ARCH_LIST="9.0")
    if "building without CUDA kernels" in run.stderr:
        pytest.skip("needs nvcc")
    assert run.returncode == 0 and "could not be built" not in run.stderr, run.stdout + run.stderr
    assert [*root.glob("build/temp*/csrc/cuda/kernel.o")]


def test_a_source_distribution_holds_all_that_a_build_reads(tmp_path):
    run = setup("-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path, AML_KERNELS_CUDA="0")
    assert run.returncode == 0, run.stderr
    archive, = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode != 0:
        pytest.skip("needs a checkout of git, to know what is part of the project")
    needed = set(files.stdout.splitlines()) - {"MANIFEST.in"}
    assert needed and not needed - held, f"not in the archive: {sorted(needed - held)}"
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= held
    assert not any(name.endswith(".so") for name in held)
