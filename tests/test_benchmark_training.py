"""The benchmark of training steps, on a tiny network: rows, ratios, memory, table. No times."""

import importlib
import json
import sys
from pathlib import Path

import golden
import pytest
from test_skips import AskedForNumbers

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
bench = importlib.import_module("bench_training")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    model = golden.tiny_caris(tmp_path_factory.mktemp("bert"))
    case = {"model": "tiny", "device": "cpu", "batch": 2, "precision": "no", "threads": 1}
    rows = bench.benchmark(model, case, bench.STRATEGIES, ["operations", "memory", "alone", "time"], seconds=0.01)
    machine = {"name": "a CPU", "load_before": 0.0}
    return {"provenance": bench.measure.provenance(), "machine": machine, **case, "rows": rows}


def test_every_strategy_is_measured_beside_none(report):
    rows = {row["strategy"]: row for row in report["rows"]}
    assert list(rows) == ["none", "loss", "loss (gaussian)", "image", "released"]
    assert rows["none"]["time_ratio"] == rows["none"]["memory_ratio"] == 1.0
    assert all(row["rounds"] == 3 and row["p20_s"] <= row["p50_s"] <= row["p80_s"] for row in rows.values())
    assert [name for name, row in rows.items() if "alone_p50_s" in row] == ["none", "loss", "loss (gaussian)"]
    operations = {name: row["operations_ratio"] for name, row in rows.items()}
    assert operations["none"] == 1 <= operations["loss"] < 1.01 < operations["image"] < 1.4 < operations["released"]
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
        "none": one, "loss": one, "loss (gaussian)": one, "image": ["encode", *one], "released": [*one, "filtered"],
    }


def test_a_step_of_caris_asks_the_device_for_nothing(tmp_path):
    """So the host may queue the next step before this one is done. What `released` reproduces does ask."""
    model = golden.tiny_caris(tmp_path)
    asked = {}
    for name, step in bench.make_steps(model, bench.make_batch(model, 2, "cpu"), bench.STRATEGIES, "cpu", "no"):
        with AskedForNumbers() as mode:
            step()
        asked[name] = bool(mode.asked)
    assert asked == {name: name == "released" for name in bench.STRATEGIES}


def test_rows_are_stored_beside_those_of_other_cases(report, tmp_path):
    path = tmp_path / "results" / "training.json"
    bench.store(report, path)
    bench.store(report | {"batch": 4}, path)
    bench.store(report | {"threads": 2}, path)
    stored = json.loads(path.read_text())
    untimed = [{k: v for k, v in row.items() if k != "rounds"} for row in report["rows"]]
    assert bench.table(report | {"rows": untimed}).endswith("| - | - | - |")
    assert [(one["batch"], one["threads"]) for one in stored] == [(4, 1), (2, 2)]
    lines = bench.table(stored[0]).splitlines()
    assert lines[2].startswith("| strategy |") and len(lines) == 4 + len(report["rows"])
    assert "+17.2 % time" in lines[0] and "| none |" in lines[4] and "| 1.000 [1.000, 1.000] | 3 |" in lines[4]
