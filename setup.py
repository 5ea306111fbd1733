"""Builds the extension aml_kernels._C against PyTorch's stable C++ interface.

One abi3 file serves every CPython from 3.10 and every PyTorch from 2.10, with CUDA or without. Environment variables:

AML_KERNELS_CUDA        unset: CUDA kernels if nvcc is found; 0: none; 1: it is an error if they cannot be built
AML_KERNELS_EXTENSION   unset: the package works without the extension, slower; 0: do without; 1: it is an error
CUDA_HOME               where the CUDA toolkit is, if nvcc is neither beside PyTorch nor on PATH
TORCH_CUDA_ARCH_LIST    GPUs to build for; unset: those of this host, and without one 8.0, 9.0 and later
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
import torch
from setuptools import setup

if int(setuptools.__version__.partition(".")[0]) < 77:  # which cannot read pyproject.toml, and says so less clearly
    raise SystemExit(f"setuptools: expected 77 or newer, got {setuptools.__version__}: pip install 'setuptools>=77'")

HERE = Path(__file__).resolve().parent
# 8.6 and 8.9 run the code for 8.0; what comes after the last is compiled by the driver. nvcc knows 10.0 since 12.8.
ARCHITECTURES, OLDER_ARCHITECTURES = "8.0;9.0;10.0+PTX", "8.0;9.0+PTX"


def switch(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0, 1 or nothing, got {value!r}")
    return value


EXTENSION, CUDA = switch("AML_KERNELS_EXTENSION"), switch("AML_KERNELS_CUDA")
if EXTENSION == "0" and CUDA == "1":
    raise SystemExit("AML_KERNELS_EXTENSION=0, AML_KERNELS_CUDA=1: the CUDA kernels are part of the extension")


class Toolkit:
    """A CUDA toolkit that fits this PyTorch; RuntimeError says what is missing and how to get it."""

    def __init__(self) -> None:
        if torch.version.cuda is None:
            raise RuntimeError("this PyTorch was built without CUDA; install one for CUDA, see https://pytorch.org")
        self.major = torch.version.cuda.partition(".")[0]
        # PyTorch's own CUDA packages, which can hold a whole toolkit, or complete one that is not.
        self.beside_torch = Path(torch.__file__).parent.parent / "nvidia" / f"cu{self.major}"
        self.install = f'pip install "cuda-toolkit[nvcc,cccl]=={torch.version.cuda}.*"'
        self.home = self._find()
        self.include = self.beside_torch / "include"
        for header in ("cuda_runtime.h", "cooperative_groups.h", "cuda_bf16.h"):
            if not any((folder / header).exists() for folder in (self.home / "include", self.include)):
                raise RuntimeError(f"{header} is neither in {self.home}/include nor in {self.include}; {self.install}")
        folders = [self.home / "lib64", self.home / "lib", *self.home.glob("targets/*/lib"), self.beside_torch / "lib"]
        self.library = next((f for f in folders if (f / "libcudart_static.a").exists()), None)
        if self.library is None:
            raise RuntimeError(f"libcudart_static.a is in none of {', '.join(map(str, folders))}; {self.install}")
        self.architectures = ARCHITECTURES if self.release >= (12, 8) else OLDER_ARCHITECTURES
        if torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            oldest = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
            if oldest < (8, 0):
                raise RuntimeError(
                    f"a GPU of this host has compute capability {oldest[0]}.{oldest[1]}, and the kernels need 8.0; "
                    "TORCH_CUDA_ARCH_LIST=8.0 builds for others"
                )

    def _find(self) -> Path:
        given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        places = [Path(given) / "bin" / "nvcc"] if given else [
            self.beside_torch / "bin" / "nvcc", Path(shutil.which("nvcc") or "/nowhere"),
            Path("/usr/local/cuda/bin/nvcc"),
        ]
        versions = []
        for nvcc in filter(Path.exists, places):
            answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            version = re.search(r"release (\d+)\.(\d+)", answer)
            if version and version[1] == self.major:
                self.release = int(version[1]), int(version[2])
                # The one on PATH can be a script that calls another: ask where the toolkit is.
                plan = [nvcc, "--dryrun", "-x", "cu", os.devnull]
                told = subprocess.run(plan, capture_output=True, text=True, cwd=HERE).stderr
                top = re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
                return Path(top[1]).resolve() if top else nvcc.parent.parent
            versions.append(f"{nvcc} is of CUDA {'.'.join(version.groups()) if version else 'unknown'}")
        found = "; ".join(versions) or f"nvcc was not found ({', '.join(map(str, places))})"
        raise RuntimeError(f"{found}; this PyTorch needs CUDA {self.major}: {self.install}, or set CUDA_HOME")


def toolkit() -> Toolkit | None:
    if CUDA == "0" or EXTENSION == "0":
        return None
    try:
        return Toolkit()
    except RuntimeError as error:
        if CUDA == "1":
            raise SystemExit(f"AML_KERNELS_CUDA=1: the CUDA kernels cannot be built: {error}") from None
        print(f"aml_kernels: building without CUDA kernels: {error}", file=sys.stderr)
        return None


TOOLKIT = toolkit()
if TOOLKIT:
    os.environ["CUDA_HOME"] = str(TOOLKIT.home)  # read by the import that follows, which would guess from PATH
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = TOOLKIT.architectures

from torch.utils import cpp_extension  # noqa: E402


def architecture_flags() -> list[str]:
    # Given to nvcc here: PyTorch leaves its own out if "arch" occurs in any other flag, such as a path.
    try:
        flags = cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {error}; expected such as 9.0, 9.0a, 8.0;9.0+PTX") from None
    except IndexError:  # "native"
        given = os.environ.get("TORCH_CUDA_ARCH_LIST")
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: {given!r} is what this host has, and PyTorch sees no GPU; expected such as 9.0"
        ) from None
    old = [flag for flag in flags if int(re.findall(r"\d+", flag)[-1]) < 80]
    if old:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: expected 8.0 or newer, got {' '.join(old)}; AML_KERNELS_CUDA=0 builds without"
        )
    return flags


def architecture_names(flags: list[str]) -> list[str]:
    names = {}
    for kind, major, minor in re.findall(r"code=(sm|compute)_(\d+)(\d[a-z]?)", " ".join(flags)):
        names.setdefault((int(major), minor), []).append(kind)
    return [f"{major}.{minor}" + "+PTX" * ("compute" in kinds) for (major, minor), kinds in sorted(names.items())]


class BuildExtension(cpp_extension.BuildExtension):
    """Goes on without what cannot be built, the CUDA kernels or all of the extension, unless it was asked for."""

    def run(self) -> None:
        # What was built of earlier sources would stand in for what cannot be built now.
        for each in self.extensions:
            Path(self.get_ext_fullpath(each.name)).unlink(missing_ok=True)
        super().run()

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            cuda = any(source.endswith(".cu") for source in self.extensions[0].sources)
            if (CUDA if cuda else EXTENSION) == "1":
                raise
            if cuda:
                print(
                    f"aml_kernels: the CUDA kernels could not be built ({error}); building without. AML_KERNELS_CUDA=1 "
                    "makes this an error, AML_KERNELS_CUDA=0 does not try.",
                    file=sys.stderr,
                )
                vars(self.extensions[0]).update(vars(extension(None)))
                self.build_extensions()
                return
            print(
                f"aml_kernels: the extension could not be built ({error}).\nThe package works without it, slower. "
                "Install a C++17 compiler and install again; AML_KERNELS_EXTENSION=1 makes this an error.",
                file=sys.stderr,
            )
            self.extensions = []

    def copy_extensions_to_source(self) -> None:
        if self.extensions:
            super().copy_extensions_to_source()


def extension(toolkit):
    define = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    extension = cpp_extension.CppExtension(
        "aml_kernels._C",
        ["csrc/library.cpp", *sorted(str(p.relative_to(HERE)) for p in HERE.glob("csrc/cpu/*.cpp"))],
        py_limited_api=True,
        extra_compile_args={"cxx": [
            "-O3", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
            # A pixel is kept by comparing computed numbers: they have to round alike on every back end.
            "-ffp-contract=off",
            "-fvisibility=hidden", "-g0", "-Wall", "-Wno-unknown-pragmas",
            *define, f"-ffile-prefix-map={HERE}=.",
        ]},
        # libtorch is not referenced by a symbol, and would be dropped; with it come the CUDA functions, if any.
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"],
    )
    extension.libraries = ["c10", "torch_cpu"]
    if toolkit:
        flags = architecture_flags()
        names = architecture_names(flags)
        print(f"aml_kernels: building CUDA kernels for {', '.join(names)} with {toolkit.home}", file=sys.stderr)
        extension.sources += sorted(str(p.relative_to(HERE)) for p in HERE.glob("csrc/cuda/*.cu"))
        extension.extra_compile_args["cxx"].append(f'-DAML_CUDA_ARCHITECTURES="{" ".join(names)}"')
        extension.extra_compile_args["nvcc"] = [
            "-O3", "-std=c++17", "-fmad=false", "-DUSE_CUDA", *define, *flags, "-Xfatbin=-compress-all",
            # In quotes for the shell that nvcc calls the compiler by, and for nvcc, which divides at commas.
            f"-Xcompiler=-fvisibility=hidden,-g0,'-ffile-prefix-map={HERE}=.'", f"-isystem={toolkit.include}",
        ]
        # The runtime inside the file: it then loads where PyTorch has none, or another one.
        extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
        extension.library_dirs.append(str(toolkit.library))
    return extension


setup(
    ext_modules=[] if EXTENSION == "0" else [extension(TOOLKIT)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
