"""Compiles each operator's .cu for each kind of run, and says what is missing where that cannot be."""

import functools
import hashlib
import os
import shutil
import subprocess
import threading
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
        BOUNDS := ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"), BOUNDS, ("asan", "stdc++"),
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


def _digest(sources: Path) -> str:
    digest = hashlib.sha256(repr((FLAGS, MODES)).encode())
    digest.update(subprocess.run([str(compiler()), "--version"], capture_output=True).stdout)
    for folder in (HERE, sources / "csrc" / "common", sources / "csrc" / "cuda"):
        for path in sorted(folder.iterdir()):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


_processors = threading.Semaphore(os.cpu_count() or 1)


def _run(*command: str) -> None:
    with _processors:
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or "warning:" in done.stderr:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")


def _object(source: Path, folder: Path, mode: str, sources: Path) -> str:
    result = folder / f"{source.stem}.o"
    if not result.exists():
        unfinished = result.with_suffix(f".{os.getpid()}.tmp")
        flags = [*FLAGS, *MODES[mode][0], f"-I{sources}", f"-I{HERE}"]
        _run(str(compiler()), *flags, "-x", "c++", "-c", str(source), "-o", str(unfinished))
        unfinished.rename(result)
    return str(result)


def _library(mode: str, sources: Path, files: tuple[str, ...]) -> Path:
    folder = CACHE / _digest(sources) / mode
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"{'-'.join(Path(file).stem for file in files) or 'all'}.so"
    if not result.exists():
        cuda = sources / "csrc" / "cuda"
        code = [HERE / "interface.cpp", *(map(cuda.joinpath, files) if files else sorted(cuda.glob("*.cu")))]
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(lambda source: _object(source, folder, mode, sources), code))
        unfinished = result.with_suffix(f".{os.getpid()}.tmp")
        _run(str(compiler()), "-shared", *MODES[mode][1], *objects, "-o", str(unfinished))
        unfinished.rename(result)
    return result


_pool = ThreadPoolExecutor(max_workers=16)
_libraries: dict[tuple, Future[Path]] = {}


def start(mode: str, sources: Path = ROOT, files: tuple[str, ...] = ()) -> "Future[Path]":
    """Compile in the background: `files` of csrc/cuda under `sources`; all of them, if none are named."""
    key = mode, sources, files
    if key not in _libraries:
        _libraries[key] = _pool.submit(_library, *key)
    return _libraries[key]


def library(mode: str, sources: Path = ROOT, files: tuple[str, ...] = ()) -> Path:
    return start(mode, sources, files).result()
