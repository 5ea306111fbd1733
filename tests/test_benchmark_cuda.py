"""The benchmark's part for GPUs: its arithmetic, and its way through a workload on a pretended GPU. No times."""

import contextlib
import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import aml_kernels

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
bench, cases, measure, measure_cuda, tables = map(
    importlib.import_module, ("bench_fused", "cases", "measure", "measure_cuda", "tables"),
)
MIB = 1 << 20
pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")


def test_a_round_passes_three_times_the_cache():
    for size in (1000 * MIB, 100 * MIB, 12 * MIB, 3 * MIB):
        sets, cold = measure_cuda.rotation(size, 50 * MIB)
        assert cold and sets * size >= 150 * MIB and measure_cuda.LEAST_SETS <= sets <= measure_cuda.MOST_SETS
    assert measure_cuda.rotation(1000 * MIB, 50 * MIB)[0] == measure_cuda.LEAST_SETS
    assert measure_cuda.rotation(32 * MIB, 50 * MIB) == (32, True)


def test_small_inputs_cannot_fill_the_cache():
    assert measure_cuda.rotation(2 * MIB, 50 * MIB) == (measure_cuda.MOST_SETS, False)


def test_launches_are_kernels_copies_and_fills():
    kinds = ("kernel", "kernel", "gpu_memset", "gpu_memcpy", "cuda_runtime", "cpu_op", "gpu_user_annotation", None)
    events = [{"name": "x"} | ({"cat": kind} if kind else {}) for kind in kinds]
    assert measure_cuda.count_launches(events) == 4


class Pretended(measure_cuda.CudaMeter):
    device = "cpu"


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


@pytest.fixture
def gpu(monkeypatch):
    """`torch.cuda` for tensors on the CPU. `captured` counts the calls in graphs, `slept` the samples of graphs."""
    state = SimpleNamespace(captured=[], slept=0, mode="default", waits=False)
    stream = SimpleNamespace(wait_stream=lambda other: None)

    class Graph:
        def replay(self):
            pass

    def sleep(cycles):
        state.slept += 1

    def set_mode(mode):
        state.mode = mode

    properties = SimpleNamespace(
        name="a GPU", L2_cache_size=1 << 16, multi_processor_count=2, major=9, minor=0, total_memory=8 << 30,
    )
    stand_ins = {
        "get_device_properties": lambda device: properties, "synchronize": lambda: None, "_sleep": sleep,
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": Graph, "graph": lambda g: contextlib.nullcontext(), "Event": Event,
        "set_sync_debug_mode": set_mode, "memory_allocated": lambda: 5, "max_memory_allocated": lambda: 12,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(measure_cuda, "COPY", 1 << 16)
    return state


def workload():
    return cases.with_batch(cases.masked_loss(2, 32, 32, 4, torch.float32, "cpu"))


def test_rows_of_one_workload(gpu, monkeypatch):
    monkeypatch.setattr(bench, "compiled", lambda eager: eager)
    meter, fused = Pretended(), ["reference"]
    report = {"machine": meter.describe() | {"device": "cuda"}, "provenance": measure.provenance(), "rows": []}
    effort = bench.Effort(seconds=0.0, least=2, passes=slice(None))
    found = list(bench.benchmark(workload, fused, meter, effort))
    assert gpu.slept > 2 * 4 * 2 and gpu.mode == "default"
    for rows in found:
        assert [row["provider"] for row in rows] == ["eager", "torch", "compile", "reference"]
        for row in rows:
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["p50_ms"] / 1e6)
            assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / meter.copies[1 << 16])
            assert row["share_of_copy_as_large"] == pytest.approx(row["gb_per_s"] / meter.copies[row["bytes"]])
            assert row["cuda_graph"] and row["calls_per_sample"] == 64 and row["cold_by"] == "rotation", row
            assert row["peak_memory_bytes"] == 7 and row["launches"] is None and row["host_us"] > 0
            assert row["case"].startswith("batch 2, ")
    head = tables.head(fused, "cuda").splitlines()[0]
    assert tables.line(found[0], fused).count("|") == head.count("|") and "a GPU" in tables.heading(report)


def test_launches_are_unknown_where_the_profiler_sees_no_device(gpu):
    assert measure_cuda.launches(lambda: (torch.ones(3) + 1,)) is None


def test_a_call_that_makes_the_host_wait_is_timed_without_a_graph(gpu):
    def waits():
        if gpu.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return (torch.ones(1),)

    assert not measure_cuda.never_waits(waits) and gpu.mode == "default"
    assert measure_cuda.never_waits(lambda: (torch.ones(1),))
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_cuda.never_waits(lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))
    seen = []
    round = measure_cuda.eager([lambda: seen.append(1), lambda: seen.append(2)], cold=True)
    Pretended().sample(round)
    assert seen == [1, 2] and gpu.slept == 0


def test_a_graph_holds_a_call_for_each_set_of_inputs(gpu):
    seen = []
    round = measure_cuda.capture([lambda i=i: seen.append(i) for i in range(5)], cold=True)
    assert seen == [0, 1, 0, 1, 2, 3, 4] and round.captured and round.calls == 5


def test_sets_of_inputs_share_no_memory():
    original = cases.similarity(2, 4, 4, 8, torch.float32, "cpu")
    copy = measure_cuda.copy_of(original)
    for a, b in zip((*original.inputs, original.grad_output), (*copy.inputs, copy.grad_output), strict=True):
        assert a.data_ptr() != b.data_ptr() and torch.equal(a, b)


def rows_of_the_goal(**values):
    row = {"op": "masked_loss", "case": "batch 32", "dtype": "float32", "goal": True, "provider": "cuda"}
    row |= {"share_of_copy": 0.9, "times_faster_than": {"eager": 12.0, "compile": 4.0}, "extra_memory_bytes": 2e5}
    rows = [row | {"pass": "forward", "launches": 1}, row | {"pass": "forward+backward", "launches": 2}]
    slower = row | {"provider": "triton", "share_of_copy": 0.1, "pass": "forward", "launches": 3}
    return [*rows, rows[0] | {"op": "aml_loss"} | values, slower, rows[0] | {"goal": False, "share_of_copy": 0.2}]


def test_whether_the_goal_is_reached_is_told_by_the_row_that_is_furthest_from_it():
    lines = tables.goal(rows_of_the_goal(), ["triton", "cuda"]).splitlines()[1:]
    assert len(lines) == 5 and all(": reached, " in line and line.startswith("Goal of cuda, ") for line in lines)
    short = rows_of_the_goal(
        share_of_copy=0.61, times_faster_than={"eager": 9.9, "compile": 2.0}, launches=2, extra_memory_bytes=1e6,
    )
    lines = tables.goal(short, ["triton", "cuda"]).splitlines()[1:]
    assert all(line.endswith("(aml_loss, batch 32, float32, forward)") and ": not reached, " in line for line in lines)
    assert lines[0].startswith("Goal of cuda, share of a copy's bandwidth at least 85.0%: not reached, 61.0%")


def test_a_goal_that_was_not_measured_is_not_reached():
    lines = tables.goal(rows_of_the_goal(launches=None, times_faster_than={"eager": 12.0}), ["cuda"]).splitlines()[1:]
    assert ["not measured" in line for line in lines] == [False, False, True, True, False]
    assert tables.goal(rows_of_the_goal(), []) == "" == tables.goal([], ["cuda"])


def test_the_goal_is_measured():
    built = [build() for build in cases.on_gpu("meta")]
    assert [w.goal for w in built] == [True] * 4 + [False] * (len(built) - 4)
    assert {w.op for w in built} == {name for name in aml_kernels.__all__ if name.islower()}
    for op, case in (("masked_loss", "map 15x15"), ("aml_loss", "features 15x15x1024")):
        for dtype in ("float32", "bfloat16"):
            goal, = (w for w in built[:4] if w.op == op and w.dtype == dtype)
            assert goal.case == f"batch 32, 480x480, logits 480x480, {case}" and goal.compile


def test_workloads_of_a_gpu_are_not_for_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_fused.py", "--workloads", "goal"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--device cuda" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(sys, "argv", ["bench_fused.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
