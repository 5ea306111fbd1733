"""The benchmark of training steps, on a tiny network: rows, ratios, memory, table. No times."""

import importlib
import json
import sys
from pathlib import Path

import golden
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
bench = importlib.import_module("bench_training")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    model = golden.tiny_caris(tmp_path_factory.mktemp("bert"))
    case = {"model": "tiny", "device": "cpu", "batch": 2, "precision": "no", "threads": 1}
    rows = bench.benchmark(model, case, bench.STRATEGIES, seconds=0)
    machine = {"name": "a CPU", "load_before": 0.0}
    return {"provenance": bench.measure.provenance(), "machine": machine, **case, "rows": rows}


def test_every_strategy_is_measured_beside_none(report):
    rows = {row["strategy"]: row for row in report["rows"]}
    assert list(rows) == ["none", "loss", "loss, gaussian", "image", "released"]
    assert rows["none"]["time_ratio"] == rows["none"]["memory_ratio"] == 1.0
    assert all(row["samples"] >= 3 and row["p20_s"] <= row["p50_s"] <= row["p80_s"] for row in rows.values())
    # Two forward passes and their activations against one; a pass without gradients keeps nothing.
    assert rows["released"]["memory_ratio"] > 1.2 > rows["image"]["memory_ratio"] > 0.99


def test_the_strategies_do_what_they_are_named_after(monkeypatch, tmp_path):
    model = golden.tiny_caris(tmp_path)
    batch = bench.make_batch(model, 2, "cpu")
    calls = []
    monkeypatch.setattr(model, "forward", lambda *a, f=model.forward, **k: calls.append("forward") or f(*a, **k))
    monkeypatch.setattr(model, "encode", lambda *a, f=model.encode, **k: calls.append("encode") or f(*a, **k))
    filtered = lambda *a, f=model.forward_filtered: calls.append("filtered") or f(*a)  # noqa: E731
    monkeypatch.setattr(model, "forward_filtered", filtered)
    passes = {}
    for name, step in bench.make_steps(model, batch, bench.STRATEGIES, "cpu", "no"):
        calls.clear()
        step()
        passes[name] = list(calls)
    one = ["forward"]
    assert passes == {
        "none": one, "loss": one, "loss, gaussian": one, "image": ["encode", *one], "released": [*one, "filtered"],
    }


def test_rows_are_stored_beside_those_of_other_cases(report, tmp_path):
    path = tmp_path / "results" / "training.json"
    bench.store(report, path)
    bench.store(report | {"batch": 4}, path)
    bench.store(report | {"threads": 2}, path)
    stored = json.loads(path.read_text())
    assert [(one["batch"], one["threads"]) for one in stored] == [(4, 1), (2, 2)]
    lines = bench.table(stored[0]).splitlines()
    assert lines[2].startswith("| strategy |") and len(lines) == 4 + len(report["rows"])
    assert "+17.2 % time" in lines[0] and "| none |" in lines[4] and "| 1.000 [1.000, 1.000] |" in lines[4]
