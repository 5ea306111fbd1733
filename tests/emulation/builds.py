"""Compiles each operator's .cu for each kind of run, and says what is missing where that cannot be."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "emulation"

#: The kernels are compiled as for a GPU: a multiply-add is fused where it is written so, and nowhere else.
FLAGS = (
    "-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-DAML_EMULATED", "-DAML_FMA", "-DUSE_CUDA", "-Wall",
    "-Wextra", "-Wno-unknown-pragmas",
)

#: Per kind of run: how to compile, how to link, and which libraries have to be loaded before anything else.
MODES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "plain": ((), (), ()),
    "stepped": (("-fsanitize=thread", "-DAML_EMULATION_TRACE", "-fno-threadsafe-statics"), (), ()),
    "bounds": (
        # -O0: compiling takes several times as long as running.
        ("-O0", *(BOUNDS := ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"))), BOUNDS,
        ("asan", "stdc++"),
    ),
    "races": (RACES := ("-fsanitize=thread",), RACES, ("tsan", "stdc++")),
}


@functools.cache
def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def preloaded(mode: str) -> list[str] | None:
    """Paths of the libraries that a run of `mode` preloads; None if one is not installed."""
    paths = []
    for library in MODES[mode][2]:
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
    return None if preloaded(mode) is not None else f"needs the libraries {', '.join(MODES[mode][2])} of g++"


def _sources_of(source: Path, root: Path) -> list[Path]:
    """A source and all that it includes from `root` and from the emulator."""
    found, left = [], [source.resolve()]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^#include [<"](.*)[>"]', path.read_text(), re.MULTILINE):
            here = [folder / name for folder in (path.parent, root, HERE) if (folder / name).exists()]
            left += [path.resolve() for path in here[:1]]
    return sorted(found)


@functools.cache
def _compiler_version() -> bytes:
    return subprocess.run([str(compiler()), "--version"], capture_output=True).stdout


def compiler_major() -> int:
    told = subprocess.run([str(compiler()), "-dumpversion"], capture_output=True, text=True).stdout
    return int(told.partition(".")[0])


def _make(result: Path, *command: str) -> Path:
    """Run a command that makes `result`, if that is not there."""
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        unfinished = result.with_suffix(f".{os.getpid()}.tmp")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode != 0 or "warning:" in done.stderr:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
        unfinished.rename(result)
    return result


def _object(source: Path, mode: str, root: Path) -> Path:
    flags = [*FLAGS, *MODES[mode][0]]
    digest = hashlib.sha256(repr((flags, _compiler_version())).encode())
    for path in _sources_of(source, root):
        digest.update(path.name.encode() + path.read_bytes())
    result = CACHE / mode / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    return _make(result, str(compiler()), *flags, f"-I{root}", f"-I{HERE}", "-x", "c++", "-c", str(source))


def _library(mode: str, root: Path, files: tuple[str, ...]) -> Path:
    folder = root / "csrc" / "cuda"
    code = [HERE / "interface.cpp", *(map(folder.joinpath, files) if files else sorted(folder.glob("*.cu")))]
    objects = [_started(_objects, _object, source, mode, root) for source in code]
    objects = [str(future.result()) for future in objects]
    digest = hashlib.sha256(repr((MODES[mode], objects)).encode()).hexdigest()[:16]
    return _make(CACHE / mode / f"{digest}.so", str(compiler()), "-shared", *MODES[mode][1], *objects)


_started_lock = threading.Lock()
_libraries = ThreadPoolExecutor(max_workers=64)  # they mostly wait for
_objects = ThreadPoolExecutor(max_workers=os.cpu_count())  # which are compiled one after the other, as started
_futures: dict[tuple, Future[Path]] = {}


def _started(pool: ThreadPoolExecutor, make: Callable[..., Path], *arguments) -> "Future[Path]":
    """What is being made already is not made twice."""
    with _started_lock:
        if (make, arguments) not in _futures:
            _futures[make, arguments] = pool.submit(make, *arguments)
        return _futures[make, arguments]


def files_of(operator: str, root: Path = ROOT) -> tuple[str, ...]:
    """Its .cu, and those of its kernels where they are in files of their own."""
    return tuple(sorted(path.name for path in (root / "csrc" / "cuda").glob(f"{operator}*.cu")))


def start(mode: str, root: Path = ROOT, files: tuple[str, ...] = ()) -> "Future[Path]":
    """Compile in the background: `files` of csrc/cuda under `root`; all of them, if none are named."""
    return _started(_libraries, _library, mode, root, files)


def library(mode: str, root: Path = ROOT, files: tuple[str, ...] = ()) -> Path:
    return start(mode, root, files).result()
