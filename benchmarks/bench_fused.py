"""Benchmark of the fused operators: `python benchmarks/bench_fused.py [--device cuda] [--quick] [--json PATH]`.

Side by side in one run, in turn sample by sample: the definition in plain PyTorch (`eager`), the same operation
written with PyTorch's own functions (`torch`), `torch.compile` of the definition (`compile`), and the operators of
this package (`cpu`, or on a GPU `triton` and `cuda`). Before a workload is timed, every provider's results are
compared with the definition in fp64 (or, where there is no gradient and results are exact, with the definition
itself).
"""

import argparse
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or every use of the profiler writes two lines

import cases  # noqa: E402
import measure  # noqa: E402
import measure_cuda  # noqa: E402
import overhead  # noqa: E402
import resident  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from aml_kernels import _backend  # noqa: E402

#: Largest relative L2 difference. In fp32 the results differ by 1e-6, but rounding may move a pixel across the
#: threshold, and one in a million pixels is 1e-3 of a gradient's norm. bf16 gradients are rounded to 4e-3.
ALLOWED = 1e-2


@dataclass(frozen=True)
class Effort:
    seconds: float  #: of sampling per workload and pass
    least: int  #: samples
    passes: slice  #: of (forward, forward+backward)


FULL = Effort(seconds=3.0, least=15, passes=slice(None))
SWEEP = Effort(seconds=1.5, least=7, passes=slice(-1, None))
QUICK = Effort(seconds=0.5, least=5, passes=slice(-1, None))
ON_GPU = Effort(seconds=0.4, least=15, passes=slice(None))  # a sample holds 16 calls or more

Meter = measure.CpuMeter | measure_cuda.CudaMeter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    fewer = parser.add_mutually_exclusive_group()
    fewer.add_argument("--quick", action="store_true", help="a few workloads and samples, under a minute")
    fewer.add_argument(
        "--workloads", choices=("goal", "others"), help="with --device cuda: those that the goal is about, or the rest",
    )
    parser.add_argument("--sweep", action="store_true", help="then batch 1-64 and 224-1024 pixels")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to store the rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    options = parser.parse_args()
    if options.workloads and options.device != "cuda":
        parser.error("--workloads: only with --device cuda")
    torch.set_num_threads(options.threads)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # torch.compile misses a GPU

    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: needs an NVIDIA GPU that PyTorch sees (torch.cuda.is_available() is False)")
        meter, effort = measure_cuda.CudaMeter(), ON_GPU
        workloads = {"goal": cases.goal, "others": cases.others, None: cases.on_gpu}[options.workloads]
    else:
        measure.reuse_freed_memory()
        meter, effort, workloads = measure.CpuMeter(), FULL, cases.standard
    if options.quick:
        effort, workloads = QUICK, cases.quick
    plan = [(effort, build) for build in workloads(meter.device)]
    if options.sweep:
        plan += [(SWEEP, build) for build in cases.sweep(meter.device)]
    report = {"provenance": measure.provenance(), "machine": meter.describe(), "rows": [], "overhead": []}
    fused = available(meter)
    print(tables.heading(report), tables.head(fused, meter.device), sep="\n\n", flush=True)
    for effort, build in plan:
        for rows in benchmark(build, fused, meter, effort):
            report["rows"] += rows
            print(tables.line(rows, fused), flush=True)
        store(report, options.json)
    if options.sweep:
        print(tables.linearity(report["rows"]))

    for backend in [] if options.workloads == "goal" else fused:
        calls, rounds = (50, 5) if options.quick else (100, 9) if meter.device == "cuda" else (1000, 15)
        report["overhead"] += overhead.host_overhead(meter.device, backend, calls=calls, rounds=rounds)
    print(tables.overhead(report["overhead"]))
    if meter.device == "cpu" and not options.quick:
        add_resident_memory(report["rows"], resident.measured(fused, options.threads))
        print(tables.memory(report["rows"]))
    if meter.device == "cuda":
        print(tables.goal(report["rows"], fused))
    store(report, options.json)


def available(meter: Meter) -> list[str]:
    """The device's back ends that this installation has; says why one is missing."""
    for backend in meter.fused:
        if (reason := _backend.missing(backend, meter.device)) is not None:
            print(f"{backend}: not measured, {reason}\n")
    return [backend for backend in meter.fused if _backend.missing(backend, meter.device) is None]


def benchmark(
    build: Callable[[], cases.Workload], fused: list[str], meter: Meter, effort: Effort,
) -> Iterator[list[dict]]:
    """Per pass of the workload, one row for each provider."""
    torch.manual_seed(0)
    workload = build()
    providers = {"eager": workload.eager}
    if workload.torch:
        providers["torch"] = workload.torch
    if workload.compile:
        providers["compile"] = compiled(workload.eager)
    providers |= {backend: workload.fused(backend) for backend in fused}
    for name in workload.passes[effort.passes]:
        calls = {who: workload.call(provider, name) for who, provider in providers.items()}
        agreement = check(workload, name, calls)
        ready = meter.ready(workload, providers, name)
        seconds = measure.alternate(ready, meter.sample, seconds=effort.seconds, least=effort.least)
        times = {who: measure.percentiles(samples) for who, samples in seconds.items()}
        moved = workload.bytes(name)
        rows = [
            {
                "op": workload.op, "case": workload.case, "dtype": workload.dtype, "pass": name, "provider": who,
                "batch": len(workload.inputs[0]), "pixels": workload.pixels,
                "sweep": workload.sweep, "goal": workload.goal,
                "p20_ms": times[who][0] * 1e3, "p50_ms": times[who][1] * 1e3, "p80_ms": times[who][2] * 1e3,
                "samples": len(seconds[who]),
                "times_faster_than": {other: times[other][1] / times[who][1] for other in calls if other != who},
                "bytes": moved, "gb_per_s": moved / times[who][1] / 1e9,
            }
            for who in calls
        ]
        yield [
            row | meter.details(calls[row["provider"]], ready[row["provider"]], row)
            | {"difference": agreement[row["provider"]]} for row in rows
        ]


def compiled(eager: cases.Provider) -> cases.Provider:
    """`torch.compile` in its default mode for these shapes alone, in one graph; earlier ones are forgotten."""
    torch._dynamo.reset()
    return torch.compile(eager, fullgraph=True, dynamic=False)


def check(workload: cases.Workload, name: str, calls: dict[str, measure.Call]) -> dict[str, float]:
    """Relative L2 difference of each provider's results from the definition's; an error where it is large."""
    exact = workload.inputs
    if workload.differentiable:
        exact = tuple(x.double() if x.is_floating_point() else x for x in workload.inputs)
    expected = workload.call(workload.eager, name, exact)()
    gradients = len(workload.differentiable) if name == "forward+backward" else 0
    found = {who: difference(call(), expected, gradients) for who, call in calls.items()}
    for who, value in found.items():
        if not value <= ALLOWED:
            raise SystemExit(
                f"{workload.op}, {workload.case}, {workload.dtype}, {name}: the results of {who} differ from the "
                f"definition's by {value:.2g} (relative L2), accepted is {ALLOWED:g}; nothing was timed"
            )
    return found


def difference(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], gradients: int) -> float:
    """Of the worst tensor. A provider may return fewer outputs than the definition, but no other gradients."""
    outputs = zip(results[:len(results) - gradients], expected[:len(expected) - gradients], strict=False)
    derivatives = zip(results[len(results) - gradients:], expected[len(expected) - gradients:], strict=True)
    return max(
        ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
        for a, b in (*outputs, *derivatives)
    )


def add_resident_memory(rows: list[dict], grown: dict[tuple, int]) -> None:
    for row in rows:
        key = tuple(row[name] for name in ("op", "case", "dtype", "pass", "provider"))
        if key in grown:
            row["resident_memory_bytes"] = grown[key]


def store(report: dict, path: Path | None) -> None:
    if path is not None:
        measure.store(report, path)


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"\nTook {time.perf_counter() - start:.0f} s.")
