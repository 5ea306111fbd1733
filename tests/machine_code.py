"""What nvcc made of the CUDA kernels: registers, shared memory, spills and loads, read from the machine code.

From the built extension where that holds CUDA kernels, and else from csrc/cuda/*.cu, compiled with nvcc and without
PyTorch. The table is that of docs/verification.md; tests/verification.py prints it.
"""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_OF_PROCESSOR = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
REGISTERS_OF_PROCESSOR = 1 << 16
THREADS_OF_PROCESSOR = 2048
#: Bytes of shared memory that a launch asks for, which the machine code does not tell.
DYNAMIC_SHARED = {
    f"similarity_gradients<{name}, {way}>": common + features
    for way, common in (("BestWordGradient", 59792), ("AllWordsGradient", 35216))
    for name, features in (("float", 17408), ("bf16", 9216), ("f16", 9216))
}


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    registers: int
    shared: int  #: bytes
    stack: int  #: bytes of local memory, which is where registers are spilled to
    opcodes: Counter
    threads: int  #: of a block, at most; from __launch_bounds__, as is ...
    claimed_blocks: int  #: ... how many blocks a multiprocessor is to run at once

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches the whole of `pattern`."""
        return sum(number for opcode, number in self.opcodes.items() if re.fullmatch(pattern, opcode))

    @property
    def wide_loads(self) -> int:
        return self.count(r"LDG\.E(\.\w+)*\.(128|256)(\.\w+)*") + self.wide_copies

    @property
    def wide_copies(self) -> int:
        """From global to shared memory, past the registers."""
        return self.count(r"LDGSTS\.E(\.\w+)*\.128(\.\w+)*")

    @property
    def wide_stores(self) -> int:
        return self.count(r"STG\.E(\.\w+)*\.(128|256)(\.\w+)*")

    @property
    def local_accesses(self) -> int:
        return self.count(r"(LDL|STL)(\..+)?")

    @property
    def double_instructions(self) -> int:
        return self.count(r"D(ADD|MUL|FMA|SETP|MNMX)(\..+)?|.*\.F64(\..+)?|.*64H(\..+)?")

    @property
    def blocks(self) -> int:
        """How many blocks a multiprocessor runs at once."""
        registers = -(-self.registers // 8) * 8 * self.threads  # given out to warps in eights per thread
        shared = self.shared + 1024  # which the system takes
        return min(
            REGISTERS_OF_PROCESSOR // registers, SHARED_OF_PROCESSOR[self.architecture] // shared,
            THREADS_OF_PROCESSOR // self.threads,
        )


@functools.cache
def tool(name: str) -> str | None:
    """cuobjdump, from PATH or from triton; the disassembler it calls lies beside it."""
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton and triton.origin else None
    return str(path) if path and path.exists() else None


@functools.cache
def built() -> Path | None:
    """The extension, if it has machine code for all of ARCHITECTURES, and PTX, which tells the launch bounds."""
    from aml_kernels import _backend

    if _backend.CUDA_MISSING:
        return None
    names = _backend._C.cuda_architectures()
    has = {f"sm_{name.partition('+')[0].replace('.', '')}" for name in names}
    ptx = any(name.endswith("+PTX") for name in names)
    return Path(_backend._C.__file__) if ptx and has >= set(ARCHITECTURES) else None


@functools.cache
def missing() -> str | None:
    """Why there is nothing to read."""
    if tool("cuobjdump") is None:
        return "needs cuobjdump, which comes with CUDA and with triton"
    if shutil.which("c++filt") is None:
        return "needs c++filt, which comes with binutils"
    if built() is None and shutil.which("nvcc") is None:
        return "needs nvcc: the extension was built without CUDA, or not for " + ", ".join(ARCHITECTURES)
    return None


def compile_source(source: Path, result: Path) -> Path:
    """Machine code and PTX of one .cu. The stand-ins for PyTorch's headers are those of the emulator."""
    numbers = [architecture.removeprefix("sm_") for architecture in ARCHITECTURES]
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    ptx = f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"
    unfinished = result.with_suffix(f".{os.getpid()}.tmp")
    subprocess.run(
        ["nvcc", "-O3", "-std=c++17", "-fmad=false", "-DUSE_CUDA", f"-I{ROOT / 'tests' / 'emulation'}", "-fatbin",
         *codes, ptx, str(source), "-o", str(unfinished)],
        check=True, capture_output=True, text=True,
    )
    return unfinished.rename(result)


@functools.cache
def nvcc_version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout


def _compiled(source: Path) -> Path:
    folders = [ROOT / "csrc" / "common", ROOT / "csrc" / "cuda"]
    files = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    digest = hashlib.sha256(nvcc_version().encode() + b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    result = ROOT / ".cache" / "machine_code" / digest / f"{source.stem}.fatbin"
    result.parent.mkdir(parents=True, exist_ok=True)
    return result if result.exists() else compile_source(source, result)


def _dump(path: Path, *options: str) -> str:
    command = [str(tool("cuobjdump")), *options, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _readable(names: list[str]) -> dict[str, str]:
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\(.*|^void |aml::cuda::|\(anonymous namespace\)::", "", line) for line in plain.splitlines()]
    short = [name.replace("__nv_bfloat16", "bf16").replace("__half", "f16").replace("> >", ">>") for name in short]
    return dict(zip(names, short, strict=True))


def _launch_bounds(path: Path) -> dict[str, tuple[int, int]]:
    """Threads and blocks that each kernel was compiled for, by its name in the machine code."""
    bounds = {}
    for name, directives in re.findall(r"\.entry (\w+)\([^)]*\)([^{]*)\{", _dump(path, "-ptx")):
        threads = re.search(r"\.maxntid (\d+)", directives)
        blocks = re.search(r"\.minnctapersm (\d+)", directives)
        bounds[name] = (int(threads[1]) if threads else 1024, int(blocks[1]) if blocks else 1)
    return bounds


def read(path: Path) -> list[Kernel]:
    """The kernels in an extension, or in what compile_source made."""
    bounds = _launch_bounds(path)
    names = _readable(list(bounds))
    found = []
    for architecture in ARCHITECTURES:
        usage = dict(re.findall(r"Function (\S+):\s+(REG:.*)", _dump(path, "-res-usage", "-arch", architecture)))
        for part in _dump(path, "-sass", "-arch", architecture).split("Function : ")[1:]:
            mangled = part.split(None, 1)[0]
            numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage[mangled])}
            opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", part)
            found.append(Kernel(
                names[mangled], architecture, numbers["REG"],
                numbers["SHARED"] + DYNAMIC_SHARED.get(names[mangled], 0), numbers["STACK"] + numbers["LOCAL"],
                Counter(opcodes), *bounds[mangled],
            ))
    return found


@functools.cache
def kernels() -> list[Kernel]:
    """All kernels for all architectures."""
    extension = built()
    if extension:
        paths = [extension]
    else:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            paths = list(pool.map(_compiled, sorted((ROOT / "csrc" / "cuda").glob("*.cu"))))
    found = {(kernel.name, kernel.architecture): kernel for path in paths for kernel in read(path)}
    return [found[key] for key in sorted(found)]


def table() -> str:
    """Markdown: a row per kernel, the architectures' figures beside each other."""
    rows = ["| kernel | threads x blocks claimed | registers | shared bytes | spilled bytes | 128-bit loads |",
            "|---|--:|--:|--:|--:|--:|"]
    by_name: dict[str, list[Kernel]] = {}
    for kernel in kernels():
        by_name.setdefault(kernel.name, []).append(kernel)
    for name, each in by_name.items():
        each.sort(key=lambda kernel: ARCHITECTURES.index(kernel.architecture))
        claim = f"{each[0].threads} x {each[0].claimed_blocks}"
        figures = zip(*((k.registers, k.shared, k.stack, k.wide_loads) for k in each), strict=True)
        cells = (str(f[0]) if len(set(f)) == 1 else " / ".join(map(str, f)) for f in figures)
        rows.append(f"| `{name}` | {claim} | {' | '.join(cells)} |")
    return "\n".join(rows)
