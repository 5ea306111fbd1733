"""`make gpu`: build, test, check with compute-sanitizer and measure, on a machine with an NVIDIA GPU.

The work is cut into parts: first what only checks, all of it at once, then what is measured, with nothing beside it.
Each part leaves its log and its result in a folder that belongs to these sources and this environment; what has passed
there is not run again, unless that was without the build, which now passes. A run ends after 9 minutes and tells what
is left; the next goes on with it, with what has been compiled meanwhile by Triton and PyTorch.

    python tests/gpu/run.py                    what 9 minutes are enough for of what has not passed yet
    python tests/gpu/run.py --only cuda goal   these parts, whatever came of them before
"""

import argparse
import asyncio
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "aml_kernels/**/*.py", "csrc/**/*.*", "tests/**/*.py", "benchmarks/*.py")
OPERATORS = (
    "similarity", "quantile", "masked_loss", "aml_loss", "region_filter", "masking", "bad_input", "registration",
    "golden", "agreement",
)
NEEDED = {  #: and their oldest versions
    "torch": (2, 10), "pytest": (8,), "pytest-timeout": (2,), "pytest-xdist": (3,), "hypothesis": (6,),
    "setuptools": (77,), "ninja": (1, 10),
}
PROGRAMS = 100  #: at most, that Triton compiles for every_kernel.py, in two seconds each; test_triton_compile.py counts
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SHARED = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  #: by parts that share the processor's cores


@dataclass(frozen=True)
class Part:
    name: str
    seconds: int  #: after which it is ended
    command: Sequence[str]
    proof: str  #: pattern of a line that shows that work was done: exit code 0 may mean that all was skipped
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None  #: why the part cannot run here
    alone: bool = False  #: not at once with the parts beside it in the plan: it measures, or needs the GPU's memory
    always: bool = False  #: quick if there is nothing to do, and others depend on it; alone too
    makes: Path | None = None  #: removed first: others must not pass with what was made of earlier sources


def parts(folder: Path) -> list[Part]:
    """In the order of what is asked first."""
    python, compiling = sys.executable, 2 * PROGRAMS
    matrix = [str(ROOT / f"tests/test_{name}.py") for name in OPERATORS]
    gpu, large = str(ROOT / "tests/gpu"), str(ROOT / "tests/gpu/test_large.py")
    build = {"AML_KERNELS_EXTENSION": "1", "AML_KERNELS_CUDA": "1"}
    return [
        Part(
            "build", 240, (python, "setup.py", "build_ext", "--inplace"), r"^copying .*_C\.abi3\.so.*", build,
            alone=True, always=True, makes=ROOT / "aml_kernels/_C.abi3.so",
        ),
        Part("about", 60, (python, "-m", "aml_kernels"), r"^self-check.*passed.*", alone=True, always=True),
        # At once. Most of the time goes into what Triton compiles, and most of that into the matrix.
        tests("cuda", 240, workers(8), 120, "-k", "cuda", *matrix),
        tests("triton", 300, workers(12), 120, "-k", "triton", *matrix),
        tests("features", compiling + 100, workers(3), compiling, gpu, "--ignore", large),
        *(sanitizer(tool, "cuda", 240) for tool in TOOLS), sanitizer("memcheck", "triton", compiling + 100),
        replace(tests("large", 120, 1, 60, large), alone=True),
        bench("goal", 270, folder),  # eight graphs of torch.compile, in 10 to 20 seconds each
        bench("others", 180, folder),
    ]


def workers(of_16: int) -> int:
    """The same share of fewer cores. Of more than 16 there is no use, as each worker takes memory of the GPU."""
    return max(1, of_16 * min(16, os.cpu_count() or 1) // 16)


def tests(name: str, seconds: int, workers: int, each: int, *arguments: str) -> Part:
    """A worker whose test takes longer than `each` ends, as only that ends a kernel that hangs; another goes on."""
    return Part(
        name, seconds,
        (
            sys.executable, "-m", "pytest", "-q", "-rs", "--durations=10", f"--timeout={each}",
            "--timeout-method=thread", f"--numprocesses={workers}", *arguments,
        ),
        r"^(?!.*\b(failed|error)).*\b\d+ passed.*",
    )


def bench(workloads: str, seconds: int, folder: Path) -> Part:
    command = (
        sys.executable, "benchmarks/bench_fused.py", "--device", "cuda", "--workloads", workloads,
        "--json", str(folder / f"{workloads}.json"),
    )
    return Part(workloads, seconds, command, r"^(Goal|Took) .*", alone=True)


def sanitizer(tool: str, backend: str, seconds: int) -> Part:
    program = find_sanitizer()
    # PyTorch's own kernels are passed over, but for what they write: initcheck has to see that.
    passed_over = () if tool == "initcheck" else ("--kernel-name-exclude", "kns=at6native")
    return Part(
        tool if backend == "cuda" else f"{tool}-{backend}", seconds,
        (
            program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "20",
            *passed_over, sys.executable, "tests/gpu/every_kernel.py", backend,
        ),
        rf"^every kernel of {backend} ran.*",
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # one allocation per tensor, so that it sees where a tensor ends
        None if program else "compute-sanitizer is not installed (it comes with the CUDA toolkit)",
    )


def find_sanitizer() -> str | None:
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", *(f"{path}/nvidia/cu13/bin" for path in sys.path)]
    if "CUDA_HOME" in os.environ:
        folders.append(os.environ["CUDA_HOME"] + "/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def main(arguments: Sequence[str] | None = None, make=parts) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="run these, also if they have passed")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together (default: %(default)s)")
    options = parser.parse_args(arguments)
    lacking = [f"{name}>={'.'.join(map(str, oldest))}" for name, oldest in NEEDED.items() if version(name) < oldest]
    if lacking:
        parser.error(f"{sys.executable} lacks {', '.join(lacking)}: pip install {' '.join(map(repr, lacking))}")
    if make is parts and not sees_gpu():
        parser.error(f"the PyTorch of {sys.executable} sees no NVIDIA GPU (torch.cuda.is_available() is False)")
    folder = options.out.resolve() / key()
    planned = make(folder)
    if unknown := set(options.only) - {part.name for part in planned}:
        parser.error(f"--only: expected {', '.join(part.name for part in planned)}, got {', '.join(sorted(unknown))}")

    folder.mkdir(parents=True, exist_ok=True)
    print(f"results in {folder}\n", flush=True)
    stored, end = folder / "results.json", time.monotonic() + 60 * options.minutes
    results = json.loads(stored.read_text()) if stored.exists() else {}
    chosen = [part for part in planned if not options.only or part.name in options.only]
    with ended_by_signals():
        for _, together in itertools.groupby(chosen, lambda part: part.alone and part.name):
            group, lacks = list(together), lacked(planned, results)
            due = [x for x in group if options.only or x.always or not stands(results.get(x.name), lacks)]
            asyncio.run(run_at_once(group, due, lacks, results, stored, end))
    print(f"\n{sum(r['state'] == 'passed' for r in results.values())} of {len(planned)} parts have passed")
    return int(any(results.get(part.name, {}).get("state") not in ("passed", "missing") for part in planned))


def sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def version(package: str) -> tuple[int, ...]:
    """Major and minor; (0,) if it is not installed."""
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(package))[:2]))
    except importlib.metadata.PackageNotFoundError:
        return (0,)


@contextlib.contextmanager
def ended_by_signals():
    """What runs has sessions of its own, which no signal reaches: it is ended as by Ctrl-C, not left on the GPU."""
    changed = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def lacked(planned: Sequence[Part], results: dict) -> list[str]:
    """What others depend on, and has not passed: without the build, tests of its kernels are skipped."""
    return [x.name for x in planned if x.always and results.get(x.name, {}).get("state") != "passed"]


def stands(result: dict | None, lacks: list[str]) -> bool:
    """Whether a part has passed, and would lack nothing more or less now."""
    return result is not None and result["state"] == "passed" and result.get("without", []) == lacks


async def run_at_once(
    group: Sequence[Part], due: Sequence[Part], lacks: list[str], results: dict, stored: Path, end: float,
) -> None:
    """Those of a group that are due. A result is stored when the part ends, and told in the order of the plan."""

    async def one(part: Part) -> None:
        result = await run(part, stored.with_name(f"{part.name}.log"), end - time.monotonic())
        results[part.name] = result | ({"without": lacks} if lacks and not part.always else {})
        stored.with_suffix(".new").write_text(json.dumps(results, indent=1) + "\n")
        stored.with_suffix(".new").replace(stored)

    tasks = {part.name: asyncio.create_task(one(part)) for part in group if part in due}
    if tasks:
        print(f"running {', '.join(tasks)}", flush=True)
    for part in group:
        if part.name in tasks:
            await tasks[part.name]
        print(line(part.name, results[part.name]), flush=True)


async def run(part: Part, log: Path, remaining: float) -> dict:
    """Start the part and wait for it: its state, what its log says, seconds."""
    if part.missing:
        return {"state": "missing", "says": part.missing, "seconds": 0.0}
    if remaining < 5:
        return {"state": "not started", "says": "the time for all parts is used up: run again", "seconds": 0.0}
    if part.makes:
        part.makes.unlink(missing_ok=True)
    limit, start = min(part.seconds, remaining), time.monotonic()
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])  # where pip puts ninja
    imported = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # PyTorch may lie there
    environment = os.environ | {"PATH": path, "PYTHONPATH": imported, "PYTHONUNBUFFERED": "1"}
    environment |= part.environment | ({} if part.alone else SHARED)
    with log.open("w") as file:
        process = await asyncio.create_subprocess_exec(
            *part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = await asyncio.wait_for(process.wait(), limit)
        except asyncio.TimeoutError:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers too; also what one that has ended left running
            await process.wait()
    text = log.read_text(errors="replace")
    proofs = [match.group().strip() for match in re.finditer(part.proof, text, re.MULTILINE)]
    if code is None:
        state, says = "cut off", f"after {limit:.0f} s; the end of {log.name}:\n{tail(text)}"
    elif code != 0 or not proofs:
        reason = f"exit code {code}" if code else "nothing was run"
        state, says = "failed", f"{reason}; the end of {log.name}:\n{tail(text)}"
    else:
        state, says = "passed", "\n    ".join(proofs)
    return {"state": state, "says": says, "seconds": round(time.monotonic() - start, 1)}


def tail(text: str, lines: int = 25) -> str:
    return "\n".join("    " + (x if len(x) < 200 else x[:195] + " ...") for x in text.splitlines()[-lines:])


def line(name: str, result: dict) -> str:
    return f"{name:<16} {result['state']:<12} {result['seconds']:6.1f} s  {result['says']}"


def key() -> str:
    """Names these sources, this PyTorch and this GPU."""
    import torch

    found = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return re.sub(r"[^\w.+-]+", "-", f"{device}-torch-{torch.__version__}-{found.hexdigest()[:10]}")


if __name__ == "__main__":
    sys.exit(main())
