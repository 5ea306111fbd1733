"""Second memory meter: growth of a whole process, whoever allocated, so that scratch of C++ is seen as well.

Runs in a process of its own, in which malloc maps every larger block by itself and gives it back at once; elsewhere
the free lists of earlier work blur the figure by tens of percent. Started by bench_fused.py.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import torch

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}  # of glibc; fixed, where it would grow


def measured(fused: list[str], threads: int) -> dict[tuple, int]:
    """Bytes for each (op, case, dtype, pass, provider) of the standard workloads; {} where the system does not tell
    (it takes Linux and glibc). Without torch.compile, which has no memory but that of PyTorch's allocator."""
    command = [sys.executable, __file__, str(threads), *fused]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {tuple(key): size for key, size in map(json.loads, child.stdout.splitlines())}


def growth(call) -> int:
    """Bytes by which the process grew at its peak during `call`, beyond the tensors that `call` returns.

    Good to about 0.3 MB. Scratch that is released before the results are allocated hides behind their size.
    """
    for _ in range(2):  # threads, their stacks and the pages of the code
        call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    results = call()
    returned = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}
    return max(0, _status("VmHWM") - before - sum(returned.values()))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def main(threads: str, *fused: str) -> None:
    torch.set_num_threads(int(threads))
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return
    for build in cases.standard("cpu"):
        torch.manual_seed(0)
        workload = build()
        providers = {"eager": workload.eager} | ({"torch": workload.torch} if workload.torch else {})
        for who, provider in (providers | {name: workload.fused(name) for name in fused}).items():
            for name in workload.passes:
                key = (workload.op, workload.case, workload.dtype, name, who)
                print(json.dumps([key, growth(workload.call(provider, name))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
