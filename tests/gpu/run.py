"""`make gpu`: build, test, check with compute-sanitizer and measure, on a machine with an NVIDIA GPU.

The work is cut into parts: the CUDA kernels' tests, the figures of the goal, then the rest. Each leaves its log and its
result in a folder that belongs to these sources and this environment; what has passed there is not run again. A run
ends after 9 minutes and tells what is left; the next goes on with it, with what Triton and PyTorch have compiled.

    python tests/gpu/run.py                    what 9 minutes are enough for of what has not passed yet
    python tests/gpu/run.py --only cuda goal   these parts, whatever came of them before
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Part:
    name: str
    seconds: int  #: after which it is ended
    command: Sequence[str]
    proof: str  #: pattern of a line that shows that work was done: exit code 0 may mean that all was skipped
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None  #: why the part cannot run here
    always: bool = False  #: quick if there is nothing to do, and others depend on it


def parts(folder: Path) -> list[Part]:
    """In the order of what is asked first."""
    python, alone = sys.executable, 2 * PROGRAMS
    matrix = [str(ROOT / f"tests/test_{name}.py") for name in OPERATORS]
    workers = min(16, os.cpu_count() or 1)  # mostly Triton compiling
    build = {"AML_KERNELS_EXTENSION": "1", "AML_KERNELS_CUDA": "1"}
    return [
        Part(
            "build", 240, (python, "setup.py", "build_ext", "--inplace"), r"^copying .*_C\.abi3\.so.*", build,
            always=True,
        ),
        Part("about", 60, (python, "-m", "aml_kernels"), r"^self-check.*passed.*", always=True),
        tests("cuda", 180, workers, 90, "-k", "cuda", *matrix),
        bench("goal", 270, folder),  # eight graphs of torch.compile, in 10 to 20 seconds each
        tests("features", alone + 100, 1, alone, str(ROOT / "tests/gpu")),  # one at a time: they need room
        tests("triton", 240, workers, 120, "-k", "triton", *matrix),
        *(sanitizer(tool, "cuda", 120) for tool in TOOLS), sanitizer("memcheck", "triton", alone + 100),
        bench("others", 180, folder),
    ]


def tests(name: str, seconds: int, workers: int, each: int, *arguments: str) -> Part:
    """A worker whose test takes longer than `each` ends, as only that ends a kernel that hangs; another goes on."""
    return Part(
        name, seconds,
        (
            sys.executable, "-m", "pytest", "-q", "-rs", f"--timeout={each}", "--timeout-method=thread",
            f"--numprocesses={workers}", *arguments,
        ),
        r"^(?!.*\b(failed|error)).*\b\d+ passed.*",
    )


def bench(workloads: str, seconds: int, folder: Path) -> Part:
    command = (
        sys.executable, "benchmarks/bench_fused.py", "--device", "cuda", "--workloads", workloads,
        "--json", str(folder / f"{workloads}.json"),
    )
    return Part(workloads, seconds, command, r"^(Goal|Took) .*")


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
    folder = options.out.resolve() / key()
    planned = make(folder)
    if unknown := set(options.only) - {part.name for part in planned}:
        parser.error(f"--only: expected {', '.join(part.name for part in planned)}, got {', '.join(sorted(unknown))}")

    folder.mkdir(parents=True, exist_ok=True)
    print(f"results in {folder}\n", flush=True)
    stored, end = folder / "results.json", time.monotonic() + 60 * options.minutes
    results = json.loads(stored.read_text()) if stored.exists() else {}
    for part in planned:
        if options.only and part.name not in options.only:
            continue
        if options.only or part.always or results.get(part.name, {}).get("state") != "passed":
            results[part.name] = run(part, folder / f"{part.name}.log", end - time.monotonic())
            stored.with_suffix(".new").write_text(json.dumps(results, indent=1) + "\n")
            stored.with_suffix(".new").replace(stored)
        print(line(part.name, results[part.name]), flush=True)
    print(f"\n{sum(r['state'] == 'passed' for r in results.values())} of {len(planned)} parts have passed")
    return int(any(results.get(part.name, {}).get("state") not in ("passed", "missing") for part in planned))


def version(package: str) -> tuple[int, ...]:
    """Major and minor; (0,) if it is not installed."""
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(package))[:2]))
    except importlib.metadata.PackageNotFoundError:
        return (0,)


def run(part: Part, log: Path, remaining: float) -> dict:
    """Start the part and wait for it: its state, what its log says, seconds."""
    if part.missing:
        return {"state": "missing", "says": part.missing, "seconds": 0.0}
    if remaining < 5:
        return {"state": "not started", "says": "the time for all parts is used up: run again", "seconds": 0.0}
    limit, start = min(part.seconds, remaining), time.monotonic()
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])  # where pip puts ninja
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | part.environment
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
                process.wait()
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
