"""Builds the extension aml_kernels._C against PyTorch's stable C++ interface.

One abi3 file serves every CPython from 3.10 and every PyTorch from 2.10. Without a C++ compiler the package installs
without it and runs its PyTorch reference; AML_KERNELS_EXTENSION=0 asks for that, =1 makes a failing build an error.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
WANTED = os.environ.get("AML_KERNELS_EXTENSION", "")
if WANTED not in ("", "0", "1"):
    raise SystemExit(f"AML_KERNELS_EXTENSION: expected 0, 1 or nothing, got {WANTED!r}")


class BuildExtension(cpp_extension.BuildExtension):
    """Goes on without the extension where it cannot be built, unless it was asked for."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            if WANTED == "1":
                raise
            print(
                f"aml_kernels: the extension could not be built ({error}).\nThe package works without it, slower. "
                "Install a C++17 compiler and install again; AML_KERNELS_EXTENSION=1 makes this an error.",
                file=sys.stderr,
            )
            self.extensions = []

    def copy_extensions_to_source(self) -> None:
        if self.extensions:
            super().copy_extensions_to_source()


def extension():
    extension = cpp_extension.CppExtension(
        "aml_kernels._C",
        ["csrc/library.cpp", *sorted(str(p.relative_to(HERE)) for p in HERE.glob("csrc/cpu/*.cpp"))],
        py_limited_api=True,
        extra_compile_args={"cxx": [
            "-O3", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
            # A pixel is kept by comparing computed numbers: they have to round alike on every back end.
            "-ffp-contract=off",
            "-fvisibility=hidden", "-g0", "-Wall", "-Wno-unknown-pragmas",
            "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-ffile-prefix-map={HERE}=.",
        ]},
        # libtorch is not referenced by a symbol, and would be dropped.
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"],
    )
    extension.libraries = ["c10", "torch_cpu"]
    return extension


setup(
    ext_modules=[] if WANTED == "0" else [extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
