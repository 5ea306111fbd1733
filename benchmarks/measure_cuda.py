"""Time, launches and memory of a call on an NVIDIA GPU: what `measure.CpuMeter` is for the CPU.

A call that repeats on the same tensors finds them in the L2 cache, as no call of a training step does. Calls are
therefore timed over several sets of inputs, each with memory and results of its own, in turn: between two uses of a
set so many other bytes have passed that nothing of it is left in the cache. The calls of a round are captured in one
CUDA graph, so that what is timed is the GPU's work and not Python's; what Python takes is measured by itself.

Within a call memory may be warm: the bytes of forward + backward count the inputs twice, and a cache of 50 MB holds
some of the 20 to 40 MB that the forward has read when the backward reads them again. `share_of_copy` is the share of
the memory's bandwidth for a forward alone; with a backward it may exceed 1.
"""

import importlib.metadata
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import cases
import torch
from measure import Call, allocator_peak
from torch.profiler import ProfilerActivity, profile

LEAST_SETS, MOST_SETS = 4, 64
ROUND = 1 << 30  #: bytes that the calls of a round move, so that it lasts a few hundred times an event's resolution
TIMES_L2 = 3  #: bytes of a round over the size of the L2 cache, from which on every call finds it cold
COPY = 1 << 30  #: bytes moved by the copy that stands for the memory's bandwidth
GAP = 1_000_000  #: clock cycles, half a millisecond: the GPU is busy until the host has issued the round and its events


@dataclass(frozen=True)
class Round:
    """Calls on all sets of inputs, one after the other."""

    run: Callable[[], object]
    calls: int
    cold: bool  #: by their number alone
    captured: bool  #: in a CUDA graph; not if the call makes the host wait


class CudaMeter:
    device = "cuda"
    fused = ("triton", "cuda")  #: back ends of the operators that run on this device

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(0)
        self.cache = self.properties.L2_cache_size
        # Reading it leaves nothing else in the cache, and nothing that has to be written back later.
        self.other = torch.zeros(TIMES_L2 * self.cache // 4, device=self.device)
        self.copies: dict[int, float] = {}

    def ready(self, workload: cases.Workload, providers: dict[str, cases.Provider], name: str) -> dict[str, Round]:
        """What to sample, for each provider of the workload."""
        count, cold = rotation(workload.bytes(name), self.cache)
        copies = [copy_of(workload) for _ in range(count)]
        calls = {who: [copy.call(provider, name) for copy in copies] for who, provider in providers.items()}
        return {who: capture(each, cold) if never_waits(each[0]) else eager(each, cold) for who, each in calls.items()}

    def sample(self, round: Round) -> float:
        """Seconds per call."""
        if not round.cold:
            self.other.sum()
        if round.captured:
            torch.cuda._sleep(GAP)
        return elapsed(round.run) / round.calls

    def details(self, call: Call, round: Round, row: dict) -> dict:
        """What a row tells beside times of the device."""
        return {
            "extra_memory_bytes": allocator_peak(call, self.device), "peak_memory_bytes": peak_memory(call),
            "launches": launches(call), "host_us": host_microseconds(call), "cuda_graph": round.captured,
            "calls_per_sample": round.calls, "cold_by": "rotation" if round.cold else "reading other memory",
            "share_of_copy": row["gb_per_s"] / self.copy_gb_per_s(COPY),
            "share_of_copy_as_large": row["gb_per_s"] / self.copy_gb_per_s(row["bytes"]),
        }

    def describe(self) -> dict:
        return {
            "device": self.device, "name": self.properties.name, "processors": self.properties.multi_processor_count,
            "capability": f"{self.properties.major}.{self.properties.minor}",
            "memory_bytes": self.properties.total_memory, "l2_bytes": self.cache, "driver": driver(),
            "cuda": torch.version.cuda, "triton": version_of("triton"),
            "copy_gb_per_s": round(self.copy_gb_per_s(COPY), 1),
        }

    def copy_gb_per_s(self, size: int) -> float:
        """Of PyTorch's copy, cold, that moves `size` bytes: half of them read and half of them written."""
        if size not in self.copies:
            count, cold = rotation(size, self.cache)
            pairs = [torch.ones(2, max(1, size // 8), device=self.device) for _ in range(count)]
            copies = capture([lambda pair=pair: (pair[1].copy_(pair[0]),) for pair in pairs], cold)
            self.copies[size] = size / statistics.median([self.sample(copies) for _ in range(12)][2:]) / 1e9
        return self.copies[size]


def copy_of(workload: cases.Workload) -> cases.Workload:
    grad = workload.grad_output
    inputs = tuple(x.clone() for x in workload.inputs)
    return replace(workload, inputs=inputs, grad_output=None if grad is None else grad.clone())


def rotation(size: int, cache: int) -> tuple[int, bool]:
    """How many sets of inputs a round takes whose calls move `size` bytes, and whether that alone keeps them cold."""
    count = max(LEAST_SETS, min(MOST_SETS, -(-ROUND // size)))
    return count, count * size >= TIMES_L2 * cache


def never_waits(call: Call) -> bool:
    """Whether the call can be captured: it does not make the host wait for the device."""
    for _ in range(2):  # compiles, and allocates what only a first call allocates
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def capture(calls: list[Call], cold: bool) -> Round:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]  # all kept until the end: each call writes to memory of its own
    del results
    return Round(graph.replay, len(calls), cold, captured=True)


def eager(calls: list[Call], cold: bool) -> Round:
    return Round(lambda: [call() for call in calls], len(calls), cold, captured=False)


def elapsed(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_microseconds(call: Call, samples: int = 15) -> float:
    """Until a call returns; the GPU is idle before and is not waited for."""
    times = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


def peak_memory(call: Call) -> int:
    """Growth of `torch.cuda.max_memory_allocated`, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(call: Call) -> int | None:
    """Kernels, copies and fills that one call starts on the device; None where CUPTI tells nothing."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        return count_launches(json.loads(path.read_text())["traceEvents"]) or None


def count_launches(events: Iterable[dict]) -> int:
    return sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events)


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
