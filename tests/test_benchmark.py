"""The benchmark's machinery, on tiny inputs: bytes, memory meters, agreement check, rows, tables, chart. No times."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
bench, cases, measure, overhead, resident, tables = map(
    importlib.import_module, ("bench_fused", "cases", "measure", "overhead", "resident", "tables"),
)

AT = {"dtype": torch.float32, "device": "cpu"}
EFFORT = bench.Effort(seconds=0.0, least=2, passes=slice(None))
MIB = 1 << 20


@pytest.fixture
def without_compile(monkeypatch):
    """torch.compile takes seconds per graph."""
    monkeypatch.setattr(bench, "compiled", lambda eager: eager)


def tiny():
    return cases.masked_loss(2, 32, 32, 4, **AT)


def small_report():
    meter = measure.CpuMeter()
    fused = bench.available(meter)
    rows = [row for rows in bench.benchmark(tiny, fused, meter, EFFORT) for row in rows]
    machine = {"device": "cpu", "name": "a CPU", "cores": 2, "threads": 1, "load_before": 0.0, "copy_gb_per_s": 9.0}
    return {"provenance": measure.provenance(), "machine": machine, "rows": rows, "overhead": []}, fused


def test_bytes_by_hand():
    # logits 2x32x32 fp32, target 2x32x32 uint8, map 2x4x4 fp32; loss fp32 and 44 bytes of statistics per sample.
    read = 8192 + 2048 + 128
    workload = tiny()
    assert workload.bytes("forward") == read + 4 + 2 * 44
    assert workload.bytes("forward+backward") == 2 * read + 4 + 2 * 44 + 4 + 8192


def test_bytes_follow_the_dtype_and_the_resolution_of_the_logits():
    # logits 2x8x8 bf16, target 2x32x32 uint8, map 2x4x4 fp32.
    workload = cases.masked_loss(2, 32, 8, 4, torch.bfloat16, "cpu")
    assert workload.bytes("forward") == 256 + 2048 + 128 + 4 + 88


@pytest.mark.parametrize("build", [
    tiny,
    lambda: cases.similarity(2, 4, 4, 8, **AT),
    lambda: cases.aml_loss(2, 32, 8, 4, 8, **AT),
    lambda: cases.quantile(2, 8, 8, **AT, masked=True),
    lambda: cases.filter_regions(2, 64, 4, **AT),
])
def test_forward_bytes_are_those_of_inputs_and_outputs(build):
    workload = build()
    results = workload.call(workload.eager, "forward")()
    assert workload.forward_bytes == cases.size(*workload.inputs, *results)


def test_allocator_meter_on_a_known_operation():
    x = torch.ones(MIB // 4)

    def call():
        y = x + 1  # 1 MiB
        z = y + 1  # 2 MiB: the peak
        del y
        return ((z + 1),)  # 1 MiB and the result, which does not count

    # Scalars become tensors of a few bytes.
    assert 2 * MIB <= measure.allocator_peak(call, "cpu") <= 2 * MIB + 256


def test_a_result_does_not_count_but_its_address_may_be_used_before():
    #           taken at 100, released, taken by the result; at 200 scratch meanwhile
    changes = [(0, 100, 50), (1, 100, -50), (2, 100, 50), (3, 200, 7), (4, 200, -7)]
    assert measure.peak_beyond(changes, {100}) == 50
    assert measure.peak_beyond(changes[2:], {100}) == 7


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_process_meter_sees_memory_that_the_allocator_does_not():
    script = (
        "import mmap, resident, torch\n"
        "def call():\n"
        "    scratch = mmap.mmap(-1, 16 << 20)\n"
        "    scratch.write(bytes(1) * (4 << 20)); scratch.write(bytes(1) * (4 << 20))\n"
        "    scratch.close()\n"
        "    return (torch.ones(2 << 20),)\n"  # 8 MiB, a result
        "print(resident.growth(call))"
    )
    path = os.pathsep.join([str(BENCHMARKS), *sys.path])
    command = [sys.executable, "-c", script]
    environment = os.environ | resident.ENVIRONMENT | {"PYTHONPATH": path}
    growth = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    # 8 MiB of the map are touched and released before the result is there, beside a copy of 4 MiB: 4 MiB more than it.
    assert abs(growth - 4 * MIB) <= MIB


def test_alternate_takes_every_call_in_every_round():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    samples = measure.alternate(calls, lambda call: call() or float(len(seen)), seconds=0, least=4)
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [tuple(seen[i:i + 3]) for i in range(6, len(seen), 3)]
    assert all(sorted(order) == list("abc") for order in rounds) and len(set(rounds)) > 1


def test_rows_of_one_workload(without_compile):
    report, fused = small_report()
    providers = ["eager", "torch", "compile", *fused]
    assert [(row["pass"], row["provider"]) for row in report["rows"]] == [
        (name, who) for name in ("forward", "forward+backward") for who in providers
    ]
    row = report["rows"][-1]
    others = {r["provider"]: r for r in report["rows"][-len(providers):]}
    assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert row["times_faster_than"]["eager"] == pytest.approx(others["eager"]["p50_ms"] / row["p50_ms"])
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["p50_ms"] / 1e6)
    assert others["eager"]["extra_memory_bytes"] > 3 * 8192
    cells = tables.head(fused, "cpu").splitlines()[0].count("|")
    assert tables.line(report["rows"][-len(providers):], fused).count("|") == cells


def test_a_provider_with_other_results_is_not_timed(without_compile, monkeypatch):
    workload = tiny()
    wrong = {"eager": workload.call(workload.eager, "forward"), "compile": lambda: (torch.zeros(()),)}
    with pytest.raises(SystemExit, match="results of compile differ"):
        bench.check(workload, "forward", wrong)


def test_host_overhead_calls_the_same_operator_in_every_way():
    fused = bench.available(measure.CpuMeter())
    if not fused:
        pytest.skip("the extension was not built")
    workload = tiny()
    op, arguments = overhead.recorded(workload.fused(fused[0]), workload.inputs)
    assert str(op) == "aml_kernels.masked_loss.default"
    custom = overhead.as_provider(overhead.python_custom_op(workload.op, op))
    for name in workload.passes:
        expected = workload.call(workload.fused(fused[0]), name)()
        found = workload.call(custom, name, arguments)()
        assert torch.equal(found[0], expected[0])
        if name == "forward+backward":
            assert torch.equal(found[-1], expected[-1])
    rows = overhead.host_overhead("cpu", fused[0], calls=1, rounds=2)
    assert len(rows) == 3 * 2 * 4 and "masked_loss" in tables.overhead(rows)


def test_chart_of_stored_rows(without_compile, tmp_path):
    pytest.importorskip("matplotlib")
    report, fused = small_report()
    report["rows"] += [row | {"sweep": True, "case": f"batch 2, {row['case']}"} for row in report["rows"]]
    bench.store(report, tmp_path / "results" / "cpu.json")
    assert "masked_loss" in tables.linearity(report["rows"])
    command = [sys.executable, str(BENCHMARKS / "plot.py"), str(tmp_path / "results/cpu.json")]
    subprocess.run([*command, "--output", str(tmp_path / "chart.png")], check=True, timeout=120)
    assert (tmp_path / "chart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((tmp_path / "results/cpu.json").read_text())["rows"] == report["rows"]


def test_rows_stay_whole_if_a_run_ends_while_it_stores_them(tmp_path, monkeypatch):
    path, write = tmp_path / "rows.json", Path.write_text
    bench.store({"rows": [1]}, path)
    monkeypatch.setattr(Path, "write_text", lambda self, text: write(self, text[:5]) and sys.exit("ended"))
    with pytest.raises(SystemExit):
        bench.store({"rows": [1, 2]}, path)
    assert json.loads(path.read_text()) == {"rows": [1]} and [*tmp_path.iterdir()] == [path]


def test_of_the_tables_of_a_page_one_is_written_anew():
    pytest.importorskip("matplotlib")
    import plot

    others = "|  | gpu |\n| --- | --- |\n| a | 1 |\n\ntext\n\n"
    page = others + "|  | cpu |\n| --- | --- |\n| a | 2 |\n| b | 3 |\n\nmore\n"
    assert plot.with_table(page, "|  | cpu |\n| --- | --- |\n| c | 4 |") == (
        others + "|  | cpu |\n| --- | --- |\n| c | 4 |\n\nmore\n"
    )
    with pytest.raises(SystemExit, match="expected one table headed"):
        plot.with_table(others, "|  | cpu |\n| --- | --- |")


def test_what_a_size_takes_beyond_its_share():
    """Two images cost a tenth more per pixel than one; one of twice the size a half more, and the largest not that."""
    costs = {(1, 4): 2.5, (1, 1): 2.0, (1, 2): 3.0, (2, 1): 2.2}  # (images, million pixels each): ns per pixel
    rows = [
        {
            "op": "op", "pass": "forward", "provider": "cpu", "sweep": True, "batch": batch,
            "pixels": batch * size * 1_000_000, "p50_ms": cost * batch * size,
        } for (batch, size), cost in costs.items()
    ]
    assert "| 2.00, 2.50, 3.00 | 1.50 | 10% | 50% |" in tables.linearity(rows)
