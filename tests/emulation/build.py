"""Compiles each operator's .cu for each kind of run, and says what is missing where that cannot be."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "emulation"

#: The kernels are compiled as for a GPU: a multiply-add is fused where it is written so, and nowhere else.
FLAGS = (
    "-std=c++20", "-O1", "-g1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing", "-DAML_EMULATED", "-DAML_FMA",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas",
)
BOUNDS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

#: What each kind of run adds, and which libraries have to be loaded before anything else.
MODES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": ((), ()),
    "stepped": (("-fsanitize=thread", "-DAML_EMULATION_TRACE", "-fno-threadsafe-statics"), ()),
    "bounds": (BOUNDS, ("asan", "stdc++")),
    "races": (("-fsanitize=thread",), ("tsan", "stdc++")),
}
OPERATORS = ("quantile",)


@functools.cache
def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def preloaded(mode: str) -> list[str] | None:
    """Paths of the libraries that a run of `mode` preloads; None if one is not installed."""
    paths = []
    for library in MODES[mode][1]:
        found = subprocess.run(
            [str(compiler()), f"-print-file-name=lib{library}.so"], capture_output=True, text=True, check=True,
        ).stdout.strip()
        if not os.path.isabs(found):  # the name itself: not found
            return None
        paths.append(found)
    return paths


@functools.cache
def missing(mode: str) -> str | None:
    """Why `mode` cannot run here."""
    if compiler() is None:
        return "needs g++"
    version = subprocess.run([str(compiler()), "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        return f"needs g++; {compiler()} is another compiler"
    return None if preloaded(mode) is not None else f"needs the libraries {', '.join(MODES[mode][1])} of g++"


def _hash(sources: Path) -> str:
    digest = hashlib.sha256()
    for folder in (HERE, sources / "csrc" / "common", sources / "csrc" / "cuda"):
        for path in sorted(folder.iterdir()):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
                digest.update(path.name.encode() + path.read_bytes())
    digest.update(repr((FLAGS, MODES)).encode())
    digest.update(subprocess.run([str(compiler()), "--version"], capture_output=True).stdout)
    return digest.hexdigest()[:16]


def compiled(operator: str, mode: str, sources: Path = ROOT, options: tuple[str, ...] = ()) -> Path:
    """The library of an operator, from the kernels under `sources`; compiled unless it is there already."""
    folder = CACHE / _hash(sources)
    library = folder / f"{operator}-{mode}-{hashlib.sha256(repr(options).encode()).hexdigest()[:8]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "built.so"
        flags = [*FLAGS, *MODES[mode][0], *options, f"-I{sources}", f"-I{HERE}"]
        source = f'-DEMULATED_SOURCE="csrc/cuda/{operator}.cu"'
        commands = [[str(compiler()), *flags, source, str(HERE / "interface.cpp"), "-o", str(built)]]
        if mode == "stepped":  # instrumented, and linked without the library that belongs to it
            commands[0][-1] = f"{built}.o"
            commands[0].remove("-shared")
            commands[0].append("-c")
            commands.append([str(compiler()), "-shared", f"{built}.o", "-o", str(built)])
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
            assert "warning:" not in done.stderr, done.stderr
        built.rename(library)
    return library


class Builds:
    """Compiles ahead in the background, as many at a time as there are processors."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())
        self._futures: dict[tuple, Future[Path]] = {}

    def start(self, operator: str, mode: str, *more) -> "Future[Path]":
        key = (operator, mode, *more)
        if key not in self._futures:
            self._futures[key] = self._pool.submit(compiled, *key)
        return self._futures[key]
