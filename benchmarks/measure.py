"""Time and memory of a call on the CPU; `measure_cuda.CudaMeter` offers the same methods for a GPU."""

import ctypes
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], tuple[Tensor, ...]]


class CpuMeter:
    device = "cpu"
    fused = ("cpu",)  #: back ends of the operators that run on this device

    def ready(self, workload, providers: dict, name: str) -> dict[str, Call]:
        """What to sample, for each provider of the workload."""
        return {who: workload.call(provider, name) for who, provider in providers.items()}

    def sample(self, call: Call) -> float:
        """Seconds that one call takes."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def details(self, call: Call, ready: Call, row: dict) -> dict:
        """What a row tells beside times."""
        return {"extra_memory_bytes": allocator_peak(call, self.device)}

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by a copy far larger than the caches."""
        source = torch.ones(1 << 26)
        destination = torch.empty_like(source)
        samples = [self.sample(lambda: (destination.copy_(source),)) for _ in range(9)]
        return 2 * source.numel() * source.element_size() / statistics.median(samples[2:])

    def describe(self) -> dict:
        return {
            "device": self.device, "name": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "load_before": round(os.getloadavg()[0], 2), "copy_gb_per_s": round(self.copy_bandwidth() / 1e9, 2),
        }


def reuse_freed_memory() -> None:
    """From here on this process keeps what it frees, as PyTorch does on a GPU (glibc only).

    Else glibc now gives the memory of a large tensor back to the system after a call and now it does not, and page
    faults, which take longer than the fused operators, are measured in some rounds and for some providers.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)


def allocator_peak(call: Call, device: str) -> int:
    """Peak bytes that PyTorch's allocator handed out during `call`, beyond the tensors that `call` returns.

    From the record of every allocation and release (`torch.profiler`), so it is exact to the byte. Memory that C++
    takes by itself is not in it; on the CPU `resident.growth` sees that.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        results = call()
    changes, pending = [], list(record.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == device:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return peak_beyond(sorted(changes), {t.untyped_storage().data_ptr() for t in results})


def peak_beyond(changes: list[tuple[int, int, int]], returned: set[int]) -> int:
    """Highest sum of the (time, address, bytes) `changes`, without the blocks that still hold a returned tensor."""
    last = {address: i for i, (_, address, size) in enumerate(changes) if size > 0 and address in returned}
    live = peak = 0
    for i, (_, address, size) in enumerate(changes):
        if last.get(address) != i:
            live += size
            peak = max(peak, live)
    return peak


def alternate(
    calls: dict[str, Call], sample: Callable[[Call], float], *, seconds: float, least: int, most: int = 200,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Samples of every call, taken in turn and each round in another order, so that a change of the machine's speed
    hits all of them and none always follows the same other one (whose data would be in the caches).

    After `warm_up` rounds, as many rounds as fit in `seconds`, but `least` at least and `most` at most.
    """
    order, shuffled = list(calls), random.Random(0)
    sample_round = {name: [] for name in calls}
    spent = float("inf")
    for _ in range(warm_up):
        start = time.perf_counter()
        for name in order:
            sample(calls[name])
        spent = time.perf_counter() - start
    gc.collect()
    gc.disable()
    try:
        for _ in range(max(least, min(most, int(seconds / spent)))):
            shuffled.shuffle(order)
            for name in order:
                sample_round[name].append(sample(calls[name]))
    finally:
        gc.enable()
    return sample_round


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def provenance() -> dict:
    """What a stored row needs to be believed: versions, commit, date."""
    from aml_kernels import __version__

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": _commit(),
        "aml_kernels": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "compiler": _output("c++", "--version").partition("\n")[0], "system": platform.platform(),
    }


def store(value, path: Path) -> None:
    """As JSON: complete, or as it was before, should the run be ended meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        beside.write_text(json.dumps(value, indent=1) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _commit() -> str:
    root = str(Path(__file__).parent)
    commit = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return commit + (" with local changes" if changed else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

